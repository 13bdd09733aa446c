"""Grants slots and permits in turn to what is due, and runs it.

A call holds a slot while it is on the wire: the slot is granted together with the permit of each attempt, in one step without `await`,
and is released when the attempt is over. Back-off, waiting for a permit and an open breaker hold none.

`_pump` does the scheduling: while a slot is free it takes what `FairQueue` says is next and asks its account for a permit. It then
takes work from the queue and starts a task for it, or wakes the task of the attempt. All of that is one step, so that nothing can
happen between the decision and the taking. Until that step requests can still leave their queue, and lanes go on filling.

Other parts only ask for a pump; a task of the batcher runs it in the next step of the event loop. So the context variables of one
caller never reach another's call, and a burst on an idle lane leaves as full batches instead of one request alone and then the rest.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from microbatch.batching.fair_queue import Attempt, FairQueue
from microbatch.batching.ticket import NO_CONTEXT
from microbatch.containment import contained

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.abc import TaskGroup

    from microbatch.batching.fair_queue import WaitQueue
    from microbatch.batching.lane import Work
    from microbatch.transports.accounts import Account, Permit

logger: Final = logging.getLogger("microbatch")

_RETRY_AFTER_BUG = 1.0
"""Seconds after a bug in scheduling until it is tried again: not at once, or one that stays would fill the log."""


class Scheduler:
    """The slots, the turns of due queues and waiting attempts, and the tasks.

    Args:
        slots: Most calls on the wire at once, but for the overdraft; see `microbatch.batching.fair_queue`.

    Attributes:
        under_way: Work that was taken and is not done, by identity.
        watchers: Called after each pump; they may enqueue. A dict that serves as an ordered set.
    """

    def __init__(self, slots: int) -> None:
        self.in_use: int = 0
        self.under_way: dict[int, Work] = {}
        self._slots = slots
        self._turns = FairQueue(slots)
        self.watchers: dict[Callable[[], None], None] = {}
        self._parked: list[asyncio.Future[Work]] = []  # tasks that wait for work
        self._pumping = False
        self._asked: asyncio.Event
        self._begin: Callable[[WaitQueue, Permit], Work | None]
        self._do: Callable[[Work], Awaitable[None]]
        self._tasks: TaskGroup

    def start(
        self, tasks: TaskGroup, begin: Callable[[WaitQueue, Permit], Work | None], do: Callable[[Work], Awaitable[None]]
    ) -> None:
        """Run in *tasks* from now on.

        *begin* takes the next work from a due queue, or returns None; *do* does it and raises nothing but cancellation.
        """
        self._tasks, self._begin, self._do = tasks, begin, do
        self._asked = asyncio.Event()
        tasks.start_soon(self._pump_when_asked)

    @property
    def full(self) -> bool:
        """True if every slot is in use."""
        return self.in_use >= self._slots

    def enqueue(self, queue: WaitQueue) -> None:
        """Add *queue*, which is due, to the queues that take turns; or note that the next work of one that does has changed."""
        if queue.queued:
            self._turns.resized(queue)
        else:
            queue.queued = True
            self._turns.add(queue)
        self._asked.set()

    # --- slots

    async def admit(self, permit: Permit) -> None:
        """Wait until the next attempt of *permit* is paid and has a slot, or could only be refused."""
        if permit.slot:
            self.released(permit)
        attempt = Attempt(permit, asyncio.get_running_loop().create_future())
        self._turns.add_attempt(attempt)
        self._asked.set()
        try:
            await attempt.granted
        except asyncio.CancelledError:
            self._turns.discard(attempt)
            self._asked.set()
            raise

    def released(self, permit: Permit) -> None:
        """Take back the slot of *permit*, whose attempt is over."""
        if permit.slot:
            permit.slot = False
            self.in_use -= 1
            if permit.overdrawn:
                permit.overdrawn = False
                self._turns.repaid(permit.account)
        self.changed(permit.account)

    def ready(self, account: Account) -> bool:
        """Note that *account* refused a permit and may have one now; return whether anything is going to ask for it."""
        asks = self._turns.unblock(account)
        if asks:
            self._asked.set()
        return asks

    def changed(self, account: Account) -> None:
        """Note that calls of *account* have begun, finished, or started or ended a back-off."""
        self._turns.changed(account)
        self._asked.set()

    # --- pumping

    async def _pump_when_asked(self) -> None:
        while True:
            await self._asked.wait()
            self._asked.clear()
            self._pump()

    def _pump(self) -> None:
        """Start a task for what is due, and wake attempts that wait, as far as slots and permits go."""
        if self._pumping:
            return  # an eager task that ended while it was being started; the loop in `_start_due` goes on
        self._pumping = True
        try:
            for step in (self._start_due, self._notify):
                with contained() as running:
                    step()
                if running.error is not None:
                    # It must not end the task group, and so every call under way. What is due is tried again later.
                    logger.error("scheduling failed in microbatch itself", exc_info=running.error)
                    loop = asyncio.get_running_loop()
                    loop.call_later(_RETRY_AFTER_BUG, self._asked.set, context=NO_CONTEXT)
        finally:
            self._pumping = False

    def _start_due(self) -> None:
        while (work := self._next()) is not None:
            if self._parked:
                self._parked.pop().set_result(work)
            else:
                self._tasks.start_soon(self._run, work)

    def _next(self) -> Work | None:
        """Grant attempts and take work in turn; return work as soon as there is some, None if nothing more can start now."""
        turns = self._turns
        while (item := turns.next(self.in_use)) is not None:
            if isinstance(item, Attempt):
                if item.granted.done():
                    turns.discard(item)  # its task was cancelled in this very step
                elif self._grant(item.permit):
                    turns.served(item)
                    item.granted.set_result(None)
                else:
                    turns.block(item, self.in_use)
                continue
            if not item.due:
                turns.remove(item)
                self._rest(item)
                continue
            permit = item.account.permit(item.next_cost(), item.rank)
            if not self._grant(permit):
                turns.block(item, self.in_use)
                continue
            try:
                work = self._begin(item, permit)
            except BaseException:
                permit.finish()
                raise
            stays = bool(item.due)
            turns.served(item, stays=stays)
            if not stays:
                self._rest(item)
            if work is not None:
                self.under_way[id(work)] = work
                return work
            permit.finish()
        return None

    def _grant(self, permit: Permit) -> bool:
        """Grant *permit* its next attempt and a slot; return False if its account has no permit now."""
        if not permit.pay():
            return False
        permit.overdrawn = self._turns.overdraws(permit, self.in_use)
        permit.slot = True
        self.in_use += 1
        return True

    def _rest(self, queue: WaitQueue) -> None:
        queue.queued = False
        queue.rested()

    async def _run(self, work: Work) -> None:
        """Do *work*, then wait for more: starting a task costs several times as much as waking one."""
        while True:
            try:
                await self._do(work)
            finally:
                del self.under_way[id(work)]
                self._asked.set()
            if len(self._parked) >= self._slots:
                return
            parked: asyncio.Future[Work] = asyncio.get_running_loop().create_future()
            self._parked.append(parked)
            work = await parked

    def _notify(self) -> None:
        for watcher in list(self.watchers):
            watcher()
