"""Stops calls that can only be refused: the key is wrong, or the account is out of credit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from microbatch.errors import AuthFailed, QuotaExhausted

if TYPE_CHECKING:
    from microbatch.errors import RequestFailed, StatusError

COOL_DOWN: Final = 30.0
"""Seconds after which one call tries again."""


class Breaker:
    """Open after a refusal for authentication, quota or billing, which concerns every call with the same key alike.

    While it is open, calls fail at once with the same kind of error. After `COOL_DOWN` one call is let through; its success closes
    the breaker.
    """

    def __init__(self) -> None:
        self._error: StatusError | None = None
        self._until = 0.0

    def is_open(self, now: float) -> bool:
        """Whether calls would fail at once."""
        return self._error is not None and now < self._until

    def check(self, now: float) -> None:
        """Let a call pass.

        Raises:
            StatusError: A copy of the refusal that opened the breaker, which says so.
        """
        if self._error is None:
            return
        if now >= self._until:
            # Counted from here and not from the outcome: so only one call tries, even if it never comes back.
            self._until = now + COOL_DOWN
            return
        error = self._error.replica()
        error.args = (f"not sent, and no other call before {self._until - now:.0f} s have passed: {self._error}",)
        error.should_retry = False
        raise error

    def note(self, error: RequestFailed | None, now: float) -> None:
        """Learn from how a call ended; None for an answer."""
        if isinstance(error, AuthFailed | QuotaExhausted):
            self._error, self._until = error, now + COOL_DOWN
        elif error is None:
            self._error = None
