"""Console output of the commands: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any, Final, TextIO

import msgspec

if TYPE_CHECKING:
    import argparse
    from collections.abc import Generator, Iterable, Sequence

OK: Final = 0
SOME_FAILED: Final = 1
USAGE: Final = 2
OVER_BUDGET: Final = 3
STOPPED: Final = 130
"""Exit statuses."""

COLUMNS: Final = 80
"""Width of the text that is printed."""


class StdoutError(Exception):
    """The result of a command cannot be written to stdout: the reader has closed it, or the disk is full."""


class UsageError(Exception):
    """The command or its files are wrong, and nothing was sent. The command ends with exit status 2."""


def print_result(text: str = "") -> None:
    """Write a line to stdout, for commands whose result is on stdout. Raise `StdoutError` if it cannot be written."""
    try:
        _write(sys.stdout, text + "\n")
    except (OSError, ValueError) as error:
        mute(sys.stdout)
        raise StdoutError("cannot write to stdout") from error


def report(text: str = "") -> None:
    """Write a line to stdout, for commands whose result is elsewhere; an error of stdout is ignored."""
    with muted_on_error(sys.stdout):
        _write(sys.stdout, text + "\n")


def report_summary(
    args: argparse.Namespace, lines: Iterable[str], figures: dict[str, Any], *, stdout_taken: bool = False
) -> None:
    """Write *lines*, or with --json the *figures*, to stdout; then the lines go to stderr.

    With *stdout_taken* all goes to stderr. After `hush` the lines are left out.
    """
    for line in () if _hushed else lines:
        (note if args.json or stdout_taken else report)(line)
    if args.json:
        (note if stdout_taken else report)(msgspec.json.encode(figures).decode())


def report_json(figures: object) -> None:
    """Write *figures* to stdout as a line of JSON; an error of stdout is ignored."""
    report(msgspec.json.encode(figures).decode())


def note(text: str = "") -> None:
    """Write a line to stderr; an error of stderr is ignored."""
    with muted_on_error(sys.stderr):
        _write(sys.stderr, text + "\n")


_hushed = False


def hush(hushed: bool) -> None:
    """Leave out, from now on, what is no error and no result; or, with False, no longer."""
    global _hushed  # noqa: PLW0603 a command has one console
    _hushed = hushed


def remark(text: str) -> None:
    """Write a line to stderr that is no error; see `hush`."""
    if not _hushed:
        note(text)


@contextlib.contextmanager
def muted_on_error(stream: TextIO) -> Generator[None]:
    """End the block and mute *stream* when the block raises because the stream is closed or full."""
    try:
        yield
    except (OSError, ValueError):
        mute(stream)


def mute(stream: TextIO) -> None:
    """Redirect *stream* to the null device; else Python would fail again on its buffer when it exits."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())
            stream.flush()
        finally:
            os.close(null)


def open_standard_streams() -> None:
    """Open those of stdin, stdout and stderr that are closed on the null device.

    Otherwise a file that is opened later would take the number of a standard stream, and its output.
    """
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
    """Return *amount* of US dollars with four decimal places below one dollar, else two."""
    return "unknown" if amount is None else f"${amount:,.4f}" if amount < 1 else f"${amount:,.2f}"


def seconds(duration: float) -> str:
    """Return *duration*, in seconds, in a unit that suits it."""
    minutes, rest = divmod(round(duration), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{duration:.1f} s"


def plural(number: int, noun: str) -> str:
    """Return *number* with *noun* in the singular or plural."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def percent(share: float) -> str:
    """Return *share* in percent with one decimal, as in "1.5 %"; a small negative one is "0.0 %"."""
    return f"{round(100 * share, 1) + 0.0:.1f} %"  # -0.0 + 0.0 is 0.0


def change(now: float | None, before: float | None) -> str:
    """Return the change from *before* to *now* as "-77 %" or "+12 %"; "" if one is unknown or *before* is 0."""
    if now is None or not before:
        return ""
    percent = round(100 * (now / before - 1))
    return f"{percent:+d} %" if percent else "same"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first column is aligned to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    first, *others = (
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in (head, *rows)
    )
    return "\n".join([first, "-" * (sum(widths) + 2 * len(widths) - 2), *others])
