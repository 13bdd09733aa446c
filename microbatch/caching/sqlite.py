"""A cache in an SQLite file: it outlives the process, and several processes may use it at once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from typing import TYPE_CHECKING, Annotated, Final

from microbatch.caching.deletion import Deleting
from microbatch.caching.entry import DEFAULT_TTL, MAX_CLOCK_SKEW
from microbatch.caching.key import SECRET_BYTES
from microbatch.checking import AtLeast, Seconds, checks_arguments
from microbatch.errors import StorageError
from microbatch.protocols import Cache
from microbatch.storage.sqlite import Database, json_array

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncIterator, Sequence

    from microbatch.caching.deletion import Matches

    _Row = tuple[bytes, bytes, float | None, float]  # key, value, expiry, use

LEAST_BYTES: Final = 256 * 1024
"""Smallest `max_bytes`: an empty file has a few pages already, and space is freed by the page."""

TOUCH_AFTER: Final = 60.0  # seconds after which a use is recorded again: the order of use is exact to the minute
_BUSY: Final = 3.0  # seconds that a transaction may wait for other processes; no caller waits for a store
_PAGE: Final = 128  # entries read at once
_MOST_DROPPED: Final = 512  # entries in one transaction, to keep it short
_DROPPED_AT_ONCE: Final = 4
_MOST_TOUCHED: Final = 10_000

# The row id is a digest of the key, so rows fill space wherever it was freed. In order of arrival, a page with one entry still in use
# would never be filled again. It also saves a second tree.
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS entries
    (id INTEGER PRIMARY KEY, key BLOB NOT NULL, value BLOB NOT NULL, expires REAL, used REAL NOT NULL);
CREATE INDEX IF NOT EXISTS entries_by_expiry ON entries (expires) WHERE expires IS NOT NULL;
CREATE INDEX IF NOT EXISTS entries_by_use ON entries (used);
CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, content) WITHOUT ROWID;
"""


class SQLiteCache(Deleting, Cache):
    """Keeps the most recently used entries in a file, up to a number of bytes.

    Reads have a thread and a connection of their own and do not wait for writers. Uses are recorded with the next write and when the
    cache is closed. Expired entries are dropped by later writes. Calls raise `StorageError` if the file cannot be read or written.

    Args:
        path: The file; created if missing, and readable by its owner only.
        max_bytes: Size at which the file stops growing, within a few pages; freed space stays in the file. Its log takes about 10 MB
            more. A larger entry is not stored.
        ttl: Seconds for which answers are valid unless the request says otherwise; None for no limit.

    Attributes:
        ttl: As given.
        evictions: Number of entries that this process dropped for lack of space.

    Raises:
        ConfigError: A limit is below its minimum.
    """

    @checks_arguments
    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: Annotated[int, AtLeast(LEAST_BYTES)] = 1024 * 1024 * 1024,
        ttl: Seconds | None = DEFAULT_TTL,
    ) -> None:
        self.ttl = ttl
        self.evictions: int = 0
        self._max_bytes = max_bytes
        self._database = Database(path, _SCHEMA, kind="cache", version=1, durable=False, busy=_BUSY)
        self._touched: dict[int, float] = {}  # time of use by row, since the last write
        self._now = time.time  # noqa: TID251 entries outlive the process
        self._secret: bytes | None = None  # as last read

    async def open(self) -> None:
        """Open the file; raise `ConfigError` if it cannot be opened, or is no cache of this version."""
        await self._database.open()

    async def secret(self) -> bytes:
        """Return the 32 random bytes that were written to the file at its first use.

        If the file has lost them or was replaced, those read before are put back.
        """
        secret = await self._database.read(_secret)
        if secret is None:
            secret = await self._database.run(lambda db: _make_secret(db, self._secret))
        self._secret = secret
        return secret

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        now = self._now()
        ids = json_array({_id(key) for key in keys})
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
        """Store *entries*: key, value and seconds to live each, None for no limit. An error leaves none of them stored."""
        now = self._now()
        rows = {
            _id(key): (key, value, None if ttl is None else now + ttl, now)
            for key, value, ttl in entries
            if len(key) + len(value) <= self._max_bytes
        }
        touched, self._touched = self._touched, {}
        self.evictions += await self._database.run(lambda db: self._write(db, rows, touched, now))

    async def entries(self) -> AsyncIterator[list[tuple[bytes, bytes]]]:
        begin = -(2**63)

        def page(db: sqlite3.Connection) -> list[tuple[int, bytes, bytes]]:
            query = "SELECT id, key, value FROM entries WHERE id >= ? ORDER BY id LIMIT ?"
            return db.execute(query, (begin, _PAGE)).fetchall()

        while begin < 2**63 and (rows := await self._database.read(page)):
            begin = rows[-1][0] + 1
            yield [(key, value) for _, key, value in rows]

    async def delete(self, keys: Sequence[bytes]) -> int:
        ids = json_array({_id(key) for key in keys})
        return await self._database.run(lambda db: _erase(db, "id IN (SELECT value FROM json_each(?))", ids))

    async def erase(self, matches: Matches | None) -> int:
        if matches is not None:
            return await super().erase(matches)
        erased = 0
        some = "id IN (SELECT id FROM entries LIMIT ?)"
        while number := await self._database.run(lambda db: _erase(db, some, _MOST_DROPPED)):
            erased += number
        return erased

    async def aclose(self) -> None:
        """Record the last uses, and close the file."""
        touched, self._touched = self._touched, {}
        if touched:
            with contextlib.suppress(StorageError):
                await self._database.run(lambda db: _touch(db, touched))
        await self._database.aclose()

    # --- in the thread of the writer

    def _write(self, db: sqlite3.Connection, rows: dict[int, _Row], touched: dict[int, float], now: float) -> int:
        """Write *rows* and drop expired and superfluous entries; return the number of the latter."""
        if self._secret is not None:
            # The file may have lost it, without which other processes would not find the entries.
            _make_secret(db, self._secret)
        db.executemany(
            "INSERT OR REPLACE INTO entries (id, key, value, expires, used) VALUES (?, ?, ?, ?, ?)",
            [(number, *row) for number, row in rows.items()],
        )
        _touch(db, touched)
        most = _MOST_DROPPED + len(rows)
        _mend_times(db, now, most)
        expired = db.execute("SELECT id FROM entries WHERE expires <= ? ORDER BY expires LIMIT ?", (now, most))
        _delete(db, expired.fetchall())
        return self._evict(db, most)

    def _evict(self, db: sqlite3.Connection, most: int) -> int:
        """Drop the least recently used entries until the file has space, at most *most* of them; return their number."""
        evicted = 0
        while evicted < most and _bytes_in_use(db) > self._max_bytes:
            # A few at a time: only SQLite knows when a page becomes free.
            oldest = db.execute("SELECT id FROM entries ORDER BY used LIMIT ?", (_DROPPED_AT_ONCE,)).fetchall()
            if not oldest:
                break
            _delete(db, oldest)
            evicted += len(oldest)
        return evicted


