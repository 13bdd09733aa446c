"""Callers that come at given instants, a batcher, and a simulated endpoint, all on virtual time."""

from __future__ import annotations

import asyncio
import random
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import microbatch as mb
from bench.questions import Label, products
from microbatch.demo import instructions
from microbatch.testing import Latency, SimulatedModel, SimulatedTransport, VirtualClockLoop

if TYPE_CHECKING:
    from collections.abc import Sequence

MODEL = "gpt-4.1-mini"
LATENCY = Latency(first_token=0.5, tokens_per_second=80.0)
NO_LIMIT = 10**6

STREAMED, WHOLE, ALONE = "streamed", "whole reply", "one call each"
MODES = (STREAMED, WHOLE, ALONE)
"""Callers are answered as their element closes, when the reply has ended, or each by a call of its own."""

labels = cache(products)


class Served(NamedTuple):
    """Outcome of a run.

    Attributes:
        latencies: Seconds from submit to the answer, in order of arrival.
        waits: Seconds from submit until the call left.
        calls: Upstream calls.
        tokens: Prompt and reply tokens of all calls.
    """

    latencies: list[float]
    waits: list[float]
    calls: int
    tokens: int


def play(arrivals: Sequence[float], seed: int, mode: str, *, max_batch_size: int, **policy) -> Served:
    """Let a caller come at each instant of *arrivals* (seconds, ascending) and ask about a random product.

    Raises:
        AssertionError: An answer was wrong, or took a second call.
    """
    settings = mb.FlushPolicy(
        max_batch_size=1 if mode == ALONE else max_batch_size,
        max_batch_tokens=NO_LIMIT,
        max_output_tokens=NO_LIMIT,
        max_queued=NO_LIMIT,
        **policy,
    )
    asked = random.Random(seed).choices(list(labels()), k=len(arrivals))
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(_play(arrivals, asked, settings, "verified" if mode == WHOLE else "stream"))


async def _play(arrivals: Sequence[float], asked: list[str], policy: mb.FlushPolicy, resolve: str) -> Served:
    loop = asyncio.get_running_loop()
    model = SimulatedModel(answer=lambda text, _: labels()[text], latency=LATENCY)
    fallback = mb.FallbackPolicy(resolve=resolve)
    batcher = mb.Microbatcher(SimulatedTransport(model), policy=policy, fallback=fallback, tokens="bytes")
    system = {"role": "system", "content": instructions()}

    async def ask(question: str) -> mb.Reply[Label]:
        messages = [system, {"role": "user", "content": question}]
        reply = await batcher.submit(messages, output_type=Label, model=MODEL)
        assert reply.output == labels()[question], "a wrong answer"
        return reply

    async with batcher:
        tasks = []
        for at, question in zip(arrivals, asked, strict=True):
            if at > loop.time():
                await asyncio.sleep(at - loop.time())
            tasks.append(loop.create_task(ask(question)))
        replies = [await task for task in tasks]
    assert model.items == len(arrivals), "an item was asked about twice"
    tokens = model.prompt_tokens + model.completion_tokens
    return Served([reply.latency for reply in replies], [reply.waited for reply in replies], model.calls, tokens)


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Return the instants of *count* independent arrivals, *rate* per second."""
    draw = random.Random(seed)
    now = 0.0
    return [now := now + draw.expovariate(rate) for _ in range(count)]
