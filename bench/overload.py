"""Memory under overload: many submits against an endpoint that accepts connections and never answers.

By tracemalloc, what a queued request and a waiting submit cost beyond their callers' own, and how memory grows while submits are
turned away. The caller's own is a task that holds its messages and awaits a future through a coroutine function with the signature
of `submit`. Beside that, a call of aiohttp that waits for a connection: what a user has who sends one call each. Each is measured
in a process of its own, where nothing else is counted.
"""

# ruff: noqa: ARG001 - the coroutine that stands for `submit` has its signature and uses none of it
from __future__ import annotations

import asyncio
import gc
import tracemalloc
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aiohttp

import microbatch as mb
from bench.apart import measured
from bench.report import Column, Table, met

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator

    from matplotlib.figure import Figure

    from bench.report import Report

QUESTION = "What does memory grow by when the endpoint stalls and callers go on asking?"
COMPARED = ["aiohttp"]

COUNT, COUNT_QUICK = 100_000, 15_000
QUEUED, QUEUED_QUICK = 10_000, 5_000
CONNECTIONS = 64
"""Of aiohttp: as many as `FlushPolicy` has calls under way by default."""

PATIENCE = 120.0
LEADING = 1_000
"""Rejected submits before those that count: they make what is made once."""

SYSTEM = "You are a careful clerk. Put the product into one of the categories of our shop, in one word."

OWN, WAITING_CALL = "the caller's own task, messages and future", "an aiohttp call that waits for a connection"
PROMISED = {"a queued request": 2_000, "a submit that waits for room": 300, "a rejected submit": 0}
"""Most bytes of each, by the README's table of promises."""

NOTHING = 1.0
"""Less than so many bytes each are nothing: what was made once does not grow with their number."""


def ask(number: int) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"Product {number:07}: " + "x" * 64}]


def traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def submit_of_nothing(messages):
    return await asyncio.get_running_loop().create_future()


@asynccontextmanager
async def stalled_endpoint() -> AsyncIterator[str]:
    """Yield the base URL of a server that reads and says nothing."""
    peers = []

    async def say_nothing(reader, writer):
        peers.append(writer)
        await reader.read()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        for writer in peers:
            writer.close()
        server.close()
        await server.wait_closed()


@asynccontextmanager
async def stalled_batcher(queued: int, when_full: str) -> AsyncIterator[mb.Microbatcher]:
    """Yield a batcher over real sockets to such a server."""
    async with stalled_endpoint() as url:
        chat = mb.OpenAIChat("gpt-4.1-mini", base_url=url, api_key="k")
        policy = mb.FlushPolicy(max_queued=queued, when_full=when_full)
        batcher = mb.Microbatcher(chat, policy=policy, tokens="bytes")
        await batcher.open()
        try:
            yield batcher
        finally:
            await batcher.aclose(0)


async def caller(submit, number):
    messages = ask(number)
    await submit(messages)


async def started(submit, numbers, tasks) -> int:
    """Start a caller for each number and let all of them get as far as they get; return the bytes they hold."""
    before = traced()
    tasks += [asyncio.create_task(caller(submit, number)) for number in numbers]
    # Twice round the loop each of them has asked; what is sent is sent a few turns later.
    for _ in range(20):
        await asyncio.sleep(0)
    await asyncio.sleep(0.2)
    return traced() - before


async def ended(tasks) -> None:
    tracemalloc.stop()  # all is measured, and tracing makes the end three times as long
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def held(submit, first: int, count: int) -> AsyncIterator[tuple[float, float]]:
    """Start *count* callers, the *first* of them first; yield the bytes that each of these holds, and each of the others."""
    tasks = []
    tracemalloc.start()
    early = await started(submit, range(first), tasks) / first
    late = await started(submit, range(first, count), tasks) / (count - first)
    yield early, late
    await ended(tasks)


async def waiting(count: int, queued: int) -> dict[str, float]:
    """Return the bytes of a caller, and those of a queued request and a waiting submit beyond them."""
    gc.disable()  # `traced` collects; in between it would only take time
    # As many of each as below: asyncio's table of tasks grows by leaps, which must not count as the batcher's.
    async with held(submit_of_nothing, queued, count) as own:
        pass
    async with (
        stalled_batcher(queued, "wait") as batcher,
        held(batcher.submit, queued, count) as each,
    ):
        assert batcher.stats().queued == queued, batcher.stats()
    return {"own": own[1], "queued": each[0] - own[0], "waiting": each[1] - own[1]}


