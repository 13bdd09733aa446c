"""Kinds of Redis servers: clusters, replicas, users with few rights, addresses of several schemes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

import pytest
from helpers import ask
from redis_server import RedisServer, redis_cluster

import microbatch as mb
from microbatch.caching.redis import RedisCache
from microbatch.errors import ConfigError, StorageError
from microbatch.spool.payload import Payload
from microbatch.spool.records import Name
from microbatch.spool.redis import RedisSpool
from microbatch.storage.address import client_address, is_address, is_nearly_address
from microbatch.testing import ScriptedTransport

pytestmark = pytest.mark.slow

KEYS = [b"%d" % number for number in range(300)]


@contextlib.asynccontextmanager
async def opened(store):
    await store.open()
    try:
        yield store
    finally:
        await store.aclose()


def an_item():
    return Payload.of(ask("a")).item(Name(None, "a"))


# --- clusters


@pytest.fixture(scope="module", params=[1, 3])
def nodes(request, tmp_path_factory):
    with redis_cluster(tmp_path_factory.mktemp("cluster"), request.param) as servers:
        yield servers


@pytest.fixture
def cluster(nodes):
    """Return the addresses of the nodes of an empty cluster."""
    for server in nodes:
        with server.client() as client:
            client.flushall()
    return [server.url for server in nodes]


async def test_a_cluster_keeps_what_any_of_its_nodes_is_told(cluster):
    async with opened(RedisCache(cluster[0])) as one, opened(RedisCache(cluster[-1])) as other:
        assert await one.secret() == await other.secret()
        await one.set_many([(key, b"of " + key, 60.0) for key in KEYS])
        assert await other.get_many([*KEYS, b"none"]) == [*(b"of " + key for key in KEYS), None]
        await other.set_many([(key, b"new", None) for key in KEYS[:2]] + [(KEYS[2], b"never", 0.0)])
        assert await one.get_many(KEYS[:4]) == [b"new", b"new", None, b"of 3"]


async def test_each_node_of_a_cluster_has_its_part(cluster, nodes):
    async with opened(RedisCache(cluster[0])) as cache:
        await cache.set_many([(key, b"v", None) for key in KEYS])
    sizes = []
    for server in nodes:
        with server.client() as client:
            sizes.append(client.dbsize())
    assert sum(sizes) == len(KEYS)
    assert min(sizes) >= len(KEYS) // len(nodes) // 2


async def test_a_batcher_is_served_from_a_cluster(cluster):
    transport = ScriptedTransport()
    async with mb.Microbatcher(transport, cache=RedisCache(cluster[0]), tokens="bytes") as batcher:
        for _ in range(2):
            results = [result.unwrap() async for result in batcher.map([ask(f"text {n}") for n in range(150)])]
            asked = len(transport.calls)
            while batcher.stats().cache_stores < 150:  # noqa: ASYNC110 of the first round
                await asyncio.sleep(0.01)
        assert {reply.route for reply in results} == {"cache"}
        assert len(transport.calls) == asked
        assert batcher.stats().cache_bypassed == 0


async def test_many_callers_of_a_cluster_wait_for_its_connections(cluster):
    async with opened(RedisCache(cluster[0], max_connections=2)) as cache:
        await cache.set_many([(key, b"v" + key, 60.0) for key in KEYS])
        found = await asyncio.gather(*(cache.get_many([key, b"none"]) for key in KEYS))
        assert found == [[b"v" + key, None] for key in KEYS]


async def test_cancelled_look_ups_in_a_cluster_mix_no_answers(cluster):
    async with opened(RedisCache(cluster[0], max_connections=4)) as cache:
        await cache.set_many([(key, b"v" + key, 60.0) for key in KEYS])
        right = 0
        for turn in range(30):
            tasks = [asyncio.ensure_future(cache.get_many([key, KEYS[-1]])) for key in KEYS[:20]]
            for task in tasks[turn % 3 :: 3]:
                asyncio.get_running_loop().call_later(turn / 10_000, task.cancel)
            for key, task in zip(KEYS, tasks, strict=False):
                with contextlib.suppress(asyncio.CancelledError):
                    assert await task == [b"v" + key, b"v" + KEYS[-1]]
                    right += 1
        assert right >= 30 * 20 // 2


async def test_a_spool_on_a_cluster_is_refused(cluster):
    with pytest.raises(ConfigError, match="not part of a cluster"):
        await RedisSpool(cluster[0]).open()


async def test_a_server_that_does_not_know_hello_is_seen_by_info(tmp_path):
    """As before Redis 6, and behind some proxies."""
    with redis_cluster(tmp_path, 1, rename_command="HELLO UNSAID") as (server,):
        async with opened(RedisCache(server.url)) as cache:
            await cache.set_many([(key, b"v", None) for key in KEYS])
            assert await cache.get_many(KEYS) == [b"v"] * len(KEYS)
        with pytest.raises(ConfigError, match="not part of a cluster"):
            await RedisSpool(server.url).open()
    (tmp_path / "alone").mkdir()
    with RedisServer(tmp_path / "alone", rename_command="HELLO UNSAID") as server:
        async with opened(RedisCache(server.url)) as cache:
            await cache.set_many([(b"k", b"v", None)])
            assert await cache.get_many([b"k", b"l"]) == [b"v", None]
        async with opened(RedisSpool(server.url)) as spool:
            assert await spool.put([an_item()]) == ["new"]


# --- replicas


@pytest.fixture
def replica(own_redis, tmp_path):
    """Return the address of a server that copies another."""
    with own_redis.client() as client:
        client.config_set("repl-diskless-sync-delay", 0)
    (folder := tmp_path / "replica").mkdir()
    with RedisServer(folder, replicaof=f"127.0.0.1 {own_redis.port}") as server, server.client() as client:
        deadline = time.monotonic() + 40
        while client.info("replication")["master_link_status"] != "up":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield server.url


async def test_a_spool_on_a_replica_is_refused(replica):
    with pytest.raises(ConfigError, match=r"is a replica.*address of the primary"):
        await RedisSpool(replica).open()


async def test_a_cache_on_a_replica_is_told_of_when_it_opens_and_has_the_answers(own_redis, replica, caplog):
    transport = ScriptedTransport()
    async with mb.Microbatcher(transport, cache=RedisCache(own_redis.url), tokens="bytes") as batcher:
        await batcher.warm([ask("a")])
        while batcher.stats().cache_stores < 1:  # noqa: ASYNC110 nothing else tells
            await asyncio.sleep(0.01)
    with own_redis.client() as client:
        client.wait(1, 40_000)
    with caplog.at_level(logging.WARNING, logger="microbatch"):
        async with mb.Microbatcher(transport, cache=RedisCache(replica), tokens="bytes") as batcher:
            assert "read-only replica" in caplog.text
            assert [result.unwrap().route async for result in batcher.map([ask("a")])] == ["cache"]
    assert caplog.text.count("read-only replica") == 1
    async with opened(RedisCache(replica)) as cache:
        with pytest.raises(StorageError, match=r"You can't write against a read only replica\."):
            await cache.set_many([(b"k", b"v", None)])


# --- users with few rights


@contextlib.contextmanager
def user(server, *commands, keys="*"):
    """Yield the address for a user who may send these commands only."""
    with server.client() as client:
        client.acl_setuser("few", enabled=True, passwords="+pw", keys=[keys], commands=list(commands))
        try:
            yield server.url.replace("//", "//few:pw@")
        finally:
            client.acl_deluser("few")


@pytest.mark.parametrize("command", ["mget", "get"])
async def test_a_refusal_names_the_command(redis_server, command):
    with user(redis_server, "+@all", f"-{command}") as url:
        async with opened(RedisCache(url)) as cache:
            with pytest.raises(StorageError, match=f"no permissions to run the '{command}' command"):
                await (cache.secret() if command == "get" else cache.get_many([b"k"]))


async def test_a_user_without_scripts_is_not_told_of_another_version(redis_server):
    with user(redis_server, "+@read", "+@write", "+@connection") as url:
        async with opened(RedisCache(url)) as cache:
            await cache.set_many([(b"k", b"v", None)])
            assert await cache.get_many([b"k"]) == [b"v"]
        with pytest.raises(ConfigError, match=r"no permissions to run the 'script\|load' command") as caught:
            await RedisSpool(url).open()
    assert "7.0" not in str(caught.value)


async def test_other_keys_than_the_users_are_refused_in_full(redis_server):
    with user(redis_server, "+@all", keys="other:*") as url:
        async with opened(RedisCache(url)) as cache:
            with pytest.raises(StorageError, match="no permissions to access one of the keys"):
                await cache.get_many([b"canary"])
        async with opened(RedisSpool(url)) as spool:
            with pytest.raises(StorageError, match="can't access at least one of the keys") as caught:
                await spool.put([an_item()])
    assert "canary" not in str(caught.value)


async def test_what_a_server_quotes_of_a_command_is_left_out(redis_server):
    """An apostrophe begins no quotation; what is quoted may be a caller's."""
    async with opened(RedisCache(redis_server.url)) as cache:
        with pytest.raises(StorageError) as caught:
            async with cache._in_use() as client:
                await client.execute_command("CANARY", "canary")
    assert str(caught.value) == "Redis: ResponseError: unknown command"
    assert "canary" not in str(caught.value.__cause__).lower()


