"""Callers who come at given instants, a batcher, and a simulated endpoint, all on virtual time."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import msgspec

import microbatch as mb
from bench.questions import Label, products
from microbatch.demo import instructions
from microbatch.testing import Latency, SimulatedModel, SimulatedTransport, VirtualClockLoop

if TYPE_CHECKING:
    from collections.abc import Sequence

MODEL = "gpt-4.1-mini"
LATENCY = Latency(first_token=0.5, tokens_per_second=80.0)
NEVER_BINDS = 10**6
"""For limits that are not the subject."""

STREAMED, WHOLE, ALONE = "streamed", "whole reply", "one call each"
MODES = (STREAMED, WHOLE, ALONE)
"""Callers are answered as their element closes, when the reply has ended, or each has a call to itself."""


class Served(msgspec.Struct):
    """What became of a run.

    Attributes:
        latencies: Seconds from submit to the answer, in order of arrival.
        waits: Seconds from submit until the call left.
        calls: What went upstream.
        batch_size: Mean items a call.
        tokens: Prompt and reply, of all calls.
    """

    latencies: list[float]
    waits: list[float]
    calls: int
    tokens: int

    @property
    def batch_size(self) -> float:
        return len(self.latencies) / self.calls

    def after(self, share: float) -> Served:
        """Leave out the first *share* of the callers, who met an empty batcher. Calls and tokens stay those of all."""
        first = round(len(self.latencies) * share)
        return Served(self.latencies[first:], self.waits[first:], self.calls, self.tokens)


def messages(question: str):
    return [{"role": "system", "content": instructions()}, {"role": "user", "content": question}]


def model(labels: dict[str, str]) -> SimulatedModel:
    return SimulatedModel(answer=lambda text, _: labels[text], latency=LATENCY)


def play(arrivals: Sequence[float], seed: int, mode: str, *, only: str | None = None, **policy) -> Served:
    """Let a caller come at each of the instants, and return what became of them.

    Args:
        arrivals: The instants, ascending, in seconds.
        seed: Of what they ask.
        mode: One of `MODES`.
        only: What all of them ask; None draws a product for each.
        policy: Settings of `FlushPolicy`.

    Raises:
        AssertionError: Somebody got a wrong answer, or an answer took a second call.
    """
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(_play(arrivals, seed, mode, only, **policy))


async def _play(arrivals, seed, mode, only, *, max_batch_size, **policy) -> Served:
    loop = asyncio.get_running_loop()
    labels = dict(products())
    asked = random.Random(seed).choices(list(labels) if only is None else [only], k=len(arrivals))
    simulated = model(labels)
    batcher = mb.Microbatcher(
        SimulatedTransport(simulated),
        policy=mb.FlushPolicy(
            max_batch_size=1 if mode == ALONE else max_batch_size,
            max_batch_tokens=NEVER_BINDS,
            max_output_tokens=NEVER_BINDS,
            max_queued=NEVER_BINDS,
            **policy,
        ),
        fallback=mb.FallbackPolicy(resolve="verified" if mode == WHOLE else "stream"),
        tokens="bytes",
    )

    async def ask(question: str) -> mb.Reply[Label]:
        reply = await batcher.submit(messages(question), output_type=Label, model=MODEL)
        assert reply.output == labels[question], "a wrong answer"
        return reply

    async with batcher:
        tasks = []
        for at, question in zip(arrivals, asked, strict=True):
            if at > loop.time():
                await asyncio.sleep(at - loop.time())
            tasks.append(loop.create_task(ask(question)))
        replies = [await task for task in tasks]
    assert simulated.items == len(arrivals), "somebody was asked about twice"
    return Served(
        [reply.latency for reply in replies],
        [reply.waited for reply in replies],
        simulated.calls,
        simulated.prompt_tokens + simulated.completion_tokens,
    )


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Return the instants at which *count* callers come independently of each other, *rate* a second."""
    draw = random.Random(seed)
    now = 0.0
    return [now := now + draw.expovariate(rate) for _ in range(count)]
