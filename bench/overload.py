"""Memory under overload: many submits against an endpoint that accepts connections and never answers.

`python bench/overload.py` prints, by tracemalloc, what a queued request and a waiting submit cost beyond their callers' own, and
how memory grows while submits are turned away. The caller's own is a task that holds its messages and awaits a future through
a coroutine function with the signature of `submit`.
"""

# ruff: noqa: ARG001 - the coroutine that stands for `submit` has its signature and uses none of it
from __future__ import annotations

import argparse
import asyncio
import gc
import json
import platform
import sys
import time
import tracemalloc
from contextlib import asynccontextmanager

import microbatch as mb

SYSTEM = "You are a careful clerk. Put the product into one of the categories of our shop, in one word."


def ask(number):
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"Product {number:07}: " + "x" * 64}]


def traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def submit_of_nothing(
    messages,
    *,
    output_type=str,
    model=None,
    max_tokens=None,
    temperature=None,
    params=None,
    headers=None,
    tenant=None,
    priority="normal",
    timeout=None,
):
    return await asyncio.get_running_loop().create_future()


@asynccontextmanager
async def stalled_batcher(queued, when_full):
    """A batcher over real sockets to a server that reads and says nothing."""
    peers = []

    async def say_nothing(reader, writer):
        peers.append(writer)
        await reader.read()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    chat = mb.OpenAIChat(
        "gpt-4.1-mini", base_url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", api_key="k"
    )
    policy = mb.FlushPolicy(max_queued=queued, when_full=when_full)
    batcher = mb.Microbatcher(chat, policy=policy, tokens="bytes")
    await batcher.open()
    try:
        yield batcher
    finally:
        await batcher.aclose(0)
        for writer in peers:
            writer.close()
        server.close()
        await server.wait_closed()


async def caller(submit, number):
    messages = ask(number)
    await submit(messages)


async def started(submit, numbers, tasks):
    """Start a caller for each number and let all of them get as far as they get; return the bytes they hold."""
    before = traced()
    tasks += [asyncio.create_task(caller(submit, number)) for number in numbers]
    # Twice round the loop each of them has asked; what is sent is sent a few turns later.
    for _ in range(20):
        await asyncio.sleep(0)
    await asyncio.sleep(0.2)
    return traced() - before


async def ended(tasks):
    tracemalloc.stop()  # all is measured, and tracing makes the end three times as long
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def waiting(count, queued):
    """Bytes a queued request and a waiting submit, each beyond its caller's own."""
    tasks = []
    tracemalloc.start()
    own = await started(submit_of_nothing, range(count - queued), tasks) / (count - queued)
    await ended(tasks)
    tracemalloc.start()
    async with stalled_batcher(queued, "wait") as batcher:
        tasks = []
        for_queued = await started(batcher.submit, range(queued), tasks) / queued
        for_waiting = await started(batcher.submit, range(queued, count), tasks) / (count - queued)
        assert batcher.stats().queued == queued, batcher.stats()
        await ended(tasks)
    return {"own": own, "queued": for_queued - own, "waiting": for_waiting - own}


async def rejected(count, queued):
    """Bytes that memory grows by while all submits beyond the bound are rejected."""

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
        # The first thousand make what is made once.
        for numbers in (range(1_000), range(queued, count)):
            before = traced()
            await asyncio.gather(*(refused(numbers[start::100]) for start in range(100)))
            growth.append(traced() - before)
        await ended(tasks)
    return growth[1]


def figures(count, queued):
    gc.disable()  # `traced` collects; in between it would only take time
    return asyncio.run(waiting(count, queued)) | {"rejected": asyncio.run(rejected(count, queued))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="submits")
    parser.add_argument("--queued", type=int, default=10_000, help="max_queued")
    parser.add_argument("--json", action="store_true", help="print the figures alone, as one JSON object")
    options = parser.parse_args()
    start = time.perf_counter()
    measured = figures(options.count, options.queued)
    if options.json:
        print(json.dumps(measured))
        return
    print(f"{options.count:,} submits, max_queued={options.queued:,}, {time.perf_counter() - start:.0f} s")
    print(
        f"microbatch on Python {platform.python_version()}, {sys.platform} {platform.machine()}; bytes by tracemalloc"
    )
    print(f"a caller's own task, messages and future   {measured['own']:>8,.0f}")
    print(f"beyond it: a queued request                {measured['queued']:>8,.0f}")
    print(f"beyond it: a submit that waits for room    {measured['waiting']:>8,.0f}")
    print(f"growth while all others are rejected        {measured['rejected']:>8,.0f}")


if __name__ == "__main__":
    main()
