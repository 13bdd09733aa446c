"""What waits for a slot without a lane: requests that go alone, and borrowers, who use the slot themselves."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from microbatch.batching.lane import AloneReason, Ticket


class AloneQueue:
    """Requests that go alone, in order of arrival; due whenever one waits."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Ticket, AloneReason]] = deque()
        self.live = 0
        self.queued = False

    @property
    def due(self) -> bool:
        """Whether a request waits."""
        return self.live > 0

    def add(self, ticket: Ticket, reason: AloneReason) -> None:
        """Queue *ticket*, which goes alone for *reason*."""
        self.waiting.append((ticket, reason))
        self.live += 1

    def discard(self) -> None:
        """One waiting ticket has settled (its caller left): forget it."""
        self.live -= 1
        if len(self.waiting) > 2 * self.live + 64:
            self.waiting = deque(entry for entry in self.waiting if not entry[0].future.done())

    def take(self) -> tuple[Ticket, AloneReason]:
        """Remove the oldest waiting ticket and return it with its reason. The queue must be due."""
        while True:
            ticket, reason = self.waiting.popleft()
            if not ticket.future.done():
                self.live -= 1
                return ticket, reason


class BorrowerQueue:
    """Callers who want a slot for work of their own, in order of arrival; each waits on a future."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.queued = False

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
        """Give a slot to who has waited longest. The queue must be due."""
        self._waiting.popleft().set_result(None)

    def refuse(self, error: Exception) -> None:
        """Send everybody away with *error*."""
        while self.due:
            self._waiting.popleft().set_exception(error)
