"""The cache in a file: what it costs on disk, who may read it, and what other processes do to it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from microbatch.caching.guard import Guard
from microbatch.caching.sqlite import LEAST_BYTES, TOUCH_AFTER, SQLiteCache, _make_secret, _secret
from microbatch.errors import ConfigError, StorageError

pytestmark = pytest.mark.slow


@contextlib.asynccontextmanager
async def opened(path, **settings):
    cache = SQLiteCache(path, **settings)
    await cache.open()
    try:
        yield cache
    finally:
        await cache.aclose()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.sqlite"


class Clock:
    """Seconds since 1970, for a cache to be told."""

    def __init__(self, cache):
        self.now = 1e9
        cache._now = lambda: self.now


def entries(*numbers, size=8_000, ttl=None):
    return [(b"%d" % number, bytes([number % 251]) * size, ttl) for number in numbers]


async def kept(cache, numbers):
    found = await cache.get_many([b"%d" % number for number in numbers])
    return {number for number, value in zip(numbers, found, strict=True) if value is not None}


def rows(path, query="SELECT count(*) FROM entries"):
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchall()


# --- room


async def test_the_file_stops_growing_and_what_was_used_last_stays(path):
    async with opened(path, max_bytes=LEAST_BYTES) as cache:
        clock = Clock(cache)
        for number in range(200):
            clock.now += 1
            await cache.set_many(entries(number))
        found = await kept(cache, range(200))
        assert found == set(range(200 - len(found), 200))
        assert 20 <= len(found) <= LEAST_BYTES / 8_000
        assert cache.evictions == 200 - len(found)
    assert path.stat().st_size <= LEAST_BYTES + 10 * 4_096


@pytest.mark.parametrize("size", [10, 300, 1_500, 3_000])
async def test_the_bound_holds_for_entries_of_any_size(path, size):
    async with opened(path, max_bytes=4 * LEAST_BYTES) as cache:
        for _ in range(4_000_000 // (16 * (size + 100))):
            await cache.set_many([(os.urandom(16), os.urandom(size), 60.0) for _ in range(16)])
    assert path.stat().st_size <= 4 * LEAST_BYTES + 32 * 4_096  # one call's worth beyond, until it has been made up for
    ((count,),) = rows(path)
    # 100 for a row's head and its places in both indexes; a tree that is filled in random order is never full.
    assert count * (16 + size + 100) > 4 * LEAST_BYTES / 3


async def test_an_entry_that_was_read_counts_as_used_from_the_next_write_on(path):
    async with opened(path, max_bytes=LEAST_BYTES) as cache:
        clock = Clock(cache)
        await cache.set_many(entries(*range(10)))
        clock.now += TOUCH_AFTER + 1
        assert await kept(cache, [3, 7]) == {3, 7}
        for number in range(100, 200):
            clock.now += TOUCH_AFTER / 10
            await cache.set_many(entries(number))
            await cache.get_many([b"7"])
        assert await kept(cache, range(10)) == {7}


async def test_what_was_read_in_a_process_that_writes_nothing_counts_when_it_ends(path):
    async with opened(path) as cache:
        Clock(cache)
        await cache.set_many(entries(1, 2))
    async with opened(path) as cache:
        Clock(cache).now += 1_000
        await cache.get_many([b"1"])
    assert rows(path, "SELECT key, used FROM entries ORDER BY key") == [(b"1", 1e9 + 1_000), (b"2", 1e9)]


async def test_reading_the_same_again_within_a_minute_writes_nothing(path):
    async with opened(path) as cache:
        clock = Clock(cache)
        await cache.set_many(entries(1))
        clock.now += TOUCH_AFTER - 1
        await cache.get_many([b"1"])
        assert not cache._touched


async def test_a_file_that_has_become_too_large_shrinks_bit_by_bit_within(path):
    async with opened(path) as cache:
        await cache.set_many(entries(*range(2_000), size=1_000))
    async with opened(path, max_bytes=LEAST_BYTES) as cache:
        await cache.set_many(entries(5_000))
        assert 513 <= cache.evictions <= 520  # so that no write takes long
        for number in range(5_001, 5_010):
            await cache.set_many(entries(number))
        assert cache.evictions > 1_700
        assert await kept(cache, range(5_000, 5_010)) == set(range(5_000, 5_010))


async def test_an_entry_larger_than_the_file_may_be_is_not_kept_and_drives_nothing_out(path):
    async with opened(path, max_bytes=LEAST_BYTES) as cache:
        await cache.set_many(entries(1))
        await cache.set_many(entries(2, size=LEAST_BYTES))
        assert await kept(cache, [1, 2]) == {1}


async def test_what_expired_is_dropped_by_the_next_write_and_is_no_eviction(path):
    async with opened(path) as cache:
        clock = Clock(cache)
        await cache.set_many(entries(1, ttl=10.0) + entries(2, ttl=20.0) + entries(3))
        clock.now += 10
        assert await kept(cache, [1, 2, 3]) == {2, 3}
        assert rows(path) == [(3,)]
        await cache.set_many(entries(4))
        assert rows(path) == [(3,)]
        assert cache.evictions == 0


# --- other processes

WRITER = """
    import asyncio, sys
    from microbatch.caching.sqlite import SQLiteCache
    from microbatch.errors import StorageError

    async def main(path, name):
        cache = SQLiteCache(path)
        await cache.open()
        secret = await cache.secret()
        for number in range(150):
            entries = [(f"{name} {number} {each}".encode(), name.encode() * 50, 600.0) for each in range(8)]
            for _ in range(400):  # a cache gives up soon, which these, who do nothing but write, may see
                try:
                    await cache.set_many(entries)
                except StorageError:
                    continue
                break
            assert None not in await cache.get_many([key for key, _, _ in entries])
        await cache.aclose()
        print(secret.hex())

    asyncio.run(main(*sys.argv[1:]))
