"""Thousands of drawn runs, each on virtual time and in an order of its own, in all of which every promise is kept."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from simulation import mixed_invariants, mixed_scenario, mixed_world, run
from simulation.invariants import breaches
from simulation.scenario import TROUBLE, draw
from simulation.world import play

pytestmark = pytest.mark.slow

SCENARIOS = 1_600
SLICE = 200


@pytest.mark.promise(of="ends_once")
@pytest.mark.promise(of="cross_talk")
@pytest.mark.promise(of="cancel")
@pytest.mark.promise(of="lane")
@pytest.mark.promise(of="close")
@pytest.mark.promise(of="timeout")
@pytest.mark.promise(of="retries")
@pytest.mark.promise(of="fair")
@pytest.mark.promise(of="context")
@pytest.mark.promise(of="usage")
@pytest.mark.promise(of="liveness")
@pytest.mark.parametrize(
    "first", [0, *(pytest.param(first, marks=pytest.mark.slow) for first in range(SLICE, SCENARIOS, SLICE))]
)
def test_every_promise_is_kept_in_every_scenario(first, record_property):
    begun = time.process_time()
    bad, _ = run.play_slice(range(first, first + SLICE))
    record_property("scenarios_per_second", round(SLICE / (time.process_time() - begun)))
    assert not bad, "\n".join(f"seed {seed}: {found}\n    replay: {run.command(seed)}" for seed, found in bad)


@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    phases=[phase for phase in Phase if phase is not Phase.explain],
)
@pytest.mark.parametrize(
    ("draw", "play", "breaches"),
    [(draw, play, breaches), (mixed_scenario.draw, mixed_world.play, mixed_invariants.breaches)],
    ids=["one batcher", "several parts"],
)
@given(random=st.randoms(use_true_random=False))
def test_every_promise_is_kept_in_whatever_hypothesis_thinks_of(draw, play, breaches, random):
    scenario = draw(random)
    note(str(scenario))
    world = play(scenario)
    found = breaches(world)
    if found:
        note("\n".join(map(str, world.trace)))
    assert not found


@pytest.mark.promise(of="liveness")
def test_the_same_seed_gives_the_same_trace():
    for seed in range(60):
        assert run.play_seed(seed).trace == run.play_seed(seed).trace, run.command(seed)


@pytest.mark.slow
@pytest.mark.promise(of="liveness")
def test_the_trace_is_the_same_in_every_process():
    # Hashes of strings differ between processes, and so do addresses: neither may decide about anything.
    command = [sys.executable, run.__file__, "--scenarios", "60", "--digest"]
    digests = {
        subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.splitlines()[-1]
        for seed in ("1", "2")
    }
    assert len(digests) == 1


@pytest.mark.slow
def test_scenarios_meet_all_kinds_of_trouble():
    """A simulation that never gets anywhere keeps every promise."""
    kinds, outcomes, routes = set(), set(), set()
    for seed in range(600):
        world = play(draw(Random(seed)))
        kinds.update(attempt.fault.kind for attempt in world.upstream.attempts)
        outcomes.update(type(item.outcome).__name__ for item in world.items.values())
        routes.update(item.reply.route for item in world.items.values() if item.reply is not None)
    assert kinds == {"ok", *TROUBLE}
    assert routes == {"batch", "single", "fallback"}
    assert outcomes >= {
        "Reply", "str", "DeadlineExceeded", "ShutDown", "BatcherClosed", "Overloaded", "RateLimited", "AuthFailed", "Filtered",
        "MalformedAnswer", "TruncatedReply", "Refused", "ContextTooLong", "TransportTimeout", "ConnectFailed",
    }  # fmt: skip


@pytest.mark.slow
def test_runs_of_several_parts_meet_all_parts_and_all_kinds_of_trouble():
    met, outcomes, routes, others = set(), set(), set(), set()
    for seed in range(500):
        world = mixed_world.play(mixed_scenario.draw(Random(seed)))
        others.update(f"{other.what} {other.fault.kind}" for other in world.upstream.others)
        outcomes.update(type(caller.outcome).__name__ for caller in world.callers)
        routes.update(reply.route for caller in world.callers for reply in caller.replies)
        rows = [] if world.spool is None else world.spool.rows.values()
        met.update(f"spooled {row.state}" for row in rows)
        met.update("answered twice" for row in rows if len(row.answers) > 1)
        met.update({attempt.beside for attempt in world.upstream.attempts})
        late = sum(stats.look_ups_late for stats in world.stats), sum(stats.look_ups_failed for stats in world.stats)
        met.update(name for name, count in zip(("late", "failed"), late, strict=True) if count)
        met.update({"a worker died"} if world.deaths else ())
    assert others >= {f"embed {kind}" for kind in ("ok", *mixed_scenario.VECTOR_TROUBLE)}
    assert others >= {f"forward {kind}" for kind in ("ok", *mixed_scenario.FORWARD_TROUBLE)} | {"look_up ok"}
    assert routes == {"batch", "single", "fallback", "shared", "cache", "similar"}
    assert met >= {
        "spooled done", "spooled dead", "answered twice", "audit", "check", "late", "failed", "a worker died"
    }  # fmt: skip
    assert outcomes >= {
        "Reply", "Embedding", "list", "bytes", "str", "DeadlineExceeded", "ShutDown", "BatcherClosed", "Overloaded",
        "BudgetExceeded", "MalformedAnswer", "ConnectFailed", "RequestFailed",
    }  # fmt: skip
