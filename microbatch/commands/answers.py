"""The output of `run`: one line an answer, on disk within half a second, and good enough to resume from after a crash."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec

from microbatch.commands.console import UsageError
from microbatch.commands.reading import digest
from microbatch.errors import RequestFailed, StatusError

if TYPE_CHECKING:
    from types import TracebackType

    from microbatch.messages import Reply

SYNC_SECONDS = 0.5

_BLOCK = 65_536


def answer_line(name: str, output: Any, reply: Reply[Any]) -> dict[str, Any]:
    """Return the output line of an answer.

    A reply that holds more than its text (tool calls, several choices, log probabilities, audio) is added as `body`.
    """
    line = {
        "custom_id": name,
        "output": output,
        "error": None,
        "route": reply.route,
        "usage": msgspec.to_builtins(reply.usage),
        "cost_usd": reply.cost_usd,
    }
    if reply.body is not None and _says_more(reply.body):
        line["body"] = reply.body
    return line


def _says_more(body: dict[str, Any]) -> bool:
    try:
        choices = msgspec.convert(body, _Body).choices
    except msgspec.ValidationError:
        return True  # nothing we know, so nothing to leave out
    return len(choices) > 1 or any(choice.logprobs or choice.message != _Message() for choice in choices)


class _Message(msgspec.Struct, frozen=True):
    tool_calls: Any = None
    function_call: Any = None
    audio: Any = None


class _Choice(msgspec.Struct):
    message: _Message = _Message()
    logprobs: Any = None


class _Body(msgspec.Struct):
    choices: list[_Choice] = []


def failure_line(name: str, error: dict[str, Any]) -> dict[str, Any]:
    """Return the output line of an item that got no answer."""
    return {"custom_id": name, "output": None, "error": error, "route": None, "usage": None, "cost_usd": None}


def error_object(error: Exception) -> dict[str, Any]:
    """Return what an output line says of *error*: no prompt, no body, no key."""
    told: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, RequestFailed):
        told["attempts"] = error.attempts
    if isinstance(error, StatusError):
        told |= {"status": error.status, "code": error.code, "request_id": error.request_id}
    return told


class NotWritten(Exception):
    """The output cannot be written any further: the disk is full, or the like. What was written before stands."""


class Answers:
    """The output file, held by one run at a time.

    Each line is written whole and at once; a thread of its own brings the file to the disk every half second, because that
    may take long and the event loop must not wait for it.

    Args:
        path: The output file; it is made if it is missing, and appended to.

    Raises:
        UsageError: It cannot be written, or another run writes to it.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.written = 0
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise UsageError(f"cannot write {path!r}: {error.strerror}") from None
        try:
            _claim(self._file, path)
        except BaseException:
            os.close(self._file)
            raise
        self._unsynced = threading.Event()
        self._closing = threading.Event()
        self._failure: OSError | None = None
        self._syncing: threading.Thread | None = None

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._file).st_size

    def cut(self) -> int:
        """Cut off an incomplete last line and return how many bytes that was."""
        size = end = self.size
        while end:
            start = max(0, end - _BLOCK)
            found = os.pread(self._file, end - start, start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            os.ftruncate(self._file, end)
        return size - end

    def answered(self) -> set[int]:
        """Return digests of the ids whose last line is free of error.

        Raises:
            UsageError: A line was not written by this command.
        """
        done: set[int] = set()
        with Path(self.path).open("rb") as file:
            for number, raw in enumerate(file, start=1):
                name, error = _read_back(raw, f"{self.path}: line {number}")
                (done.discard if error else done.add)(digest(name))
        return done

    def write(self, line: dict[str, Any]) -> None:
        """Append *line*.

        Raises:
            NotWritten: The disk is full, or the like; also if an earlier line did not get to it.
        """
        self._check()
        rest = memoryview(msgspec.json.encode(line) + b"\n")
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            raise NotWritten(f"cannot write {self.path!r}: {error.strerror}") from error
        self.written += 1
        self._unsynced.set()
        if self._syncing is None:
            self._syncing = threading.Thread(target=self._keep_synced, name="microbatch-fsync", daemon=True)
            self._syncing.start()

    def _keep_synced(self) -> None:
        while not self._closing.is_set():
            self._unsynced.wait()
            self._unsynced.clear()
            self._sync()
            self._closing.wait(SYNC_SECONDS)

    def _sync(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            self._failure = error

    def close(self) -> None:
        """Bring the rest to the disk, and let go of the file.

        Raises:
            NotWritten: Not all of it may be on the disk.
        """
        self._closing.set()
        self._unsynced.set()
        if self._syncing is not None:
            self._syncing.join()
            self._sync()
        os.close(self._file)
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise NotWritten(f"cannot write {self.path!r}: {self._failure.strerror}") from self._failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _read_back(raw: bytes, where: str) -> tuple[str, bool]:
    """Return the id of an output line, and whether it is one of an error."""
    try:
        line = msgspec.json.decode(raw)
        return _id_of(line), line["error"] is not None
    except (ValueError, TypeError, LookupError, RecursionError):
        raise UsageError(f"{where} was not written by `microbatch run`; is this the right file?") from None


def _id_of(line: dict[str, Any]) -> str:
    name = line["custom_id"]
    if not isinstance(name, str) or "output" not in line:
        raise TypeError(name)
    return name


def _claim(file: int, path: str) -> None:
    """Check that *file* is one to resume from, and keep other runs out of it."""
    if not stat.S_ISREG(os.fstat(file).st_mode):
        raise UsageError(f"-o {path!r} must be a file, so that a run can be resumed from it")
    try:
        import fcntl  # noqa: PLC0415 not on Windows
    except ImportError:  # pragma: no cover - Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(f"another run is writing {path!r}") from None
