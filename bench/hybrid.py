"""A shop's questions through cache, single flight, priorities and batches, against one call each under the same quota.

Questions about products, drawn by Zipf's law (s = 1), come one by one at a steady pace: a tenth of high priority (somebody looks
at a page), most of normal, and a third of low (nightly work). The cache is empty at first. All on virtual time, against the
SIMULATED model: tokens and dollars are counted as an endpoint counts them, latency and quota are those the tables name. Both
batchers have been told the quota, so one call each is as good as it gets: without retries, and first come, first served.
"""

from __future__ import annotations

import asyncio
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import microbatch as mb
from bench import plot
from bench.questions import Label, products, zipf
from bench.report import Column, Report, Table
from bench.timing import quantile
from microbatch.demo import instructions
from microbatch.testing import Latency, Quota, SimulatedModel, SimulatedTransport, VirtualClockLoop

if TYPE_CHECKING:
    import argparse

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUESTION = "What do cache, single flight, priorities and batches save together, and what do callers wait?"
COMPARED = ["tiktoken"]

MODEL = "gpt-4.1-mini"
QUOTA = Quota(rpm=1_000, tpm=200_000)
LATENCY = Latency(first_token=0.5, tokens_per_second=80.0)
SHARES = {"high": 0.1, "normal": 0.6, "low": 0.3}
COUNT, COUNT_QUICK = 20_000, 4_000
# Some 460 tokens a single call make 200,000 tokens a minute 7 calls a second: the first rate is within the quota, the second beyond.
RATES = [5.0, 20.0]
ALONE, HYBRID = "one call each", "hybrid"
UNBOUNDED = 10**6


class Asked(NamedTuple):
    text: str
    priority: str


class Wait(NamedTuple):
    seconds: float
    hit: bool


class Played(NamedTuple):
    """What came of a stream of questions: the counts, what callers waited by priority, and the virtual seconds to the last answer."""

    stats: mb.Stats
    waits: dict[str, list[Wait]]
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, help="JSON Lines with id, name, description and label")
    parser.add_argument("--count", type=int, help=f"questions (default {COUNT:,}; {COUNT_QUICK:,} if quick)")
    parser.add_argument(
        "--per-second", type=float, nargs="+", default=RATES, help="questions a second (default %(default)s)"
    )


def run(options: argparse.Namespace, found: Report) -> None:
    questions = products(options.input)
    labels = dict(questions)
    asks = stream(list(labels), options.count or (COUNT_QUICK if options.quick else COUNT), options.seed)
    scene = (
        f"SIMULATED endpoint, {LATENCY.first_token} s to the first token, {LATENCY.tokens_per_second:g} tokens/s, {QUOTA.rpm:,} "
        f"requests and {QUOTA.tpm:,} tokens a minute; {len(asks):,} questions about {len(labels):,} products, prices of {MODEL}"
    )
    savings = found.tables["savings"] = Table(
        f"What was sent and paid: {scene}",
        [
            Column("questions/s", "g"),
            Column("way"),
            Column("calls", ","),
            Column("tokens", ","),
            Column("dollars", ".2f"),
            Column("calls, change", "+.1%"),
            Column("dollars, change", "+.1%"),
            Column("hit rate", ".1%"),
            Column("items a batch", ".1f"),
            Column("429s", ","),
            Column("minutes", ",.0f"),
        ],
    )
    latency = found.tables["latency"] = Table(
        f"What callers waited, in seconds: {scene}",
        [
            Column("questions/s", "g"),
            Column("way"),
            Column("priority"),
            Column("items", ","),
            Column("p50 s", ",.3f"),
            Column("p99 s", ",.3f"),
            Column("misses", ","),
            Column("misses p50 s", ",.3f"),
            Column("misses p99 s", ",.3f"),
        ],
    )
    latency.notes.append(
        "A miss is answered neither from the cache nor by a call that was under way for somebody else."
    )
    for per_second in options.per_second or RATES:
        played = {way: play(asks, labels, per_second, hybrid=way == HYBRID) for way in (ALONE, HYBRID)}
        for way, one in played.items():
            sent(savings, per_second, way, one, base=played[ALONE].stats)
            waited(latency, per_second, way, one)
        found.samples[f"{per_second:g}/s"] = {way: sample(one.waits) for way, one in played.items()}
        found.findings.append(judged(per_second, played, arriving=len(asks) / per_second))
    found.findings.append(
        "Virtual time and a simulated model: the network and the client's own processor time are not in these figures."
    )


def stream(texts: list[str], count: int, seed: int) -> list[Asked]:
    """Draw *count* questions with their priorities."""
    draw = random.Random(seed)
    priorities = draw.choices(list(SHARES), list(SHARES.values()), k=count)
    return [Asked(text, priority) for text, priority in zip(zipf(texts, count, seed), priorities, strict=True)]


def play(asks: list[Asked], labels: dict[str, str], per_second: float, *, hybrid: bool) -> Played:
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(_play(asks, labels, per_second, hybrid=hybrid))


