"""The protocols of those who keep limits: a permit for each call. Implemented in `microbatch.transports.accounts`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping

    from microbatch.errors import RequestFailed


class Budget(Protocol):
    """Retries that calls may draw on together."""

    def draw(self) -> bool:
        """Take a retry if there is one left."""
        ...


class Permit(Protocol):
    """Leave for one call to be sent, attempt by attempt; see `microbatch.transports.accounts.Permit` for the attributes."""

    tokens: int
    rank: int
    combined: bool
    begun: bool
    paid: bool
    slot: bool
    overdrawn: bool
    error: RequestFailed | None

    @property
    def account(self) -> Account:
        """The account whose limits count."""
        ...

    def pay(self) -> bool:
        """Pay the next attempt; return False if it has to wait for a permit."""
        ...

    async def admit(self) -> None:
        """Wait until the next attempt is paid and has a slot."""
        ...

    def finish(self) -> None:
        """Give back what was paid for an attempt that will not be made; the call is over. May be called again."""
        ...

    def used(self) -> None:
        """Note that the attempt was made by the holder of a lease, and that its outcome is not known."""
        ...


class Account(Protocol):
    """One (endpoint, model, credentials); see `microbatch.transports.accounts.Account` for the attributes."""

    max_tokens: int | None
    has_worked: bool
    on_wire: int
    begun: int
    backing_off: int

    @property
    def budget(self) -> Budget:
        """Its retries."""
        ...

    def permit(self, tokens: int, rank: int, *, again: bool = False) -> Permit:
        """Return a permit of which nothing is paid yet; *again* if the retry budget has paid for its first attempt."""
        ...


class Slots(Protocol):
    """The scheduler as accounts know it; see `microbatch.batching.scheduler.Scheduler`."""

    def ready(self, account: Account) -> None:
        """Note that *account* refused a permit and may have one now."""
        ...

    def changed(self, account: Account) -> None:
        """Note that calls of *account* have begun, finished, or started or ended a back-off."""
        ...

    def released(self, permit: Permit) -> None:
        """Take back the slot of *permit*, whose attempt is over."""
        ...

    async def admit(self, permit: Permit) -> None:
        """Wait until the next attempt of *permit* is paid and has a slot, or could only be refused."""
        ...


class Accounts(Protocol):
    """All accounts of a batcher."""

    def of(self, model: str | None, headers: Mapping[str, str]) -> Account:
        """Return the account of calls to *model* with *headers*."""
        ...


@dataclass(slots=True, eq=False)
class SlotLease:
    """A slot and a permit for code outside, which makes one attempt of its own.

    Attributes:
        cost: Tokens that the permit is charged.
        granted: Done when the slot is granted; fails if it never will be.
        returned: Set by the holder in the end.
        used: Whether the holder sent something.
    """

    cost: int
    granted: asyncio.Future[None]
    returned: asyncio.Event
    used: bool = False
