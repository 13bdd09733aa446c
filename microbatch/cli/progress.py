"""Progress on stderr: a tqdm bar if tqdm is installed, else a plain line."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Final, Self

from microbatch.cli.console import dollars, muted_on_error, seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.accounting.stats import Stats

    Bar = Callable[[int, int, str, bool], None]
    """Shows the items done of how many and a text beside them, and ends the bar if its last argument is true."""

REFRESH_SECONDS: Final = 0.2


class Progress:
    """Shows how many of *total* items are done, items per second, calls, tokens, dollars and the time left, until its block ends.

    The figures are those that *stats* returns. If *shown* is None, it is shown if stderr is a terminal.
    """

    def __init__(self, total: int, stats: Callable[[], Stats], *, shown: bool | None = None) -> None:
        self._total = total
        self._stats = stats
        self._shown = shown
        self._done = 0
        self._next = 0.0
        self._bar: Bar | None = None

    def show(self, done: int) -> None:
        """Show that *done* items are done."""
        self._done = done
        if self._bar is not None and time.monotonic() >= self._next:
            self._next = time.monotonic() + REFRESH_SECONDS
            self._draw()

    def extend(self, count: int) -> None:
        """Add *count* items to the total."""
        self._total += count

    def _draw(self, *, last: bool = False) -> None:
        if self._bar is not None:
            stats = self._stats()
            tokens = stats.prompt_tokens + stats.completion_tokens
            text = f"{stats.upstream_calls:,} calls, {tokens:,} tokens, {dollars(stats.cost_usd)}"
            self._bar(self._done, self._total, text, last)

    def __enter__(self) -> Self:
        if sys.stderr.isatty() if self._shown is None else self._shown:
            self._bar = _tqdm_bar(self._total) or _plain_bar()
        return self

    def __exit__(self, *_: object) -> None:
        self._draw(last=True)


class _Stderr:
    """The standard error stream, muted when it fails.

    tqdm never releases its lock after an error of its file, and then waits for it when the bar is garbage-collected in another thread.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        with muted_on_error(sys.stderr):
            sys.stderr.write(text)

    def flush(self) -> None:
        with muted_on_error(sys.stderr):
            sys.stderr.flush()


def _tqdm_bar(total: int) -> Bar | None:
    try:
        from tqdm import tqdm  # noqa: PLC0415 of the extra `cli`
    except ImportError:
        return None
    tqdm.monitor_interval = 0  # no thread of its own: it would outlive the run
    bar = tqdm(total=total, unit=" items", dynamic_ncols=True, mininterval=0, file=_Stderr())

    def draw(done: int, total: int, text: str, last: bool) -> None:
        bar.total = total
        bar.set_postfix_str(text, refresh=False)
        bar.update(done - bar.n)
        if last:
            bar.refresh()
            bar.close()

    return draw


def _plain_bar() -> Bar:
    start, width, stderr = time.monotonic(), 0, _Stderr()

    def draw(done: int, total: int, text: str, last: bool) -> None:
        nonlocal width
        took = max(time.monotonic() - start, 1e-6)
        left = f", {seconds(took / done * (total - done))} left" if done else ""
        line = f"{done:,} of {total:,} items, {done / took:,.0f} items/s, {text}{left}"
        stderr.write("\r" + line.ljust(width) + ("\n" if last else ""))
        stderr.flush()
        width = len(line)

    return draw
