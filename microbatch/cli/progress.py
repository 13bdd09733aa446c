"""How far a run is, on stderr: a tqdm bar if tqdm is there, else a plain line."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Protocol, Self

from microbatch.cli.console import dollars, heard, seconds

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from microbatch.accounting.stats import Stats

REFRESH_SECONDS = 0.2


class Bar(Protocol):
    """What draws."""

    def draw(self, done: int, words: str) -> None:
        """Show that *done* items are done, and *words* beside that."""
        ...

    def close(self) -> None:
        """Leave the last state on the screen."""
        ...


class Progress:
    """Shows items a second, calls, tokens, dollars and the time that is left; nothing without a bar, or when stderr takes no more.

    Args:
        bar: What draws, or None.
        stats: Returns the figures so far.
    """

    def __init__(self, bar: Bar | None, stats: Callable[[], Stats]) -> None:
        self._bar = bar
        self._stats = stats
        self._done = 0
        self._next = 0.0

    def advance(self, count: int = 1) -> None:
        """*count* more items are done."""
        self._done += count
        if self._bar is not None and time.monotonic() >= self._next:
            self._next = time.monotonic() + REFRESH_SECONDS
            self._draw(self._bar)

    def _draw(self, bar: Bar) -> None:
        stats = self._stats()
        tokens = stats.prompt_tokens + stats.completion_tokens
        with heard(sys.stderr):
            bar.draw(self._done, f"{stats.upstream_calls:,} calls, {tokens:,} tokens, {dollars(stats.cost_usd)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._draw(self._bar)
            with heard(sys.stderr):
                self._bar.close()


def make_bar(total: int) -> Bar | None:
    """Return a bar for *total* items; None if stderr is closed or full."""
    try:
        from tqdm import tqdm  # noqa: PLC0415 of the extra `cli`
    except ImportError:
        return PlainBar(total)
    tqdm.monitor_interval = 0  # no thread of its own: it would outlive the run
    with heard(sys.stderr):
        return _TqdmBar(tqdm(total=total, unit=" items", dynamic_ncols=True, mininterval=0))
    return None


class _TqdmBar:
    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def draw(self, done: int, words: str) -> None:
        self._bar.set_postfix_str(words, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.refresh()
        self._bar.close()


class PlainBar:
    """One line that is written over and over."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._start = time.monotonic()
        self._width = 0

    def draw(self, done: int, words: str) -> None:
        """Write the line."""
        took = max(time.monotonic() - self._start, 1e-6)
        left = f", {seconds(took / done * (self._total - done))} left" if done else ""
        line = f"{done:,} of {self._total:,} items, {done / took:,.0f} items/s, {words}{left}"
        sys.stderr.write("\r" + line.ljust(self._width))
        sys.stderr.flush()
        self._width = len(line)

    def close(self) -> None:
        """End the line."""
        sys.stderr.write("\n")
        sys.stderr.flush()
