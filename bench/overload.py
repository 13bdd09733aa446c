"""Memory under overload: many submits against an endpoint that accepts connections and never answers.

By tracemalloc, the bytes of a queued request and of a waiting submit beyond their callers' own, and the growth while submits are
rejected. The caller's own is a task that holds its messages and awaits a future through a coroutine function. Each is measured in a
process of its own, where nothing else is counted.
"""

# ruff: noqa: ARG001 - the coroutine that stands for `submit` does not use its argument
from __future__ import annotations

import asyncio
import gc
import tracemalloc
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import microbatch as mb
from bench.apart import measured
from bench.benchmark import Option
from bench.report import Run, Table, met

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator

QUESTION = "How much does memory grow when the endpoint stalls and callers go on asking?"
COMPARED: list[str] = []
OPTIONS = {
    "count": Option(int, 100_000, 15_000, "submits"),
    "queued": Option(int, 10_000, 5_000, "max_queued; the submits beyond it wait for room, or are rejected"),
}

LEADING = 1_000
"""Rejected submits before those that count: they allocate what is allocated once."""

SYSTEM = "You are a careful clerk. Put the product into one of the categories of our shop, in one word."

OWN = "the caller's own task, messages and future"
PROMISED = {"a queued request": 2_000, "a submit that waits for room": 300, "a rejected submit": 0}
"""Most bytes of each, by the README's table of promises."""

NOTHING = 1.0
"""Less than so many bytes each counts as nothing: one-time allocations do not grow with their number."""


def ask(number: int) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"Product {number:07}: " + "x" * 64}]


def traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def submit_of_nothing(messages):
    return await asyncio.get_running_loop().create_future()


@asynccontextmanager
async def stalled_endpoint() -> AsyncIterator[str]:
    """Yield the base URL of a server that reads and never answers."""
    peers = []

    async def never_answer(reader, writer):
        peers.append(writer)
        await reader.read()

    server = await asyncio.start_server(never_answer, "127.0.0.1", 0)
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
    """Start a caller for each number, let all of them proceed as far as they can, and return the bytes they hold."""
    before = traced()
    tasks += [asyncio.create_task(caller(submit, number)) for number in numbers]
    # After two turns of the loop each has asked; calls leave a few turns later.
    for _ in range(20):
        await asyncio.sleep(0)
    await asyncio.sleep(0.2)
    return traced() - before


async def ended(tasks) -> None:
    tracemalloc.stop()  # the measurement is over, and tracing triples the time of the end
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
    # As many of each as below: asyncio's table of tasks grows in steps, which must not count as the batcher's.
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


def measure(options: argparse.Namespace) -> dict[str, Any]:
    beyond = options.count - options.queued
    if beyond <= 0:
        raise SystemExit("--count must be more than --queued: the rest waits for room, or is rejected")
    pending = measured(waiting, count=options.count, queued=options.queued)
    return {"bytes": {**pending, "rejected_all": measured(rejected, count=beyond, queued=options.queued)}}


def tables(run: Run) -> dict[str, Table]:
    count, queued, held = run.options["count"], run.options["queued"], run.samples["bytes"]
    beyond = count - queued
    table = Table(
        f"Bytes by tracemalloc: {count:,} submits, max_queued={queued:,}, SIMULATED endpoint that never answers",
        "what | how many {:,} | bytes each {:,.1f} | promised at most {:,}",
        "All but the first row: beyond the caller's own. A queued request bears its share of the calls that are under way and of their "
        "connections, so it costs more where few are queued.",
    )
    table.add(OWN, beyond, held["own"], None)
    sizes = (held["queued"], held["waiting"], held["rejected_all"] / beyond)
    for (what, promised), number, size in zip(PROMISED.items(), (queued, beyond, beyond), sizes, strict=True):
        table.add(what, number, size, promised)
    return {"memory": table}


def findings(run: Run, tables: dict[str, Table]) -> list[str]:
    rows = {what: row["bytes each"] for what, row in tables["memory"].by("what").items()}
    growth, beyond = run.samples["bytes"]["rejected_all"], run.options["count"] - run.options["queued"]
    return [
        *(
            f"{what[0].upper()}{what[1:]} costs {rows[what]:,.0f} bytes; at most {promised:,} are promised: {met(rows[what] <= promised)}."
            for what, promised in PROMISED.items()
            if promised
        ),
        f"While {beyond:,} submits were rejected, memory grew by {growth:,} bytes in all; nothing is promised: {met(growth / beyond < NOTHING)}.",
    ]
