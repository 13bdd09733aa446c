"""Words to whoever runs a command: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

OK = 0
SOME_FAILED = 1
USAGE = 2
STOPPED = 130

COLUMNS = 80
"""Width that fits every terminal."""


class NotHeard(Exception):
    """The result of a command cannot be written to stdout: its reader has gone, or the disk is full."""


class UsageError(Exception):
    """What was asked for cannot be done as asked; nothing was sent. The command ends with exit status 2."""


def say(text: str = "") -> None:
    """Write a line to stdout, for commands whose result it is.

    Raises:
        NotHeard: It cannot be written; stdout takes no more.
    """
    try:
        _write(sys.stdout, text + "\n")
    except (OSError, ValueError) as error:
        mute(sys.stdout)
        raise NotHeard("cannot write to stdout") from error


def tell(text: str = "") -> None:
    """Write a line to stdout, for commands whose result is elsewhere: if nobody can read it, they go on."""
    with heard(sys.stdout):
        _write(sys.stdout, text + "\n")


def note(text: str = "") -> None:
    """Write a line to stderr; if nobody can read it, the command goes on."""
    with heard(sys.stderr):
        _write(sys.stderr, text + "\n")


@contextlib.contextmanager
def heard(stream: TextIO) -> Generator[None]:
    """Let a block that writes to *stream* end early, and mute the stream, when it is closed or full."""
    try:
        yield
    except (OSError, ValueError):
        mute(stream)


def mute(stream: TextIO) -> None:
    """Let *stream* lead nowhere: what is still in its buffer would fail again when Python flushes it at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
            stream.flush()
        finally:
            os.close(nowhere)


def open_standard_streams() -> None:
    """Open what is closed of stdin, stdout and stderr, leading nowhere: a file opened later would take its number, and its words."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 as long as the process
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115


def _write(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()


def dollars(amount: float | None) -> str:
    """Return *amount* of US dollars, with as many places as small sums need."""
    return "unknown" if amount is None else f"${amount:,.4f}" if amount < 1 else f"${amount:,.2f}"


def seconds(duration: float) -> str:
    """Return a duration as people read it."""
    minutes, rest = divmod(round(duration), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{duration:.1f} s"


def plural(number: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def lost(number: int) -> str:
    """Return what is told of requests that the server of a spool has dropped."""
    return (
        f"{plural(number, 'request')} lost: the server has dropped their content, their places in the queue or their answers. "
        "Put them again; --requeue puts back those whose content is there."
    )


def saving(now: float | None, before: float | None) -> str:
    """Return by how much *now* is below *before*, as "-77 %" or "+12 %"; "" where that says nothing."""
    if now is None or not before:
        return ""
    change = round(100 * (now / before - 1))
    return f"{change:+d} %" if change else "same"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(pairs)
        ).rstrip()
        for pairs in ([*zip(row, widths, strict=True)] for row in (head, *rows))
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])
