"""Kinds of lanes: sizes are condemned, certified and tried again."""

import msgspec
import pytest
from helpers import each

from microbatch.audit.lane_kind import FREE_SAMPLES, LaneKind, step_of

BOUND = 0.02


def feed(kind, step, score, *, most=1000, adapt=True):
    """Add equal scores until they decide something; return what, and after how many."""
    for count in range(1, most + 1):
        decision = kind.add(step, score, BOUND, adapt=adapt)
        if decision is not None:
            return decision, count
    return None, most


@each("size, step", [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (16, 16), (17, 32), (32, 32), (33, 64), (500, 64)])
def test_a_batch_counts_for_the_step_it_fits_in(size, step):
    assert step_of(size) == step


def test_a_condemned_size_is_left_and_tried_again_after_a_certificate_and_enough_requests():
    kind = LaneKind("d")
    decision, needed = feed(kind, 16, 1)
    assert decision == "condemned"
    assert needed <= 10
    assert kind.limit == 4  # far above the bound: two steps
    assert kind.is_condemned(16)
    assert kind.is_condemned(9)
    assert not kind.is_condemned(8)
    assert not kind.grows(10_000, 16)  # not certified
    assert feed(kind, 4, 0) == ("certified", 197)
    assert kind.grows(1, 16)
    assert kind.limit == 8
    assert not kind.grows(1, 16)
    assert feed(kind, 8, 0)[0] == "certified"
    assert kind.grows(1, 16)
    assert kind.limit is None
    assert not kind.is_condemned(16)  # tried again, with new evidence


def test_the_largest_step_has_no_limit_and_nothing_grows_beyond_it():
    kind = LaneKind("d")
    feed(kind, 64, 1)
    assert kind.limit == 16
    for step, limit in ((16, 32), (32, None)):
        feed(kind, step, 0)
        assert kind.grows(500, 100)
        assert kind.limit == limit
    feed(kind, 64, 0)
    assert not kind.grows(500, 100)


def test_less_far_above_the_bound_one_step_is_left():
    kind = LaneKind("d")
    scores = [0, 0, 0, 0, 0, 0, 0, 0, 0, 1] * 60
    decisions = [kind.add(16, score, BOUND, adapt=True) for score in scores]
    assert "condemned" in decisions
    assert kind.limit == 8


def test_from_one_a_batch_of_two_is_tried_after_500_requests_then_1000():
    kind = LaneKind("d")
    feed(kind, 2, 1)
    assert kind.limit == 1
    assert not kind.grows(499, 16)
    assert kind.grows(1, 16)
    assert kind.limit == 2
    feed(kind, 2, 1)
    assert kind.limit == 1
    assert not kind.grows(999, 16)
    assert kind.grows(1, 16)


def test_late_audits_of_a_larger_size_do_not_raise_the_limit():
    kind = LaneKind("d")
    feed(kind, 4, 1)
    low = kind.limit
    feed(kind, 16, 1)
    assert kind.limit == low


def test_without_adapting_only_the_figures_follow():
    kind = LaneKind("d")
    assert feed(kind, 16, 1, adapt=False)[0] == "condemned"
    assert kind.limit is None
    assert list(kind.figures()) == []  # nothing was asked


def test_a_certified_size_that_becomes_bad_is_condemned():
    kind = LaneKind("d")
    assert feed(kind, 8, 0)[0] == "certified"
    decision, needed = feed(kind, 8, 1)
    assert decision == "condemned"
    assert needed < 25
    assert kind.limit < 8


def test_audits_are_free_at_first_and_then_bounded_by_what_the_calls_cost():
    kind = LaneKind("d")
    record = kind.record(8)
    assert record.can_afford(0.0)
    record.asked = record.audits_ended = FREE_SAMPLES
    record.audits_cost, record.calls_cost = 50.0, 509.0
    assert not record.can_afford(0.1)
    record.calls_cost = 511.0
    assert record.can_afford(0.1)


def test_bulk_work_is_held_while_the_step_is_undecided_and_8_audits_are_under_way():
    kind = LaneKind("d")
    kind.under_way = 7
    assert not kind.holds(16)
    kind.under_way = 8
    assert kind.holds(16)
    feed(kind, 16, 0)
    assert not kind.holds(16)
    assert kind.holds(4)


def test_the_record_is_kept_as_json_and_goes_on():
    kind = LaneKind("d", "m")
    feed(kind, 16, 1)
    feed(kind, 4, 0, most=150)
    again = msgspec.json.decode(msgspec.json.encode(kind), type=LaneKind)
    assert again == kind
    assert feed(again, 4, 0) == ("certified", 47)


def test_the_figures_of_a_step():
    kind = LaneKind("d", "m")
    record = kind.record(8)
    record.asked, record.not_comparable, record.different = 12, 2, 3
    for score in (1, 1, -1, *[0] * 7):
        kind.add(8, score, BOUND, adapt=True)
    (row,) = kind.figures()
    assert (row.kind, row.model, row.size, row.asked, row.compared, row.not_comparable) == ("d", "m", 8, 12, 10, 2)
    assert (row.raw, row.excess, row.noise) == pytest.approx((0.3, 0.1, 0.2))
    assert row.excess < row.upper <= 1.0
    assert not row.certified
