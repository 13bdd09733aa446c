"""Poison in a batch costs few calls, and nobody but itself."""

from __future__ import annotations

import math
from random import Random

import pytest
from simulation.invariants import breaches
from simulation.scenario import REFUSALS, TICK, Ask, Scenario
from simulation.world import play

import microbatch as mb


def batch_with_poison(random, refusal):
    """One batch of *n* requests, *k* of them poison."""
    size = random.randint(2, 16)
    poison = set(random.sample(range(size), random.randint(1, min(4, size))))
    return Scenario(
        policy={
            "max_batch_size": size,
            "max_wait": 16 * TICK,
            "low_max_wait": 2.0,
            "idle": "wait",
            "max_concurrent_batches": 4,
        },
        fallback={"resolve": random.choice(("stream", "verified")), "max_concurrent": random.randint(1, 4)},
        retry={"max_attempts": 4, "budget": 0.2, "reserve": 10},
        asks=[Ask(poison=number in poison) for number in range(size)],
        poison=refusal,
        order=random.getrandbits(32),
    )


@pytest.mark.promise(of="poison")
@pytest.mark.parametrize("refusal", REFUSALS)
def test_poison_is_found_by_halving_and_nobody_else_fails(refusal):
    for seed in range(25):
        scenario = batch_with_poison(Random(seed), refusal)
        world = play(scenario)
        assert not breaches(world), seed
        size = len(scenario.asks)
        culprits = [item for item in world.items.values() if item.ask.poison]
        # What a filter stops half-way may have been answered by then.
        answered = refusal == "filtered_answer"
        assert all(isinstance(item.error, mb.StatusError | mb.Refused) or answered for item in culprits), seed
        assert all(item.reply is not None for item in world.items.values() if not item.ask.poison), seed
        bound = 1 + 2 * len(culprits) * math.ceil(math.log2(size))
        assert world.stats.upstream_calls <= bound, (
            f"{len(culprits)} of {size} cost {world.stats.upstream_calls} calls (seed {seed})"
        )
