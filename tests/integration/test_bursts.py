"""Warm caches under bursts, stalls of the event loop and bulk work: what is known is not paid for again, and stores are made."""

from __future__ import annotations

import asyncio
import time

import pytest
from fault_redis import FaultyRedis
from helpers import ask

import microbatch as mb
from microbatch.testing import ScriptedTransport

pytestmark = pytest.mark.slow


BURST = 10_000

MAKERS = {
    "sqlite": lambda path, _: mb.SQLiteCache(path),
    "redis": lambda _, url: mb.RedisCache(url),
    "tiers over sqlite": lambda path, _: mb.TieredCache(mb.MemoryCache(), mb.SQLiteCache(path)),
    "tiers over redis": lambda _, url: mb.TieredCache(mb.MemoryCache(), mb.RedisCache(url)),
    "three tiers": lambda path, url: mb.TieredCache(mb.MemoryCache(), mb.SQLiteCache(path), mb.RedisCache(url)),
}


@pytest.fixture(params=MAKERS)
def make(request, tmp_path, redis_url):
    """Return a function that makes a batcher with a cache, new but over what those before it have left."""

    def batcher(transport):
        cache = MAKERS[request.param](tmp_path / "c.sqlite", redis_url)
        policy = mb.FlushPolicy(max_batch_size=100, max_queued=2 * BURST)
        return mb.Microbatcher(transport, policy=policy, cache=cache, tokens="bytes")

    return batcher


def question(number):
    return ask(f"q{number}")


async def warm(batcher, count):
    async with batcher:
        await batcher.warm([question(number) for number in range(count)])
    assert batcher.stats().cache_stores == count


@pytest.mark.parametrize("make", ["sqlite", "redis", "three tiers"], indirect=True)
async def test_of_a_burst_on_a_warm_cache_at_most_a_hundredth_is_asked_again(make):
    await warm(make(ScriptedTransport()), BURST)
    async with make(ScriptedTransport()) as batcher:
        replies = await asyncio.gather(*(batcher.submit(question(number)) for number in range(BURST)))
    assert [reply.output for reply in replies] == [f"Q{number}" for number in range(BURST)]
    assert sum(reply.route != "cache" for reply in replies) <= BURST / 100


async def test_a_loop_that_is_held_up_now_and_then_loses_no_hit(make):
    await warm(make(ScriptedTransport()), 200)
    async with make(ScriptedTransport()) as batcher:
        await batcher.submit(question(0))
        asked = []
        for number in range(20):
            asked += [
                asyncio.ensure_future(batcher.submit(question(each))) for each in range(number * 10, number * 10 + 10)
            ]
            for _ in range(number % 5):  # at different steps of their look-up
                await asyncio.sleep(0)
            time.sleep(0.1)  # noqa: ASYNC251 the fault
        replies = await asyncio.gather(*asked)
    assert {reply.route for reply in replies} == {"cache"}


async def test_bulk_work_has_seconds_for_look_ups_and_stores_with_the_caches_own_defaults():
    """A server that takes longer than a caller would wait for it: 0.1 s for each command."""
    count = 80
    async with FaultyRedis() as server:
        for routes in ({"batch"}, {"cache"}):
            server.delay = 0.0
            policy = mb.FlushPolicy(max_batch_size=4)
            cache = mb.RedisCache(server.url)
            async with mb.Microbatcher(ScriptedTransport(), policy=policy, cache=cache, tokens="bytes") as batcher:
                server.delay = 0.1
                for begin in range(0, count, 20):  # so that it has to agree on the secret anew meanwhile
                    asked = [question(number) for number in range(begin, begin + 20)]
                    assert {result.unwrap().route async for result in batcher.map(asked)} == routes
                    await asyncio.sleep(0.3)
            assert batcher.stats().cache_bypassed == 0
        assert len(server.values) == count + 1


async def test_a_server_that_was_too_slow_for_the_secret_at_first_is_used_by_bulk_work():
    async with FaultyRedis(delay=0.2) as server:
        cache = mb.RedisCache(server.url)
        async with mb.Microbatcher(ScriptedTransport(), cache=cache, tokens="bytes") as batcher, asyncio.timeout(40):
            while not batcher.stats().cache_stores:
                assert [result.unwrap().output async for result in batcher.map([question(1)])] == ["Q1"]


@pytest.mark.parametrize("stall", [0.0, 0.1])
async def test_a_map_whose_loop_is_busy_stores_all_of_its_answers(make, stall):
    async with make(ScriptedTransport()) as batcher:

        def questions():
            for number in range(1_000):
                if number % 100 == 0:
                    time.sleep(stall)
                yield question(number)

        async for _ in batcher.map(questions()):
            pass
    assert batcher.stats().cache_stores == 1_000
    async with make(ScriptedTransport()) as batcher:
        assert {result.unwrap().route async for result in batcher.map(questions())} == {"cache"}
