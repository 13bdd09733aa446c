"""Answers kept in an SQLite file: they outlive the process, and several processes may use them at once."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from typing import TYPE_CHECKING, Final

import msgspec

from microbatch.caching.entry import DEFAULT_TTL
from microbatch.caching.key import SECRET_BYTES
from microbatch.errors import StorageError
from microbatch.policy import at_least, whole
from microbatch.storage.sqlite import Database

if TYPE_CHECKING:
    import os
    import sqlite3
    from collections.abc import Collection, Sequence

LEAST_BYTES: Final = 256 * 1024
"""Smallest `max_bytes`: an empty file has a few pages already, and what a page holds comes and goes together."""

TOUCH_AFTER: Final = 60.0
"""Seconds for which a use need not be noted again: what was used most recently is known to the minute."""

AHEAD: Final = 60.0
"""Seconds by which an entry may have been used later than now, as clocks differ; if it is more, the clock was set back since."""

_BUSY: Final = 3.0  # seconds that a store may wait for other processes; no caller waits for it
_MOST_DROPPED: Final = 512  # entries in one transaction, so that none takes long
_STEP: Final = 4
_MOST_TOUCHED: Final = 10_000

# The number of a row is a digest of its key. So rows come in random order and fill the room that others left, wherever that is;
# in order of arrival, pages on which one entry is still in use would never be filled again. And one tree is searched, not two.
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS entries
    (id INTEGER PRIMARY KEY, key BLOB NOT NULL, value BLOB NOT NULL, expires REAL, used REAL NOT NULL);
CREATE INDEX IF NOT EXISTS entries_by_expiry ON entries (expires) WHERE expires IS NOT NULL;
CREATE INDEX IF NOT EXISTS entries_by_use ON entries (used);
CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, content) WITHOUT ROWID;
"""


class SQLiteCache:
    """Keeps what was used most recently in a file, up to a number of bytes.

    Reads have a thread and a connection of their own, and wait for no writer. That an entry was used is noted with the next write,
    and when the cache is closed, if it was not noted within a minute. Entries that expired are dropped by the next writes.

    Args:
        path: The file; it is made if it is missing, and readable by its owner only.
        max_bytes: Size at which the file stops growing, within a few pages; it is given room back only within. Its log takes about
            10 MB more. An entry that is larger is not kept.
        ttl: Seconds for which answers are good unless the request says otherwise; None for ever.

    Attributes:
        ttl: As given.
        evictions: Entries that this process dropped for want of room.

    Raises:
        ConfigError: A limit is below its minimum.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, max_bytes: int = 1024 * 1024 * 1024, ttl: float | None = DEFAULT_TTL
    ) -> None:
        whole(LEAST_BYTES, max_bytes=max_bytes)
        at_least(0, ttl=ttl)
        self.ttl = ttl
        self.evictions = 0
        self._max_bytes = max_bytes
        self._database = Database(path, _SCHEMA, kind="cache", version=1, durable=False, busy=_BUSY)
        self._touched: dict[int, float] = {}  # rows used since the last write, and when
        self._now = time.time  # noqa: TID251 entries outlive the process
        self._secret: bytes | None = None  # as it was last read

    async def open(self) -> None:
        """Open the file.

        Raises:
            ConfigError: It cannot be opened, is no database, or is another's.
        """
        await self._database.open()

    async def secret(self) -> bytes:
        """Return the 32 random bytes that came into the file with its first use.

        If the file has lost them, or another one has taken its place, those that this cache has read before are put back.

        Raises:
            StorageError: The file cannot be read, or not be written the first time.
        """
        secret = await self._database.read(_secret)
        if secret is None:
            secret = await self._database.run(lambda db: _make_secret(db, self._secret))
        self._secret = secret
        return secret

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the value of each key, None where there is none, in one query.

        Raises:
            StorageError: The file cannot be read.
        """
        now = self._now()
        ids = _numbers({_id(key) for key in keys})
        rows = await self._database.read(
            lambda db: db.execute(
                "SELECT id, key, value, used FROM entries WHERE id IN (SELECT value FROM json_each(?)) "
                "AND (expires IS NULL OR expires > ?)",
                (ids, now),
            ).fetchall()
        )
        for number, _, _, used in rows:
            if used < now - TOUCH_AFTER and len(self._touched) < _MOST_TOUCHED:
                self._touched[number] = now
        found = {key: value for _, key, value, _ in rows}
        return [found.get(key) for key in keys]

    async def set_many(self, entries: Sequence[tuple[bytes, bytes, float | None]]) -> None:
        """Keep *entries*: key, value, and seconds after which it is dropped, None for as long as there is room.

        The secret is put back with them if the file has lost it.

        Raises:
            StorageError: The file cannot be written; nothing of it is kept.
        """
        now = self._now()
        rows = {
            _id(key): (key, value, None if ttl is None else now + ttl, now)
            for key, value, ttl in entries
            if len(key) + len(value) <= self._max_bytes
        }
        touched, self._touched = self._touched, {}
        self.evictions += await self._database.run(lambda db: self._write(db, rows, touched, now))

    async def aclose(self) -> None:
        """Note what was used, and close the file."""
        touched, self._touched = self._touched, {}
        if touched:
            with contextlib.suppress(StorageError):
                await self._database.run(lambda db: _touch(db, touched))
        await self._database.aclose()

    # --- in the thread that writes

    def _write(
        self,
        db: sqlite3.Connection,
        rows: dict[int, tuple[bytes, bytes, float | None, float]],
        touched: dict[int, float],
        now: float,
    ) -> int:
        """Write *rows*, drop what expired and what there is no room for, and return how many the latter are."""
        if self._secret is not None:
            _make_secret(db, self._secret)
        db.executemany(
            "INSERT INTO entries (id, key, value, expires, used) VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE "
            "SET key = excluded.key, value = excluded.value, expires = excluded.expires, used = excluded.used",
            [(number, *row) for number, row in rows.items()],
        )
        _touch(db, touched)
        most = _MOST_DROPPED + len(rows)
        _mend_times(db, now, most)
        expired = db.execute("SELECT id FROM entries WHERE expires <= ? ORDER BY expires LIMIT ?", (now, most))
        _delete(db, [number for (number,) in expired])
        return self._make_room(db, most)

    def _make_room(self, db: sqlite3.Connection, most: int) -> int:
        """Drop what was not used for longest until the file has room, at most *most* rows; return how many those are."""
        evicted = 0
        while evicted < most and _bytes_in_use(db) > self._max_bytes:
            # A few at a time: only SQLite knows when a page becomes free.
            oldest = db.execute("SELECT id FROM entries ORDER BY used LIMIT ?", (_STEP,)).fetchall()
            if not oldest:
                break
            _delete(db, [number for (number,) in oldest])
            evicted += len(oldest)
        return evicted


