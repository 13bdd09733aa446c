"""A Redis server without room: what is new is refused, and what is there is served to the last request."""

from __future__ import annotations

import asyncio

import pytest
from helpers import ask, opened
from spools import ALONE, FULL, HALF, LONG, found, ids, item, items

import microbatch as mb
from microbatch.errors import StorageError
from microbatch.spool.records import Counts, Found, Item, Job, Name, Stage
from microbatch.spool.redis import RedisSpool
from microbatch.spool.worker import Worker
from microbatch.testing import ScriptedTransport

pytestmark = pytest.mark.slow


TEXT = "x" * 500
PATIENCE = 60.0


def fill_up(server, *, policy="noeviction"):
    """Leave no room at all."""
    with server.client() as client:
        client.config_set("maxmemory-policy", policy)
        client.config_set("maxmemory", "1mb")


async def put_until_refused(spool, limit):
    """Put requests until the server has no room for more; return how many it has taken."""
    put = 0
    with pytest.raises(StorageError, match="OutOfMemory"):
        while put < limit:
            some = [Item(Name(None, f"{put + each}"), b"d", TEXT.encode()) for each in range(100)]
            assert await spool.put(some) == ["new"] * 100
            put += 100
    return put


@pytest.mark.parametrize("size", [10, 4_000], ids=["short answers", "answers longer than the questions"])
async def test_a_server_filled_to_refusal_is_drained_to_the_last_request(own_redis, size):
    with own_redis.client() as client:
        client.config_set("maxmemory", "8mb")
    async with opened(RedisSpool(own_redis.url)) as spool:
        put = await put_until_refused(spool, 100_000)
        with own_redis.client() as client:
            client.script_flush()
    async with opened(RedisSpool(own_redis.url)) as spool:  # a worker that comes only now
        left = put
        while left:
            taken = await spool.take(FULL, 256, lease=LONG)
            assert taken
            await spool.renew(taken, lease=LONG)
            await spool.give_back(taken[:2], error="x", counted=False)
            await spool.finish([(delivery, b"a" * size) for delivery in taken[2:] or taken])
            left -= len(taken[2:] or taken)
        counts = await spool.counts()
        assert (counts.done, counts.depth, counts.lost) == (put, 0, 0)
        assert (await found(spool, "0")).result == b"a" * size


async def test_a_worker_drains_it(own_redis):
    with own_redis.client() as client:
        client.config_set("maxmemory", "4mb")
    spool = RedisSpool(own_redis.url)
    async with mb.Microbatcher(ScriptedTransport(answer=str.upper), spool=RedisSpool(own_redis.url)) as batcher:
        put = 0
        with pytest.raises(StorageError, match="OutOfMemory"):
            while put < 50_000:
                await asyncio.gather(*(batcher.enqueue(ask(f"{put + n} {TEXT}"), id=f"{put + n}") for n in range(50)))
                put += 50
        await spool.open()
        worker = Worker(spool, dict.fromkeys(Stage, (batcher, 64)), until_empty=True)
        async with asyncio.timeout(PATIENCE):
            await worker.run()
        counts = await spool.counts()
        assert counts.done >= put > 0
        assert counts == Counts(done=counts.done)
        assert (await batcher.result("7", timeout=0)).output == f"7 {TEXT}".upper()
        await spool.aclose()


async def test_all_that_takes_a_request_on_its_way_is_done_and_nothing_new_is_taken(own_redis):
    async with opened(RedisSpool(own_redis.url, max_alone=1)) as spool:
        await spool.put(items(8))
        fill_up(own_redis)
        with pytest.raises(StorageError, match="OutOfMemory"):
            await spool.put([item("x")])
        a, b, c, d = await spool.take(FULL, 4, lease=LONG)
        await spool.finish([(a, b"answer")])
        await spool.give_back([b], error="x", counted=True)
        assert ids(await spool.take(HALF, 1, lease=0)) == ["p0001"]
        assert ids(await spool.take(ALONE, 1, lease=0)) == ["p0001"]  # its lease ran out
        assert [letter.item.name.id async for letter in spool.dead_letters()] == ["p0001"]
        assert await spool.requeue() == 1
        await spool.begin_job(Job("j", b"content"), [c, d], lease=0)
        assert [job.token for job in await spool.take_jobs(1, lease=LONG)] == ["j"]
        await spool.update_job(Job("j", b"content", "batch-1"))
        await spool.renew_jobs(["j"], lease=LONG)
        assert ids(await spool.job_items("j")) == ["p0002", "p0003"]
        await spool.finish([(c, b"answer")])
        await spool.end_job("j", error="y")
        counts = await spool.counts()
        assert (counts.waiting, counts.leased, counts.done, counts.dead) == ((5, 1, 0), 0, 2, 0)
        assert await found(spool, "p0000") == Found("done", b"answer")
        assert len([kept async for kept in spool.export()]) == 8


async def test_a_store_that_is_refused_hurts_no_caller_and_hits_go_on(own_redis):
    transport = ScriptedTransport()
    async with mb.Microbatcher(transport, cache=mb.RedisCache(own_redis.url), tokens="bytes") as batcher:
        await batcher.warm([ask("known")])
        fill_up(own_redis)
        for number in range(5):
            assert (await batcher.submit(ask(f"q{number}"))).output == f"Q{number}"
            assert [result.unwrap().output async for result in batcher.map([ask(f"m{number}")])] == [f"M{number}"]
            assert (await batcher.submit(ask("known"))).output == "KNOWN"
        assert "known" not in [text for call in transport.calls[1:] for _, text in call.items]
