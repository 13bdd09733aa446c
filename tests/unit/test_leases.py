"""Slots and permits that relayed requests hold when their batcher closes."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest
from helpers import ask, batcher_for, each

import microbatch as mb
from microbatch.testing import ScriptedTransport
from microbatch.transports.rate_limit import WINDOW

BODY = json.dumps({"model": "scripted", "messages": ask("x"), "max_tokens": 50}).encode()


class Relay(ScriptedTransport):
    """Takes *seconds* for a relayed request; notes when requests of either form were `sent`."""

    def __init__(self, seconds, *, unsendable=False):
        super().__init__()
        self._seconds = seconds
        self._unsendable = unsendable
        self.sent = []

    async def send(self, call, on_text):
        self.sent.append(asyncio.get_running_loop().time())
        return await super().send(call, on_text)

    @asynccontextmanager
    async def forward(self, method, path, headers, body):
        if self._unsendable:
            await asyncio.sleep(self._seconds)
            raise mb.ConfigError("it cannot be sent")
        self.sent.append(asyncio.get_running_loop().time())
        await asyncio.sleep(self._seconds)
        yield None


async def relay(batcher, body=b"{}"):
    async with batcher.forward("POST", "chat/completions", {}, body):
        pass


def held(batcher):
    (account,) = batcher._parts.accounts._kept.values()
    return batcher._parts.scheduler.in_use, account.on_wire, account.begun


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_relayed_request_under_way_counts_against_the_limit_after_its_batcher_has_closed(cancelled):
    transport, limit, loop = Relay(5.0), mb.RateLimit(rpm=2), asyncio.get_running_loop()
    other = await batcher_for(transport, rate_limit=limit, max_batch_size=1).open()
    batcher = await batcher_for(transport, rate_limit=limit).open()
    relayed = asyncio.ensure_future(relay(batcher))
    await asyncio.sleep(1)
    await batcher.aclose(grace=1)
    assert loop.time() == 2
    assert not relayed.done()
    assert held(batcher) == (1, 1, 1)
    if cancelled:
        relayed.cancel()
    await asyncio.wait([relayed])
    assert loop.time() == (2 if cancelled else 5)
    assert held(batcher) == (0, 0, 0)
    await asyncio.gather(*(other.submit(ask(word)) for word in "ab"))
    await other.aclose()
    assert transport.sent == [0, 2 if cancelled else 5, WINDOW]


async def test_a_relayed_request_that_proves_unsendable_after_its_batcher_has_closed_costs_nothing():
    transport, limit, loop = Relay(5.0, unsendable=True), mb.RateLimit(rpm=1), asyncio.get_running_loop()
    other = await batcher_for(transport, rate_limit=limit).open()
    batcher = await batcher_for(transport, rate_limit=limit).open()
    relayed = asyncio.ensure_future(relay(batcher))
    await asyncio.sleep(1)
    await batcher.aclose(grace=1)
    await asyncio.wait([relayed])
    assert isinstance(relayed.exception(), mb.ConfigError)
    assert held(batcher) == (0, 0, 0)
    await other.submit(ask("a"))
    assert loop.time() == 5
    await other.aclose()
    assert transport.sent == [5]


@each("turns", range(12))
async def test_a_request_to_be_relayed_as_its_batcher_closes_is_charged_if_it_is_sent(turns):
    transport, limit = Relay(5.0), mb.RateLimit(rpm=100)
    batcher = await batcher_for(transport, rate_limit=limit, max_concurrent_batches=2).open()
    tasks = [asyncio.ensure_future(relay(batcher)) for _ in range(3)]
    for _ in range(turns):
        await asyncio.sleep(0)
    await batcher.aclose(grace=0)
    sent = len(transport.sent)
    await asyncio.wait(tasks)
    assert len(transport.sent) == sent
    errors = [type(task.exception()) for task in tasks if task.exception() is not None]
    assert len(errors) == len(tasks) - sent
    assert {*errors} <= {mb.BatcherClosed, mb.ShutDown}
    for account in batcher._parts.accounts._kept.values():
        assert held(batcher) == (0, 0, 0)
        assert account._bucket._requests.total == sent


async def test_a_request_whose_charge_is_slow_is_not_relayed_when_its_batcher_has_closed():
    transport, limit, budget = Relay(5.0), mb.RateLimit(rpm=1), mb.Budget(tokens=1_000)
    other = await batcher_for(transport, rate_limit=limit).open()
    batcher = await batcher_for(transport, rate_limit=limit, budget=budget).open()
    spending = batcher._parts.spending
    add = spending._add_whole

    async def slowly(*amounts):
        await asyncio.sleep(5.0)
        return await add(*amounts)

    spending._add_whole = slowly
    relayed = asyncio.ensure_future(relay(batcher, BODY))
    await asyncio.sleep(1)
    await batcher.aclose(grace=1)
    assert held(batcher) == (1, 1, 1)
    await asyncio.wait([relayed])
    assert transport.sent == []
    assert isinstance(relayed.exception(), mb.ShutDown)
    assert held(batcher) == (0, 0, 0)
    assert budget.counters.of(None, 0.0).calls == 0
    await other.submit(ask("a"))
    assert transport.sent == [5]
    await other.aclose()
