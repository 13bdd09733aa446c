"""Queues without a lane: requests that go alone, and leases for code outside, which uses the slot itself."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from microbatch.batching.lane import Work
from microbatch.batching.ticket import SlotLease, Ticket

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from microbatch.batching.fair_queue import WaitQueue
    from microbatch.batching.ticket import AloneReason, FlushReason
    from microbatch.errors import MicrobatchError
    from microbatch.transports.accounts import Account, Permit


@dataclass(slots=True, eq=False, repr=False)
class SingleQueue:
    """Requests of one account, tenant and priority that go alone, or leases, in order of arrival; due whenever one waits."""

    account: Account
    tenant: Hashable
    rank: int
    enqueue: Callable[[WaitQueue], None]
    """Lets it take its turns."""
    emptied: Callable[[], object]
    """Called when it takes no turns any more because nothing waits."""
    queued: bool = False
    _waiting: deque[tuple[Ticket | SlotLease, AloneReason | None]] = field(default_factory=deque)
    """Discarded ones stay until they come up, or are too many."""
    _live: int = 0

    @property
    def due(self) -> bool:
        """True if a request or a lease waits, and the oldest is not held by a look-up."""
        while self._waiting and self._waiting[0][0].queue is not self:
            self._waiting.popleft()
        return bool(self._waiting) and not self._waiting[0][0].held

    @property
    def has_company(self) -> bool:
        """See `TicketQueue`: each goes alone."""
        return False

    @property
    def flushed(self) -> bool:
        """See `TicketQueue`: all that waits is due."""
        return True

    def next_cost(self) -> int:
        """Return the tokens that the oldest is charged; the queue must be due."""
        return self._waiting[0][0].cost

    def add(self, work: Ticket | SlotLease, reason: AloneReason | None) -> None:
        """Queue *work*; a request goes alone for *reason*."""
        work.queue = self
        self._waiting.append((work, reason))
        self._live += 1

    def discard(self, ticket: Ticket | SlotLease, *, moved: bool = False) -> None:
        """See `TicketQueue`."""
        if moved:
            ticket.queue = None
        else:
            ticket.taken()
        self._live -= 1
        if len(self._waiting) > 2 * self._live + 64:
            self._waiting = deque(entry for entry in self._waiting if entry[0].queue is self)
        if self.queued:
            self.enqueue(self)  # what is next may need less
        else:
            self.rested()

    def hasten(self, ticket: Ticket, due_at: float, *, bulk: bool) -> None:
        """Do nothing: it is due already."""

    def flush(self, reason: FlushReason) -> None:
        """Do nothing: it is due already."""

    def looked_up(self) -> None:
        """See `TicketQueue`."""
        if self._live:
            self.enqueue(self)

    def rested(self) -> None:
        """Note that it takes no turns any more."""
        if not self._live:
            self.emptied()

    def take(self, permit: Permit) -> Work:
        """Remove the oldest, which *permit* pays; no ticket if its caller left in this very step. The queue must be due."""
        if not self.due:
            raise AssertionError("take() from a queue that is not due")
        work, reason = self._waiting.popleft()
        if work.done:
            return Work(permit, [], reason)
        self._live -= 1
        work.taken()
        if isinstance(work, Ticket):
            return Work(permit, [work], reason)
        work.grant(permit)
        return Work(permit, [], lease=work)

    def waiting(self) -> list[Ticket]:
        """Return the requests that wait, oldest first."""
        waiting = (work for work, _ in self._waiting if work.queue is self and not work.done)
        return [work for work in waiting if isinstance(work, Ticket)]

    def refuse_leases(self, error: MicrobatchError) -> None:
        """Fail every lease that waits with an error object of its own, equal to *error*."""
        for work, _ in self._waiting:
            if isinstance(work, SlotLease):
                work.refuse(error.replica())


class SingleQueues:
    """The queues of requests that go alone, one for each account, tenant and priority, and of leases, one for each account.

    *enqueue* lets a queue that is due take its turns.
    """

    def __init__(self, enqueue: Callable[[WaitQueue], None]) -> None:
        self._enqueue = enqueue
        self._queues: dict[Hashable, SingleQueue] = {}

    def __len__(self) -> int:
        """Return the number of queues in which something waits."""
        return len(self._queues)

    def __iter__(self) -> Iterator[SingleQueue]:
        """Yield the queues in which something waits now."""
        return iter([*self._queues.values()])

    def add(self, work: Ticket | SlotLease, reason: AloneReason | None, account: Account) -> None:
        """Queue *work*, which needs a permit of *account*; a request goes alone for *reason*."""
        tenant, rank = (work.spec.tenant, work.spec.rank) if isinstance(work, Ticket) else (None, work.rank)
        key = (account, tenant, rank, reason is None)
        queue = self._queues.get(key)
        if queue is None:
            emptied = partial(self._queues.pop, key, None)
            queue = self._queues[key] = SingleQueue(account, tenant, rank, self._enqueue, emptied)
        queue.add(work, reason)
        self._enqueue(queue)
