"""A lane: the requests that may share a prompt, waiting for each other.

Pure bookkeeping: a lane is told the time, the limits and how to count tokens; it sends nothing and sets no timer.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING

from microbatch.batching.batch_limits import FlushReason
from microbatch.batching.ticket import LOW, NEVER
from microbatch.prompt.compose import ID_TOKENS, LINE_OVERHEAD_BYTES

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from microbatch.batching.batch_limits import Budget
    from microbatch.batching.bounds import ModelLimits
    from microbatch.batching.lane_history import LaneHistory
    from microbatch.batching.permits import Account
    from microbatch.batching.request import Options
    from microbatch.batching.single_flight import InFlightIndex
    from microbatch.batching.ticket import Spec, Ticket

_AT_FIRST = 2
"""Combined calls of bulk work under way at once until one reply has been of use, because many could be wrong in the same way; while
it is being tried how long a reply the model allows, it is one."""

_OVERHEAD = LINE_OVERHEAD_BYTES + ID_TOKENS


class Lane:
    """Requests that may share a prompt, in order of arrival.

    The *fill* is the run of waiting requests, from the oldest, that the next batch will hold. It is extended as requests
    come, with upper bounds of their tokens as long as those suffice: only when one would overflow the budget are the
    largest bounds replaced by exact counts, until it fits or all are exact. So a short request is never tokenized, and none
    twice. When requests leave unsent, it is worked out anew only once somebody asks for it: many may leave in one turn.

    Attributes:
        spec: What the requests have in common.
        account: Whose permits they need.
        history: What is known of earlier batches.
        file: Where equal requests are found.
        in_flight: Batches under way.
        combined: Those of them that are combined calls, and asking again for what they left open.
        live: Requests waiting.
    """

    __slots__ = (
        "_awaited",
        "_count",
        "_due_at",
        "_fill",
        "_fill_tokens",
        "_full",
        "_owed",
        "_owed_count",
        "_pending",
        "_stale",
        "account",
        "budget",
        "careful",
        "combined",
        "file",
        "history",
        "in_flight",
        "live",
        "max_wait",
        "model",
        "options",
        "queued",
        "rank",
        "spec",
        "tenant",
        "timer",
        "timer_at",
        "welcome",
    )

    def __init__(
        self,
        spec: Spec,
        account: Account,
        history: LaneHistory,
        budget: Budget,
        count: Callable[[str], int],
        file: InFlightIndex,
    ) -> None:
        self.spec = spec
        self.account = account
        self.tenant = spec.tenant
        self.rank = spec.rank
        self.max_wait = 0.0  # seconds its requests wait for company at most; the collector's
        self.model: ModelLimits | None = None  # what is known of it; the collector's
        self.careful = False  # whether a request has to be looked at closely before it may join; the collector's
        self.welcome = -1  # bytes of a line up to which it joins without any other look; the collector's
        self.options: Options | None = None  # known to be served here; most come again with the same
        self.history = history
        self.file = file
        self.budget = budget
        self.in_flight = 0
        self.combined = 0
        self.live = 0
        self._due_at = NEVER
        self.queued = False  # whether the scheduler has this lane in its turn
        self.timer_at = NEVER
        self.timer: asyncio.TimerHandle | None = None  # the scheduler's
        self._awaited = 0  # waiting requests that are no bulk work, or more
        self._count = count
        self._pending: deque[Ticket] = deque()  # discarded ones stay until they come up, or are too many
        self._stale = False  # whether requests have left since the fill was worked out
        self._fill = 0
        self._fill_tokens = 0
        self._full: FlushReason | None = None
        self._owed: FlushReason | None = None
        self._owed_count = 0

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
        """True while the next batch, of bulk work, waits for one under way to show that combining is of use."""
        if not self.combined or self.history.proven or self._fill == 1:
            return False
        if self.combined < _AT_FIRST and not (self.model is not None and self.model.trying):
            return False
        return self.rank == LOW or not self._awaited

    @property
    def due_at(self) -> float:
        """Loop time at which the lane falls due, `NEVER` if nothing waits for company."""
        if self._stale:
            self._refill()
        return self._due_at

    @property
    def next_batch(self) -> tuple[int, int]:
        """How many requests the next batch will hold as it stands, and the tokens of their lines."""
        if self._stale:
            self._refill()
        return self._fill, self._fill_tokens

    @property
    def oldest(self) -> Ticket:
        """The request that has waited longest. One must wait."""
        return next(ticket for ticket in self._pending if ticket.queue is self)

    @property
    def abandoned(self) -> bool:
        """Whether nothing waits and nothing is under way, so that the lane can go."""
        return not self.live and not self.in_flight

    def add(self, ticket: Ticket) -> bool:
        """Queue *ticket*; return whether that may have changed when the lane is due."""
        if self._stale:
            self._refill()
        ticket.queue = self
        self._pending.append(ticket)
        self.live += 1
        if ticket.on_taken is None:
            self._awaited += 1
            if self._awaited == 1 and self._full is not None:
                return self.combined > 0  # what was held for want of such a request is not held any more
        return self._full is None and self._admit(ticket)

    def rebudget(self, budget: Budget) -> None:
        """Work with another *budget* from now on."""
        if budget != self.budget:
            self.budget = budget
            self._refill()

    def owe(self, reason: FlushReason, *, everything: bool = False) -> None:
        """Make the lane due for *reason*: its next batch, or *everything* that waits now."""
        if self._owed is None:
            self._owed = reason
            self._owed_count = 0
        self._owed_count = max(self._owed_count, self.live if everything else 1)

    def hasten(self, ticket: Ticket, due_at: float) -> None:
        """*ticket*, which waits here, is to leave by *due_at*, which is sooner than before."""
        ticket.patience = due_at - ticket.created
        if ticket.on_taken is not None:
            # A caller that waits has joined what was bulk work. That this is not taken back when it leaves does no harm.
            self._awaited += 1
        if not self._stale and self._full is None:
            # Else the lane is due, and looks at the times again when the next batch has left.
            self._due_at = min(self._due_at, ticket.due_at)

    def discard(self, ticket: Ticket, *, moved: bool = False) -> None:
        """*ticket*, which waits here, has settled (its caller left), or has *moved* to another queue: forget it."""
        if moved:
            ticket.queue = None
        else:
            ticket.taken()
        self.live -= 1
        self._awaited -= ticket.on_taken is None
        self._pay_debt(self._owed_count - self.live)
        if len(self._pending) > 2 * self.live + 64:
            self._pending = deque(ticket for ticket in self._pending if ticket.queue is self)
        self._stale = True

    def take(self) -> tuple[list[Ticket], FlushReason]:
        """Remove the next batch and return it with the reason it leaves. The lane must be due.

        The batch is empty if all of its callers have left in this very turn and have not been discarded yet.
        """
        reason = self.due
        if reason is None:
            raise AssertionError("take() from a lane that is not due")
        tickets: list[Ticket] = []
        pending, left = self._pending, self._fill
        while left:
            ticket = pending.popleft()
            if ticket.queue is self:
                left -= 1
                if not ticket.future.done():
                    ticket.queue = None
                    self._awaited -= ticket.on_taken is None
                    if ticket.on_taken is not None:
                        ticket.on_taken(ticket)
                    tickets.append(ticket)
        self.live -= len(tickets)
        self._pay_debt(len(tickets))  # those who have just left pay when they are discarded
        self._refill()
        return tickets, reason

    def _pay_debt(self, count: int) -> None:
        """*count* fewer tickets are owed a flush."""
        if self._owed is not None and count > 0:
            self._owed_count -= count
            if self._owed_count <= 0:
                self._owed = None

    def waiting(self) -> list[Ticket]:
        """Return what waits, oldest first."""
        return [ticket for ticket in self._pending if ticket.queue is self and not ticket.future.done()]

    def _refill(self) -> None:
        """Work out the fill anew from the oldest waiting ticket."""
        self._stale = False
        self._fill = self._fill_tokens = 0
        self._full = None
        self._due_at = NEVER
        pending, place = self._pending, 0
        while place < len(pending) and self._full is None:
            if pending[place].queue is self:
                self._admit(pending[place])
                place += 1
            else:
                del pending[place]  # once and for all, or those who have left would be passed over again and again

    def _admit(self, ticket: Ticket) -> bool:
        """Take *ticket* into the fill, which is not full; return whether that may have changed when the lane is due.

        A lane that is full is due, and the times of those behind need not be known.
        """
        budget = self.budget
        counted = ticket.counted  # spelled out: `ticket.tokens` is a call
        tokens = self._fill_tokens + (len(ticket.line) + _OVERHEAD if counted is None else counted + ID_TOKENS)
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
        return fill == 1

    def _fits_exactly(self, ticket: Ticket) -> bool:
        """Count the largest bounds until *ticket* fits behind the fill, or nothing is left to count."""
        fill = list(islice((waiting for waiting in self._pending if waiting.queue is self), self._fill))
        fill.append(ticket)
        total = self._fill_tokens + ticket.tokens + ID_TOKENS
        for bounded in sorted(fill, key=_bound, reverse=True):
            if total <= self.budget.tokens or bounded.counted is not None:
                break
            bound = bounded.tokens
            total -= bound - bounded.count(self._count)
        fits = total <= self.budget.tokens
        self._fill_tokens = total if fits else total - ticket.tokens - ID_TOKENS
        return fits


def _bound(ticket: Ticket) -> int:
    return ticket.tokens if ticket.counted is None else -1
