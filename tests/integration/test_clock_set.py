"""A wall clock that is set while a spool or a cache is in use: by NTP, by hand, or because the machine was asleep."""

from __future__ import annotations

import contextlib
import sqlite3
import time

import pytest
from helpers import opened
from spools import ALONE, FULL, HALF, found, ids, items

from microbatch.caching.sqlite import MAX_CLOCK_SKEW, SQLiteCache
from microbatch.spool.records import OVERDUE, Counts, Job
from microbatch.spool.redis import RedisSpool
from microbatch.spool.sqlite import SQLiteSpool

HOUR = 3_600.0
DAY = 86_400.0
YEAR = 365 * DAY
LEASE = 60.0
KEEP = 100.0


class SQLiteSpools:
    """Spools over one file, whose clock is the test's."""

    def __init__(self, path):
        self._path = path
        self.now = time.time()

    def make(self):
        spool = SQLiteSpool(self._path, keep=KEEP)
        spool._now = lambda: self.now
        return spool

    def go_on(self, seconds):
        """Let *seconds* pass, or set the clock by as much: no process can tell the one from the other."""
        self.now += seconds


class RedisSpools:
    """Spools on one server, whose clock is the test's: all that the scripts learn of the time is in TIME and in idle times."""

    def __init__(self, server):
        self._server = server

    def make(self):
        return RedisSpool(self._server.url, keep=KEEP)

    def go_on(self, seconds):
        """Move all times that the server keeps by as much the other way, which is the same."""
        ms = round(seconds * 1000)
        with self._server.client() as client:
            for stage in range(3):
                key = f"microbatch:spool:stage:{stage}"
                if client.exists(key):
                    for each in client.xpending_range(key, "workers", "-", "+", 1000):
                        idle = max(0, each["time_since_delivered"] + ms)
                        client.xclaim(key, "workers", each["consumer"], 0, [each["message_id"]], idle=idle, justid=True)
            for index in ("jobs", "done", "open"):
                for name, score in client.zrange(f"microbatch:spool:{index}", 0, -1, withscores=True):
                    client.zadd(f"microbatch:spool:{index}", {name: score - ms})
            for key in client.keys("microbatch:spool:item:*"):
                if client.pttl(key) > 0:
                    client.pexpire(key, client.pttl(key) - ms)
            seen = client.hget("microbatch:spool:clock", "seen")
            if seen is not None:
                client.hset("microbatch:spool:clock", "seen", int(seen) - ms)


@pytest.fixture(params=["sqlite", "redis"])
def clock(request, tmp_path):
    if request.param == "sqlite":
        return SQLiteSpools(tmp_path / "s")
    return RedisSpools(request.getfixturevalue("redis_server"))


@pytest.fixture
async def spools(clock):
    """Two spools, as two processes have them, with four requests in them."""
    async with opened(clock.make()) as one, opened(clock.make()) as other:
        await one.put(items(4))
        yield one, other


async def everything(spool):
    """Take what there is; return what was found at each stage."""
    return [ids(await spool.take(stage, 10, lease=LEASE)) for stage in (FULL, HALF, ALONE)]


async def test_time_that_passes_ends_leases(clock, spools):
    """The rule, for which the tests below are the exceptions."""
    one, other = spools
    await one.take(FULL, 4, lease=LEASE)
    clock.go_on(LEASE - 2)
    assert await everything(other) == [[], [], []]
    clock.go_on(4)
    assert await everything(other) == [[], ["p0000", "p0001", "p0002", "p0003"], []]


@pytest.mark.parametrize("ahead", [30.0, HOUR, YEAR])
async def test_after_the_clock_was_set_back_leases_end_in_their_time(clock, spools, ahead):
    one, other = spools
    clock.go_on(ahead)
    held = await one.take(FULL, 3, lease=LEASE)
    await one.renew(held[:1], lease=LEASE)
    clock.go_on(-ahead)
    assert await everything(other) == [["p0003"], [], []]
    clock.go_on(LEASE + 2)
    assert sorted((await everything(other))[1]) == ["p0000", "p0001", "p0002", "p0003"]


async def test_leases_that_are_longer_than_those_of_others_are_kept(clock, spools):
    one, other = spools
    await one.take(FULL, 2, lease=10 * LEASE)
    clock.go_on(HOUR)
    clock.go_on(-HOUR)
    await other.take(FULL, 2, lease=LEASE)
    clock.go_on(LEASE + 2)
    assert (await everything(other))[1] == ["p0002", "p0003"]


