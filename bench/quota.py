"""How much of a quota is used, and how often it is overstepped: minutes of virtual time against an endpoint that enforces it.

The endpoint is SIMULATED. It counts requests and tokens in any 60 seconds, the strictest reading there is, charges a prompt's
tokens and its max_tokens (without one, those of the reply), and tells in its headers what is left. Beside batchers that have been
told the quota stand batchers that have not, and learn of it from 429s alone, by waiting and trying again, as SDKs do.

Shares are of the limit that binds, from the end of the first minute (in which any client may use up what nobody used before) to
that of the last but one.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.patches import Patch

import microbatch as mb
from bench import plot
from bench.report import Column, Report, Table
from microbatch.testing import Latency, Quota, SimulatedModel, SimulatedTransport, VirtualClockLoop

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from matplotlib.figure import Figure

QUESTION = "How much of a quota is used, and how many requests are refused with 429?"
COMPARED: list[str] = []

MODEL = "gpt-4.1-mini"
QUOTA = Quota(rpm=1_000, tpm=200_000)
LATENCY = Latency(first_token=0.5, tokens_per_second=80.0)
MINUTES, MINUTES_QUICK = 6, 4
MINUTE = 60.0
# Shared instructions so long that tokens bind when requests are combined, and so short that requests bind when they are not.
LONG = "You sort the products of an online shop. Read the name and the description. " * 12
WORDS = LONG.split()
SHORT = "Sort."
UNTOLD = "429s alone"


class Load(NamedTuple):
    """A batcher and what it is asked.

    Attributes:
        size: Most requests in a call.
        slots: Calls under way at once: more than the quota lets in, so that the quota is what limits.
        system: The shared instructions.
        words: Most words in a question.
        max_tokens: Told with each request.
        charge: As of the batcher's `RateLimit`; None for a batcher that is told none.
    """

    size: int
    slots: int
    system: str
    words: int
    max_tokens: int | None
    charge: str | None

    @property
    def name(self) -> str:
        return f"{'one by one' if self.size == 1 else f'combined by {self.size}'}, {self.client}"

    @property
    def client(self) -> str:
        return UNTOLD if self.charge is None else f"told, {self.charge}"


LOADS = [
    Load(1, 256, SHORT, 3, None, "reserved"),
    Load(1, 256, SHORT, 3, None, None),
    Load(16, 64, LONG, 80, None, "reserved"),
    Load(16, 64, LONG, 80, None, "used"),
    Load(16, 64, LONG, 80, 200, "reserved"),
    Load(16, 64, LONG, 80, None, None),
]


class Used(NamedTuple):
    """What the endpoint has let in and charged up to an instant."""

    at: float
    requests: int
    tokens: int
    charged: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=int, help=f"virtual minutes of each load (default {MINUTES})")


def run(options: argparse.Namespace, found: Report) -> None:
    minutes = options.minutes or (MINUTES_QUICK if options.quick else MINUTES)
    if minutes < 3:
        raise SystemExit("--minutes must be at least 3: the first and the last are left out")
    table = found.tables["shares"] = Table(
        f"SIMULATED endpoint, {QUOTA.rpm:,} requests and {QUOTA.tpm:,} tokens in any minute; {minutes} virtual minutes each",
        [
            Column("load"),
            Column("max_tokens", ","),
            Column("limit that binds"),
            Column("share used", ".1%"),
            Column("most in any minute", ".1%"),
            Column("requests/min", ",.0f"),
            Column("tokens charged/min", ",.0f"),
            Column("tokens used/min", ",.0f"),
            Column("429s", ","),
            Column("failed", ","),
        ],
    )
    for load in LOADS:
        with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
            model, stats, marks = runner.run(play(load, minutes, options.seed))
        found.samples[f"{load.name}, max_tokens {load.max_tokens}"] = [mark._asdict() for mark in marks]
        rates = per_minute(marks[0], marks[-2])
        binds, share, peak = binding(rates, model)
        table.add(load.name, load.max_tokens, binds, share, peak, *rates, stats.rate_limited, stats.failed)
    table.notes.append(
        "told, reserved / used: with a RateLimit of the quota and that charge=; 429s alone: without one."
    )
    found.findings += judged(table)


async def play(load: Load, minutes: int, seed: int) -> tuple[SimulatedModel, mb.Stats, list[Used]]:
    """Keep the batcher busy; return the endpoint's model, the stats, and what was used at the end of each minute."""
    loop, draw = asyncio.get_running_loop(), random.Random(seed)
    model = SimulatedModel(quota=QUOTA, latency=LATENCY, answer=echo, record=True)
    batcher = mb.Microbatcher(
        SimulatedTransport(model),
        policy=mb.FlushPolicy(max_batch_size=load.size, max_concurrent_batches=load.slots, max_output_tokens=8_000),
        rate_limit=None if load.charge is None else mb.RateLimit(rpm=QUOTA.rpm, tpm=QUOTA.tpm, charge=load.charge),
    )
    system = {"role": "system", "content": load.system}
    asked: list[str] = []

    def requests() -> Iterator[mb.Request]:
        while loop.time() < MINUTE * minutes:
            text = " ".join(draw.choices(WORDS, k=draw.randint(2, load.words)))
            asked.append(text)
            yield mb.Request([system, {"role": "user", "content": text}], model=MODEL, max_tokens=load.max_tokens)

    marks: list[Used] = []
    async with batcher:
        async for result in batcher.map(requests()):
            # Who has not been told may be refused to the end, and is counted; nothing else may go wrong.
            if load.charge is not None or not isinstance(result.error, mb.RateLimited):
                assert result.unwrap().output == echo(asked[result.index]), result
            if loop.time() >= MINUTE * (len(marks) + 1):
                marks.append(used(model, batcher.stats(), loop.time(), load))
        return model, batcher.stats(), marks


