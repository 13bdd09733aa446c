"""Drawn runs of callers who ask equal things, with cancels, deadlines, priorities and faults: everybody ends once, all adds up."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from random import Random

import pytest
from helpers import ask
from simulation.loop import ShuffledLoop, Steady

import microbatch as mb
from microbatch.testing import ScriptedTransport

pytestmark = pytest.mark.slow


RUNS = 1_500
SLICE = 100
TEXTS = "abc"


@dataclass
class Caller:
    """One request, and what became of it."""

    text: str
    at: float
    options: dict[str, object]
    cancel: float | None
    outcome: object = None
    task: asyncio.Task | None = None


@dataclass
class Run:
    """One drawn run."""

    seed: int
    callers: list[Caller] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def play(self) -> None:
        random = Random(self.seed)
        loop = ShuffledLoop(random, random.choice((0.0, 0.3, 1.0)))
        try:
            with Steady():
                loop.run_until_complete(self._main(random, loop))
            self.complaints += loop.complaints
        finally:
            loop.close()

    async def _main(self, random: Random, loop: asyncio.AbstractEventLoop) -> None:
        transport = ScriptedTransport(
            *(self._step(random) for _ in range(random.randint(0, 4))),
            delay=random.choice((0.0, 0.25, 1.0)),
            piece=random.choice((None, 8, 40)),
            interval=random.choice((0.0, 0.125)),
        )
        policy = mb.FlushPolicy(
            max_batch_size=random.choice((1, 2, 4, 16)),
            max_wait=random.choice((0.0, 0.25, 1.0)),
            low_max_wait=2.0,
            idle=random.choice(("flush", "wait")),
            max_concurrent_batches=random.choice((1, 2, 64)),
            max_queued=random.choice((3, 10_000)),
            when_full=random.choice(("wait", "reject", "bypass")),
        )
        cache = mb.MemoryCache(ttl=random.choice((None, 0.5))) if random.random() < 0.4 else None
        batcher = mb.Microbatcher(
            transport, policy=policy, retry=mb.RetryPolicy(max_attempts=2), tokens="bytes", cache=cache
        )
        await batcher.open()
        for _ in range(random.randint(2, 24)):
            caller = self._draw(random)
            self.callers.append(caller)
            loop.call_at(caller.at, self._arrive, caller, batcher, loop)
        bulk = [mb.Request(ask(random.choice(TEXTS)), temperature=0) for _ in range(random.choice((0, 0, 4)))]
        mapped = loop.create_task(self._map(batcher, bulk, random.choice((None, None, 1))))
        await asyncio.sleep(3.0)
        if random.random() < 0.2:
            await batcher.aclose(random.choice((0.0, 0.5)))
        await asyncio.wait([mapped, *(caller.task for caller in self.callers)])
        await batcher.aclose(None)
        self._check(batcher, transport, cached=cache is not None)

    @staticmethod
    def _step(random: Random):
        return random.choice(
            (
                mb.ServerError("down", status=503, retry_after=0.0),
                mb.BadRequest("no", status=400),
                "",
                '{"results":[]}',
                lambda call: call.reply([(name, text.upper()) for name, text in call.items[:-1]]),
            )
        )

    @staticmethod
    def _draw(random: Random) -> Caller:
        instant = random.choice((0.0, 0.25, 0.5, 1.0, 1.25, 2.0))
        return Caller(
            random.choice(TEXTS),
            random.choice((0.0, 0.25, 1.0)),
            {
                "temperature": random.choice((0, 0, 0, 1)),
                "priority": random.choice(("high", "normal", "normal", "low")),
                "timeout": random.choice((None, None, 0.0, 0.5, 1.25)),
                "params": random.choice((None, None, {"stop": "x"})),
                "use_cache": random.random() < 0.9,
            },
            instant if random.random() < 0.4 else None,
        )

    def _arrive(self, caller: Caller, batcher: mb.Microbatcher, loop: asyncio.AbstractEventLoop) -> None:
        caller.task = loop.create_task(self._submit(caller, batcher))
        if caller.cancel is not None:
            loop.call_later(caller.cancel, caller.task.cancel)

    async def _submit(self, caller: Caller, batcher: mb.Microbatcher) -> None:
        try:
            caller.outcome = await batcher.submit(ask(caller.text), **caller.options)
        except asyncio.CancelledError:
            caller.outcome = "cancelled"
        except mb.MicrobatchError as error:
            error.__traceback__ = None
            caller.outcome = error

    async def _map(self, batcher: mb.Microbatcher, requests: list[mb.Request], leave: int | None) -> None:
        results = batcher.map(requests, max_pending=3)
        seen = 0
        try:
            async for result in results:
                seen += 1
                if result.reply is not None:
                    self.callers.append(Caller("map", 0.0, {}, None, result.reply, asyncio.current_task()))
                if seen == leave:
                    break
        except mb.BatcherClosed:
            return
        finally:
            await results.aclose()
        if leave is None and seen != len(requests):
            self.complaints.append(f"map yielded {seen} of {len(requests)}")

    def _check(self, batcher: mb.Microbatcher, transport: ScriptedTransport, *, cached: bool) -> None:
        stats = batcher.stats()
        complain = self.complaints.append
        if stats.queued or stats.in_flight or len(batcher._parts.in_flight):
            complain(f"left: {stats.queued} queued, {stats.in_flight} in flight, {len(batcher._parts.in_flight)} filed")
        if stats.items != stats.answered + stats.failed + stats.cancelled:
            complain(f"{stats.items} items, {stats.answered} answered, {stats.failed} failed, {stats.cancelled} left")
        errors = [id(caller.outcome) for caller in self.callers if isinstance(caller.outcome, Exception)]
        if len(set(errors)) != len(errors):
            complain("callers share an exception")
        replies = [caller for caller in self.callers if isinstance(caller.outcome, mb.Reply)]
        for caller in replies:
            reply = caller.outcome
            if (
                caller.text != "map"
                and reply.output not in (caller.text.upper(), "")
                and not reply.output.startswith("{")
            ):
                complain(f"{caller.text} was answered {reply.output!r}")
            if reply.latency < 0 or reply.waited < 0:
                complain(f"{caller.text} waited {reply.waited}, answered after {reply.latency}")
        for caller in self.callers:
            timeout = caller.options.get("timeout")
            if isinstance(caller.outcome, mb.Reply) and timeout is not None and caller.outcome.latency > timeout:
                complain(f"{caller.text} was answered after its timeout")
        claimed = sum((caller.outcome.usage for caller in replies), mb.Usage()) + stats.unclaimed
        short = claimed.prompt_tokens < stats.prompt_tokens or claimed.completion_tokens < stats.completion_tokens
        over = claimed.prompt_tokens > stats.prompt_tokens or claimed.completion_tokens > stats.completion_tokens
        # Of a call that was cut off by the close nothing is reported: its answers keep their estimates.
        if short or (over and not claimed.estimated):
            complain(f"{claimed} does not add up to {stats.prompt_tokens} + {stats.completion_tokens}")
        if not cached and any(caller.outcome.route == "cache" for caller in replies):
            complain("an answer came from a cache that is not there")


@pytest.mark.promise(of="single_flight")
@pytest.mark.promise(of="usage")
@pytest.mark.promise(of="ends_once")
@pytest.mark.parametrize("first", range(0, RUNS, SLICE))
def test_equal_requests_end_once_each_and_all_adds_up(first, monkeypatch):
    monkeypatch.setattr(logging.getLogger("microbatch"), "disabled", True)
    bad = []
    for seed in range(first, first + SLICE):
        run = Run(seed)
        run.play()
        bad += [f"seed {seed}: {complaint}" for complaint in run.complaints]
    assert not bad, "\n".join(bad)
