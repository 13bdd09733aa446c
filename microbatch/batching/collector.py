"""Collects requests into lanes and decides when each batch leaves.

Theory of operation
-------------------
A *ticket* is one accepted request. It waits in a lane, if it can share a prompt, or in the queue of those that go alone; then
it is in flight, and then its future is settled. It is settled exactly once: by an answer, an error, or its caller leaving.

Both kinds of queue are *due* or not. Due queues stand in one ring. `_pump` is the scheduler: while a slot is free it takes the
next queue of the ring, takes a batch from it, composes it and starts a task for it, all in one plain step, so that nothing can
happen between the decision and the composing. Until a slot is granted, tickets stay in their queue: they can leave it, and the
lane goes on filling.

Invariants:

- A slot is held by one task, from `_start` to the end of `_run`, its fallback included.
- A lane is in the ring if it is due; a lane in the ring that is no longer due is passed over.
- A lane that waits for a time has a timer; a lane that is empty or due has none.
- A lane is in `_lanes` as long as tickets wait in it or are in flight from it.
- `_accepted` counts the tickets that are accepted and not settled; it never exceeds `max_queued` but for `map`, which keeps its
  own bound inside that one.

Submits and timers only ask for a pump; a task of the batcher's own runs it at the next turn of the event loop. So no caller's
context variables reach another's call, and callers of one turn travel together: that costs no time, and a burst on an idle lane
leaves as full batches instead of one request alone and then the rest.

What goes wrong inside a task ends the tickets of that task with a typed error; the collector lives on.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio

from microbatch.batching.lane import (
    NEVER,
    AloneReason,
    Budget,
    FlushReason,
    Lane,
    Memory,
    Ticket,
    output_reserve,
)
from microbatch.batching.prompt import ID_TOKENS, LINE_OVERHEAD_BYTES, instruction, item_line
from microbatch.batching.queues import AloneQueue, BorrowerQueue
from microbatch.batching.request import check_messages, copy_of, read_messages, spec_of
from microbatch.errors import BatcherClosed, DeadlineExceeded, RequestFailed, ShutDown

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Iterable

    from anyio.abc import TaskGroup

    from microbatch.accounting.stats import Ledger
    from microbatch.batching.call import Batch, Calls
    from microbatch.batching.fallback import Fallback
    from microbatch.batching.lane import Learned, Spec
    from microbatch.batching.request import Options
    from microbatch.messages import Messages
    from microbatch.policy import FlushPolicy

logger = logging.getLogger("microbatch")

MAX_LINE_BYTES = 16_384
"""A longer item goes alone: counting its tokens would hold up the event loop, and it gains least from company."""

_ALONE_WARNING = 100
"""Requests of one lane in a row that were too long to combine before a warning is logged."""


_PREAMBLES = 256
"""Shapes of answers whose instruction's tokens are remembered."""


class _Work:
    """What one slot is used for: a composed batch, or one ticket alone."""

    __slots__ = ("batch", "lane", "tickets")

    def __init__(self, tickets: list[Ticket], lane: Lane | None, batch: Batch | None) -> None:
        self.tickets = tickets
        self.lane = lane
        self.batch = batch