def _bytes_in_use(db: sqlite3.Connection) -> int:
    """Return how much of the file is in use, as SQLite itself keeps it: nothing has to be counted."""
    (pages,), (free,), (size,) = (
        db.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)


def _delete(db: sqlite3.Connection, rows: list[int]) -> None:
    if rows:
        db.execute("DELETE FROM entries WHERE id IN (SELECT value FROM json_each(?))", (_numbers(rows),))


def _touch(db: sqlite3.Connection, touched: dict[int, float]) -> None:
    db.executemany(
        "UPDATE entries SET used = ? WHERE id = ? AND used < ?",
        [(used, number, used - TOUCH_AFTER) for number, used in touched.items()],
    )


def _mend_times(db: sqlite3.Connection, now: float, most: int) -> None:
    """The clock was set back: entries used later than now are good for as long as they were then, from now on; at most *most* rows."""
    db.execute(
        "UPDATE entries SET expires = expires - (used - ?), used = ? "
        "WHERE id IN (SELECT id FROM entries WHERE used > ? ORDER BY used DESC LIMIT ?)",
        (now, now, now + AHEAD, most),
    )


def _secret(db: sqlite3.Connection) -> bytes | None:
    row = db.execute("SELECT content FROM state WHERE name = 'secret'").fetchone()
    return None if row is None else bytes(row[0])


def _make_secret(db: sqlite3.Connection, secret: bytes | None = None) -> bytes:
    """Put *secret* into the file, or a new one, unless it has one; return what it has."""
    db.execute("INSERT OR IGNORE INTO state VALUES ('secret', ?)", (secret or secrets.token_bytes(SECRET_BYTES),))
    return _secret(db) or b""  # another process may have been first


def _id(key: bytes) -> int:
    """Return the number of the row of *key*. Should two keys ever have the same, the later one takes the place of the other."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), signed=True)


def _numbers(ids: Collection[int]) -> str:
    """Return *ids* as one argument, of which SQLite makes a table: so there may be any number of them."""
    return msgspec.json.encode(list(ids)).decode()