"""


async def test_several_processes_use_the_file_at_once(path):
    script = textwrap.dedent(WRITER)
    names = ["one", "two", "three"]
    processes = [
        subprocess.Popen(  # noqa: ASYNC220 nothing else is to go on
            [sys.executable, "-c", script, str(path), name], stdout=subprocess.PIPE, text=True
        )
        for name in names
    ]
    secrets = {process.communicate(timeout=500)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(secrets) == 1
    async with opened(path) as cache:
        assert (await cache.secret()).hex() + "\n" in secrets
        for name in names:
            keys = [f"{name} {number} {each}".encode() for number in range(150) for each in range(8)]
            assert await cache.get_many(keys) == [name.encode() * 50] * 1_200


OPENER = """
    import asyncio, sys, time
    from microbatch.caching.sqlite import SQLiteCache

    async def main(folder, start):
        for number in range(50):
            while time.time() < start + number / 40:  # at the very same time as the others
                pass
            cache = SQLiteCache(f"{folder}/{number}.sqlite")
            await cache.open()
            await cache.aclose()

    print("ready", flush=True)
    asyncio.run(main(sys.argv[1], float(input())))
"""


def test_workers_that_start_together_all_open_the_file(tmp_path):
    """To change the journal of a new file SQLite waits for nobody, whatever the time limit."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(OPENER), str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        process.stdout.readline()
    start = time.time() + 0.1
    for process in processes:
        process.stdin.write(f"{start}\n")
        process.stdin.flush()
    told = [process.communicate(timeout=500)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, told


async def test_of_those_who_come_first_at_once_all_have_the_same_secret(path):
    async with contextlib.AsyncExitStack() as stack:
        caches = [await stack.enter_async_context(opened(path)) for _ in range(3)]
        assert [await cache._database.read(_secret) for cache in caches] == [None] * 3
        found = [await cache._database.run(_make_secret) for cache in caches]  # as each of them goes on
        found += [await cache.secret() for cache in caches]
    assert len(set(found)) == 1


async def test_a_look_up_waits_for_no_writer_of_another_process(path):
    """Whoever had to wait for it would fail, as the set does: the other one ends only when all have been asked."""
    async with opened(path) as cache:
        await cache.set_many(entries(1))
        secret = await cache.secret()
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            other.execute("DELETE FROM entries")
            assert await kept(cache, [1]) == {1}
            assert await cache.secret() == secret
            with pytest.raises(StorageError) as caught:
                await cache.set_many(entries(2))
            assert caught.value.__cause__.sqlite_errorcode == sqlite3.SQLITE_BUSY
            other.execute("ROLLBACK")
        await cache.set_many(entries(2))
        assert await kept(cache, [1, 2]) == {1, 2}


async def test_a_look_up_waits_for_no_writer_of_its_own_process(path):
    """A commit may wait for the disk; that is no reason for a cache to be left alone."""
    async with opened(path) as cache:
        await cache.set_many(entries(1))
        begun, release = threading.Event(), threading.Event()
        writing = asyncio.create_task(cache._database.run(lambda db: (begun.set(), release.wait(60))))
        try:
            async with asyncio.timeout(30):
                while not begun.is_set():  # noqa: ASYNC110 threads have events of their own
                    await asyncio.sleep(0.001)
                assert await kept(cache, [1]) == {1}
            assert not writing.done()
        finally:
            release.set()
            await writing


async def test_a_locked_file_costs_a_guarded_store_its_time_and_look_ups_nothing(path, monkeypatch):
    # The guard would give up soon enough by itself; it is the cache's own time that counts here.
    monkeypatch.setattr("microbatch.caching.guard.LIVE_TIMEOUT", 30.0)
    async with opened(path) as cache:
        guard = Guard(cache)
        await guard.set_many(entries(1))
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            begun = time.perf_counter()
            await guard.set_many(entries(2))
            assert time.perf_counter() - begun < 5
            assert await guard.get_many([b"1", b"2"]) == [entries(1)[0][1], None]
            assert guard.bypassed == 0


# --- the file


async def test_nobody_else_may_read_the_file_or_its_log(path):
    async with opened(path) as cache:
        await cache.set_many(entries(1))
        await cache.get_many([b"1"])
        files = list(path.parent.iterdir())
        assert len(files) == 3
        assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert [file.name for file in path.parent.iterdir()] == ["cache.sqlite"]


async def test_no_thread_is_left_when_it_is_closed(path):
    def threads():
        return [thread for thread in threading.enumerate() if thread.name.startswith("microbatch-sqlite")]

    async with opened(path) as cache:
        await cache.set_many(entries(1))
        await cache.get_many([b"1"])
        assert len(threads()) == 2
    for thread in threads():
        thread.join(5)
    assert threads() == []


async def test_a_file_that_is_none_of_ours_is_refused_and_left_as_it_is(path):
    path.write_bytes(b"not a database, but somebody's notes " * 100)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"cannot open .*cache\.sqlite"):
        await SQLiteCache(path).open()
    assert path.read_bytes() == before


