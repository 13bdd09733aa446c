"""The duration, calls, tokens and cost of a job of many items by batch size, where requests, tokens or calls are limited.

On virtual time: queueing and pacing are exact, processor time of the client and the network are not included. Every way uses a batcher
that is given the quota, one call each too, which is as good as one call each gets: no refusals and no needless waits.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import microbatch as mb
from bench.apart import measured
from bench.questions import Label
from bench.quota import MeteredModel
from bench.report import Table, met
from bench.throughput import scene
from bench.throughput.scene import Way, labels_of, messages, questions, together
from bench.timing import quantile
from microbatch.testing import Quota, SimulatedTransport, VirtualClockLoop

if TYPE_CHECKING:
    import argparse

    from bench.report import Run

ALONE_ZIPF, CACHED_ZIPF = f"{scene.ALONE}, Zipf", f"{scene.BATCHER} {scene.SIZE} + cache, Zipf"
WAYS = {
    way.name: way
    for way in (
        Way(scene.ALONE),
        *map(together, scene.SIZES),
        Way(ALONE_ZIPF, zipf=True),
        Way(CACHED_ZIPF, scene.SIZE, zipf=True, cached=True),
    )
}

RPM, TPM = 1_000, 200_000
UNDER_QUOTA = 160
"""Calls under way at once where a quota is to bind: 1,000 calls a minute of 50 items are some 130 at once."""


class Limit(NamedTuple):
    rpm: int | None
    tpm: int | None
    at_once: int


BY_REQUESTS, BY_BOTH, BY_CALLS = (
    f"{RPM:,} requests/min",
    f"{RPM:,} requests and {TPM:,} tokens/min",
    f"{scene.AT_ONCE} calls at once",
)
LIMITS = {
    BY_REQUESTS: Limit(RPM, None, UNDER_QUOTA),
    BY_BOTH: Limit(RPM, TPM, UNDER_QUOTA),
    BY_CALLS: Limit(None, None, scene.AT_ONCE),
}

STEADY = (0.1, 0.9)
"""Shares of the items between which the rate is taken: without the start, and without the last calls to come back."""

BINDS = 0.8
"""A limit of which less is used does not bind."""

FEWER_CALLS, FEWER_TOKENS, TIMES_ITEMS = 0.93, 0.60, 15.0
"""The targets at 16 items and 300 tokens."""


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return each way's jobs by limit; they run side by side in processes, which does not matter to virtual time."""
    # One call each first: these are the most calls, and take the longest.
    order = sorted(WAYS, key=lambda name: WAYS[name].size)
    cores = os.cpu_count() or 1

    def ran(names: list[str]) -> Any:
        return measured(play, names=names, path=options.input, count=options.count, seed=options.seed)

    found: dict[str, Any] = {}
    with ThreadPoolExecutor(cores) as pool:
        for some in pool.map(ran, (order[first::cores] for first in range(cores))):
            found |= some
    return {name: found[name] for name in WAYS}


