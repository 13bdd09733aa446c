"""A long run at a steady rate against a simulated endpoint, over sockets: does anything grow?

Callers are as they are in a service: some lanes that stay, some that are asked once, and callers that lose patience.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import statistics
import time
from typing import TYPE_CHECKING, Any

import microbatch as mb
from bench.apart import measured, simulated_endpoint
from bench.report import Column, Table
from bench.scale.echo import SYSTEM, ask, check
from bench.scale.resident import MIB, resident_mib
from bench.timing import quantile

if TYPE_CHECKING:
    from bench.report import Report

RATE = 200
FIRST_TOKEN_S, TOKENS_PER_S = 0.1, 400.0
"""Of the simulated endpoint, which is faster than a real one: it shares two cores with what is measured."""

STAYING_LANES = 4
OWN_LANE_EVERY, GIVES_UP_EVERY = 20, 50
"""One request in so many has a system message of its own; one in so many is given up before it can be answered."""

PATIENCE_S = (0.0, 0.1)
"""How long those wait who give up: in the queue, or in the call."""

REMEMBERED_LANES = 1_024
"""What is learned of so many lanes is kept when they close. They are filled first: until then memory grows, as it should."""

SAMPLES, LEAST_EVERY_S = 120, 0.5
WARM_UP_SHARE = 0.1
STARTING_S = 30.0
"""What a run may take longer than it was to take."""

FLAT = 0.10
MOST_OBJECTS = 0.1
"""Objects an item by which their number may grow, for the scatter: a leak of one would be 1."""


async def endure(url: str, seconds: float, every: float, seed: int) -> dict[str, list[float]]:
    """Ask `RATE` times a second for *seconds* seconds; return what was seen *every* so many seconds."""
    loop, draw = asyncio.get_running_loop(), random.Random(seed)
    callers: set[asyncio.Task[None]] = set()
    latencies: list[float] = []
    seen: dict[str, list[float]] = {
        name: []
        for name in (
            "at_s",
            "items",
            "rss_mib",
            "objects",
            "tasks",
            "descriptors",
            "p50_ms",
            "p99_ms",
            "cpu_us",
            "late_ms",
        )
    }
    counts = {"asked": 0, "answered": 0, "given_up": 0}
    lateness: list[float] = []

    async def caller(number: int) -> None:
        word = f"w{number}"
        whose = f"customer {number}" if number % OWN_LANE_EVERY == 0 else f"shop {number % STAYING_LANES}"
        messages = ask(f"Reply with exactly: {word}", f"For {whose}. {SYSTEM}")
        patience = draw.uniform(*PATIENCE_S) if number % GIVES_UP_EVERY == 1 else None
        start = loop.time()
        try:
            async with asyncio.timeout(patience):
                reply = await batcher.submit(messages)
        except TimeoutError:
            counts["given_up"] += 1
            return
        latencies.append(loop.time() - start)
        check(reply.text, word)
        counts["answered"] += 1

    def ended(task: asyncio.Task[None]) -> None:
        callers.discard(task)
        if not task.cancelled() and task.exception():
            failures.append(repr(task.exception()))

    failures: list[str] = []

    async def arrive() -> None:
        start = loop.time()
        for number in range(int(seconds * RATE)):
            due = start + number / RATE
            if (wait := due - loop.time()) > 0:
                await asyncio.sleep(wait)
            lateness.append(loop.time() - due)
            counts["asked"] += 1
            task = loop.create_task(caller(number))
            callers.add(task)
            task.add_done_callback(ended)

    async def watch() -> None:
        start, cpu = loop.time(), time.process_time()
        answered = 0
        for number in range(1, int(seconds / every) + 1):
            await asyncio.sleep(start + number * every - loop.time())
            used = time.process_time() - cpu
            gc.collect()
            row = {
                "at_s": loop.time() - start,
                "items": counts["answered"],
                "rss_mib": resident_mib(),
                "objects": len(gc.get_objects()),
                "tasks": len(asyncio.all_tasks()) - len(callers),
                "descriptors": len(os.listdir("/proc/self/fd")),  # noqa: PTH208 the least that can be done
                "p50_ms": quantile(latencies, 0.5) * 1e3,
                "p99_ms": quantile(latencies, 0.99) * 1e3,
                "cpu_us": used / (counts["answered"] - answered) * 1e6,
                "late_ms": max(lateness) * 1e3,
            }
            for name, value in row.items():
                seen[name].append(round(value, 3))
            answered = counts["answered"]
            latencies.clear()
            lateness.clear()
            cpu = time.process_time()

    transport = mb.OpenAIChat("simulated", base_url=url, api_key="any")
    async with mb.Microbatcher(transport) as batcher:
        ready = [ask("Reply with exactly: ready", f"Warm-up {number}. {SYSTEM}") for number in range(REMEMBERED_LANES)]
        for reply in await asyncio.gather(*map(batcher.submit, ready)):
            check(reply.text, "ready")
        del ready, reply
        gc.collect()
        gc.freeze()  # what is there from the start is neither counted nor gone through at every sample
        async with asyncio.TaskGroup() as group:
            group.create_task(watch())
            group.create_task(arrive())
        while callers:
            await asyncio.wait(callers)
        stats = batcher.stats()
    assert not failures, failures[:3]
    assert counts["answered"] + counts["given_up"] == counts["asked"], counts
    assert stats.queued == 0, stats
    left = len(asyncio.all_tasks()) - 1
    return seen | {
        "counts": counts,
        "batch_size_mean": stats.batch_size_mean,
        "calls": stats.upstream_calls,
        "tasks_left": left,
    }


def measure(found: Report, seconds: float) -> None:
    """Fill in the table of the long run."""
    every = max(LEAST_EVERY_S, seconds / SAMPLES)
    with simulated_endpoint(FIRST_TOKEN_S, TOKENS_PER_S) as url:
        seen = measured(endure, patience=seconds + STARTING_S, url=url, seconds=seconds, every=every, seed=found.seed)
    found.samples["endurance"] = seen
    counts = seen["counts"]
    table = found.tables["endurance"] = Table(
        f"{seconds:.0f} s at {RATE} requests/s over sockets to a SIMULATED endpoint, seen every {every:g} s",
        [
            Column("what"),
            Column("first third", ",.2f"),
            Column("last third", ",.2f"),
            Column("ratio", ".3f"),
            Column("slope an hour", "+,.2f"),
            Column("slope an item", "+.4f"),
        ],
        notes=[
            f"Thirds of what follows the first {WARM_UP_SHARE:.0%}, medians; slopes by least squares over all of it.",
            (
                f"{counts['asked']:,} asked, {counts['answered']:,} answered rightly, {counts['given_up']:,} given up by their callers; "
                f"{STAYING_LANES} lanes that stay, one request in {OWN_LANE_EVERY} in a lane of its own; {seen['calls']:,} calls, "
                f"mean batch {seen['batch_size_mean']:.1f}, after one in each of {REMEMBERED_LANES:,} lanes to warm up. Callers came at most {max(seen['late_ms']):.0f} ms after their time."
            ),
        ],
    )
    for name, what in SHOWN.items():
        at, values = steady(seen, name)
        third = len(values) // 3
        first, last = statistics.median(values[:third]), statistics.median(values[-third:])
        slope = statistics.linear_regression(at, values).slope
        table.add(what, first, last, last / first, slope * 3600, slope / RATE)


SHOWN = {
    "rss_mib": "resident MiB",
    "objects": "objects of the collector",
    "tasks": "tasks beside callers",
    "descriptors": "file descriptors",
    "p50_ms": "latency p50 ms",
    "p99_ms": "latency p99 ms",
    "cpu_us": "CPU us an item",
}


def steady(seen: dict[str, Any], name: str) -> tuple[list[float], list[float]]:
    """Return the times and values after the warm-up."""
    at = int(WARM_UP_SHARE * len(seen["at_s"]))
    return seen["at_s"][at:], seen[name][at:]


def findings(found: Report) -> list[str]:
    rows = {row[0]: row for row in found.tables["endurance"].rows}
    seen = found.samples["endurance"]
    minutes = seen["at_s"][-1] / 60
    said = [f"The long run took {minutes:.1f} min at {RATE} requests/s against a SIMULATED endpoint, not a provider."]
    for name in ("rss_mib", "tasks", "descriptors", "p50_ms", "p99_ms", "cpu_us"):
        what, first, last, ratio = rows[SHOWN[name]][:4]
        said.append(
            f"{what[0].upper()}{what[1:]}: {first:,.1f} in the first third, {last:,.1f} in the last; no growth beyond {FLAT:.0%} "
            f"{'met' if ratio <= 1 + FLAT else 'MISSED'}."
        )
    _, first, last, _, _, by_item = rows[SHOWN["objects"]]
    said.append(
        f"Objects: {by_item:+.4f} for each item ({first:,.0f}, then {last:,.0f}); at most {MOST_OBJECTS} "
        f"{'met' if by_item <= MOST_OBJECTS else 'MISSED'}. Tasks left when all was over and closed: {seen['tasks_left']}."
    )
    at, values = steady(seen, "rss_mib")
    items = RATE * (at[-1] - at[0])
    scatter = statistics.stdev(values)
    said.append(
        f"What it would show: the memory's scatter is {scatter * 1024:.0f} KiB over {items:,.0f} items, so a leak of some "
        f"{scatter * MIB / items:.0f} bytes an item or more."
    )
    return said
