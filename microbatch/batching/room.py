"""Room for a bounded number of accepted requests, and who waits for it."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from typing import TYPE_CHECKING

from microbatch.batching.ticket import UNSHARED
from microbatch.errors import BatcherClosed, DeadlineExceeded

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.batching.ticket import Deadline, Terms


_NO_CONTEXT = contextvars.Context()  # for timers: they are not to keep a caller's


class Room:
    """Counts the requests accepted and not settled, and lets newcomers in, in order of arrival.

    Args:
        size: Most of them.
        emptied: Called when the last one has left.

    Attributes:
        taken: How many there are.
        size: As given.
        waiting: Who waits, in order of arrival.
        watchers: Called when there is room after requests have settled.
    """

    def __init__(self, size: int, emptied: Callable[[], None]) -> None:
        self.taken = 0
        self.size = size
        self._emptied = emptied
        self.waiting: deque[asyncio.Future[None]] = deque()
        self.watchers: dict[Callable[[], None], None] = {}  # as a set that keeps their order
        self._gone = 0  # of those who wait, how many have left

    @property
    def free(self) -> bool:
        """Whether another request may come in without waiting or jumping a queue."""
        return self.taken < self.size and not self.waiting

    def place(self, terms: Terms) -> asyncio.Future[None]:
        """Return a place in the queue, done when its turn has come.

        Whoever awaits it calls `enter` in the very step in which the wait ends well, else `give_up`. It is awaited by the caller,
        and not here, because the frame of another coroutine would be most of what a waiter costs.

        Args:
            terms: Whose timeout ends the wait: then the place fails with `DeadlineExceeded`. It fails with `BatcherClosed` if the
                batcher closes first.
        """
        loop = asyncio.get_running_loop()
        place: asyncio.Future[None] = loop.create_future()
        self.waiting.append(place)
        deadline = terms.deadline(loop.time())
        if deadline is not None:
            deadline.timer = loop.call_at(deadline.at, _expire, place, deadline, context=_NO_CONTEXT)
            place.add_done_callback(lambda _: deadline.cancel(), context=_NO_CONTEXT)
        return place

    def enter(self) -> None:
        """Take the place that was kept; a request has to be accepted in the same step."""
        self.taken -= 1

    async def wait(self) -> None:
        """Wait for a place and take it; a request has to be accepted in the step of the return.

        Raises:
            BatcherClosed: The batcher closed first.
        """
        place = self.place(UNSHARED)
        try:
            await place
        except BaseException:
            self.give_up(place)
            raise
        self.enter()

    def give_up(self, place: asyncio.Future[None]) -> None:
        """Whoever waited for *place* is gone; if it was given in the same moment, it goes to the next."""
        if place.done() and not place.cancelled() and place.exception() is None:
            self.enter()
            self.decline()
            return
        self._gone += 1
        if 2 * self._gone > len(self.waiting):
            self.waiting = deque(each for each in self.waiting if not each.done())
            self._gone = 0

    def decline(self) -> None:
        """Whoever could come in does not: the place goes to the next."""
        self.offer()
        if not self.taken:
            self._emptied()

    def leave(self, count: int) -> None:
        """*count* requests have settled."""
        self.taken -= count
        if self.waiting:
            self.offer()
        if not self.taken:
            self._emptied()
        if self.watchers and self.free:
            for watcher in list(self.watchers):
                watcher()

    def offer(self) -> None:
        """Give free places to those who have waited longest for one."""
        while self.waiting and self.taken < self.size:
            place = self.waiting.popleft()
            if place.done():
                self._gone -= 1
            else:
                place.set_result(None)
                self.taken += 1

    def close(self) -> None:
        """Send away whoever waits."""
        while self.waiting:
            place = self.waiting.popleft()
            if not place.done():
                place.set_exception(BatcherClosed("the batcher closed before there was room for this request"))


def _expire(place: asyncio.Future[None], deadline: Deadline) -> None:
    if not place.done():
        place.set_exception(DeadlineExceeded(f"no room for this request within its timeout of {deadline.timeout} s"))
