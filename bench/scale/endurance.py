"""A long run at a steady rate against a simulated endpoint, over sockets: does anything grow?"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from bench.apart import measured, simulated_endpoint
from bench.report import Column, Table, met
from bench.scale.service import OWN_LANE_EVERY, RATE, REMEMBERED_LANES, STAYING_LANES, endure

if TYPE_CHECKING:
    from bench.report import Report

FIRST_TOKEN_S, TOKENS_PER_S = 0.1, 400.0
"""Of the simulated endpoint, which is faster than a real one: it shares the cores with what is measured."""

SAMPLES, LEAST_EVERY_S = 120, 0.5
WARM_UP_SHARE = 0.1
STARTING_S = 30.0
"""What a run may take longer than it was to take."""

FLAT = 0.10
"""What "no growth" means: in the last third at most so much more than in the first."""

LEAST_JUDGED_S = 60.0
"""A shorter run has too few samples to tell growth from scatter."""

LOOKED_AT = {
    "rss_mib": "resident MiB",
    "blocks": "memory blocks in use",
    "tasks": "tasks beside callers",
    "descriptors": "file descriptors",
    "p50_ms": "latency p50 ms",
    "p99_ms": "latency p99 ms",
    "cpu_us": "CPU us an item",
}


def measure(found: Report, seconds: float) -> None:
    """Fill in the table of the long run."""
    every = max(LEAST_EVERY_S, seconds / SAMPLES)
    with simulated_endpoint(FIRST_TOKEN_S, TOKENS_PER_S) as url:
        run = measured(endure, patience=seconds + STARTING_S, url=url, seconds=seconds, every=every, seed=found.seed)
    found.samples["endurance"] = run
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
            (
                f"Thirds of what follows the first {WARM_UP_SHARE:.0%}, medians; slopes by least squares over all of it. Memory blocks: "
                "those of Python's allocator, small objects of any kind, above what was there when the first request had been "
                "answered; memory that is freed stays with the process, so they show a leak before the resident memory does."
            ),
            told(run),
        ],
    )
    for name, what in LOOKED_AT.items():
        at, values = steady(run["seen"], name)
        third = max(1, len(values) // 3)
        first, last = statistics.median(values[:third]), statistics.median(values[-third:])
        slope = statistics.linear_regression(at, values).slope
        table.add(what, first, last, last / first, slope * 3600, slope / RATE)


def told(run: dict) -> str:
    """Return who came, and what came of them."""
    counts = run["counts"]
    return (
        f"{counts['asked']:,} asked, {counts['answered']:,} were answered rightly, {counts['given_up']:,} gave up; {STAYING_LANES} lanes "
        f"stay, one request in {OWN_LANE_EVERY} is in a lane of its own; {run['calls']:,} calls, mean batch "
        f"{run['batch_size_mean']:.1f}, one in each of {REMEMBERED_LANES:,} lanes to warm up among them. Callers came at most "
        f"{max(run['seen']['late_ms']):.0f} ms after their time."
    )


def steady(seen: dict[str, list[float]], name: str) -> tuple[list[float], list[float]]:
    """Return the times and values after the warm-up."""
    at = int(WARM_UP_SHARE * len(seen["at_s"]))
    return seen["at_s"][at:], seen[name][at:]


def findings(found: Report) -> list[str]:
    run, rows = found.samples["endurance"], found.tables["endurance"].rows
    at, blocks = steady(run["seen"], "blocks")
    minutes, items = run["seen"]["at_s"][-1] / 60, RATE * (at[-1] - at[0])
    return [
        (
            f"The long run took {minutes:.1f} min at {RATE} requests/s against a SIMULATED endpoint, not a provider. Tasks left when all "
            f"was closed: {run['tasks_left']}."
        ),
        *(_judged(*row[:4], seconds=60 * minutes) for row in rows),
        (
            f"What it would show: memory blocks scatter by {statistics.stdev(blocks):,.0f} over {items:,.0f} items, so a leak of "
            f"{statistics.stdev(blocks) / items:.3f} objects an item or more."
        ),
    ]


def _judged(what: str, first: float, last: float, ratio: float, *, seconds: float) -> str:
    verdict = met(ratio <= 1 + FLAT)
    if seconds < LEAST_JUDGED_S:
        verdict = f"not judged, as the run took less than {LEAST_JUDGED_S:.0f} s"
    name = what[0].upper() + what[1:]
    return f"{name}: {first:,.1f} in the first third, {last:,.1f} in the last; no growth beyond {FLAT:.0%} {verdict}."
