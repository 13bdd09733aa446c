"""A bug in the library itself, at any step of a call's body, costs that call and nothing else."""

from __future__ import annotations

import pytest
from simulation.broken import Breaker, Panic, broken_awaits, broken_functions
from simulation.scenario import TICK, Ask, Fault, Scenario
from simulation.upstream import right_output
from simulation.world import play

import microbatch as mb

pytestmark = pytest.mark.slow


LATE = 30.0
"""When the last request comes: long after the bug."""


def scenario(kind, faults):
    """Two lanes of five, one with poison, and a single call; then, much later, one more request."""
    asks = [Ask(kind=kind, poison=number == 3) for number in range(5)]
    asks += [Ask(kind=kind, system="Whisper.", cancel=("sent", 0.0) if number == 1 else None) for number in range(5)]
    asks += [Ask(kind=kind, alone=True), Ask(at=LATE, kind=kind, system="Rhyme.")]
    return Scenario(
        policy={
            "max_batch_size": 5,
            "max_wait": 16 * TICK,
            "low_max_wait": 2.0,
            "idle": "wait",
            "max_concurrent_batches": 3,
        },
        fallback={"resolve": "stream" if kind == "text" else "verified"},
        retry={"max_attempts": 1, "budget": 0.0, "reserve": 0},
        asks=asks,
        faults=faults,
        order=7,
    )


SCENARIOS = {
    "streamed": ("text", []),
    "missing": ("text", [Fault(kind="short", dice=number) for number in range(2)]),
    "verified": ("fact", []),
    "nonsense": ("fact", [Fault(kind="nonsense") for _ in range(2)]),
}


@pytest.mark.promise(of="bugs")
@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize(
    ("broken", "error"),
    [(broken_awaits, ValueError), (broken_awaits, Panic), (broken_functions, ValueError), (broken_functions, Panic)],
)
def test_a_bug_at_any_step_fails_its_call_with_a_typed_error_and_the_batcher_lives_on(name, broken, error):
    step = 0
    while True:
        breaker = Breaker(step, lambda: error("planted"))
        with broken(breaker):
            world = play(scenario(*SCENARIOS[name]))
        if not breaker.fired:
            break
        check(world, step)
        step += 1
    assert step > 8


def check(world, step):
    assert world.stuck is None, f"step {step}: {world.stuck}"
    assert not world.leftover, f"step {step}: {world.leftover}"
    assert not world.loop.complaints, f"step {step}: {world.loop.complaints}"
    failed = set()
    for item in world.items.values():
        if item.outcome == "cancelled" and item.cancel is not None:
            continue
        if item.reply is not None:
            assert item.reply.output == right_output(item.text)
            continue
        assert isinstance(item.error, mb.RequestFailed), f"step {step}: {item.text} ended with {item.error!r}"
        assert not isinstance(item.error, mb.ShutDown), f"step {step}: the batcher died"
        if not item.ask.poison:
            failed.add(item.lane)
    assert len(failed) <= 1, f"step {step}: {failed}"
    last = list(world.items.values())[-1]
    assert last.reply is not None or last.lane in failed, f"step {step}: nothing is answered any more"
    stats = world.stats
    assert (stats.queued, stats.in_flight) == (0, 0)
    assert stats.answered + stats.failed + stats.cancelled == stats.items == len(world.items)
