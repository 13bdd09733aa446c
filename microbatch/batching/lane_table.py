"""The open lanes: which of them a request joins, and when each is due.

Invariants:

- A lane takes turns with the scheduler if it is due; one that no longer is, is passed over.
- A lane that waits for a time has a timer; a lane that is empty or due has none. After requests have left a lane, that holds at the
  end of the turn.
- A lane is open as long as tickets wait in it or are in flight from it. The lane of the latest request is kept beyond that, until
  a request of another kind comes: the next one is mostly of the same kind, and making a lane costs as much as several submits.
"""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING

from microbatch.batching.batch_limits import FlushReason
from microbatch.batching.lane import Lane
from microbatch.batching.lane_history import LaneHistories
from microbatch.batching.overhead import MAX_COUNTED_CHARS
from microbatch.batching.request import spec_of
from microbatch.batching.ticket import HIGH, LOW, NEVER
from microbatch.prompt.compose import ID_TOKENS, LINE_OVERHEAD_BYTES

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Hashable, Iterable, Iterator

    from microbatch.batching.batch_limits import BatchLimits
    from microbatch.batching.estimates import Estimates
    from microbatch.batching.permits import Accounts
    from microbatch.batching.request import Options
    from microbatch.batching.single_flight import InFlightIndex
    from microbatch.batching.ticket import Ticket
    from microbatch.messages import Messages
    from microbatch.policy import FlushPolicy


MAX_LINE_BYTES = MAX_COUNTED_CHARS
"""A longer item goes alone: it would have to be counted, and it gains least from company."""


