"""`map` over ever more items, beside what a user would write around `submit`: all at once, or chunk by chunk."""

from __future__ import annotations

import asyncio
import gc
import itertools
import statistics
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import microbatch as mb
from bench.apart import measured
from bench.report import Column, Table, met
from bench.scale.echo import Echo, ask, check
from bench.scale.resident import MIB, peak_mib, resident_mib
from bench.timing import Stopwatch, alternate, ratios

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.report import Report

WARM_UP = 4_096
"""Items before those that count: more than are ever pending, so that what is made once has been made."""

CHUNK = 2_048
"""What `map` has pending at most by default: 2 x 16 requests x 64 calls."""

PASS_ITEMS = 50_000
"""Fewer items than this are gone through again until there were as many: a short time is not measured well."""

MOST_AT_ONCE = 100_000
"""Beyond that "all at once" is not run: what it takes can be told from this."""

FLAT = 0.10
"""What "flat" means: at most so much more than for the fewest items."""

PATIENCE = 600.0

MAP, CHUNKS, GATHER = "map", "chunks", "gather"
SAID = {
    MAP: "map(items)",
    CHUNKS: f"gather(submit), {CHUNK:,} at a time",
    GATHER: "gather(submit), all at once",
}


async def by_map(batcher: mb.Microbatcher, texts: Iterator[str]) -> int:
    done = 0
    async for result in batcher.map(map(ask, texts)):
        check(result.unwrap().text, f"item {result.index}")
        done += 1
    return done


async def by_gather(batcher: mb.Microbatcher, texts: Iterator[str]) -> int:
    asked = list(texts)
    replies = await asyncio.gather(*(batcher.submit(ask(text)) for text in asked))
    for text, reply in zip(asked, replies, strict=True):
        check(reply.text, text)
    return len(asked)


async def by_chunks(batcher: mb.Microbatcher, texts: Iterator[str]) -> int:
    done = 0
    while chunk := list(itertools.islice(texts, CHUNK)):
        done += await by_gather(batcher, iter(chunk))
    return done


WAYS = {MAP: by_map, CHUNKS: by_chunks, GATHER: by_gather}


def items(count: int) -> Iterator[str]:
    return (f"item {number}" for number in range(count))


