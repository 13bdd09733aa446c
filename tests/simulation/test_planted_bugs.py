"""The simulation finds each of the bugs that batchers like this one have had."""

from __future__ import annotations

import pytest
from simulation import run
from simulation.planted import BUGS

pytestmark = pytest.mark.slow


ENOUGH = 1_500
"""Scenarios within which a bug must be found: some four seconds."""


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_the_simulation_finds(bug):
    with bug():
        for seed in range(ENOUGH):
            found = run.breaches(run.play_seed(seed))
            if found:
                break
    assert found
    # The bug is to blame, not the scenario.
    assert not run.breaches(run.play_seed(seed))
