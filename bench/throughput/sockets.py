"""What asking costs the client, over real sockets: processor time, and how long callers wait, whole replies and streamed ones.

The endpoint is a process of its own and so is the client, in which the ways take turns. Callers come in a closed loop, as many as
keep the same number of calls under way whatever the way.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import statistics
import time
from typing import TYPE_CHECKING, Any

from bench.apart import measured, simulated_endpoint
from bench.questions import Label
from bench.report import Column, Table, met
from bench.throughput.scene import (
    AIOHTTP,
    AT_ONCE,
    CACHED,
    LATENCY,
    PRICE,
    QUICK_SIZES,
    SDK,
    SIZE,
    SIZES,
    TOKENS,
    Way,
    questions,
    together,
)
from bench.throughput.ways import client
from bench.timing import Stopwatch, quantile, ratios
from microbatch.messages import Usage
from microbatch.schema.answer_type import answer_type
from microbatch.testing.answers import simulated_answer

if TYPE_CHECKING:
    from bench.report import Report
    from bench.throughput.ways import Client

WHOLE, STREAMED = "whole", "streamed"
SDK_ZIPF = f"{SDK}, Zipf"
QUANTILES = (0.5, 0.95, 0.99)
TARGETS = {WHOLE: 30.0, STREAMED: 5.0}
"""How many times less processor time than the SDK."""

CATALOGUE = 2_400
"""Questions to go through, over and over."""

PATIENCE = 1_800.0

Sample = dict[str, Any]


def ways(*, stream: bool, quick: bool) -> list[Way]:
    several = [Way(SDK, by=SDK), Way(AIOHTTP, by=AIOHTTP), *map(together, QUICK_SIZES if quick else SIZES)]
    # Hits are whole answers whatever the reply was.
    return several if stream else [*several, Way(SDK_ZIPF, by=SDK, zipf=True), CACHED]


def measure(found: Report, path: str | None, *, pace: float, seconds: float, rounds: int) -> None:
    """Fill in the table of processor time.

    Args:
        found: What is filled in.
        path: The products' file, or None.
        pace: How many times as fast as the scene's the endpoint is. As many times fewer calls are under way at once, so that items
            and events a second, and so the load of the processor, are the same.
        seconds: How long callers come, of each way in each round.
        rounds: How often each way has its turn.
    """
    at_once = max(1, round(AT_ONCE / pace))
    first_token, rate = LATENCY.first_token / pace, LATENCY.tokens_per_second * pace
    table = found.tables["client"] = Table(
        f"The client's processor time, SIMULATED endpoint over real sockets: {first_token:g} s to the first token, {rate:g} tokens/s, "
        f"{TOKENS} tokens of instructions, {at_once} calls at once, medians of {rounds} rounds",
        [
            Column("reply"),
            Column("way"),
            Column("items", ","),
            Column("items/s", ",.0f"),
            Column("CPU s for 1,000 items", ".3f"),
            Column("less than the SDK, times", ".1f"),
            Column("calls for 1,000 items", ",.1f"),
            Column("tokens an item", ",.0f"),
            Column("dollars for 1,000 items", ".3f"),
            *(Column(f"p{share * 100:.0f} s", ".2f") for share in QUANTILES),
        ],
        notes=[
            "Streamed replies come at one token an event, which is checked. Batches: as many callers as fill all calls, each of whom "
            "asks again when answered; the times are from asking to the answer. Connections are open before the clock starts, and "
            "what the loop of callers itself takes is in all figures. With Zipf, against the SDK over the same questions.",
        ],
    )
    if pace != 1:
        table.notes.append(
            f"The endpoint is {pace:g} times as fast as in the scene, to be short, with as many times fewer calls at once: the load on "
            "the client is the same, and only the waits are shorter."
        )
    with simulated_endpoint(first_token, rate) as url:
        samples = measured(
            play,
            patience=PATIENCE,
            url=url,
            path=path,
            quick=found.quick,
            at_once=at_once,
            seconds=seconds,
            rounds=rounds,
            seed=found.seed,
        )
    found.samples["client"] = samples
    for kind, several in samples.items():
        tell(table, kind, several)


async def play(
    *, url: str, path: str | None, quick: bool, at_once: int, seconds: float, rounds: int, seed: int
) -> dict[str, dict[str, list[Sample]]]:
    """Let the ways take turns; return the samples of each kind of reply and way."""
    asked = {repeated: questions(path, CATALOGUE, seed, repeated=repeated) for repeated in (False, True)}
    right = {text: simulated_answer(text, answer_type(Label).schema) for text in set(asked[False] + asked[True])}
    samples: dict[str, dict[str, list[Sample]]] = {kind: {} for kind in TARGETS}
    gc.collect()
    gc.freeze()  # what is imported, the SDK most of all, is not looked through again and again for all
    for _ in range(rounds):
        for kind in TARGETS:
            stream = kind == STREAMED
            for way in ways(stream=stream, quick=quick):
                gc.collect()
                async with client(url, way, stream=stream) as asking:
                    sample = await loaded(asking, way, asked[way.zipf], right, at_once, seconds)
                samples[kind].setdefault(way.name, []).append(sample)
    return samples


async def loaded(
    asking: Client, way: Way, asked: list[str], right: dict[str, str], at_once: int, seconds: float
) -> Sample:
    """Keep *at_once* calls under way for *seconds*, then let them end; check every answer, after the clock."""
    callers = at_once * way.size
    await warm_up(asking, at_once, way.size)
    answers: list[tuple[str, str, float]] = []
    # Hits would go round for ever: with a cache it is the number of items that is the same, not the time.
    source = iter(asked[: at_once * SIZE]) if way.zipf else itertools.cycle(asked)
    ends = time.perf_counter() + (PATIENCE if way.zipf else seconds)

    async def call() -> None:
        for question in source:
            start = time.perf_counter()
            label = await asking.ask(question)
            now = time.perf_counter()
            answers.append((question, label, now - start))
            if now > ends:
                break

    before = asking.told
    with Stopwatch() as watch:
        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(call())
    told = asking.told.since(before)
    assert all(label == right[question] for question, label, _ in answers), "a wrong answer"
    assert told.events in (0, told.completion_tokens), "the endpoint has not sent one token an event"
    waits = [wait for _, _, wait in answers]
    return {
        "items": len(answers),
        "wall": watch.wall,
        "cpu": watch.cpu,
        **told._asdict(),
        "waits": [quantile(waits, share) for share in QUANTILES],
    }


async def warm_up(asking: Client, at_once: int, size: int) -> None:
    """Open the connections, by as many calls as there will be at once, and have a batch taken apart."""
    numbers = itertools.count()
    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(asking.ask_alone(f"Product: sample {next(numbers)}"))
        for _ in range(size):
            group.create_task(asking.ask(f"Product: sample {next(numbers)}"))


def cpu_ms(sample: Sample) -> float:
    """Return the processor milliseconds of an item."""
    return sample["cpu"] / sample["items"] * 1000


def tell(table: Table, kind: str, samples: dict[str, list[Sample]]) -> None:
    for name, several in samples.items():
        base = samples[SDK_ZIPF if name == CACHED.name else SDK]
        less = [1 / ratio for ratio in ratios([*map(cpu_ms, several)], [*map(cpu_ms, base)])]
        waits = [statistics.median(column) for column in zip(*(one["waits"] for one in several), strict=True)]
        table.add(
            kind,
            name,
            round(statistics.median(one["items"] for one in several)),
            statistics.median(one["items"] / one["wall"] for one in several),
            statistics.median(map(cpu_ms, several)),
            None if several is base else statistics.median(less),
            statistics.median(one["calls"] / one["items"] * 1000 for one in several),
            statistics.median((one["prompt_tokens"] + one["completion_tokens"]) / one["items"] for one in several),
            statistics.median(map(dollars, several)),
            *waits,
        )


def dollars(sample: Sample) -> float:
    """Return the price of 1,000 items."""
    return PRICE.cost(Usage(sample["prompt_tokens"], sample["completion_tokens"])) / sample["items"] * 1000


def findings(found: Report) -> list[str]:
    rows = {(row[0], row[1]): row for row in found.tables["client"].rows}
    said = []
    for kind, target in TARGETS.items():
        ours, sdk, raw = (rows[kind, name] for name in (together(SIZE).name, SDK, AIOHTTP))
        said.append(
            f"Client CPU, {kind} replies, batches of {SIZE}: {ours[4]:.3f} ms an item, {ours[5]:.1f} times less than the openai SDK one call "
            f"each ({sdk[4]:.3f} ms); target {target:g} times less: {met(ours[5] >= target)}. {_beside_raw(ours[4], raw[4])}"
        )
    return said


def _beside_raw(ours: float, raw: float) -> str:
    if ours < raw:
        return f"That is {raw / ours:.1f} times less than raw aiohttp ({raw:.3f} ms) as well."
    return (
        f"It is MORE than raw aiohttp takes, one call each ({raw:.3f} ms): every token is an event to be read, and an item has twice as "
        "many tokens in a combined reply."
    )
