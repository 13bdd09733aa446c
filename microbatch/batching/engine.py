"""Takes batches from the queues as slots come free, has them answered, and sees to it that each request ends.

A *ticket* is one accepted request. It waits in a lane if it can share a prompt, or in a queue of those that go alone; then it is in
flight, and then it is settled (see `single_flight`).

Queues are *due* or not. The scheduler takes work from those that are due as slots and permits come free. Until then tickets stay in
their queue: they can leave it, and a lane goes on filling.

Each caller occupies a place in `admission` until it is settled. An error inside a call ends the tickets of that call with a typed
error; the engine lives on.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import anyio

from microbatch.batching.events import flushed
from microbatch.batching.ticket import NORMAL, FlushReason, SlotLease
from microbatch.containment import contained
from microbatch.errors import BatcherClosed, RequestFailed, ShutDown

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence

    from anyio.abc import TaskGroup

    from microbatch.batching.admission import AdmissionQueue
    from microbatch.batching.chat_calls import ChatCalls
    from microbatch.batching.dependencies import Dependencies
    from microbatch.batching.fair_queue import WaitQueue
    from microbatch.batching.lane import Calls, Work
    from microbatch.batching.lane_table import LaneTable
    from microbatch.batching.scheduler import Scheduler
    from microbatch.batching.single_flight import Settlement
    from microbatch.batching.single_queue import SingleQueues
    from microbatch.batching.ticket import Ticket
    from microbatch.transports.accounts import Permit

logger: Final = logging.getLogger("microbatch")

CLOSED_EARLY = "the batcher was closed while it was opening"
_NEVER_SENT = "the batcher closed before this request was sent"
_NO_SLOT = "the batcher closed before a slot was free"
_UNSETTLED = "a call ended without settling this request; this is a bug in microbatch"


class Engine:
    """Runs the calls of a batcher. Each lane has the object that composes and makes its calls; *chat* makes those outside of lanes.

    Attributes:
        accepting_loop: The event loop whose callers may come in; None before `admit` and after `close`.
    """

    def __init__(
        self,
        given: Dependencies,
        lanes: LaneTable,
        singles: SingleQueues,
        chat: ChatCalls,
    ) -> None:
        self.admission: AdmissionQueue = given.admission
        self.scheduler: Scheduler = given.scheduler
        self.settlement: Settlement = given.settlement
        self.lanes = lanes
        self.singles = singles
        self.accepting_loop: asyncio.AbstractEventLoop | None = None
        self.closing: bool = False
        self._given = given
        self._ledger = given.ledger
        self._chat = chat
        self._resting: dict[asyncio.Future[None], None] = {}  # an ordered set
        self._ended = False  # nothing is granted any more
        self._tasks: TaskGroup
        self._close_asked: asyncio.Event
        self._grace: float | None = None

    # --- life

    async def serve(self, ready: Callable[[], None]) -> None:
        """Run until `close` is asked for and done; it may be run again if it ends before `admit` and `close` were called."""
        self._close_asked = asyncio.Event()
        self._ended = False
        try:
            async with anyio.create_task_group() as self._tasks:
                self.scheduler.start(self._tasks, self._begin, self._do)
                self._chat.start(self.start)
                ready()
                await self._close_asked.wait()
                with anyio.move_on_after(self._grace):
                    await self._wait_until_quiet()
                self._end_waiting()
                self._tasks.cancel_scope.cancel()
        finally:
            self.closing, self.accepting_loop = self.closing or self.accepting_loop is not None, None
            self._end_waiting()
            # A task that is cancelled before its first step never gets to settle its tickets.
            for work in self.scheduler.under_way.values():
                if work.lease is None:
                    work.permit.finish()
                self._fail(work.tickets, ShutDown(_NEVER_SENT))

    def admit(self) -> None:
        """Accept requests of the running loop from now on; `serve` has to be ready.

        Raises:
            BatcherClosed: `close` was called before.
        """
        if self.closing:
            raise BatcherClosed(CLOSED_EARLY)
        self.accepting_loop = asyncio.get_running_loop()

    def close(self, grace: float | None) -> None:
        """Accept no more, send what waits, and give what is under way *grace* seconds; None waits as long as it takes.

        Before `admit` there is nothing to send, and the task that runs `serve` has to be cancelled.
        """
        admitted = self.accepting_loop is not None
        self.closing, self.accepting_loop = True, None
        if admitted:
            self._grace = grace
            self._chat.close()
            self.admission.close()
            self.lanes.flush(FlushReason.DRAIN)
            self._close_asked.set()

    async def _wait_until_quiet(self) -> None:
        """Wait until no request is pending and no slot in use."""
        changed = asyncio.Event()
        self.admission.watchers[changed.set] = None
        self.scheduler.watchers[changed.set] = None
        try:
            while self.admission.occupied or self.scheduler.under_way:
                changed.clear()
                await changed.wait()
        finally:
            del self.admission.watchers[changed.set]
            del self.scheduler.watchers[changed.set]

    def _end_waiting(self) -> None:
        self._ended = True
        for queue in (*self.singles, *self.lanes):
            self._fail(queue.waiting(), ShutDown(_NEVER_SENT))
        for singles in self.singles:
            singles.refuse_leases(ShutDown(_NO_SLOT))
        for until in self._resting:
            if not until.done():
                until.set_exception(ShutDown(_NO_SLOT))

    def _fail(self, tickets: Sequence[Ticket], error: RequestFailed) -> None:
        for ticket in tickets:
            self.settlement.fail(ticket, error)

    def start(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a coroutine function in the batcher's task group, in the context of this call."""
        self._tasks.start_soon(run)

    # --- work

    def _begin(self, queue: WaitQueue, permit: Permit) -> Work | None:
        """Take the next work from *queue*, prepared to be sent; None if all of its callers have just left, or it waits again."""
        work = queue.take(permit)
        if work.lease is not None:
            return work
        if not work.tickets:
            return None
        with contained() as preparing:
            if not self._calls_of(work).begin(work):
                return None
            self._note_flush(work)
            if work.lane is not None:
                work.lane.in_flight += 1
                work.lane.combined += len(work.tickets) > 1
            return work
        self._fail(work.tickets, _bug(preparing.error))
        return None

    def _calls_of(self, work: Work) -> Calls:
        return self._chat if work.lane is None else work.lane.calls

    def _note_flush(self, work: Work) -> None:
        ledger, tickets, reason = self._ledger, work.tickets, work.reason
        if reason is None:
            return  # a lease
        (ledger.singles_by_reason if len(tickets) == 1 else ledger.batches_by_reason)[reason] += 1
        notify = self._given.listeners.flush
        if notify is not None:
            notify(flushed(tickets, reason, self._given.now()))

    async def _do(self, work: Work) -> None:
        """Do *work*; whatever happens in it, every one of its tickets ends."""
        if work.lease is not None:
            await work.lease.returned.wait()
            return
        error: RequestFailed | None = None
        try:
            await self._calls_of(work).make(work)
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            error = ShutDown("the batcher closed before the answer came")
            raise
        except BaseException as bug:  # noqa: BLE001 it must not end the other slots; a Rust panic is no Exception
            error = _bug(bug)
        finally:
            work.permit.finish()
            for ticket in work.tickets:
                if ticket.reply is None:
                    self.settlement.fail(ticket, error or RequestFailed(_UNSETTLED))
            with contained() as ending:
                self._calls_of(work).ended(work)
                if work.lane is not None:
                    self.lanes.call_ended(work.lane, combined=len(work.tickets) > 1)
            if ending.error is not None:
                _bug(ending.error)  # logged; it must not end the other slots

    @asynccontextmanager
    async def lease_slot(
        self, model: str | None, headers: Mapping[str, str], cost: int, rank: int = NORMAL
    ) -> AsyncIterator[SlotLease]:
        """Hold a slot and a permit for work that is not a request, in the place that the caller occupies.

        The limits of *model*, None for the transport's, and of the credentials in *headers* count; *cost* is an estimate in tokens,
        *rank* the priority.

        Yields:
            The lease, to be marked as used if something is sent past its permit.

        Raises:
            ShutDown: The batcher closed before a slot was free.
        """
        self.check_running()
        account = self._given.accounts.of(model, headers)
        cost = cost if account.max_tokens is None else min(cost, account.max_tokens)
        lease = SlotLease(cost, asyncio.get_running_loop().create_future(), asyncio.Event(), rank)
        self.singles.add(lease, None, account)
        try:
            await lease.granted
            yield lease
        finally:
            lease.give_back()

    async def rest(self, until: asyncio.Future[None]) -> None:
        """Wait *until* something is done, in a place and without a slot.

        Raises:
            ShutDown: The batcher closed before.
        """
        self.check_running()
        self._resting[until] = None
        try:
            await until
        finally:
            del self._resting[until]

    def check_running(self) -> None:
        """Raise `ShutDown` if the batcher has closed, and nothing may be sent any more."""
        if self._ended:
            raise ShutDown(_NEVER_SENT)


def _bug(cause: BaseException | None) -> RequestFailed:
    """Log an error that should not happen and return the error that its requests end with."""
    logger.error("a call failed in microbatch itself: %s", type(cause).__name__, exc_info=cause)
    error = RequestFailed(f"a call failed in microbatch itself: {type(cause).__name__}")
    error.__cause__ = cause
    return error
