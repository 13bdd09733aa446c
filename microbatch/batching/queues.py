"""What waits for a slot without a lane: requests that go alone, and borrowers, who use the slot themselves."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from microbatch.batching.ticket import AloneReason, Ticket


class AloneQueue:
    """Requests that go alone, in order of arrival; due whenever one waits."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Ticket, AloneReason]] = (
            deque()
        )  # discarded ones stay until they come up, or are too many
        self._live = 0
        self.queued = False

    @property
    def due(self) -> bool:
        """Whether a request waits."""
        while self._waiting and self._waiting[0][0].queue is not self:
            self._waiting.popleft()
        return bool(self._waiting)

    def add(self, ticket: Ticket, reason: AloneReason) -> None:
        """Queue *ticket*, which goes alone for *reason*."""
        ticket.queue = self
        self._waiting.append((ticket, reason))
        self._live += 1

    def discard(self, ticket: Ticket) -> None:
        """*ticket*, which waits here, has settled (its caller left): forget it."""
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


class BorrowerQueue:
    """Callers who want a slot for work of their own, in order of arrival; each waits on a future."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def due(self) -> bool:
        """Whether somebody waits."""
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft()
        return bool(self._waiting)

    def add(self, place: asyncio.Future[None]) -> None:
        """Queue a caller who waits on *place*."""
        self._waiting.append(place)

    def lend(self) -> None:
        """Give a slot to who has waited longest. Somebody must wait."""
        self._waiting.popleft().set_result(None)

    def refuse(self, error: Exception) -> None:
        """Send everybody away with *error*."""
        while self.due:
            self._waiting.popleft().set_exception(error)