async def rejected(count: int, queued: int) -> int:
    """Return the bytes that memory grows by while *count* submits beyond the bound are rejected."""
    gc.disable()

    async def refused(numbers):
        for number in numbers:
            try:
                await batcher.submit(ask(number))
            except mb.Overloaded:
                continue
            raise AssertionError("a submit beyond the bound was accepted")

    async with stalled_batcher(queued, "reject") as batcher:
        tasks = []
        await started(batcher.submit, range(queued), tasks)
        tracemalloc.start()
        growth = []
        for numbers in (range(LEADING), range(count)):
            before = traced()
            await asyncio.gather(*(refused(numbers[start::100]) for start in range(100)))
            growth.append(traced() - before)
        await ended(tasks)
    return growth[1]


async def one_call_each(count: int) -> float:
    """Return the bytes of a call of aiohttp that waits for a connection, beyond its caller's own."""
    gc.disable()
    async with held(submit_of_nothing, CONNECTIONS, CONNECTIONS + count) as (_, own):
        pass
    async with (
        stalled_endpoint() as url,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS)) as session,
    ):

        async def post(messages):
            body = {"model": "gpt-4.1-mini", "messages": messages}
            async with session.post(f"{url}/chat/completions", json=body) as response:
                return await response.read()

        async with held(post, CONNECTIONS, CONNECTIONS + count) as (_, waits):
            pass
    return waits - own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, help=f"submits (default {COUNT:,}; {COUNT_QUICK:,} if quick)")
    parser.add_argument("--queued", type=int, help=f"max_queued (default {QUEUED:,}; {QUEUED_QUICK:,} if quick)")


def run(options: argparse.Namespace, found: Report) -> None:
    count = options.count or (COUNT_QUICK if options.quick else COUNT)
    queued = options.queued or (QUEUED_QUICK if options.quick else QUEUED)
    beyond = count - queued
    if beyond <= 0:
        raise SystemExit("--count must be more than --queued: the rest waits for room, or is rejected")
    pending = measured(waiting, patience=PATIENCE, count=count, queued=queued)
    growth = measured(rejected, patience=PATIENCE, count=beyond, queued=queued)
    call = measured(one_call_each, patience=PATIENCE, count=queued)
    found.samples["bytes"] = {**pending, "rejected_all": growth, "aiohttp": call}
    table = found.tables["memory"] = Table(
        f"Bytes by tracemalloc: {count:,} submits, max_queued={queued:,}, SIMULATED endpoint that never answers",
        [Column("what"), Column("how many", ","), Column("bytes each", ",.1f"), Column("promised at most", ",")],
        notes=[
            (
                "All but the first row: beyond the caller's own. A queued request bears its share of the calls that are under way and "
                f"of their connections, so it costs more where few are queued. aiohttp: {CONNECTIONS} connections, all busy."
            ),
        ],
    )
    table.add(OWN, beyond, pending["own"], None)
    each = (pending["queued"], pending["waiting"], growth / beyond)
    for (what, promised), number, size in zip(PROMISED.items(), (queued, beyond, beyond), each, strict=True):
        table.add(what, number, size, promised)
    table.add(WAITING_CALL, queued, call, None)
    found.findings += judged(table, growth)


def judged(table: Table, growth: int) -> list[str]:
    rows = {row[0]: row[1:] for row in table.rows}
    said = [
        f"{what[0].upper()}{what[1:]} costs {rows[what][1]:,.0f} bytes; promised are at most {promised:,}: {met(rows[what][1] <= promised)}."
        for what, promised in PROMISED.items()
        if promised
    ]
    number, size, _ = rows["a rejected submit"]
    return [
        *said,
        f"While {number:,} submits were rejected, memory grew by {growth:,} bytes in all; promised is nothing: {met(size < NOTHING)}.",
        f"A call of aiohttp that waits for a connection costs {rows[WAITING_CALL][1]:,.0f} bytes, and nothing bounds how many wait.",
    ]


def draw(found: Report) -> Figure:
    # Late, so that the measured processes are without matplotlib.
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    from bench import plot

    figure, (axes,) = plot.panels(width=8.4, height=3.2)
    rows = found.tables["memory"].rows
    axes.barh(
        [row[0] for row in rows],
        [row[2] for row in rows],
        color=[plot.OURS if row[0] in PROMISED else plot.MUTED for row in rows],
    )
    for place, (_, _, size, promised) in enumerate(rows):
        if promised is not None:
            axes.plot([promised], [place], "|", color="black", markersize=16)
        axes.annotate(
            f"{size:,.0f}", (max(size, promised or 0), place), (5, 0), textcoords="offset points", va="center"
        )
    axes.set(title="Memory of a caller whom nobody answers (SIMULATED endpoint)", xlabel="bytes each, by tracemalloc")
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    figure.legend(
        handles=[
            Patch(color=plot.OURS, label="microbatch, beyond the caller's own"),
            Patch(color=plot.MUTED, label="for comparison"),
            Line2D([], [], color="black", marker="|", markersize=12, linestyle="", label="promised at most"),
        ],
        loc="outside lower center",
        ncols=3,
    )
    return figure
