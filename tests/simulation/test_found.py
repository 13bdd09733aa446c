"""What the simulation has found, as the smallest scenarios that show it."""

from __future__ import annotations

import pytest
from simulation.invariants import breaches
from simulation.scenario import Ask, Fault, Scenario
from simulation.world import play


@pytest.mark.xfail(strict=True, reason="its share of the first call is neither on a reply nor unclaimed")
def test_usage_is_conserved_when_a_caller_goes_in_the_moment_of_an_answer_whose_call_reports_nothing():
    scenario = Scenario(
        policy={
            "max_batch_size": 4,
            "max_wait": 0.25,
            "low_max_wait": 2.0,
            "idle": "wait",
            "max_concurrent_batches": 4,
        },
        fallback={"resolve": "stream"},
        retry={"max_attempts": 1, "budget": 0.0, "reserve": 0},
        asks=[Ask(cancel=("answer", "after")), Ask(), Ask(), Ask()],
        faults=[Fault("nonsense"), Fault(usage=False), Fault(usage=False)],
    )
    assert not breaches(play(scenario))
