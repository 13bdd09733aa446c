"""The output of `run`: one line an answer, on disk within half a second, and good enough to resume from after a crash."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec

from microbatch.cli.console import UsageError
from microbatch.cli.reading import digest
from microbatch.errors import RequestFailed, StatusError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

    from microbatch.messages import Reply

SYNC_SECONDS = 0.5

_BLOCK = 65_536


def answer_line(name: str, output: Any, reply: Reply[Any], digest: str | None = None) -> dict[str, Any]:
    """Return the output line of an answer.

    A reply that holds more than its text (tool calls, several choices, log probabilities, audio) is added as `body`.

    Args:
        name: The item's id.
        output: The answer.
        reply: What it came with.
        digest: That of the question, see `question_digest`; None leaves it out.
    """
    line = {
        "custom_id": name,
        "output": output,
        "error": None,
        "route": reply.route,
        "usage": msgspec.to_builtins(reply.usage),
        "cost_usd": reply.cost_usd,
    }
    if digest is not None:
        line["digest"] = digest
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


def failure_line(name: str, error: dict[str, Any], digest: str | None = None) -> dict[str, Any]:
    """Return the output line of an item that got no answer; *digest* is that of its question."""
    line = {"custom_id": name, "output": None, "error": error, "route": None, "usage": None, "cost_usd": None}
    return line if digest is None else line | {"digest": digest}


def error_object(error: Exception) -> dict[str, Any]:
    """Return what an output line says of *error*: no prompt, no body, no key."""
    told: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, RequestFailed):
        told["attempts"] = error.attempts
    if isinstance(error, StatusError):
        told |= {"status": error.status, "code": error.code, "request_id": error.request_id}
    return told


class Row(msgspec.Struct, frozen=True):
    """An answer in the output.

    Attributes:
        start: Where its line begins, in bytes.
        digest: That of its question; None if it was written by a release that did not keep it.
    """

    start: int
    digest: str | None


class Written(msgspec.Struct):
    """The answers in an output; lines of errors are left out.

    Attributes:
        rows: By the digest of the id: its last line, if that is an answer.
        questions: By the digest of the question: the last answer to it, under whatever id.
    """

    rows: dict[int, Row] = {}
    questions: dict[str, Row] = {}


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

    def written_before(self) -> Written:
        """Return what the file holds.

        Raises:
            UsageError: A line was not written by this command.
        """
        found, start = Written(), 0
        with Path(self.path).open("rb") as file:
            for number, raw in enumerate(file, start=1):
                name, line = _read_back(raw, f"{self.path}: line {number}")
                if line["error"] is not None:
                    found.rows.pop(digest(name), None)
                else:
                    question = line.get("digest")
                    row = Row(start, question if isinstance(question, str) else None)
                    found.rows[digest(name)] = row
                    if row.digest is not None:
                        found.questions[row.digest] = row
                start += len(raw)
        return found

    def row_at(self, start: int, name: str) -> dict[str, Any]:
        """Return the line that begins at the byte *start*, as one of the id *name*."""
        with Path(self.path).open("rb") as file:
            file.seek(start)
            line: dict[str, Any] = msgspec.json.decode(file.readline())
        return line | {"custom_id": name}

    def replace(self, rows: Iterable[tuple[int, str]], aside: Path) -> None:
        """Keep nothing but *rows* in the output; the file as it was stays under the name *aside*.

        The new file takes the place of the old one when it is complete and on the disk.

        Args:
            rows: Where each line to keep begins, and the id under which it is kept.
            aside: A name that is free.

        Raises:
            UsageError: One of the files cannot be written.
        """
        draft = Path(self.path + ".new")
        try:
            shutil.copyfile(self.path, aside)
            draft.unlink(missing_ok=True)
            new = os.open(draft, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                _claim(new, self.path)
                for start, name in rows:
                    _write_all(new, msgspec.json.encode(self.row_at(start, name)) + b"\n")
                os.fsync(new)
                draft.replace(self.path)
            except BaseException:
                os.close(new)
                draft.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise UsageError(f"cannot write {self.path!r} anew: {error.strerror}") from None
        old, self._file = self._file, new
        os.close(old)

    def write(self, line: dict[str, Any]) -> None:
        """Append *line*.

        Raises:
            NotWritten: The disk is full, or the like; also if an earlier line did not get to it.
        """
        self._check()
        try:
            _write_all(self._file, msgspec.json.encode(line) + b"\n")
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
        """Bring the rest to the disk, and let go of the file. One that was deleted meanwhile is put back.

        Raises:
            NotWritten: Not all of it may be on the disk, or another file has taken its name; the message says where it is then.
        """
        self._closing.set()
        self._unsynced.set()
        if self._syncing is not None:
            self._syncing.join()
            self._sync()
        try:
            self._put_back()
        finally:
            os.close(self._file)
        self._check()

    def _put_back(self) -> None:
        """Give the file a name again if its own was taken away."""
        path, ours = Path(self.path), os.fstat(self._file)
        if not self.written or (path.exists() and os.path.samestat(path.stat(), ours)):
            return
        replaced = path.exists()
        name = next(free_names(self.path)) if replaced else path
        try:
            with name.open("xb") as file:
                for start in range(0, ours.st_size, _BLOCK):
                    file.write(os.pread(self._file, _BLOCK, start))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise NotWritten(
                f"{self.path!r} was deleted while it was written, and cannot be put back: {error.strerror}"
            ) from error
        if replaced:
            raise NotWritten(
                f"{self.path!r} was replaced by another file while it was written; the answers are in {str(name)!r}"
            )

    def _check(self) -> None:
        if self._failure is not None:
            raise NotWritten(f"cannot write {self.path!r}: {self._failure.strerror}") from self._failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def free_names(path: str) -> Iterator[Path]:
    """Yield names beside *path* that no file has."""
    numbered = (Path(f"{path}.old{number}") for number in count(1))
    return (name for name in numbered if not name.exists())


def _write_all(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def _read_back(raw: bytes, where: str) -> tuple[str, dict[str, Any]]:
    """Return the id of an output line, and the line."""
    try:
        line = msgspec.json.decode(raw, type=dict[str, Any])
        name = line["custom_id"]
        if isinstance(name, str) and "output" in line and "error" in line:
            return name, line
    except (ValueError, LookupError, RecursionError):
        pass
    raise UsageError(f"{where} was not written by `microbatch run`; is this the right file?")


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
