"""How long callers wait for answers: streamed against whole replies, by place, by load and by window.

All on virtual time against a SIMULATED endpoint within the process, so the figures are the same everywhere but for the random
letters of ids, which are a token more or less; what the client's own processor adds is not in them (see `overhead` and `demux`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.latency import loads, positions, windows
from bench.latency.figures import draw
from bench.latency.world import LATENCY

if TYPE_CHECKING:
    import argparse

    from bench.report import Report

QUESTION = "How much sooner do callers have their answers when a combined reply is streamed, and what does waiting for company cost?"
CAVEAT = (
    f"SIMULATED endpoint on virtual time: {LATENCY.first_token} s to the first token, then {LATENCY.tokens_per_second:g} tokens/s in "
    "each call, however many there are; no network and no processor time. Answers are labels, so most of an element is its id."
)
COMPARED = ["msgspec", "tiktoken"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing beside the common options."""


def run(options: argparse.Namespace, found: Report) -> None:
    positions.measure(found, batches=6 if options.quick else 100)
    loads.measure(found, runs=1 if options.quick else 5)
    windows.sweep(found, count=400 if options.quick else 4_000)
    windows.lone(found)
    found.findings = [
        CAVEAT,
        *positions.findings(found),
        *loads.findings(found),
        *windows.findings(found),
    ]


__all__ = ["COMPARED", "QUESTION", "add_arguments", "draw", "run"]
