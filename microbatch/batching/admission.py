"""Places for a bounded number of accepted requests, and the callers that wait for one.

Places are granted by priority and tenant in turn, like slots: priorities by weight, within a priority tenants in turn, within a tenant
in order of arrival. High priority has a small reserve beyond the bound.

A place is occupied from the step in which it is granted. Its holder either has a request accepted, which keeps the place until it is
settled, or releases it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Literal

from microbatch.batching.fair_queue import WEIGHTS, Stride
from microbatch.batching.ticket import HIGH, NO_CONTEXT
from microbatch.errors import BatcherClosed, DeadlineExceeded, Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from microbatch.batching.ticket import CallerOptions, Deadline

    Place = asyncio.Future[None]

_RESERVE_SHARE = 50
"""One place in this many is added for high priority, at least one."""


class _Line:
    """The callers of one priority that wait for a place."""

    __slots__ = ("_gone", "_places", "_tenants")

    def __init__(self) -> None:
        # The dict serves as a ring: the first tenant is next. Places of callers that left stay until they come up, or are too many.
        self._tenants: dict[Hashable, deque[Place]] = {}
        self._places = 0  # in those queues
        self._gone = 0  # callers that left, minus places removed because they were done: below 0 while one is leaving

    @property
    def live(self) -> int:
        """Number of callers that wait, or have not yet noticed that their wait is over."""
        return self._places - self._gone

    def add(self, tenant: Hashable, place: Place) -> None:
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
    """Counts the requests accepted and not settled, and grants places to newcomers in turn.

    Args:
        size: Most places, apart from the reserve and `bypass`.
        when_full: What `enter` does when no place is free; see `FlushPolicy`.
        bypass: Most requests admitted beyond `size` under "bypass", while `slot_free` returns True.
        slot_free: Returns whether a request could be sent at once.

    Attributes:
        waiting: Number of callers that wait for a place.
        watchers: Called when a place is free after `release`. A dict that serves as an ordered set.
    """

    def __init__(
        self,
        size: int,
        when_full: Literal["wait", "reject", "bypass"] = "wait",
        *,
        bypass: int = 0,
        slot_free: Callable[[], bool] = lambda: False,
    ) -> None:
        self.occupied: int = 0
        self.size = size
        self.waiting: int = 0
        self.watchers: dict[Callable[[], None], None] = {}
        self._when_full = when_full
        self._bypass = bypass if when_full == "bypass" else 0
        self._slot_free = slot_free
        self._lines = [_Line() for _ in WEIGHTS]
        self._stride = Stride()
        self._sizes = [size] * len(WEIGHTS)
        self._sizes[HIGH] += self._bypass + max(1, size // _RESERVE_SHARE)

    def overfull(self, rank: int) -> bool:
        """Return whether more places are occupied than are open to priority *rank*."""
        return self.occupied > self._sizes[rank]

    def must_wait(self, rank: int) -> bool:
        """Return whether no place is free for priority *rank*, or other callers have been waiting for one."""
        return self._full(rank) or bool(self._lines[HIGH].live if rank == HIGH else self.waiting)

    def _full(self, rank: int) -> bool:
        return self.occupied >= self._sizes[rank]

    def enter(self, rank: int, tenant: Hashable, caller: CallerOptions, *, patient: bool = False) -> Place | None:
        """Occupy a place and return None, or return a future that is done when a place is granted, which is occupied from then on.

        The caller awaits it, and calls `cancel` if the wait ends with an exception. It is not awaited here, because the frame of
        another coroutine would be most of what a waiting caller costs. *patient* waits whatever the policy.

        The future fails with `DeadlineExceeded` when the caller's timeout has passed, and with `BatcherClosed` when the batcher closes.

        Raises:
            Overloaded: No place is free, and the policy is not to wait.
        """
        if (self.waiting or self.occupied >= self._sizes[rank]) and self.must_wait(rank):
            if patient or self._when_full == "wait":
                return self._reserve(rank, tenant, caller)
            if self.occupied >= self.size + self._bypass or not self._slot_free():
                raise Overloaded(f"max_queued={self.size} requests are pending")
        self.occupied += 1
        return None

    def _reserve(self, rank: int, tenant: Hashable, caller: CallerOptions) -> Place:
        loop = asyncio.get_running_loop()
        place: Place = loop.create_future()
        line = self._lines[rank]
        if not line.live:
            self._stride.enter(rank)
        line.add(tenant, place)
        self.waiting += 1
        deadline = caller.deadline(loop.time())
        if deadline is not None:
            deadline.timer = loop.call_at(deadline.at, _expire, place, deadline, context=NO_CONTEXT)
            place.add_done_callback(lambda _: deadline.cancel(), context=NO_CONTEXT)
        return place

    async def acquire(self, rank: int, tenant: Hashable, caller: CallerOptions, *, patient: bool = False) -> None:
        """Occupy a place as `enter` does, waiting for it if need be."""
        place = self.enter(rank, tenant, caller, patient=patient)
        if place is None:
            return
        try:
            await place
        except BaseException:
            self.cancel(place, rank)
            raise

    def cancel(self, place: Place, rank: int) -> None:
        """Forget the caller that waited for *place*; a place granted at the same moment is released."""
        if place.done() and not place.cancelled() and place.exception() is None:
            self.release()
        elif self.waiting:  # else the batcher has closed
            self.waiting -= 1
            self._lines[rank].leave()
            self._grant()  # callers may have queued behind it while places were free

    def release(self, count: int = 1) -> None:
        """Free *count* places, and grant them to callers that wait."""
        self.occupied -= count
        if self.waiting:
            self._grant()
        if self.watchers and self.occupied < self.size and not self.waiting:
            for watcher in list(self.watchers):
                watcher()

    def _grant(self) -> None:
        """Grant the free places in turn."""
        while self.waiting:
            rank = self._stride.first(
                rank for rank, line in enumerate(self._lines) if line.live and not self._full(rank)
            )
            if rank is None:
                return
            place = self._lines[rank].take()
            if place is None:
                return  # the last one that waited is leaving, and `cancel` grants again then
            self._stride.served(rank)
            self.waiting -= 1
            self.occupied += 1
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
