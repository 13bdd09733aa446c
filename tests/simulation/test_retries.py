"""An endpoint that always fails is not asked much more often than one that answers."""

from __future__ import annotations

import pytest
from simulation.invariants import breaches
from simulation.scenario import TICK, Ask, Fault, Scenario
from simulation.upstream import TRANSIENT
from simulation.world import play


@pytest.mark.promise(of="retries")
@pytest.mark.parametrize("kind", sorted(TRANSIENT))
def test_retries_keep_to_their_budget_when_everything_fails(kind):
    world = play(
        Scenario(
            policy={
                "max_batch_size": 4,
                "max_wait": TICK,
                "low_max_wait": 2.0,
                "idle": "wait",
                "max_concurrent_batches": 4,
            },
            fallback={},
            retry={"max_attempts": 4, "base": 0.5, "cap": 20.0, "budget": 0.2, "reserve": 10},
            asks=[Ask(at=number * 8 * TICK) for number in range(100)],
            faults=[Fault(kind=kind, retry_after=number % 3 * 0.5 or None) for number in range(2_000)],
            order=11,
        )
    )
    assert not breaches(world)
    assert world.stats.answered == 0
    assert world.stats.retries >= 10