async def mapped(count: int, marks: int = 10) -> tuple[list[float], float]:
    """Map over *count* requests; return the memory in MiB at *marks* points on the way, and the mean batch size."""
    memory = []

    def marked() -> Iterator[str]:
        for number, text in enumerate(items(count), 1):
            if number % (count // marks) == 0:
                memory.append(resident_mib())
            yield text

    transport = Echo()
    async with mb.Microbatcher(transport, tokens="bytes") as batcher:
        assert await by_map(batcher, marked()) == count
    return memory, transport.items / transport.calls


async def passes(way: str, count: int) -> dict[str, float]:
    """Go over *count* items, several times if they are few; return the microseconds of an item and what memory that took, in MiB."""
    go, took = WAYS[way], Stopwatch()
    wall, cpu = [], []
    async with mb.Microbatcher(Echo(), tokens="bytes") as batcher:
        await go(batcher, items(WARM_UP))
        gc.collect()
        warm = resident_mib()
        for _ in range(max(1, PASS_ITEMS // count)):
            with took:
                done = await go(batcher, items(count))
            assert done == count
            wall.append(took.wall / count * 1e6)
            cpu.append(took.cpu / count * 1e6)
    return {
        "wall_us": statistics.median(wall),
        "cpu_us": statistics.median(cpu),
        "warm_mib": warm,
        "peak_mib": peak_mib(),
    }


class Row(NamedTuple):
    """Of the table, whose columns say what is in it."""

    way: str
    count: int
    wall: float
    wall_ratio: float
    cpu: float
    cpu_ratio: float
    peak: float
    peak_ratio: float
    above_warm: float
    bytes: float


def measure(found: Report, sizes: list[int], rounds: int, others: list[str]) -> None:
    """Fill in the table of items."""
    cases = {
        (way, count): partial(measured, passes, patience=PATIENCE, way=way, count=count)
        for count in sizes
        for way in [MAP, *others]
        if way != GATHER or count <= MOST_AT_ONCE
    }
    samples = alternate(cases, rounds)
    table = found.tables["items"] = Table(
        f"Over many items in batches of 16, SIMULATED endpoint within the process that answers at once, medians of {rounds} rounds",
        [
            Column("way"),
            Column("items", ",d"),
            Column("us an item", ".1f"),
            Column(f"time, x that of {sizes[0]:,}", ".2f"),
            Column("CPU us an item", ".1f"),
            Column(f"CPU, x that of {sizes[0]:,}", ".2f"),
            Column("process peak MiB", ".1f"),
            Column(f"peak, x that of {sizes[0]:,}", ".3f"),
            Column("peak above warm, MiB", ".2f"),
            Column("bytes an item", ",.0f"),
        ],
        notes=[
            (
                "Each row is a process of its own. Peak: the most that was ever resident (VmHWM); warm: resident after "
                f"{WARM_UP:,} items; bytes an item: the peak above warm by the number of items. Ratios: of the same round, then the "
                "median. The time holds what the caller does (messages, reading the source) and what the endpoint's stand-in does; nothing is "
                "waited for, so on a machine that does nothing else wall time and CPU time are one."
            ),
        ],
    )
    found.samples["items"] = {way: {} for way in (MAP, *others)}
    for (way, count), taken in samples.items():
        least = samples[way, sizes[0]]
        wall, cpu, peaks, warm = (
            [each[name] for each in taken] for name in ("wall_us", "cpu_us", "peak_mib", "warm_mib")
        )
        above = statistics.median(peak - before for peak, before in zip(peaks, warm, strict=True))
        table.add(
            SAID[way],
            count,
            statistics.median(wall),
            statistics.median(ratios(wall, [each["wall_us"] for each in least])),
            statistics.median(cpu),
            statistics.median(ratios(cpu, [each["cpu_us"] for each in least])),
            statistics.median(peaks),
            statistics.median(ratios(peaks, [each["peak_mib"] for each in least])),
            above,
            above * MIB / count,
        )
        found.samples["items"][way][str(count)] = taken


def findings(found: Report) -> list[str]:
    """Say whether it is flat, and what the others do."""
    rows = {(row[0], row[1]): Row(*row) for row in found.tables["items"].rows}
    ours = [row for (way, _), row in rows.items() if way == SAID[MAP]]
    least, most = ours[0], ours[-1]
    wall, cpu, peak = (max(getattr(row, name) for row in ours) for name in ("wall_ratio", "cpu_ratio", "peak_ratio"))
    span, grown = f"{least.count:,} to {most.count:,} items", most.peak - least.peak
    said = [
        (
            f"map, time of an item, {span}: CPU time at most {cpu:.2f} times that of the fewest, within {FLAT:.0%} {_flat(cpu)}; wall time, "
            f"with all else that the machine does in it, at most {wall:.2f} times, within {FLAT:.0%} {_flat(wall)}."
        ),
        (
            f"map, peak memory of the process (the whole of it, not by item), {span}: at most {peak:.3f} times that of the fewest; within "
            f"{FLAT:.0%} {_flat(peak)}. From the fewest to the most it grew by {grown:+.2f} MiB, which is "
            f"{grown * MIB / (most.count - least.count):+.1f} bytes for each further item."
        ),
    ]
    for way in (CHUNKS, GATHER):
        theirs = [row for (name, _), row in rows.items() if name == SAID[way]]
        if theirs:
            last = theirs[-1]
            beside = rows[SAID[MAP], last.count]
            said.append(
                f"{last.way}, {last.count:,} items: {last.cpu / beside.cpu:.2f} times the CPU time and {last.peak / beside.peak:.2f} times "
                "the peak of map."
            )
            if last.count < most.count:
                need = last.bytes * most.count / 2**30
                said.append(f"{last.way} was not run over {most.count:,} items: at that rate they take {need:.1f} GiB.")
    if most.count < 1_000_000:
        said.append(f"The short form ends at {most.count:,} items; the full one goes to 1,000,000.")
    return said


def _flat(ratio: float) -> str:
    return met(ratio <= 1 + FLAT)
