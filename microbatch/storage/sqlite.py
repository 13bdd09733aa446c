"""An SQLite file as a store: transactions in threads, so that the event loop never waits for the disk."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeVar

import msgspec

from microbatch.errors import ConfigError, MicrobatchError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")

logger: Final = logging.getLogger("microbatch")

_FAILURES: Final = (sqlite3.Error, UnicodeDecodeError)
"""The errors of the module when a file fails; the latter if it quotes the content of a damaged one."""

_DAMAGED: Final = "the file is damaged"

_LOOK: Final = (
    "SELECT (SELECT count(*) FROM sqlite_master), (SELECT application_id FROM pragma_application_id), "
    "(SELECT user_version FROM pragma_user_version)"
)
"""One statement, which sees one state of the file: another process may be creating the tables."""

MOST_LOG: Final = 4 * 1024 * 1024  # size of the log, in bytes, from which it is copied into the file and truncated
_OWNER_ONLY: Final = 0o600
_OPENING: Final = 5.0  # seconds to wait for other processes that open the file at the same time
_BUSY_STEP: Final = 0.02  # seconds that SQLite itself waits for locks before the deadline is checked
_TRIMMING: Final = 0.5  # seconds that truncating the log waits for other processes
_PAUSE: Final = 0.002  # seconds between two tries: in some cases SQLite does not wait at all


class Database:
    """A file with one connection that writes and one that only reads, each used by a thread of its own.

    The journal is a write-ahead log, so readers and the one writer of several processes do not wait for each other. The file and its
    log are readable by their owner only: they hold prompts and answers.

    SQLite by itself reuses the log only at a moment when no process reads or writes, so with several busy processes it grows without
    bound. Here a process that finds it large after a commit waits for the others and truncates it.

    A file that is deleted or replaced while in use could still be written to, but not found again. Each transaction therefore checks
    the path; if it names another file or none, that file is opened or created, and the transaction repeated.

    Args:
        path: The file; created if missing.
        schema: Statements that create the tables if they are missing.
        kind: One word; files of another kind or *version* are refused.
        durable: Whether a commit waits for the disk. If not, the last commits before a power cut may be lost, but never the file.
        busy: Seconds that a transaction waits for those of other processes.
    """

    def __init__(
        self, path: str | os.PathLike[str], schema: str, *, kind: str, version: int, durable: bool, busy: float
    ) -> None:
        self._path = os.fspath(path)
        self._schema = schema
        self._kind = kind
        self._application_id = int.from_bytes(kind.encode()[:4])
        self._version = version
        self._durable = durable
        self._busy = busy
        self._writer: _Connection | None = None
        self._reader: _Connection | None = None
        self._identity: tuple[int, int] | None = None  # of the open file
        self._trim_at = MOST_LOG
        self._reopening = asyncio.Lock()

    async def open(self) -> None:
        """Open the file, and create what is missing; raise `ConfigError` if it cannot be used."""
        writer = _Connection("microbatch-sqlite")
        try:
            await asyncio.shield(writer.run(partial(self._connect, writer)))
        except BaseException:
            writer.thread.submit(writer.close)  # if this call was cancelled, the thread is still opening the file
            writer.thread.shutdown(wait=False)
            raise
        self._writer = writer

    def _connect(self, writer: _Connection) -> None:
        try:
            _create(self._path)
            self._identity = self._file()
            db = writer.db = sqlite3.connect(
                self._path, timeout=_OPENING, isolation_level=None, check_same_thread=False
            )
            self._check(db)  # another's file is left as it is
            _use_log(db)
            db.execute(f"PRAGMA synchronous={'FULL' if self._durable else 'NORMAL'}")
            db.execute(f"PRAGMA journal_size_limit={MOST_LOG}")
            db.execute("PRAGMA wal_autocheckpoint=0")  # see `_trim_log`
            self._prepare(db)
            db.execute(f"PRAGMA busy_timeout={round(1000 * _BUSY_STEP)}")
        except BaseException as error:
            writer.close()
            if not isinstance(error, (OSError, *_FAILURES)):
                raise
            reason = error.strerror if isinstance(error, OSError) else _reason(error)
            raise ConfigError(f"cannot open {self._path!r}: {reason}") from error

    def _prepare(self, db: sqlite3.Connection) -> None:
        """Create the tables, under a lock, as several processes may do so at once."""
        db.execute("BEGIN IMMEDIATE")
        self._check(db)
        for statement in self._schema.split(";"):
            db.execute(statement)
        db.execute(f"PRAGMA application_id={self._application_id}")
        db.execute(f"PRAGMA user_version={self._version}")
        db.execute("COMMIT")

    def _check(self, db: sqlite3.Connection) -> None:
        """Raise `ConfigError` if the file has tables and is of another kind or version."""
        tables, application_id, version = db.execute(_LOOK).fetchone()
        if tables and application_id != self._application_id:
            raise ConfigError(f"{self._path!r} is a database, but no {self._kind} of microbatch's: choose another file")
        if tables and version != self._version:
            raise ConfigError(f"{self._path!r} was made by another version of microbatch (its format is {version})")

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return the result of *work*, run in the thread of the writer within one transaction.

        Cancelling the caller does not stop it. *work* may run several times; the effects of the last run stand.

        Raises:
            StorageError: The file could not be read or written, or is not open; the transaction has no effect.
        """
        return await self._in_current_file("IMMEDIATE", work)

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return the result of *work*, which may only read, sees one state of the file, and waits for no writer; otherwise as `run`."""
        return await self._in_current_file("DEFERRED", work)

    async def _in_current_file(self, kind: _Kind, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run a transaction; if the path no longer names the open file, reopen it and run the transaction again."""
        deadline = time.monotonic() + self._busy
        identity = self._identity
        with contextlib.suppress(_MovedError):
            return await self._in_thread(kind, work, deadline)
        await self._reopen(identity)
        try:
            return await self._in_thread(kind, work, deadline)
        except _MovedError:
            raise StorageError(f"{Path(self._path).name}: the file was deleted or replaced just now") from None

    async def _in_thread(self, kind: _Kind, work: Callable[[sqlite3.Connection], T], deadline: float) -> T:
        writer = self._writer
        if writer is None:
            raise StorageError(f"{self._path!r} is not open")
        if kind == "IMMEDIATE":
            # Shielded: otherwise a write that has not begun would be dropped with its caller.
            return await asyncio.shield(writer.run(lambda: self._transact(writer, kind, work, deadline)))
        reader = self._reader = self._reader or _Connection("microbatch-sqlite-reading")
        return await reader.run(lambda: self._transact(self._connected(reader), kind, work, deadline))

    def _connected(self, reader: _Connection) -> _Connection:
        if reader.db is None:
            try:
                reader.db = sqlite3.connect(
                    self._path, timeout=_BUSY_STEP, isolation_level=None, check_same_thread=False
                )
                reader.db.execute("PRAGMA query_only=ON")
            except _FAILURES as error:
                raise StorageError(f"{Path(self._path).name}: {_reason(error)}") from error
        return reader

    def _transact(
        self, connection: _Connection, kind: _Kind, work: Callable[[sqlite3.Connection], T], deadline: float
    ) -> T:
        db = connection.db
        if db is None:
            raise _MovedError  # it could not be reopened
        while True:
            try:
                db.execute(f"BEGIN {kind}")
                try:
                    result = work(db)
                    db.execute("COMMIT")
                except BaseException:
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                    raise
                if kind == "IMMEDIATE":
                    self._trim_log(db)
            except _FAILURES as error:
                if self._file() != self._identity:
                    raise _MovedError from error
                if not _is_busy(error) or time.monotonic() >= deadline:
                    raise StorageError(f"{Path(self._path).name}: {_reason(error)}") from error
                time.sleep(_PAUSE)
            except MicrobatchError:
                raise
            except Exception as error:
                # Of a damaged file, rows may be missing that are always there, or have values of another type.
                if not _is_damaged(db):
                    raise
                raise StorageError(f"{Path(self._path).name}: {_DAMAGED}") from error
            else:
                if self._file() != self._identity:
                    raise _MovedError
                return result

    async def _reopen(self, identity: tuple[int, int] | None) -> None:
        async with self._reopening:
            writer, reader = self._writer, self._reader
            if self._identity != identity or writer is None:
                return  # another caller has reopened it
            logger.warning("%s was deleted or replaced while in use: opening the present file", Path(self._path).name)

            def reconnect() -> None:
                writer.close()
                self._connect(writer)

            # Both connections to the old file have to be closed first: the new file's log and index have the same names.
            if reader is not None:
                await reader.run(reader.close)
            try:
                await asyncio.shield(writer.run(reconnect))
            except ConfigError as error:
                raise StorageError(str(error)) from error

    def _file(self) -> tuple[int, int] | None:
        """Return the identity of the file at the path; None if there is none."""
        try:
            found = os.stat(self._path)  # noqa: PTH116 with each transaction
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _trim_log(self, db: sqlite3.Connection) -> None:
        """Truncate the log if it is large; all processes that find it so write nothing meanwhile, so that one succeeds soon."""
        with contextlib.suppress(OSError, sqlite3.Error):  # the transaction stands in any case
            size = self._log_size()
            if size < self._trim_at:
                return
            deadline = time.monotonic() + _TRIMMING
            while size >= MOST_LOG and time.monotonic() < deadline:
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                size = self._log_size()
                if size >= MOST_LOG:
                    time.sleep(_PAUSE)
            # If another process reads for long, it is not waited for after each commit.
            self._trim_at = max(MOST_LOG, size + size // 4)

    def _log_size(self) -> int:
        return os.stat(f"{self._path}-wal").st_size  # noqa: PTH116 with each transaction

    async def aclose(self) -> None:
        """Finish the transactions under way and close the file."""
        reader, self._reader = self._reader, None
        writer, self._writer = self._writer, None
        # The writer comes last: the last connection to be closed copies the log into the file and removes it.
        try:
            if reader is not None:
                await reader.aclose()
        finally:
            if writer is not None:
                await writer.aclose()


_Kind = Literal["IMMEDIATE", "DEFERRED"]


class _Connection:
    """A connection, and the only thread that uses it."""

    def __init__(self, name: str) -> None:
        self.db: sqlite3.Connection | None = None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    def run(self, work: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self.thread, work)

    def close(self) -> None:
        db, self.db = self.db, None
        if db is not None:
            db.close()

    async def aclose(self) -> None:
        closing = self.run(self.close)
        self.thread.shutdown(wait=False)
        await asyncio.shield(closing)  # a cancelled caller must not leave the file open


class _MovedError(Exception):
    """The path does not name the open file any more."""


def json_array(values: Iterable[object]) -> str:
    """Return *values* as one parameter for `json_each`, so that a statement can take any number of them."""
    return msgspec.json.encode(list(values)).decode()


def _create(path: str) -> None:
    """Create the file if there is none, readable by its owner only."""
    # An existing file is not opened: closing it would drop the locks that SQLite holds on it for this process.
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, _OWNER_ONLY))


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, sqlite3.Error) else _DAMAGED


def _is_damaged(db: sqlite3.Connection) -> bool:
    try:
        return bool(db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",))
    except _FAILURES:
        return True


def _is_busy(error: Exception) -> bool:
    code: int = getattr(error, "sqlite_errorcode", 0)  # errors of the module itself have none
    return code & 0xFF == sqlite3.SQLITE_BUSY


def _use_log(db: sqlite3.Connection) -> None:
    """Make the journal a write-ahead log."""
    # This needs an exclusive lock, for which SQLite does not wait whatever the timeout, as two processes might wait for each other.
    deadline = time.monotonic() + _OPENING
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if not _is_busy(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return
