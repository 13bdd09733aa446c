"""Where an export goes: a new file, or stdout."""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING

from microbatch.cli import console
from microbatch.cli.console import StdoutError, UsageError
from microbatch.cli.writing.output import NotWritten, replacing

if TYPE_CHECKING:
    from collections.abc import Generator


def check_target(target: str | None) -> None:
    """Raise `UsageError` if the file *target* exists already; "-" is stdout."""
    if target not in (None, "-") and Path(target).exists():
        raise UsageError(f"{target!r} exists already; choose another name, or - for stdout")


@contextmanager
def exporting(target: str) -> Generator[IO[bytes]]:
    """Yield the file *target*, "-" for stdout, to write to. After an error nothing is left of a file.

    Raises:
        StdoutError: Stdout cannot be written.
        NotWritten: The file could not be written to its end.
        UsageError: The file cannot be created.
    """
    to_stdout, opened = target == "-", False
    try:
        with nullcontext(sys.stdout.buffer) if to_stdout else replacing(Path(target)) as file:
            opened = True
            yield file
            file.flush()
    except OSError as error:
        if to_stdout:
            console.mute(sys.stdout)
            raise StdoutError("cannot write to stdout") from error
        kind = NotWritten if opened else UsageError
        raise kind(f"cannot write {target!r}: {error.strerror}") from error
