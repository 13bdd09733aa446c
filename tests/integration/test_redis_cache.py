"""The cache in Redis: names and times on the server, many at once, and what is told of failures."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
import types

import pytest
from fault_redis import FaultyRedis
from helpers import ask

import microbatch as mb
from microbatch.caching.answer_cache import SECRET_REFRESH
from microbatch.caching.redis import RedisCache
from microbatch.errors import ConfigError, StorageError
from microbatch.testing import ScriptedTransport

pytestmark = pytest.mark.slow


@contextlib.asynccontextmanager
async def opened(url, **settings):
    cache = RedisCache(url, **{"timeout": 5.0, **settings})
    await cache.open()
    try:
        yield cache
    finally:
        await cache.aclose()


async def test_entries_lie_under_the_prefix_and_expire_on_the_server(redis_server):
    async with opened(redis_server.url, prefix="shop:") as cache:
        await cache.set_many([(b"a", b"1", 60.5), (b"b", b"2", None), (b"c", b"3", 0.0005), (b"d", b"4", 1e30)])
        await cache.secret()
        with redis_server.client() as client:
            assert sorted(client.keys()) == [b"shop:cache-secret", b"shop:cache:a", b"shop:cache:b", b"shop:cache:d"]
            assert 50_000 < client.pttl("shop:cache:a") <= 60_500
            assert client.pttl("shop:cache:b") == client.pttl("shop:cache-secret") == -1
            assert client.pttl("shop:cache:d") > 10**12


async def test_caches_with_other_prefixes_do_not_meet(redis_url):
    async with opened(redis_url) as one, opened(redis_url, prefix="other:") as other:
        await one.set_many([(b"k", b"v", None)])
        assert await other.get_many([b"k"]) == [None]
        assert await one.secret() != await other.secret()


async def test_however_many_there_are_it_is_one_round_trip(redis_server):
    def commands(client):
        stats = client.info("commandstats")
        return {name: stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("mget", "set", "get", "multi")}

    async with opened(redis_server.url) as cache:
        with redis_server.client() as client:
            before = commands(client)
            await cache.set_many([(b"%d" % number, b"v", 60.0) for number in range(200)])
            await cache.get_many([b"%d" % number for number in range(200)])
            after = commands(client)
    assert {name: after[name] - before[name] for name in after} == {"mget": 1, "set": 200, "get": 0, "multi": 0}


async def test_of_those_who_come_first_at_once_all_have_the_same_secret(redis_url):
    async with contextlib.AsyncExitStack() as stack:
        caches = [await stack.enter_async_context(opened(redis_url)) for _ in range(50)]
        found = await asyncio.gather(*(cache.secret() for cache in caches))
    assert len(set(found)) == 1
    assert len(found[0]) == 32


async def test_the_race_for_the_secret_is_lost_without_harm(redis_server, monkeypatch):
    """Between finding none and leaving its own, another's came."""
    async with opened(redis_server.url) as cache:

        def just_then(size):
            with redis_server.client() as client:
                client.set("microbatch:cache-secret", b"o" * 32)
            return b"m" * size

        monkeypatch.setattr("microbatch.caching.redis.secrets", types.SimpleNamespace(token_bytes=just_then))
        assert await cache.secret() == b"o" * 32


async def test_five_hundred_at_once_share_its_connections_and_none_fails(redis_server):
    """The pool that redis-py has by default raises here."""
    async with opened(redis_server.url) as cache:
        await cache.set_many([(b"%d" % number, b"v%d" % number, 60.0) for number in range(1_000)])

        async def one(number):
            return await cache.get_many([b"%d" % number, b"%d" % (number + 500), b"none"])

        for _ in range(5):
            found = await asyncio.gather(*(one(number) for number in range(500)))
            assert found == [[b"v%d" % number, b"v%d" % (number + 500), None] for number in range(500)]
        with redis_server.client() as client:
            assert 2 <= len(client.client_list()) <= 17


async def test_who_waits_for_a_connection_does_not_fail_for_being_one_of_many():
    """The time limit is one for the server's answers; with one for the wait as well, most of these would fail."""
    async with FaultyRedis(delay=0.1) as server, opened(server.url, timeout=2.0, max_connections=2) as cache:
        begun = time.perf_counter()
        assert await asyncio.gather(*(cache.get_many([b"k"]) for _ in range(100))) == [[None]] * 100
        assert time.perf_counter() - begun > 2 * 2.0


