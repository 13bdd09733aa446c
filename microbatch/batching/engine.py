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
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio

from microbatch.batching.events import flushed
from microbatch.batching.fallback import Recovery
from microbatch.batching.ticket import NORMAL, AloneReason, FlushReason, SlotLease
from microbatch.containment import contained
from microbatch.errors import BatcherClosed, RequestFailed, ShutDown

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence

    from anyio.abc import TaskGroup

    from microbatch.batching.admission import AdmissionQueue
    from microbatch.batching.audits import Audits
    from microbatch.batching.call_state import Batch
    from microbatch.batching.dependencies import Dependencies
    from microbatch.batching.dispatch import Dispatcher
    from microbatch.batching.fair_queue import WaitQueue
    from microbatch.batching.lane import Lane, Work
    from microbatch.batching.lane_table import LaneTable
    from microbatch.batching.scheduler import Scheduler
    from microbatch.batching.single_flight import Settlement
    from microbatch.batching.single_queue import SingleQueues
    from microbatch.batching.ticket import Ticket
    from microbatch.transports.accounts import Permit

logger: Final = logging.getLogger("microbatch")

CLOSED_EARLY = "the batcher was closed while it was opening"
_NEVER_SENT = "the batcher closed before this request was sent"
_COSTLY = "asking again for missing and broken answers costs more than combining saves"
_USELESS = "combined replies hold nothing of use, or do not end, so that asking again costs more than combining saves"
_NO_SLOT = "the batcher closed before a slot was free"
_UNSETTLED = "a call ended without settling this request; this is a bug in microbatch"


