"""Deleting in caches: some entries, those of a tenant, all; in memory, in SQLite, in Redis, on a cluster, in tiers."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing

import pytest
from helpers import ask, opened
from redis_server import redis_cluster

import microbatch as mb
from microbatch.caching import entry as entries
from microbatch.caching.guard import secret_of
from microbatch.caching.key import tenant_digest
from microbatch.errors import ConfigError, StorageError
from microbatch.testing import ScriptedTransport

pytestmark = pytest.mark.slow

KINDS = ["memory", "sqlite", "redis", "cluster", "memory over sqlite", "memory over redis"]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    with redis_cluster(tmp_path_factory.mktemp("cluster"), 3) as servers:
        yield servers


@pytest.fixture
def cluster(nodes):
    for server in nodes:
        with server.client() as client:
            client.flushall()
    return nodes[0].url


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """The tests here are about what is kept, not about how soon it comes."""
    for module in ("guard", "tiers"):
        monkeypatch.setattr(f"microbatch.caching.{module}.LIVE_TIMEOUT", 20.0)
    monkeypatch.setattr("microbatch.caching.answer_cache.LIVE_TIMEOUT", 20.0)


@pytest.fixture(params=KINDS)
def make_cache(request, tmp_path):
    """Return a function that returns the cache anew."""

    def one(kind):
        match kind:
            case "memory":
                return mb.MemoryCache()
            case "sqlite":
                return mb.SQLiteCache(tmp_path / "c.sqlite")
            case "redis":
                return mb.RedisCache(request.getfixturevalue("redis_url"), prefix="a[b]*?:")
        return mb.RedisCache(request.getfixturevalue("cluster"))

    tiers = request.param.split(" over ")
    return lambda: one(tiers[0]) if len(tiers) == 1 else mb.TieredCache(*map(one, tiers))


async def kept(cache):
    """Return all entries of the cache, of which each is there once."""
    found = [each async for page in cache.entries() for each in page]
    assert len(dict(found)) == len(found)
    return dict(found)


async def test_all_entries_are_listed_and_those_named_are_deleted(make_cache):
    many = {b"%d" % number: b"of %d" % number for number in range(1_200)}
    async with opened(make_cache()) as cache:
        secret = await secret_of(cache)
        assert await kept(cache) == {}
        assert await cache.delete([b"none"]) == await cache.delete([]) == await cache.clear() == 0
        await cache.set_many([(key, value, 60.0) for key, value in many.items()])
        assert await kept(cache) == many
        assert await cache.delete([b"1", b"none", b"2", b"1199"]) == 3
        assert await cache.get_many([b"0", b"1", b"2", b"1199"]) == [b"of 0", None, None, None]
        assert set(await kept(cache)) == many.keys() - {b"1", b"2", b"1199"}
        assert await cache.clear() == 1_197
        assert await kept(cache) == {}
        assert await cache.get_many(list(many)) == [None] * len(many)
        assert await secret_of(cache) == secret  # other processes keep finding what they store


async def test_what_is_not_of_the_cache_stays(redis_server):
    with redis_server.client() as client:
        others = ("microbatch:cache", "microbatch:spool:names", "other", "a[b]*?:other", "abx?:cache:1")
        for name in others:
            client.set(name, b"v")
        for prefix in ("microbatch:", "a[b]*?:"):
            async with opened(mb.RedisCache(redis_server.url, prefix=prefix)) as cache:
                await cache.secret()
                await cache.set_many([(b"k", b"v", None)])
                assert await kept(cache) == {b"k": b"v"}
                assert await cache.clear() == 1
        names = {name.decode() for name in client.keys()}  # noqa: SIM118 no dict
    assert names == {*others, "microbatch:cache-secret", "a[b]*?:cache-secret"}


async def answered(batcher, *callers):
    routes = []
    for caller in callers:
        (result,) = [each async for each in batcher.map([mb.Request(ask("a"), **caller)])]
        routes.append(result.unwrap().route)
    return routes


CALLERS = [
    {"tenant": "ann"},
    {"tenant": "bob"},
    {"tenant": ""},
    {},
    {"tenant": "ann", "headers": {"authorization": "Bearer x"}},
    {"tenant": "ann", "params": {"seed": 1}},
]


async def test_a_tenant_is_forgotten_and_no_other_is(make_cache):
    cache, transport = make_cache(), ScriptedTransport()
    async with mb.Microbatcher(transport, cache=cache, tokens="bytes") as batcher:
        await answered(batcher, *CALLERS)
        while batcher.stats().cache_stores < len(CALLERS):  # noqa: ASYNC110 nothing else tells
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # for which what was just stored is remembered
        assert await answered(batcher, *CALLERS) == ["cache"] * len(CALLERS)
        assert await cache.clear(tenant="nobody") == 0
        assert await cache.clear(tenant="ann") == 3
        assert await answered(batcher, *CALLERS) == ["single", "cache", "cache", "cache", "single", "single"]


async def test_entries_that_do_not_say_whose_they_are_go_with_any_tenant(make_cache):
    async with opened(make_cache()) as cache:
        secret = await secret_of(cache)

        def entry(tenant):
            digest = None if tenant is None else tenant_digest(tenant, secret)
            return entries.encode(entries.Entry(b"k", "Answer", "m", 0.0, None, 7, 2, 1, None, 1, None, digest))

        earlier = entries.encode(entries.Entry1(b"k", "Answer", "m", 0.0, None, 7, 2, 1))
        values = [(b"a", entry("ann")), (b"b", entry("bob")), (b"0", entry(None)), (b"e", earlier), (b"d", b"damaged")]
        await cache.set_many([(*each, None) for each in values])
        assert await cache.clear(tenant="ann") == 3
        assert set(await kept(cache)) == {b"b", b"0"}


@pytest.mark.parametrize("tenant", [5, b"ann", ["ann"]])
async def test_a_tenant_is_a_name(make_cache, tenant):
    async with opened(make_cache()) as cache:
        with pytest.raises(ConfigError, match="tenant must be a string"):
            await cache.clear(tenant=tenant)


async def test_expired_entries_of_a_file_are_deleted_too_and_no_bytes_of_them_stay(tmp_path):
    path = tmp_path / "c.sqlite"
    async with opened(mb.SQLiteCache(path)) as cache:
        await cache.set_many([(b"expired", b"canary 1 " * 9, 0.0), (b"good", b"canary 2 " * 9, None)])
        await cache.set_many([(b"other", b"kept", None)])
    assert b"canary 2" in path.read_bytes()
    async with opened(mb.SQLiteCache(path)) as cache:
        await cache.delete([b"expired", b"good"])
    assert b"canary" not in path.read_bytes()
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT value FROM entries").fetchall() == [(b"kept",)]


async def test_ids_at_the_ends_of_their_range_are_listed(tmp_path, monkeypatch):
    ids = {b"least": -(2**63), b"most": 2**63 - 1, b"none": 0}
    monkeypatch.setattr("microbatch.caching.sqlite._id", ids.__getitem__)
    async with opened(mb.SQLiteCache(tmp_path / "c.sqlite")) as cache:
        await cache.set_many([(key, b"v", None) for key in ids])
        assert set(await kept(cache)) == ids.keys()


class Foreign:
    """A cache of a user's, which cannot delete."""

    async def get_many(self, keys):
        return [None] * len(keys)

    async def set_many(self, entries):
        pass

    async def aclose(self):
        pass


