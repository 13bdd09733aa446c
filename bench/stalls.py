"""How long one prompt of 1 MB blocks the event loop: the longest gap between two beats of a task that sleeps for 1 ms.

The endpoint, which is SIMULATED, runs in a process of its own, and so does what is measured: only the client. Wall time is what other
tasks experience; CPU time of the thread is the same without other load on the machine. For comparison: a loop that has nothing else to
do, and one on which the tokens of such a prompt are counted directly.
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import microbatch as mb
from bench.apart import measured, simulated_endpoint
from bench.benchmark import Option
from bench.report import Run, Table, met
from bench.timing import column, median
from microbatch.accounting.tokens import load_encoding

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator

QUESTION = "How long does one prompt of 1 MB block the event loop?"
COMPARED = ["tiktoken"]
OPTIONS = {"rounds": Option(int, 5, 1, "rounds, each with another text")}

BYTES = 1_000_000
PROMISED_S = 0.050
"""By the README's table of promises."""

BEAT_S = 0.001
IDLE_S = 0.5
"""How long the idle loop is watched: about as long as a prompt takes."""

IDLE, COUNTED = "no prompt at all", "its tokens counted on the loop"

Gap = dict[str, float]
"""The longest gap, in seconds of wall time and of the thread's CPU time."""


def text(size: int, seed: int) -> str:
    """Return *size* characters of random words."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5_000)]
    return " ".join(draw.choices(words, k=size // 5))[:size].ljust(size, "x")


def prompts(seed: int) -> dict[str, list[dict[str, Any]]]:
    large, small = text(BYTES, seed), {"role": "user", "content": "Go on."}
    return {
        "microbatch, as the text": [{"role": "system", "content": "Summarize."}, {"role": "user", "content": large}],
        "microbatch, as the shared messages": [{"role": "system", "content": large}, small],
        "microbatch, in content parts": [{"role": "user", "content": [{"type": "text", "text": large}]}],
    }


@asynccontextmanager
async def beating() -> AsyncIterator[Gap]:
    """Yield the longest gap so far; it is final when the block is over."""
    gap = {"wall": 0.0, "cpu": 0.0}

    async def beat() -> None:
        wall, cpu = time.perf_counter(), time.thread_time()
        while True:
            await asyncio.sleep(BEAT_S)
            now, used = time.perf_counter(), time.thread_time()
            gap["wall"], gap["cpu"] = max(gap["wall"], now - wall), max(gap["cpu"], used - cpu)
            wall, cpu = now, used

    task = asyncio.create_task(beat())
    await asyncio.sleep(10 * BEAT_S)
    yield gap
    await asyncio.sleep(10 * BEAT_S)  # the last gap is known only at the next beat
    task.cancel()


async def gaps(base_url: str, seed: int) -> dict[str, Gap]:
    """Submit each of `prompts` under settings that need the number of its tokens; return the longest gap of each."""
    found = {}
    transport = mb.OpenAIChat("gpt-4.1-mini", base_url=base_url, api_key="any")
    policy, limit = mb.FlushPolicy(merge="when-cheaper"), mb.RateLimit(tpm=10_000_000)
    async with mb.Microbatcher(transport, policy=policy, rate_limit=limit) as batcher:
        for name, messages in prompts(seed).items():
            async with beating() as found[name]:
                await batcher.submit(messages)
        assert batcher.stats().answered == len(found), batcher.stats()
    return found


async def comparison(seed: int) -> dict[str, Gap]:
    """Return the gaps of an idle loop, and of one on which tokens are counted."""
    found, large, encoding = {}, text(BYTES, seed), load_encoding("o200k_base")
    async with beating() as found[IDLE]:
        await asyncio.sleep(IDLE_S)
    async with beating() as found[COUNTED]:
        encoding.encode_ordinary(large)
    return found


async def all_rounds(base_url: str, rounds: int, seed: int) -> dict[str, list[Gap]]:
    found: dict[str, list[Gap]] = {}
    for number in range(rounds):
        for taken in (await gaps(base_url, seed + number), await comparison(seed + number)):
            for name, gap in taken.items():
                found.setdefault(name, []).append(gap)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with simulated_endpoint() as url:
        return {"gaps": measured(all_rounds, base_url=url, rounds=options.rounds, seed=options.seed)}


def tables(run: Run) -> dict[str, Table]:
    table = Table(
        f"Longest gap between two beats of {BEAT_S * 1e3:g} ms while a prompt of {BYTES / 1e6:g} MB goes to a SIMULATED endpoint; rounds: "
        f"{run.options['rounds']}",
        "prompt | wall ms, median {:.1f} | wall ms, worst {:.1f} | CPU ms, median {:.1f} | CPU ms, worst {:.1f}",
        "Tokens have to be counted: for the cost of combining, and for a limit of tokens a minute.",
    )
    for name, several in run.samples["gaps"].items():
        times = [[gap * 1e3 for gap in column(several, clock)] for clock in ("wall", "cpu")]
        table.add(name, *(take(values) for values in times for take in (median, max)))
    return {"gaps": table}


def findings(run: Run, tables: dict[str, Table]) -> list[str]:
    del run
    rows, found = tables["gaps"].by("prompt"), []
    idle, counted = rows.pop(IDLE), rows.pop(COUNTED)
    for words, clock in (("CPU time of the loop's thread", "CPU ms, worst"), ("wall time", "wall ms, worst")):
        worst = max(rows, key=lambda name, clock=clock: rows[name][clock])
        longest = rows[worst][clock]
        promise = f"less than {PROMISED_S * 1e3:g} ms {met(longest < PROMISED_S * 1e3)}"
        found.append(f"The longest gap is {longest:.1f} ms of {words} ({worst}); {promise}.")
    return [
        *found,
        f"An idle loop has gaps of up to {idle['wall ms, worst']:.1f} ms of wall time here: other load on the machine. Counting the tokens of "
        f"such a prompt on the loop blocks it for {counted['wall ms, median']:.0f} ms.",
    ]
