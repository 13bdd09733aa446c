"""What `submit` costs beside bare futures and beside what a user would pick instead, over a backend that answers at once.

Time under two loads, each run next to one of the bare floor; then, in a process each, latency, memory and wake-ups.
"""

from __future__ import annotations

import cProfile
import gc
import importlib.util
import pstats
from functools import partial
from typing import TYPE_CHECKING

from bench import peers
from bench.overhead import findings, tables
from bench.overhead.entries import FLOOR, LARGE, OURS, WAITING, entries
from bench.overhead.loads import BARE, LOADS
from bench.overhead.quiet import all_quiet, loops_of
from bench.timing import alternate

if TYPE_CHECKING:
    import argparse

    from matplotlib.figure import Figure

    from bench.overhead.entries import Entry
    from bench.overhead.tables import Pairs
    from bench.report import Report

QUESTION = "What does submit cost, beside bare futures and other collectors?"
COMPARED = [*peers.DISTRIBUTIONS, "uvloop"]

PENDING, QUICK_PENDING = 100_000, 20_000
PROFILED = 40
"""Lines of the profile."""

ROUNDS = {"burst 32": 5, "burst 16": 3, "burst 256": 3, "steady": 5, BARE.name: 5}
# The short form has about a minute: fewer rounds, most of them where libraries differ most.
QUICK_ROUNDS = {"burst 32": 2, "burst 16": 1, "burst 256": 1, "steady": 3, BARE.name: 1}
QUICK_UVLOOP = {"burst 32": 1, "steady": 2}

QUICK_OTHERS = (FLOOR, "minimal", "async-batcher", "async-batcher (concurrency=-1)", "aioautobatch", OURS)
"""Whom the short form measures in the other bursts: ours, and those to beat."""

IDLE_SECONDS, QUICK_IDLE_SECONDS = 2.0, 1.0
QUICK_AT_ONCE = 2
"""Processes side by side in the short form: they sleep some of the time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="measure this one and the bare floor; may be given again"
    )
    parser.add_argument("--profile", action="store_true", help=f"print a profile of {OURS} in a burst first")


def run(options: argparse.Namespace, found: Report) -> None:
    measured = entries(options.only)
    if unknown := set(options.only or ()) - measured.keys():
        raise SystemExit(f"no such name here: {', '.join(sorted(unknown))}; there are {', '.join(entries())}")
    if options.profile:
        profile(measured.get(OURS) or entries()[OURS])
    loops = ["asyncio"]
    if importlib.util.find_spec("uvloop"):
        loops.append("uvloop")
    else:
        found.findings.append("uvloop is not installed: not measured.")
    found.findings += [f"{name} was not measured: {reason}." for name, reason in peers.absent().items()]
    # What is imported by now is not collected again: else all would pay for the size of what was imported to compare them.
    gc.collect()
    gc.freeze()
    try:
        for loop in loops:
            pairs = found.samples[loop] = times(loop, measured, quick=options.quick)
            found.tables[loop] = tables.times(loop, measured, pairs)
            found.tables[f"{loop}_details"] = tables.details(loop, measured, pairs)
            found.findings += findings.of_times(loop, measured, pairs)
    finally:
        gc.unfreeze()
    for loop in loops[:1] if options.quick else loops:
        stillness(loop, measured, found)


def times(loop: str, measured: dict[str, Entry], *, quick: bool) -> Pairs:
    """Measure *measured* under each load that the form asks for."""
    rounds = ROUNDS if not quick else QUICK_ROUNDS if loop == "asyncio" else QUICK_UVLOOP
    pairs: Pairs = {}
    for load in (*LOADS, BARE):
        if load.name not in rounds:
            continue
        names = [name for name in measured if name != WAITING]
        if quick and load.name in ("burst 16", "burst 256"):
            names = [name for name in names if name.removesuffix(", same work") in QUICK_OTHERS]
        if load is BARE:
            names = [name for name in names if name == OURS]
        cases = {name: partial(load.pair, measured[name], measured[FLOOR], loops_of(loop)) for name in names}
        pairs[load.name] = alternate(cases, rounds[load.name])
    return pairs


def stillness(loop: str, measured: dict[str, Entry], found: Report) -> None:
    """Measure what each costs when little happens."""
    names = [name for name, entry in measured.items() if name != LARGE and not entry.same_work]
    pending = QUICK_PENDING if found.quick else PENDING
    quiet, failed = all_quiet(
        names,
        loop,
        pending=pending,
        seconds=QUICK_IDLE_SECONDS if found.quick else IDLE_SECONDS,
        at_once=QUICK_AT_ONCE if found.quick else 1,
    )
    found.tables[f"{loop}_quiet"] = tables.quiet(loop, quiet, pending)
    found.samples[f"{loop}_quiet"] = quiet
    found.findings += findings.of_quiet(loop, quiet, pending)
    found.findings += [f"{name} failed when many waited, {loop}: {reason}." for name, reason in failed.items()]


def draw(found: Report) -> Figure:
    from bench.overhead import figure

    return figure.draw(found)


def profile(entry: Entry) -> None:
    """Print where the time of a burst goes; the profiler makes everything slower, calls most of all."""
    profiler = cProfile.Profile()
    profiler.runcall(LOADS[0].run, entry, None)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(PROFILED)


__all__ = ["COMPARED", "QUESTION", "add_arguments", "draw", "run"]
