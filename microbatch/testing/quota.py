"""Quota of the simulated endpoint: requests and tokens within any 60 seconds of the loop's clock.

The strictest reading of "per minute": there is no bucket that refills and no minute that begins anew, so whatever keeps to
this keeps to any other reading. A charge counts from the instant it is made and no longer 60 seconds later. Nothing here
waits or looks at a clock.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from microbatch.checking import Count, check_fields
from microbatch.errors import ConfigError
from microbatch.messages import Limits
from microbatch.testing.reading import EndpointError

WINDOW = 60.0

# Loops wake sleepers up to a nanosecond early and sums of floats are off by less; both are no reason for a refusal.
SLACK = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """The requests and tokens that one key may use of one model within any 60 seconds.

    A request is charged, when it has been read, one request and the tokens of its prompt and of the longest reply it allows
    (its max_tokens; without one, those of the reply that it will get). What is refused counts as a request, but uses no tokens.

    Args:
        rpm: Most requests; None sets no limit.
        tpm: Most tokens; None sets no limit. A request that is larger by itself is always refused.

    Raises:
        ConfigError: Both are None, or one is below 1.
    """

    rpm: Count | None = None
    tpm: Count | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rpm is None and self.tpm is None:
            raise ConfigError("a Quota needs rpm or tpm")


class Meter:
    """The usage of one model by one key.

    Args:
        quota: The limits.
        model: The model's name, for messages.
    """

    def __init__(self, quota: Quota, model: str) -> None:
        self._quota = quota
        self._model = model
        self._asked = _Window()
        self._admitted = _Window()
        self._tokens = _Window()

    @property
    def peaks(self) -> tuple[int, int]:
        """Most requests that were let in, and most tokens that were charged, within any 60 seconds."""
        return self._admitted.peak, self._tokens.peak

    def charge(self, tokens: int, now: float) -> Limits:
        """Charge a request of *tokens* at the loop time *now*, which never goes back, and return what is left.

        Raises:
            EndpointError: It is refused, with 429.
        """
        for window in (self._asked, self._admitted, self._tokens):
            window.forget(now)
        self._asked.add(1, now)
        refusal = self._refusal(tokens, now)
        if refusal is None:
            self._admitted.add(1, now)
            self._tokens.add(tokens, now)
        limits = self._limits(now)
        if refusal is not None:
            refusal.limits = limits
            raise refusal
        return limits

    def _refusal(self, tokens: int, now: float) -> EndpointError | None:
        """Return why a request that has just been counted is refused, or None."""
        rpm, tpm = self._quota.rpm, self._quota.tpm
        if tpm is not None and tokens > tpm:
            message = (
                f"Request too large for {self._model} on tokens per min (TPM): Limit {tpm}, Requested {tokens}. "
                "The input or output tokens must be reduced in order to run successfully."
            )
            return EndpointError(429, message, kind="tokens", code="rate_limit_exceeded")
        if rpm is not None and self._asked.used > rpm:
            kind, what = "requests", f"requests per min (RPM): Limit {rpm}, Used {self._asked.used - 1}, Requested 1"
        elif tpm is not None and self._tokens.used + tokens > tpm:
            used = self._tokens.used
            kind, what = "tokens", f"tokens per min (TPM): Limit {tpm}, Used {used}, Requested {tokens}"
        else:
            return None
        # The next try is one request more than those that count by now, this one among them.
        wait = max(
            self._asked.until_left(self._asked.used + 1 - rpm, now) if rpm is not None else 0.0,
            self._tokens.until_left(self._tokens.used + tokens - tpm, now) if tpm is not None else 0.0,
        )
        message = f"Rate limit reached for {self._model} on {what}. Please try again in {go_duration(wait)}."
        return EndpointError(429, message, kind=kind, code="rate_limit_exceeded", retry_after=wait)

    def _limits(self, now: float) -> Limits:
        rpm, tpm = self._quota.rpm, self._quota.tpm
        return Limits(
            limit_requests=rpm,
            remaining_requests=None if rpm is None else max(0, rpm - self._asked.used),
            reset_requests=None if rpm is None else self._asked.until_empty(now),
            limit_tokens=tpm,
            remaining_tokens=None if tpm is None else tpm - self._tokens.used,
            reset_tokens=None if tpm is None else self._tokens.until_empty(now),
        )


class _Window:
    """The charges of the last 60 seconds, the largest sum so far, and the sum of all."""

    def __init__(self) -> None:
        self._charges: deque[tuple[float, int]] = deque()
        self.used = self.peak = self.total = 0

    def forget(self, now: float) -> None:
        """Drop charges that no longer count."""
        while self._charges and self._charges[0][0] + WINDOW - now <= SLACK:
            self.used -= self._charges.popleft()[1]

    def add(self, amount: int, now: float) -> None:
        if amount:
            self._charges.append((now, amount))
            self.used += amount
            self.total += amount
            self.peak = max(self.peak, self.used)

    def until_left(self, amount: int, now: float) -> float:
        """Return the seconds until *amount* of what counts has left; 0 if there is no need for any to."""
        wait = 0.0
        for charged_at, charge in self._charges:
            if amount <= 0:
                break
            amount -= charge
            wait = charged_at + WINDOW - now
        return wait

    def until_empty(self, now: float) -> float:
        """Return the seconds until nothing counts any more."""
        return self._charges[-1][0] + WINDOW - now if self._charges else 0.0


def milliseconds(seconds: float) -> int:
    """Return a wait in whole milliseconds, rounded up, so that a client that waits that long is not early."""
    # Rounding errors of float arithmetic must not add a millisecond.
    return math.ceil(round(seconds * 1_000, 3))


def go_duration(seconds: float) -> str:
    """Return a duration as Go writes it, and so OpenAI: "12ms", "1s", "14.7s", "6m0s"."""
    whole_ms = milliseconds(seconds)
    if 0 < whole_ms < 1_000:  # noqa: PLR2004 - a second
        return f"{whole_ms}ms"
    minutes, rest = divmod(whole_ms, 60_000)
    return f"{minutes}m{rest / 1_000:g}s" if minutes else f"{rest / 1_000:g}s"
