"""Stops calls that can only be refused: the key is wrong, or the account is out of credit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from microbatch.errors import AuthFailed, QuotaExhausted

if TYPE_CHECKING:
    from microbatch.errors import RequestFailed, StatusError

COOL_DOWN: Final = 30.0
"""Seconds after which one call tries again."""

_FORBIDDEN: Final = 403
_ENOUGH_FORBIDDEN: Final = 3


class Breaker:
    """Open after a refusal for authentication, quota or billing, which concerns every call with the same key alike.

    While it is open, calls fail at once with the same kind of error. After `COOL_DOWN` one call is let through; its success closes
    the breaker. A 403 may be about one prompt (firewalls answer so), so it takes several without an answer between them.
    """

    def __init__(self) -> None:
        self._error: StatusError | None = None
        self._opened = self._until = 0.0
        self._tried = float("inf")  # when a call was let through
        self._forbidden = 0  # 403s since the latest answer

    @property
    def closed(self) -> bool:
        """Whether nothing stands against any call."""
        return self._error is None and not self._forbidden

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
            self._tried = now
            return
        error = self._error.replica()
        error.args = (f"not sent, and no other call before {self._until - now:.0f} s have passed: {self._error}",)
        error.should_retry = False
        raise error

    def note(self, error: RequestFailed | None, *, sent: float, now: float) -> None:
        """Learn from how a call ended.

        Args:
            error: None for an answer.
            sent: When the call was sent.
            now: The time.
        """
        if isinstance(error, AuthFailed) and error.status == _FORBIDDEN:
            self._forbidden += 1
            if self._forbidden < _ENOUGH_FORBIDDEN:
                return
        if isinstance(error, AuthFailed | QuotaExhausted):
            self._error, self._opened, self._until = error, now, now + COOL_DOWN
            self._tried = float("inf")
        elif sent < self._opened:
            return  # how a call that was let in earlier ended tells nothing of what has changed since
        elif error is None:
            self._error, self._forbidden = None, 0
        elif sent >= self._tried:
            self._until = now  # the call that tried has learned nothing; the next one may, its own retry among them
