"""Relayed requests that wait for the budget."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest
from helpers import ask, batcher_for

import microbatch as mb
from microbatch.testing import ScriptedTransport

pytestmark = pytest.mark.promise(of="budget")

BODY = json.dumps({"model": "m", "messages": ask("x"), "max_tokens": 50}).encode()


class Answer:
    def __init__(self):
        self.status, self.headers, self.on_chunk = 200, {}, None


class Relay(ScriptedTransport):
    """Takes 5 s for a call and 1 s for a relayed request; `relayed` counts requests passed on as they are."""

    def __init__(self):
        super().__init__(delay=5.0)
        self.model = "m"
        self.relayed = 0

    async def send(self, call, on_text):
        completion = await super().send(call, on_text)
        completion.usage = mb.Usage(10, 10)
        return completion

    @asynccontextmanager
    async def forward(self, method, path, headers, body):
        self.relayed += 1
        await asyncio.sleep(1.0)
        yield Answer()


async def relay(batcher, tenant=None):
    async with batcher.forward("POST", "chat/completions", {}, BODY, tenant=tenant):
        pass


async def test_a_relayed_request_that_waits_for_the_budget_holds_no_slot():
    transport, now = Relay(), asyncio.get_running_loop().time
    budget = mb.Budget(tokens=290, per="tenant")
    async with batcher_for(transport, budget=budget, max_batch_size=1, max_concurrent_batches=2) as batcher:
        first = asyncio.ensure_future(batcher.submit(ask("a"), tenant="t"))
        await asyncio.sleep(1)
        waiting = asyncio.ensure_future(relay(batcher, "t"))
        await asyncio.sleep(1)
        assert batcher.stats().in_flight == 1
        await relay(batcher, "u")
        assert now() == 3
        await asyncio.gather(first, waiting)
        await asyncio.sleep(0)
        assert now() == 6
        assert transport.relayed == 2
        assert (batcher.stats().in_flight, batcher.stats().queued, batcher.stats().forwarded) == (0, 0, 2)


async def test_a_relayed_request_whose_caller_leaves_while_it_waits_holds_nothing():
    transport, budget = Relay(), mb.Budget(tokens=290)
    async with batcher_for(transport, budget=budget, max_batch_size=1, max_concurrent_batches=2) as batcher:
        first = asyncio.ensure_future(batcher.submit(ask("a")))
        await asyncio.sleep(1)
        waiting = [asyncio.ensure_future(relay(batcher)) for _ in range(3)]
        await asyncio.sleep(1)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        await asyncio.sleep(0)
        assert (batcher.stats().in_flight, batcher.stats().queued) == (1, 1)
        await first
        await relay(batcher)
        await asyncio.sleep(0)
        assert transport.relayed == 1
        assert (batcher.stats().in_flight, batcher.stats().queued, batcher.stats().forwarded) == (0, 0, 1)
        assert budget.counters.of(None, 0.0).calls == 0


@pytest.mark.parametrize("grace", [0.0, 2.0, 60.0])
async def test_a_relayed_request_that_waits_ends_when_the_batcher_closes(grace):
    transport, budget, loop = Relay(), mb.Budget(tokens=290), asyncio.get_running_loop()
    other = await batcher_for(transport, budget=budget, max_batch_size=1).open()
    batcher = await batcher_for(transport, budget=budget, max_batch_size=1).open()
    first = asyncio.ensure_future(other.submit(ask("a")))
    await asyncio.sleep(1)
    waiting = asyncio.ensure_future(relay(batcher))
    await asyncio.sleep(1)
    await batcher.aclose(grace=grace)
    if grace < 60:
        assert loop.time() == 2 + grace
        await asyncio.wait([waiting], timeout=0.1)
        assert isinstance(waiting.exception(), mb.ShutDown)
        await first
    else:
        assert waiting.done()
        assert loop.time() == 6
        await asyncio.gather(first, waiting)
    await other.aclose()
    assert transport.relayed == (1 if grace == 60 else 0)
    assert budget.counters.of(None, 0.0).calls == 0
