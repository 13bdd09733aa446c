"""Queues without a lane: requests that go alone, and leases for code outside, which uses the slot itself."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from microbatch.batching.lane import Taken
from microbatch.batching.ticket import NORMAL

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from microbatch.batching.fair_queue import WaitQueue
    from microbatch.batching.permits import Account, SlotLease
    from microbatch.batching.ticket import AloneReason, FlushReason, Ticket


@dataclass(slots=True, eq=False, repr=False)
class SingleQueue:
    """Requests of one account, tenant and priority that go alone, in order of arrival; due whenever one waits."""

    account: Account
    tenant: Hashable
    rank: int
    on_rested: Callable[[SingleQueue], None]
    queued: bool = False
    _waiting: deque[tuple[Ticket, AloneReason]] = field(default_factory=deque)
    """Discarded ones stay until they come up, or are too many."""
    _live: int = 0

    @property
    def due(self) -> bool:
        """True if a request waits."""
        while self._waiting and self._waiting[0][0].queue is not self:
            self._waiting.popleft()
        return bool(self._waiting)

    def next_cost(self) -> int:
        """Return the tokens that the oldest request is charged; the queue must be due."""
        return self._waiting[0][0].cost

    def add(self, ticket: Ticket, reason: AloneReason) -> None:
        """Queue *ticket*, which goes alone for *reason*."""
        ticket.queue = self
        self._waiting.append((ticket, reason))
        self._live += 1

    def discard(self, ticket: Ticket, *, moved: bool = False) -> None:
        """See `TicketQueue`."""
        if moved:
            ticket.queue = None
        else:
            ticket.taken()
        self._live -= 1
        if len(self._waiting) > 2 * self._live + 64:
            self._waiting = deque(entry for entry in self._waiting if entry[0].queue is self)

    def hasten(self, ticket: Ticket, due_at: float, *, bulk: bool) -> None:
        """Do nothing: it is due already."""

    def flush(self, reason: FlushReason) -> None:
        """Do nothing: it is due already."""

    def take(self) -> Taken:
        """Remove the oldest request and return it; nothing if its caller was cancelled in this very step. The queue must be due."""
        if not self.due:
            raise AssertionError("take() from a queue that is not due")
        ticket, reason = self._waiting.popleft()
        if ticket.done:
            return Taken([], reason)
        self._live -= 1
        ticket.taken()
        return Taken([ticket], reason)

    def rested(self) -> None:
        """Note that it takes no turns any more."""
        self.on_rested(self)

    def waiting(self) -> list[Ticket]:
        """Return the tickets that wait, oldest first."""
        return [ticket for ticket, _ in self._waiting if ticket.queue is self and not ticket.done]


class SingleQueues:
    """The queues of requests that go alone, one for each account, tenant and priority.

    Args:
        enqueue: Lets a queue that is due take its turns.
    """

    def __init__(self, enqueue: Callable[[WaitQueue], None]) -> None:
        self._enqueue = enqueue
        self._queues: dict[Hashable, SingleQueue] = {}

    def __len__(self) -> int:
        """Return the number of queues in which requests wait."""
        return len(self._queues)

    def __iter__(self) -> Iterator[SingleQueue]:
        """Yield the queues in which requests wait now."""
        return iter([*self._queues.values()])

    def add(self, ticket: Ticket, reason: AloneReason, account: Account) -> None:
        """Queue *ticket*, which goes alone for *reason* and needs a permit of *account*."""
        spec = ticket.spec
        key = (account, spec.tenant, spec.rank)
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = SingleQueue(account, spec.tenant, spec.rank, self._forget)
        queue.add(ticket, reason)
        self._enqueue(queue)

    def _forget(self, queue: SingleQueue) -> None:
        self._queues.pop((queue.account, queue.tenant, queue.rank), None)


@dataclass(slots=True, eq=False, repr=False)
class SlotQueue:
    """The leases that wait for a slot and a permit of one account, in order of arrival."""

    account: Account
    on_rested: Callable[[SlotQueue], None]
    tenant: Hashable = None
    rank: int = NORMAL
    queued: bool = False
    _waiting: deque[SlotLease] = field(default_factory=deque)

    @property
    def due(self) -> bool:
        """True if a lease waits."""
        while self._waiting and self._waiting[0].granted.done():
            self._waiting.popleft()
        return bool(self._waiting)

    def next_cost(self) -> int:
        """Return the tokens that the oldest lease is charged; the queue must be due."""
        return self._waiting[0].cost

    def add(self, lease: SlotLease) -> None:
        """Queue *lease*."""
        self._waiting.append(lease)

    def take(self) -> Taken:
        """Grant the oldest lease and return it. The queue must be due."""
        lease = self._waiting.popleft()
        lease.granted.set_result(None)
        return Taken([], lease=lease)

    def rested(self) -> None:
        """Note that it takes no turns any more."""
        self.on_rested(self)

    def refuse(self, error: Exception) -> None:
        """Fail every lease that waits with *error*."""
        while self.due:
            self._waiting.popleft().granted.set_exception(error)
