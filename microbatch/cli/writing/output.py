"""The output of `run`: one line per item, on disk within half a second, from which a run can be resumed after a crash."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from array import array
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Self

import msgspec

from microbatch.cli.console import UsageError
from microbatch.cli.digests import Digests
from microbatch.cli.reading.input import id_digest
from microbatch.errors import RequestFailed, StatusError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from microbatch.messages import Reply

SYNC_SECONDS: Final = 0.5
_PAGE: Final = 65_536
"""Bytes that are read or written at once."""


class NotWritten(Exception):
    """The output cannot be written any further. Lines written before it stand."""


# --- lines

_EMPTY: Final = dict.fromkeys(("custom_id", "output", "error", "route", "usage", "cost_usd"))
_NOT_TEXT: Final = ("tool_calls", "function_call", "audio")


def answer_line(
    name: str, output: Any, reply: Reply[Any], digest: str | None = None, period: int = 0
) -> dict[str, Any]:
    """Return the output line of the item *name*; *digest* is that of its question, None leaves it out.

    See `Provenance` for the *period*. A reply that holds more than its text (tool calls, several choices, log probabilities, audio) is
    added as `body`.
    """
    usage = msgspec.to_builtins(reply.usage)
    answer = {"custom_id": name, "output": output, "route": reply.route, "usage": usage, "cost_usd": reply.cost_usd}
    line = _EMPTY | answer | ({} if digest is None else {"digest": digest})
    line |= msgspec.structs.asdict(Provenance(reply.batch_size, reply.lane_kind, period))
    return line if reply.body is None or _is_one_text(reply.body) else line | {"body": reply.body}


def failure_line(name: str, error: dict[str, Any], digest: str | None = None) -> dict[str, Any]:
    """Return the output line of an item without an answer; see `answer_line`."""
    return _EMPTY | {"custom_id": name, "error": error} | ({} if digest is None else {"digest": digest})


def _is_one_text(body: dict[str, Any]) -> bool:
    """Return whether an endpoint's reply holds nothing but one text."""
    try:
        choices = body.get("choices", [])
        others = [choice.get("message", {}).get(field) for choice in choices for field in _NOT_TEXT]
        others += [choice.get("logprobs") or None for choice in choices]
        return len(choices) <= 1 and all(other is None for other in others)
    except (AttributeError, TypeError):
        return False


def error_object(error: Exception) -> dict[str, Any]:
    """Return *error* as an object for an output line, without a prompt, a body or a key."""
    described: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, RequestFailed):
        described["attempts"] = error.attempts
    if isinstance(error, StatusError):
        described |= {"status": error.status, "code": error.code, "request_id": error.request_id}
    return described


class Provenance(msgspec.Struct, frozen=True):
    """The fields of an answer's line that describe the batch that it came from.

    Attributes:
        batch_size: Requests in the call that answered.
        lane_kind: The kind of lane; None if the request goes alone by its form.
        period: The period of that size at the time, 0 without an audit; see `microbatch.audit.lane_kind`.
    """

    batch_size: int = 1
    lane_kind: str | None = None
    period: int = 0


class _Line(Provenance, frozen=True, kw_only=True):
    custom_id: str
    output: msgspec.Raw
    error: Any
    digest: Any = None


# --- the file

_NO_ANSWER: Final = -1
_UNKNOWN: Final = 0xFFFF_FFFF


class Row(msgspec.Struct, frozen=True):
    """The offset of an answer's line, and the number of its question; None if an older release wrote the line."""

    start: int
    question: int | None


class Rows:
    """The answers in an output, without lines of errors, in about 70 bytes each.

    Attributes:
        cut: Bytes of an incomplete last line, which were cut off.
    """

    def __init__(self) -> None:
        self.cut: int = 0
        self._ids = Digests()
        self._starts = array("q")  # by the number of the id: the offset of its last line, if that is an answer
        self._asked = array("I")  # by the number of the id: the number of the question in that line
        self._questions = Digests()
        self._answers = array("q")  # by the number of the question: the offset of its last answer

    def add(self, name: int, digest: str | None, start: int) -> None:
        """Add the answer at the offset *start*, which follows those that were added before.

        *name* is the digest of its id, *digest* that of its question.
        """
        question = _UNKNOWN if digest is None else _put(self._questions, self._answers, id_digest(digest), start)
        at = _put(self._ids, self._starts, name, start)
        _set(self._asked, at, question)

    def failed(self, name: int) -> None:
        """Take note that the last line of the id *name* is an error."""
        at = self._ids.number(name)
        if at is not None:
            self._starts[at] = _NO_ANSWER

    def of_id(self, name: int) -> Row | None:
        """Return the last line of the id whose digest is *name*, if that is an answer."""
        at = self._ids.number(name)
        if at is None or self._starts[at] == _NO_ANSWER:
            return None
        question = self._asked[at]
        return Row(self._starts[at], None if question == _UNKNOWN else question)

    def question(self, digest: str | None) -> int | None:
        """Return the number of the question with this digest; None if it has no answer here."""
        return None if digest is None else self._questions.number(id_digest(digest))

    def answer_to(self, question: int) -> int:
        """Return the offset of the last answer to the question with this number, under any id."""
        return self._answers[question]