class Lanes:
    """The open lanes.

    Args:
        policy: When they are due.
        budgets: How much a batch of each may hold.
        estimates: What a call of each is charged.
        accounts: Whose permits each needs.
        count: Counts a text's tokens.
        by_bytes: Whether a line's bytes bound its tokens.
        file_of: Where requests with equal content are found by others.
        enqueue: Lets a lane that is due take its turns.

    Attributes:
        latest: The lane of the latest request that may share a prompt, None before the first.
    """

    def __init__(
        self,
        policy: FlushPolicy,
        budgets: BatchLimits,
        estimates: Estimates,
        accounts: Accounts,
        *,
        count: Callable[[str], int],
        by_bytes: bool,
        file_of: Callable[[Hashable], InFlightIndex],
        enqueue: Callable[[Lane], None],
    ) -> None:
        self.latest: Lane | None = None
        self._policy = policy
        self._budgets = budgets
        self._estimates = estimates
        self._accounts = accounts
        self._count = count
        self._by_bytes = by_bytes
        self._file_of = file_of
        self._enqueue = enqueue
        self._memory = LaneHistories()
        self._by_key: dict[Hashable, Lane] = {}
        self._left: dict[Lane, None] = {}  # lanes that requests have left in this turn; a set that keeps their order
        self._loop: asyncio.AbstractEventLoop
        self._context = contextvars.Context()  # timers run in it, not in that of the caller who set them

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Set timers in *loop* from now on."""
        self._loop = loop

    def __iter__(self) -> Iterator[Lane]:
        """Yield the lanes that are open now."""
        return iter([lane for lane in self._by_key.values() if not lane.abandoned])

    # --- which lane

    def find(self, key: tuple[Hashable, ...], messages: Messages, options: Options) -> Lane:
        """Return the lane of all requests with *key*, made if need be."""
        before = self.latest
        lane = self.latest = self._by_key.get(key) or self._make(key, messages, options)
        if before is not None:
            self.drop_if_abandoned(before)
        return lane

    def _make(self, key: tuple[Hashable, ...], messages: Messages, options: Options) -> Lane:
        spec = spec_of(messages[:-1], options, key)
        history = self._memory.of(key)
        account = self._accounts.of(spec.model, spec.headers)
        model = self._estimates.model(spec)
        if account.max_tokens is not None or self._policy.merge == "when-cheaper" or model.context is not None:
            self._estimates.measure(spec, history)
        budget = self._budgets.of(spec, history, account.max_tokens)
        lane = self._by_key[key] = Lane(spec, account, history, budget, self._count, self._file_of(spec.content))
        lane.model = model
        lane.max_wait = self._policy.low_max_wait if lane.rank == LOW else self._policy.max_wait
        self._look_closely(lane)
        return lane

    def _look_closely(self, lane: Lane) -> None:
        lane.careful = lane.rank == HIGH or lane.account.max_tokens is not None or self._policy.merge == "when-cheaper"
        # Every token is at least a byte of UTF-8, but by a caller's own count: there the bytes are looked at by themselves.
        by_bytes = min(lane.budget.tokens - ID_TOKENS - LINE_OVERHEAD_BYTES, MAX_LINE_BYTES)
        lane.welcome = -1 if lane.careful or not self._by_bytes else by_bytes

    def drop_if_abandoned(self, lane: Lane) -> None:
        """Drop *lane* if nothing waits in it and nothing is under way, unless it is the latest."""
        if lane.abandoned and lane is not self.latest and self._by_key.get(lane.spec.key) is lane:
            self._disarm(lane)
            del self._by_key[lane.spec.key]

    # --- when they are due

    def joined(self, lane: Lane) -> None:
        """A ticket has joined *lane*, which does not take turns yet: see whether it is due now."""
        if lane.due is None and not lane.in_flight and lane.live == 1 and self._heeds_idle(lane):
            lane.owe(FlushReason.IDLE)
        self._consider(lane)

    def discard(self, lane: Lane, ticket: Ticket, *, moved: bool = False) -> None:
        """*ticket*, which waited in *lane*, has settled, or has *moved* to another queue."""
        lane.discard(ticket, moved=moved)
        if not lane.live:
            self.rested(lane)
        else:
            # Many may leave in one turn: it is looked at once, at its end.
            if not self._left:
                self._loop.call_soon(self._look_at_left, context=self._context)
            self._left[lane] = None

    def _look_at_left(self) -> None:
        left, self._left = self._left, {}
        for lane in left:
            self.rested(lane)

    def hasten(self, lane: Lane, ticket: Ticket, due_at: float) -> None:
        """*ticket*, which waits in *lane*, waits no longer than until *due_at*, in loop time."""
        if due_at < ticket.due_at:
            lane.hasten(ticket, due_at)
            self._consider(lane)

    def call_ended(self, lane: Lane) -> None:
        """A call of *lane* and its fallback are over."""
        lane.in_flight -= 1
        self.revise(lane)
        if lane.due is None and lane.live and not lane.in_flight and self._heeds_idle(lane):
            lane.owe(FlushReason.IDLE)
        self._consider(lane)
        self.drop_if_abandoned(lane)

    def revise(self, lane: Lane) -> None:
        """Let *lane* work with what has been learned since its budget was worked out."""
        if lane.history.take_revision():
            lane.rebudget(self._budgets.of(lane.spec, lane.history, lane.account.max_tokens))
            self._look_closely(lane)

    def taught(self, lane: Lane) -> None:
        """A call of *lane* has ended, though not yet what asks again for what it left open: heed what it has shown."""
        if lane.history.revised:
            self.revise(lane)
            self._consider(lane)

    def flush(self, reason: FlushReason, only: Iterable[Lane] | None = None) -> None:
        """Make all lanes, or *only* these, due with everything that waits in them now."""
        for lane in self if only is None else only:
            if lane.live:
                lane.owe(reason, everything=True)
                self._consider(lane)

    def rested(self, lane: Lane) -> None:
        """*lane* has changed and may be due no longer."""
        self._rearm(lane)
        self.drop_if_abandoned(lane)

    def _heeds_idle(self, lane: Lane) -> bool:
        # A lane in which only bulk work waits has no time at which it falls due.
        return self._policy.idle == "flush" and lane.rank != LOW and lane.due_at < NEVER

    def _consider(self, lane: Lane) -> None:
        if lane.due is not None:
            self._make_due(lane)
        else:
            self._rearm(lane)

    def _make_due(self, lane: Lane) -> None:
        if not lane.queued:
            self._disarm(lane)
        self._enqueue(lane)

    def _rearm(self, lane: Lane) -> None:
        """Set the lane's timer to the time it falls due, or to none."""
        if lane.due is not None or lane.due_at == NEVER or lane.held:
            self._disarm(lane)
        elif lane.timer is None or lane.timer_at != lane.due_at:
            self._disarm(lane)
            # The time is kept beside the handle: uvloop's have no `when` if the time has come.
            lane.timer_at = lane.due_at
            lane.timer = self._loop.call_at(lane.due_at, self._time_is_up, lane, context=self._context)

    def _disarm(self, lane: Lane) -> None:
        if lane.timer is not None:
            lane.timer.cancel()
            lane.timer = None

    def _time_is_up(self, lane: Lane) -> None:
        lane.timer = None
        if lane.due is None and lane.due_at > lane.timer_at:
            self._rearm(lane)  # those who were to leave now have left in this very turn
            return
        lane.owe(FlushReason.TIMEOUT)
        self._consider(lane)
