"""What the batching rooms ask of those who keep limits: a permit for each call. See `microbatch.transports.accounts`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from microbatch.errors import RequestFailed


class Budget(Protocol):
    """Retries that calls may draw on together."""

    def draw(self) -> bool:
        """Take a retry, if there is one left."""
        ...


class Permit(Protocol):
    """Leave for one call to be sent.

    Attributes:
        account: Whose limits count.
        tokens: What each attempt is charged.
        error: What the latest attempt failed with, or None.
    """

    tokens: int
    error: RequestFailed | None

    @property
    def account(self) -> Account:
        """See above."""
        ...

    def cancel(self) -> None:
        """Give back what was paid for an attempt that will not be made."""
        ...

    def used(self) -> None:
        """The attempt was made by somebody who tells nothing of how it ended."""
        ...


class Account(Protocol):
    """One (endpoint, model, credentials).

    Attributes:
        max_tokens: The most tokens a minute that one call can be granted; None if tokens are not counted.
        has_worked: Whether a call was answered under its key.
    """

    max_tokens: int | None
    has_worked: bool

    @property
    def budget(self) -> Budget:
        """Its retries."""
        ...

    def pay(self, tokens: int) -> Permit | None:
        """Return a permit whose first attempt is paid; None if there is none now, and then the scheduler is told when to ask."""
        ...

    def permit(self, tokens: int, *, again: bool = False) -> Permit:
        """Return a permit whose attempts wait for their turn; *again* if the retry budget has paid for it."""
        ...


class Accounts(Protocol):
    """The accounts."""

    def listen(self, ready: Callable[[Account], None]) -> None:
        """Call *ready* with an account that refused a permit and may have one now."""
        ...

    def of(self, model: str | None, headers: Mapping[str, str]) -> Account:
        """Return the account of calls to *model* with *headers*."""
        ...
