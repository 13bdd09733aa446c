"""`map` over ever more items, beside all of them at once by `gather` over `submit`."""

from __future__ import annotations

import asyncio
import gc
from functools import partial
from typing import TYPE_CHECKING, Any

import microbatch as mb
from bench.apart import measured
from bench.report import Run, Table, met
from bench.scale.process import MIB, Echo, ask, check, peak_mib, resident_mib
from bench.timing import Stopwatch, alternate, column, median, ratio

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

WARM_UP = 4_096
"""Items before those that count: more than are ever pending, so that what is allocated once has been."""

PASS_ITEMS = 50_000
"""Fewer items than this are repeated until there were as many: a short time is not measured well."""

MOST_AT_ONCE = 100_000
"""Beyond that "all at once" is not run: its memory follows from this."""

FLAT = 0.10
"""Flat: at most so much more than for the fewest items."""

MAP, GATHER = "map(items)", "gather(submit), all at once"


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


WAYS = {MAP: by_map, GATHER: by_gather}


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
    """Go over *count* items, several times if they are few; return the microseconds of an item and the memory, in MiB."""
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
    return {"wall_us": median(wall), "cpu_us": median(cpu), "warm_mib": warm, "peak_mib": peak_mib()}


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    sizes = sorted({10_000, options.items // 10, options.items})
    cases = {
        (way, count): partial(measured, passes, way=way, count=count)
        for count in sizes
        if count >= 10_000
        for way in WAYS
        if way == MAP or count <= MOST_AT_ONCE
    }
    found: dict[str, dict[str, Any]] = {way: {} for way in WAYS}
    for (way, count), taken in alternate(cases, options.rounds).items():
        found[way][str(count)] = taken
    return found


def table(run: Run) -> Table:
    table = Table(
        f"Over many items in batches of 16, SIMULATED endpoint within the process that answers at once, medians of {run.options['rounds']} "
        "rounds",
        "way | items {:,d} | us an item {:.1f} | time, x the fewest {:.2f} | CPU us an item {:.1f}"
        " | CPU, x the fewest {:.2f} | process peak MiB {:.1f} | peak, x the fewest {:.3f} | bytes an item {:,.0f}",
        f"Each row is a process of its own. Peak: the most that was ever resident (VmHWM); bytes an item: the peak above that after "
        f"{WARM_UP:,} items, by the number of items. Ratios are of the same round. The time includes the caller (messages, reading the "
        "source) and the endpoint's stand-in.",
    )
    for way, by_count in run.samples["items"].items():
        least = next(iter(by_count.values()))
        for count, taken in by_count.items():
            cells = [
                cell
                for name in ("wall_us", "cpu_us", "peak_mib")
                for cell in (median(column(taken, name)), ratio(column(taken, name), column(least, name)))
            ]
            above = median(each["peak_mib"] - each["warm_mib"] for each in taken)
            table.add(way, int(count), *cells, above * MIB / int(count))
    return table


def findings(run: Run, table: Table) -> list[str]:
    del run
    rows = table.by("way", "items")
    ours = [row for (way, _), row in rows.items() if way == MAP]
    others = [row for (way, _), row in rows.items() if way == GATHER]
    least, most, last = ours[0], ours[-1], others[-1]
    cpu, wall, peak = (max(row[f"{name}, x the fewest"] for row in ours) for name in ("CPU", "time", "peak"))
    span, grown = f"{least['items']:,} to {most['items']:,} items", most["process peak MiB"] - least["process peak MiB"]
    beside = rows[MAP, last["items"]]
    return [
        f"map, time of an item, {span}: CPU time at most {cpu:.2f} times that of the fewest, within {FLAT:.0%} {_flat(cpu)}; wall time at "
        f"most {wall:.2f} times, within {FLAT:.0%} {_flat(wall)}.",
        f"map, peak memory of the whole process, {span}: at most {peak:.3f} times that of the fewest, within {FLAT:.0%} {_flat(peak)}. It grew "
        f"by {grown:+.2f} MiB, {grown * MIB / (most['items'] - least['items']):+.1f} bytes for each further item.",
        f"{GATHER}, {last['items']:,} items: {last['CPU us an item'] / beside['CPU us an item']:.2f} times the CPU time and "
        f"{last['process peak MiB'] / beside['process peak MiB']:.2f} times the peak of map.",
    ]


def _flat(ratio: float) -> str:
    return met(ratio <= 1 + FLAT)
