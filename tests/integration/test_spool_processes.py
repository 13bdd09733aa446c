"""Spools among processes that are killed at any moment: what was acknowledged is answered, and the first answer stays."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import spool_process
from spool_process import LEASE, TAKERS, item, logged, spool_at

from microbatch.errors import ConfigError
from microbatch.spool.records import Counts, Stage

pytestmark = pytest.mark.slow


PATIENCE = 30.0
ROUNDS = 20  # or as many as a loaded machine needs for
ENOUGH = 50  # requests put, and answers found


class Nursery:
    """Starts processes that work on one spool."""

    def __init__(self, place, folder):
        self.place, self.folder = place, folder
        self.pids = []
        self.launcher = subprocess.Popen(
            [sys.executable, spool_process.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, role, seed):
        self.launcher.stdin.write(f"{role}\t{self.place}\t{self.folder}\t{seed}\n")
        self.launcher.stdin.flush()
        self.pids.append(int(self.launcher.stdout.readline()))

    def kill(self, pid):
        self.pids.remove(pid)
        os.kill(pid, signal.SIGKILL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in list(self.pids):
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                self.kill(pid)
        self.launcher.kill()
        self.launcher.communicate()


@pytest.fixture(params=["sqlite", "redis"])
def nursery(request, tmp_path):
    """Return what starts processes, and the server that they use, if it is one."""
    server = request.getfixturevalue("durable_redis") if request.param == "redis" else None
    folder = tmp_path / "logs"
    folder.mkdir()
    with Nursery(server.url if server else str(tmp_path / "spool.sqlite"), folder) as nursery:
        nursery.server = server
        yield nursery
    assert logged(folder, "crashed") == []


async def test_processes_that_take_at_once_never_hold_the_same_request(nursery):
    spool = spool_at(nursery.place)
    await spool.open()
    try:
        wanted = [f"p{number}" for number in range(600)]
        await spool.put([item(label) for label in wanted])
        for seed in range(TAKERS):
            nursery.start("take", seed)
        end = time.monotonic() + PATIENCE
        while len(logged(nursery.folder, "ended")) < TAKERS:
            assert time.monotonic() < end
            await asyncio.sleep(0.02)
        shares = [logged(nursery.folder, f"taken-{pid}") for pid in nursery.pids]
        assert sorted(itertools.chain(*shares)) == sorted(wanted)
        assert all(shares), "they did not work at once"
    finally:
        await spool.aclose()


async def test_what_was_acknowledged_is_answered_once_whoever_is_killed(nursery):
    chance = random.Random(7)
    seeds = iter(range(1_000))
    for number in itertools.count():
        if number >= ROUNDS and enough_happened(nursery.folder):
            break
        assert number < 10 * ROUNDS, "they come to nothing"
        while len(nursery.pids) < 4:
            nursery.start(chance.choice(["put", "work", "work"]), next(seeds))
        await asyncio.sleep(0.03 + 0.12 * chance.random())
        for pid in chance.sample(nursery.pids, chance.randint(1, 3)):
            nursery.kill(pid)
        if nursery.server and number % 5 == 4:
            nursery.server.kill()
            nursery.server.start()
    for pid in list(nursery.pids):
        nursery.kill(pid)

    acknowledged = set(logged(nursery.folder, "acknowledged"))
    spool = spool_at(nursery.place)
    await open_in_time(spool)
    try:
        await answer_the_rest(spool)
        found = await spool.find([item(label).name for label in acknowledged])
        assert Counter(each.state for each in found) == {"done": len(acknowledged)}
        results = {label: each.result.decode() for label, each in zip(acknowledged, found, strict=True)}
        assert [label for label, result in results.items() if not result.startswith(f"answer {label} ")] == []
        seen = logged(nursery.folder, "found")
        assert [(label, result) for label, result in seen if results.get(label, result) != result] == []
        kept = [each async for each in spool.export()]
        assert len({each.name for each in kept}) == len(kept)
        assert await spool.counts() == Counts(done=len(kept))
    finally:
        await spool.aclose()


def enough_happened(folder):
    return len(set(logged(folder, "acknowledged"))) > ENOUGH and len(logged(folder, "found")) > ENOUGH


async def open_in_time(spool):
    """Open *spool* when the server has read again what it had written down."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(ConfigError):
            return await spool.open()
        await asyncio.sleep(0.02)
    return await spool.open()


async def answer_the_rest(spool):
    """Answer what the processes have left, as their leases run out."""
    end = time.monotonic() + PATIENCE
    while (await spool.counts()).depth:
        assert time.monotonic() < end, await spool.counts()
        for stage in Stage:
            deliveries = await spool.take(stage, 500, lease=LEASE)
            await spool.finish([(each, spool_process.answer(each.item, "at last")) for each in deliveries])
        await asyncio.sleep(0.01)
