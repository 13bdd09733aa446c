"""Two guards of an account, which learn from how its calls ended.

A circuit breaker stops calls that can only be refused: the key is wrong, or the account is out of credit. A limit on calls under way
finds out how many the endpoint can handle, by additive increase and multiplicative decrease.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from microbatch.errors import AuthFailed, QuotaExhausted, RateLimited, ServerError, StatusError, TransportTimeout

if TYPE_CHECKING:
    from microbatch.errors import RequestFailed

COOL_DOWN: Final = 30.0  # seconds after which one call tries again
_FORBIDDEN: Final = 403
_ENOUGH_FORBIDDEN: Final = 3

INITIAL: Final = 20.0  # as in Netflix's concurrency-limits
_DECREASE: Final = 0.5
_OVERLOADED: Final = frozenset({503, 529})


class Breaker:
    """Opens after a refusal for authentication, quota or billing, which concerns every call with the same key.

    While it is open, calls fail at once with the same kind of error. After `COOL_DOWN` one call *probes* while the others wait for
    its outcome: an answer closes the breaker, another such refusal opens it again, and after anything else the next call probes.
    A 403 may be about the content of one request: those of combined calls do not count, and several of single calls are needed
    without an answer between them.

    Attributes:
        probe: The permit of the call that probes, or None.
    """

    def __init__(self) -> None:
        self.probe: object | None = None
        self._error: StatusError | None = None
        self._opened = self._until = 0.0
        self._forbidden = 0  # 403s of single calls since the latest answer

    def is_open(self, now: float) -> bool:
        """Return whether calls fail at once."""
        return self._error is not None and now < self._until

    def needs_probe(self, now: float) -> bool:
        """Return whether the cool-down has passed and the next call has to probe."""
        return self._error is not None and now >= self._until and self.probe is None

    def check(self, now: float) -> None:
        """Raise a copy of the refusal that opened the breaker, which says so, while it is open."""
        if self._error is None or now >= self._until:
            return
        error = self._error.replica()
        error.args = (f"not sent, and no other call before {self._until - now:.0f} s have passed: {self._error}",)
        error.should_retry = False
        raise error

    def note(self, error: RequestFailed | None, *, sent: float, now: float, combined: bool, permit: object) -> None:
        """Learn from the end of a call that was *sent* at that time, with *error* None for an answer."""
        probed = self.forget(permit)
        if isinstance(error, StatusError) and error.again:
            return  # it is sent differently, with another key for one
        if isinstance(error, AuthFailed) and error.status == _FORBIDDEN:
            if combined:
                return
            self._forbidden += 1
            if self._forbidden < _ENOUGH_FORBIDDEN and not probed:
                return
        if error is not None and isinstance(error, AuthFailed | QuotaExhausted):
            self._error, self._opened, self._until = error, now, now + COOL_DOWN
        elif error is None and sent >= self._opened:  # an earlier call was answered before the refusal
            self._error, self._forbidden = None, 0

    def forget(self, permit: object) -> bool:
        """End the probe if the call of *permit* is it; return whether it was."""
        if self.probe is not permit:
            return False
        self.probe = None
        return True


class Concurrency:
    """A limit on calls under way that grows by one with each round of successes and halves on overload."""

    def __init__(self) -> None:
        self.limit: float = INITIAL
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
