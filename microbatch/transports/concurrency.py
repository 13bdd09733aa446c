"""How many calls an endpoint bears at once, found out by trying: additive increase, multiplicative decrease."""

from __future__ import annotations

from typing import Final

from microbatch.errors import RateLimited, RequestFailed, ServerError, TransportTimeout

INITIAL: Final = 20.0
"""Where Netflix's concurrency-limits starts."""

_DECREASE: Final = 0.5
_OVERLOADED: Final = frozenset({503, 529})


class Concurrency:
    """A limit on calls under way that grows by one with each round of successes and halves on overload."""

    def __init__(self) -> None:
        self.limit = INITIAL
        self._cut_at = float("-inf")

    def allows(self, in_flight: int) -> bool:
        """Whether one more call may start."""
        return in_flight < max(1, int(self.limit))

    def note(self, error: RequestFailed | None, *, sent: float, in_flight: int, now: float) -> None:
        """Learn from how a call ended.

        Args:
            error: None for an answer.
            sent: When the call was sent.
            in_flight: Calls under way, this one included.
            now: The time.
        """
        overloaded = isinstance(error, RateLimited | TransportTimeout) or (
            isinstance(error, ServerError) and error.status in _OVERLOADED
        )
        if overloaded:
            # What was sent before the last cut tells nothing new: one overload is one cut.
            if sent > self._cut_at:
                self.limit = max(1.0, self.limit * _DECREASE)
                self._cut_at = now
        elif error is None and in_flight >= int(self.limit):
            self.limit += 1 / self.limit
