"""The share of a quota that is used, and how often it is overstepped, over minutes of virtual time.

The endpoint is SIMULATED. It counts requests and tokens in any 60 seconds, the strictest reading there is, charges a prompt's
tokens and its max_tokens (without one, those of the reply), and reports in its headers what is left. Batchers that are given the
quota are compared with batchers that are not, and learn of it from 429s alone, by waiting and trying again, as SDKs do.

Shares are of the limit that binds, from the end of the first minute (in which any client may use up what was unused before) to that
of the last but one.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any, NamedTuple

import microbatch as mb
from bench.benchmark import Option
from bench.report import Run, Table
from microbatch.testing import Latency, Quota, SimulatedModel, SimulatedTransport, VirtualClockLoop

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

QUESTION = "How much of a quota is used, and how many requests are refused with 429?"
COMPARED: list[str] = []
OPTIONS = {"minutes": Option(int, 6, 4, "virtual minutes of each load, at least 3")}

MODEL = "gpt-4.1-mini"
QUOTA = Quota(rpm=1_000, tpm=200_000)
LATENCY = Latency(first_token=0.5, tokens_per_second=80.0)
MINUTE = 60.0
# Shared instructions so long that tokens bind when requests are combined, and so short that requests bind when they are not.
LONG = "You sort the products of an online shop. Read the name and the description. " * 12
SHORT = "Sort."
WORDS = LONG.split()
LEARNING = "429s alone"


class MeteredModel(SimulatedModel):
    """A model that counts in `charged` the tokens of all requests that its quota let in: prompt and max_tokens, or else the reply."""

    charged = 0

    def charge(self, body: Any, key: str, tokens: int = 0) -> Any:
        limits = super().charge(body, key, tokens)
        self.charged += tokens  # a refused request has raised by now
        return limits


class Load(NamedTuple):
    """A batcher and its requests.

    Attributes:
        size: Most requests in a call.
        slots: Calls under way at once: more than the quota admits, so that the quota is what limits.
        system: The shared instructions.
        words: Most words in a question.
        max_tokens: Of each request.
        charge: Of the batcher's `RateLimit`; None for a batcher without one.
    """

    size: int
    slots: int
    system: str
    words: int
    max_tokens: int | None
    charge: str | None

    @property
    def name(self) -> str:
        client = LEARNING if self.charge is None else f"given, {self.charge}"
        return f"{'one by one' if self.size == 1 else f'combined by {self.size}'}, {client}"


LOADS = [
    Load(1, 256, SHORT, 3, None, "reserved"),
    Load(1, 256, SHORT, 3, None, None),
    Load(16, 64, LONG, 80, None, "reserved"),
    Load(16, 64, LONG, 80, None, "used"),
    Load(16, 64, LONG, 80, 200, "reserved"),
    Load(16, 64, LONG, 80, None, None),
]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.minutes < 3:
        raise SystemExit("--minutes must be at least 3: the first and the last are left out")
    loads = []
    for load in LOADS:
        with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
            loads.append({"load": load.name, "max_tokens": load.max_tokens} | runner.run(play(load, options)))
    return {"loads": loads}


async def play(load: Load, options: argparse.Namespace) -> dict[str, Any]:
    """Keep the batcher busy; return what was used at the end of each minute, the fullest minutes, and what was refused."""
    loop, draw = asyncio.get_running_loop(), random.Random(options.seed)
    model = MeteredModel(quota=QUOTA, latency=LATENCY, answer=echo)
    batcher = mb.Microbatcher(
        SimulatedTransport(model),
        policy=mb.FlushPolicy(max_batch_size=load.size, max_concurrent_batches=load.slots, max_output_tokens=8_000),
        rate_limit=None if load.charge is None else mb.RateLimit(rpm=QUOTA.rpm, tpm=QUOTA.tpm, charge=load.charge),
    )
    system = {"role": "system", "content": load.system}
    asked: list[str] = []

    def requests() -> Iterator[mb.Request]:
        while loop.time() < MINUTE * options.minutes:
            text = " ".join(draw.choices(WORDS, k=draw.randint(2, load.words)))
            asked.append(text)
            yield mb.Request([system, {"role": "user", "content": text}], model=MODEL, max_tokens=load.max_tokens)

    marks: list[dict[str, float]] = []

    async def mark() -> None:
        for minute in range(1, options.minutes + 1):
            await asyncio.sleep(MINUTE * minute - loop.time())
            now = batcher.stats()
            sent, tokens = now.upstream_calls - now.rate_limited, now.prompt_tokens + now.completion_tokens
            marks.append({"at": loop.time(), "requests": sent, "charged": model.charged, "tokens": tokens})

    async with batcher, asyncio.TaskGroup() as group:
        group.create_task(mark())
        async for result in batcher.map(requests()):
            # Without the quota a request may be refused to the end, and is counted; nothing else may go wrong.
            if load.charge is not None or not isinstance(result.error, mb.RateLimited):
                assert result.unwrap().output == echo(asked[result.index]), result
    stats = batcher.stats()
    return {
        "marks": marks,
        "peak": {"requests": model.peak_requests, "tokens": model.peak_tokens},
        "refused": stats.rate_limited,
        "failed": stats.failed,
    }


def echo(text: str, schema: object = None) -> str:
    """Return the right answer: of much the same length as the question, so that replies vary in length too."""
    del schema
    return text.upper()


def tables(run: Run) -> dict[str, Table]:
    table = Table(
        f"SIMULATED endpoint, {QUOTA.rpm:,} requests and {QUOTA.tpm:,} tokens in any minute; {run.options['minutes']} virtual minutes each",
        "load | max_tokens {:,} | limit that binds | share used {:.1%} | most in any minute {:.1%} | requests/min {:,.0f}"
        " | tokens charged/min {:,.0f} | tokens used/min {:,.0f} | 429s {:,} | failed {:,}",
        "given, reserved / used: with a RateLimit of the quota and that charge=; 429s alone: without one.",
    )
    for one in run.samples["loads"]:
        start, end = one["marks"][0], one["marks"][-2]
        minutes = (end["at"] - start["at"]) / MINUTE
        rates = {name: (end[name] - start[name]) / minutes for name in ("requests", "charged", "tokens")}
        limit, share, peak = max(
            ("requests", rates["requests"] / QUOTA.rpm, one["peak"]["requests"] / QUOTA.rpm),
            ("tokens", rates["charged"] / QUOTA.tpm, one["peak"]["tokens"] / QUOTA.tpm),
            key=lambda limit: limit[1],
        )
        table.add(one["load"], one["max_tokens"], limit, share, peak, *rates.values(), one["refused"], one["failed"])
    return {"shares": table}


def findings(run: Run, tables: dict[str, Table]) -> list[str]:
    del run
    rows = list(tables["shares"].by("load", "max_tokens").values())
    given = [row for row in rows if not row["load"].endswith(LEARNING)]
    learning = [row for row in rows if row["load"].endswith(LEARNING)]
    spans = [f"{min(shares):.1%} to {max(shares):.1%}" for shares in _column(given, learning, "share used")]
    refused = [sum(column) for column in _column(given, learning, "429s")]
    failed = sum(row["failed"] for row in learning)
    reserved = next(row for row in given if row["max_tokens"] is not None)
    return [
        f"Given the quota, {spans[0]} of the limit that binds is used, with {refused[0]:,} refusals (429).",
        f"Learning of it by 429s, it is {spans[1]}, with {refused[1]:,} refusals and {failed:,} requests that failed in the end.",
        f"With max_tokens {reserved['max_tokens']}, the endpoint charges {reserved['tokens charged/min']:,.0f} tokens a minute for "
        f"{reserved['tokens used/min']:,.0f} that are used: what is reserved for long replies is lost to the short ones.",
        "Virtual time: queueing and pacing are exact; the network, and other clients of the same key, are not included.",
    ]


def _column(given: list[dict[str, Any]], learning: list[dict[str, Any]], name: str) -> list[list[Any]]:
    return [[row[name] for row in rows] for rows in (given, learning)]
