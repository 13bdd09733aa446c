"""The cost of a look-up in a semantic cache, by the number of questions it is compared with.

A batcher whose kind of question is proven answers one question after the other from its semantic cache. The vectors exist before. The
time of the event loop is the processor time of its thread between the submit and the reply, all of the batcher included; what a thread
does meanwhile is in the time of the answer only.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

import microbatch as mb
from bench.benchmark import Option
from bench.report import Table, met
from bench.timing import alternate, median, quantile
from microbatch.semantic.guards import signature
from microbatch.testing import ScriptedTransport

if TYPE_CHECKING:
    import argparse

    from bench.report import Run
    from microbatch.semantic.index import Index

QUESTION = "How long does a look-up among 100,000 questions take, and how much of it is the event loop's time?"
COMPARED: list[str] = ["numpy"]
OPTIONS = {
    "sizes": Option(
        lambda text: [int(size) for size in text.split(",")], [1_000, 10_000, 100_000], [200, 2_000], "entries"
    ),
    "questions": Option(int, 40, 8, "look-ups of each run"),
    "rounds": Option(int, 5, 1, "runs of each case"),
}

DIMENSIONS = 384
WARMING = 5
MOST_MS = 5.0
SYSTEM = {"role": "system", "content": "Name the topic."}


class Vectors:
    """Vectors of texts that begin with a number: the first 100 texts have that of text 0, others random ones."""

    def __init__(self, count: int) -> None:
        found = np.random.default_rng(0).normal(size=(count + 100, DIMENSIONS)).astype(np.float32)
        self.rows = found / np.linalg.norm(found, axis=1)[:, None]

    async def __call__(self, texts: list[str]) -> list[Any]:
        return [self.rows[0] for _ in texts]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    cases = {str(size): partial(_run, size, options.questions) for size in options.sizes}
    return alternate(cases, options.rounds)


def _run(size: int, questions: int) -> list[dict[str, float]]:
    return asyncio.run(ask(size, questions))


def _fill(index: Index, digest: bytes, vectors: Vectors, size: int) -> None:
    facts = signature("how can I reset my password")
    for number in range(size):
        index.add(digest, None, number.to_bytes(20, "big"), facts, vectors.rows[number + 100])


async def ask(size: int, questions: int) -> list[dict[str, float]]:
    vectors = Vectors(size)
    cache = mb.SemanticCache(mb.MemoryCache(), embed=vectors, max_error=0.5, lookup_timeout=10.0)
    transport = ScriptedTransport(answer=lambda _: "passwords")
    words = ["gladly", "kindly", "nicely", "simply", "briefly", "plainly"]

    def question(number: int) -> list[dict[str, str]]:
        filling = " ".join(words[number // 6**place % 6] for place in range(4))
        return [SYSTEM, {"role": "user", "content": f"please {filling} say how can I reset my password"}]

    async with mb.Microbatcher(transport, cache=cache, tokens="bytes") as batcher:
        number = 0
        while not any(kind.state == "proven" for kind in batcher.stats().similar):
            await batcher.submit(question(number))
            await asyncio.sleep(0.001)
            number += 1
        ((digest, _),) = cache.index._partitions.items()
        _fill(cache.index, digest, vectors, size)
        for each in range(number, number + WARMING):  # until it is known how long a look-up takes
            await batcher.submit(question(each))
            await asyncio.sleep(0.2)
        number += WARMING
        taken = []
        for each in range(number, number + questions):
            wall, loop = time.perf_counter(), time.thread_time()
            reply = await batcher.submit(question(each))
            taken.append({"loop_ms": 1e3 * (time.thread_time() - loop), "wall_ms": 1e3 * (time.perf_counter() - wall)})
            if reply.route != "similar":
                raise AssertionError(f"the reply came by the route {reply.route}")
    return taken


def tables(run: Run) -> dict[str, Table]:
    table = Table(
        f"Answers to similar questions, one after the other, vectors of {DIMENSIONS} numbers",
        "entries | event loop: ms {:.2f} | 95 of 100 below: ms {:.2f} | until the answer: ms {:.1f}",
        "Medians. Processor time of the event loop's thread, and wall time on a machine that others use too.",
    )
    for size, runs in run.samples.items():
        loop, wall = _of(runs, "loop_ms"), _of(runs, "wall_ms")
        table.add(f"{int(size):,}", median(loop), quantile(loop, 0.95), median(wall))
    return {"lookups": table}


def findings(run: Run, tables: dict[str, Table]) -> list[str]:
    del tables
    size = max(run.samples, key=int)
    loop = median(_of(run.samples[size], "loop_ms"))
    return [
        f"A look-up among {int(size):,} entries takes {loop:.2f} ms of the event loop's time; target of at most {MOST_MS:g} ms "
        f"{met(loop <= MOST_MS)}."
    ]


def _of(runs: list[list[dict[str, float]]], name: str) -> list[float]:
    return [each[name] for taken in runs for each in taken]
