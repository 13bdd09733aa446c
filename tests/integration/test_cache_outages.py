"""What a caller loses when the server of a cache hangs, is gone or talks nonsense: little, once, until it is well again."""

from __future__ import annotations

import asyncio
import statistics
import time

import pytest
from fault_redis import FaultyRedis
from helpers import ask, opened

import microbatch as mb
from microbatch.caching.guard import LIVE_TIMEOUT, Guard
from microbatch.caching.memory import MemoryCache
from microbatch.caching.redis import RedisCache
from microbatch.caching.tiers import TieredCache
from microbatch.testing import ScriptedTransport

pytestmark = pytest.mark.slow


PATIENCE = 40.0  # after several failures in a row a cache is left alone for many seconds
AT_MOST = 60 * LIVE_TIMEOUT  # a busy machine may take its time to run us; the guard's own tests show it to the instant


class Real:
    """A real server, paused or stopped."""

    def __init__(self, server, how):
        self.url = server.url
        self.fail, self.recover = {"hangs": (server.pause, server.resume), "is gone": (server.stop, server.start)}[how]


class Faulty:
    """A server that answers nonsense."""

    def __init__(self, server, how):
        self.url = server.url
        self._server = server
        self._how = how

    def fail(self):
        self._server.fault = self._how

    def recover(self):
        self._server.fault = "none"


@pytest.fixture(params=["hangs", "is gone", "silence", "garbage", "other", "short"])
async def outage(request):
    if request.param in ("hangs", "is gone"):
        yield Real(request.getfixturevalue("own_redis"), request.param)
    else:
        async with FaultyRedis() as server:
            yield Faulty(server, request.param)


async def timed(call):
    begun = time.perf_counter()
    return await call, time.perf_counter() - begun


async def answers_again(look_up, value):
    async with asyncio.timeout(PATIENCE):
        while await look_up() != value:  # noqa: ASYNC110 nothing tells when an outage is over
            await asyncio.sleep(0.02)


async def test_an_outage_costs_one_look_up_its_time_and_the_others_nothing_until_it_is_over(outage):
    async with opened(RedisCache(outage.url)) as cache:
        guard = Guard(cache)
        await answers_again(lambda: _kept(guard), [b"v", b"w"])  # a busy machine may not manage it at once
        outage.fail()
        found, took = await timed(guard.get_many([b"k", b"l"]))
        assert found == [None, None]
        assert took < AT_MOST

        bypassing = [await timed(guard.get_many([b"k"])) for _ in range(200)]
        assert {tuple(found) for found, _ in bypassing} == {(None,)}
        assert statistics.median(took for _, took in bypassing) < 0.001
        assert "bypassed" in repr(guard)

        outage.recover()
        await answers_again(lambda: _kept(guard), [b"v", b"w"])
        assert "in use" in repr(guard)


async def _kept(guard):
    await guard.set_many([(b"k", b"v", None), (b"l", b"w", None)])
    return await guard.get_many([b"k", b"l"])


async def test_a_cache_in_front_goes_on_while_the_one_behind_is_down(outage):
    async with opened(TieredCache(memory := MemoryCache(), RedisCache(outage.url))) as cache:
        guard = Guard(cache)
        await answers_again(lambda: _kept(guard), [b"v", b"w"])
        outage.fail()
        found, took = await timed(guard.get_many([b"k", b"none"]))
        assert found == [b"v", None]
        assert took < AT_MOST
        await guard.set_many([(b"new", b"x", None)])
        going_on = [await timed(guard.get_many([b"k", b"new", b"none"])) for _ in range(200)]
        assert {tuple(found) for found, _ in going_on} == {(b"v", b"x", None)}
        assert statistics.median(took for _, took in going_on) < 0.001

        outage.recover()

        async def behind():
            await guard.set_many([(b"k", b"v", None)])
            await memory.set_many([(b"k", b"", 0)])  # gone from the front
            return await guard.get_many([b"k"])

        await answers_again(behind, [b"v"])
        assert await memory.get_many([b"k"]) == [b"v"]


async def test_a_server_that_is_down_at_the_start_is_noticed_when_it_comes(own_redis):
    own_redis.stop()
    async with opened(RedisCache(own_redis.url)) as cache:
        guard = Guard(cache)
        secret, took = await timed(guard.secret())
        assert secret is None
        assert took < AT_MOST
        own_redis.start()
        async with asyncio.timeout(PATIENCE):
            while (secret := await guard.secret()) is None:  # noqa: ASYNC110 nothing tells when an outage is over
                await asyncio.sleep(0.02)
        assert secret == await cache.secret()


async def test_a_full_server_goes_on_giving_the_answers_that_it_has(own_redis, caplog, monkeypatch):
    monkeypatch.setattr("microbatch.caching.guard.LIVE_TIMEOUT", 5.0)
    async with opened(RedisCache(own_redis.url, timeout=5.0)) as cache:
        guard = Guard(cache)
        await answers_again(lambda: _kept(guard), [b"v", b"w"])
        with own_redis.client() as client:
            client.config_set("maxmemory", 1)
            caplog.clear()
            for number in range(50):
                await guard.set_many([(b"canary %d" % number, b"canary", None)])
                assert await guard.get_many([b"k", b"canary"]) == [b"v", None]
            assert [record.levelname for record in caplog.records] == ["WARNING"]
            assert "OutOfMemoryError" in caplog.text
            assert "canary" not in caplog.text


@pytest.mark.promise(of="slow_cache")
async def test_callers_lose_little_once_get_their_answers_and_find_the_cache_again_afterwards(outage):
    transport = ScriptedTransport()
    async with mb.Microbatcher(transport, cache=RedisCache(outage.url), tokens="bytes") as batcher:

        async def route():
            return (await batcher.submit(ask("known"))).route

        await answers_again(route, "cache")  # a busy machine may not manage it at once
        outage.fail()
        reply, took = await timed(batcher.submit(ask("first")))
        assert (reply.output, reply.route) == ("FIRST", "single")
        assert took < AT_MOST
        took = [await timed(batcher.submit(ask(f"next {number}"))) for number in range(49)]
        assert [reply.output for reply, _ in took] == [f"NEXT {number}" for number in range(49)]
        assert statistics.median(seconds for _, seconds in took) < LIVE_TIMEOUT / 2
        many = await asyncio.gather(*(batcher.submit(ask(f"many {number}")) for number in range(200)))
        assert [reply.output for reply in many] == [f"MANY {number}" for number in range(200)]
        assert batcher.stats().cache_bypassed >= 200
        outage.recover()
        await answers_again(route, "cache")
