"""The number of concurrent calls that an endpoint can handle, found by additive increase and multiplicative decrease."""

from __future__ import annotations

from typing import Final

from microbatch.errors import RateLimited, RequestFailed, ServerError, TransportTimeout

INITIAL: Final = 20.0
"""The initial limit of Netflix's concurrency-limits."""

_DECREASE: Final = 0.5
_OVERLOADED: Final = frozenset({503, 529})


class Concurrency:
    """A limit on calls under way that grows by one with each round of successes and halves on overload."""

    def __init__(self) -> None:
        self.limit = INITIAL
        self._cut_at = self._full_at = float("-inf")

    def allows(self, in_flight: int) -> bool:
        """Return whether one more call may start."""
        return in_flight < max(1, int(self.limit))

    def note(self, error: RequestFailed | None, *, sent: float, in_flight: int, now: float) -> None:
        """Learn from the end of a call, with *error* None for an answer, and itself included in *in_flight*."""
        if isinstance(error, RateLimited | TransportTimeout) or (
            isinstance(error, ServerError) and error.status in _OVERLOADED
        ):
            if sent > self._cut_at:  # calls sent before the last cut are of the same overload
                self.limit = max(1.0, self.limit * _DECREASE)
                self._cut_at = now
            return
        if in_flight >= int(self.limit):
            self._full_at = now
        # Of calls that end together only the first sees the limit reached, but it was reached during all of them.
        if error is None and sent <= self._full_at:
            self.limit += 1 / self.limit