class Broken(mb.MemoryCache):
    async def delete(self, keys):
        raise StorageError("broken")

    async def erase(self, matches):
        raise StorageError("broken")


async def test_a_tier_that_cannot_delete_is_told_of_before_anything_is_deleted():
    memory = mb.MemoryCache()
    await memory.set_many([(b"k", b"v", None)])
    tiers = mb.TieredCache(memory, Foreign())
    for act in (tiers.clear, lambda: tiers.clear("ann"), lambda: tiers.delete([b"k"])):
        with pytest.raises(ConfigError, match="cannot be deleted in Foreign"):
            await act()
    assert len(memory) == 1


@pytest.mark.parametrize("place", [0, 1])
async def test_a_tier_that_fails_to_delete_keeps_the_others_from_nothing_and_is_told_of(place):
    memory = mb.MemoryCache()
    tiers = mb.TieredCache(*([Broken(), memory] if place == 0 else [memory, Broken()]))
    for act in (tiers.clear, lambda: tiers.delete([b"k"])):
        await memory.set_many([(b"k", b"v", None)])
        with pytest.raises(StorageError, match="broken"):
            await act()
        assert len(memory) == 0


async def test_a_store_that_is_gone_is_an_error(own_redis, tmp_path):
    own_redis.stop()
    async with opened(mb.RedisCache(own_redis.url)) as cache:
        for act in (cache.clear, lambda: cache.clear("ann"), lambda: cache.delete([b"k"])):
            with pytest.raises(StorageError, match="ConnectionError"):
                await act()
    closed = mb.SQLiteCache(tmp_path / "c.sqlite")
    for act in (closed.clear, lambda: closed.clear("ann"), lambda: closed.delete([b"k"])):
        with pytest.raises(StorageError, match="not open"):
            await act()
