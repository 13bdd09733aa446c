"""Grants slots and permits to what is due, in turn, and runs it.

`_pump` is the whole of scheduling: while a slot is free it takes the queue whose turn it is, asks its account for a permit, takes
work from it and starts a task for it, all in one plain step, so that nothing can happen between the decision and the taking. Until
that step what waits can still leave, and a lane goes on filling. A task that has done its work goes on with the next, as long as
something is due, before it gives its slot back.

Outsiders only ask for a pump; a task of the batcher's own runs it at the next turn of the event loop. So no caller's context
variables reach another's call, and callers of one turn travel together: that costs no time, and a burst on an idle lane leaves as
full batches instead of one request alone and then the rest.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from microbatch.batching.turns import Due, Turns

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.abc import TaskGroup

    from microbatch.batching.account import Account, Permit

logger = logging.getLogger("microbatch")

_SECOND_LOOK = 1.0
"""Seconds after a bug in scheduling until it is tried again: not at once, or one that stays would fill the log."""


class Queue(Due, Protocol):
    """What takes turns.

    Attributes:
        queued: Whether it does now; the scheduler's own mark.
    """

    queued: bool

    @property
    def due(self) -> object:
        """Something true while it has work to give."""
        ...


Q = TypeVar("Q", bound=Queue)
W = TypeVar("W")


class Scheduler(Generic[Q, W]):
    """The slots, the turns of due queues, and the tasks.

    Args:
        slots: Most calls under way at once.
        cost: Tells how many tokens the next work of a due queue is charged.
        take: Takes the next work from a due queue, with its permit; None if there was none after all.
        settle: Does some work; never raises anything but cancellation.
        rested: Told of a queue that has lost its turn because it is no longer due.
        freed: Called when a slot has come back.

    Attributes:
        free: Slots that are free.
        under_way: Work that was taken and is not done, by identity.
    """

    def __init__(
        self,
        slots: int,
        *,
        cost: Callable[[Q], int],
        take: Callable[[Q, Permit], W | None],
        settle: Callable[[W], Awaitable[None]],
        rested: Callable[[Q], None],
        freed: Callable[[], None],
    ) -> None:
        self.free = slots
        self.under_way: dict[int, W] = {}
        self._slots = slots
        self._cost = cost
        self._take = take
        self._settle = settle
        self._rested = rested
        self._freed = freed
        self._turns: Turns[Q] = Turns()
        self._watchers: dict[Callable[[], None], None] = {}  # as a set that keeps their order
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
        """Let *queue*, which is due, take its turns, and see that a pump comes."""
        if not queue.queued:
            queue.queued = True
            self._turns.add(queue)
        if self.free:
            self._asked.set()

    def ready(self, account: Account) -> None:
        """*account*, which had no permit to give, may have one now."""
        if self._turns.unblock(account) and self.free:
            self._asked.set()

    def _pump(self) -> None:
        """Start a task for what is due, as far as slots and permits go."""
        if self._pumping:
            return  # an eager task that ended while it was being started; the loop below goes on
        self._pumping = True
        try:
            while self.free and (work := self._next()) is not None:
                self.free -= 1
                self._tasks.start_soon(self._run, work)
            self._notify()
        except Exception as bug:  # noqa: BLE001 it would take the task group with it, and so every call under way
            self._look_again(bug)
        finally:
            self._pumping = False

    def _next(self) -> W | None:
        """Take the next work of whoever's turn it is; None if nothing is due that has a permit."""
        turns = self._turns
        while (queue := turns.next()) is not None:
            if not queue.due:
                turns.remove(queue)
                self._rest(queue)
                continue
            permit = queue.account.pay(self._cost(queue))
            if permit is None:
                turns.block(queue)
                continue
            work = self._take(queue, permit)
            stays = bool(queue.due)
            turns.served(queue, stays=stays)
            if not stays:
                self._rest(queue)
            if work is not None:
                self.under_way[id(work)] = work
                return work
            permit.cancel()
        return None

    def _rest(self, queue: Q) -> None:
        queue.queued = False
        self._rested(queue)

    async def _run(self, work: W | None) -> None:
        """Do the work of one slot, and more of it as long as something is due; then give the slot back."""
        try:
            while work is not None:
                await self._settle(work)
                del self.under_way[id(work)]
                # Let the callers just answered go on before the next batch, even if the transport never waits for anything.
                await asyncio.sleep(0)
                work = self._next()
                if work is not None:
                    self._notify()
        except Exception as bug:  # noqa: BLE001 see _pump
            self._look_again(bug)
        finally:
            self.free += 1
            self._pump()
            self._freed()

    def _look_again(self, bug: Exception) -> None:
        """Log *bug*, and see that what is due is not forgotten over it."""
        logger.error("scheduling failed in microbatch itself", exc_info=bug)
        asyncio.get_running_loop().call_later(_SECOND_LOOK, self._asked.set, context=contextvars.Context())

    # --- who wants to know

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call *watcher* whenever slots have been granted; it may enqueue."""
        self._watchers[watcher] = None

    def unwatch(self, watcher: Callable[[], None]) -> None:
        """Stop calling *watcher*."""
        self._watchers.pop(watcher, None)

    def _notify(self) -> None:
        for watcher in list(self._watchers):
            watcher()