@pytest.mark.parametrize("ahead", [2 * OVERDUE, HOUR, 10 * DAY])
async def test_after_the_clock_was_set_forward_a_worker_that_lives_keeps_what_it_has(clock, spools, ahead):
    one, other = spools
    a, b, c, d = await one.take(FULL, 4, lease=LEASE)
    clock.go_on(ahead)
    assert await everything(other) == [[], [], []]
    counts = await other.counts()
    assert (counts.waiting, counts.leased) == ((0, 0, 0), 4)
    await one.renew([a, b], lease=LEASE)
    await one.finish([(c, b"answer")])
    clock.go_on(LEASE - 2)
    await one.renew([a], lease=LEASE)
    clock.go_on(4)
    assert await everything(other) == [[], ["p0001", "p0003"], []]  # which nobody has renewed
    assert d.deliveries == 1


async def test_who_was_given_time_once_is_not_given_it_again_and_again(clock, spools):
    """Or where a worker comes once a day, nothing would ever be taken for lost."""
    one, other = spools
    await one.take(FULL, 1, lease=LEASE)
    for _ in range(2):
        clock.go_on(DAY)
        counts = await other.counts()
        found = await other.take(HALF, 1, lease=LEASE)
    assert counts.waiting == (3, 1, 0)
    assert ids(found) == ["p0000"]
    clock.go_on(DAY)
    assert await other.take(ALONE, 1, lease=LEASE) == []
    clock.go_on(LEASE + 2)
    assert ids(await other.take(ALONE, 1, lease=LEASE)) == ["p0000"]


@pytest.mark.parametrize("ahead", [HOUR, YEAR])
async def test_jobs_and_answers_that_seem_to_last_longer_than_any_are_cut(clock, spools, ahead):
    one, other = spools
    clock.go_on(ahead)
    done, tied = await one.take(FULL, 2, lease=LEASE)
    await one.begin_job(Job("j", b"content"), [tied], lease=LEASE)
    await one.finish([(done, b"answer")])
    clock.go_on(-ahead)
    assert await other.take_jobs(1, lease=LEASE) == []
    await other.finish(_with_answers(await other.take(FULL, 1, lease=LEASE)))
    assert (await found(other, "p0000")).state == "done"
    clock.go_on(LEASE + 2)
    assert [job.token for job in await other.take_jobs(1, lease=LEASE)] == ["j"]
    clock.go_on(KEEP - LEASE)
    assert (await found(other, "p0000")).state == "unknown"


def _with_answers(deliveries):
    return [(delivery, b"answer") for delivery in deliveries]


async def test_data_of_earlier_versions_are_served_as_they_were(clock, spools, request):
    """They say nothing of the longest lease."""
    one, other = spools
    await one.take(FULL, 2, lease=LEASE)
    if isinstance(clock, SQLiteSpools):
        await one._database.run(lambda db: db.execute("DELETE FROM longest"))
    else:
        with request.getfixturevalue("redis_server").client() as client:
            client.delete("microbatch:spool:clock")
    assert (await other.counts()).leased == 2
    assert await everything(other) == [["p0002", "p0003"], [], []]
    counts = await other.counts()
    assert counts == Counts(leased=4, oldest=counts.oldest)


# --- the cache in a file


@pytest.fixture
async def cache(tmp_path):
    cache = SQLiteCache(tmp_path / "c")
    cache.now = time.time()
    cache._now = lambda: cache.now
    await cache.open()
    yield cache
    await cache.aclose()


@pytest.mark.parametrize("ahead", [2 * MAX_CLOCK_SKEW, HOUR, YEAR])
async def test_an_entry_of_a_cache_lasts_no_longer_than_it_may_after_the_clock_was_set_back(cache, ahead):
    await cache.set_many([(b"early", b"1", 10 * YEAR), (b"ever", b"2", None)])
    cache.now += ahead
    await cache.set_many([(b"k", b"v", 50.0), (b"ever", b"3", None)])
    cache.now -= ahead
    await cache.set_many([(b"other", b"v", None)])
    assert await cache.get_many([b"early", b"k", b"ever"]) == [b"1", b"v", b"3"]
    cache.now += 51
    assert await cache.get_many([b"early", b"k", b"ever"]) == [b"1", None, b"3"]


async def test_what_a_cache_used_at_a_time_yet_to_come_is_dropped_like_any_other(cache, tmp_path):
    cache.now += HOUR
    await cache.set_many([(b"k", b"v", None)])
    cache.now -= HOUR
    await cache.set_many([(b"l", b"v", None)])
    with contextlib.closing(sqlite3.connect(tmp_path / "c")) as db:
        assert db.execute("SELECT max(used) FROM entries").fetchone()[0] == cache.now
