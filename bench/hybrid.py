"""A shop's questions through cache, single flight, priorities and batches, against one call each under the same quota.

Questions about products, drawn by Zipf's law (s = 1), come one by one at a steady pace: a tenth of high priority (a visitor looks
at a page), most of normal, and a third of low (nightly work). The cache is empty at first. All on virtual time, against the
SIMULATED model: tokens and dollars are counted as an endpoint counts them, latency and quota are those the tables name. Both
batchers are given the quota, so one call each is as good as it gets: without retries, and first come, first served.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import microbatch as mb
from bench.benchmark import Option
from bench.questions import Label, products, zipf
from bench.report import Run, Table
from bench.timing import quantile
from microbatch.demo import instructions
from microbatch.testing import Latency, Quota, SimulatedModel, SimulatedTransport, VirtualClockLoop

if TYPE_CHECKING:
    import argparse

QUESTION = "What do cache, single flight, priorities and batches save together, and how long do callers wait?"
COMPARED = ["tiktoken"]
OPTIONS = {
    "input": Option(str, "", "", "JSON Lines with id, name, description and label"),
    "count": Option(int, 20_000, 4_000, "questions"),
}

MODEL = "gpt-4.1-mini"
QUOTA = Quota(rpm=1_000, tpm=200_000)
LATENCY = Latency(first_token=0.5, tokens_per_second=80.0)
SHARES = {"high": 0.1, "normal": 0.6, "low": 0.3}
RATES = (5.0, 20.0)
"""Questions per second. Some 460 tokens a single call make 200,000 tokens a minute 7 calls a second: within the quota, and beyond."""

ALONE, HYBRID = "one call each", "hybrid"
NO_LIMIT = 10**6


def measure(options: argparse.Namespace) -> dict[str, Any]:
    labels = products(options.input)
    priorities = random.Random(options.seed).choices(list(SHARES), list(SHARES.values()), k=options.count)
    asks = list(zip(zipf(list(labels), options.count, options.seed), priorities, strict=True))
    played: dict[str, Any] = {}
    for rate in RATES:
        for way in (ALONE, HYBRID):
            with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
                played.setdefault(f"{rate:g}", {})[way] = runner.run(play(asks, labels, rate, hybrid=way == HYBRID))
    return {"products": len(labels), "played": played}


async def play(asks: list[tuple[str, str]], labels: dict[str, str], rate: float, *, hybrid: bool) -> dict[str, Any]:
    """Ask *rate* questions per second, and check every answer."""
    loop = asyncio.get_running_loop()
    model = SimulatedModel(answer=lambda text, _: labels[text], quota=QUOTA, latency=LATENCY)
    batcher = mb.Microbatcher(
        SimulatedTransport(model),
        policy=mb.FlushPolicy(max_batch_size=16 if hybrid else 1, max_queued=NO_LIMIT),
        rate_limit=mb.RateLimit(rpm=QUOTA.rpm, tpm=QUOTA.tpm),
        cache=mb.MemoryCache() if hybrid else None,
    )
    waits: dict[str, dict[str, list[float]]] = {priority: {"all": [], "misses": []} for priority in SHARES}
    system = {"role": "system", "content": instructions()}

    async def ask(text: str, priority: str) -> None:
        messages = [system, {"role": "user", "content": text}]
        as_sent = priority if hybrid else "normal"
        reply = await batcher.submit(messages, output_type=Label, model=MODEL, priority=as_sent)
        assert reply.output == labels[text], f"{reply.output} for {text}"
        waits[priority]["all"].append(reply.latency)
        if reply.route not in ("cache", "shared"):
            waits[priority]["misses"].append(reply.latency)

    async with batcher:
        tasks = []
        for number, asked in enumerate(asks):
            await asyncio.sleep(number / rate - loop.time())
            tasks.append(loop.create_task(ask(*asked)))
        for task in tasks:
            await task
        stats, seconds = batcher.stats(), loop.time()
    return {
        "calls": stats.upstream_calls,
        "tokens": stats.prompt_tokens + stats.completion_tokens,
        "dollars": stats.cost_usd,
        "hit_rate": stats.cache_hit_rate if hybrid else None,
        "batch": stats.batch_size_mean if hybrid else None,
        "refused": stats.rate_limited,
        "seconds": seconds,
        "waits": {
            priority: {
                kind: {"count": len(values), "p50": _quantile(values, 0.5), "p99": _quantile(values, 0.99)}
                for kind, values in kinds.items()
            }
            for priority, kinds in waits.items()
        },
    }


def _quantile(values: list[float], share: float) -> float | None:
    return quantile(values, share) if values else None


def tables(run: Run) -> dict[str, Table]:
    scene = (
        f"SIMULATED endpoint, {LATENCY.first_token} s to the first token, {LATENCY.tokens_per_second:g} tokens/s, {QUOTA.rpm:,} "
        f"requests and {QUOTA.tpm:,} tokens a minute; {run.options['count']:,} questions about {run.samples['products']:,} products, "
        f"prices of {MODEL}"
    )
    savings = Table(
        f"What was sent and paid: {scene}",
        "questions/s | way | calls {:,} | tokens {:,} | dollars {:.2f} | calls, change {:+.1%} | dollars, change {:+.1%}"
        " | hit rate {:.1%} | items a batch {:.1f} | 429s {:,} | minutes {:,.0f}",
    )
    latency = Table(
        f"Time to the answer: {scene}",
        "questions/s | way | priority | items {:,} | p50 s {:,.3f} | p99 s {:,.3f} | misses {:,} | misses p50 s {:,.3f} | misses p99 s {:,.3f}",
        "A miss is answered neither from the cache nor by a call that was under way for an equal question.",
    )
    for rate, ways in run.samples["played"].items():
        for way, one in ways.items():
            base = ways[ALONE]
            changes = [None if way == ALONE else one[key] / base[key] - 1 for key in ("calls", "dollars")]
            sent = (one[key] for key in ("calls", "tokens", "dollars"))
            savings.add(rate, way, *sent, *changes, one["hit_rate"], one["batch"], one["refused"], one["seconds"] / 60)
            for priority, kinds in one["waits"].items():
                cells = (kinds[kind][key] for kind in ("all", "misses") for key in ("count", "p50", "p99"))
                latency.add(rate, way, priority, *cells)
    return {"savings": savings, "latency": latency}


def findings(run: Run, tables: dict[str, Table]) -> list[str]:
    sent = tables["savings"].by("questions/s", "way")
    waited = tables["latency"].by("questions/s", "way", "priority")
    found = []
    for rate in run.samples["played"]:
        row = sent[rate, HYBRID]
        # A job that takes much longer than its questions take to come has not kept up.
        late = run.samples["played"][rate][ALONE]["seconds"] > 1.05 * run.options["count"] / float(rate)
        high, low = (
            " against ".join(f"{waited[rate, way, priority]['misses p99 s'] or 0:,.2f} s" for way in (HYBRID, ALONE))
            for priority in ("high", "low")
        )
        found.append(
            f"{rate} questions a second{', which is more than the quota admits one by one' if late else ''}: {row['calls, change']:+.1%} "
            f"calls, {row['dollars, change']:+.1%} dollars. The p99 over misses is {high} for high priority, and {low} for low, which "
            "waits for further requests."
        )
    return [
        *found,
        "Virtual time and a simulated model: network and processor time of the client are not in these figures.",
    ]
