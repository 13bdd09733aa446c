"""What was measured, as tables."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from bench.overhead.entries import LARGE_BYTES, SMALL_BYTES
from bench.overhead.loads import BURST, LOADS, TIMES, WINDOW, WORKERS
from bench.report import Column, Table
from bench.timing import ratios

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bench.overhead.entries import Entry
    from bench.overhead.loads import Pair
    from bench.overhead.quiet import Quiet

Pairs = dict[str, dict[str, list["Pair"]]]
"""By load, then by name."""


def wall_ratio(pairs: Sequence[Pair]) -> float:
    return statistics.median(ratios([pair.own.wall_us for pair in pairs], [pair.floor.wall_us for pair in pairs]))


def cpu_ratio(pairs: Sequence[Pair]) -> float:
    return statistics.median(ratios([pair.own.cpu_us for pair in pairs], [pair.floor.cpu_us for pair in pairs]))


def filling(pairs: Sequence[Pair]) -> float | None:
    """Return how many items a batch held; None of those who make none."""
    return _median([pair.own.batch for pair in pairs])


def times(loop: str, entries: Mapping[str, Entry], pairs: Pairs) -> Table:
    """Return the table of wall time: microseconds an item, and how many times the floor that is."""
    names = [load.name for load in LOADS if load.name in pairs]
    columns = [Column("library"), Column("waits for company")]
    for name in names:
        columns += [Column(f"{name}: us", ".1f"), Column(f"{name}: x floor", ".2f")]
    table = Table(f"Wall time of each item, {loop}", columns, [], [_SETUP, _CARRIED])
    for entry in entries.values():
        cells: list[float | None] = []
        for name in names:
            own = pairs[name].get(entry.name)
            cells += (
                [None, None] if own is None else [statistics.median(pair.own.wall_us for pair in own), wall_ratio(own)]
            )
        if any(cell is not None for cell in cells):
            table.add(entry.name, entry.windowed, *cells)
    return table


def details(loop: str, entries: Mapping[str, Entry], pairs: Pairs) -> Table:
    """Return the table of processor time, of how full the batches were, and of what the stand-in for an endpoint took."""
    names = [load.name for load in LOADS if load.name in pairs]
    columns = [Column("library")]
    columns += [Column(f"{name}: CPU x floor", ".2f") for name in names]
    columns += [Column(f"{name}: batch", ".1f") for name in names]
    columns += [Column("backend: us", ".2f")]
    table = Table(f"Processor time of each item, and items in a batch, {loop}", columns, [], [_BACKEND])
    for entry in entries.values():
        runs = [pairs[name].get(entry.name) for name in names]
        if any(runs):
            table.add(
                entry.name,
                *(cpu_ratio(own) if own else None for own in runs),
                *(filling(own) if own else None for own in runs),
                _median([pair.own.backend_us for own in runs[:1] if own for pair in own]),
            )
    return table


def quiet(loop: str, found: Mapping[str, Quiet], pending: int) -> Table:
    columns = [
        Column("library"),
        Column("lone request, 50 ms window: ms", ".1f"),
        Column("20 batches of 50 ms: ms", ".0f"),
        Column("waiting request: bytes", ",.0f"),
        Column("answered too: bytes", ",.0f"),
        Column("idle wake-ups/s", ".0f"),
        Column("idle CPU: ms/s", ".1f"),
    ]
    notes = [
        f"Bytes are of resident memory, for each of {pending:,} requests, the task that waits and its own frames included: "
        "first while all wait, then at most until all are answered and the answers kept. Wake-ups are counted where the loop is Python."
    ]
    table = Table(f"When little happens, and when many wait, {loop}", columns, [], notes)
    for name, row in found.items():
        table.add(name, row.latency_ms, row.batches_ms, row.waiting_bytes, row.peak_bytes, row.wakeups, row.idle_cpu_ms)
    return table


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


_SETUP = (
    f"Burst N: {BURST:,} calls under one asyncio.gather, batches of N. Steady: {WORKERS} workers that ask {TIMES} times each, batches of "
    f"32, no task for an item. Longest wait {WINDOW * 1e3:g} ms. x floor: the median over the rounds of the ratio to a run of bare futures "
    "(floor-future) right before; the floor's own ratio tells the noise. What gather, tasks and futures take is in the floor and in "
    "everyone's figure. No endpoint and no network: the backend answers at once. Modules are out of reach of garbage collection: so many "
    "libraries are imported here to be compared that looking through them would be most of some figures."
)
_CARRIED = (
    f"Floors and peers carry an integer. microbatch carries two chat messages built anew for each call (300 tokens shared, {SMALL_BYTES} "
    f"bytes of its own, {LARGE_BYTES:,} in the row that says so), finds equal ones under way, composes prompts and takes replies apart. "
    "Same work: the batch function composes the same numbered prompt, decodes the same reply with msgspec and matches answers by position."
)
_BACKEND = (
    "Backend: what the stand-in for an endpoint takes of each item's time in the first burst: it finds the ids and fills in a template. It is "
    "part of all figures of microbatch, not subtracted; that of the peers, one list, is part of theirs and not told apart."
)
