"""Progress on stderr: a tqdm bar if tqdm is installed, else a plain line."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Self

from microbatch.cli.console import dollars, muted_on_error, seconds

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from microbatch.accounting.stats import Stats

REFRESH_SECONDS = 0.2


class Progress:
    """Shows the items that are done, items per second, calls, tokens, dollars and the time left.

    Args:
        bar: Draws it; None shows nothing.
        stats: Returns the figures so far.
    """

    def __init__(self, bar: TqdmBar | PlainBar | None, stats: Callable[[], Stats]) -> None:
        self._bar = bar
        self._stats = stats
        self._done = 0
        self._next = 0.0

    def advance(self, count: int = 1) -> None:
        """Count *count* more items as done."""
        self._done += count
        if self._bar is not None and time.monotonic() >= self._next:
            self._next = time.monotonic() + REFRESH_SECONDS
            self._draw(self._bar)

    def _draw(self, bar: TqdmBar | PlainBar) -> None:
        stats = self._stats()
        tokens = stats.prompt_tokens + stats.completion_tokens
        with muted_on_error(sys.stderr):
            bar.draw(self._done, f"{stats.upstream_calls:,} calls, {tokens:,} tokens, {dollars(stats.cost_usd)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._draw(self._bar)
            with muted_on_error(sys.stderr):
                self._bar.close()


def make_bar(total: int, *, shown: bool | None = True) -> TqdmBar | PlainBar | None:
    """Return a bar for *total* items.

    Args:
        total: Items in all.
        shown: Whether a bar is wanted; None wants one if stderr is a terminal.

    Returns:
        None if no bar is wanted, or stderr is closed or full.
    """
    if not (sys.stderr.isatty() if shown is None else shown):
        return None
    try:
        from tqdm import tqdm  # noqa: PLC0415 of the extra `cli`
    except ImportError:
        return PlainBar(total)
    tqdm.monitor_interval = 0  # no thread of its own: it would outlive the run
    with muted_on_error(sys.stderr):
        return TqdmBar(tqdm(total=total, unit=" items", dynamic_ncols=True, mininterval=0))
    return None


class TqdmBar:
    """A bar of tqdm."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def draw(self, done: int, text: str) -> None:
        """Show that *done* items are done, and *text* beside that."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._bar.refresh()
        self._bar.close()


class PlainBar:
    """A line that is rewritten in place."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._start = time.monotonic()
        self._width = 0

    def draw(self, done: int, text: str) -> None:
        """Show that *done* items are done, and *text* beside that."""
        took = max(time.monotonic() - self._start, 1e-6)
        left = f", {seconds(took / done * (self._total - done))} left" if done else ""
        line = f"{done:,} of {self._total:,} items, {done / took:,.0f} items/s, {text}{left}"
        sys.stderr.write("\r" + line.ljust(self._width))
        sys.stderr.flush()
        self._width = len(line)

    def close(self) -> None:
        """Leave the last state on the screen."""
        sys.stderr.write("\n")
        sys.stderr.flush()
