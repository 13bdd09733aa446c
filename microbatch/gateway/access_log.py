"""The access log: a line of JSON for each request."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import stat
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from queue import Full, Queue
from typing import TYPE_CHECKING, Final

import msgspec

from microbatch.errors import ConfigError

if TYPE_CHECKING:
    from microbatch.gateway.served import Served

logger: Final = logging.getLogger("microbatch")

STDOUT: Final = "-"
MOST_WAITING: Final = 65_536
"""Most lines that wait for a file or a pipe that does not take them; further ones are dropped and counted."""

_CLOSING_SECONDS: Final = 5.0
_MOST_AT_ONCE: Final = 1_024

_encode: Final = msgspec.json.Encoder().encode


class AccessLog:
    """Writes lines in a thread, so that a slow disk or a pipe that is not read delays no request.

    Several processes may write to one file or pipe: no line is torn. A file that was renamed or removed, as by logrotate, is made
    anew with the next line.

    Args:
        path: The file, to whose end lines are added, or "-" for standard output.

    Raises:
        ConfigError: The file cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.path: str = path
        self._offered = 0  # lines; changed by the threads that call `write`
        self._written = 0  # lines; changed by the thread that writes
        self._torn = False  # the file ends with a part of a line
        self._file = _open(path)
        self._waiting: Queue[bytes | None] = Queue(MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._failed = False
        self._closed = False
        self._at_once = _most_at_once(self._file)

    def write(self, record: Served) -> None:
        """Add the line of *record*; a log that is closed drops it."""
        self._offered += 1
        if self._closed:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="microbatch access log", daemon=True)
            self._thread.start()
        time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        with suppress(Full):
            self._waiting.put_nowait(_encode(record.line(time)) + b"\n")

    @property
    def dropped(self) -> int:
        """Lines that are not written: those that still wait, and those that never will be, as too many waited or the file took none."""
        return self._offered - self._written

    async def aclose(self) -> None:
        """Write what waits, for at most 5 s, and close the file."""
        if self._closed:
            return
        self._closed = True
        if self._thread is not None:
            await asyncio.to_thread(self._end, self._thread)
        else:
            self._close()
        if self.dropped:
            logger.warning("the access log lacks %d lines, which %s did not take", self.dropped, self._name)

    def _end(self, thread: threading.Thread) -> None:
        try:
            self._waiting.put(None, timeout=_CLOSING_SECONDS)
        except Full:
            return  # the thread ends with the process
        thread.join(_CLOSING_SECONDS)

    @property
    def _name(self) -> str:
        return "standard output" if self.path == STDOUT else self.path

    def _run(self) -> None:
        lines: list[bytes | None] = []
        while None not in lines:
            lines = [self._waiting.get()]
            while len(lines) < _MOST_AT_ONCE and not self._waiting.empty():
                lines.append(self._waiting.get())
            self._write([line for line in lines if line is not None])
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, lines: list[bytes]) -> None:
        begun = 0
        try:
            if self._file is None:
                sys.stdout.write(b"".join(lines).decode())
                sys.stdout.flush()
                self._written += len(lines)
            else:
                self._reopen_if_renamed()
                while begun < len(lines):
                    piece = _beginning(lines, begun, self._at_once)
                    begun += len(piece)
                    self._write_whole(self._file, b"".join(piece))
            self._failed = False
        except (OSError, ValueError, ConfigError) as error:  # ValueError: the stream is closed
            if not self._failed:  # once for each time of trouble
                self._failed = True
                logger.warning("the access log cannot be written to %s: %s", self._name, error)

    def _write_whole(self, file: int, text: bytes) -> None:
        if self._torn:  # a full disk took a part of a line: the next one does not go on in it
            os.write(file, b"\n")
            self._torn = False
        while text:
            size = os.write(file, text)
            done, text = text[:size], text[size:]
            self._written += done.count(b"\n")
            self._torn = not done.endswith(b"\n")

    def _reopen_if_renamed(self) -> None:
        if self.path == STDOUT or self._file is None:
            return
        mine = os.fstat(self._file)
        try:
            there = os.stat(self.path)  # noqa: PTH116 with the descriptor's above
        except FileNotFoundError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            opened = _open(self.path)
            os.close(self._file)
            self._file, self._torn = opened, False


def check_log(path: str) -> None:
    """Raise `ConfigError` if there can be no access log at *path*. A named pipe is not tried: closing it would end its reader."""
    if Path(path).is_fifo():
        return
    opened = _open(path)
    if opened is not None:
        os.close(opened)


def _most_at_once(file: int | None) -> int:
    """Return how many bytes a write may have so that no other process' come between them."""
    regular = file is None or stat.S_ISREG(os.fstat(file).st_mode)
    return sys.maxsize if regular else select.PIPE_BUF


def _beginning(lines: list[bytes], first: int, most: int) -> list[bytes]:
    """Return the lines from *first* on that have at most *most* bytes together, or the first one if it has more."""
    end, size = first + 1, len(lines[first])
    while end < len(lines) and size + len(lines[end]) <= most:
        size += len(lines[end])
        end += 1
    return lines[first:end]


def _open(path: str) -> int | None:
    """Return the descriptor of a file; None for standard output that is a Python object only."""
    if path == STDOUT:
        try:
            return os.dup(sys.stdout.fileno())
        except (OSError, ValueError):
            return None
    try:
        # Without O_NONBLOCK this would wait for ever for a reader of a named pipe.
        opened = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o640)
    except OSError as error:
        why = "nothing reads this pipe; start its reader first" if error.errno == errno.ENXIO else error.strerror
        raise ConfigError(f"the access log {path} cannot be opened: {why}") from None
    os.set_blocking(opened, True)
    return opened
