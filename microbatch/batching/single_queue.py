"""What waits for a slot without a lane: requests that go alone, and borrowers, who use the slot themselves."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Hashable

    from microbatch.batching.permits import Account
    from microbatch.batching.ticket import AloneReason, Ticket


class SingleQueue:
    """Requests of one account, tenant and priority that go alone, in order of arrival; due whenever one waits.

    Attributes:
        account: Whose permits they need.
        tenant: Whose requests they are.
        rank: Their priority; see `microbatch.batching.fair_queue`.
        queued: The scheduler's mark.
    """

    __slots__ = ("_live", "_waiting", "account", "queued", "rank", "tenant")

    def __init__(self, account: Account, tenant: Hashable, rank: int) -> None:
        self.account = account
        self.tenant = tenant
        self.rank = rank
        self.queued = False
        self._waiting: deque[tuple[Ticket, AloneReason]] = (
            deque()
        )  # discarded ones stay until they come up, or are too many
        self._live = 0

    @property
    def due(self) -> bool:
        """Whether a request waits."""
        while self._waiting and self._waiting[0][0].queue is not self:
            self._waiting.popleft()
        return bool(self._waiting)

    @property
    def cost(self) -> int:
        """Tokens that the oldest waiting request is charged. The queue must be due."""
        return self._waiting[0][0].cost

    def add(self, ticket: Ticket, reason: AloneReason) -> None:
        """Queue *ticket*, which goes alone for *reason*."""
        ticket.queue = self
        self._waiting.append((ticket, reason))
        self._live += 1

    def discard(self, ticket: Ticket, *, moved: bool = False) -> None:
        """*ticket*, which waits here, has settled (its caller left), or has *moved* to another queue: forget it."""
        if moved:
            ticket.queue = None
        else:
            ticket.taken()
        self._live -= 1
        if len(self._waiting) > 2 * self._live + 64:
            self._waiting = deque(entry for entry in self._waiting if entry[0].queue is self)

    def take(self) -> tuple[Ticket, AloneReason] | None:
        """Remove the oldest waiting request and return it with its reason; None if its caller has left in this very turn."""
        if not self.due:
            raise AssertionError("take() from a queue that is not due")
        ticket, reason = self._waiting.popleft()
        if ticket.future.done():
            return None
        self._live -= 1
        ticket.taken()
        return ticket, reason

    def waiting(self) -> list[Ticket]:
        """Return what waits, oldest first."""
        return [ticket for ticket, _ in self._waiting if ticket.queue is self and not ticket.future.done()]


class SlotLease:
    """A slot and a permit for work of the borrower's own.

    Attributes:
        cost: Tokens that the permit is charged.
        granted: Done when the loan is; fails if it never will be.
        returned: Set by the borrower in the end.
        used: Whether the borrower came to have it, and sent something.
    """

    __slots__ = ("cost", "granted", "returned", "used")

    def __init__(self, cost: int, granted: asyncio.Future[None], returned: asyncio.Event) -> None:
        self.cost = cost
        self.granted = granted
        self.returned = returned
        self.used = False


class SlotQueue:
    """Who waits for a loan from one account, in order of arrival."""

    __slots__ = ("_waiting", "account", "queued", "rank", "tenant")

    def __init__(self, account: Account, rank: int) -> None:
        self.account = account
        self.tenant = None
        self.rank = rank
        self.queued = False
        self._waiting: deque[SlotLease] = deque()

    @property
    def due(self) -> bool:
        """Whether somebody waits."""
        while self._waiting and self._waiting[0].granted.done():
            self._waiting.popleft()
        return bool(self._waiting)

    @property
    def cost(self) -> int:
        """Tokens that the oldest loan is charged. The queue must be due."""
        return self._waiting[0].cost

    def add(self, loan: SlotLease) -> None:
        """Queue a borrower."""
        self._waiting.append(loan)

    def take(self) -> SlotLease:
        """Grant the loan to who has waited longest. Somebody must wait."""
        loan = self._waiting.popleft()
        loan.granted.set_result(None)
        return loan

    def refuse(self, error: Exception) -> None:
        """Send everybody away with *error*."""
        while self.due:
            self._waiting.popleft().granted.set_exception(error)