def play(names: list[str], path: str, count: int, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        way = WAYS[name]
        asked = questions(path, count, seed, repeated=way.zipf)
        found[name] = {}
        for words, limit in LIMITS.items():
            with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
                found[name][words] = runner.run(job(way, limit, asked, labels_of(path)))
    return found


async def job(way: Way, limit: Limit, asked: list[str], labels: dict[str, str]) -> dict[str, Any]:
    """Have *asked* answered before an endpoint that enforces *limit*, and check every answer."""
    loop = asyncio.get_running_loop()
    quota = {"rpm": limit.rpm, "tpm": limit.tpm} if limit.rpm else None
    model = MeteredModel(
        answer=lambda text, _: labels[text], latency=scene.LATENCY, quota=Quota(**quota) if quota else None
    )
    batcher = mb.Microbatcher(
        SimulatedTransport(model),
        policy=mb.FlushPolicy(
            max_batch_size=way.size, max_concurrent_batches=limit.at_once, max_output_tokens=scene.NO_LIMIT
        ),
        rate_limit=mb.RateLimit(**quota) if quota else None,
        cache=mb.MemoryCache() if way.cached else None,
    )
    requests = (mb.Request(messages(text), model=scene.MODEL, output_type=Label) for text in asked)
    calls: list[float] = []
    marks: list[tuple[int, float]] = [(0, loop.time())]
    at = [round(share * len(asked)) for share in (*STEADY, 1.0)]
    done = 0
    async with batcher:
        async for result in batcher.map(requests):
            reply = result.unwrap()
            assert reply.output == labels[asked[result.index]], "a wrong answer"
            if reply.route not in ("cache", "shared"):
                calls.append(reply.latency - reply.waited)
            done += 1
            if done in at:
                marks.append((done, loop.time()))
        stats = batcher.stats()
    assert stats.fallback_calls == 0, "an answer took a second call"
    return {
        "marks": marks,
        "calls": stats.upstream_calls,
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "charged_tokens": model.charged,
        "dollars": stats.cost_usd,
        "refused": stats.rate_limited,
        "call_s": [quantile(calls, share) for share in (0.5, 0.99)],
    }


def table(run: Run) -> Table:
    count = run.options["count"]
    table = Table(
        f"A job of {count:,} items on virtual time, SIMULATED endpoint: {scene.LATENCY.first_token} s to the first token, "
        f"{scene.LATENCY.tokens_per_second:g} tokens/s, {scene.TOKENS} tokens of instructions, prices of {scene.MODEL}",
        "limited | way | items/min {:,.0f} | x one call each {:.2f} | minutes {:,.1f} | limit that binds"
        " | share used {:.1%} | calls {:,} | prompt tokens {:,} | completion tokens {:,} | dollars {:,.2f}"
        " | calls, change {:+.1%} | tokens, change {:+.1%} | dollars, change {:+.1%} | 429s {:,} | call p50 s {:.2f}"
        " | call p99 s {:.2f}",
        f"items/min: between the answers at {STEADY[0]:.0%} and {STEADY[1]:.0%} of the items; with Zipf, over the whole job, since a "
        "cache has no steady rate. call: from the call's leaving to the answer; waits for a turn are in the minutes. Replies are whole, "
        "as in `map`. Changes are against one call each over the same questions. Shares are of what the endpoint charges: prompt and "
        "max_tokens, which the batcher sets for combined calls.",
    )
    for words, limit in LIMITS.items():
        for name, jobs in run.samples["jobs"].items():
            one, base = jobs[words], run.samples["jobs"][ALONE_ZIPF if WAYS[name].zipf else scene.ALONE][words]
            rate = per_minute(name, one)
            changes = [_paid(one, key) / _paid(base, key) - 1 for key in ("calls", "tokens", "dollars")]
            first = name in (scene.ALONE, ALONE_ZIPF)
            table.add(
                words,
                name,
                rate,
                None if first else rate / per_minute(name, base),
                one["marks"][-1][1] / 60,
                *binding(limit, one, rate),
                *(one[key] for key in ("calls", "prompt_tokens", "completion_tokens", "dollars")),
                *([None] * 3 if first else changes),
                one["refused"],
                *one["call_s"],
            )
    return table


def _paid(one: dict[str, Any], key: str) -> float:
    return one["prompt_tokens"] + one["completion_tokens"] if key == "tokens" else one[key]


def per_minute(name: str, one: dict[str, Any]) -> float:
    """Return the items answered per minute in the steady stretch, or over the whole job if there is none."""
    start, first, last, end = one["marks"]
    (before, since), (after, until) = (start, end) if WAYS[name].zipf else (first, last)
    return (after - before) / (until - since) * 60


def binding(limit: Limit, one: dict[str, Any], rate: float) -> tuple[str, float | None]:
    """Return the name of the limit that was nearest, and the share of it that was used."""
    if limit.rpm is None:
        return "calls at once", None
    minutes = one["marks"][-1][0] / rate
    shares = {"requests": one["calls"] / minutes / limit.rpm}
    if limit.tpm is not None:
        shares["tokens"] = one["charged_tokens"] / minutes / limit.tpm
    name = max(shares, key=shares.__getitem__)
    return name if shares[name] >= BINDS else "none", shares[name]


def findings(table: Table) -> list[str]:
    rows = table.by("limited", "way")
    ours, alone = ({limit: rows[limit, name] for limit in LIMITS} for name in (together(scene.SIZE).name, scene.ALONE))
    first, both, free = (ours[limit] for limit in LIMITS)
    calls, tokens, times = -first["calls, change"], -first["tokens, change"], first["x one call each"]
    setting = f"{scene.SIZE} items a call and {scene.TOKENS} tokens of instructions"
    return [
        f"{setting}: {calls:.1%} fewer calls; target {FEWER_CALLS:.0%} {met(calls >= FEWER_CALLS)}.",
        f"{setting}: {tokens:.1%} fewer tokens, prompt and completion together; target {FEWER_TOKENS:.0%} {met(tokens >= FEWER_TOKENS)}.",
        f"{BY_REQUESTS} as the only limit: {first['items/min']:,.0f} items/min against {alone[BY_REQUESTS]['items/min']:,.0f} one call "
        f"each, {times:.1f} times; target {TIMES_ITEMS:g} times {met(times >= TIMES_ITEMS)}.",
        f"{BY_BOTH}: {both['items/min']:,.0f} items/min, bound by {both['limit that binds']} ({both['share used']:.1%} used), against "
        f"{alone[BY_BOTH]['items/min']:,.0f} one call each, bound by {alone[BY_BOTH]['limit that binds']}: {both['x one call each']:.1f} "
        f"times, not {scene.SIZE}, because tokens do not get fewer as calls do.",
        f"{BY_CALLS}, no quota: {free['x one call each']:.1f} times the items/min; a call takes {free['call p50 s']:.2f} s at the median "
        f"against {alone[BY_CALLS]['call p50 s']:.2f} s, since its answers are written one after the other.",
    ]
