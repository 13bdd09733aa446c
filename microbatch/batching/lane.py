"""A lane: the requests that may share a call, waiting for each other.

Pure bookkeeping: a lane is told the time, the limits and how to count tokens; it sends nothing and sets no timer.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import msgspec

from microbatch.batching.ticket import LOW, NEVER, AloneReason, FlushReason
from microbatch.prompt.compose import LINE_OVERHEAD_BYTES

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from microbatch.batching.bounds import ModelLimits
    from microbatch.batching.call_state import Batch
    from microbatch.batching.estimates import Budget
    from microbatch.batching.lane_history import LaneHistory
    from microbatch.batching.request import Options
    from microbatch.batching.ticket import InFlightIndex, SlotLease, Spec, Ticket
    from microbatch.transports.accounts import Account, Permit

_AT_FIRST = 2
"""Combined calls of bulk work under way at once until one reply has been of use, because many could be wrong in the same way; while
it is being tried how long a reply the model allows, it is one. So it is later on where callers have set `max_tokens`, as no other
bound than their sum is sent meanwhile."""


class Work(msgspec.Struct, eq=False):
    """The use of one slot: requests that travel in one call, or a lease.

    Attributes:
        tickets: The requests; none for a lease, or if all of their callers were cancelled in this very step.
        reason: Why they leave; None for a lease.
        batch: The combined call, once it is composed.
    """

    permit: Permit
    tickets: list[Ticket]
    reason: FlushReason | AloneReason | None = None
    lane: Lane | None = None
    lease: SlotLease | None = None
    batch: Batch | None = None


class LaneOwner(Protocol):
    """See `LaneTable`."""

    def changed(self, lane: Lane) -> None: ...  # noqa: D102

    def left(self, lane: Lane) -> None: ...  # noqa: D102

    def rested(self, lane: Lane) -> None: ...  # noqa: D102

    def looked_up(self, lane: Lane) -> None: ...  # noqa: D102
    def revise(self, lane: Lane) -> None: ...  # noqa: D102

    def taught(self, lane: Lane) -> None: ...  # noqa: D102


class Calls(Protocol):
    """Composes and makes the calls of lanes, all of one kind: chat or embeddings. Learns from them what the lanes allow.

    Attributes:
        latest: The lane of the latest request that may share a call, None before the first.
    """

    latest: Lane | None

    def open(self, spec: Spec, owner: LaneOwner) -> Lane:
        """Return a new lane of the requests with *spec*."""

    def revise(self, lane: Lane) -> None:
        """Update the budget of *lane* from its history."""

    def cost(self, lane: Lane, items: int, tokens: int, oldest: Ticket) -> int:
        """Return the tokens that a call of *items* of *lane* is charged, the *oldest* among them, with *tokens* in their lines."""

    def why_alone(self, ticket: Ticket, lane: Lane, *, bypass: bool) -> AloneReason | None:
        """Return why *ticket*, which is not below `Lane.fast_path_max_bytes`, goes alone and not through *lane*; None if it does not.

        *bypass* if the admission queue is overfull.

        Raises:
            ConfigError: It can never be sent.
        """

    def begin(self, work: Work) -> bool:
        """Prepare the call of *work*, which has just left its queue; return False if its requests wait in another one now."""

    async def make(self, work: Work) -> None:
        """Make the call of *work*, and those that it takes to end all of its requests."""

    def ended(self, work: Work) -> None:
        """Note that *work* is over, whatever has happened."""


def why_only_one(reason: object) -> AloneReason:
    """Return why the only request that leaves a lane, for *reason*, goes alone."""
    if reason in (FlushReason.OUTPUT, FlushReason.TOKENS):
        return AloneReason.OUTPUT if reason == FlushReason.OUTPUT else AloneReason.TOO_LONG
    return AloneReason.IDLE if reason == FlushReason.IDLE else AloneReason.NO_COMPANY


@dataclass(slots=True, eq=False, repr=False)
class Lane:
    """Requests that may share a call, in order of arrival.

    The *fill* is the run of waiting requests, from the oldest, that the next batch will hold. It is extended as requests come, with
    upper bounds of their tokens as long as those suffice: only when one would overflow the budget are the largest bounds replaced by
    exact counts, until it fits or all are exact. So a short request is never tokenized, and none twice. When requests leave unsent,
    the fill is worked out anew only when it is needed: many may leave in one step.

    Attributes:
        options: Options that are known to be served here; most requests come with the same.
        max_wait: Seconds that its requests wait for others at most; set by the owner, as are `model` to `timer_at`.
        fast_path_max_bytes: Length of a line up to which a request joins without inspection; -1 for none.
        in_flight: Calls under way, each with its fallback.
        combined: Those of them that are combined calls.
        live: Requests waiting.
        has_look_ups: Whether its tickets may be held by a look-up.
    """

    spec: Spec
    account: Account
    history: LaneHistory
    budget: Budget
    index: InFlightIndex
    count: Callable[[str], int]
    calls: Calls
    owner: LaneOwner
    options: Options | None = None
    max_wait: float = 0.0
    model: ModelLimits | None = None
    needs_inspection: bool = False
    fast_path_max_bytes: int = -1
    timer: asyncio.TimerHandle | None = None
    timer_at: float = NEVER
    queued: bool = False
    in_flight: int = 0
    combined: int = 0
    live: int = 0
    has_look_ups: bool = False
    _bulk: int = 0  # those of them that are bulk work
    _pending: deque[Ticket] = field(default_factory=deque)  # discarded ones stay until they come up, or are too many
    _stale: bool = False  # whether requests have left since the fill was worked out
    _fill: int = 0
    _fill_tokens: int = 0
    _full: FlushReason | None = None
    _due_at: float = NEVER
    _owed: FlushReason | None = None
    _owed_count: int = 0

    @property
    def tenant(self) -> str | None:
        """The trust domain of its requests."""
        return self.spec.tenant

    @property
    def rank(self) -> int:
        """The priority of its requests."""
        return self.spec.rank

    def serves(self, options: Options) -> bool:
        """Return whether requests with *options* belong here, as far as options tell."""
        spec = self.spec
        if options.content != spec.key[1] or options.priority != spec.key[0]:
            return False
        self.options = options
        return True

    @property
    def due(self) -> FlushReason | None:
        """Why the lane should leave now, or None to keep waiting."""
        if self._stale:
            self._refill()
        return (self._full or self._owed) if self._fill and not self.held else None

    @property
    def held(self) -> bool:
        """True while the next batch waits.

        It waits as long as its oldest request may be answered by a look-up; one of bulk work also for those before it to show that
        combining is of use and does no harm.
        """
        if self.has_look_ups and self.live and next(each for each in self._pending if each.queue is self).held:
            return True
        bulk = self.live == self._bulk
        if self._fill == 1 or not (bulk or self.rank == LOW):
            return False
        if bulk and self.spec.kind is not None and self.spec.kind.holds(self._fill):
            return True
        trying = self.model is not None and bool(self.model.trying)
        if not self.combined or (self.history.proven and not (trying and self.spec.max_tokens)):
            return False
        return trying or self.combined >= _AT_FIRST

    @property
    def condemned(self) -> bool:
        """True while its requests go alone because audits have condemned batches of two."""
        return self.spec.kind is not None and self.spec.kind.limit == 1

    @property
    def parted(self) -> bool:
        """True while its requests go alone because of what earlier replies or audits have shown."""
        return self.history.parted or self.condemned

    @property
    def has_company(self) -> bool:
        """See `TicketQueue`: others wait, or a call is under way, during which others come."""
        return self.live > 1 or self.in_flight > 0

    @property
    def flushed(self) -> bool:
        """See `TicketQueue`."""
        return self._owed is not None

    @property
    def due_at(self) -> float:
        """Loop time at which the lane falls due; `NEVER` if nothing waits for other requests."""
        if self._stale:
            self._refill()
        return self._due_at

    def next_cost(self) -> int:
        """Return the tokens that the next batch is charged as it stands. The lane must be due."""
        quota = self.account.max_tokens
        if quota is None:
            return 0
        if self._stale:
            self._refill()
        oldest = next(ticket for ticket in self._pending if ticket.queue is self)
        return min(quota, self.calls.cost(self, self._fill, self._fill_tokens, oldest))

    @property
    def abandoned(self) -> bool:
        """True if nothing waits and nothing is under way, so that the lane can be dropped."""
        return not self.live and not self.in_flight

    def add(self, ticket: Ticket) -> bool:
        """Queue *ticket*; return whether that may have changed when the lane is due, or the next batch of one that takes turns."""
        if self._stale:
            self._refill()
        ticket.queue = self
        self._pending.append(ticket)
        self.live += 1
        if ticket.bulk:
            self._bulk += 1
        elif self._full is not None and self.live == self._bulk + 1:
            return True  # what was held for want of such a request is not held any more
        return self._full is None and self._admit(ticket)

    def rebudget(self, budget: Budget) -> None:
        """Work with another *budget* from now on."""
        if budget != self.budget:
            self.budget = budget
            self._refill()

    def schedule_flush(self, reason: FlushReason, *, everything: bool = False) -> None:
        """Make the lane due for *reason*: its next batch, or *everything* that waits now."""
        if self._owed is None:
            self._owed = reason
            self._owed_count = 0
        self._owed_count = max(self._owed_count, self.live if everything else 1)

    def flush(self, reason: FlushReason) -> None:
        """Make everything that waits due now."""
        if self.live:
            self.schedule_flush(reason, everything=True)
            self.owner.changed(self)

    def hasten(self, ticket: Ticket, due_at: float, *, bulk: bool) -> None:
        """See `TicketQueue`."""
        awaited, sooner = ticket.bulk and not bulk, due_at < ticket.due_at
        if awaited:
            ticket.bulk = False
            self._bulk -= 1
        if sooner:
            ticket.patience = due_at - ticket.created
            if not self._stale and self._full is None:
                # Else the lane is due, and looks at the times again when the next batch has left.
                self._due_at = min(self._due_at, ticket.due_at)
        if awaited or sooner:
            self.owner.changed(self)

    def discard(self, ticket: Ticket, *, moved: bool = False) -> None:
        """See `TicketQueue`."""
        if moved:
            ticket.queue = None
        else:
            ticket.taken()
        self.live -= 1
        self._bulk -= ticket.bulk
        self._forget_owed(self._owed_count - self.live)
        if len(self._pending) > 2 * self.live + 64:
            self._pending = deque(ticket for ticket in self._pending if ticket.queue is self)
        self._stale = True
        self.owner.left(self)

    def looked_up(self) -> None:
        """See `TicketQueue`."""
        self.owner.looked_up(self)

    def rested(self) -> None:
        """Note that it takes no turns any more."""
        self.owner.rested(self)

    def take(self, permit: Permit) -> Work:
        """Remove the next batch, which *permit* pays, and return it. The lane must be due.

        The batch is empty if all of its callers were cancelled in this very step and have not been discarded yet.
        """
        reason = self.due
        if reason is None:
            raise AssertionError("take() from a lane that is not due")
        tickets: list[Ticket] = []
        pending, left = self._pending, self._fill
        while left:
            ticket = pending.popleft()
            if ticket.queue is not self:
                continue
            left -= 1
            if ticket.future.done() and ticket.done:  # mostly the former tells, which is no call of Python's
                continue
            ticket.queue = None
            if ticket.bulk or ticket.waiters is not None:
                self._bulk -= ticket.bulk
                ticket.taken()
            tickets.append(ticket)
        self.live -= len(tickets)
        self._forget_owed(len(tickets))  # those just cancelled are subtracted when they are discarded
        self._refill()
        return Work(permit, tickets, reason, self)

    def _forget_owed(self, count: int) -> None:
        """Subtract *count* tickets from those that are to be flushed."""
        if self._owed is not None and count > 0:
            self._owed_count -= count
            if self._owed_count <= 0:
                self._owed = None

    def waiting(self) -> list[Ticket]:
        """Return the tickets that wait, oldest first."""
        return [ticket for ticket in self._pending if ticket.queue is self and not ticket.done]

    def _refill(self) -> None:
        """Work out the fill anew from the oldest waiting ticket."""
        self._stale = False
        self._fill = self._fill_tokens = 0
        self._full = None
        self._due_at = NEVER
        pending, place = self._pending, 0
        while place < len(pending) and self._full is None:
            ticket = pending[place]
            if ticket.queue is self:
                self._admit(ticket)
                place += 1
            else:
                del pending[place]  # once and for all, or those who have left would be passed over again and again

    def _admit(self, ticket: Ticket) -> bool:
        """Take *ticket* into the fill, which is not full; return what `add` does.

        A lane that is full is due, and the times of those behind need not be known.
        """
        budget = self.budget
        counted = ticket.counted  # spelled out: `ticket.tokens` is a call
        tokens = self._fill_tokens + budget.frame
        tokens += len(ticket.line) + LINE_OVERHEAD_BYTES if counted is None else counted
        if tokens > budget.tokens and self._fill:
            if not self._fits_exactly(ticket):
                self._full = FlushReason.TOKENS
                return True
            tokens = self._fill_tokens
        self._fill_tokens = tokens
        fill = self._fill = self._fill + 1
        if fill >= budget.size:
            self._full = budget.size_reason
            return True
        due_at = ticket.created + ticket.patience
        if due_at < self._due_at:
            self._due_at = due_at
            return True
        return fill == 1 or self.queued

    def _fits_exactly(self, ticket: Ticket) -> bool:
        """Count the largest bounds until *ticket* fits behind the fill, or nothing is left to count."""
        fill = list(islice((waiting for waiting in self._pending if waiting.queue is self), self._fill))
        fill.append(ticket)
        total = self._fill_tokens + ticket.tokens + self.budget.frame
        bounded_only = [waiting for waiting in fill if waiting.counted is None]
        for bounded in sorted(bounded_only, key=lambda waiting: waiting.tokens, reverse=True):
            if total <= self.budget.tokens:
                break
            bound = bounded.tokens
            total -= bound - bounded.count(self.count)
        fits = total <= self.budget.tokens
        self._fill_tokens = total if fits else total - ticket.tokens - self.budget.frame
        return fits
