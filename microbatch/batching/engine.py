"""Collects requests into lanes, and sees to it that each of them ends.

Theory of operation
-------------------
A *ticket* is one accepted request. It waits in a lane, if it can share a prompt, or in a queue of those that go alone; then it
is in flight, and then its future is settled. It is settled exactly once: by an answer, an error, or its caller leaving.

Both kinds of queue are *due* or not (see `lanes`). The scheduler takes batches from those that are due as slots and permits come
free. Until then tickets stay in their queue: they can leave it, and a lane goes on filling.

Every accepted ticket takes a place in `admission` until it is settled. What goes wrong inside a call ends the tickets of that call with
a typed error; the collector lives on.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio

from microbatch.batching.admission import AdmissionQueue
from microbatch.batching.batch_limits import BatchLimits, FlushReason
from microbatch.batching.bounds import Bounds
from microbatch.batching.estimates import Estimates
from microbatch.batching.events import flushed, settled
from microbatch.batching.intake import Intake
from microbatch.batching.lane import Lane
from microbatch.batching.lane_table import Lanes
from microbatch.batching.scheduler import Scheduler
from microbatch.batching.single_flight import Seat, SingleFlight
from microbatch.batching.single_queue import SingleQueue, SlotLease, SlotQueue
from microbatch.batching.ticket import NORMAL, AloneReason
from microbatch.errors import BatcherClosed, ConfigError, DeadlineExceeded, RequestFailed, ShutDown

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping

    from anyio.abc import TaskGroup

    from microbatch.accounting.events import Listeners
    from microbatch.accounting.stats import Ledger
    from microbatch.batching.call_state import Batch
    from microbatch.batching.dispatch import Dispatcher
    from microbatch.batching.fallback import Fallback
    from microbatch.batching.permits import Account, Accounts, Permit
    from microbatch.batching.ticket import Ticket
    from microbatch.policy import FlushPolicy

logger = logging.getLogger("microbatch")

CLOSED_EARLY = "the batcher was closed while it was opening"
_UNSETTLED = "a call ended without settling this request; this is a bug in microbatch"


class _Work:
    """What one slot is used for: a composed batch, one ticket alone, or a loan."""

    __slots__ = ("batch", "lane", "loan", "permit", "tickets")

    def __init__(
        self,
        permit: Permit,
        tickets: list[Ticket],
        lane: Lane | None = None,
        batch: Batch | None = None,
        loan: SlotLease | None = None,
    ) -> None:
        self.permit = permit
        self.tickets = tickets
        self.lane = lane
        self.batch = batch
        self.loan = loan
        if lane is not None:
            lane.in_flight += 1
            lane.combined += batch is not None


class Engine:
    """The queues, and the lives of tickets.

    Args:
        policy: When lanes are due and how much may be under way.
        ledger: Where everything is counted.
        accounts: Where permits come from.
        count: Counts a text's tokens.
        upper: Bounds a line's tokens from above, or None to use its bytes.
        ratio: Tells what a generated token of a model costs, in prompt tokens.
        listeners: Who is told what happens.
        model: The transport's model.
        canary: Whether combined prompts end in a canary.

    Attributes:
        admission: The places for accepted requests.
        flights: The tickets that others may join.
        lanes: The open lanes.
        scheduler: The slots.
        bounds: How long combined replies may be.
        estimates: What calls are charged.
        accept: Queues a request; see `Intake.accept`.
        door: The event loop whose callers may come in; None before and after. One look at it answers every submit.
        closing: Whether it is shut for good.
    """

    def __init__(
        self,
        policy: FlushPolicy,
        ledger: Ledger,
        accounts: Accounts,
        *,
        count: Callable[[str], int],
        upper: Callable[[str], int] | None,
        ratio: Callable[[str | None], float],
        listeners: Listeners,
        model: str | None,
        canary: bool,
    ) -> None:
        self._policy = policy
        self._ledger = ledger
        self._accounts = accounts
        self._listeners = listeners
        self._calls: Dispatcher
        self._fallback: Fallback
        self._loop: asyncio.AbstractEventLoop
        self._tasks: TaskGroup
        self.bounds = Bounds(model, canary=canary)
        self.estimates = Estimates(count, self.bounds, canary=canary)
        budgets = BatchLimits(policy, self.estimates)
        self._borrowers: dict[Account, SlotQueue] = {}
        bypass = policy.max_concurrent_batches if policy.when_full == "bypass" else 0
        self.admission = AdmissionQueue(policy.max_queued, self._note_quiet, bypass=bypass)
        self.flights = SingleFlight(
            ledger,
            self.admission,
            abandon=self._withdraw,
            disown=self._disown,
            late=_late,
            listeners=listeners,
            now=lambda: self._loop.time(),  # noqa: PLW0108 the loop is not known yet
        )
        self.scheduler: Scheduler[Lane | SingleQueue | SlotQueue, _Work] = Scheduler(
            policy.max_concurrent_batches,
            cost=self._cost,
            take=self._take,
            settle=self._settle,
            rested=self._rested,
            freed=self._note_quiet,
        )
        accounts.serve(self.scheduler)
        self.lanes = Lanes(
            policy,
            budgets,
            self.estimates,
            accounts,
            count=count,
            by_bytes=upper is None,
            file_of=self.flights.file_of,
            enqueue=self.scheduler.enqueue,
        )
        self._intake = Intake(
            policy,
            ledger,
            admission=self.admission,
            lanes=self.lanes,
            flights=self.flights,
            accounts=accounts,
            estimates=self.estimates,
            count=count,
            upper=upper,
            ratio=ratio,
            capture=listeners.submit,
            enqueue=self.scheduler.enqueue,
            expire=self._expire,
        )
        self.accept = self._intake.accept
        self.door: asyncio.AbstractEventLoop | None = None
        self.closing = False
        self._close_asked: asyncio.Event
        self._quiet: asyncio.Event  # set when, after the door was shut, nothing is accepted and no slot in use
        self._grace: float | None = None

    # --- life

    def wire(self, calls: Dispatcher, fallback: Fallback) -> None:
        """Take the parts that settle tickets through this collector."""
        self._calls = calls
        self._fallback = fallback

    async def serve(self, ready: Callable[[], None]) -> None:
        """Run until `close` is asked for and done. One task runs this, and it alone enters and leaves the task group.

        It may be run again if it ends before `admit` and `close` were called.
        """
        self._loop = asyncio.get_running_loop()
        self.lanes.start(self._loop)
        self._intake.start(self._loop)
        self._close_asked, self._quiet = asyncio.Event(), asyncio.Event()
        try:
            async with anyio.create_task_group() as self._tasks:
                self.scheduler.start(self._tasks)
                ready()
                await self._close_asked.wait()
                self._quiet.clear()
                self._note_quiet()
                with anyio.move_on_after(self._grace):
                    await self._quiet.wait()
                self._end_waiting()
                self._tasks.cancel_scope.cancel()
        finally:
            self.closing, self.door = self.closing or self.door is not None, None
            self._end_waiting()
            # A task that is cancelled before its first step never gets to settle its tickets.
            for work in self.scheduler.under_way.values():
                work.permit.finish()
                for ticket in work.tickets:
                    self.fail(ticket, ShutDown("the batcher closed before this request was sent"))

    def admit(self) -> None:
        """Accept requests from now on; `serve` has to be ready.

        Raises:
            BatcherClosed: `close` was called before.
        """
        if self.closing:
            raise BatcherClosed(CLOSED_EARLY)
        self.door = self._loop

    def close(self, grace: float | None) -> None:
        """Shut the door, send what waits, and give what is under way *grace* seconds; None waits as long as it takes.

        Before `admit` there is nothing to send, and whoever runs `serve` has to cancel it.
        """
        admitted = self.door is not None
        self.closing, self.door = True, None
        if admitted:
            self._grace = grace
            self.admission.close()
            self.flush(FlushReason.DRAIN)
            self._close_asked.set()

    def _end_waiting(self) -> None:
        """End every ticket that waits in a queue."""
        queues = [*self._intake.alone.values(), *self.lanes]
        for ticket in [ticket for queue in queues for ticket in queue.waiting()]:
            self.fail(ticket, ShutDown("the batcher closed before this request was sent"))
        for borrowers in list(self._borrowers.values()):
            borrowers.refuse(ShutDown("the batcher closed before a slot was free"))

    def _note_quiet(self) -> None:
        if not self.admission.taken and not self.scheduler.under_way:
            self._quiet.set()

    def start_feeder(self, feeder: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run *feeder* in the batcher's task group, in the context of whoever asks for it: it runs the caller's own code."""
        self._tasks.start_soon(feeder)

    def flush(self, reason: FlushReason = FlushReason.EXPLICIT, only: Iterable[Lane] | None = None) -> None:
        """Make all lanes, or *only* these, due with everything that waits in them now."""
        self.lanes.flush(reason, only)

    # --- work

    def _cost(self, queue: Lane | SingleQueue | SlotQueue) -> int:
        """Return the tokens that the next work of *queue* is charged, as it stands."""
        quota = queue.account.max_tokens
        if quota is None:
            return 0
        if not isinstance(queue, Lane):
            return queue.cost
        items, tokens = queue.next_batch
        if items == 1:
            # One that was to travel with others was charged before anything was known of single answers.
            apart, oldest = queue.history.suspended_for > 0, queue.oldest
            return min(quota, self.estimates.alone(oldest, queue.history).tokens if apart else oldest.cost)
        return min(quota, self.estimates.together(queue.spec, queue.history, items, tokens, quota))

    def _rested(self, queue: Lane | SingleQueue | SlotQueue) -> None:
        """*queue* takes no turns any more."""
        if isinstance(queue, Lane):
            self.lanes.rested(queue)
        elif isinstance(queue, SlotQueue):
            self._borrowers.pop(queue.account, None)
        else:
            self._intake.alone.pop((queue.account, queue.tenant, queue.rank), None)

    def _take(self, queue: Lane | SingleQueue | SlotQueue, permit: Permit) -> _Work | None:
        """Take the next work from *queue*, a batch already composed; None if all of its callers have just left."""
        if isinstance(queue, Lane):
            return self._take_batch(queue, permit)
        if isinstance(queue, SlotQueue):
            return _Work(permit, [], loan=queue.take())
        taken = queue.take()
        if taken is None:
            return None
        ticket, reason = taken
        self._note_single(ticket, reason)
        return _Work(permit, [ticket])

    def _take_batch(self, lane: Lane, permit: Permit) -> _Work | None:
        tickets, reason = lane.take()
        if not tickets:
            return None
        if len(tickets) == 1:
            alone = AloneReason.IDLE if reason is FlushReason.IDLE else AloneReason.NO_COMPANY
            if lane.history.consume_suspension():
                alone = AloneReason.NOT_CHEAPER
                self.lanes.revise(lane)
            self._note_single(tickets[0], alone)
            return _Work(permit, tickets, lane)
        if self._policy.merge == "when-cheaper" and not self._intake.pays(lane, len(tickets)):
            for ticket in tickets:
                self._intake.queue_alone(ticket, AloneReason.NOT_CHEAPER, lane.account)
            return None
        self._ledger.batches_by_reason[reason] += 1
        if self._listeners.flush is not None:
            self._listeners.flush(flushed(tickets, reason, self._loop.time()))
        try:
            return _Work(permit, tickets, lane, self._calls.compose(tickets, lane.history, permit))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as bug:  # noqa: BLE001 it must not end the scheduler; a Rust panic is no Exception
            error = _bug(bug)
            for ticket in tickets:
                self.fail(ticket, error)
            return None

    def _note_single(self, ticket: Ticket, reason: AloneReason) -> None:
        self._ledger.singles_by_reason[reason] += 1
        if self._listeners.flush is not None:
            self._listeners.flush(flushed([ticket], reason, self._loop.time()))

    async def _settle(self, work: _Work) -> None:
        """Do *work*; whatever happens in it, every one of its tickets ends."""
        error: RequestFailed | None = None
        try:
            if work.loan is not None:
                await work.loan.returned.wait()
                if work.loan.used:
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
                if not ticket.future.done():
                    self.fail(ticket, error or RequestFailed(_UNSETTLED))
            if work.lane is not None:
                work.lane.combined -= work.batch is not None
                self._end_call(work.lane)

    def _end_call(self, lane: Lane) -> None:
        try:
            self.lanes.call_ended(lane)
        except Exception as bug:  # noqa: BLE001 it must not end the other slots
            _bug(bug)

    async def _answer_batch(self, batch: Batch, lane: Lane) -> None:
        outcome = await self._calls.batch(batch)
        batch.permit.finish()  # the calls of its recovery have permits of their own
        if outcome.ending == "complete" and not outcome.unanswered:
            batch.history.grow(outcome.asked, self._policy.max_batch_size)
        if not outcome.again:  # else what is asked now is the same call
            self._heed(lane)
        if outcome.unanswered or outcome.ending == "length":
            await self._fallback.recover(outcome, batch, lambda: self._heed(lane))
            self._heed(lane, mended=True)

    def _heed(self, lane: Lane, *, mended: bool = False) -> int:
        """A combined call of *lane* has ended: see whether its requests go alone from now on, and what else it has shown.

        Args:
            lane: The lane.
            mended: Whether what the call left open has been asked again.

        Returns:
            How many requests its batches hold now.
        """
        history = lane.history
        if history.is_useless(complete=mended):
            history.suspend()
            self._ledger.lanes_parted += 1
            if history.suspensions == 1:  # once is enough
                logger.warning(
                    "asking again for missing and broken answers costs more than combining saves: requests of this kind "
                    "go alone for a while"
                )
        self.lanes.taught(lane)
        return lane.budget.size

    async def _answer_alone(self, work: _Work) -> None:
        (ticket,) = work.tickets
        error = await self._calls.single(ticket, work.permit)
        if error is not None:
            self.fail(ticket, error)
        elif work.lane is not None and ticket.reply is not None and not ticket.reply.usage.estimated:
            work.lane.history.record_single(ticket.reply.usage.completion_tokens)

    @asynccontextmanager
    async def borrow_slot(self, model: str | None, headers: Mapping[str, str], cost: int) -> AsyncIterator[SlotLease]:
        """Hold a slot and a permit for work that is not a request: it is pending, waits its turn, and closing waits for it.

        Args:
            model: Whose limits count, together with *headers*; None for the transport's.
            headers: The headers that will be sent.
            cost: Tokens it will be charged, by estimate.

        Yields:
            The loan; if nothing was sent after all, it is to be marked as not used.

        Raises:
            ShutDown: The batcher closed before a slot was free.
        """
        with self.admission.entering():
            account = self._accounts.of(model, headers)
            queue = self._borrowers.get(account)
            if queue is None:
                queue = self._borrowers[account] = SlotQueue(account, NORMAL)
            cost = cost if account.max_tokens is None else min(cost, account.max_tokens)
            loan = SlotLease(cost, self._loop.create_future(), asyncio.Event())
            queue.add(loan)
            self.admission.taken += 1
            self.scheduler.enqueue(queue)
        try:
            await loan.granted
            loan.used = True
            yield loan
        finally:
            loan.returned.set()
            self.admission.leave(1)

    # --- settling

    def settled(self, count: int) -> None:
        """*count* tickets have just been answered: their places are free."""
        self._ledger.answered += count
        self.admission.leave(count)

    def fail(self, ticket: Ticket, error: RequestFailed | ConfigError) -> None:
        """End *ticket* with an error object of its own, unless it has ended already."""
        if ticket.future.done():
            return
        twin = error.replica()
        twin.attempts = ticket.attempts
        ticket.future.set_exception(twin)
        self._ledger.failed += 1
        self._tell(ticket, twin)
        self._withdraw(ticket)

    def leave(self, who: Ticket | Seat) -> None:
        """The caller who was given *who* has gone without taking an answer."""
        if isinstance(who, Seat):
            who.flight.leave(who)
        elif who.flight is not None:
            who.flight.leave(who.flight.first)
        elif who.reply is not None:
            # Answered in the very moment it was cancelled. What it cost is nobody's now.
            self._ledger.answered -= 1
            self._ledger.cancelled += 1
            self._disown(who)
        elif who.future.cancelled():
            self._ledger.cancelled += 1
            self._withdraw(who)
            self._tell(who)
        elif who.future.done():
            who.future.exception()  # retrieved, so that asyncio does not complain of it

    def _tell(self, ticket: Ticket, error: RequestFailed | ConfigError | None = None) -> None:
        """Tell who listens that *ticket* ended with *error*, or was left; a flight tells of each of its callers."""
        if self._listeners.settle is not None and ticket.flight is None:
            now = self._loop.time()
            self._listeners.settle(settled(ticket.spec, ticket.created, ticket.origin, now, error=error))

    def _disown(self, ticket: Ticket) -> None:
        """Nobody has the answer to *ticket*: what it cost is nobody's."""
        if ticket.call is None or not ticket.call.ended:
            ticket.remember().unclaimed = True
        elif ticket.reply is not None and not ticket.reply.usage.estimated:
            self._ledger.unclaimed += ticket.reply.usage
        elif ticket.usage is not None:  # of the last call nothing was reported, but of those before it
            self._ledger.unclaimed += ticket.usage

    def _expire(self, ticket: Ticket) -> None:
        if ticket.deadline is not None:
            self.fail(ticket, _late(ticket, ticket.deadline.timeout))

    def _withdraw(self, ticket: Ticket) -> None:
        """*ticket* has ended without an answer: take it out of where it is."""
        if ticket.file is not None:
            ticket.file.drop(ticket)
        queue = ticket.queue
        if isinstance(queue, Lane):
            self.lanes.discard(queue, ticket)
        elif queue is not None:
            queue.discard(ticket)
        elif ticket.call is not None:
            ticket.call.abandoned()
        if ticket.usage is not None:
            self._ledger.unclaimed += ticket.usage
            ticket.remember().usage = None
        if ticket.deadline is not None:
            ticket.deadline.cancel()
        self.admission.leave(1)


def _late(ticket: Ticket, timeout: float) -> RequestFailed:
    """Return the error of a caller of *ticket* whose *timeout* has passed."""
    permit = None if ticket.call is None else ticket.call.permit
    failure = None if permit is None else permit.error
    latest = "" if failure is None else f"; the latest attempt failed: {type(failure).__name__}: {failure}"
    return DeadlineExceeded(f"no answer within the timeout of {timeout:g} s{latest}", attempts=ticket.attempts)


def _bug(cause: BaseException) -> RequestFailed:
    """Log what should not happen and return the error that its requests end with."""
    logger.error("a call failed in microbatch itself: %s", type(cause).__name__, exc_info=cause)
    error = RequestFailed(f"a call failed in microbatch itself: {type(cause).__name__}")
    error.__cause__ = cause
    return error
