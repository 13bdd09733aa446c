"""The cost of `submit` beside bare futures and other collectors, over a backend that answers at once.

Time under two loads, each run next to one of the bare floor; then, in one process each, latency, memory and wake-ups. Collectors
run twice: handing an integer on, and on the same work as `submit`: chat messages handed on, prompts composed, replies read.
"""

from __future__ import annotations

import gc
from functools import partial
from typing import TYPE_CHECKING, Any

from bench import peers
from bench.benchmark import Option
from bench.overhead.entries import FLOOR, LARGE, OURS, WAITING, entries
from bench.overhead.loads import LOADS, loops_of, pair
from bench.overhead.outcome import draw, findings, tables
from bench.overhead.quiet import all_quiet
from bench.timing import alternate

if TYPE_CHECKING:
    import argparse

QUESTION = "What does submit cost, beside bare futures and other collectors?"
COMPARED = [*peers.DISTRIBUTIONS, "uvloop"]
OPTIONS = {
    "only": Option(str, "", "", "measure only entries with this text in their name, and the bare floor"),
    "pending": Option(int, 100_000, 20_000, "requests that wait while memory is measured"),
}

ROUNDS = {"burst 32": 5, "burst 16": 3, "burst 256": 3, "steady": 5}
# The short form has about a minute: asyncio alone, two loads, and in processes of their own only the floor and ours.
QUICK_ROUNDS = {"burst 32": 1, "steady": 2}
QUICK_QUIET = (FLOOR, OURS)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    chosen = {name: one for name, one in entries().items() if options.only in name or name == FLOOR}
    rounds, loops = (QUICK_ROUNDS, ["asyncio"]) if options.quick else (ROUNDS, ["asyncio", "uvloop"])
    samples: dict[str, Any] = {"entries": {name: entry.facts() for name, entry in chosen.items()}}
    # Modules are frozen out of garbage collection: scanning the many libraries compared here would be most of some figures.
    gc.collect()
    gc.freeze()
    try:
        for loop in loops:
            samples[loop] = {}
            for load in LOADS:
                if load.name in rounds:
                    cases = {
                        name: partial(pair, load, entry, chosen[FLOOR], loops_of(loop))
                        for name, entry in chosen.items()
                        if name != WAITING
                    }
                    samples[loop][load.name] = alternate(cases, rounds[load.name])
    finally:
        gc.unfreeze()
    names = [name for name, entry in chosen.items() if name != LARGE and not entry.same_work]
    for loop in loops:
        quiet = [name for name in names if not options.quick or name in QUICK_QUIET]
        samples[f"{loop}_quiet"] = all_quiet(quiet, loop, options.pending)
    return samples


__all__ = ["COMPARED", "OPTIONS", "QUESTION", "draw", "findings", "measure", "tables"]
