"""The time to an answer: streamed against whole replies, by place in the batch, by load and by window.

All on virtual time against a SIMULATED endpoint within the process, so the figures are the same everywhere but for the random
letters of ids, which are a token more or less; processor time of the client is not in them (see `overhead` and `demux`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.benchmark import Option
from bench.latency.outcome import findings, tables
from bench.latency.world import ALONE, MODES, STREAMED, WHOLE, play, poisson
from bench.timing import median, quantile

if TYPE_CHECKING:
    import argparse

    from matplotlib.figure import Figure

    from bench.report import Run, Table

QUESTION = "How much sooner is an answer there when a combined reply is streamed, and what does waiting for further requests cost?"
COMPARED = ["msgspec", "tiktoken"]
OPTIONS = {
    "batches": Option(int, 100, 6, "full batches by which places are compared"),
    "runs": Option(int, 5, 1, "runs of each load"),
    "arrivals": Option(int, 4_000, 400, "arrivals for each window"),
}

SIZES = (8, 16, 50)
APART_S = 60.0
"""Seconds between full batches: far more than one takes."""

SIZE, SLOTS = 16, 4
"""The default batch, and few calls at once, so that a modest load saturates them."""

LOADS = {"idle": 0.01, "light": 0.25, "saturated": 0.95}
"""Arrivals as a share of the capacity of full batches. "light" is what one call each can just keep up with."""

COUNTS = {"idle": 400, "light": 1_200, "saturated": 3_000}
WARM_UP = 0.1
"""Share of the callers left out: they met an empty batcher."""

WINDOWS = (0.0, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5)
RATES = {"quiet": 1.0, "busy": 40.0}
"""Items per second. Quiet: a call has mostly ended when the next request comes, so that `idle` decides. Busy: calls are always under
way, so that the window decides."""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    places = positions(options.batches, options.seed)
    batch_s, alone_s = max(places[str(SIZE)][WHOLE]["places"]), places[str(SIZE)][ALONE]["mean"]
    capacity, alone_capacity = SLOTS * SIZE / batch_s, SLOTS / alone_s
    return {
        "positions": places,
        "capacity": capacity,
        "alone_capacity": alone_capacity,
        "loads": loads(capacity, options.runs, options.seed),
        "windows": windows(options.arrivals, options.seed),
    }


def positions(batches: int, seed: int) -> dict[str, Any]:
    """Measure full batches on an idle batcher, all requests at the same instant."""
    found: dict[str, Any] = {}
    for size in SIZES:
        arrivals = [number * APART_S for number in range(batches) for _ in range(size)]
        for mode in MODES:
            served = play(arrivals, seed, mode, max_batch_size=size)
            assert served.calls == (len(arrivals) if mode == ALONE else batches), "batches were not full"
            taken = served.latencies
            mean_at = [sum(taken[place::size]) / batches for place in range(size)]
            found.setdefault(str(size), {})[mode] = summary(taken) | {"places": mean_at}
    return found


def loads(capacity: float, runs: int, seed: int) -> dict[str, Any]:
    """Measure random arrivals while few calls may be under way; medians over the runs."""
    found: dict[str, Any] = {}
    for name, share in LOADS.items():
        found[name] = {"rate": share * capacity}
        for mode in MODES:
            several = []
            for at in range(seed, seed + runs):
                arrivals = poisson(share * capacity, COUNTS[name], at)
                served = play(arrivals, at, mode, max_batch_size=SIZE, max_concurrent_batches=SLOTS)
                steady = served.latencies[round(WARM_UP * len(arrivals)) :]
                several.append(summary(steady) | {"batch": len(arrivals) / served.calls})
            found[name][mode] = {key: median(one[key] for one in several) for key in several[0]}
    return found


def windows(count: int, seed: int) -> dict[str, Any]:
    """Measure each window at a low and at a high rate of arrivals."""
    found: dict[str, Any] = {}
    for name, rate in RATES.items():
        arrivals = poisson(rate, count, seed)

        def point(mode: str, idle: str, max_wait: float, arrivals=arrivals) -> dict[str, float]:
            served = play(arrivals, seed, mode, max_batch_size=SIZE, idle=idle, max_wait=max_wait)
            return summary(served.latencies) | {
                "max_wait": max_wait,
                "batch": count / served.calls,
                "added_ms": sum(served.waits) / count * 1e3,
                "tokens": served.tokens / count,
            }

        found[name] = {ALONE: [point(ALONE, "flush", 0.0)]}
        found[name] |= {idle: [point(STREAMED, idle, wait) for wait in WINDOWS] for idle in ("flush", "wait")}
    return found


def summary(values: list[float]) -> dict[str, float]:
    return {"mean": sum(values) / len(values), "p50": quantile(values, 0.5), "p99": quantile(values, 0.99)}


def draw(run: Run, tables: dict[str, Table]) -> Figure:
    from bench.latency import figure

    return figure.draw(run, tables)


__all__ = ["COMPARED", "OPTIONS", "QUESTION", "draw", "findings", "measure", "tables"]
