"""The cost of `embed` beside bare futures, over a transport that answers at once with vectors made before.

Callers come all at once, each with one text. Processor time is that of all threads; the bare floor, futures under the same gather, runs
next to each. Every vector is checked.
"""

from __future__ import annotations

import asyncio
from array import array
from functools import partial
from typing import TYPE_CHECKING, Any

import microbatch as mb
from bench.benchmark import Option
from bench.overhead.entries import Futures
from bench.report import Table, met
from bench.timing import Stopwatch, alternate, median

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Coroutine

    from bench.report import Run

QUESTION = "What does embed cost a caller, beside bare futures, and in how many calls do 1,000 callers leave?"
COMPARED: list[str] = []
OPTIONS = {
    "callers": Option(int, 1_000, 1_000, "callers at once"),
    "rounds": Option(int, 30, 8, "runs of each case"),
}

DIMENSIONS = (384, 1_536)
FLOOR = "floor-future"
MOST_US, MOST_CALLS = 60.0, 8


class Instant:
    """A transport whose vectors exist: the first number of each is that in its text."""

    model = base_url = None
    embedding_model = "instant"

    def __init__(self, callers: int, dimensions: int) -> None:
        self.calls = 0
        self._vectors = [array("f", [number] * dimensions) for number in range(callers)]

    async def send(self, call: mb.ChatCall, on_text: Any) -> mb.Completion:
        raise NotImplementedError

    async def embed(self, call: mb.EmbeddingCall) -> mb.Embedded:
        self.calls += 1
        vectors = self._vectors
        pairs = [(place, vectors[int(text.partition(" ")[0])]) for place, text in enumerate(call.inputs)]
        return mb.Embedded(vectors=pairs, usage=mb.Usage(12 * len(pairs)), model="instant")

    async def aclose(self) -> None:
        pass


def measure(options: argparse.Namespace) -> dict[str, Any]:
    cases = {FLOOR: partial(_run, floor, options.callers)}
    for size in DIMENSIONS:
        for cached in (False, True):
            name = f"{size} numbers{', with a cache' if cached else ''}"
            cases[name] = partial(_run, embed, options.callers, size, cached=cached)
    return alternate(cases, options.rounds)


def _run(play: Callable[..., Coroutine[Any, Any, dict[str, float]]], *args: Any, **options: Any) -> dict[str, float]:
    return asyncio.run(play(*args, **options))


async def floor(callers: int) -> dict[str, float]:
    futures = Futures(1, 0.0, None)
    await futures.start()
    with Stopwatch() as watch:
        await asyncio.gather(*map(futures.submit, range(callers)))
    return {"cpu_us": watch.cpu / callers * 1e6, "calls": 0}


async def embed(callers: int, dimensions: int, *, cached: bool) -> dict[str, float]:
    transport = Instant(callers, dimensions)
    texts = [f"{number} is the question of a customer about the state of an order" for number in range(callers)]
    prices = {"instant": mb.Price(0.02)}
    cache = mb.MemoryCache() if cached else None
    async with mb.Microbatcher(transport, tokens="bytes", prices=prices, cache=cache) as batcher:
        await batcher.embed(texts[0], use_cache=False)  # what is done once
        calls = transport.calls
        with Stopwatch() as watch:
            found = await asyncio.gather(*map(batcher.embed, texts))
    for number, one in enumerate(found):
        if one.vector[0] != number or len(one.vector) != dimensions:
            raise AssertionError(f"text {number} got the vector of {one.vector[0]}")
    return {"cpu_us": watch.cpu / callers * 1e6, "calls": transport.calls - calls}


def tables(run: Run) -> dict[str, Table]:
    table = Table(
        f"Processor time of {run.options['callers']:,} concurrent callers with one text each",
        "case | us a caller {:.1f} | beyond bare futures: us {:.1f} | calls, at most {:.0f}",
        "Median of the runs. Vectors exist before; the check and the copy of each vector are included. The price is known, and text has "
        "about 65 bytes.",
    )
    bare = median([each["cpu_us"] for each in run.samples[FLOOR]])
    for name, runs in run.samples.items():
        each = median([one["cpu_us"] for one in runs])
        table.add(name, each, each - bare, max(one["calls"] for one in runs))
    return {"callers": table}


def findings(run: Run, tables: dict[str, Table]) -> list[str]:
    del tables
    found = []
    for name, runs in run.samples.items():
        if name == FLOOR:
            continue
        each, calls = median([one["cpu_us"] for one in runs]), max(one["calls"] for one in runs)
        found.append(
            f"{name}: {each:.1f} us of processor time a caller; target of at most {MOST_US:g} {met(each <= MOST_US)}. "
            f"{calls:.0f} calls at most; target of at most {MOST_CALLS} {met(calls <= MOST_CALLS)}."
        )
    return found
