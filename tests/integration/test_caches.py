"""What every cache does, whatever it is kept in."""

from __future__ import annotations

import asyncio

import pytest
from helpers import opened

from microbatch.caching.memory import MemoryCache
from microbatch.caching.redis import RedisCache
from microbatch.caching.sqlite import SQLiteCache
from microbatch.caching.tiers import TieredCache
from microbatch.protocols import Cache

KINDS = ["memory", "sqlite", "redis", "memory over sqlite", "memory over redis", "sqlite over redis"]


def made(kind, tmp_path, redis_url):
    makers = {
        "memory": MemoryCache,
        "sqlite": lambda: SQLiteCache(tmp_path / "cache.sqlite"),
        "redis": lambda: RedisCache(redis_url, timeout=5.0),
    }
    tiers = [makers[part]() for part in kind.split(" over ")]
    return tiers[0] if len(tiers) == 1 else TieredCache(*tiers)


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """The tests here are about answers, not about how soon they come: this machine may be busy."""
    for module in ("guard", "tiers"):
        monkeypatch.setattr(f"microbatch.caching.{module}.LIVE_TIMEOUT", 5.0)


@pytest.fixture(params=KINDS)
async def cache(request, tmp_path):
    url = request.getfixturevalue("redis_url") if "redis" in request.param else None
    async with opened(made(request.param, tmp_path, url)) as cache:
        yield cache


async def test_it_is_a_cache(cache):
    assert isinstance(cache, Cache)
    assert cache.ttl == 7 * 24 * 3600
    assert cache.evictions == 0


async def test_what_was_stored_comes_back_in_the_order_asked_for(cache):
    await cache.set_many([(b"k%d" % number, b"value %d" % number, None) for number in range(100)])
    asked = [b"k%d" % number for number in (99, 3, 1_000, 0, 3)]
    assert await cache.get_many(asked) == [b"value 99", b"value 3", None, b"value 0", b"value 3"]


@pytest.mark.parametrize("value", [b"", b"\0", b"\r\n$-1\r\n", bytes(range(256)), b"x" * 1_000_000])
async def test_values_come_back_byte_for_byte(cache, value):
    key = bytes(range(255, 239, -1))
    await cache.set_many([(key, value, 60.0)])
    assert await cache.get_many([key]) == [value]


async def test_keys_are_told_apart_byte_for_byte(cache):
    keys = [b"", b"\0", b"\0\0", b"a", b"A", b"a\n", b"secret", b"\xff" * 32]
    await cache.set_many([(key, key + b"!", None) for key in keys])
    assert await cache.get_many(keys) == [key + b"!" for key in keys]
    assert await cache.get_many([b"a\0", b"\xff" * 31]) == [None, None]


async def test_the_latest_value_of_a_key_counts(cache):
    await cache.set_many([(b"k", b"first", 60.0)])
    await cache.set_many([(b"k", b"second", None), (b"l", b"a", None), (b"l", b"b", None)])
    assert await cache.get_many([b"k", b"l"]) == [b"second", b"b"]


async def test_asking_and_storing_nothing_is_allowed(cache):
    assert list(await cache.get_many([])) == []
    await cache.set_many([])


@pytest.mark.slow
async def test_more_keys_than_a_query_may_have_parameters_are_one_call(cache):
    keys = [b"%d" % number for number in range(40_000)]
    await cache.set_many([(key, key, None) for key in keys[::2]])
    found = await cache.get_many(keys)
    assert found[::2] == keys[::2]
    assert found[1::2] == [None] * 20_000


# What tiers have put back into the upper ones may stay there.
@pytest.mark.parametrize("cache", ["memory", "sqlite", "redis"], indirect=True)
async def test_an_entry_is_gone_when_its_time_is_over_and_others_stay(cache):
    await cache.set_many([(b"short", b"1", 0.05), (b"long", b"2", 60.0), (b"ever", b"3", None), (b"never", b"4", 0.0)])
    async with asyncio.timeout(5):
        while await cache.get_many([b"short"]) != [None]:  # noqa: ASYNC110 nothing tells when Redis forgets
            await asyncio.sleep(0.01)
    assert await cache.get_many([b"short", b"long", b"ever", b"never"]) == [None, b"2", b"3", None]


async def test_an_endless_ttl_is_one(cache):
    await cache.set_many([(b"k", b"v", float("inf")), (b"l", b"w", 1e15)])
    assert await cache.get_many([b"k", b"l"]) == [b"v", b"w"]


@pytest.mark.slow
async def test_many_use_it_at_once(cache):
    async def one(number):
        key = b"k%d" % number
        await cache.set_many([(key, key * 2, 60.0)])
        return await cache.get_many([key, b"none"])

    found = await asyncio.gather(*(one(number) for number in range(500)))
    assert found == [[b"k%d" % number * 2, None] for number in range(500)]


async def test_it_can_be_closed_twice_and_opened_again(cache):
    await cache.set_many([(b"k", b"v", None)])
    await cache.aclose()
    await cache.aclose()
    async with opened(cache):
        assert await cache.get_many([b"k"]) == [b"v"]
        if hasattr(cache, "secret"):
            assert await cache.secret() == await cache.secret()


async def test_its_repr_tells_no_key_and_no_value(cache):
    await cache.set_many([(b"canary-key", b"canary-value", None)])
    await cache.get_many([b"canary-key"])
    assert "canary" not in repr(cache)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "memory"])
async def test_it_survives_its_process_and_so_does_the_secret(request, tmp_path, kind):
    url = request.getfixturevalue("redis_url") if "redis" in kind else None
    async with opened(made(kind, tmp_path, url)) as before:
        secret = await before.secret()
        await before.set_many([(b"k", b"v", 60.0)])
    async with opened(made(kind, tmp_path, url)) as after:
        assert await after.get_many([b"k"]) == [b"v"]
        assert await after.secret() == secret
        assert len(secret) == 32


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
async def test_what_is_used_unopened_says_so(request, tmp_path, kind):
    cache = made(kind, tmp_path, "redis://127.0.0.1:1")
    for use in (cache.get_many([b"k"]), cache.set_many([(b"k", b"v", None)]), cache.secret()):
        with pytest.raises(Exception, match="not open") as caught:
            await use
        assert type(caught.value).__name__ == "StorageError"
    await cache.aclose()
