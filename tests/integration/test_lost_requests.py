"""A Redis server that drops keys: refused where it may, and nothing that it has lost is waited for in silence."""

from __future__ import annotations

import asyncio

import pytest
from command_line import here, summary  # noqa: F401 a fixture
from helpers import ask, opened
from spools import FULL, HALF, LONG, found, ids, item, items

import microbatch as mb
from microbatch.cli.main import main
from microbatch.errors import ConfigError, DeadlineExceeded, RequestFailed
from microbatch.spool.records import Counts, Found, Item, Job, Name
from microbatch.spool.redis import RedisSpool
from microbatch.testing import ScriptedTransport

pytestmark = pytest.mark.slow


PREFIX = "microbatch:spool:"


def drop(server, *keys):
    """Have the server lose keys, as it does when it is full and its policy allows it."""
    with server.client() as client:
        assert client.delete(*(PREFIX + key for key in keys)) == len(keys)


def key_of(label):
    return f"item:{Name(None, label).key}"


# --- servers that may do so


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random", "volatile-lru", "volatile-ttl"])
async def test_a_server_that_drops_what_it_has_no_room_for_is_refused_unless_that_is_allowed(own_redis, policy, caplog):
    with own_redis.client() as client:
        client.config_set("maxmemory", "100mb")
        client.config_set("maxmemory-policy", policy)
    with pytest.raises(ConfigError, match=rf"{policy}.*noeviction.*allow_eviction=True"):
        await RedisSpool(own_redis.url).open()
    async with opened(RedisSpool(own_redis.url, allow_eviction=True)) as spool:
        assert await spool.put([item("a")]) == ["new"]
    assert policy in caplog.text


@pytest.mark.parametrize(
    "settings",
    [{"maxmemory": "100mb", "maxmemory-policy": "noeviction"}, {"maxmemory": "0", "maxmemory-policy": "allkeys-lru"}],
)
async def test_a_server_that_drops_nothing_is_taken(own_redis, settings):
    with own_redis.client() as client:
        for name, value in settings.items():
            client.config_set(name, value)
    async with opened(RedisSpool(own_redis.url)) as spool:
        assert await spool.put([item("a")]) == ["new"]


async def test_a_server_that_tells_nothing_of_its_memory_is_used_and_that_is_said(redis_url, caplog, monkeypatch):
    """Some managed servers leave that out of INFO."""
    spool = RedisSpool(redis_url)
    connect = spool._connect

    def reticent():
        client = connect()
        tell = client.info

        async def info():
            return {name: value for name, value in (await tell()).items() if "maxmemory" not in name}

        client.info = info
        return client

    monkeypatch.setattr(spool, "_connect", reticent)
    async with opened(spool):
        assert await spool.put([item("a")]) == ["new"]
    assert "could not be checked" in caplog.text


async def test_what_a_server_evicts_is_told_and_all_else_is_answered(own_redis):
    count = 5_000
    async with opened(RedisSpool(own_redis.url)) as spool:
        for begin in range(0, count, 500):
            await spool.put([Item(Name(None, f"{n}"), b"d", b"x" * 300) for n in range(begin, begin + 500)])
    with own_redis.client() as client:
        client.config_set("maxmemory-policy", "volatile-lru")
        with client.pipeline(transaction=False) as pipeline:
            for number in range(
                count
            ):  # so that the server may drop contents only, and which of them is all that chance decides
                pipeline.expire(PREFIX + key_of(f"{number}"), 86_400)
            pipeline.execute()
        client.config_set("maxmemory", int(client.info("memory")["used_memory"] * 0.8))
        client.set("more", b"")
        client.config_set("maxmemory", "100mb")
        evicted = sum(not client.exists(PREFIX + key_of(f"{n}")) for n in range(count))
        assert 100 < evicted < count
    async with opened(RedisSpool(own_redis.url, allow_eviction=True)) as spool:
        counts = await spool.counts()
        assert (counts.waiting, counts.lost) == ((count - evicted, 0, 0), evicted)
        answered = 0
        while taken := await spool.take(FULL, 500, lease=LONG):
            await spool.finish([(delivery, b"answer") for delivery in taken])
            answered += len(taken)
        assert answered == count - evicted
        assert await spool.counts() == Counts(done=answered, lost=evicted)
        with own_redis.client() as client:
            client.delete(PREFIX + key_of(taken_of(client)))
        assert await spool.counts() == Counts(done=answered - 1, lost=evicted + 1)  # an answer