def echo(text: str, schema: object = None) -> str:
    """The right answer: of much the same length as the question, so that replies vary in length too."""
    del schema
    return text.upper()


def used(model: SimulatedModel, stats: mb.Stats, now: float, load: Load) -> Used:
    tokens = stats.prompt_tokens + stats.completion_tokens
    charged = tokens
    if load.max_tokens is not None:  # then that is what is reserved, whatever the reply's length
        charged = stats.prompt_tokens + sum(body["max_tokens"] for body in model.requests)
    return Used(now, stats.upstream_calls - stats.rate_limited, tokens, charged)


def per_minute(start: Used, end: Used) -> tuple[float, float, float]:
    """Return requests, tokens charged and tokens used a minute."""
    minutes = (end.at - start.at) / MINUTE
    return (
        (end.requests - start.requests) / minutes,
        (end.charged - start.charged) / minutes,
        (end.tokens - start.tokens) / minutes,
    )


def binding(rates: tuple[float, float, float], model: SimulatedModel) -> tuple[str, float, float]:
    """Return the name of the limit that was nearest, the share of it used, and the share used in the fullest minute."""
    requests, charged, _ = rates
    return max(
        ("requests", requests / QUOTA.rpm, model.peak_requests / QUOTA.rpm),
        ("tokens", charged / QUOTA.tpm, model.peak_tokens / QUOTA.tpm),
        key=lambda limit: limit[1],
    )


def judged(table: Table) -> list[str]:
    rows = [dict(zip([column.name for column in table.columns], row, strict=True)) for row in table.rows]
    told = [row for row in rows if not row["load"].endswith(UNTOLD)]
    others = [row for row in rows if row["load"].endswith(UNTOLD)]
    failed = f"{_sum(others, '429s')} refusals and {_sum(others, 'failed')} requests that failed in the end"
    return [
        f"Told the quota, {_range(told)} of the limit that binds is used, with {_sum(told, '429s')} refusals (429).",
        f"Left to find out by 429s, it is {_range(others)}, with {failed}.",
        *(_lost(row) for row in told if row["max_tokens"] is not None),
        "Virtual time: queueing and pacing are exact; the network, and other clients of the same key, are not in it.",
    ]


def _lost(row: dict[str, Any]) -> str:
    charged, used = row["tokens charged/min"], row["tokens used/min"]
    return (
        f"With max_tokens {row['max_tokens']}, the endpoint charges {charged:,.0f} tokens a minute for {used:,.0f} that are used: "
        "what is reserved for long replies is lost to the short ones."
    )


def _range(rows: list[dict[str, Any]]) -> str:
    shares = [row["share used"] for row in rows]
    return f"{min(shares):.1%} to {max(shares):.1%}"


def _sum(rows: list[dict[str, Any]], name: str) -> str:
    return f"{sum(row[name] for row in rows):,}"


def draw(found: Report) -> Figure:
    table = found.tables["shares"]
    figure, (shares, refusals) = plot.panels(2, width=5.6)
    names = [f"{row[0]}\n(max_tokens {row[1] or 'not told'})" for row in table.rows]
    colours = [plot.MUTED if str(row[0]).endswith(UNTOLD) else plot.OURS for row in table.rows]
    shares.barh(names, [row[3] * 100 for row in table.rows], color=colours)
    shares.set(title="Use of a quota (SIMULATED endpoint)", xlabel="share of the limit that binds, %", xlim=(0, 105))
    refusals.barh(names, [row[8] for row in table.rows], color=colours)
    refusals.set(title="Refusals", xlabel="responses with 429")
    refusals.set_yticklabels([])
    for axes in (shares, refusals):
        axes.invert_yaxis()
    keys = [Patch(color=plot.OURS, label="told the quota"), Patch(color=plot.MUTED, label=UNTOLD)]
    figure.legend(handles=keys, loc="outside lower center", ncols=2)
    return figure
