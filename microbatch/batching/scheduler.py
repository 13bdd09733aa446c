"""Grants slots to what is due, in turn, and runs it.

Queues that are due stand in one ring. `pump` is the whole of scheduling: while a slot is free it takes the next queue of the ring,
takes work from it and starts a task for it, all in one plain step, so that nothing can happen between the decision and the taking.
A task that has done its work goes on with the next, as long as something is due, before it gives its slot back.

Outsiders only ask for a pump; a task of the batcher's own runs it at the next turn of the event loop. So no caller's context
variables reach another's call, and callers of one turn travel together: that costs no time, and a burst on an idle lane leaves as
full batches instead of one request alone and then the rest.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from microbatch.batching.queues import BorrowerQueue

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from anyio.abc import TaskGroup


class Queue(Protocol):
    """What stands in the ring.

    Attributes:
        queued: Whether it does; the scheduler's own mark.
    """

    queued: bool

    @property
    def due(self) -> object:
        """Something true while it has work to give."""
        ...


Q = TypeVar("Q", bound=Queue)
W = TypeVar("W")


class Scheduler(Generic[Q, W]):
    """The slots, the ring of due queues, and the tasks.

    Args:
        slots: Most calls under way at once.
        take: Takes the next work from a due queue; None if there was none after all.
        settle: Does some work; never raises anything but cancellation.
        rested: Told of a queue that has left the ring because it is no longer due.
        freed: Called when a slot has come back.

    Attributes:
        free: Slots that are free.
        under_way: Work that was taken and is not done, by identity.
    """

    def __init__(
        self,
        slots: int,
        *,
        take: Callable[[Q], W | None],
        settle: Callable[[W], Awaitable[None]],
        rested: Callable[[Q], None],
        freed: Callable[[], None],
    ) -> None:
        self.free = slots
        self.under_way: dict[int, W] = {}
        self._slots = slots
        self._take = take
        self._settle = settle
        self._rested = rested
        self._freed = freed
        self._ring: deque[Q] = deque()
        self._borrowers = BorrowerQueue()
        self._lend_next = False  # borrowers and the ring take turns
        self._watchers: set[Callable[[], None]] = set()
        self._pumping = False
        self._asked: asyncio.Event
        self._tasks: TaskGroup

    @property
    def in_use(self) -> int:
        """Slots in use."""
        return self._slots - self.free

    def start(self, tasks: TaskGroup) -> None:
        """Run in *tasks* from now on."""
        self._tasks = tasks
        self._asked = asyncio.Event()
        tasks.start_soon(self._pump_when_asked)

    async def _pump_when_asked(self) -> None:
        while True:
            await self._asked.wait()
            self._asked.clear()
            self._pump()

    def enqueue(self, queue: Q) -> None:
        """Put *queue*, which is due, into the ring, and see that a pump comes."""
        if not queue.queued:
            queue.queued = True
            self._ring.append(queue)
        if self.free:
            self._asked.set()

    def _pump(self) -> None:
        """Start a task for what is due, as far as slots go."""
        if self._pumping:
            return  # an eager task that ended while it was being started; the loop below goes on
        self._pumping = True
        try:
            while self.free and (self._ring or self._borrowers.due):
                if self._borrowers.due and (self._lend_next or not self._ring):
                    self._lend()
                    continue
                self._lend_next = True
                work = self._next()
                if work is not None:
                    self.free -= 1
                    self._tasks.start_soon(self._run, work)
        finally:
            self._pumping = False
        self._notify()

    def _next(self) -> W | None:
        """Take the next work of the queue whose turn it is; None if it had none after all."""
        queue = self._ring.popleft()
        queue.queued = False
        work = self._take(queue) if queue.due else None
        if work is not None:
            self.under_way[id(work)] = work
        if queue.due:
            queue.queued = True
            self._ring.append(queue)
        else:
            self._rested(queue)
        return work

    async def _run(self, work: W | None) -> None:
        """Do the work of one slot, and more of it as long as something is due; then give the slot back."""
        try:
            while work is not None:
                await self._settle(work)
                del self.under_way[id(work)]
                # Let the callers just answered go on before the next batch, even if the transport never waits for anything.
                await asyncio.sleep(0)
                work = None
                while self._ring and work is None and not self._borrowers.due:
                    work = self._next()
                if work is not None:
                    self._notify()
        finally:
            self.free += 1
            self._pump()
            self._freed()

    # --- slots for work of others

    @asynccontextmanager
    async def borrow(self) -> AsyncIterator[None]:
        """Hold a slot for work of the caller's own, when its turn has come.

        Raises:
            ShutDown: See `refuse_borrowers`.
        """
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._borrowers.add(place)
        self._asked.set()
        try:
            await place
            yield
        finally:
            if place.done() and not place.cancelled() and place.exception() is None:
                self.free += 1
                self._asked.set()
                self._freed()

    def _lend(self) -> None:
        self._lend_next = False
        self.free -= 1
        self._borrowers.lend()

    def refuse_borrowers(self, error: Exception) -> None:
        """Send away whoever waits for a slot, with *error*."""
        self._borrowers.refuse(error)

    # --- who wants to know

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call *watcher* whenever slots have been granted; it may enqueue."""
        self._watchers.add(watcher)

    def unwatch(self, watcher: Callable[[], None]) -> None:
        """Stop calling *watcher*."""
        self._watchers.discard(watcher)

    def _notify(self) -> None:
        for watcher in list(self._watchers):
            watcher()
