"""One SQLite file behind worker threads: transactions that never hold up the event loop."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from microbatch.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

T = TypeVar("T")

_OWNER_ONLY = 0o600
_OPENING = 5.0  # seconds to wait for other processes that open the file at the same time


class Database:
    """A file, one connection that writes and one that only reads, each with a thread that alone uses it.

    The journal is a write-ahead log, so readers and the one writer of several processes do not wait for each other. The file, and
    with it the log beside it, is made readable by its owner only: prompts and answers are in it.

    Args:
        path: The file; it is made if it is missing.
        schema: Statements that make the tables, if they are missing.
        kind: What it is, in one word; a file of another kind is refused.
        version: Number of the schema; a file with another one is refused.
        durable: Whether a commit waits for the disk (`synchronous=FULL`). If not, the last commits before a power cut may be lost,
            but never the file.
        busy: Seconds to wait for other processes to finish their transactions.
    """

    def __init__(
        self, path: str | os.PathLike[str], schema: str, *, kind: str, version: int, durable: bool, busy: float
    ) -> None:
        self._path = os.fspath(path)
        self._schema = schema
        self._kind = kind
        self._mark = int.from_bytes(kind.encode()[:4])
        self._version = version
        self._durable = durable
        self._busy = busy
        self._thread: ThreadPoolExecutor | None = None
        self._connection: sqlite3.Connection | None = None
        self._reading_thread: ThreadPoolExecutor | None = None
        self._reading: sqlite3.Connection | None = None

    async def open(self) -> None:
        """Open the file, and make what is missing.

        Raises:
            ConfigError: It cannot be opened, is no database, or was made by another version.
        """
        thread = ThreadPoolExecutor(1, thread_name_prefix="microbatch-sqlite")
        opening = thread.submit(self._connect)
        try:
            self._connection = await asyncio.wrap_future(opening)
        except BaseException:
            opening.add_done_callback(_discard)  # if this was cancelled, the thread goes on
            thread.shutdown(wait=False)
            raise
        self._thread = thread

    def _connect(self) -> sqlite3.Connection:
        connection = None
        try:
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, _OWNER_ONLY))
            connection = sqlite3.connect(self._path, timeout=_OPENING, isolation_level=None, check_same_thread=False)
            _keep_log(connection)
            connection.execute(f"PRAGMA synchronous={'FULL' if self._durable else 'NORMAL'}")
            self._prepare(connection)
            connection.execute(f"PRAGMA busy_timeout={round(1000 * self._busy)}")
        except (OSError, sqlite3.Error) as error:
            if connection is not None:
                connection.close()
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigError(f"cannot open {self._path!r}: {reason}") from error
        except BaseException:
            if connection is not None:
                connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Make the tables, under a lock, as several processes may come at once."""
        connection.execute("BEGIN IMMEDIATE")
        (kind,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and kind != self._mark:
            raise ConfigError(f"{self._path!r} is a database, but no {self._kind} of microbatch's: choose another file")
        if tables and version != self._version:
            raise ConfigError(f"{self._path!r} was made by another version of microbatch (its format is {version})")
        for statement in self._schema.split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id={self._mark}")
        connection.execute(f"PRAGMA user_version={self._version}")
        connection.execute("COMMIT")

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return what *work* returns, done in the thread and within one transaction.

        A caller that is cancelled does not stop it.

        Raises:
            StorageError: The file could not be read or written, or is not open; nothing of the transaction stands.
        """
        connection = self._connection
        if connection is None:
            raise StorageError(f"{self._path!r} is not open")
        return await self._in_thread(lambda: self._transact(connection, work, "IMMEDIATE"))

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return what *work* returns, which may not write, and sees the file as it is at one moment.

        Writers do not hold it up, be they of other processes or of this one, nor does the disk that they wait for: it has a
        connection and a thread of its own, which the first call makes.

        Raises:
            StorageError: The file could not be read, or is not open.
        """
        if self._connection is None:
            raise StorageError(f"{self._path!r} is not open")
        if self._reading_thread is None:
            self._reading_thread = ThreadPoolExecutor(1, thread_name_prefix="microbatch-sqlite-reading")
        return await asyncio.get_running_loop().run_in_executor(
            self._reading_thread, lambda: self._transact(self._reader(), work, "DEFERRED")
        )

    def _reader(self) -> sqlite3.Connection:
        if self._reading is None:
            try:
                reading = sqlite3.connect(self._path, timeout=self._busy, isolation_level=None, check_same_thread=False)
                self._reading = reading
                reading.execute("PRAGMA query_only=ON")
            except sqlite3.Error as error:
                raise StorageError(f"{Path(self._path).name}: {error}") from error
        return self._reading

    def _transact(self, connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], T], kind: str) -> T:
        try:
            connection.execute(f"BEGIN {kind}")
            try:
                result = work(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise StorageError(f"{Path(self._path).name}: {error}") from error
        return result

    async def _in_thread(self, work: Callable[[], T]) -> T:
        if self._thread is None:
            raise StorageError(f"{self._path!r} is not open")
        # Shielded, or work that has not begun would be dropped with its caller.
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, work))

    async def aclose(self) -> None:
        """Finish what is under way and close the file."""
        connection, self._connection = self._connection, None
        thread, self._thread = self._thread, None
        reading_thread, self._reading_thread = self._reading_thread, None
        try:
            # The one that writes comes last: as the last of all it brings the log into the file and removes it.
            if reading_thread is not None:
                await asyncio.get_running_loop().run_in_executor(reading_thread, self._close_reader)
            if thread is not None and connection is not None:
                await asyncio.get_running_loop().run_in_executor(thread, connection.close)
        finally:
            for each in (reading_thread, thread):
                if each is not None:
                    each.shutdown(wait=False)

    def _close_reader(self) -> None:
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.close()


def _discard(opening: Future[sqlite3.Connection]) -> None:
    """Close the connection that *opening* has made for nobody."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _keep_log(connection: sqlite3.Connection) -> None:
    """Have the journal be a write-ahead log.

    That needs the file for itself for a moment, and SQLite does not wait for it, whatever the timeout: two who did might wait for
    each other.
    """
    deadline = time.monotonic() + _OPENING
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return
