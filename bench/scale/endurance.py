"""A long run at a steady rate against a simulated endpoint, over sockets: some lanes stay, some are used once, some callers give up."""

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
from bench.apart import measured, simulated_endpoint
from bench.report import Run, Table, met
from bench.scale.process import SYSTEM, ask, check, resident_mib
from bench.timing import median, quantile

if TYPE_CHECKING:
    import argparse

RATE = 200
STAYING_LANES = 4
OWN_LANE_EVERY, GIVES_UP_EVERY = 20, 50
"""One request in so many has a system message of its own; one in so many is given up before it can be answered."""

PATIENCE_S = (0.0, 0.1)
"""How long those wait who give up: in the queue, or in the call."""

REMEMBERED_LANES = 1_024
"""The history of so many lanes is kept when they close. They are filled first: until then memory grows, as it should."""

FIRST_TOKEN_S, TOKENS_PER_S = 0.1, 400.0
"""Pace of the endpoint, which is faster than a real one: it shares the cores with what is measured."""

SAMPLES, LEAST_EVERY_S = 120, 0.5
WARM_UP_SHARE = 0.1
FLAT = 0.10
"""No growth: in the last third at most so much more than in the first."""

LEAST_JUDGED_S = 60.0
"""A shorter run has too few samples to distinguish growth from scatter."""

COLUMNS = {
    "rss_mib": "resident MiB",
    "blocks": "memory blocks in use",
    "tasks": "tasks beside callers",
    "descriptors": "file descriptors",
    "p50_ms": "latency p50 ms",
    "p99_ms": "latency p99 ms",
    "cpu_us": "CPU us an item",
}


