"""The expected cost of a call, and the interface of the budget that pays for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import msgspec

if TYPE_CHECKING:
    from microbatch.errors import RequestFailed
    from microbatch.messages import Usage
    from microbatch.protocols import Completion


class Expense(msgspec.Struct, frozen=True):
    """The expected cost of one attempt.

    Attributes:
        usage: The tokens that it is expected to take.
        model: The model that is asked; None for the transport's.
        tenant: The trust domain that it is made for; None for the batcher's own.
        spare: Whether it is made for no caller, and leaves the better part of a budget to calls that are.
        tier: The service tier that is asked for; None for the usual one.
    """

    usage: Usage
    model: str | None = None
    tenant: str | None = None
    spare: bool = False
    tier: str | None = None


class Purse(Protocol):
    """Pays for attempts. Each charge is ended once, by one of the other methods."""

    async def charge(self, expense: Expense) -> Any:
        """Charge *expense* and return the charge, or an `asyncio.Future` after which to try again: calls under way may cost less.

        Raises:
            BudgetExceeded: It is more than is left.
            ConfigError: Its price is not known.
        """
        ...

    async def ended(self, charge: Any, outcome: Completion | RequestFailed, *, heard: bool) -> None:
        """Correct *charge* by the *outcome* of the attempt, *heard* if it has brought any text."""
        ...

    def keep(self, charge: Any) -> None:
        """Keep *charge* as it is: the cost of the attempt is not known."""
        ...

    async def give_back(self, charge: Any) -> None:
        """Take back *charge*: the attempt was not made, or refused, and has cost nothing."""
        ...