def _put(digests: Digests, values: array[int], digest: int, value: int) -> int:
    """Add *digest*, let *value* be the one with its number, and return the number."""
    number = digests.add(digest)
    _set(values, number, value)
    return number


def _set(values: array[int], number: int, value: int) -> None:
    if number == len(values):
        values.append(value)
    else:
        values[number] = value


class OutputFile:
    """The output file, created if it is missing, and locked while it is open.

    Each line is written whole and at once. A thread calls fsync every half second, because the event loop must not wait for that.
    Raise `UsageError` if the file cannot be written, or another run is writing to it.

    Args:
        path: The file.
        name: The output that it is the journal of; files beside it are called after that. None for *path*.
    """

    def __init__(self, path: str, name: str | None = None) -> None:
        self.path = path
        self.name: str = name or path
        self.written: int = 0
        self._created = not os.path.lexists(path)
        self._file = _open_locked(path)
        self._unsynced = threading.Event()
        self._closing = threading.Event()
        self._failure: OSError | None = None
        self._syncing: threading.Thread | None = None

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._file).st_size

    def rows(self) -> Rows:
        """Return the answers in the file, and cut off an incomplete last line. Raise `UsageError` if a line is not from a run."""
        found, end = Rows(), 0
        for start, raw, name, line in self._lines():
            if line.error is None:
                found.add(name, line.digest if isinstance(line.digest, str) else None, start)
            else:
                found.failed(name)
            end = start + len(raw)
        found.cut = self.size - end
        if found.cut:
            os.ftruncate(self._file, end)
        return found

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the lines, decoded."""
        return (msgspec.json.decode(raw) for _, raw, _, _ in self._lines())

    def starts(self) -> Iterator[tuple[int, int]]:
        """Yield the digest of the id and the offset of each whole line."""
        return ((name, start) for start, _, name, _ in self._lines())

    def row_at(self, start: int, name: str) -> dict[str, Any]:
        """Return the line at the offset *start*, with the id *name*."""
        os.lseek(self._file, start, os.SEEK_SET)
        raw = b""
        while b"\n" not in raw and (part := os.read(self._file, _PAGE)):
            raw += part
        line: dict[str, Any] = msgspec.json.decode(raw.partition(b"\n")[0])
        return line | {"custom_id": name}

    def select(self, wanted: Callable[[Provenance], bool]) -> set[int]:
        """Return the digests of the ids whose last line is a *wanted* answer."""
        found: set[int] = set()
        for _, _, name, line in self._lines():
            if line.error is None and wanted(line):
                found.add(name)
            else:
                found.discard(name)
        return found

    def compact(self) -> None:
        """Leave only the last line of each id, unless another file has taken its name.

        Raise `UsageError` if that cannot be written; then the file is as it was.
        """
        ids, last, lines = Digests(), array("q"), 0
        for start, _, name, _ in self._lines():
            _put(ids, last, name, start)
            lines += 1
        if len(ids) < lines and not self._replaced():
            self._rewrite(raw for start, raw, name, _ in self._lines() if last[ids.add(name)] == start)

    def replace(self, rows: Iterable[tuple[int, str]], aside: Path) -> None:
        """Replace the file by one that holds only *rows*, once that is on the disk, and keep the old one under the name *aside*.

        A row is the offset of a line and its id in the new file. Raise `UsageError` if one of the files cannot be written.
        """
        try:
            shutil.copyfile(self.path, aside)
        except OSError as error:
            raise self._not_rewritten(error) from None
        self._rewrite(msgspec.json.encode(self.row_at(start, name)) + b"\n" for start, name in rows)

    def discard(self) -> None:
        """Remove the file if it was created here, and nothing was written to it."""
        if self._created and not self.size and not self._replaced():
            Path(self.path).unlink(missing_ok=True)

    def _lines(self) -> Iterator[tuple[int, bytes, int, _Line]]:
        """Yield the offset of each whole line, the line itself, the digest of its id, and what it says.

        Raise `UsageError` if a line is not from a run.
        """
        start, decoder = 0, msgspec.json.Decoder(_Line)
        with open(self._file, "rb", closefd=False) as file:  # which may have been deleted
            file.seek(0)
            for number, raw in enumerate(file, start=1):
                if not raw.endswith(b"\n"):
                    return
                try:
                    line = decoder.decode(raw)
                except (ValueError, RecursionError):
                    where = f"{self.path}: line {number}"
                    raise UsageError(f"{where} was not written by `microbatch run`; is -o the right file?") from None
                yield start, raw, id_digest(line.custom_id), line
                start += len(raw)

    def _rewrite(self, lines: Iterable[bytes]) -> None:
        """Replace the file by one that holds *lines*, once that is on the disk."""
        draft = Path(self.path + ".new")
        new = _open_locked(str(draft), os.O_TRUNC)
        try:
            with open(new, "ab", buffering=_PAGE, closefd=False) as file:
                file.writelines(lines)
            os.fsync(new)
            draft.replace(self.path)
        except BaseException as error:
            draft.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise self._not_rewritten(error) from None
            raise
        else:
            # The descriptor keeps its number, which the thread that syncs may be about to use; and the new file is locked already.
            os.dup2(new, self._file, inheritable=False)
        finally:
            os.close(new)

    def _not_rewritten(self, error: OSError) -> UsageError:
        return UsageError(f"cannot rewrite {self.path!r}: {error.strerror}")

    def write(self, line: dict[str, Any]) -> None:
        """Append *line*. Raise `NotWritten` if this line or an earlier one cannot be written."""
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
        """Sync and close the file, and write it again if it was deleted meanwhile.

        Raise `NotWritten` if not all of it may be on the disk, or another file has its name; the message says where the answers are.
        """
        self._closing.set()
        self._unsynced.set()
        if self._syncing is not None:
            self._syncing.join()
            self._sync()
        try:
            self._restore()
        finally:
            os.close(self._file)
        self._check()

    def _replaced(self) -> bool:
        """Return whether another file has its name."""
        path = Path(self.path)
        return path.exists() and not os.path.samestat(path.stat(), os.fstat(self._file))

    def _restore(self) -> None:
        """Write the file again if it was deleted or replaced."""
        path, replaced = Path(self.path), self._replaced()
        if not self.written or (path.exists() and not replaced):
            return
        name = next(free_names(self.path)) if replaced else path
        try:
            with replacing(name) as file, open(self._file, "rb", closefd=False) as answers:
                answers.seek(0)
                shutil.copyfileobj(answers, file)
        except OSError as error:
            what = f"{self.path!r} was deleted while it was written, and cannot be restored"
            raise NotWritten(f"{what}: {error.strerror}") from error
        if replaced:
            what = f"{self.path!r} was replaced by another file while it was written"
            raise NotWritten(f"{what}; the answers are in {str(name)!r}")

    def _check(self) -> None:
        if self._failure is not None:
            raise NotWritten(f"cannot write {self.path!r}: {self._failure.strerror}") from self._failure

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Generator[BinaryIO]:
    """Open a draft of *path* for writing, which takes its name once the block has ended and, with *sync*, it is on the disk."""
    draft = path.with_name(path.name + ".new")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def free_names(path: str) -> Iterator[Path]:
    """Yield names beside *path* that are free."""
    numbered = (Path(f"{path}.old{number}") for number in count(1))
    return (name for name in numbered if not name.exists())


def _write_all(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def _open_locked(path: str, flags: int = 0) -> int:
    """Open a regular file for appending, with an exclusive lock, and return its descriptor. Raise `UsageError` if that fails."""
    try:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | flags, 0o666)
    except OSError as error:
        raise UsageError(f"cannot write {path!r}: {error.strerror}") from None
    try:
        _check_and_lock(file, path)
    except BaseException:
        os.close(file)
        raise
    return file


def _check_and_lock(file: int, path: str) -> None:
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
