"""No more than the limit in any minute, by many processes, whatever happens to them, to the server, and on the way between."""

from __future__ import annotations

import pytest
from limit_world import World

pytestmark = [pytest.mark.slow, pytest.mark.promise(of="shared_limits")]

LIMITS = [(200, 40_000), (40, None), (None, 30_000), (7, 5_000)]
SEEDS = range(6)


def world_for(server, limit, seed):
    with server.client() as client:
        client.flushall()
    return World(server.client(), limit, seed)


def outage(world):
    world.is_down, world.is_refusing = (True, False) if world.draw.random() < 0.5 else (False, True)
    if world.draw.random() < 0.3:
        world.empty()


def recovery(world):
    world.is_down = world.is_refusing = False


def clock_set(world):
    world.clock_offset += world.draw.choice([-200.0, -30.0, -5.0, 10.0, 70.0])


CHANGES = {
    "a process starts": lambda world: world.start(),
    "two processes start": lambda world: world.start(2),
    "a process is killed": lambda world: world.processes and world.draw.choice(world.processes).kill(),
    "a process leaves": lambda world: world.processes and world.draw.choice(world.processes).leave(),
    "the server goes": outage,
    "the server is back": recovery,
    "it loses everything": lambda world: world.empty(),
    "its clock is set": clock_set,
    "the net is slow": lambda world: setattr(world, "slowness", world.draw.choice([0.001, 0.05, 0.45])),
    "the net loses": lambda world: setattr(world, "loss", world.draw.choice([0.0, 0.0, 0.05])),
    "much to do": lambda world: setattr(world, "load", world.draw.choice([0.1, 1.0, 3.0])),
    "calls are cancelled": lambda world: setattr(world, "cancels", world.draw.choice([0.0, 0.2])),
}


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_no_minute_sees_more_than_the_limit(redis_server, seed):
    world = play(redis_server, seed)
    # All is well again, but for what has died: after a window of doubt the whole limit is used.
    recovery(world)
    world.loss = world.cancels = 0.0
    world.slowness, world.load = 0.02, 4.0
    world.tokens = lambda: world.draw.randint(1, 400)
    world.start(2)
    world.advance(140)
    since = world.now
    world.advance(122)
    assert world.judge.excess <= 0
    used = world.judge.used(since, world.now)
    assert max(amount / limit for amount, limit in zip(used, world.limit, strict=True) if limit is not None) > 0.75


def play(server, seed, minutes=6):
    world = world_for(server, LIMITS[seed % len(LIMITS)], seed)
    world.tokens = lambda: world.draw.choice([world.draw.randint(1, 50), world.draw.randint(1, 400), 1_500])
    world.start(world.draw.randint(1, 8))
    happened = []
    while world.now < minutes * 60:
        name = world.draw.choice(list(CHANGES))
        happened.append((round(world.now, 1), name))
        CHANGES[name](world)
        world.advance(world.draw.choice([0.3, 2.0, 5.0, 20.0, 70.0]))
        assert world.judge.excess <= 0, (world.now, happened)
    return world
