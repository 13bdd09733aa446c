"""One SQLite file behind worker threads: transactions that never hold up the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from microbatch.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from concurrent.futures import Future

T = TypeVar("T")

logger = logging.getLogger("microbatch")

MOST_LOG: Final = 4 * 1024 * 1024
"""Bytes of the log from which on it is brought into the file and cut off."""

_OWNER_ONLY = 0o600
_OPENING = 5.0  # seconds to wait for other processes that open the file at the same time
_BUSY_STEP = 0.02  # seconds that SQLite itself waits for others before the time is looked at
_TRIMMING = 0.5  # seconds that it waits for them to cut off the log
_PAUSE = 0.002  # seconds between two tries: in some cases SQLite does not wait at all


class Database:
    """A file, one connection that writes and one that only reads, each with a thread that alone uses it.

    The journal is a write-ahead log, so readers and the one writer of several processes do not wait for each other. The file, and
    with it the log beside it, is made readable by its owner only: prompts and answers are in it.

    SQLite by itself reuses the log only when no process is reading or writing, so under several busy processes it grows without
    bound. Here whoever finds it large after a commit waits for the others, brings it into the file and cuts it off.

    A file that is deleted or replaced while it is used could still be written to, but nobody would ever read that. So after each
    transaction the name is looked up; if another file is there, or none, it is opened or made, and the transaction is done there.

    Args:
        path: The file; it is made if it is missing.
        schema: Statements that make the tables, if they are missing.
        kind: What it is, in one word; a file of another kind is refused.
        version: Number of the schema; a file with another one is refused.
        durable: Whether a commit waits for the disk (`synchronous=FULL`). If not, the last commits before a power cut may be lost,
            but never the file.
        busy: Seconds that a transaction waits for those of other processes, from when it was asked for.
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
        self._identity: tuple[int, int] | None = None  # of the file that is open
        self._trim_at = MOST_LOG
        self._reopening = asyncio.Lock()

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
            _make(self._path)
            self._identity = self._file()
            connection = sqlite3.connect(self._path, timeout=_OPENING, isolation_level=None, check_same_thread=False)
            _keep_log(connection)
            connection.execute(f"PRAGMA synchronous={'FULL' if self._durable else 'NORMAL'}")
            connection.execute(f"PRAGMA journal_size_limit={MOST_LOG}")
            connection.execute("PRAGMA wal_autocheckpoint=0")  # see `_trim_log`
            self._prepare(connection)
            connection.execute(f"PRAGMA busy_timeout={round(1000 * _BUSY_STEP)}")
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

        A caller that is cancelled does not stop it. *work* may be done several times; what the last time did stands.

        Raises:
            StorageError: The file could not be read or written, or is not open; nothing of the transaction stands.
        """
        deadline = time.monotonic() + self._busy
        return await self._in_the_file_of_that_name(
            lambda: self._in_thread(lambda: self._transact(self._connection, work, "IMMEDIATE", deadline))
        )

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return what *work* returns, which may not write, and sees the file as it is at one moment.

        Writers do not hold it up, be they of other processes or of this one, nor does the disk that they wait for: it has a
        connection and a thread of its own, which the first call makes.

        Raises:
            StorageError: The file could not be read, or is not open.
        """
        deadline = time.monotonic() + self._busy
        return await self._in_the_file_of_that_name(
            lambda: self._in_reading_thread(lambda: self._transact(self._reader(), work, "DEFERRED", deadline))
        )

    async def _in_the_file_of_that_name(self, transaction: Callable[[], Awaitable[T]]) -> T:
        """Return what *transaction* returns; if the file that is open is no longer there, open the one that is, and do it again."""
        identity = self._identity
        try:
            return await transaction()
        except _MovedError:
            await self._reopen(identity)
        try:
            return await transaction()
        except _MovedError:
            raise StorageError(f"{Path(self._path).name}: the file was deleted or replaced just now") from None

    async def _reopen(self, identity: tuple[int, int] | None) -> None:
        async with self._reopening:
            if self._identity != identity or self._thread is None:
                return  # another caller was first
            logger.warning("%s was deleted or replaced while in use: opening what is there now", Path(self._path).name)
            # All of the old file has to be closed before the new one is opened: they share the names of the log and its index.
            if self._reading_thread is not None:
                await self._in_reading_thread(self._close_reader)
            try:
                await self._in_thread(self._connect_anew)
            except ConfigError as error:
                raise StorageError(str(error)) from error

    def _connect_anew(self) -> None:
        self._close_writer()
        self._connection = self._connect()

    def _file(self) -> tuple[int, int] | None:
        """Return what tells the file of this name from others; None if there is none."""
        try:
            found = os.stat(self._path)  # noqa: PTH116 with each transaction
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _reader(self) -> sqlite3.Connection:
        if self._reading is None:
            try:
                reading = sqlite3.connect(self._path, timeout=_BUSY_STEP, isolation_level=None, check_same_thread=False)
                self._reading = reading
                reading.execute("PRAGMA query_only=ON")
            except sqlite3.Error as error:
                raise StorageError(f"{Path(self._path).name}: {error}") from error
        return self._reading

    def _transact(
        self,
        connection: sqlite3.Connection | None,
        work: Callable[[sqlite3.Connection], T],
        kind: str,
        deadline: float,
    ) -> T:
        if connection is None:
            raise _MovedError  # it could not be opened anew
        while True:
            try:
                connection.execute(f"BEGIN {kind}")
                try:
                    result = work(connection)
                    connection.execute("COMMIT")
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise
                if kind == "IMMEDIATE":
                    self._trim_log(connection)
            except sqlite3.Error as error:
                if self._file() != self._identity:
                    raise _MovedError from error
                if not _is_busy(error) or time.monotonic() >= deadline:
                    raise StorageError(f"{Path(self._path).name}: {error}") from error
                time.sleep(_PAUSE)
            else:
                if self._file() != self._identity:
                    raise _MovedError
                return result

    def _trim_log(self, connection: sqlite3.Connection) -> None:
        """Bring the log into the file and cut it off, if it is large and the others give way.

        All processes that find it large do this and write nothing meanwhile, so that one of them succeeds soon.
        """
        with contextlib.suppress(OSError, sqlite3.Error):  # the transaction stands, whatever becomes of this
            size = self._log_size()
            if size < self._trim_at:
                return
            deadline = time.monotonic() + _TRIMMING
            while size >= MOST_LOG and time.monotonic() < deadline:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                size = self._log_size()
                if size >= MOST_LOG:
                    time.sleep(_PAUSE)
            # If another process reads for long, it is not waited for each time.
            self._trim_at = max(MOST_LOG, size + size // 4)

    def _log_size(self) -> int:
        return os.stat(f"{self._path}-wal").st_size  # noqa: PTH116 with each transaction

    async def _in_thread(self, work: Callable[[], T]) -> T:
        if self._thread is None:
            raise StorageError(f"{self._path!r} is not open")
        # Shielded, or work that has not begun would be dropped with its caller.
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, work))

    async def _in_reading_thread(self, work: Callable[[], T]) -> T:
        if self._thread is None:
            raise StorageError(f"{self._path!r} is not open")
        if self._reading_thread is None:
            self._reading_thread = ThreadPoolExecutor(1, thread_name_prefix="microbatch-sqlite-reading")
        return await asyncio.get_running_loop().run_in_executor(self._reading_thread, work)

    async def aclose(self) -> None:
        """Finish what is under way and close the file."""
        thread, self._thread = self._thread, None
        reading_thread, self._reading_thread = self._reading_thread, None
        try:
            # The one that writes comes last: as the last of all it brings the log into the file and removes it.
            if reading_thread is not None:
                await asyncio.get_running_loop().run_in_executor(reading_thread, self._close_reader)
            if thread is not None:
                await asyncio.get_running_loop().run_in_executor(thread, self._close_writer)
        finally:
            for each in (reading_thread, thread):
                if each is not None:
                    each.shutdown(wait=False)

    def _close_writer(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _close_reader(self) -> None:
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.close()


def _discard(opening: Future[sqlite3.Connection]) -> None:
    """Close the connection that *opening* has made for nobody."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _make(path: str) -> None:
    """Make the file if there is none, with nobody else allowed to read it.

    One that is there is not opened here: to close it again would drop the locks that SQLite holds on it for this process.
    """
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, _OWNER_ONLY))


class _MovedError(Exception):
    """The file that is open is not the one of that name any more."""


def _is_busy(error: sqlite3.Error) -> bool:
    code: int = getattr(error, "sqlite_errorcode", 0)  # those of the module itself have none
    return code & 0xFF == sqlite3.SQLITE_BUSY


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
            if not _is_busy(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return