async def test_a_storm_of_cancelled_look_ups_mixes_no_answers_and_loses_no_connection(redis_url):
    async with opened(redis_url, max_connections=4) as cache:
        await cache.set_many([(b"%d" % number, b"v%d" % number, 60.0) for number in range(1_000)])
        dice = random.Random(0)
        outcomes = {"right": 0, "gone": 0}

        async def one(number):
            try:
                async with asyncio.timeout(dice.expovariate(1 / 0.02)):
                    found = await cache.get_many([b"%d" % number, b"none", b"%d" % (999 - number)])
            except TimeoutError:
                outcomes["gone"] += 1
            else:
                assert found == [b"v%d" % number, None, b"v%d" % (999 - number)]
                outcomes["right"] += 1

        storms = 0
        while storms < 12 or min(outcomes.values()) <= 20:
            await asyncio.gather(*(one(dice.randrange(1_000)) for _ in range(250)))
            storms += 1
            assert storms < 100, outcomes
        async with asyncio.timeout(30):
            assert await asyncio.gather(*(cache.get_many([b"7"]) for _ in range(20))) == [[b"v7"]] * 20


async def test_opening_does_not_wait_for_a_server_that_is_down():
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # it takes connections and never says a word
        async with asyncio.timeout(10), opened(f"redis://127.0.0.1:{deaf.getsockname()[1]}", timeout=60.0):
            pass
    async with opened("redis://127.0.0.1:1") as cache:
        with pytest.raises(StorageError, match="ConnectionError"):
            await cache.get_many([b"k"])
        with pytest.raises(StorageError, match="ConnectionError"):
            await cache.set_many([(b"k", b"v", None)])
        with pytest.raises(StorageError, match="ConnectionError"):
            await cache.secret()


async def test_a_server_that_hangs_is_waited_for_no_longer_than_said(own_redis):
    own_redis.pause()
    async with opened(own_redis.url, timeout=1.0) as cache:
        begun = time.perf_counter()
        with pytest.raises(StorageError, match="TimeoutError"):
            await cache.get_many([b"k"])
        assert 0.9 < time.perf_counter() - begun < 5
        own_redis.resume()


async def test_a_full_server_is_an_error_that_quotes_neither_key_nor_value(own_redis):
    async with opened(own_redis.url) as cache:
        await cache.set_many([(b"k", b"v", None)])
        with own_redis.client() as client:
            client.config_set("maxmemory", 1)
        with pytest.raises(StorageError, match="OutOfMemoryError") as caught:
            await cache.set_many([(b"canary-key", b"canary-value", None)])
        assert "canary" not in str(caught.value) + str(caught.value.__cause__)
        assert await cache.get_many([b"k"]) == [b"v"]


async def test_a_server_that_wants_a_password_is_an_error(own_redis):
    with own_redis.client() as client:
        client.config_set("requirepass", "canary")
        try:
            async with opened(own_redis.url) as cache:
                with pytest.raises(StorageError, match="AuthenticationError"):
                    await cache.get_many([b"k"])
            async with opened(own_redis.url.replace("//", "//:canary@")) as cache:
                assert await cache.get_many([b"k"]) == [None]
                assert "canary" not in repr(cache)
        finally:
            client.config_set("requirepass", "")


@pytest.mark.parametrize("fault", ["garbage", "other", "short"])
async def test_an_answer_that_is_none_is_an_error_and_its_connection_is_not_used_again(fault):
    async with FaultyRedis() as server, opened(server.url) as cache:
        await cache.set_many([(b"canary", b"v", None)])
        server.fault = fault
        with pytest.raises(StorageError) as caught:
            await cache.get_many([b"canary", b"l"])
        assert "canary" not in str(caught.value)
        assert "HTTP" not in str(caught.value) + str(caught.value.__cause__)
        server.fault = "none"
        assert await cache.get_many([b"canary", b"l"]) == [b"v", None]


