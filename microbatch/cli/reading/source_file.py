"""The bytes of an input, which are read several times and must be the same each time."""

from __future__ import annotations

import io
import os
import shutil
import stat
import sys
import tempfile
import weakref
from hashlib import blake2b
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Final, Literal

from microbatch.cli.console import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

STDIN: Final = "-"
"""The name by which stdin is given."""

_CHUNK: Final = 1 << 17
_ST_SIZE: Final = 2


class SourceFile:
    """A file, or what stdin or a pipe has held, which is kept in a temporary file.

    Args:
        path: The file; `-` for stdin.

    Attributes:
        name: What messages call it.

    Raises:
        UsageError: It cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.name: str = "stdin" if path == STDIN else path
        self._path = path
        self._kept: IO[bytes] | None = None
        try:
            self._kept = self._keep_unless_regular()
        except OSError as error:
            raise UsageError(f"cannot read {self.name!r}: {error.strerror}") from None
        self._version = self._stat()
        # Facts of the first reading:
        self._size = 0
        self._content = blake2b(digest_size=16)
        self._last = b""
        self._whole = False

    def _keep_unless_regular(self) -> IO[bytes] | None:
        if self._path == STDIN:
            if sys.stdin is None:
                raise UsageError("cannot read stdin: it is closed")
            return kept(sys.stdin.buffer, self)
        with Path(self._path).open("rb") as file:
            return None if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else kept(file, self)

    def is_same(self, path: str) -> bool:
        """Return whether the file *path*, which may be missing, is this one."""
        return self._kept is None and Path(path).exists() and Path(path).samefile(self._path)

    def open(self, *, first: bool = False) -> BinaryIO:
        """Open it from the beginning. With *first*, `change` compares with what is read from it."""
        raw: io.RawIOBase = Reopened(self._kept) if self._kept is not None else io.FileIO(self._path)
        return io.BufferedReader(_Watched(raw, self._note) if first else raw, _CHUNK)

    def _note(self, data: memoryview) -> None:
        self._content.update(data)
        self._size += len(data)
        self._last = bytes(data[-1:]) or self._last
        self._whole = not data

    def change(self, *, by_content: bool) -> Literal["deleted", "changed", "grown"] | None:
        """Return what has happened to the file since its first reading, whose bytes are all that count.

        "grown" means that lines were added after them, when they were the whole file. Without *by_content*, which needs a first reading
        from the beginning on, any new version counts as changed.
        """
        if self._kept is not None:
            return None
        try:
            version = self._stat()
            if version == self._version:
                return None
            digest = self._digest() if by_content else None
        except FileNotFoundError:
            return "deleted"
        grown = self._whole and version[_ST_SIZE] > self._size
        if digest != self._content.digest() or (grown and self._last != b"\n"):
            return "changed"
        if grown:
            return "grown"
        self._version = version
        return None

    def _digest(self) -> bytes:
        """Return the digest of as many bytes as the first reading has read."""
        content, left = blake2b(digest_size=16), self._size
        with Path(self._path).open("rb") as file:
            while left and (data := file.read(min(left, _CHUNK))):
                content.update(data)
                left -= len(data)
        return content.digest()

    def _stat(self) -> tuple[int, ...]:
        """Return a value that changes when the file is replaced or written to; the size is at `_ST_SIZE`."""
        if self._kept is not None:
            return ()
        found = Path(self._path).stat()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def kept(file: IO[bytes], owner: object) -> IO[bytes]:
    """Return a temporary file that holds what is left in *file*, and is closed at the end of its *owner*.

    It has no name where the system can do that, so that nothing is left of it after a crash.
    """
    copy = tempfile.TemporaryFile()  # noqa: SIM115 closed with its owner
    weakref.finalize(owner, copy.close)
    shutil.copyfileobj(file, copy, _CHUNK)
    copy.flush()
    return copy


class Reopened(io.RawIOBase):
    """Reads an open file from the beginning, whatever else reads from the same descriptor."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to *offset* from the beginning, from here or from the end, and return the place."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at}.get(whence, os.fstat(self._file.fileno()).st_size)
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill *buffer*, and return the number of bytes that were left for it."""
        data = os.pread(self._file.fileno(), len(buffer), self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Watched(io.RawIOBase):
    """Reads *raw* and passes what was read to *note*."""

    def __init__(self, raw: io.RawIOBase, note: Callable[[memoryview], None]) -> None:
        self._raw = raw
        self._note = note

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Fill *buffer*; see `io.RawIOBase.readinto`."""
        count = self._raw.readinto(buffer)
        self._note(memoryview(buffer)[: count or 0])
        return count

    def close(self) -> None:
        """Close *raw* too."""
        self._raw.close()
        super().close()