class Collector:
    """The lanes, the slots, and the tasks in them.

    Args:
        policy: When lanes are due and how much may be under way.
        ledger: Where everything is counted.
        count: Counts a text's tokens.
        upper: Bounds a line's tokens from above, or None to use its bytes.
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
        self._context = contextvars.Context()
        self._tasks: TaskGroup
        self._memory = Memory()
        self._lanes: dict[Hashable, Lane] = {}
        self._latest: Lane | None = None  # the lane of the latest submit, if it is still open
        self._alone = AloneQueue()
        self._borrowers = BorrowerQueue()
        self._due: deque[Lane | AloneQueue | BorrowerQueue] = deque()
        self._slots = policy.max_concurrent_batches
        self._pumping = False
        self._accepted = 0
        self._room: deque[asyncio.Future[None]] = deque()  # submits that wait for room, in order of arrival
        self._watchers: set[Callable[[], None]] = set()
        self._preambles: dict[str, int] = {}
        self._held: dict[int, _Work] = {}  # what the slots in use are at
        self._closing = False
        self._gone = False
        self._close_asked: asyncio.Event
        self._pump_asked: asyncio.Event
        self._quiet: asyncio.Event  # set while nothing is accepted and no task runs
        self._grace: float | None = None

    # --- life

    def wire(self, calls: Calls, fallback: Fallback) -> None:
        """Take the parts that settle tickets through this collector."""
        self._calls = calls
        self._fallback = fallback

    async def serve(self, ready: Callable[[], None]) -> None:
        """Run until `close` is asked for and done. One task runs this, and it alone enters and leaves the task group."""
        self._loop = asyncio.get_running_loop()
        self._pump_asked, self._close_asked, self._quiet = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._quiet.set()
        try:
            async with anyio.create_task_group() as self._tasks:
                self._tasks.start_soon(self._schedule)
                ready()
                await self._close_asked.wait()
                with anyio.move_on_after(self._grace):
                    await self._quiet.wait()
                self._fail_waiting()
                self._tasks.cancel_scope.cancel()
        finally:
            self._closing = self._gone = True
            self._fail_waiting()

    async def _schedule(self) -> None:
        """Pump whenever somebody outside the task group asks for it."""
        while True:
            await self._pump_asked.wait()
            self._pump_asked.clear()
            self._pump()

    def close(self, grace: float | None) -> None:
        """Shut the door, send what waits, and give what is under way *grace* seconds; None waits as long as it takes."""
        if self._closing:
            return
        self._closing = True
        self._grace = grace
        for waiter in self._room:
            if not waiter.done():
                waiter.set_exception(BatcherClosed("the batcher closed before there was room for this request"))
        self._room.clear()
        self.flush(FlushReason.DRAIN)
        self._close_asked.set()

    def _fail_waiting(self) -> None:
        """End every ticket that waits in a queue, and, once all tasks are gone, those that a task never got to."""
        queued = [ticket for lane in list(self._lanes.values()) for ticket in lane.waiting()]
        queued += self._alone.waiting()
        queued += [ticket for work in self._held.values() for ticket in work.tickets] if self._gone else []
        for ticket in queued:
            self.fail(ticket, ShutDown("the batcher closed before this request was sent"))
        for lane in list(self._lanes.values()):
            self._disarm(lane)
        self._borrowers.refuse(ShutDown("the batcher closed before a slot was free"))

    # --- intake

    @property
    def accepted(self) -> int:
        """Requests accepted and not settled."""
        return self._accepted

    @property
    def in_flight(self) -> int:
        """Slots in use."""
        return self._policy.max_concurrent_batches - self._slots

    @property
    def has_room(self) -> bool:
        """Whether another request may be accepted without waiting or jumping a queue."""
        return self._accepted < self._policy.max_queued and not self._room

    async def wait_for_room(self, timeout: float | None) -> None:
        """Wait, in order of arrival, until one more request may be accepted; its place is reserved on return.

        Raises:
            DeadlineExceeded: *timeout* seconds passed first.
            BatcherClosed: The batcher closed first.
        """
        place: asyncio.Future[None] = self._loop.create_future()
        self._room.append(place)
        try:
            async with asyncio.timeout(timeout):
                await place
        except TimeoutError as error:
            self._give_up(place)
            raise DeadlineExceeded(
                f"no room within the timeout of {timeout} s: {self._accepted} requests are pending"
            ) from error
        except asyncio.CancelledError:
            self._give_up(place)
            raise
        self._accepted -= 1  # whoever waited takes it in this very step

    def _give_up(self, place: asyncio.Future[None]) -> None:
        """Whoever waited for *place* is gone; if it was given in the same moment, it goes to the next."""
        if place.done() and not place.cancelled() and place.exception() is None:
            self._accepted -= 1
            self.offer_room()

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
            due_at = NEVER
            if on_taken is None:
                wait = self._policy.low_max_wait if options.low else self._policy.max_wait
                due_at = now + (wait if timeout is None else min(wait, timeout / 2))
            ticket = Ticket(loop.create_future(), lane.spec, options.answer, now, line, tokens, due_at)
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
        if not self._accepted:
            self._quiet.clear()
        self._accepted += 1
        self._ledger.items += 1
        if timeout is not None:
            ticket.deadline = now + timeout
            ticket.timer = loop.call_at(ticket.deadline, self._expire, ticket, timeout, context=self._context)
        return ticket

    def _open_lane(self, spec: Spec) -> Lane:
        learned = self._memory.of(spec.key)
        lane = self._lanes[spec.key] = Lane(spec, learned, self._budget(spec, learned), self._count)
        return lane

    def _budget(self, spec: Spec, learned: Learned) -> Budget:
        policy = self._policy
        reserve = output_reserve(spec.max_tokens) if spec.max_tokens else learned.answer_tokens
        by_output = max(1, policy.max_output_tokens // reserve)
        size = min(policy.max_batch_size, learned.batch_size or policy.max_batch_size)
        tokens = policy.max_batch_tokens
        if policy.max_prompt_tokens is not None:
            shared = "".join(str(message["content"]) for message in spec.shared)
            # Counting a huge text would hold up the event loop; its bytes are a bound as good as any.
            size_of = self._count if len(shared) <= MAX_LINE_BYTES else (lambda text: len(text.encode()))
            tokens = min(tokens, policy.max_prompt_tokens - size_of(shared))
        tokens -= self._preamble_tokens(spec.answer.words)
        if by_output < size:
            return Budget(by_output, tokens, FlushReason.OUTPUT)
        return Budget(size, tokens)

    def _preamble_tokens(self, words: str) -> int:
        """Return the tokens of our instruction, counted once for each shape of answer."""
        tokens = self._preambles.get(words)
        if tokens is None:
            if len(self._preambles) >= _PREAMBLES:
                self._preambles.clear()
            text = instruction(words)
            tokens = self._preambles[words] = self._count(text) if len(text) <= MAX_LINE_BYTES else len(text.encode())
        return tokens

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

    # --- scheduling

    def flush(self, reason: FlushReason = FlushReason.EXPLICIT, only: Iterable[Lane] | None = None) -> None:
        """Make all lanes, or *only* these, due with everything that waits in them now."""
        for lane in list(self._lanes.values() if only is None else only):
            if lane.live:
                lane.owe(reason, everything=True)
                self._make_due(lane)

    def _make_due(self, queue: Lane | AloneQueue | BorrowerQueue) -> None:
        if not queue.queued:
            queue.queued = True
            self._due.append(queue)
            if isinstance(queue, Lane):
                self._disarm(queue)
        if self._slots:
            self._pump_asked.set()

    def _pump(self) -> None:
        """Start a task for what is due, as far as slots go."""
        if self._pumping:
            return  # an eager task that ended while it was being started; the loop below goes on
        self._pumping = True
        try:
            while self._slots and self._due:
                if self._due[0] is self._borrowers:
                    self._lend()
                    continue
                work = self._next()
                if work is not None:
                    self._slots -= 1
                    self._tasks.start_soon(self._run, work)
        finally:
            self._pumping = False
        self._notify()

    def _lend(self) -> None:
        """Lend a slot to the next borrower, whose turn it is."""
        self._due.popleft()
        self._borrowers.queued = False
        if self._borrowers.due:
            self._slots -= 1
            self._borrowers.lend()
        if self._borrowers.due:
            self._make_due(self._borrowers)

    def _next(self) -> _Work | None:
        """Take the next batch of the queue whose turn it is, composed; None if it was no longer due."""
        queue = self._due.popleft()
        queue.queued = False
        work = None
        assert not isinstance(queue, BorrowerQueue), "lent by the pump"  # noqa: S101 for type checkers
        if queue.due:
            work = self._take_batch(queue) if isinstance(queue, Lane) else self._take_alone(queue)
        if queue.due:
            queue.queued = True
            self._due.append(queue)
        elif isinstance(queue, Lane):
            self._rearm(queue)
            self._drop_if_abandoned(queue)
        return work

    def _take_batch(self, lane: Lane) -> _Work | None:
        tickets, reason = lane.take()
        if not tickets:
            return None
        lane.learned.alone = 0
        if len(tickets) == 1:
            self._ledger.singles_by_reason[
                AloneReason.IDLE if reason is FlushReason.IDLE else AloneReason.NO_COMPANY
            ] += 1
            return self._hold(_Work(tickets, lane, None))
        self._ledger.batches_by_reason[reason] += 1
        try:
            batch = self._calls.compose(tickets, lane.learned)
        except Exception as bug:  # noqa: BLE001 it must not end the scheduler
            error = _bug(bug)
            for ticket in tickets:
                self.fail(ticket, error)
            return None
        return self._hold(_Work(tickets, lane, batch))

    def _take_alone(self, queue: AloneQueue) -> _Work | None:
        taken = queue.take()
        if taken is None:
            return None
        ticket, reason = taken
        self._ledger.singles_by_reason[reason] += 1
        return self._hold(_Work([ticket], None, None))

    def _hold(self, work: _Work) -> _Work:
        # A task that is cancelled before its first step never gets to settle its tickets; `serve` does it then.
        self._held[id(work)] = work
        if work.lane is not None:
            work.lane.in_flight += 1
        return work

    async def _run(self, work: _Work | None) -> None:
        """Do the work of one slot, and more of it as long as something is due; then give the slot back."""
        try:
            while work is not None:
                await self._settle(work)
                # Let the callers just answered go on before the next batch, even if the transport never waits for anything.
                await asyncio.sleep(0)
                work = None
                while self._due and work is None and self._due[0] is not self._borrowers:
                    work = self._next()
                if work is not None:
                    self._notify()
        finally:
            self._slots += 1
            self._pump()
            self._note_quiet()

    async def _settle(self, work: _Work) -> None:
        """Do *work*; whatever happens in it, every one of its tickets ends."""
        error: RequestFailed = ShutDown("the batcher closed before the answer came")
        try:
            if work.batch is not None:
                await self._answer_batch(work.batch)
            else:
                await self._answer_alone(work.tickets[0])
            error = RequestFailed("a call ended without settling this request; this is a bug in microbatch")
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as bug:  # noqa: BLE001 it must not end the other slots; a Rust panic is no Exception
            error = _bug(bug)
        finally:
            for ticket in work.tickets:
                self.fail(ticket, error)
            del self._held[id(work)]
            if work.lane is not None:
                self._call_ended(work.lane)

    async def _answer_batch(self, batch: Batch) -> None:
        outcome = await self._calls.batch(batch)
        if outcome.ending == "complete" and not outcome.open:
            batch.learned.grow(outcome.asked, self._policy.max_batch_size)
        await self._fallback.recover(outcome, batch.learned)

    async def _answer_alone(self, ticket: Ticket) -> None:
        error = await self._calls.single(ticket)
        if error is not None:
            self.fail(ticket, error)

    def _call_ended(self, lane: Lane) -> None:
        lane.in_flight -= 1
        lane.rebudget(self._budget(lane.spec, lane.learned))
        if lane.due is None and lane.live and not lane.in_flight and self._heeds_idle(lane):
            lane.owe(FlushReason.IDLE)
        if lane.due is not None:
            self._make_due(lane)
        else:
            self._rearm(lane)
        self._drop_if_abandoned(lane)

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

    @asynccontextmanager
    async def borrow_slot(self) -> AsyncIterator[None]:
        """Hold a slot for work that is not a request: it is counted as pending, waits its turn, and closing waits for it.

        Raises:
            ShutDown: The batcher closed before a slot was free.
        """
        place: asyncio.Future[None] = self._loop.create_future()
        self._accepted += 1
        self._quiet.clear()
        self._borrowers.add(place)
        self._make_due(self._borrowers)
        try:
            await place
            yield
        finally:
            if place.done() and not place.cancelled() and place.exception() is None:
                self._slots += 1
                self._pump_asked.set()
            self._free(1)

    # --- settling

    def settled(self, count: int) -> None:
        """*count* tickets have just been answered: their places are free."""
        self._ledger.answered += count
        self._free(count)

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
            if ticket.call.ended:
                self._ledger.unclaimed += ticket.reply.usage
            else:
                ticket.unclaimed = True
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
        self._free(1)

    def _free(self, places: int) -> None:
        self._accepted -= places
        if self._room:
            self.offer_room()
        if not self._accepted:
            self._note_quiet()

    def offer_room(self) -> None:
        """Give free places to those who have waited longest for one."""
        while self._room and self._accepted < self._policy.max_queued:
            place = self._room.popleft()
            if not place.done():
                place.set_result(None)
                self._accepted += 1

    def _note_quiet(self) -> None:
        if not self._accepted and self._slots == self._policy.max_concurrent_batches:
            self._quiet.set()

    # --- bulk work

    @property
    def closing(self) -> bool:
        """Whether the door is shut."""
        return self._closing

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call *watcher* whenever the scheduler has run; it may flush lanes."""
        self._watchers.add(watcher)

    def unwatch(self, watcher: Callable[[], None]) -> None:
        """Stop calling *watcher*."""
        self._watchers.discard(watcher)

    def _notify(self) -> None:
        for watcher in list(self._watchers):
            watcher()

    def start_feeder(self, feeder: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run *feeder* in the batcher's task group, in the context of whoever asks for it: it runs the caller's own code."""
        self._tasks.start_soon(feeder)


def _bug(cause: BaseException) -> RequestFailed:
    """Log what should not happen and return the error that its requests end with."""
    logger.error("a call failed in microbatch itself: %s", type(cause).__name__, exc_info=cause)
    error = RequestFailed(f"a call failed in microbatch itself: {type(cause).__name__}")
    error.__cause__ = cause
    return error