async def test_what_is_left_to_be_read_on_a_connection_is_no_answer_to_the_next_question(redis_url):
    """As when a client is cancelled at the wrong moment; redis-py does not look any more, unless told to speak version 2."""
    async with opened(redis_url, max_connections=1) as cache:
        await cache.set_many([(b"k", b"v", None), (b"other", b"w", None)])
        connection = await cache._client.connection_pool.get_connection()
        await connection.send_command("MGET", b"microbatch:cache:other")
        async with asyncio.timeout(5):
            while not connection._reader._buffer:  # noqa: ASYNC110 until the answer has come, which nobody reads
                await asyncio.sleep(0.001)
        await cache._client.connection_pool.release(connection)
        assert await cache.get_many([b"k"]) == [b"v"]


async def test_the_value_of_another_key_comes_back_as_it_is():
    """Only who wrote a value can tell whose it is: the batcher writes the key into it."""
    async with FaultyRedis() as server, opened(server.url, max_connections=1) as cache:
        await cache.set_many([(b"k", b"of k", None), (b"l", b"of l", None)])
        server.fault = "misaligned"
        assert await cache.get_many([b"k"]) == [None]
        assert await cache.get_many([b"l"]) == [b"of k"]
        # What can be seen here is seen, and the connection not used again.
        with pytest.raises(StorageError, match="did not answer with"):
            await cache.get_many([b"k", b"l"])
        assert await cache.get_many([b"k"]) == [None]


@pytest.mark.parametrize("url", ["redis//host", "http://user:canary@host", "redis://:canary@host:port/0", ""])
def test_a_malformed_address_is_told_at_once_and_not_quoted(url):
    with pytest.raises(ConfigError, match="address of Redis") as caught:
        RedisCache(url)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"ttl": -1}, {"timeout": 0}, {"max_connections": 0}, {"prefix": b"x"}])
def test_limits_that_make_no_sense_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        RedisCache("redis://127.0.0.1:1", **settings)


def test_its_repr_tells_no_address():
    cache = RedisCache("redis://user:canary@127.0.0.1:1/0")
    assert repr(cache) == "<RedisCache: microbatch:cache:*, closed>"


# --- a server that forgets


async def test_a_secret_that_the_server_has_lost_is_put_back_with_the_next_store(redis_server):
    async with opened(redis_server.url) as old:
        secret = await old.secret()
        with redis_server.client() as client:
            client.flushall()
        await old.set_many([(b"k", b"v", None)])
        async with opened(redis_server.url) as new:
            assert await new.secret() == secret
            assert await new.get_many([b"k"]) == [b"v"]
        with redis_server.client() as client:
            client.delete("microbatch:cache-secret")  # dropped for want of room
        assert await old.secret() == secret


async def test_a_secret_that_a_newcomer_has_left_meanwhile_stays_and_is_adopted(redis_server):
    async with opened(redis_server.url) as old:
        before = await old.secret()
        with redis_server.client() as client:
            client.flushall()
        async with opened(redis_server.url) as new:
            secret = await new.secret()
            assert secret != before
            await old.set_many([(b"k", b"v", None)])
            assert await new.secret() == secret == await old.secret()


async def test_processes_share_answers_again_after_the_server_was_emptied(redis_server):
    transport = ScriptedTransport()

    def batcher():
        return mb.Microbatcher(transport, cache=RedisCache(redis_server.url), tokens="bytes")

    async def stored(batcher, count):
        async with asyncio.timeout(20):
            while batcher.stats().cache_stores < count:  # noqa: ASYNC110 nobody is told
                await asyncio.sleep(0.01)

    async with batcher() as one, batcher() as other:
        for each in (one, other):
            await each.warm([ask("a")])
        await stored(one, 1)
        with redis_server.client() as client:
            client.flushall()
        async with batcher() as new:  # with a secret of its own, before the others have noticed
            await asyncio.sleep(SECRET_REFRESH)
            await new.warm([ask("b")])
            for each in (one, other):
                await each.warm([ask("c")])
            async with asyncio.timeout(20):
                while len({each._cache._keys.secret for each in (one, other, new)}) > 1:  # noqa: ASYNC110 nobody is told
                    await asyncio.sleep(0.01)
            asked = len(transport.calls)
            for each in (one, other):
                assert [result.unwrap().route async for result in each.map([ask("b")])] == ["cache"]
            assert len(transport.calls) == asked
