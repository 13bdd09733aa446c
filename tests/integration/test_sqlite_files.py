"""SQLite files under several processes, and files that go away while they are used; as caches and as spools."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers import ask, opened
from spools import FULL, LONG, found, ids, item, items

import microbatch as mb
from microbatch.caching.answer_cache import FRESH
from microbatch.caching.sqlite import LEAST_BYTES, SQLiteCache
from microbatch.errors import StorageError
from microbatch.spool.records import Found
from microbatch.spool.sqlite import SQLiteSpool
from microbatch.storage.sqlite import MOST_LOG
from microbatch.testing import ScriptedTransport

pytestmark = pytest.mark.slow


PROCESSES = 4

CACHING = """
    import asyncio, os, sys
    from microbatch.caching.sqlite import SQLiteCache

    async def main(path, most):
        cache = SQLiteCache(path, max_bytes=int(most))
        await cache.open()
        largest = 0
        for _ in range(150):
            await cache.set_many([(os.urandom(20), os.urandom(2_000), 3_600.0) for _ in range(16)])
            await cache.get_many([os.urandom(20)])
            largest = max(largest, os.path.getsize(f"{path}-wal"))
        await cache.aclose()
        print(largest)

    asyncio.run(main(*sys.argv[1:]))
"""

SPOOLING = """
    import asyncio, os, sys
    from microbatch.spool.records import Item, Name, Stage
    from microbatch.spool.sqlite import SQLiteSpool

    async def main(path, name):
        spool = SQLiteSpool(path)
        await spool.open()
        largest = 0
        for number in range(60):
            await spool.put([Item(Name(name, f"{number} {each}"), b"d", os.urandom(2_000)) for each in range(16)])
            taken = await spool.take(Stage.FULL, 16, lease=60)
            await spool.finish([(delivery, b"answer") for delivery in taken])
            await spool.counts()
            largest = max(largest, os.path.getsize(f"{path}-wal"))
        await spool.aclose()
        print(largest)

    asyncio.run(main(*sys.argv[1:]))
"""


def at_once(script, *arguments):
    """Run *script* in several processes at once; return what each has printed."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments), *extra],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for extra in ([[str(number)] for number in range(PROCESSES)] if script is SPOOLING else [[]] * PROCESSES)
    ]
    told = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0] * PROCESSES, told
    return [int(out) for out, _ in told]


def test_a_cache_under_several_processes_loses_no_store_and_keeps_its_log_small(tmp_path):
    path = tmp_path / "c"
    most = 16 * LEAST_BYTES
    largest = max(at_once(CACHING, path, most))
    assert largest < 8 * MOST_LOG  # a process that does nothing for a while may have held it up
    assert path.stat().st_size < most + 64 * 4_096


def test_a_spool_under_several_processes_does_all_and_keeps_its_log_small(tmp_path):
    path = tmp_path / "s"
    assert max(at_once(SPOOLING, path)) < 4 * MOST_LOG
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT state, count(*) FROM items GROUP BY state").fetchall() == [("done", 4 * 60 * 16)]