def taken_of(client):
    """Return the id of a request that is answered."""
    return Name.of(client.zrange(PREFIX + "done", 0, 0)[0]).id


# --- requests that are gone


@pytest.fixture
async def spool(redis_url):
    async with opened(RedisSpool(redis_url)) as spool:
        yield spool


LOSSES = {
    "its content": [key_of("p0000")],
    "the queue": ["stage:0"],
    "the queue and the contents": ["stage:0", *(key_of(f"p{number:04}") for number in range(4))],
}


@pytest.mark.parametrize("how", LOSSES)
async def test_a_lost_request_is_known_to_be_and_is_queued_again_when_it_is_put_again(spool, redis_server, how):
    await spool.put(items(4))
    drop(redis_server, *LOSSES[how])
    assert await found(spool, "p0000") == Found("lost")
    others = how == "its content"
    assert (await found(spool, "p0003")).state == ("waiting" if others else "lost")
    taken = await spool.take(FULL, 10, lease=LONG)
    assert ids(taken) == (["p0001", "p0002", "p0003"] if others else [])
    counts = await spool.counts()
    assert (counts.leased, counts.lost) == ((3, 1) if others else (0, 4))
    assert await spool.put(items(4)) == ["new", *["known" if others else "new"] * 3]
    assert (await spool.counts()).lost == 0
    assert ids(await spool.take(FULL, 10, lease=LONG)) == [each.name.id for each in items(1 if others else 4)]
    assert await spool.put([item("p0000", "other")]) == ["conflict"]


async def test_one_that_is_lost_while_a_worker_has_it_is_answered_if_its_content_is_there(spool, redis_server):
    await spool.put(items(3))
    a, b, c = await spool.take(FULL, 3, lease=LONG)
    drop(redis_server, "stage:0", key_of("p0001"))
    await spool.renew([a, b, c], lease=LONG)
    assert [(await found(spool, each.item.name.id)).state for each in (a, b, c)] == ["lost"] * 3
    await spool.finish([(a, b"answer"), (b, b"answer")])
    assert await found(spool, "p0000") == Found("done", b"answer")
    assert await found(spool, "p0001") == Found("lost")
    assert (await spool.counts()).lost == 2
    assert await spool.put([c.item]) == ["new"]
    (again,) = await spool.take(FULL, 10, lease=LONG)
    assert (again.item, again.deliveries) == (c.item, 1)  # losing it was not its fault
    assert (await spool.counts()).lost == 1


async def test_requeueing_puts_lost_requests_back_whose_content_is_there(spool, redis_server):
    await spool.put(items(4))
    await spool.take(FULL, 1, lease=LONG)
    drop(redis_server, "stage:0", key_of("p0001"))
    assert await spool.requeue([Name(None, "p0000"), Name(None, "p0001"), Name(None, "nobody")]) == 1
    assert await spool.requeue() == 2
    assert await spool.requeue() == 0
    assert sorted(ids(await spool.take(FULL, 10, lease=LONG))) == ["p0000", "p0002", "p0003"]
    assert (await spool.counts()).lost == 1


async def test_an_answer_that_is_lost_is_told_and_asked_for_again_when_its_request_is_put_again(spool, redis_server):
    await spool.put(items(1))
    (delivery,) = await spool.take(FULL, 1, lease=LONG)
    await spool.finish([(delivery, b"answer")])
    drop(redis_server, key_of("p0000"))
    assert await found(spool, "p0000") == Found("lost")
    assert await spool.put(items(1)) == ["new"]
    assert ids(await spool.take(FULL, 1, lease=LONG)) == ["p0000"]


async def test_a_dead_letter_is_not_lost_and_what_was_never_put_is_unknown(spool, redis_server):
    await spool.put(items(1))
    for stage in (FULL, HALF):
        await spool.give_back(await spool.take(stage, 1, lease=LONG), error="x", counted=True)
    drop(redis_server, "stage:2")
    assert (await found(spool, "p0000")).state == "lost"
    assert (await found(spool, "nobody")).state == "unknown"
    await spool.put(items(1))
    for _ in range(3):
        await spool.give_back(await spool.take(2, 1, lease=LONG), error="x", counted=True)
    assert (await found(spool, "p0000")).state == "dead"
    assert (await spool.counts()).lost == 0


