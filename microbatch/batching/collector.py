"""Collects requests into lanes, and sees to it that each of them ends.

Theory of operation
-------------------
A *ticket* is one accepted request. It waits in a lane, if it can share a prompt, or in the queue of those that go alone; then it
is in flight, and then its future is settled. It is settled exactly once: by an answer, an error, or its caller leaving.

Both kinds of queue are *due* or not. The scheduler takes batches from those that are due as slots come free. Until then tickets
stay in their queue: they can leave it, and a lane goes on filling.

Invariants:

- A lane is in the scheduler's ring if it is due; a lane in the ring that is no longer due is passed over.
- A lane that waits for a time has a timer; a lane that is empty or due has none.
- A lane is in `_lanes` as long as tickets wait in it or are in flight from it.
- Every accepted ticket takes a place in `room` until it is settled.

What goes wrong inside a call ends the tickets of that call with a typed error; the collector lives on.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio

from microbatch.batching.budget import MAX_COUNTED_CHARS, Budgets, FlushReason
from microbatch.batching.lane import Lane
from microbatch.batching.learned import Memory
from microbatch.batching.prompt import ID_TOKENS, LINE_OVERHEAD_BYTES, item_line
from microbatch.batching.queues import AloneQueue
from microbatch.batching.request import check_messages, copy_of, read_messages, spec_of
from microbatch.batching.room import Room
from microbatch.batching.scheduler import Scheduler
from microbatch.batching.ticket import NEVER, AloneReason, Ticket
from microbatch.errors import DeadlineExceeded, RequestFailed, ShutDown

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Iterable

    from anyio.abc import TaskGroup

    from microbatch.accounting.stats import Ledger
    from microbatch.batching.call import Calls
    from microbatch.batching.exchange import Batch
    from microbatch.batching.fallback import Fallback
    from microbatch.batching.request import Options
    from microbatch.batching.ticket import Spec
    from microbatch.messages import Messages
    from microbatch.policy import FlushPolicy

logger = logging.getLogger("microbatch")

MAX_LINE_BYTES = MAX_COUNTED_CHARS
"""A longer item goes alone: it would have to be counted, and it gains least from company."""

_UNSETTLED = "a call ended without settling this request; this is a bug in microbatch"

_ALONE_WARNING = 100
"""Requests of one lane in a row that were too long to combine before a warning is logged."""


class _Work:
    """What one slot is used for: a composed batch, or one ticket alone."""

    __slots__ = ("batch", "lane", "tickets")

    def __init__(self, tickets: list[Ticket], lane: Lane | None, batch: Batch | None) -> None:
        self.tickets = tickets
        self.lane = lane
        self.batch = batch
        if lane is not None:
            lane.in_flight += 1


class Collector:
    """The lanes, and the lives of tickets.

    Args:
        policy: When lanes are due and how much may be under way.
        ledger: Where everything is counted.
        count: Counts a text's tokens.
        upper: Bounds a line's tokens from above, or None to use its bytes.

    Attributes:
        room: The places for accepted requests.
        scheduler: The slots.
        door: The event loop whose callers may come in; None before and after. One look at it answers every submit.
        closing: Whether it is shut for good.
    """

    def __init__(
        self,
        policy: FlushPolicy,
        ledger: Ledger,
        *,
        count: Callable[[str], int],
        upper: Callable[[str], int] | None,
    ) -> None:
        self._policy = policy
        self._ledger = ledger
        self._count = count
        self._upper = upper
        self._calls: Calls
        self._fallback: Fallback
        self._loop: asyncio.AbstractEventLoop
        self._context = contextvars.Context()  # timers run in it, not in that of the caller who set them
        self._tasks: TaskGroup
        self._budgets = Budgets(policy, count)
        self._memory = Memory()
        self._lanes: dict[Hashable, Lane] = {}
        self._latest: Lane | None = None  # the lane of the latest submit, if it is still open
        self._alone = AloneQueue()
        self.room = Room(policy.max_queued, self._note_quiet)
        self.scheduler: Scheduler[Lane | AloneQueue, _Work] = Scheduler(
            policy.max_concurrent_batches,
            take=self._take,
            settle=self._settle,
            rested=self._rested,
            freed=self._note_quiet,
        )
        self.door: asyncio.AbstractEventLoop | None = None
        self.closing = False
        self._close_asked: asyncio.Event
        self._quiet: asyncio.Event  # set while nothing is accepted and no slot is in use
        self._grace: float | None = None

    # --- life

    def wire(self, calls: Calls, fallback: Fallback) -> None:
        """Take the parts that settle tickets through this collector."""
        self._calls = calls
        self._fallback = fallback

    async def serve(self, ready: Callable[[], None]) -> None:
        """Run until `close` is asked for and done. One task runs this, and it alone enters and leaves the task group."""
        self._loop = asyncio.get_running_loop()
        self._close_asked, self._quiet = asyncio.Event(), asyncio.Event()
        self._quiet.set()
        try:
            async with anyio.create_task_group() as self._tasks:
                self.scheduler.start(self._tasks)
                self.door = None if self.closing else self._loop
                ready()
                await self._close_asked.wait()
                with anyio.move_on_after(self._grace):
                    await self._quiet.wait()
                self._end_waiting()
                self._tasks.cancel_scope.cancel()
        finally:
            self.closing, self.door = True, None
            self._end_waiting()
            # A task that is cancelled before its first step never gets to settle its tickets.
            for work in self.scheduler.under_way.values():
                for ticket in work.tickets:
                    self.fail(ticket, ShutDown("the batcher closed before this request was sent"))

    def close(self, grace: float | None) -> None:
        """Shut the door, send what waits, and give what is under way *grace* seconds; None waits as long as it takes."""
        if self.closing:
            return
        self.closing, self.door = True, None
        self._grace = grace
        self.room.close()
        self.flush(FlushReason.DRAIN)
        self._close_asked.set()

    def _end_waiting(self) -> None:
        """End every ticket that waits in a queue."""
        lanes = list(self._lanes.values())
        for ticket in [*self._alone.waiting(), *(ticket for lane in lanes for ticket in lane.waiting())]:
            self.fail(ticket, ShutDown("the batcher closed before this request was sent"))
        self.scheduler.refuse_borrowers(ShutDown("the batcher closed before a slot was free"))

    def _note_quiet(self) -> None:
        if not self.room.taken and not self.scheduler.in_use:
            self._quiet.set()

    def start_feeder(self, feeder: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run *feeder* in the batcher's task group, in the context of whoever asks for it: it runs the caller's own code."""
        self._tasks.start_soon(feeder)

    # --- intake

    def accept(
        self,
        messages: Messages,
        options: Options,
        timeout: float | None,
        on_taken: Callable[[Ticket], None] | None = None,
        *,
        bypass: bool = False,
    ) -> Ticket:
        """Queue a request; its ticket's future is settled in the end, whatever happens.

        Args:
            messages: The chat messages, checked here.
            options: The checked options.
            timeout: Seconds from now until its caller gives up, or None.
            on_taken: For bulk work, which waits for full batches: called when it leaves its queue.
            bypass: Go alone at once.

        Raises:
            ConfigError: The messages cannot be sent; nothing was queued.
        """
        if type(messages) is not list or not messages:
            check_messages(messages)
        read = read_messages(messages, options) if options.combinable else None
        loop = self._loop
        now = loop.time()
        if read is None:
            check_messages(messages)
            ticket = Ticket(loop.create_future(), spec_of([], options, None), options.answer, now)
            ticket.messages = copy_of(messages)
            ticket.on_taken = on_taken
            self._queue_alone(ticket, AloneReason.NOT_COMBINABLE)
        else:
            key, text = read
            line = item_line(text)
            # Every token of a byte-level BPE is at least one byte, so the bytes bound the tokens.
            tokens = len(line) + LINE_OVERHEAD_BYTES if self._upper is None else self._upper(f" {line.decode()}\n")
            lane = self._latest
            # Comparing with the lane of the submit before is cheaper than hashing its long shared texts.
            if lane is None or lane.spec.key != key:
                lane = self._latest = self._lanes.get(key) or self._open_lane(spec_of(messages, options, key))
            ticket = Ticket(loop.create_future(), lane.spec, options.answer, now, line, tokens)
            if on_taken is None:
                wait = self._policy.low_max_wait if options.low else self._policy.max_wait
                ticket.due_at = now + (wait if timeout is None else min(wait, timeout / 2))
            else:
                ticket.on_taken = on_taken
            if bypass or options.high:
                self._queue_alone(ticket, AloneReason.BYPASS if bypass else AloneReason.HIGH)
                self._drop_if_abandoned(lane)
            elif (tokens > lane.budget.tokens - ID_TOKENS or len(line) > MAX_LINE_BYTES) and self._too_long(
                ticket, lane
            ):
                self._queue_alone(ticket, AloneReason.TOO_LONG)
                self._drop_if_abandoned(lane)
            else:
                lane.add(ticket)
                if not lane.queued:
                    self._consider(lane)
        if not self.room.taken:
            self._quiet.clear()
        self.room.taken += 1
        self._ledger.items += 1
        if timeout is not None:
            ticket.deadline = now + timeout
            ticket.timer = loop.call_at(ticket.deadline, self._expire, ticket, timeout, context=self._context)
        return ticket

    def _open_lane(self, spec: Spec) -> Lane:
        learned = self._memory.of(spec.key)
        lane = self._lanes[spec.key] = Lane(spec, learned, self._budgets.of(spec, learned), self._count)
        return lane

    def _too_long(self, ticket: Ticket, lane: Lane) -> bool:
        """Whether *ticket*, whose bound is over the lane's budget, cannot share a prompt at all."""
        if len(ticket.line) <= MAX_LINE_BYTES and ticket.count(self._count) <= lane.budget.tokens - ID_TOKENS:
            return False
        lane.learned.alone += 1
        if lane.learned.alone == _ALONE_WARNING:
            logger.warning(
                "%d requests in a row were too long to share a prompt (max_batch_tokens=%d, max_prompt_tokens=%s, %d bytes): "
                "each goes alone, and nothing is saved",
                _ALONE_WARNING,
                self._policy.max_batch_tokens,
                self._policy.max_prompt_tokens,
                MAX_LINE_BYTES,
            )
        return True

    def _queue_alone(self, ticket: Ticket, reason: AloneReason) -> None:
        self._alone.add(ticket, reason)
        self._make_due(self._alone)

    def _consider(self, lane: Lane) -> None:
        """A ticket has joined *lane*, which is not in the ring: see whether it is due now."""
        if lane.due is None and not lane.in_flight and lane.live == 1 and self._heeds_idle(lane):
            lane.owe(FlushReason.IDLE)
        if lane.due is not None:
            self._make_due(lane)
        else:
            self._rearm(lane)

    def _heeds_idle(self, lane: Lane) -> bool:
        # A lane in which only bulk work waits has no time at which it falls due.
        return self._policy.idle == "flush" and not lane.spec.low and lane.due_at < NEVER

    # --- when lanes are due

    def flush(self, reason: FlushReason = FlushReason.EXPLICIT, only: Iterable[Lane] | None = None) -> None:
        """Make all lanes, or *only* these, due with everything that waits in them now."""
        for lane in list(self._lanes.values() if only is None else only):
            if lane.live:
                lane.owe(reason, everything=True)
                self._make_due(lane)

    def _make_due(self, queue: Lane | AloneQueue) -> None:
        if isinstance(queue, Lane) and not queue.queued:
            self._disarm(queue)
        self.scheduler.enqueue(queue)

    def _rested(self, queue: Lane | AloneQueue) -> None:
        """*queue* is no longer due."""
        if isinstance(queue, Lane):
            self._rearm(queue)
            self._drop_if_abandoned(queue)

    def _rearm(self, lane: Lane) -> None:
        """Set the lane's timer to the time it falls due, or to none."""
        if lane.due is not None or lane.due_at == NEVER:
            self._disarm(lane)
        elif lane.timer is None or lane.timer.when() != lane.due_at:
            self._disarm(lane)
            lane.timer = self._loop.call_at(lane.due_at, self._time_is_up, lane, context=self._context)

    def _disarm(self, lane: Lane) -> None:
        if lane.timer is not None:
            lane.timer.cancel()
            lane.timer = None

    def _time_is_up(self, lane: Lane) -> None:
        lane.timer = None
        lane.owe(FlushReason.TIMEOUT)
        self._make_due(lane)

    def _drop_if_abandoned(self, lane: Lane) -> None:
        if lane.abandoned and self._lanes.get(lane.spec.key) is lane:
            self._disarm(lane)
            del self._lanes[lane.spec.key]
            if self._latest is lane:
                self._latest = None

    # --- work

    def _take(self, queue: Lane | AloneQueue) -> _Work | None:
        """Take the next work from *queue*, a batch already composed; None if all of its callers have just left."""
        if isinstance(queue, Lane):
            return self._take_batch(queue)
        taken = queue.take()
        if taken is None:
            return None
        ticket, reason = taken
        self._ledger.singles_by_reason[reason] += 1
        return _Work([ticket], None, None)

    def _take_batch(self, lane: Lane) -> _Work | None:
        tickets, reason = lane.take()
        if not tickets:
            return None
        lane.learned.alone = 0
        if len(tickets) == 1:
            alone = AloneReason.IDLE if reason is FlushReason.IDLE else AloneReason.NO_COMPANY
            self._ledger.singles_by_reason[alone] += 1
            return _Work(tickets, lane, None)
        self._ledger.batches_by_reason[reason] += 1
        try:
            return _Work(tickets, lane, self._calls.compose(tickets, lane.learned))
        except Exception as bug:  # noqa: BLE001 it must not end the scheduler
            error = _bug(bug)
            for ticket in tickets:
                self.fail(ticket, error)
            return None

    async def _settle(self, work: _Work) -> None:
        """Do *work*; whatever happens in it, every one of its tickets ends."""
        error: RequestFailed | None = None
        try:
            if work.batch is not None:
                await self._answer_batch(work.batch)
            else:
                await self._answer_alone(work.tickets[0])
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            error = ShutDown("the batcher closed before the answer came")
            raise
        except BaseException as bug:  # noqa: BLE001 it must not end the other slots; a Rust panic is no Exception
            error = _bug(bug)
        finally:
            for ticket in work.tickets:
                if not ticket.future.done():
                    self.fail(ticket, error or RequestFailed(_UNSETTLED))
            if work.lane is not None:
                self._call_ended(work.lane)

    async def _answer_batch(self, batch: Batch) -> None:
        outcome = await self._calls.batch(batch)
        if outcome.ending == "complete" and not outcome.open:
            batch.learned.grow(outcome.asked, self._policy.max_batch_size)
        if outcome.open or outcome.ending == "length":
            await self._fallback.recover(outcome, batch.learned)

    async def _answer_alone(self, ticket: Ticket) -> None:
        error = await self._calls.single(ticket)
        if error is not None:
            self.fail(ticket, error)

    def _call_ended(self, lane: Lane) -> None:
        lane.in_flight -= 1
        if lane.learned.revised:
            lane.learned.revised = False
            lane.rebudget(self._budgets.of(lane.spec, lane.learned))
        if lane.due is None and lane.live and not lane.in_flight and self._heeds_idle(lane):
            lane.owe(FlushReason.IDLE)
        if lane.due is not None:
            self._make_due(lane)
        else:
            self._rearm(lane)
        self._drop_if_abandoned(lane)

    @asynccontextmanager
    async def borrow_slot(self) -> AsyncIterator[None]:
        """Hold a slot for work that is not a request: it is counted as pending, waits its turn, and closing waits for it.

        Raises:
            ShutDown: The batcher closed before a slot was free.
        """
        self._quiet.clear()
        self.room.taken += 1
        try:
            async with self.scheduler.borrow():
                yield
        finally:
            self.room.leave(1)

    # --- settling

    def settled(self, count: int) -> None:
        """*count* tickets have just been answered: their places are free."""
        self._ledger.answered += count
        self.room.leave(count)

    def fail(self, ticket: Ticket, error: RequestFailed) -> None:
        """End *ticket* with an error object of its own, unless it has ended already."""
        if ticket.future.done():
            return
        twin = error.replica()
        twin.attempts = ticket.attempts
        ticket.future.set_exception(twin)
        self._ledger.failed += 1
        self._withdraw(ticket)

    def leave(self, ticket: Ticket) -> None:
        """*ticket*'s caller has gone without taking an answer."""
        if ticket.reply is not None:
            # Answered in the very moment it was cancelled. What it cost is nobody's now.
            self._ledger.answered -= 1
            self._ledger.cancelled += 1
            if not ticket.call.ended:
                ticket.unclaimed = True
            elif not ticket.reply.usage.estimated:  # what nobody reported is nobody's to claim
                self._ledger.unclaimed += ticket.reply.usage
        elif ticket.future.cancelled():
            self._ledger.cancelled += 1
            self._withdraw(ticket)
        elif ticket.future.done():
            ticket.future.exception()  # retrieved, so that asyncio does not complain of it

    def _expire(self, ticket: Ticket, timeout: float) -> None:
        self.fail(ticket, DeadlineExceeded(f"no answer within the timeout of {timeout} s"))

    def _withdraw(self, ticket: Ticket) -> None:
        """*ticket* has ended without an answer: take it out of where it is."""
        queue = ticket.queue
        if queue is not None:
            queue.discard(ticket)
            if isinstance(queue, Lane):
                self._rearm(queue)
                self._drop_if_abandoned(queue)
        elif ticket.call is not None:
            ticket.call.abandoned()
        if ticket.usage is not None:
            self._ledger.unclaimed += ticket.usage
            ticket.usage = None
        if ticket.timer is not None:
            ticket.timer.cancel()
        self.room.leave(1)


def _bug(cause: BaseException) -> RequestFailed:
    """Log what should not happen and return the error that its requests end with."""
    logger.error("a call failed in microbatch itself: %s", type(cause).__name__, exc_info=cause)
    error = RequestFailed(f"a call failed in microbatch itself: {type(cause).__name__}")
    error.__cause__ = cause
    return error
