"""Ever more lanes, one after the other: every submit has a system message of its own, so every submit opens and closes a lane."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import TYPE_CHECKING, Any

import microbatch as mb
from bench.apart import measured
from bench.report import Run, Table, met
from bench.scale.process import MIB, Echo, ask, check, peak_mib, resident_mib

if TYPE_CHECKING:
    import argparse

CALLERS = 64
MAX_QUEUED = 1_000
OWN_BYTES = 400
"""Characters of each lane's own message: what is kept of it would show."""

WARM_SHARE = 0.2
"""Share of the lanes after which memory is compared: the history of the last 1,024 lanes is kept."""

NOISE_MIB = 1.0


async def lanes(count: int, marks: int = 10) -> list[float]:
    """Submit *count* requests over as many lanes; return the memory in MiB at *marks* points on the way."""
    memory = []
    policy = mb.FlushPolicy(max_queued=MAX_QUEUED)
    async with mb.Microbatcher(Echo(), policy=policy, tokens="bytes") as batcher:

        async def call(numbers) -> None:
            for number in numbers:
                reply = await batcher.submit(ask(f"item {number}", f"System {number}: " + "x" * OWN_BYTES))
                check(reply.text, f"item {number}")

        numbers = iter(range(count))
        for _ in range(marks):
            part = itertools.islice(numbers, count // marks)
            await asyncio.gather(*(call(part) for _ in range(CALLERS)))
            memory.append(resident_mib())
        assert batcher.stats().answered == count // marks * marks
        assert not list(batcher._engine.lanes)
    return memory


async def timed(count: int) -> dict[str, object]:
    start = time.perf_counter()
    memory = await lanes(count)
    return {"us": (time.perf_counter() - start) / count * 1e6, "memory": memory, "peak_mib": peak_mib()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    return {str(count): measured(timed, count=count) for count in (options.lanes // 10, options.lanes)}


def table(run: Run) -> Table:
    table = Table(
        f"Lanes that come and go, one request each, {CALLERS} callers, SIMULATED endpoint within the process",
        "lanes {:,d} | us a lane {:.1f} | MiB after a fifth {:.2f} | MiB at the end {:.2f} | growth, bytes a lane {:.2f}"
        " | process peak MiB {:.1f}",
        "Each row is a process of its own.",
    )
    for count, taken in run.samples["lanes"].items():
        memory = taken["memory"]
        early, late = memory[int(WARM_SHARE * len(memory)) - 1], memory[-1]
        grown = (late - early) * MIB / (int(count) * (1 - WARM_SHARE))
        table.add(int(count), taken["us"], early, late, grown, taken["peak_mib"])
    return table


def findings(run: Run, table: Table) -> list[str]:
    del run
    row = list(table.by("lanes").values())[-1]
    grown = row["MiB at the end"] - row["MiB after a fifth"]
    return [
        f"{row['lanes']:,} lanes, one after the other, {OWN_BYTES} characters of their own each: memory grew by {grown:+.2f} MiB over the last "
        f"{1 - WARM_SHARE:.0%} of them; flat (noise of {NOISE_MIB:g} MiB) {met(grown <= NOISE_MIB)}."
    ]