async def _play(asks: list[Asked], labels: dict[str, str], per_second: float, *, hybrid: bool) -> Played:
    """Let *asks* come at *per_second*, and check every answer."""
    loop = asyncio.get_running_loop()
    model = SimulatedModel(answer=lambda text, _: labels[text], quota=QUOTA, latency=LATENCY)
    size = mb.FlushPolicy().max_batch_size if hybrid else 1
    batcher = mb.Microbatcher(
        SimulatedTransport(model),
        policy=mb.FlushPolicy(max_batch_size=size, max_queued=UNBOUNDED),  # nobody is turned away, so waits tell all
        rate_limit=mb.RateLimit(rpm=QUOTA.rpm, tpm=QUOTA.tpm),
        cache=mb.MemoryCache() if hybrid else None,
    )
    waits: dict[str, list[Wait]] = {priority: [] for priority in SHARES}
    system = {"role": "system", "content": instructions()}

    async def ask(text: str, priority: str) -> None:
        reply = await batcher.submit(
            [system, {"role": "user", "content": text}],
            output_type=Label,
            model=MODEL,
            priority=priority if hybrid else "normal",
        )
        assert reply.output == labels[text], f"{reply.output} for {text}"
        waits[priority].append(Wait(reply.latency, reply.route in ("cache", "shared")))

    async with batcher:
        tasks = []
        for number, asked in enumerate(asks):
            await asyncio.sleep(number / per_second - loop.time())
            tasks.append(loop.create_task(ask(*asked)))
        for task in tasks:
            await task
        return Played(batcher.stats(), waits, loop.time())


def sent(table: Table, per_second: float, way: str, played: Played, *, base: mb.Stats) -> None:
    stats = played.stats
    changes = (
        (None, None)
        if stats is base
        else (stats.upstream_calls / base.upstream_calls - 1, stats.cost_usd / base.cost_usd - 1)
    )
    table.add(
        per_second,
        way,
        stats.upstream_calls,
        stats.prompt_tokens + stats.completion_tokens,
        stats.cost_usd,
        *changes,
        stats.cache_hit_rate if way == HYBRID else None,
        stats.batch_size_mean if way == HYBRID else None,
        stats.rate_limited,
        played.seconds / 60,
    )


def waited(table: Table, per_second: float, way: str, played: Played) -> None:
    for priority, waits in played.waits.items():
        every, missed = [wait.seconds for wait in waits], [wait.seconds for wait in waits if not wait.hit]
        table.add(per_second, way, priority, len(every), *middle_and_tail(every), len(missed), *middle_and_tail(missed))


def middle_and_tail(values: list[float]) -> tuple[float | None, float | None]:
    return (quantile(values, 0.5), quantile(values, 0.99)) if values else (None, None)


def sample(waits: dict[str, list[Wait]]) -> dict[str, list[float]]:
    """Return the whole percentiles of the waits of each priority, 0 to 100: the curve that is drawn."""
    seconds = {priority: [wait.seconds for wait in several] for priority, several in waits.items()}
    return {
        priority: [quantile(values, share / 100) for share in range(101)]
        for priority, values in seconds.items()
        if values
    }


def judged(per_second: float, played: dict[str, Played], *, arriving: float) -> str:
    before, now = played[ALONE], played[HYBRID]
    # What lasts much longer than questions come has not kept up.
    late = ", which is more than the quota bears one by one" if before.seconds > 1.05 * arriving else ""
    high, low = (
        f"{_tail(now, priority):,.2f} s against {_tail(before, priority):,.2f} s" for priority in ("high", "low")
    )
    return (
        f"{per_second:g} questions a second{late}: {now.stats.upstream_calls / before.stats.upstream_calls - 1:+.1%} calls, "
        f"{now.stats.cost_usd / before.stats.cost_usd - 1:+.1%} dollars. The p99 over misses is {high} for high priority, and "
        f"{low} for low, which waits for company."
    )


def _tail(played: Played, priority: str) -> float:
    """Return the p99 over the misses, NaN if there was none."""
    missed = [wait.seconds for wait in played.waits[priority] if not wait.hit]
    return quantile(missed, 0.99) if missed else math.nan


def draw(found: Report) -> Figure:
    figure, panels = plot.panels(len(found.samples))
    for axes, (rate, ways) in zip(panels, found.samples.items(), strict=True):
        draw_waits(axes, ways)
        axes.set(title=f"{rate.removesuffix('/s')} questions a second (SIMULATED endpoint)")
    panels[0].legend(fontsize=8)
    return figure


def draw_waits(axes: Axes, ways: dict[str, dict[str, list[float]]]) -> None:
    """Draw what share of the callers has waited at least so long."""
    for way, colour in ((ALONE, plot.MUTED), (HYBRID, plot.OURS)):
        for (priority, percentiles), style in zip(ways[way].items(), ("-", "--", ":"), strict=False):
            axes.plot(range(101), percentiles, style, color=colour, label=f"{way}, {priority} priority")
    # Hits take no time at all, and beyond the quota waits grow to minutes.
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set(xlabel="percentile of the callers", ylabel="time to answer, s", ylim=(0, None))
