"""How long a job of many items takes, what it sends and what it costs, by batch size, where requests, tokens or calls are limited.

On virtual time, so that minutes of quota cost none: queueing and pacing are exact, the client's own processor time and the network
are not in it. All go through a batcher that has been told the quota, one call each too, which is as good as one call each gets: no
refusals, no waiting longer than need be.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import microbatch as mb
from bench.apart import measured
from bench.questions import Label
from bench.report import Column, Table, met
from bench.throughput.scene import (
    AT_ONCE,
    CACHED,
    LATENCY,
    MODEL,
    NEVER_BINDS,
    QUICK_SIZES,
    SIZE,
    SIZES,
    TOKENS,
    Way,
    labels_of,
    messages,
    questions,
    together,
)
from bench.timing import quantile
from microbatch.testing import Quota, SimulatedModel, SimulatedTransport, VirtualClockLoop

if TYPE_CHECKING:
    from bench.report import Report

ALONE, ALONE_ZIPF = Way("one call each"), Way("one call each, Zipf", zipf=True)
WAYS = (ALONE, *map(together, SIZES), ALONE_ZIPF, CACHED)
QUICK_WAYS = (ALONE, *map(together, QUICK_SIZES), ALONE_ZIPF, CACHED)

RPM, TPM = 1_000, 200_000
UNDER_QUOTA = 160
"""Calls under way at once, where a quota is to bind: of 50 items, 1,000 a minute are some 130 at once."""


class Regime(NamedTuple):
    """What is limited.

    Attributes:
        name: As tables have it.
        rpm: Requests a minute.
        tpm: Tokens a minute.
        at_once: Calls under way.
    """

    name: str
    rpm: int | None
    tpm: int | None
    at_once: int = UNDER_QUOTA


BY_REQUESTS = Regime(f"{RPM:,} requests/min", RPM, None)
BY_BOTH = Regime(f"{RPM:,} requests and {TPM:,} tokens/min", RPM, TPM)
BY_CALLS = Regime(f"{AT_ONCE} calls at once", None, None, AT_ONCE)
REGIMES = (BY_REQUESTS, BY_BOTH, BY_CALLS)

STEADY = (0.1, 0.9)
"""Shares of the items between which the rate is taken: without the start, and without the last calls to come back."""

BINDS = 0.8
"""A limit of which less is used does not bind."""

FEWER_CALLS, FEWER_TOKENS, TIMES_ITEMS = 0.93, 0.60, 15.0
"""The targets at 16 items and 300 tokens."""

QUANTILES = (0.5, 0.95, 0.99)
PATIENCE = 1_200.0


def measure(found: Report, path: str | None, count: int) -> None:
    """Fill in the table of jobs; the ways run side by side in processes of their own, which virtual time does not mind."""
    table = found.tables["jobs"] = Table(
        f"A job of {count:,} items on virtual time, SIMULATED endpoint: {LATENCY.first_token} s to the first token, "
        f"{LATENCY.tokens_per_second:g} tokens/s, {TOKENS} tokens of instructions, prices of {MODEL}",
        [
            Column("limited"),
            Column("way"),
            Column("items/min", ",.0f"),
            Column("x one call each", ".2f"),
            Column(f"minutes for {count:,}", ",.1f"),
            Column("limit that binds"),
            Column("share used", ".1%"),
            Column("calls", ","),
            Column("prompt tokens", ","),
            Column("completion tokens", ","),
            Column("dollars", ",.2f"),
            Column("calls, change", "+.1%"),
            Column("tokens, change", "+.1%"),
            Column("dollars, change", "+.1%"),
            Column("429s", ","),
            *(Column(f"call p{share * 100:.0f} s", ".2f") for share in QUANTILES),
        ],
        notes=[
            f"items/min: between the answers at {STEADY[0]:.0%} and {STEADY[1]:.0%} of the items; with Zipf, over the whole job, since a "
            "cache has no steady rate. call: from the call's leaving to the answer; what items wait for their turn is in the minutes. "
            "Replies are whole, as in `map`. Changes are against one call each over the same questions.",
        ],
    )
    run = partial(measured, play, patience=PATIENCE, path=path, count=count, seed=found.seed)
    ways = QUICK_WAYS if found.quick else WAYS
    # One call each first: these are the most calls, and take the longest.
    order = sorted(ways, key=lambda way: way.size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ran = list(pool.map(lambda way: run(number=WAYS.index(way)), order))
    by_name = dict(zip([way.name for way in order], ran, strict=True))
    found.samples["jobs"] = {way.name: by_name[way.name] for way in ways}
    for regime in REGIMES:
        jobs = {way: by_name[way.name][regime.name] for way in ways}
        for way in ways:
            tell(table, regime, way, jobs[way], base=jobs[ALONE_ZIPF if way.zipf else ALONE])
    cached = jobs[CACHED]
    table.notes.append(
        f"The questions by Zipf's law are about {cached['distinct']:,} products: each is asked about once, and the rest of the "
        f"{count:,} are answered from the cache, or by the call that is under way for the same."
    )


def play(*, number: int, path: str | None, count: int, seed: int) -> dict[str, Any]:
    """Run the job by the way of that *number* under every regime."""
    way = WAYS[number]
    asked = questions(path, count, seed, repeated=way.zipf)
    labels = labels_of(path)
    regimes = {}
    for regime in REGIMES:
        with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
            regimes[regime.name] = runner.run(job(way, regime, asked, labels))
    return regimes


async def job(way: Way, regime: Regime, asked: list[str], labels: dict[str, str]) -> dict[str, Any]:
    """Have *asked* answered, and check every answer."""
    loop = asyncio.get_running_loop()
    batcher = open_to(way, regime, labels)
    requests = (mb.Request(messages(text), model=MODEL, output_type=Label) for text in asked)
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
        "dollars": stats.cost_usd,
        "refused": stats.rate_limited,
        "distinct": len(set(asked)),
        "call_s": [quantile(calls, share / 100) for share in range(101)],
    }


def open_to(way: Way, regime: Regime, labels: dict[str, str]) -> mb.Microbatcher:
    """Return the batcher of *way*, not open yet, before an endpoint that enforces what *regime* says."""
    limits = {"rpm": regime.rpm, "tpm": regime.tpm} if regime.rpm else None
    model = SimulatedModel(
        answer=lambda text, _: labels[text], latency=LATENCY, quota=Quota(**limits) if limits else None
    )
    return mb.Microbatcher(
        SimulatedTransport(model),
        policy=mb.FlushPolicy(
            max_batch_size=way.size, max_concurrent_batches=regime.at_once, max_output_tokens=NEVER_BINDS
        ),
        rate_limit=mb.RateLimit(**limits) if limits else None,
        cache=mb.MemoryCache() if way.cached else None,
    )


def tell(table: Table, regime: Regime, way: Way, one: dict[str, Any], *, base: dict[str, Any]) -> None:
    rate = per_minute(way, one)
    tokens, base_tokens = (each["prompt_tokens"] + each["completion_tokens"] for each in (one, base))
    changes = (
        one["calls"] / base["calls"] - 1,
        tokens / base_tokens - 1,
        one["dollars"] / base["dollars"] - 1,
    )
    table.add(
        regime.name,
        way.name,
        rate,
        None if one is base else rate / per_minute(way, base),
        one["marks"][-1][1] / 60,
        *binding(regime, way, one),
        one["calls"],
        one["prompt_tokens"],
        one["completion_tokens"],
        one["dollars"],
        *([None] * 3 if one is base else changes),
        one["refused"],
        *(one["call_s"][round(share * 100)] for share in QUANTILES),
    )


def per_minute(way: Way, one: dict[str, Any]) -> float:
    """Return the items answered a minute: of the steady stretch, or of the whole job if there is none."""
    start, first, last, end = one["marks"]
    (before, since), (after, until) = (start, end) if way.zipf else (first, last)
    return (after - before) / (until - since) * 60


def binding(regime: Regime, way: Way, one: dict[str, Any]) -> tuple[str, float | None]:
    """Return the name of the limit that was nearest, and the share of it that was used."""
    if regime.rpm is None:
        return "calls at once", None
    minutes = one["marks"][-1][0] / per_minute(way, one)
    shares = {"requests": one["calls"] / minutes / regime.rpm}
    if regime.tpm is not None:
        shares["tokens"] = (one["prompt_tokens"] + one["completion_tokens"]) / minutes / regime.tpm
    name = max(shares, key=shares.__getitem__)
    return name if shares[name] >= BINDS else "none", shares[name]


def findings(found: Report) -> list[str]:
    rows = {
        (row[0], row[1]): dict(zip([column.name for column in found.tables["jobs"].columns], row, strict=True))
        for row in found.tables["jobs"].rows
    }
    ours, alone = (
        {regime: rows[regime.name, name] for regime in REGIMES} for name in (together(SIZE).name, ALONE.name)
    )
    first = ours[BY_REQUESTS]
    calls, tokens, times = -first["calls, change"], -first["tokens, change"], first["x one call each"]
    scene = f"{SIZE} items a call and {TOKENS} tokens of instructions"
    both, both_alone = ours[BY_BOTH], alone[BY_BOTH]
    free = ours[BY_CALLS]
    return [
        f"{scene}: {calls:.1%} fewer calls; target {FEWER_CALLS:.0%}: {met(calls >= FEWER_CALLS)}.",
        f"{scene}: {tokens:.1%} fewer tokens, prompt and completion together; target {FEWER_TOKENS:.0%}: {met(tokens >= FEWER_TOKENS)}.",
        f"{BY_REQUESTS.name} alone limited: {first['items/min']:,.0f} items/min against {alone[BY_REQUESTS]['items/min']:,.0f} one call "
        f"each, {times:.1f} times; target {TIMES_ITEMS:g} times: {met(times >= TIMES_ITEMS)}.",
        f"{BY_BOTH.name} limited: {both['items/min']:,.0f} items/min, bound by {both['limit that binds']} ({both['share used']:.1%} used), "
        f"against {both_alone['items/min']:,.0f} one call each, bound by {both_alone['limit that binds']} "
        f"({both_alone['share used']:.1%} used): {both['x one call each']:.1f} times, not {SIZE}, because tokens do not get fewer as calls do.",
        f"{BY_CALLS.name}, no quota: {free['x one call each']:.1f} times the items/min; a call takes {free['call p50 s']:.2f} s at the median "
        f"against {alone[BY_CALLS]['call p50 s']:.2f} s, since its answers are written one after the other.",
    ]
