"""Products put under six labels: one call each by the openai SDK and by raw aiohttp, beside batches of 4 to 50, and a cache.

Processor time is measured over real sockets; what a job under a quota takes, on virtual time; what combining saves, by length of
the shared instructions, beside what a formula foretells. The endpoint is SIMULATED: it counts tokens as the provider's encoding does
and takes its time as a model does. No live model is asked.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bench.throughput import formula, quotas, sockets

if TYPE_CHECKING:
    import argparse

    from matplotlib.figure import Figure

    from bench.report import Report

QUESTION = "What does combining save in calls, tokens, dollars, minutes and client CPU, and where does it not pay?"
COMPARED = ["openai", "aiohttp", "httpx2", "msgspec", "tiktoken"]

COUNT, COUNT_QUICK = 100_000, 4_000
SECONDS, SECONDS_QUICK = 4.0, 0.5
ROUNDS, ROUNDS_QUICK = 3, 2
PACE, PACE_QUICK = 1.0, 8.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, help="JSON Lines with id, name, description and label")
    parser.add_argument(
        "--count",
        type=int,
        help=f"items of a job (default {COUNT:,}; {COUNT_QUICK:,} if quick, and fewer are over before the rate is steady)",
    )
    parser.add_argument(
        "--seconds", type=float, help=f"of each way on real sockets (default {SECONDS:g}; {SECONDS_QUICK:g} if quick)"
    )
    parser.add_argument(
        "--rounds", type=int, help=f"alternating rounds of these (default {ROUNDS}; {ROUNDS_QUICK} if quick)"
    )


def run(options: argparse.Namespace, found: Report) -> None:
    quick = options.quick
    path = None if options.input is None else str(options.input.resolve())
    sockets.measure(
        found,
        path,
        pace=PACE_QUICK if quick else PACE,
        seconds=options.seconds or (SECONDS_QUICK if quick else SECONDS),
        rounds=options.rounds or (ROUNDS_QUICK if quick else ROUNDS),
    )
    quotas.measure(found, path, options.count or (COUNT_QUICK if quick else COUNT))
    formula.measure(found, path)
    found.findings = [finding for part in (quotas, sockets, formula) for finding in part.findings(found)]


def draw(found: Report) -> Figure:
    # Late: what is measured in a process of its own is imported from here, and would pay for matplotlib's memory.
    from bench.throughput import figures

    return figures.draw(found)
