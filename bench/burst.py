"""What `submit` costs in a burst, against bare futures in the same process.

20,000 tasks at once, each with fresh dicts and strings: a shared system prompt of 300 tokens and a last message of its own of
0.4 KB; batches of 16; every answer comes through `on_text` from a template, so composing and demultiplexing are inside.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import platform
import re
import statistics
import sys
import time

import microbatch as mb

SYSTEM = "Classify the product by its main use and answer with one label. " * 22
FILLER = "x" * 380
LINE = re.compile(r"\[(\d+[a-z]{5})\] ")


class Echo:
    """Answers every id through `on_text`, and counts its own time."""

    model = base_url = None

    def __init__(self) -> None:
        self.spent = 0.0

    async def send(self, call, on_text):
        start = time.perf_counter()
        ids = LINE.findall(call.messages[-1]["content"])
        reply = '{"results":[' + ",".join(f'{{"id":"{name}","answer":"electronics"}}' for name in ids) + "]}"
        self.spent += time.perf_counter() - start
        on_text(reply)
        return mb.Completion("stop", usage=mb.Usage(3000, 200))

    async def aclose(self) -> None:
        pass


async def floor(count: int) -> float:
    loop = asyncio.get_running_loop()
    futures = []

    async def caller() -> None:
        future = loop.create_future()
        futures.append(future)
        await future

    start = time.perf_counter()
    tasks = [loop.create_task(caller()) for _ in range(count)]
    await asyncio.sleep(0)
    for future in futures:
        future.set_result(None)
    for task in tasks:
        await task
    return time.perf_counter() - start


async def ours(count: int) -> tuple[float, float]:
    transport = Echo()
    policy = mb.FlushPolicy(max_batch_size=16, max_queued=10**6, max_output_tokens=10**6, max_batch_tokens=10**6)
    async with mb.Microbatcher(transport, policy=policy, tokens="bytes") as batcher:

        async def caller(number: int) -> None:
            # Built in the call: what a caller keeps while it waits is no cost of submit.
            reply = await batcher.submit(
                [
                    {"role": "system", "content": f"{SYSTEM}."},
                    {"role": "user", "content": f"Product {number}: {FILLER}"},
                ]
            )
            assert reply.output == "electronics"

        loop = asyncio.get_running_loop()
        start = time.perf_counter()
        tasks = [loop.create_task(caller(number)) for number in range(count)]
        for task in tasks:
            await task
        took = time.perf_counter() - start
        assert batcher.upstream_calls == -(-count // 16), batcher.upstream_calls
    return took, transport.spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    print(
        f"python {sys.version.split()[0]}, {platform.machine()}, {options.count} submits, {options.runs} alternating runs"
    )
    ratios = []
    for _ in range(options.runs):
        gc.collect()
        base = asyncio.run(floor(options.count))
        gc.collect()
        took, spent = asyncio.run(ours(options.count))
        ratios.append(took / base)
        print(
            f"floor {base / options.count * 1e6:6.2f} us   submit {took / options.count * 1e6:6.2f} us "
            f"(of it the transport {spent / options.count * 1e6:.2f})   {took / base:.2f}x"
        )
    print(f"median {statistics.median(ratios):.2f}x")


if __name__ == "__main__":
    main()