class Service:
    """Callers of a batcher, and samples of the process meanwhile."""

    def __init__(self, batcher: mb.Microbatcher, seed: int) -> None:
        self.asked = self.answered = self.given_up = 0
        self.seen: dict[str, array[float]] = {}
        self._batcher = batcher
        self._draw = random.Random(seed)
        self._latencies = array("d")  # takes no memory block for each, as floats in a list do
        self._blocks = 0

    @property
    def waiting(self) -> int:
        return self.asked - self.answered - self.given_up

    async def warm_up(self) -> None:
        """Allocate what is allocated once, count memory blocks from then on, and fill the history of lanes."""
        await self._ready(0)
        gc.collect()
        gc.freeze()  # what is there is not scanned at every sample
        self._blocks = sys.getallocatedblocks()
        await asyncio.gather(*map(self._ready, range(1, 1 + REMEMBERED_LANES)))

    async def _ready(self, number: int) -> None:
        reply = await self._batcher.submit(ask("Reply with exactly: ready", f"Warm-up {number}. {SYSTEM}"))
        check(reply.text, "ready")

    async def arrive(self, seconds: float) -> None:
        """Start `RATE` callers per second; return when the last one has ended."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        async with asyncio.TaskGroup() as callers:
            for number in range(int(seconds * RATE)):
                await asyncio.sleep(max(0.0, start + number / RATE - loop.time()))
                self.asked += 1
                callers.create_task(self._call(number))

    async def _call(self, number: int) -> None:
        word = f"w{number:06}"  # as long for the last as for the first, or the time to answer would grow with it
        lane = f"customer {number}" if number % OWN_LANE_EVERY == 0 else f"shop {number % STAYING_LANES}"
        messages = ask(f"Reply with exactly: {word}", f"For {lane}. {SYSTEM}")
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

    async def watch(self, seconds: float, every: float) -> None:
        """Take a sample *every* so many of *seconds* seconds."""
        loop = asyncio.get_running_loop()
        start, cpu = loop.time(), time.process_time()
        for number in range(1, int(seconds / every) + 1):
            await asyncio.sleep(start + number * every - loop.time())
            used = time.process_time() - cpu
            latencies, self._latencies = self._latencies, array("d")
            gc.collect()
            sample = {
                "at_s": loop.time() - start,
                "rss_mib": resident_mib(),
                "blocks": sys.getallocatedblocks() - self._blocks,
                "tasks": len(asyncio.all_tasks()) - self.waiting,
                "descriptors": len(os.listdir("/proc/self/fd")),  # noqa: PTH208 allocates the least
                "p50_ms": quantile(latencies, 0.5) * 1e3,
                "p99_ms": quantile(latencies, 0.99) * 1e3,
                "cpu_us": used / len(latencies) * 1e6,
            }
            for name, value in sample.items():
                self.seen.setdefault(name, array("d")).append(value)
            cpu = time.process_time()  # sampling is no cost of the callers


async def endure(url: str, seconds: float, every: float, seed: int) -> dict[str, Any]:
    """Generate callers for *seconds* seconds; return the samples by name, and the outcome."""
    transport = mb.OpenAIChat("simulated", base_url=url, api_key="any")
    async with mb.Microbatcher(transport) as batcher:
        service = Service(batcher, seed)
        await service.warm_up()
        async with asyncio.TaskGroup() as group:
            group.create_task(service.watch(seconds, every))
            group.create_task(service.arrive(seconds))
        stats = batcher.stats()
    if service.waiting or stats.queued:
        raise AssertionError(f"{service.waiting} callers and {stats.queued} requests wait when all is over")
    return {
        "seen": {name: [round(value, 3) for value in values] for name, values in service.seen.items()},
        "counts": {name: getattr(service, name) for name in ("asked", "answered", "given_up")},
        "batch_size_mean": stats.batch_size_mean,
        "tasks_left": len(asyncio.all_tasks()) - 1,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    every = max(LEAST_EVERY_S, options.seconds / SAMPLES)
    with simulated_endpoint(FIRST_TOKEN_S, TOKENS_PER_S) as url:
        return measured(endure, url=url, seconds=options.seconds, every=every, seed=options.seed)


def table(run: Run) -> Table:
    taken = run.samples["endurance"]
    counts, seen = taken["counts"], taken["seen"]
    table = Table(
        f"{run.options['seconds']:.0f} s at {RATE} requests/s over sockets to a SIMULATED endpoint, {len(seen['at_s'])} samples",
        "what | first third {:,.2f} | last third {:,.2f} | ratio {:.3f}",
        f"Thirds of what follows the first {WARM_UP_SHARE:.0%}, medians. Memory blocks: those of Python's allocator, above the number after "
        "the first answer; freed memory stays with the process, so they show a leak before the resident memory does.",
        f"{counts['asked']:,} asked, {counts['answered']:,} were answered rightly, {counts['given_up']:,} gave up; {STAYING_LANES} lanes "
        f"stay, one request in {OWN_LANE_EVERY} is in a lane of its own; mean batch {taken['batch_size_mean']:.1f}.",
    )
    for name, words in COLUMNS.items():
        values = seen[name][int(WARM_UP_SHARE * len(seen[name])) :]
        third = max(1, len(values) // 3)
        first, last = median(values[:third]), median(values[-third:])
        table.add(words, first, last, last / first)
    return table


def findings(run: Run, table: Table) -> list[str]:
    taken, seconds = run.samples["endurance"], run.options["seconds"]
    found = [
        f"The long run took {seconds / 60:.1f} min at {RATE} requests/s against a SIMULATED endpoint. Tasks left when all was closed: "
        f"{taken['tasks_left']}."
    ]
    for what, row in table.by("what").items():
        verdict = met(row["ratio"] <= 1 + FLAT) if seconds >= LEAST_JUDGED_S else "not judged, the run was too short"
        found.append(
            f"{what[0].upper()}{what[1:]}: {row['first third']:,.1f} in the first third, {row['last third']:,.1f} in the last; no growth beyond "
            f"{FLAT:.0%} {verdict}."
        )
    return found
