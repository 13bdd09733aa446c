"""Room for a bounded number of accepted requests, and who waits for it."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from microbatch.errors import BatcherClosed, DeadlineExceeded

if TYPE_CHECKING:
    from collections.abc import Callable


class Room:
    """Counts the requests accepted and not settled, and lets newcomers in, in order of arrival.

    Args:
        size: Most of them.
        emptied: Called when the last one has left.

    Attributes:
        taken: How many there are.
        size: As given.
        waiting: Who waits, in order of arrival.
    """

    def __init__(self, size: int, emptied: Callable[[], None]) -> None:
        self.taken = 0
        self.size = size
        self._emptied = emptied
        self.waiting: deque[asyncio.Future[None]] = deque()

    @property
    def free(self) -> bool:
        """Whether another request may come in without waiting or jumping a queue."""
        return self.taken < self.size and not self.waiting

    async def wait(self, timeout: float | None) -> None:
        """Wait, in order of arrival, until one more request may come in; it has to in the very step of the return.

        Raises:
            DeadlineExceeded: *timeout* seconds passed first.
            BatcherClosed: The batcher closed first.
        """
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append(place)
        try:
            async with asyncio.timeout(timeout):
                await place
        except TimeoutError as error:
            self._give_up(place)
            message = f"no room within the timeout of {timeout} s: {self.taken} requests are pending"
            raise DeadlineExceeded(message) from error
        except asyncio.CancelledError:
            self._give_up(place)
            raise
        self.taken -= 1  # it was kept for this caller, who takes it now

    def _give_up(self, place: asyncio.Future[None]) -> None:
        """Whoever waited for *place* is gone; if it was given in the same moment, it goes to the next."""
        if place.done() and not place.cancelled() and place.exception() is None:
            self.taken -= 1
            self.offer()

    def leave(self, count: int) -> None:
        """*count* requests have settled."""
        self.taken -= count
        if self.waiting:
            self.offer()
        if not self.taken:
            self._emptied()

    def offer(self) -> None:
        """Give free places to those who have waited longest for one."""
        while self.waiting and self.taken < self.size:
            place = self.waiting.popleft()
            if not place.done():
                place.set_result(None)
                self.taken += 1

    def close(self) -> None:
        """Send away whoever waits."""
        while self.waiting:
            place = self.waiting.popleft()
            if not place.done():
                place.set_exception(BatcherClosed("the batcher closed before there was room for this request"))
