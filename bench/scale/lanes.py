"""Ever more lanes, one after the other: every submit has a system message of its own, so every submit opens and closes a lane."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import TYPE_CHECKING

import microbatch as mb
from bench.apart import measured
from bench.report import Column, Table, met
from bench.scale.echo import Echo, ask, check
from bench.scale.resident import MIB, peak_mib, resident_mib

if TYPE_CHECKING:
    from bench.report import Report

CALLERS = 64
MAX_QUEUED = 1_000
OWN_BYTES = 400
"""Characters that each lane's own message has: what of it was kept would show."""

WARM_SHARE = 0.2
"""Of the lanes, after which memory is compared: what is learned of a lane is kept for the last 1,024 of them."""

NOISE_MIB = 1.0
"""What the allocator may do by itself."""

PATIENCE = 600.0


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


def measure(found: Report, counts: list[int]) -> None:
    """Fill in the table of lanes that come and go."""
    table = found.tables["lanes"] = Table(
        f"Lanes that come and go, one request each, {CALLERS} callers, SIMULATED endpoint within the process",
        [
            Column("lanes", ",d"),
            Column("us a lane", ".1f"),
            Column("MiB after a fifth", ".2f"),
            Column("MiB at the end", ".2f"),
            Column("grown by, bytes a lane", ".2f"),
            Column("process peak MiB", ".1f"),
        ],
        notes=["Each row is a process of its own."],
    )
    found.samples["lanes"] = {}
    for count in counts:
        taken = measured(timed, patience=PATIENCE, count=count)
        memory = taken["memory"]
        at = int(WARM_SHARE * len(memory)) - 1
        grown = (memory[-1] - memory[at]) * MIB / (count * (1 - WARM_SHARE))
        table.add(count, taken["us"], memory[at], memory[-1], grown, taken["peak_mib"])
        found.samples["lanes"][str(count)] = taken


def findings(found: Report) -> list[str]:
    row = found.tables["lanes"].rows[-1]
    count, grown = row[0], row[3] - row[2]
    return [
        (
            f"{count:,} lanes, one after the other, {OWN_BYTES} characters of their own each: memory grew by {grown:+.2f} MiB "
            f"over the last {1 - WARM_SHARE:.0%} of them; flat (noise of {NOISE_MIB:g} MiB) {met(grown <= NOISE_MIB)}."
        )
    ]
