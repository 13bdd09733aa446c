"""How long one prompt of 1 MB holds up the event loop: the longest gap between two beats of a task that sleeps for 1 ms.

The endpoint, which is SIMULATED, runs in a process of its own, and so does what is measured: that is the client alone. Wall time is
what a neighbour would feel; CPU time of the thread is the same without what else the machine is doing. Beside that: a loop that
has nothing else to do, and one on which somebody counts the tokens of such a prompt, as is easily done.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import microbatch as mb
from bench.apart import measured, simulated_endpoint
from bench.report import Column, Table, met
from microbatch.accounting.tokens import load_encoding

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator

    from matplotlib.figure import Figure

    from bench.report import Report

QUESTION = "How long does one prompt of 1 MB hold up the event loop?"
COMPARED = ["tiktoken"]

BYTES = 1_000_000
ROUNDS, ROUNDS_QUICK = 5, 1
PROMISED_S = 0.050
"""By the README's table of promises."""

PATIENCE = 120.0
BEAT_S = 0.001
IDLE_S = 0.5
"""How long the loop is watched that has nothing else to do: about as long as a prompt takes."""

IDLE, COUNTED = "no prompt at all", "its tokens counted on the loop"

Gap = dict[str, float]
"""The longest, in seconds of wall time and of the thread's CPU time."""


def text(size: int, seed: int) -> str:
    """Words of a language nobody speaks, *size* characters."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5_000)]
    return " ".join(draw.choices(words, k=size // 5))[:size].ljust(size, "x")


def prompts(seed: int) -> dict[str, list[dict[str, Any]]]:
    large, small = text(BYTES, seed), {"role": "system", "content": "Summarize."}
    return {
        "microbatch, as the text": [small, {"role": "user", "content": large}],
        "microbatch, as the shared messages": [
            {"role": "system", "content": large},
            {"role": "user", "content": "Go on."},
        ],
        "microbatch, in content parts": [{"role": "user", "content": [{"type": "text", "text": large}]}],
    }


@asynccontextmanager
async def beating() -> AsyncIterator[Gap]:
    """Yield the longest gap so far; it stays as it is when the block is over."""
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
    await asyncio.sleep(10 * BEAT_S)  # what came last is a gap only when the next beat has come
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


async def beside(seed: int) -> dict[str, Gap]:
    """Return the gaps of a loop that has nothing to do, and of one on which tokens are counted."""
    found, large, encoding = {}, text(BYTES, seed), load_encoding("o200k_base")
    async with beating() as found[IDLE]:
        await asyncio.sleep(IDLE_S)
    async with beating() as found[COUNTED]:
        encoding.encode_ordinary(large)
    return found


async def rounds_of(base_url: str, rounds: int, seed: int) -> dict[str, list[Gap]]:
    """Return all the gaps of *rounds* rounds, each with another text."""
    found: dict[str, list[Gap]] = {}
    for number in range(rounds):
        for taken in (await gaps(base_url, seed + number), await beside(seed + number)):
            for name, gap in taken.items():
                found.setdefault(name, []).append(gap)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounds", type=int, help=f"each with another text (default {ROUNDS}; {ROUNDS_QUICK} if quick)"
    )


def run(options: argparse.Namespace, found: Report) -> None:
    rounds = options.rounds or (ROUNDS_QUICK if options.quick else ROUNDS)
    with simulated_endpoint() as url:
        taken = measured(rounds_of, patience=PATIENCE, base_url=url, rounds=rounds, seed=options.seed)
    found.samples["gaps"] = taken
    table = found.tables["gaps"] = Table(
        f"Longest gap between two beats of {BEAT_S * 1e3:g} ms while a prompt of {BYTES / 1e6:g} MB goes to a SIMULATED endpoint; rounds: {rounds}",
        [
            Column("the prompt"),
            Column("wall ms, median", ".1f"),
            Column("wall ms, worst", ".1f"),
            Column("CPU ms, median", ".1f"),
            Column("CPU ms, worst", ".1f"),
        ],
        notes=["Tokens have to be counted: for what it costs to combine, and for a limit of tokens a minute."],
    )
    for name, several in taken.items():
        times = ([gap[clock] * 1e3 for gap in several] for clock in ("wall", "cpu"))
        table.add(name, *(take(values) for values in times for take in (statistics.median, max)))
    found.findings += judged(table)


def judged(table: Table) -> list[str]:
    rows = {row[0]: row[1:] for row in table.rows}
    ours = {name: row for name, row in rows.items() if name not in (IDLE, COUNTED)}
    said = []
    for clock, at in (("CPU time of the loop's thread", 3), ("wall time", 1)):
        worst = max(ours, key=lambda name, at=at: ours[name][at])
        verdict = met(ours[worst][at] < PROMISED_S * 1e3)
        said.append(
            f"The longest gap is {ours[worst][at]:.1f} ms of {clock} ({worst}); less than {PROMISED_S * 1e3:g} ms {verdict}."
        )
    idle, counted = rows[IDLE], rows[COUNTED]
    return [
        *said,
        (
            f"A loop that has nothing to do has gaps of up to {idle[1]:.1f} ms of wall time here: what else the machine does. To count the "
            f"tokens of such a prompt on the loop holds it up for {counted[0]:.0f} ms."
        ),
    ]


def draw(found: Report) -> Figure:
    from bench import plot  # late, so that the measured process is without matplotlib

    figure, (axes,) = plot.panels(width=7.2, height=3.2)
    rows = found.tables["gaps"].rows
    for shift, at, color, label in (
        (-0.2, 2, plot.MUTED, "wall time"),
        (0.2, 4, plot.OURS, "CPU time of the loop's thread"),
    ):
        bars = axes.barh([place + shift for place in range(len(rows))], [row[at] for row in rows], 0.38, color=color)
        bars.set_label(label)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.axvline(PROMISED_S * 1e3, color="black", linestyle="--", label=f"promised: less than {PROMISED_S * 1e3:g} ms")
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set(xscale="log", xlabel="longest gap between two beats, worst of the rounds, ms (log)")
    axes.set_title(f"One prompt of {BYTES / 1e6:g} MB and the event loop (SIMULATED endpoint)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=3)
    return figure