# --- addresses


async def test_valkeys_scheme_is_that_of_redis(redis_server):
    async with opened(RedisCache(redis_server.url.replace("redis", "VALKEY"))) as cache:
        await cache.set_many([(b"k", b"v", None)])
        assert await cache.get_many([b"k"]) == [b"v"]
    assert client_address("valkeys://u:p@h:1/2?a=b") == "rediss://u:p@h:1/2?a=b"
    assert client_address("Unix:///run/redis.sock") == "unix:///run/redis.sock"
    for place in ("h", "h/", "h:1/15", "h:1/?db=3", "[::1]:1/0"):
        assert client_address(f"redis://{place}") == f"redis://{place}"


@pytest.mark.parametrize("option", ["decode_responses=true", "protocol=3", "protocol=3&health_check_interval=1"])
async def test_options_of_an_address_change_no_answers(redis_server, cluster, option):
    for url in (redis_server.url, cluster[0]):
        async with opened(RedisCache(f"{url}?{option}")) as cache:
            await cache.set_many([(b"k", b"\xff\x00", None)])
            assert await cache.get_many([b"k", b"l"]) == [b"\xff\x00", None]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("redis+sentinel://user:canary@h:1/mymaster", "Sentinels are not asked"),
        ("redis-sentinel://h", "Sentinels are not asked"),
        ("redis+cluster://h", "the address of any node"),
        ("memcached://canary@h", r"unknown scheme memcached://.*redis://, rediss://, unix://"),
        ("127.0.0.1:6379", "no scheme"),
        ("redis://h:1/canary", "no database number.*redis://host:6379/0"),
        ("rediss://u:canary@h:1/1/2", "no database number"),
        ("valkey://h/-1", "no database number"),
        ("redis://:a/canary@h:1/0", "a / within a password as %2F"),
        ("redis://u:canary@h:port/0", "its port or an option cannot be read"),
        ("redis://u:canary@h:1?db=x", "its port or an option cannot be read"),
    ],
)
@pytest.mark.parametrize("store", [RedisCache, RedisSpool])
def test_an_address_of_another_kind_is_refused_in_words(store, address, words):
    with pytest.raises(ConfigError, match=words) as caught:
        store(address)
    assert "canary" not in str(caught.value)


def test_what_is_an_address_and_what_is_nearly_one():
    for place in ("redis://h", "REDISS://h", "valkey://h", "redis+sentinel://h", "http://h", "unix:///s"):
        assert is_address(place)
    for place in ("a.sqlite", "/a/b", "./redis:6379", "c:/x", "a:b", "12:30 notes.sqlite", ""):
        assert not is_address(place)
        assert not is_nearly_address(place)
    for place in ("127.0.0.1:6379", "localhost:6379/0", "redis.local:1", "redis:/h", "valkey:h:1", "unix:/s"):
        assert not is_address(place)
        assert is_nearly_address(place)
