"""Products put under six labels: one call each by the openai SDK and by raw aiohttp, beside batches of 4 to 50, and a cache.

Processor time is measured over real sockets, the duration of a job under a quota on virtual time. The endpoint is SIMULATED: it counts
tokens as the provider's encoding does and takes its time as a model does. No live model is asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.benchmark import Option
from bench.throughput import jobs, savings, sockets

if TYPE_CHECKING:
    import argparse

    from bench.report import Run, Table

QUESTION = "What does combining save in calls, tokens, dollars, minutes and client CPU, and where does it not pay?"
COMPARED = ["openai", "aiohttp", "httpx2", "msgspec", "tiktoken"]
OPTIONS = {
    "input": Option(str, "", "", "JSON Lines with id, name, description and label"),
    "count": Option(int, 100_000, 2_000, "items of a job; with few the rate is not steady"),
    "items": Option(int, 4_000, 400, "items for each saving; with a multiple of 800 all batches are full"),
    "seconds": Option(float, 4.0, 0.5, "of each way on real sockets"),
    "rounds": Option(int, 3, 2, "alternating rounds of these"),
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "client": sockets.measure(options),
        "jobs": jobs.measure(options),
        **savings.measure(options),
    }


def tables(run: Run) -> dict[str, Table]:
    return {"client": sockets.table(run), "jobs": jobs.table(run), **savings.tables(run)}


def findings(run: Run, tables: dict[str, Table]) -> list[str]:
    return [*jobs.findings(tables["jobs"]), *sockets.findings(tables["client"]), *savings.findings(run, tables)]