async def test_a_file_that_breaks_while_it_is_used_is_an_error_and_to_its_guard_a_miss(path):
    async with opened(path) as cache:
        await cache.set_many(entries(*range(50)))
    content = bytearray(path.read_bytes())
    content[4_096:] = b"\xff" * (len(content) - 4_096)
    path.write_bytes(content)
    async with opened(path) as cache:
        with pytest.raises(StorageError) as caught:
            await cache.get_many([b"1"])
        assert caught.value.__cause__.sqlite_errorcode == sqlite3.SQLITE_CORRUPT
        assert await Guard(cache).get_many([b"1"]) == [None]


@pytest.mark.parametrize("settings", [{"max_bytes": LEAST_BYTES - 1}, {"max_bytes": 1e9}, {"ttl": -1}])
def test_limits_that_make_no_sense_are_refused(path, settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        SQLiteCache(path, **settings)


async def test_an_opening_that_is_cancelled_leaves_no_connection(path):
    async with opened(path):
        pass
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")  # the opening waits for it, in its thread
        opening = asyncio.ensure_future(SQLiteCache(path).open())
        await asyncio.sleep(0)
        assert any(thread.name.startswith("microbatch-sqlite") for thread in threading.enumerate())
        opening.cancel()
        await asyncio.wait([opening])
        other.execute("COMMIT")
    assert opening.cancelled()
    for thread in threading.enumerate():
        if thread.name.startswith("microbatch-sqlite"):
            thread.join(30)
    gc.collect()  # a connection that nobody closed is told as a ResourceWarning, from Python 3.13 on
    async with opened(path) as cache:
        await cache.set_many(entries(1))
    assert [file.name for file in path.parent.iterdir()] == ["cache.sqlite"]
