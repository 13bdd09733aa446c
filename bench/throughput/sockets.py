"""Processor time of the client and time to the answer, over real sockets, for whole replies and streamed ones.

The endpoint is a process of its own and so is the client, in which the ways take turns. Callers come in a closed loop, as many as
keep the same number of calls under way whatever the way.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from typing import TYPE_CHECKING, Any

from bench.apart import measured, simulated_endpoint
from bench.questions import Label
from bench.report import Table, met
from bench.throughput.scene import AIOHTTP, AT_ONCE, LATENCY, PRICE, SDK, SIZE, SIZES, TOKENS, Way, questions, together
from bench.throughput.ways import client
from bench.timing import Stopwatch, median, quantile, ratio
from microbatch.messages import Usage
from microbatch.schema.answer_type import answer_type
from microbatch.testing.answers import simulated_answer

if TYPE_CHECKING:
    import argparse

    from bench.report import Run
    from bench.throughput.ways import Client

WAYS = (Way(SDK), Way(AIOHTTP), *map(together, SIZES))
QUICK_WAYS = (Way(SDK), Way(AIOHTTP), together(4), together(SIZE))
QUANTILES = (0.5, 0.99)
TARGETS = {"whole": 30.0, "streamed": 5.0}
"""So many times less processor time than the SDK."""

QUICK_PACE = 8.0
"""In the short form the endpoint is so many times as fast, with as many times fewer calls at once: the load on the client is the same."""

CATALOGUE = 2_400
"""Questions to go through, over and over."""


def pace(quick: bool) -> float:
    return QUICK_PACE if quick else 1.0


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[Any]]]:
    faster = pace(options.quick)
    settings = {name: getattr(options, name) for name in ("quick", "seconds", "rounds", "seed")}
    with simulated_endpoint(LATENCY.first_token / faster, LATENCY.tokens_per_second * faster) as url:
        return measured(play, url=url, path=options.input, at_once=max(1, round(AT_ONCE / faster)), **settings)


async def play(
    *,
    url: str,
    path: str,
    quick: bool,
    at_once: int,
    seconds: float,
    rounds: int,
    seed: int,
) -> dict[str, dict[str, list[Any]]]:
    """Let the ways take turns; return the samples of each kind of reply and way."""
    asked = questions(path, CATALOGUE, seed)
    right = {text: simulated_answer(text, answer_type(Label).schema) for text in set(asked)}
    samples: dict[str, dict[str, list[Any]]] = {kind: {} for kind in TARGETS}
    gc.collect()
    gc.freeze()  # what is imported, the SDK most of all, is not scanned again and again
    for _ in range(rounds):
        for kind in TARGETS:
            for way in QUICK_WAYS if quick else WAYS:
                gc.collect()
                async with client(url, way, stream=kind == "streamed") as asking:
                    await warm_up(asking, at_once, way.size)
                    sample = await loaded(asking, at_once * way.size, asked, right, seconds)
                samples[kind].setdefault(way.name, []).append(sample)
    return samples


async def loaded(
    asking: Client, callers: int, asked: list[str], right: dict[str, str], seconds: float
) -> dict[str, Any]:
    """Let *callers* ask for *seconds*, then let them end; check every answer, after the clock."""
    answers: list[tuple[str, str, float]] = []
    source = itertools.cycle(asked)
    ends = time.perf_counter() + seconds

    async def call() -> None:
        for question in source:
            start = time.perf_counter()
            label = await asking.ask(question)
            now = time.perf_counter()
            answers.append((question, label, now - start))
            if now > ends:
                break

    before = asking.counts
    with Stopwatch() as watch:
        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(call())
    counts = asking.counts.since(before)
    assert all(label == right[question] for question, label, _ in answers), "a wrong answer"
    assert counts.events in (0, counts.completion_tokens), "the endpoint has not sent one token an event"
    waits = [wait for _, _, wait in answers]
    return {
        "items": len(answers),
        "wall": watch.wall,
        "cpu": watch.cpu,
        **counts._asdict(),
        "waits": [quantile(waits, share) for share in QUANTILES],
    }


async def warm_up(asking: Client, at_once: int, size: int) -> None:
    """Open the connections, by as many calls as there will be at once, and have one batch answered."""
    numbers = itertools.count()
    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(asking.ask_alone(f"Product: sample {next(numbers)}"))
        for _ in range(size):
            group.create_task(asking.ask(f"Product: sample {next(numbers)}"))


def cpu_ms(sample: dict[str, Any]) -> float:
    """Return the processor milliseconds of an item."""
    return sample["cpu"] / sample["items"] * 1000


def table(run: Run) -> Table:
    faster = pace(run.quick)
    table = Table(
        f"Processor time of the client, SIMULATED endpoint over real sockets: {LATENCY.first_token / faster:g} s to the first token, "
        f"{LATENCY.tokens_per_second * faster:g} tokens/s, {TOKENS} tokens of instructions, {AT_ONCE / faster:g} calls at once, medians of "
        f"{run.options['rounds']} rounds",
        "reply | way | items {:,} | items/s {:,.0f} | CPU s for 1,000 items {:.3f} | less than the SDK, times {:.1f}"
        " | calls for 1,000 items {:,.1f} | tokens an item {:,.0f} | dollars for 1,000 items {:.3f} | p50 s {:.2f}"
        " | p99 s {:.2f}",
        "Streamed replies come at one token an event, which is checked. Batches: as many callers as fill all calls, each of whom asks "
        "again when answered; times are from asking to the answer. Connections are open before the clock starts, and the loop of "
        "callers itself is in all figures.",
    )
    for kind, samples in run.samples["client"].items():
        base = list(map(cpu_ms, samples[SDK]))
        for name, several in samples.items():
            mine = list(map(cpu_ms, several))
            table.add(
                kind,
                name,
                round(median(one["items"] for one in several)),
                median(one["items"] / one["wall"] for one in several),
                median(mine),
                None if name == SDK else ratio(base, mine),
                median(one["calls"] / one["items"] * 1000 for one in several),
                median((one["prompt_tokens"] + one["completion_tokens"]) / one["items"] for one in several),
                median(map(dollars, several)),
                *(median(column) for column in zip(*(one["waits"] for one in several), strict=True)),
            )
    return table


def dollars(sample: dict[str, Any]) -> float:
    """Return the price of 1,000 items."""
    return PRICE.cost(Usage(sample["prompt_tokens"], sample["completion_tokens"])) / sample["items"] * 1000


def findings(table: Table) -> list[str]:
    rows, found = table.by("reply", "way"), []
    for kind, target in TARGETS.items():
        ours, sdk, raw = (rows[kind, name] for name in (together(SIZE).name, SDK, AIOHTTP))
        less = ours["less than the SDK, times"]
        mine, theirs, bare = (row["CPU s for 1,000 items"] for row in (ours, sdk, raw))
        found.append(
            f"Client CPU, {kind} replies, batches of {SIZE}: {mine:.3f} ms an item, {less:.1f} times less than the openai SDK one call each "
            f"({theirs:.3f} ms); target {target:g} times less {met(less >= target)}. "
            + (
                f"Raw aiohttp takes {bare:.3f} ms, one call each."
                if mine < bare
                else f"Raw aiohttp takes LESS, {bare:.3f} ms, one call each: every token is an event to be read, and an item has twice as "
                "many tokens in a combined reply."
            )
        )
    return found
