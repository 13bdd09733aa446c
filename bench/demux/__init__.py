"""What taking a combined reply apart costs while it streams in, and what is saved of a damaged one.

Replies are made up: labels, and texts full of quotes, braces, escapes and emoji. Every method settles one future for each answer,
and every sample is checked against the right answers outside the clock.
"""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING

from bench.demux import recovery, speed
from bench.demux.figures import draw

if TYPE_CHECKING:
    import argparse

    from bench.report import Report

QUESTION = "What does taking a combined reply apart as it streams cost, and what is recovered of damaged ones?"
COMPARED = ["ijson", "jiter", "partial-json-parser", "msgspec"]

LONGEST_S, LONGEST_QUICK_S = 3.0, 0.1
"""Seconds that a method which parses all anew may take for one reply; what is expected to take longer is skipped."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, help="alternating rounds (default 15; 7 if quick)")


def run(options: argparse.Namespace, found: Report) -> None:
    rounds = options.rounds or (7 if options.quick else 15)
    longest = LONGEST_QUICK_S if options.quick else LONGEST_S
    loop = asyncio.new_event_loop()  # never runs: futures want to belong to one
    gc.collect()
    gc.freeze()  # what has been imported is not to be looked through before every sample
    try:
        speed.by_size(found, loop, rounds=rounds, longest=longest)
        speed.by_count(found, loop, rounds=rounds, longest=longest)
    finally:
        gc.unfreeze()
        loop.close()
    recovery.by_damage(found)
    recovery.by_lag(found)
    found.findings = [*speed.findings(found), *recovery.findings(found)]


__all__ = ["COMPARED", "QUESTION", "add_arguments", "draw", "run"]
