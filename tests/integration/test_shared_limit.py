"""One limit for all batchers and processes that name the same Redis server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import subprocess
import sys
import textwrap

import pytest
from fault_proxy import FaultProxy
from helpers import ask, batcher_for, now, until
from redis_server import RedisServer, redis_cluster
from shared_limit import Endpoint, Fleet

import microbatch as mb
from microbatch.testing import Latency, Quota, ScriptedTransport, SimulatedEndpoint
from microbatch.transports import shared_bucket
from microbatch.transports.limit_store import LimitStore

pytestmark = [pytest.mark.slow, pytest.mark.promise(of="shared_limits")]

SECRET = "sk-of-one-account"


def limit_on(url, **limits):
    return mb.RateLimit(**(limits or {"rpm": 6_000}), store=url)


def batcher_on(url, transport=None, *, limit=None, **limits):
    rate_limit = limit or limit_on(url, **limits)
    return batcher_for(transport or ScriptedTransport(), rate_limit=rate_limit, max_batch_size=1, max_wait=0)


async def ask_many(batcher, number, **options):
    return await asyncio.gather(*(batcher.submit(ask(f"{each}"), max_tokens=5, **options) for each in range(number)))


def kept(server, part="state"):
    """Return what the server keeps of each limit."""
    with server.client() as client:
        return {key: client.hgetall(key) for key in client.scan_iter(f"microbatch:limit:*:{part}")}


def used(server):
    return sum(int(state[b"total1"]) for state in kept(server).values())


# --- settings


@pytest.mark.parametrize(
    "store", ["localhost:6379", "http://127.0.0.1:6379", "redis://host:port", "rediscluster://h", ""]
)
def test_an_address_that_is_none_is_a_config_error_with_the_remedy(store):
    with pytest.raises(mb.ConfigError, match="redis://"):
        mb.RateLimit(rpm=10, store=store)


def test_a_store_without_a_limit_is_a_config_error():
    with pytest.raises(mb.ConfigError, match="rpm= or tpm="):
        mb.RateLimit(adaptive=True, store="redis://127.0.0.1:1/0")


def test_the_address_is_not_shown():
    assert "secret" not in repr(mb.RateLimit(rpm=10, store="redis://:secret@127.0.0.1/0"))


async def refused(batcher):
    with pytest.raises(mb.ConfigError) as raised:
        await batcher.open()
    return str(raised.value)


async def test_a_server_that_answers_and_cannot_be_used_is_a_config_error_on_opening(own_redis, tmp_path):
    assert "redis://:PASSWORD@host" in await refused(batcher_on(own_redis.url.replace("/0", "/99")))
    (tmp_path / "other").mkdir()
    primary = ("127.0.0.1", str(own_redis.port))
    with RedisServer(tmp_path / "other", replicaof=" ".join(primary)) as replica:
        assert "the address of the primary" in await refused(batcher_on(replica.url))
    with own_redis.client() as client:
        client.config_set("requirepass", "x")
    assert "password" in await refused(batcher_on(own_redis.url))
    async with SimulatedEndpoint() as endpoint:
        web = endpoint.base_url.replace("http", "redis").replace("/v1", "/0")
        assert "redis://" in await refused(batcher_on(web))


async def test_one_loop_at_a_time(redis_server):
    limit = limit_on(redis_server.url)

    def elsewhere():
        async def use():
            with pytest.raises(mb.ConfigError, match="one event loop"):
                async with batcher_on("", limit=limit) as other:
                    await other.submit(ask("a"))

        asyncio.run(use())

    async with batcher_on("", limit=limit) as batcher:
        await batcher.submit(ask("a"))
        await asyncio.to_thread(elsewhere)
        await batcher.submit(ask("b"))
    async with batcher_on("", limit=limit) as batcher:
        await batcher.submit(ask("c"))


# --- one limit


async def test_batchers_of_several_objects_share_and_the_server_knows_what_was_sent(redis_server):
    async with batcher_on(redis_server.url) as one, batcher_on(redis_server.url) as other:
        await asyncio.gather(ask_many(one, 30), ask_many(other, 20))
        (members,) = kept(redis_server, "members").values()
        assert len(members) == 2
    assert kept(redis_server, "members") == {}
    assert used(redis_server) == 50


async def test_what_one_has_used_another_has_not(redis_server):
    limits = {"rpm": 600}
    async with batcher_on(redis_server.url, **limits) as one:
        await ask_many(one, 12)  # the burst
    async with batcher_on(redis_server.url, **limits) as other:
        begun = now()
        await ask_many(other, 12)
        assert now() - begun > 0.5 * 12 / (600 / 60)


async def test_most_requests_wait_for_no_round_trip(redis_server):
    async with batcher_on(redis_server.url, rpm=100_000, tpm=10**9) as batcher:
        await batcher.submit(ask("a"))
        with redis_server.client() as client:
            client.config_resetstat()
        for _ in range(3):
            await ask_many(batcher, 300)
        with redis_server.client() as client:
            calls = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    assert calls < 60


async def test_what_was_drawn_and_is_not_used_goes_back_when_idle_and_on_closing(redis_server):
    def held():
        return [
            list(map(float, text.split()))[2] for text in next(iter(kept(redis_server, "members").values())).values()
        ]

    async with batcher_on(redis_server.url, rpm=100_000) as batcher:
        for _ in range(4):
            await ask_many(batcher, 100)
        await until(lambda: held() == [0])
        await ask_many(batcher, 100)
    assert kept(redis_server, "members") == {}
    assert used(redis_server) == 500


async def test_each_endpoint_model_and_key_has_limits_of_its_own_and_the_key_is_not_shown(redis_server):
    async def use(base_url, key, model="m", **options):
        transport = mb.OpenAIChat(model, base_url=base_url, api_key=key)
        async with batcher_on(redis_server.url, transport) as batcher:
            await batcher.submit(ask("a"), **options)

    async with SimulatedEndpoint() as one, SimulatedEndpoint() as other:
        for _ in range(2):
            await use(one.base_url, SECRET)
        assert len(kept(redis_server)) == 1
        await use(one.base_url, "sk-another")
        await use(one.base_url, SECRET, model="n")
        await use(other.base_url, SECRET)
        await use(one.base_url, SECRET, headers={"authorization": "Bearer sk-of-a-caller"})
        await use(one.base_url, "sk-another", headers={"authorization": "Bearer sk-of-a-caller"})
    assert len(kept(redis_server)) == 5
    with redis_server.client() as client:
        for key in client.scan_iter():
            assert b"sk-" not in key
            assert b"sk-" not in client.dump(key)
            assert client.ttl(key) > 0


async def test_a_cluster_serves_several_limits(tmp_path):
    with redis_cluster(tmp_path, 3) as nodes:
        async with batcher_on(nodes[0].url) as one, batcher_on(nodes[-1].url) as other:
            for model in "abcdef":  # some on each node
                await asyncio.gather(ask_many(one, 5, model=model), ask_many(other, 5, model=model))
        assert sum(map(used, nodes)) == 60
        assert sum(bool(kept(node)) for node in nodes) > 1


async def test_the_endpoint_never_has_to_refuse(redis_server):
    async with SimulatedEndpoint(quota=Quota(rpm=600, tpm=10**6)) as endpoint:
        batchers = [
            batcher_on(
                redis_server.url, mb.OpenAIChat("m", base_url=endpoint.base_url, api_key=SECRET), rpm=600, tpm=10**6
            )
            for _ in range(3)
        ]
        async with contextlib.AsyncExitStack() as stack:
            for batcher in batchers:
                await stack.enter_async_context(batcher)
            await asyncio.gather(*(ask_many(batcher, 15) for batcher in batchers))
            assert [batcher.stats().rate_limited for batcher in batchers] == [0, 0, 0]
        assert endpoint.quota_refusals == 0


async def test_what_others_use_of_the_endpoints_limit_is_known_to_all(redis_server):
    """The endpoint's headers show one process that somebody without the limit has used it up."""
    async with SimulatedEndpoint(quota=Quota(rpm=100)) as endpoint:
        transport = mb.OpenAIChat("m", base_url=endpoint.base_url, api_key=SECRET)
        async with batcher_for(transport, max_batch_size=1) as stranger:
            await ask_many(stranger, 98)
        transports = [mb.OpenAIChat("m", base_url=endpoint.base_url, api_key=SECRET) for _ in range(2)]
        one, other = (batcher_on(redis_server.url, each, rpm=100) for each in transports)
        async with one, other:
            await one.submit(ask("a"))
            await until(lambda: any(float(state[b"others1"]) > 90 for state in kept(redis_server).values()))
            with pytest.raises(mb.DeadlineExceeded):
                await asyncio.gather(*(other.submit(ask(f"{number}"), timeout=2.0) for number in range(3)))
            assert other.stats().rate_limited == 0


