"""What a command sends with: batchers that share a transport and a cache."""

from __future__ import annotations

from types import SimpleNamespace

from helpers import ask

import microbatch as mb
from microbatch.cli.session import Session
from microbatch.testing import ScriptedTransport


def plan(**settings):
    shared = {
        "fallback": mb.FallbackPolicy(),
        "rate_limit": None,
        "cache": None,
        "id_seed": None,
        "prices": None,
        "budget": None,
    }
    return SimpleNamespace(**{"transport": ScriptedTransport(), "semantic": None, **shared, **settings})


async def test_the_evictions_of_the_shared_cache_are_counted_once():
    cache = mb.MemoryCache(max_bytes=2_000)
    session = Session(plan(cache=cache), give_up_after=None)
    batchers = [session.batcher(mb.FlushPolicy()) for _ in range(3)]
    async with batchers[0], batchers[1], batchers[2]:
        for number in range(30):
            await batchers[number % 3].submit(ask(f"question {number}"))
    assert session.stats().cache_evictions == cache.evictions > 0


async def test_calls_that_are_never_sent_are_not_counted():
    session = Session(plan(), give_up_after=None)
    assert session.stats() == mb.Stats()
    async with session.batcher(mb.FlushPolicy()) as batcher, session.prober:
        await batcher.submit(ask("sent"))
        await session.prober.submit(ask("probed"))
        session.endpoint.stop()
        results = [result async for result in batcher.map([ask("not sent")])]
    assert isinstance(results[0].error, mb.ShutDown)
    assert session.stats().upstream_calls == 2
