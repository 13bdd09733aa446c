"""Transient failures: which errors they are, how long to wait before the next attempt, and how many retries are allowed in total."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from microbatch.errors import ConnectFailed, QuotaExhausted, RateLimited, ServerError, StatusError, TransportTimeout

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.policy import RetryPolicy

# First attempts whose share of retries is saved: enough for all slots of a default policy to use all their attempts once, so that the
# savings of a quiet day do not become a storm of retries.
_SAVED_FIRSTS: Final = 1_000


def is_transient(error: BaseException) -> bool:
    """Return whether the same request may succeed later; the endpoint's `x-should-retry` counts more than the status."""
    if isinstance(error, QuotaExhausted):
        return False
    if isinstance(error, StatusError) and error.should_retry is not None:
        return error.should_retry
    return isinstance(error, ConnectFailed | TransportTimeout | RateLimited | ServerError)


class Backoff:
    """Exponential back-off from *first* to *longest* seconds.

    With a *draw* of random numbers from 0 to 1, delays have full jitter (AWS Architecture Blog, "Exponential Backoff And Jitter"):
    they are random between 0 and the exponential value.

    Attributes:
        limit: Upper bound of the latest delay; 0.0 before the first one and after `reset`.
    """

    def __init__(self, first: float, longest: float, *, draw: Callable[[], float] | None = None) -> None:
        self.limit: float = 0.0
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


class RetryBudget:
    """Retries that all calls of an account share, so that an outage is not answered with a multiple of the load.

    As in Finagle and gRPC (proposal A6) each first attempt earns part of a retry, and there is a small reserve for low traffic.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self._share = policy.budget
        self._balance = float(policy.reserve)
        self._most = policy.reserve + policy.budget * _SAVED_FIRSTS

    def first(self) -> float:
        """Note a first attempt; return the part of a retry that it earned."""
        before = self._balance
        self._balance = min(self._most, before + self._share)
        return self._balance - before

    def take_back(self, earned: float) -> None:
        """Take back what an attempt *earned* that was not made."""
        self._balance -= earned

    def draw(self) -> bool:
        """Take a retry; return whether there was one."""
        if self._balance < 1 - 1e-9:  # five times 0.2 is not quite 1
            return False
        self._balance -= 1
        return True

    def give_back(self) -> None:
        """Return a retry that was not made."""
        self._balance = min(self._most, self._balance + 1)