# --- outages


async def test_a_process_that_never_reached_the_server_waits_and_says_why(own_redis, caplog):
    own_redis.kill()
    transport = ScriptedTransport()
    async with batcher_on(own_redis.url, transport) as batcher:
        with pytest.raises(mb.DeadlineExceeded, match="was never reached, and no request is sent before it is"):
            await batcher.submit(ask("a"), timeout=1.5)
        waiting = asyncio.ensure_future(batcher.submit(ask("b")))
        await asyncio.sleep(0.5)
        assert not transport.calls
        own_redis.start()
        await waiting
    assert (
        len(
            [
                record
                for record in caplog.records
                if record.levelno == logging.WARNING and "rate limit" in record.message
            ]
        )
        == 1
    )


async def test_a_process_that_has_lost_the_server_goes_on_and_comes_back(own_redis):
    async with batcher_on(own_redis.url, rpm=6_000) as one, batcher_on(own_redis.url, rpm=6_000) as other:
        await asyncio.gather(ask_many(one, 5), ask_many(other, 5))
        await asyncio.sleep(1.2)  # so that both know of each other
        await asyncio.gather(ask_many(one, 5), ask_many(other, 5))
        own_redis.pause()
        await asyncio.wait_for(ask_many(one, 100), 30)
        own_redis.resume()
        await asyncio.wait_for(ask_many(other, 10), 30)
        await until(lambda: used(own_redis) >= 130)
    assert used(own_redis) == 130


