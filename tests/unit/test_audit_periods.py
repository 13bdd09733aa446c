"""The answers of which periods of a size are doubtful."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microbatch.audit.lane_kind import STEPS, LaneKind

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


@pytest.mark.parametrize(
    "damage",
    [
        {"limit": 3},
        {"limit": 64},
        {"limit": 0},
        {"steps": {"5": {}}},
        {"steps": {"4": {"detector": {"bound": 0.02, "wealth": [0.0]}}}},
        {"steps": {"4": {"evidence": {"worse": -1}}}},
        {"condemnations": -1},
        {"requests": -1},
    ],
    ids=str,
)
def test_a_record_that_was_damaged_cannot_be_read(damage):
    """It is refused as a whole: later on it would end a run, or keep the size of its batches down for good."""
    kept = msgspec.json.encode({"digest": "kind", **damage})
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(kept, type=LaneKind)


def test_a_new_try_that_is_undecided_is_given_up_when_nothing_follows():
    kind = LaneKind("kind")
    judged(kind, 16, "condemned")
    judged(kind, 8, "certified")
    assert not kind.give_up_tries(), "there is none"
    assert kind.grows(10_000, 16)
    kind.add(16, 0, BOUND, adapt=True)
    assert kind.give_up_tries()
    assert (kind.limit, doubtful(kind, 16)) == (8, [0, 1])
    assert not kind.give_up_tries(), "it was given up"
    assert kind.grows(10_000, 16), "it is tried again later"
    assert (kind.period(16), kind.record(16).evidence.count) == (2, 1)
    judged(kind, 16, "certified")
    assert not kind.give_up_tries()
    assert doubtful(kind, 16) == [0, 1]


def test_what_was_never_condemned_is_not_given_up():
    kind = LaneKind("kind")
    kind.add(16, 0, BOUND, adapt=True)
    assert not kind.give_up_tries()
    assert doubtful(kind, 16) == []


def test_a_larger_size_that_was_undecided_begins_a_new_period_when_it_is_used_again():
    kind = LaneKind("kind")
    kind.add(32, 0, BOUND, adapt=True)
    for step, verdict in ((16, "condemned"), (8, "certified"), (16, "certified")):
        judged(kind, step, verdict)
        assert verdict == "condemned" or kind.grows(10_000, 32)
    assert (kind.limit, kind.period(32), kind.record(32).evidence.count) == (None, 1, 1)
    assert doubtful(kind, 32) == [0]


USED = STEPS[:-1]
VERDICTS = st.tuples(st.just("judge"), st.sampled_from(USED[1:]), st.sampled_from((0, 1)))
SCORES = st.tuples(st.just("add"), st.sampled_from(USED[1:]), st.sampled_from((-1, 0, 1)))
EVENTS = st.lists(VERDICTS | SCORES | st.just(("grow",)) | st.just(("give up",)), max_size=30)


@given(EVENTS)
def test_a_size_in_use_is_never_in_a_doubtful_period(events):
    """Otherwise its items would be asked again for ever."""
    kind = LaneKind("kind")
    for event in events:
        if event[0] in ("add", "judge"):
            word, step, score = event
            for _ in range(100 if word == "judge" else 1):
                kind.add(step, score, BOUND, adapt=True)
        elif event[0] == "grow":
            kind.grows(10**6, USED[-1])
        else:
            kind.give_up_tries()
        in_use = [step for step in USED if kind.limit is None or step <= kind.limit]
        assert not any(kind.is_doubtful(step, kind.period(step)) for step in in_use)