async def test_a_job_that_is_lost_gives_its_requests_back(spool, redis_server):
    await spool.put(items(3))
    await spool.begin_job(Job("j", b"content"), await spool.take(FULL, 3, lease=LONG), lease=0)
    drop(redis_server, "job:j")
    assert await spool.take_jobs(5, lease=LONG) == []
    counts = await spool.counts()
    assert (counts.waiting, counts.in_job, counts.lost) == ((3, 0, 0), 0, 0)


async def test_a_job_some_of_whose_requests_are_lost_ends_with_the_others(spool, redis_server):
    await spool.put(items(3))
    await spool.begin_job(Job("j", b"content"), await spool.take(FULL, 3, lease=LONG), lease=LONG)
    drop(redis_server, key_of("p0001"))
    assert ids(await spool.job_items("j")) == ["p0000", "p0002"]
    await spool.end_job("j", error="x")
    counts = await spool.counts()
    assert (counts.waiting, counts.in_job, counts.lost) == ((0, 2, 0), 0, 1)
    drop(redis_server, "stage:1", "names", "counter")
    assert await spool.put(items(3)) == ["new"] * 3
    assert [kept.name.id async for kept in spool.export()] == ["p0000", "p0001", "p0002"]


async def test_numbers_go_on_after_the_server_has_lost_them(spool, redis_server):
    """Or pages of an export would overlap, and dead letters come out of order."""
    await spool.put(items(3))
    drop(redis_server, "counter")
    await spool.put([item("last")])
    assert [kept.name.id async for kept in spool.export()] == ["p0000", "p0001", "p0002", "last"]


# --- who waits for them


async def test_who_waits_for_a_lost_request_is_told(redis_server):
    spool = mb.RedisSpool(redis_server.url)
    async with mb.Microbatcher(ScriptedTransport(), spool=spool, tokens="bytes") as batcher:
        for number in range(3):
            await batcher.enqueue(ask(f"q{number}"), id=f"p{number}")
        waiting = asyncio.ensure_future(batcher.result("p1", timeout=30))
        await asyncio.sleep(0.05)
        drop(redis_server, "stage:0")
        with pytest.raises(RequestFailed, match=r"lost.*again") as caught:
            await waiting
        assert not isinstance(caught.value, DeadlineExceeded)
        drop(redis_server, key_of("p2"))
        with pytest.raises(RequestFailed, match="lost"):
            await batcher.result("p2", timeout=0)
        await batcher.enqueue(ask("q1"), id="p1")
        with pytest.raises(DeadlineExceeded):
            await batcher.result("p1", timeout=0)


@pytest.mark.usefixtures("here")
def test_a_worker_that_finds_requests_lost_says_so_and_ends_with_status_1(redis_server, capsys):
    async def put():
        async with mb.Microbatcher(ScriptedTransport(), spool=mb.RedisSpool(redis_server.url)) as batcher:
            for number in range(5):
                await batcher.enqueue(ask(f"q{number}"), id=f"p{number}")

    asyncio.run(put())
    drop(redis_server, key_of("p1"), key_of("p3"))
    worker = ["worker", redis_server.url, "--simulate", "--until-empty", "--json", "--low-max-wait", "0.1"]
    assert main(worker) == 1
    shown = capsys.readouterr()
    assert "2 requests lost" in shown.err
    assert '"answered":3' in shown.out
    assert '"lost":2' in shown.out
    assert main(["spool", redis_server.url, "--json"]) == 0
    assert summary(capsys)["lost"] == 2
    assert main(["spool", redis_server.url]) == 0
    assert "2 requests lost" in capsys.readouterr().out
    asyncio.run(put())
    assert main(worker) == 0
    assert summary(capsys)["lost"] == 0


@pytest.mark.usefixtures("here")
def test_requeueing_all_puts_lost_requests_back(redis_server, capsys):
    async def put():
        async with opened(RedisSpool(redis_server.url)) as spool:
            await spool.put(items(3))

    asyncio.run(put())
    drop(redis_server, "stage:0")
    assert main(["spool", redis_server.url, "--requeue", "--json"]) == 0
    assert summary(capsys)["requeued"] == 3
    assert main(["spool", redis_server.url, "--json"]) == 0
    assert summary(capsys)["waiting_full"] == 3
