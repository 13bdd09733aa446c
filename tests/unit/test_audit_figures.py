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
