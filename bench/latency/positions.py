"""How long each place in a batch waits, streamed and not."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from bench import timing
from bench.latency.world import ALONE, LATENCY, MODES, STREAMED, WHOLE, play
from bench.report import Column, Table

if TYPE_CHECKING:
    from bench.report import Report

SIZES = (8, 16, 50)
APART_S = 60.0
"""Seconds between batches: far more than one takes."""


def measure(found: Report, batches: int) -> None:
    """Fill in the table: full batches on an idle batcher, everybody at the same instant."""
    table = Table(
        f"Seconds to the answer by place in a full batch, SIMULATED endpoint, {batches} batches each, all callers at once, no limit on calls",
        [
            Column("batch"),
            Column("mode"),
            *(Column(name, ".3f") for name in ("mean", "p50", "p99", "first", "last")),
            Column("mean, share of generation", ".1%"),
            Column("expected (N+1)/2N", ".1%"),
        ],
        notes=["Share of generation: of the time between the first token and the last answer."],
    )
    samples = found.samples["positions"] = {}
    for size in SIZES:
        arrivals = [number * APART_S for number in range(batches) for _ in range(size)]
        for mode in MODES:
            served = play(arrivals, found.seed, mode, max_batch_size=size)
            assert served.calls == (len(arrivals) if mode == ALONE else batches), "batches were not full"
            taken = served.latencies
            by_place = [statistics.mean(taken[place::size]) for place in range(size)]
            samples.setdefault(str(size), {})[mode] = by_place
            mean, first, last = statistics.mean(taken), by_place[0], by_place[-1]
            shares = (
                [(mean - LATENCY.first_token) / (last - LATENCY.first_token), (size + 1) / 2 / size]
                if mode == STREAMED
                else [None, None]
            )
            table.add(
                f"{size}", mode, mean, timing.quantile(taken, 0.5), timing.quantile(taken, 0.99), first, last, *shares
            )
    found.tables["positions"] = table


def full_batch_seconds(found: Report, size: int) -> float:
    """Return how long a full batch of *size* keeps its place among the calls under way."""
    return max(found.samples["positions"][str(size)][WHOLE])


def findings(found: Report) -> list[str]:
    """Say what the table says."""
    rows = {(row[0], row[1]): row for row in found.tables["positions"].rows}
    said = []
    for size in map(str, SIZES):
        streamed, whole, alone = (rows[size, mode] for mode in MODES)
        said.append(
            f"Batches of {size}: streaming answers after {streamed[2]:.2f} s on average against {whole[2]:.2f} s for the whole "
            f"reply ({1 - streamed[2] / whole[2]:.0%} sooner), the first after {streamed[5]:.2f} s; the slowest gain next to nothing "
            f"(p99 {streamed[4]:.2f} s against {whole[4]:.2f} s). One call each takes {alone[2]:.2f} s where nothing limits calls: "
            f"a batch costs the average caller {streamed[2] / alone[2]:.1f} times that even streamed."
        )
    gap = max(abs(rows[size, STREAMED][7] - rows[size, STREAMED][8]) for size in map(str, SIZES))
    said.append(
        f"The mean share of generation is within {gap * 100:.1f} points of (N+1)/2N at every size: the reply also has an opening."
    )
    return said
