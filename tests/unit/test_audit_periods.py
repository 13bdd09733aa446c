"""The answers of which periods of a size are doubtful."""

from __future__ import annotations

import msgspec

from microbatch.audit.lane_kind import LaneKind

BOUND = 0.1


def judged(kind, step, verdict):
    """Add scores to *step* of *kind* until the *verdict* falls."""
    for _ in range(10_000):
        decided = kind.add(step, int(verdict == "condemned"), BOUND, adapt=True)
        if decided is not None:
            assert decided == verdict
            return
    raise AssertionError("nothing is decided")


def doubtful(kind, size):
    return [period for period in range(9) if kind.is_doubtful(size, period)]


def test_a_condemnation_makes_the_answers_since_the_last_certificate_doubtful():
    kind = LaneKind("kind")
    assert (kind.period(16), doubtful(kind, 16)) == (0, [])
    judged(kind, 16, "certified")
    assert (kind.period(9), kind.period(16), kind.period(8)) == (1, 1, 0)
    judged(kind, 16, "condemned")
    assert (kind.period(16), doubtful(kind, 16), doubtful(kind, 8)) == (1, [1], [])


def test_late_answers_of_a_condemned_size_are_doubtful_and_a_new_try_does_not_vindicate_the_earlier_one():
    kind = LaneKind("kind")
    judged(kind, 16, "condemned")
    assert (kind.period(16), kind.limit) == (0, 8)
    judged(kind, 8, "certified")
    assert kind.grows(10_000, 16)
    assert kind.limit is None
    assert (kind.period(16), doubtful(kind, 16)) == (1, [0])
    judged(kind, 16, "certified")
    assert (kind.period(16), doubtful(kind, 16)) == (2, [0])
    judged(kind, 16, "condemned")
    assert doubtful(kind, 16) == [0, 2]


def test_larger_batches_that_nothing_will_judge_any_more_are_doubtful_too():
    kind = LaneKind("kind")
    judged(kind, 64, "certified")
    kind.add(32, 0, BOUND, adapt=True)
    judged(kind, 16, "condemned")
    assert (doubtful(kind, 16), doubtful(kind, 20), doubtful(kind, 8)) == ([0], [0], [])
    assert doubtful(kind, 40) == [], "that size was judged"


def test_the_record_is_the_same_after_it_was_stored():
    kind = LaneKind("kind", "model")
    judged(kind, 16, "certified")
    judged(kind, 16, "condemned")
    kind.add(4, 1, BOUND, adapt=True)
    assert msgspec.json.decode(msgspec.json.encode(kind), type=LaneKind) == kind