async def test_a_server_that_lost_its_data_is_told_all_again(own_redis):
    async with batcher_on(own_redis.url, rpm=6_000) as batcher:
        await ask_many(batcher, 40)
        own_redis.kill()
        own_redis.start()
        await ask_many(batcher, 3)
        await until(lambda: used(own_redis) == 43)


async def test_a_slow_server_delays_and_loses_nothing(redis_server):
    async with FaultProxy(redis_server.port, ["delay"]) as proxy:
        url = proxy.base_url.replace("http", "redis").replace("/v1", "/0")
        async with batcher_on(url) as one, batcher_on(redis_server.url) as other:
            await asyncio.gather(ask_many(one, 40), ask_many(other, 40))
    assert used(redis_server) == 80


async def test_closing_while_the_server_hangs_ends(own_redis):
    async with batcher_on(own_redis.url) as batcher:
        await batcher.submit(ask("a"))
        own_redis.pause()
        begun = now()
    assert now() - begun < 20
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "microbatch limit"]


async def test_a_request_that_comes_while_an_idle_process_takes_leave_is_answered(own_redis, monkeypatch):
    leaving, leave = asyncio.Event(), LimitStore._leave

    async def seen(*args):
        leaving.set()
        await leave(*args)

    monkeypatch.setattr(LimitStore, "_leave", seen)
    monkeypatch.setattr(shared_bucket, "LEAVE", 0.2)
    async with batcher_on(own_redis.url) as batcher:
        await batcher.submit(ask("a"))
        own_redis.pause()
        await asyncio.wait_for(leaving.wait(), 30)
        late = asyncio.ensure_future(batcher.submit(ask("b")))
        await asyncio.sleep(0.1)
        own_redis.resume()
        assert (await asyncio.wait_for(late, 30)).output


async def test_what_a_bucket_held_before_is_of_another_member(redis_server):
    limit = mb.RateLimit(rpm=6_000, store=redis_server.url)
    await limit.shared.open()
    bucket = limit.bucket("key", now())
    await limit.shared.aclose()
    bucket._held, bucket._epoch = [5, 0], "1-a"  # as in a process that was forked while requests were waiting
    await limit.shared.open()
    try:
        assert limit.bucket("key", now()) is bucket
        assert bucket.wait(0, now()) > 0
    finally:
        await limit.shared.aclose()


# --- processes


def test_processes_that_were_forked_with_a_limit_in_use_before_are_members_of_their_own(redis_server):
    program = """
        import asyncio, os, sys
        import microbatch as mb
        from microbatch.testing import SimulatedModel, SimulatedTransport
        limit = mb.RateLimit(rpm=6_000, store=sys.argv[1])
        async def use(number, then=lambda: None):
            policy = mb.FlushPolicy(max_batch_size=1)
            async with mb.Microbatcher(SimulatedTransport(SimulatedModel()), policy=policy, rate_limit=limit) as batcher:
                await asyncio.gather(*(batcher.submit([{"role": "user", "content": f"{n}"}]) for n in range(number)))
                await asyncio.to_thread(then)
        asyncio.run(use(3))
        for number in range(2):
            if os.fork() == 0:
                def hold():
                    print("up", flush=True)
                    sys.stdin.buffer.raw.read(1)
                asyncio.run(use(10, hold))
                os._exit(0)
        print(*(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)))
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program), redis_server.url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert [process.stdout.readline() for _ in range(2)] == ["up\n"] * 2
        (members,) = kept(redis_server, "members").values()
        assert len(members) == 2
        assert process.communicate("xx", timeout=60)[0] == "0 0\n"
    assert used(redis_server) == 23


async def test_processes_that_come_go_and_are_killed_keep_the_limit_and_use_it(own_redis):
    """Some seconds of real time; `shared_limit.py` has the long form, in which the minute is full."""
    rpm, loop = 6_000, asyncio.get_running_loop()
    async with Endpoint(quota=Quota(rpm=rpm, tpm=10**6), latency=Latency(first_token=0.1)) as endpoint:
        fleet = Fleet(endpoint.base_url, own_redis.url, rpm, 10**6, "requests")
        try:
            await fleet.start(3)
            await until(lambda: all(len(members) == 3 for members in kept(own_redis, "members").values()))
            await until(lambda: len(endpoint.let_in) > 0.03 * rpm)  # the burst is used up
            begin = loop.time()
            await asyncio.sleep(2)
            await fleet.end(signal.SIGKILL)
            await fleet.end(signal.SIGTERM)
            await fleet.start(2)
            await asyncio.sleep(6)
            own_redis.pause()
            await asyncio.sleep(2)
            own_redis.resume()
            await until(lambda: endpoint.used(loop.time() - 3, loop.time())[0] > 0.6 * 3 * rpm / 60)
            end = loop.time()
        finally:
            await fleet.end_all()
    assert endpoint.quota_refusals == 0
    burst = 0.02 * rpm
    assert endpoint.used(begin, end)[0] <= burst + rpm / 60 * (end - begin)
