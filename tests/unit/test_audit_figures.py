"""The figures of audits at their extremes."""

import pytest
from helpers import each

from microbatch.audit.evidence import Evidence
from microbatch.audit.lane_kind import LaneKind


@each(
    "worse, equal, better", [(n * a, n * b, n * c) for n in (1, 7, 400) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
)
def test_the_upper_bound_of_any_scores_is_a_bound(worse, equal, better):
    evidence = Evidence(worse, equal, better)
    assert evidence.excess <= evidence.upper_bound <= 1
    assert evidence.upper_bound == 1 or evidence.wealth_below(evidence.upper_bound + 1e-6) >= 20


@pytest.mark.parametrize("score", [1, 0, -1])
def test_a_step_whose_scores_are_all_the_same_has_figures(score):
    kind = LaneKind("00ff", "m")
    for count in range(1, 60):
        kind.record(4).asked = count
        kind.add(4, score, 0.02, adapt=False)
        (row,) = kind.figures()
        assert (row.compared, row.excess) == (count, score)
    assert (row.condemned, row.certified) == (score == 1, score == -1)


def condemn(kind, step):
    """Make scores condemn *step*, as they do for an audit."""
    decision = None
    while decision != "condemned":
        decision = kind.add(step, 1, 0.02, adapt=True)
    kind.doubt(100.0, step)


def test_a_condemnation_makes_earlier_answers_of_the_step_and_of_larger_undecided_ones_doubtful():
    kind = LaneKind("00ff", "m")
    for step in (2, 4, 8, 16, 32):
        kind.record(step)
    while not kind.record(32).certified:
        kind.add(32, 0, 0.02, adapt=True)
    condemn(kind, 8)
    doubtful = {size: kind.is_condemned(size, 99.0) for size in (1, 2, 4, 5, 8, 9, 16, 17, 32)}
    assert doubtful == {1: False, 2: False, 4: False, 5: True, 8: True, 9: True, 16: True, 17: False, 32: False}
    assert {size: kind.is_condemned(size, 101.0) for size in (4, 8, 16)} == {4: False, 8: True, 16: False}
    assert {size: kind.is_condemned(size) for size in (4, 8, 16)} == {4: False, 8: True, 16: False}


def test_answers_given_before_a_step_is_tried_again_stay_doubtful_and_those_given_since_are_not():
    kind = LaneKind("00ff", "m")
    condemn(kind, 2)
    while not kind.grows(1, 16):
        pass
    kind.doubt(200.0)
    assert [kind.is_condemned(2, at) for at in (99.0, 150.0, 201.0)] == [True, True, False]
    while not kind.record(2).certified:
        kind.add(2, 0, 0.02, adapt=True)
    condemn(kind, 4)  # something else
    kind.doubt(300.0)
    assert [kind.is_condemned(2, at) for at in (150.0, 201.0)] == [True, False]
    assert [kind.is_condemned(4, at) for at in (250.0, 301.0)] == [True, True]
