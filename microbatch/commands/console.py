"""Words to whoever runs a command: results on stdout, everything else on stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

OK = 0
SOME_FAILED = 1
USAGE = 2
STOPPED = 130

COLUMNS = 80
"""Width that fits every terminal."""


class UsageError(Exception):
    """What was asked for cannot be done as asked; nothing was sent. The command ends with exit status 2."""


def say(text: str = "") -> None:
    """Write a line to stdout."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def note(text: str = "") -> None:
    """Write a line to stderr."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


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
