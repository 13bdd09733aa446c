"""How long one prompt of 1 MB holds up the event loop: the longest gap between two beats of a task that sleeps for 1 ms.

    python bench/large_prompt.py

The simulated endpoint runs in a process of its own, so what is measured is the client. Wall time is what a neighbour would feel;
CPU time of the thread is the same without what else the machine is doing.
"""

from __future__ import annotations

import asyncio
import platform
import random
import subprocess
import sys
import time
from contextlib import asynccontextmanager, contextmanager

import microbatch as mb

BYTES = 1_000_000


def text(size: int, seed: int) -> str:
    """Words of a language nobody speaks, *size* characters."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5_000)]
    return " ".join(draw.choices(words, k=size // 5))[:size].ljust(size, "x")


def prompts() -> dict[str, list[dict[str, object]]]:
    large, small = text(BYTES, 1), {"role": "system", "content": "Summarize."}
    return {
        "as the text": [small, {"role": "user", "content": large}],
        "as the shared messages": [{"role": "system", "content": large}, {"role": "user", "content": "Go on."}],
        "in content parts": [{"role": "user", "content": [{"type": "text", "text": large}]}],
    }


@contextmanager
def simulated_endpoint():
    """Yield the base URL of a simulated endpoint in another process."""
    command = [sys.executable, "-m", "microbatch", "simulate", "--port", "0", "--first-token", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


class Beats:
    """The longest gap, in seconds of wall time and of the thread's CPU time."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    async def go_on(self) -> None:
        wall, cpu = time.perf_counter(), time.thread_time()
        while True:
            await asyncio.sleep(0.001)
            now, used = time.perf_counter(), time.thread_time()
            self.wall, self.cpu = max(self.wall, now - wall), max(self.cpu, used - cpu)
            wall, cpu = now, used


@asynccontextmanager
async def beating():
    beats = Beats()
    task = asyncio.create_task(beats.go_on())
    await asyncio.sleep(0.01)
    yield beats
    task.cancel()


async def gaps(base_url: str) -> dict[str, Beats]:
    """Submit each of `prompts` under settings that need the number of its tokens; return the gaps."""
    found = {}
    transport = mb.OpenAIChat("gpt-4.1-mini", base_url=base_url, api_key="any")
    policy, limit = mb.FlushPolicy(merge="when-cheaper"), mb.RateLimit(tpm=10_000_000)
    async with mb.Microbatcher(transport, policy=policy, rate_limit=limit) as batcher:
        for name, messages in prompts().items():
            async with beating() as beats:
                await batcher.submit(messages)
            found[name] = beats
    return found


def main() -> None:
    print(f"python {platform.python_version()}, one prompt of {BYTES / 1e6:g} MB")
    with simulated_endpoint() as base_url:
        for name, beats in asyncio.run(gaps(base_url)).items():
            print(f"{name:24} longest gap {beats.wall * 1e3:5.1f} ms wall, {beats.cpu * 1e3:5.1f} ms CPU")


if __name__ == "__main__":
    main()
