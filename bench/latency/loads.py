"""The time to answer when callers come by chance and few calls may be under way."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from bench import timing
from bench.latency import positions
from bench.latency.world import ALONE, MODES, STREAMED, WHOLE, play, poisson
from bench.report import Column, Table

if TYPE_CHECKING:
    from bench.report import Report

SIZE, SLOTS = 16, 4
"""The default batch, and few calls at once, so that a modest load saturates them."""

LOADS = {"idle": 0.01, "light": 0.25, "saturated": 0.95}
"""Share of the capacity of full batches at which callers come. "light" is what one call each can just keep up with."""

COUNTS = {"idle": 400, "light": 1_200, "saturated": 3_000}
WARM_UP = 0.1
"""Share of the callers left out: they met an empty batcher."""


def measure(found: Report, runs: int) -> None:
    """Fill in the table of loads; the positions have to be there."""
    batch_s, alone_s = positions.full_batch_seconds(found, SIZE), _alone_seconds(found)
    capacity, alone_capacity = SLOTS * SIZE / batch_s, SLOTS / alone_s
    table = Table(
        f"Seconds to the answer by load, SIMULATED endpoint, Poisson arrivals, {SLOTS} calls at once, batches of at most {SIZE}, median of "
        f"{runs} runs",
        [
            Column("load"),
            Column("items/s", ".2f"),
            Column("mode"),
            *(Column(name, ".3f") for name in ("mean", "p50", "p99")),
            Column("mean batch", ".2f"),
            Column("calls an item", ".3f"),
        ],
        notes=[
            f"Capacity: {capacity:.1f} items/s in full batches ({SLOTS} x {SIZE} / {batch_s:.2f} s), {alone_capacity:.1f} items/s one "
            f"call each ({SLOTS} / {alone_s:.2f} s). Loads are shares of the former: "
            + ", ".join(f"{name} {share:.0%}" for name, share in LOADS.items())
            + ".",
            f"The first {WARM_UP:.0%} of the callers are left out.",
        ],
    )
    samples = found.samples["loads"] = {}
    for name, share in LOADS.items():
        rate = share * capacity
        for mode in MODES:
            seeds = range(found.seed, found.seed + runs)
            served = [
                play(poisson(rate, COUNTS[name], seed), seed, mode, max_batch_size=SIZE, max_concurrent_batches=SLOTS)
                for seed in seeds
            ]
            steady = [each.after(WARM_UP).latencies for each in served]
            figures = {
                "mean": [statistics.mean(each) for each in steady],
                "p50": [timing.quantile(each, 0.5) for each in steady],
                "p99": [timing.quantile(each, 0.99) for each in steady],
                "batch": [each.batch_size for each in served],
            }
            samples.setdefault(name, {})[mode] = figures
            mean, p50, p99, batch = map(statistics.median, figures.values())
            table.add(name, rate, mode, mean, p50, p99, batch, 1 / batch)
        if rate > alone_capacity:
            table.notes.append(
                f"{name}: {rate / alone_capacity:.1f} times the capacity of one call each, whose queue grows for as long as callers "
                f"come; its figures are those of {COUNTS[name]:,} callers, and worse with more."
            )
    found.tables["loads"] = table


def _alone_seconds(found: Report) -> float:
    return statistics.mean(found.samples["positions"][str(SIZE)][ALONE])


def findings(found: Report) -> list[str]:
    """Say what the table says."""
    rows = {(row[0], row[2]): row for row in found.tables["loads"].rows}
    said = []
    for load in LOADS:
        streamed, whole, alone = (rows[load, mode] for mode in (STREAMED, WHOLE, ALONE))
        said.append(
            f"{load.capitalize()} load ({streamed[1]:.2f} items/s, mean batch {streamed[6]:.1f}): p50 {streamed[4]:.2f} s streamed, "
            f"{whole[4]:.2f} s whole, {alone[4]:.2f} s one call each; p99 {streamed[5]:.2f}, {whole[5]:.2f} and {alone[5]:.2f} s. "
            + (
                "One call each cannot keep up: its times grow for as long as callers come."
                if alone[1] > SLOTS / _alone_seconds(found)
                else f"Streamed, p50 is {streamed[4] / alone[4]:.2f} times that of one call each, p99 {streamed[5] / alone[5]:.2f} times."
            )
        )
    return said