class Engine:
    """Runs the calls of a batcher.

    Attributes:
        accepting_loop: The event loop whose callers may come in; None before `admit` and after `close`.
    """

    def __init__(
        self,
        given: Dependencies,
        lanes: LaneTable,
        singles: SingleQueues,
        dispatcher: Dispatcher,
        audits: Audits | None = None,
        *,
        weigh_again: Callable[[Ticket], None],
    ) -> None:
        self.admission: AdmissionQueue = given.admission
        self.scheduler: Scheduler = given.scheduler
        self.settlement: Settlement = given.settlement
        self.lanes = lanes
        self.singles = singles
        self.accepting_loop: asyncio.AbstractEventLoop | None = None
        self.closing: bool = False
        self._given = given
        self._policy = given.policy
        self._ledger = given.ledger
        self._dispatcher = dispatcher
        self._audits = audits
        self._weigh_again = weigh_again
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
                if self._audits is not None:
                    self._audits.start(self.start, self.lanes.kind_changed)
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
            if self._audits is not None:
                self._audits.close()
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
        """Take the next work from *queue*, a batch already composed; None if all of its callers have just left, or it waits again."""
        work = queue.take(permit)
        tickets, lane, reason = work.tickets, work.lane, work.reason
        if work.lease is not None:
            return work
        if not tickets or reason is None:
            return None
        if lane is None:
            limited = self._policy.merge == "auto" and permit.account.requests_bind
            if reason is AloneReason.NOT_CHEAPER and limited:
                self._weigh_again(tickets[0])
                return None
            self._note_flush(tickets, reason)
            return work
        combined = len(tickets) > 1
        if combined and not self.lanes.pays(lane, len(tickets), tickets[0]):
            for ticket in tickets:
                self.singles.add(ticket, AloneReason.NOT_CHEAPER, lane.account)
            return None
        self._note_flush(tickets, reason if combined else self._why_alone(lane, reason))
        with contained() as composing:
            if self._audits is not None and lane.spec.kind is not None:
                self._audits.count(lane.spec.kind, len(tickets))
            if combined:
                work.batch = self._dispatcher.compose(tickets, lane.history, permit)
                if self._audits is not None:
                    self._audits.sample(work.batch)
                work.batch.taught = partial(self.lanes.taught, lane)
                self.lanes.revise(lane)
            lane.in_flight += 1
            lane.combined += combined
            return work
        self._fail(tickets, _bug(composing.error))
        return None

    def _why_alone(self, lane: Lane, reason: str) -> AloneReason:
        """Return why the only request that leaves *lane* goes alone."""
        if lane.history.consume_suspension():
            self.lanes.revise(lane)
            return AloneReason.NOT_CHEAPER
        if lane.condemned:
            return AloneReason.CONDEMNED
        times = lane.history.times
        if times is not None and times.left_alone():
            lane.history.revised |= times.trial
            self.lanes.revise(lane)
            return AloneReason.LATENCY
        if reason in (FlushReason.OUTPUT, FlushReason.TOKENS):
            return AloneReason.OUTPUT if reason == FlushReason.OUTPUT else AloneReason.TOO_LONG
        return AloneReason.IDLE if reason == FlushReason.IDLE else AloneReason.NO_COMPANY

    def _note_flush(self, tickets: list[Ticket], reason: FlushReason | AloneReason) -> None:
        ledger = self._ledger
        (ledger.singles_by_reason if len(tickets) == 1 else ledger.batches_by_reason)[reason] += 1
        notify = self._given.listeners.flush
        if notify is not None:
            notify(flushed(tickets, reason, self._given.now()))

    async def _do(self, work: Work) -> None:
        """Do *work*; whatever happens in it, every one of its tickets ends."""
        error: RequestFailed | None = None
        try:
            if work.lease is not None:
                await work.lease.returned.wait()
                if work.lease.used:
                    work.permit.used()
            elif work.batch is not None and work.lane is not None:
                await self._answer_batch(work.batch, work.lane)
            else:
                await self._answer_alone(work)
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
            if work.batch is not None and self._audits is not None:
                self._audits.void(work.batch)
            if work.lane is not None:
                with contained() as ending:
                    self.lanes.call_ended(work.lane, combined=work.batch is not None)
                if ending.error is not None:
                    _bug(ending.error)  # logged; it must not end the other slots

    async def _answer_batch(self, batch: Batch, lane: Lane) -> None:
        outcome = await self._dispatcher.batch(batch)
        if self._audits is not None:
            self._audits.call_ended(batch)
        batch.permit.finish()  # the calls of its recovery have permits of their own
        if outcome.ending == "complete" and not outcome.unanswered:
            batch.history.grow(outcome.asked, self._policy.max_batch_size)
        if not outcome.again:  # else what is asked now is the same call
            self._heed(lane)
        if outcome.unanswered or outcome.ending == "length":
            recovery = Recovery(self._given, self._dispatcher, batch, lambda: self._heed(lane))
            await recovery.after(outcome, batch.tickets, may_combine=True)
            self._heed(lane, mended=True)

    def _heed(self, lane: Lane, *, mended: bool = False) -> int:
        """Apply what a combined call of *lane* has shown, *mended* by fallback calls or not; return the size of its batches now."""
        history = lane.history
        useless = history.is_fruitless
        if history.is_useless(complete=mended):
            history.suspend()
            self._ledger.lanes_parted += 1
            if history.suspensions == 1:  # once is enough
                logger.warning("%s: requests of this kind go alone for a while", _USELESS if useless else _COSTLY)
        self.lanes.taught(lane)
        return lane.budget.size

    async def _answer_alone(self, work: Work) -> None:
        (ticket,) = work.tickets
        error = await self._dispatcher.single(ticket, work.permit)
        if error is not None:
            self.settlement.fail(ticket, error)
        elif (history := self.lanes.history_of(ticket) if work.lane is None else work.lane.history) is not None:
            self._dispatcher.attribution.learn_from_single(ticket, history)

    @asynccontextmanager
    async def lease_slot(
        self, model: str | None, headers: Mapping[str, str], cost: int, rank: int = NORMAL
    ) -> AsyncIterator[SlotLease]:
        """Hold a slot and a permit for work that is not a request, in the place that the caller occupies.

        The limits of *model*, None for the transport's, and of the credentials in *headers* count; *cost* is an estimate in tokens,
        *rank* the priority.

        Yields:
            The lease; if nothing was sent after all, it is to be marked as not used.

        Raises:
            ShutDown: The batcher closed before a slot was free.
        """
        self._check_running()
        account = self._given.accounts.of(model, headers)
        cost = cost if account.max_tokens is None else min(cost, account.max_tokens)
        lease = SlotLease(cost, asyncio.get_running_loop().create_future(), asyncio.Event(), rank)
        self.singles.add(lease, None, account)
        try:
            await lease.granted
            lease.used = True
            yield lease
        finally:
            if lease.queue is not None:
                lease.queue.discard(lease)
            lease.returned.set()

    async def rest(self, until: asyncio.Future[None]) -> None:
        """Wait *until* something is done, in a place and without a slot.

        Raises:
            ShutDown: The batcher closed before.
        """
        self._check_running()
        self._resting[until] = None
        try:
            await until
        finally:
            del self._resting[until]

    def _check_running(self) -> None:
        if self._ended:
            raise ShutDown(_NO_SLOT)


def _bug(cause: BaseException | None) -> RequestFailed:
    """Log an error that should not happen and return the error that its requests end with."""
    logger.error("a call failed in microbatch itself: %s", type(cause).__name__, exc_info=cause)
    error = RequestFailed(f"a call failed in microbatch itself: {type(cause).__name__}")
    error.__cause__ = cause
    return error