def _bytes_in_use(db: sqlite3.Connection) -> int:
    (pages,), (free,), (size,) = (
        db.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)


def _delete(db: sqlite3.Connection, rows: list[tuple[int]]) -> None:
    db.executemany("DELETE FROM entries WHERE id = ?", rows)


def _erase(db: sqlite3.Connection, condition: str, value: object) -> int:
    """Delete the entries of the *condition*, and overwrite them in the file; return their number."""
    db.execute("PRAGMA secure_delete=ON")
    try:
        return db.execute(f"DELETE FROM entries WHERE {condition}", (value,)).rowcount  # noqa: S608 it is our own
    finally:
        db.execute("PRAGMA secure_delete=OFF")


def _touch(db: sqlite3.Connection, touched: dict[int, float]) -> None:
    db.executemany(
        "UPDATE entries SET used = ? WHERE id = ? AND used < ?",
        [(used, number, used - TOUCH_AFTER) for number, used in touched.items()],
    )


def _mend_times(db: sqlite3.Connection, now: float, most: int) -> None:
    """After the clock was set back, move entries used in the future to now, with the time to live they had; at most *most* rows."""
    db.execute(
        "UPDATE entries SET expires = expires - (used - ?), used = ? "
        "WHERE id IN (SELECT id FROM entries WHERE used > ? ORDER BY used DESC LIMIT ?)",
        (now, now, now + MAX_CLOCK_SKEW, most),
    )


def _secret(db: sqlite3.Connection) -> bytes | None:
    row = db.execute("SELECT content FROM state WHERE name = 'secret'").fetchone()
    return None if row is None else bytes(row[0])


def _make_secret(db: sqlite3.Connection, secret: bytes | None = None) -> bytes:
    """Write *secret*, or a new one, unless the file has one; return the one in the file."""
    db.execute("INSERT OR IGNORE INTO state VALUES ('secret', ?)", (secret or secrets.token_bytes(SECRET_BYTES),))
    return _secret(db) or b""  # another process may have been first


def _id(key: bytes) -> int:
    """Return the row id of *key*. If two keys ever share one, the later entry replaces the earlier."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), signed=True)
