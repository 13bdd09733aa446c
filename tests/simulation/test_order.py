"""Nobody starves: lanes, tenants and priorities take turns."""

from __future__ import annotations

import pytest
from simulation.invariants import breaches
from simulation.scenario import TICK, Ask, Fault, Scenario
from simulation.world import play

pytestmark = pytest.mark.slow


ONE_SLOT = {"max_batch_size": 4, "max_wait": 0.0, "low_max_wait": 0.0, "idle": "wait", "max_concurrent_batches": 1}


def calls_before(asks, wanted):
    """Play *asks* against one slot; return how many calls went out from the arrival of the *wanted* one to its own."""
    world = play(
        Scenario(
            policy=ONE_SLOT,
            fallback={},
            retry={"max_attempts": 1, "budget": 0.0, "reserve": 0},
            asks=asks,
            faults=[Fault(latency=4 * TICK) for _ in range(500)],
            order=3,
        )
    )
    assert not breaches(world)
    text = next(text for text, item in world.items.items() if item.ask is wanted)
    begun = world.items[text].accepted
    calls = [attempt for attempt in world.upstream.attempts if attempt.started >= begun]
    return next(number for number, attempt in enumerate(calls) if text in attempt.texts)


@pytest.mark.promise(of="fair")
def test_a_flooded_lane_does_not_starve_another():
    late = Ask(at=TICK, system="Whisper.")
    assert calls_before([Ask() for _ in range(200)] + [late], late) <= 2


@pytest.mark.promise(of="fair")
def test_a_tenant_with_many_lanes_does_not_starve_one_with_one():
    late = Ask(at=TICK, tenant="blue")
    flood = [Ask(system=f"System {number % 20}.", tenant="red") for number in range(200)]
    assert calls_before([*flood, late], late) <= 2


@pytest.mark.promise(of="fair")
@pytest.mark.parametrize(
    ("priority", "flood", "most"),
    [("low", "normal", 2 * (4 + 1)), ("normal", "high", 2 * (16 + 4)), ("low", "high", 2 * (16 + 1))],
)
def test_a_lower_priority_gets_its_share(priority, flood, most):
    late = Ask(at=TICK, priority=priority)
    assert calls_before([*(Ask(priority=flood) for _ in range(300)), late], late) <= most


@pytest.mark.promise(of="fair")
def test_a_higher_priority_does_not_wait_behind_a_flood_of_lower_ones():
    late = Ask(at=TICK, priority="high")
    flood = [Ask(system=f"System {number % 20}.", priority="low") for number in range(200)]
    assert calls_before([*flood, late], late) <= 2
