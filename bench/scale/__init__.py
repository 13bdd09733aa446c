"""Whether it stays as it is: over a million items, over a million lanes, with a thousand lanes at once, and for ten minutes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.scale import at_once, endurance, items, lanes

if TYPE_CHECKING:
    import argparse

    from matplotlib.figure import Figure

    from bench.report import Report

QUESTION = (
    "Do time and memory stay flat over a million items, a million lanes, a thousand lanes at once, and ten minutes?"
)
COMPARED = ["aiohttp", "msgspec"]

SIZES, QUICK_SIZES = [10_000, 100_000, 1_000_000], [10_000, 50_000]
LANES, QUICK_LANES = [100_000, 1_000_000], [20_000]
ROUNDS, QUICK_ROUNDS = 3, 2
MINUTES, QUICK_MINUTES = 10.0, 8 / 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes", type=float, help=f"of the long run (default {MINUTES:g}; {QUICK_MINUTES * 60:g} s if quick)"
    )


def run(options: argparse.Namespace, found: Report) -> None:
    quick = options.quick
    others = [items.GATHER] if quick else [items.CHUNKS, items.GATHER]
    items.measure(found, QUICK_SIZES if quick else SIZES, QUICK_ROUNDS if quick else ROUNDS, others)
    at_once.measure(found, 1 if quick else ROUNDS)
    lanes.measure(found, QUICK_LANES if quick else LANES)
    endurance.measure(found, 60 * (options.minutes or (QUICK_MINUTES if quick else MINUTES)))
    parts = (items, at_once, lanes, endurance)
    found.findings = [finding for part in parts for finding in part.findings(found)]


def draw(found: Report) -> Figure:
    from bench.scale import figure

    return figure.draw(found)
