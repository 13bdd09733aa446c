"""Time and memory over a million items, over a million lanes, and for ten minutes at a steady rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.benchmark import Option
from bench.scale import endurance, items, lanes

if TYPE_CHECKING:
    import argparse

    from bench.report import Run, Table

QUESTION = "Do time and memory stay flat over a million items, a million lanes, and ten minutes?"
COMPARED = ["aiohttp", "msgspec"]
OPTIONS = {
    "items": Option(int, 1_000_000, 50_000, "most items of map, which also runs over a tenth of them and over 10,000"),
    "lanes": Option(int, 1_000_000, 20_000, "lanes, one after the other"),
    "rounds": Option(int, 3, 1, "rounds of the items"),
    "seconds": Option(float, 600.0, 8.0, "of the long run"),
}
PARTS = (items, lanes, endurance)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    return {part.__name__.rpartition(".")[2]: part.measure(options) for part in PARTS}


def tables(run: Run) -> dict[str, Table]:
    return {part.__name__.rpartition(".")[2]: part.table(run) for part in PARTS}


def findings(run: Run, tables: dict[str, Table]) -> list[str]:
    return [
        finding for part, table in zip(PARTS, tables.values(), strict=True) for finding in part.findings(run, table)
    ]
