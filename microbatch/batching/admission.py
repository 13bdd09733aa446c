"""Places for a bounded number of accepted requests, and the callers that wait for one.

Places are given by priority and tenant in turn, like slots: priorities by weight, within a priority tenants in turn, within a tenant
in order of arrival. High priority has a small reserve beyond the bound.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

from microbatch.batching.stride import WEIGHTS, Stride
from microbatch.batching.ticket import HIGH
from microbatch.errors import BatcherClosed, DeadlineExceeded

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from microbatch.batching.ticket import CallerOptions, Deadline

    Place = asyncio.Future[None]

_NO_CONTEXT = contextvars.Context()  # for timers: they are not to keep a caller's

_RESERVE_SHARE = 50
"""One place in this many is added for high priority, at least one."""


class _Line:
    """The callers of one priority that wait for a place."""

    __slots__ = ("_gone", "_places", "_tenants")

    def __init__(self) -> None:
        # The dict serves as a ring: the first tenant is next. Places of callers that left stay until they come up, or are too many.
        self._tenants: dict[Hashable, deque[Place]] = {}
        self._places = 0  # in those lines
        self._gone = (
            0  # callers that left, less the places removed because they are done: below 0 while one is about to leave
        )

    @property
    def live(self) -> int:
        """How many callers wait, or have not yet noticed that their wait is over."""
        return self._places - self._gone

    def add(self, tenant: Hashable, place: Place) -> None:
        """Put *place* last in the line of *tenant*."""
        self._tenants.setdefault(tenant, deque()).append(place)
        self._places += 1

    def leave(self) -> None:
        """Note that a caller whose wait ended without a place is gone."""
        self._gone += 1
        if 2 * self._gone > self._places:
            lines = {tenant: deque(each for each in line if not each.done()) for tenant, line in self._tenants.items()}
            self._tenants = {tenant: line for tenant, line in lines.items() if line}
            before, self._places = self._places, sum(map(len, self._tenants.values()))
            self._gone -= before - self._places

    def take(self) -> Place | None:
        """Remove and return the place that is next; None if no caller waits any more."""
        while self._tenants:
            tenant, line = next(iter(self._tenants.items()))
            place = line.popleft()
            self._places -= 1
            del self._tenants[tenant]
            if line:
                self._tenants[tenant] = line
            if not place.done():
                return place
            self._gone -= 1
        return None


class AdmissionQueue:
    """Counts the requests accepted and not settled, and gives places to newcomers in turn.

    Args:
        size: Most of them, but for those below.
        emptied: Called when the last one has left.
        bypass: Most of those that go past a full queue because a slot is free. High priority has a reserve beyond them.

    Attributes:
        taken: How many there are.
        size: As given.
        waiting: Callers that wait for a place.
        watchers: Called when there is room after requests have settled.
    """

    def __init__(self, size: int, emptied: Callable[[], None], *, bypass: int = 0) -> None:
        self.taken = 0
        self.size = size
        self.waiting = 0
        self.watchers: dict[Callable[[], None], None] = {}  # as a set that keeps their order
        self._emptied = emptied
        self._lines = [_Line() for _ in WEIGHTS]
        self._stride = Stride()
        self._sizes = [size] * len(WEIGHTS)
        self._sizes[HIGH] += bypass + max(1, size // _RESERVE_SHARE)
        self._bypass = bypass

    def full(self, rank: int) -> bool:
        """Return whether every place open to a request of priority *rank* is taken."""
        return self.taken >= self._sizes[rank]

    @property
    def may_be_bypassed(self) -> bool:
        """True if another request may go past a full queue."""
        return self.taken < self.size + self._bypass

    def must_wait(self, rank: int) -> bool:
        """Return whether a request of priority *rank* may not come in now without overtaking others."""
        return self.full(rank) or bool(self._lines[HIGH].live if rank == HIGH else self.waiting)

    def place(self, rank: int, tenant: Hashable, terms: CallerOptions) -> Place:
        """Return a place in the queue, done when its turn has come.

        The caller awaits it and calls `enter` in the very step in which the wait ends well, else `give_up`. It is not awaited here,
        because the frame of another coroutine would be most of what a waiter costs.

        Args:
            rank: Priority.
            tenant: Trust domain.
            terms: The terms whose timeout ends the wait: then the place fails with `DeadlineExceeded`. It fails with `BatcherClosed`
                if the batcher closes first.
        """
        loop = asyncio.get_running_loop()
        place: Place = loop.create_future()
        line = self._lines[rank]
        if not line.live:
            self._stride.enter(rank)
        line.add(tenant, place)
        self.waiting += 1
        deadline = terms.deadline(loop.time())
        if deadline is not None:
            deadline.timer = loop.call_at(deadline.at, _expire, place, deadline, context=_NO_CONTEXT)
            place.add_done_callback(lambda _: deadline.cancel(), context=_NO_CONTEXT)
        return place

    def enter(self) -> None:
        """Take the place that was kept; a request has to be accepted, or `decline` called, in the same step."""
        self.taken -= 1

    @contextmanager
    def entering(self) -> Iterator[None]:
        """Pass the place on if the block, which accepts a request in a place that was kept or is free, raises."""
        try:
            yield
        except BaseException:
            self.decline()
            raise

    async def wait_for(self, place: Place, rank: int) -> None:
        """Wait until *place*, which was given *rank*, is granted; see `enter` for what the caller does in the step of the return.

        Raises:
            BatcherClosed: The batcher closed first.
        """
        try:
            await place
        except BaseException:
            self.give_up(place, rank)
            raise
        self.enter()

    def give_up(self, place: Place, rank: int) -> None:
        """Forget the caller that waited for *place* with priority *rank*; a place granted in the same moment goes to the next."""
        if place.done() and not place.cancelled() and place.exception() is None:
            self.enter()
            self.decline()
        elif self.waiting:  # else the batcher has closed
            self.waiting -= 1
            self._lines[rank].leave()
            self.offer()  # callers may have lined up behind it while places were free

    def decline(self) -> None:
        """Pass on a place that was free for a request that does not come in after all."""
        self.offer()
        if not self.taken:
            self._emptied()

    def leave(self, count: int) -> None:
        """Free the places of *count* requests, which have settled."""
        self.taken -= count
        if self.waiting:
            self.offer()
        if not self.taken:
            self._emptied()
        if self.watchers and not self.taken >= self.size and not self.waiting:
            for watcher in list(self.watchers):
                watcher()

    def offer(self) -> None:
        """Give the free places to those that wait, in turn."""
        while self.waiting:
            rank = self._stride.first(
                rank for rank, line in enumerate(self._lines) if line.live and not self.full(rank)
            )
            if rank is None:
                return
            place = self._lines[rank].take()
            if place is None:
                return  # the last that waited is about to leave, and offers again then
            self._stride.served(rank)
            self.waiting -= 1
            self.taken += 1
            place.set_result(None)

    def close(self) -> None:
        """Fail every place that is waited for with `BatcherClosed`."""
        for line in self._lines:
            while (place := line.take()) is not None:
                place.set_exception(BatcherClosed("the batcher closed before there was room for this request"))
        self.waiting = 0


def _expire(place: Place, deadline: Deadline) -> None:
    if not place.done():
        place.set_exception(DeadlineExceeded(f"no room for this request within its timeout of {deadline.timeout} s"))
