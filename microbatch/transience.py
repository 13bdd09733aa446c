"""Transient failures: which errors they are, and how long to wait before the next attempt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from microbatch.errors import ConnectFailed, QuotaExhausted, RateLimited, ServerError, StatusError, TransportTimeout

if TYPE_CHECKING:
    from collections.abc import Callable


def is_transient(error: BaseException) -> bool:
    """Return whether the same request may succeed later; the endpoint's `x-should-retry` counts more than the status."""
    if isinstance(error, QuotaExhausted):
        return False
    if isinstance(error, StatusError) and error.should_retry is not None:
        return error.should_retry
    return isinstance(error, ConnectFailed | TransportTimeout | RateLimited | ServerError)


class Backoff:
    """Exponential back-off.

    With a *draw*, delays have full jitter (AWS Architecture Blog, "Exponential Backoff And Jitter"): they are random between 0 and
    the exponential value.

    Args:
        first: Upper bound of the first delay, in seconds.
        longest: Upper bound of any delay, in seconds.
        draw: Return random numbers from 0 to 1; None for no jitter.

    Attributes:
        limit: Upper bound of the latest delay; 0.0 before the first one and after `reset`.
    """

    def __init__(self, first: float, longest: float, *, draw: Callable[[], float] | None = None) -> None:
        self.limit = 0.0
        self._first = min(first, longest)
        self._longest = longest
        self._draw = draw

    def next(self) -> float:
        """Return the delay after one more failure, in seconds."""
        self.limit = min(2 * self.limit, self._longest) or self._first
        return self.limit if self._draw is None else self.limit * self._draw()

    def reset(self) -> None:
        """Start again at the first delay, after a success."""
        self.limit = 0.0