async def test_a_log_that_a_reader_holds_up_is_cut_off_when_it_has_left(tmp_path):
    path = tmp_path / "c"
    log = tmp_path / "c-wal"
    cache = SQLiteCache(path)
    await cache.open()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM entries").fetchone()
        for _ in range(4):
            await cache.set_many([(os.urandom(20), os.urandom(MOST_LOG // 2), None)])
        assert log.stat().st_size > MOST_LOG
        reader.execute("COMMIT")
    await cache.set_many([(os.urandom(20), os.urandom(MOST_LOG), None)])
    assert log.stat().st_size == 0
    await cache.aclose()


async def test_a_store_waits_for_another_process_and_is_made(tmp_path):
    """Longer than any look-up may take."""
    cache = SQLiteCache(tmp_path / "c")
    await cache.open()
    with contextlib.closing(sqlite3.connect(tmp_path / "c", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        storing = asyncio.ensure_future(cache.set_many([(b"k", b"v", None)]))
        await asyncio.sleep(0.5)
        assert not storing.done()
        other.execute("COMMIT")
        await storing
    assert await cache.get_many([b"k"]) == [b"v"]
    await cache.aclose()


# --- files that go away


def delete(path):
    for name in (path, f"{path}-wal", f"{path}-shm"):
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()


def delete_only_the_file(path):
    path.unlink()


def replace(path, other):
    """Put another file, of the same kind, in the place of this one."""
    shutil.move(other, path)
    for name in (f"{path}-wal", f"{path}-shm"):
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()


@pytest.mark.parametrize("how", [delete, delete_only_the_file])
async def test_the_secret_is_put_into_the_file_that_takes_the_place_of_a_deleted_one(tmp_path, how, caplog):
    path = tmp_path / "c"
    async with opened(SQLiteCache(path)) as old:
        secret = await old.secret()
        await old.set_many([(b"k", b"v", None)])
        how(path)
        assert await old.get_many([b"k"]) == [None]
        await old.set_many([(b"l", b"w", None)])
        async with opened(SQLiteCache(path)) as new:
            assert await new.secret() == await old.secret() == secret
            assert await new.get_many([b"k", b"l"]) == [None, b"w"]
            await new.set_many([(b"k", b"x", None)])
            assert await old.get_many([b"k", b"l"]) == [b"x", b"w"]
    assert "deleted or replaced" in caplog.text
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


async def test_processes_that_had_the_old_file_and_newcomers_agree_on_the_secret_of_the_new_one(tmp_path):
    path = tmp_path / "c"
    async with opened(SQLiteCache(path)) as one, opened(SQLiteCache(path)) as other:
        before = await one.secret()
        delete(path)
        async with opened(SQLiteCache(path)) as new:
            secret = await new.secret()
            assert secret != before
            for cache in (one, other):
                await cache.set_many([(b"k", b"v", None)])
                assert await cache.secret() == secret
            assert await new.get_many([b"k"]) == [b"v"]


async def test_a_file_that_another_is_put_in_the_place_of_is_read_from_then_on(tmp_path):
    path, copy = tmp_path / "c", tmp_path / "copy"
    async with opened(SQLiteCache(copy)) as cache:
        secret = await cache.secret()
        await cache.set_many([(b"k", b"copied", None)])
    async with opened(SQLiteCache(path)) as cache:
        await cache.secret()
        await cache.set_many([(b"k", b"v", None), (b"l", b"w", None)])
        replace(path, copy)
        assert await cache.get_many([b"k", b"l"]) == [b"copied", None]
        assert await cache.secret() == secret


async def test_many_who_use_a_file_that_goes_away_all_get_their_answers(tmp_path):
    path = tmp_path / "c"
    async with opened(SQLiteCache(path)) as cache:
        for _ in range(5):
            await cache.set_many([(b"k", b"v", None)])
            delete(path)
            doing = [cache.get_many([b"k"]) for _ in range(20)] + [
                cache.set_many([(b"k", b"v", None)]) for _ in range(20)
            ]
            await asyncio.gather(*doing)
            assert await cache.get_many([b"k"]) == [b"v"]


async def test_a_file_that_cannot_be_made_again_is_an_error_until_it_can(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    async with opened(SQLiteCache(folder / "c")) as cache:
        await cache.set_many([(b"k", b"v", None)])
        shutil.rmtree(folder)
        for _ in range(2):
            with pytest.raises(StorageError, match="open"):
                await cache.set_many([(b"k", b"v", None)])
            with pytest.raises(StorageError, match="open"):
                await cache.get_many([b"k"])
        folder.mkdir()
        await cache.set_many([(b"k", b"v", None)])
        assert await cache.get_many([b"k"]) == [b"v"]


async def stored(batcher, count):
    async with asyncio.timeout(20):
        while batcher.stats().cache_stores < count:  # noqa: ASYNC110 nobody is told
            await asyncio.sleep(0.01)


async def test_callers_of_two_processes_share_answers_again_after_the_file_was_deleted(tmp_path):
    path, transport = tmp_path / "c", ScriptedTransport()

    def batcher():
        return mb.Microbatcher(transport, cache=SQLiteCache(path), tokens="bytes")

    async with batcher() as old:
        await old.warm([ask("a")])
        await stored(old, 1)
        delete(path)
        await asyncio.sleep(2 * FRESH)
        await old.warm([ask("a")])
        await stored(old, 2)
        async with batcher() as new:
            assert [result.unwrap().route async for result in new.map([ask("a")])] == ["cache"]
    assert len(transport.calls) == 2


@pytest.mark.parametrize("how", [delete, delete_only_the_file])
async def test_what_is_put_into_a_spool_whose_file_was_deleted_is_there_for_the_worker(tmp_path, how):
    """To acknowledge it into a file that nobody ever reads would be to lose it."""
    path = tmp_path / "s"
    async with opened(SQLiteSpool(path)) as spool:
        await spool.put(items(2))
        held = await spool.take(FULL, 1, lease=LONG)
        how(path)
        assert await spool.put([item("a")]) == ["new"]
        async with opened(SQLiteSpool(path)) as worker:
            (delivery,) = await worker.take(FULL, 10, lease=LONG)
            assert delivery.item == item("a")
            await worker.finish([(delivery, b"answer")])
        await spool.finish([(held[0], b"of the old file")])
        assert await found(spool, "a") == Found("done", b"answer")
        assert ids(await spool.take(FULL, 10, lease=LONG)) == []
        assert (await found(spool, "p0000")).state == "unknown"


async def test_opening_a_file_takes_no_lock_from_others_of_the_same_process(tmp_path):
    """To open and close it by other means than SQLite would."""
    path = tmp_path / "s"
    async with opened(SQLiteSpool(path)) as first:
        await first.put(items(1))
        async with opened(SQLiteSpool(path)):
            pass
        look = "SELECT count(*) FROM items"
        script = f"import sqlite3; print(sqlite3.connect({os.fspath(path)!r}).execute({look!r}).fetchone())"
        other = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=subprocess.PIPE)
        assert (await other.communicate())[0] == b"(1,)\n"
        assert (
            tmp_path / "s-wal"
        ).exists()  # or the other one, as the last of all, had removed what this one still writes to
        await first.put([item("a")])
        async with opened(SQLiteSpool(path)) as third:
            assert (await third.counts()).waiting == (2, 0, 0)
