"""The simulation finds each of the bugs that batchers like this one have had."""

from __future__ import annotations

import pytest
from simulation import mixed_planted, planted, run

pytestmark = pytest.mark.slow


ENOUGH = 2_250
"""Scenarios within which a bug must be found, a third of which are runs of several parts: some twenty seconds."""

SEVERAL_PARTS = range(run.MIXED_EVERY - 1, ENOUGH, run.MIXED_EVERY)


@pytest.mark.parametrize("bug", planted.BUGS, ids=lambda bug: bug.__name__)
def test_the_simulation_finds(bug):
    check(bug, range(ENOUGH))


@pytest.mark.parametrize("bug", mixed_planted.BUGS, ids=lambda bug: bug.__name__)
def test_runs_of_several_parts_find(bug):
    check(bug, SEVERAL_PARTS)


def check(bug, seeds):
    with bug():
        for seed in seeds:
            found = run.breaches(run.play_seed(seed))
            if found:
                break
    assert found
    # The bug is to blame, not the scenario.
    assert not run.breaches(run.play_seed(seed))
