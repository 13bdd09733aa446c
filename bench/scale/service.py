"""Callers as a service has them, at a steady rate: some lanes stay, some are asked once, and some callers lose patience."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
import time
from array import array
from typing import TYPE_CHECKING, Any

import microbatch as mb
from bench.scale.echo import SYSTEM, ask, check
from bench.scale.resident import resident_mib
from bench.timing import quantile

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

RATE = 200
STAYING_LANES = 4
OWN_LANE_EVERY, GIVES_UP_EVERY = 20, 50
"""One request in so many has a system message of its own; one in so many is given up before it can be answered."""

PATIENCE_S = (0.0, 0.1)
"""How long those wait who give up: in the queue, or in the call."""

REMEMBERED_LANES = 1_024
"""What is learned of so many lanes is kept when they close. They are filled first: until then memory grows, as it should."""


class Service:
    """Callers of a batcher, and what is seen of the process meanwhile.

    Attributes:
        asked: How many have come.
        answered: How many of them have their answer, which was the right one.
        given_up: How many of them wait no more.
    """

    def __init__(self, batcher: mb.Microbatcher, seed: int) -> None:
        self.asked = self.answered = self.given_up = 0
        self._batcher = batcher
        self._draw = random.Random(seed)
        self._latencies = array("d")  # takes no block for each, as floats in a list do
        self._most_late = 0.0
        self._blocks = 0

    @property
    def waiting(self) -> int:
        return self.asked - self.answered - self.given_up

    async def warm_up(self) -> None:
        """Have made what is made once; from then on memory blocks are counted. Then fill what the batcher remembers of lanes."""
        await self._ready(0)
        gc.collect()
        gc.freeze()  # what is there is not gone through at every sample
        self._blocks = sys.getallocatedblocks()
        await asyncio.gather(*map(self._ready, range(1, 1 + REMEMBERED_LANES)))

    async def _ready(self, number: int) -> None:
        reply = await self._batcher.submit(ask("Reply with exactly: ready", f"Warm-up {number}. {SYSTEM}"))
        check(reply.text, "ready")

    async def arrive(self, seconds: float) -> None:
        """Let `RATE` callers come a second; return when the last one has gone."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        async with asyncio.TaskGroup() as callers:
            for number in range(int(seconds * RATE)):
                due = start + number / RATE
                if (wait := due - loop.time()) > 0:
                    await asyncio.sleep(wait)
                self._most_late = max(self._most_late, loop.time() - due)
                self.asked += 1
                callers.create_task(self._call(number))

    async def _call(self, number: int) -> None:
        word = f"w{number:06}"  # as long for the last as for the first, or the time to answer would grow with it
        whose = f"customer {number}" if number % OWN_LANE_EVERY == 0 else f"shop {number % STAYING_LANES}"
        messages = ask(f"Reply with exactly: {word}", f"For {whose}. {SYSTEM}")
        patience = self._draw.uniform(*PATIENCE_S) if number % GIVES_UP_EVERY == 1 else None
        start = time.perf_counter()
        try:
            async with asyncio.timeout(patience):
                reply = await self._batcher.submit(messages)
        except TimeoutError:
            self.given_up += 1
            return
        self._latencies.append(time.perf_counter() - start)
        check(reply.text, word)
        self.answered += 1

    async def watch(self, seconds: float, every: float) -> AsyncIterator[dict[str, float]]:
        """Yield what is seen, *every* so many of *seconds* seconds."""
        loop = asyncio.get_running_loop()
        start, cpu = loop.time(), time.process_time()
        for number in range(1, int(seconds / every) + 1):
            await asyncio.sleep(start + number * every - loop.time())
            used = time.process_time() - cpu
            yield {"at_s": loop.time() - start, **self._seen(used)}
            cpu = time.process_time()  # what it takes to look is no cost of the callers

    def _seen(self, used: float) -> dict[str, float]:
        """Return what is there now, and how callers have fared since the last time, for *used* seconds of processor time."""
        latencies, self._latencies = self._latencies, array("d")
        most_late, self._most_late = self._most_late, 0.0
        if not latencies:
            raise RuntimeError(f"nobody was answered between two samples; {self.waiting} callers wait")
        gc.collect()
        return {
            "rss_mib": resident_mib(),
            "blocks": sys.getallocatedblocks() - self._blocks,
            "tasks": len(asyncio.all_tasks()) - self.waiting,
            "descriptors": len(os.listdir("/proc/self/fd")),  # noqa: PTH208 the least that can be done
            "p50_ms": quantile(latencies, 0.5) * 1e3,
            "p99_ms": quantile(latencies, 0.99) * 1e3,
            "cpu_us": used / len(latencies) * 1e6,
            "late_ms": most_late * 1e3,
        }


async def endure(url: str, seconds: float, every: float, seed: int) -> dict[str, Any]:
    """Let callers come for *seconds* seconds; return what was seen on the way, by name, and what came of them."""
    seen: dict[str, array[float]] = {}

    async def look() -> None:
        async for sample in service.watch(seconds, every):
            for name, value in sample.items():
                seen.setdefault(name, array("d")).append(value)

    transport = mb.OpenAIChat("simulated", base_url=url, api_key="any")
    async with mb.Microbatcher(transport) as batcher:
        service = Service(batcher, seed)
        await service.warm_up()
        async with asyncio.TaskGroup() as group:
            group.create_task(look())
            group.create_task(service.arrive(seconds))
        stats = batcher.stats()
    if service.waiting or stats.queued:
        raise AssertionError(f"{service.waiting} callers and {stats.queued} requests wait when all is over")
    return {
        "seen": {name: [round(value, 3) for value in values] for name, values in seen.items()},
        "counts": {name: getattr(service, name) for name in ("asked", "answered", "given_up")},
        "batch_size_mean": stats.batch_size_mean,
        "calls": stats.upstream_calls,
        "tasks_left": len(asyncio.all_tasks()) - 1,
    }
