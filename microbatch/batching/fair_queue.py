"""The order in which due queues and waiting attempts are served, fair and without starvation.

Priorities share by weight, as long as all have something due. Within a priority the account with the fewest calls on the wire is next,
among equals the one that was served longest ago. Within an account retries come before fallback calls and these before new work,
where tenants take turns, within a tenant queues.

Beyond the slots there is an overdraft, a quarter as many again, so that one account's slow calls cannot keep others waiting: an
account with nothing on the wire, or one high-priority request per account, may start within it. Half of it is for high priority.

Two things hold an account back without holding up others:

- It is *blocked* while it has no permit to give. What was refused is its *head* and goes first afterwards, so that a small request
  never overtakes a large one; only attempts go before new work even then. It is no longer blocked when what was refused has become
  another, larger or smaller: the permit that it waits for is of the wrong size then.
- It begins no new call while as many as there are slots have begun and not finished, or while most of them back off: during an
  outage requests wait unsent, where they can still be cancelled, joined or promoted. Retries of calls that have begun go on.

Pure bookkeeping.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Final, Protocol

from microbatch.batching.ticket import HIGH

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Hashable, Iterable

    from microbatch.batching.lane import Work
    from microbatch.transports.accounts import Account, Permit

WEIGHTS: Final = (16, 4, 1)
"""Turns of the priorities high, normal and low, while all of them wait."""

_OUTAGE_CALLS: Final = 8
"""Calls of an account that must be backing off, and be more than half of those begun, for it to begin no new one."""

_STALE_ENTRIES: Final = 64
"""Outdated entries of a heap, beyond as many as are valid, after which it is rebuilt."""


class Stride:
    """Weighted turns of the three priorities: stride scheduling (Waldspurger 1995).

    Each turn moves a priority on by 1/weight, and the one furthest behind is next. A priority that comes back after a rest starts level
    with the others, so that it makes up for nothing.
    """

    def __init__(self) -> None:
        self._moved = [0.0] * len(WEIGHTS)
        self._level = 0.0  # how far the priority of the latest turn had moved

    def enter(self, rank: int) -> None:
        """Note that *rank* waits again after a rest."""
        self._moved[rank] = max(self._moved[rank], self._level)

    def first(self, ranks: Iterable[int]) -> int | None:
        """Return which of *ranks* is next, the most urgent one of equals; None if there are none."""
        return min(ranks, key=self._moved.__getitem__, default=None)

    def served(self, rank: int) -> None:
        """Use up a turn of *rank*."""
        self._level = self._moved[rank]
        self._moved[rank] += 1 / WEIGHTS[rank]


class WaitQueue(Protocol):
    """A queue that takes turns: a lane, or a queue of requests that go alone, or of leases.

    Attributes:
        queued: Whether it takes turns now; the scheduler's mark.
        rank: Its priority, an index into `WEIGHTS`.
        due: Something true while it has work to give.
    """

    queued: bool

    @property
    def account(self) -> Account: ...  # noqa: D102

    @property
    def tenant(self) -> Hashable: ...  # noqa: D102

    @property
    def rank(self) -> int: ...  # noqa: D102

    @property
    def due(self) -> object: ...  # noqa: D102

    def next_cost(self) -> int:
        """Return the tokens that its next work is charged. It must be due."""

    def take(self, permit: Permit) -> Work:
        """Remove and return its next work, which *permit* pays. It must be due."""

    def rested(self) -> object:
        """Note that it takes no turns any more, because it was not due."""


class Attempt:
    """A retry, or the first attempt of a fallback call, which waits for a slot and a permit.

    Attributes:
        begun: Whether the call has begun: this is a retry.
        granted: Done when the attempt may be made, or can only be refused.
    """

    __slots__ = ("account", "begun", "granted", "permit", "rank")

    def __init__(self, permit: Permit, granted: asyncio.Future[None]) -> None:
        self.permit: Permit = permit
        self.account: Account = permit.account
        self.rank: int = permit.rank
        self.begun: bool = permit.begun
        self.granted: asyncio.Future[None] = granted


@dataclass(slots=True, eq=False)
class _AccountTurn:
    """The due queues and waiting attempts of one account and priority, oldest first.

    Attributes:
        since: When it was served last, or came.
        retries: Attempts of calls that have begun.
        fallbacks: First attempts of fallback calls.
        tenants: Queues by tenant. The dict serves as a ring: the first is next.
        entry: Its valid entry in the heap, None while it may not be served; other entries of it are outdated.
    """

    account: Account
    rank: int
    since: int
    retries: deque[Attempt] = field(default_factory=deque)
    fallbacks: deque[Attempt] = field(default_factory=deque)
    tenants: dict[Hashable, deque[WaitQueue]] = field(default_factory=dict)
    entry: _Entry | None = None

    @property
    def empty(self) -> bool:
        return not (self.retries or self.fallbacks or self.tenants)

    def queue_of(self, attempt: Attempt) -> deque[Attempt]:
        return self.retries if attempt.begun else self.fallbacks


@dataclass(slots=True, eq=False)
class _Load:
    """The turns of one account, by priority.

    Attributes:
        head: What was refused a permit last, and is served first.
        refused: What the account has no permit to give for now, so that it is blocked; None if it is not.
    """

    turns: list[_AccountTurn | None] = field(default_factory=lambda: [None] * len(WEIGHTS))
    head: WaitQueue | Attempt | None = None
    refused: WaitQueue | Attempt | None = None

    def forget(self, item: WaitQueue | Attempt) -> None:
        if self.head is item:
            self.head = None


_Entry = tuple[bool, int, int, int, _AccountTurn]
"""Comes last; calls on the wire; since when it has waited; a number that makes entries differ; the account and priority."""


@dataclass(slots=True, eq=False)
class _Priority:
    """The turns of one priority that may be served: their number, and a heap that may hold outdated entries."""

    servable: int = 0
    heap: list[_Entry] = field(default_factory=list)

    def enter(self, entry: _Entry) -> None:
        heappush(self.heap, entry)
        if len(self.heap) > 2 * self.servable + _STALE_ENTRIES:
            self.heap = [each for each in self.heap if each[-1].entry is each]
            heapify(self.heap)

    @property
    def first(self) -> _AccountTurn:
        """The account whose turn it is. One must be servable."""
        while self.heap[0][-1].entry is not self.heap[0]:
            heappop(self.heap)
        return self.heap[0][-1]


class FairQueue:
    """The queues and attempts that are due.

    Args:
        slots: Most calls on the wire, but for the overdraft; also the most calls that one account may have begun and not finished.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._overdraft = slots // 4
        self._priorities = tuple(_Priority() for _ in WEIGHTS)
        self._stride = Stride()
        self._loads: dict[Account, _Load] = {}
        self._overdrawn: set[Account] = set()
        self._clock = count().__next__

    # --- what is due

    def add(self, queue: WaitQueue) -> None:
        """Put *queue* last in its place."""
        load, turn = self._turn_of(queue.account, queue.rank)
        turn.tenants.setdefault(queue.tenant, deque()).append(queue)
        self._place(load, turn)

    def add_attempt(self, attempt: Attempt) -> None:
        """Put *attempt* behind the others of its kind, account and priority."""
        load, turn = self._turn_of(attempt.account, attempt.rank)
        turn.queue_of(attempt).append(attempt)
        self._place(load, turn)
        if not isinstance(load.head, Attempt):
            self.unblock(attempt.account)  # what is blocked is new work, which attempts do not wait for

    def remove(self, queue: WaitQueue) -> None:
        """Remove *queue*, which is no longer due; no turn is used up."""
        load, turn = self._turn_of(queue.account, queue.rank)
        queues = turn.tenants[queue.tenant]
        queues.remove(queue)  # mostly the first
        if not queues:
            del turn.tenants[queue.tenant]
        load.forget(queue)
        self._place(load, turn)

    def discard(self, attempt: Attempt) -> None:
        """Remove *attempt*, which is no longer wanted; no effect if it is not there any more."""
        load = self._loads.get(attempt.account)
        turn = None if load is None else load.turns[attempt.rank]
        if load is None or turn is None or attempt not in turn.queue_of(attempt):
            return
        turn.queue_of(attempt).remove(attempt)
        if load.head is attempt:
            load.head = None
            load.refused = None  # what is next may need less
        self._place_all(load)

    # --- whose turn it is

    def next(self, in_use: int = 0) -> WaitQueue | Attempt | None:
        """Return what is served next with *in_use* slots, which stays where it is; None if nothing may be."""
        rank = self._stride.first(
            rank
            for rank, priority in enumerate(self._priorities)
            if priority.servable and (in_use < self._slots or self._may_overdraw(priority.first, in_use - self._slots))
        )
        return None if rank is None else self._first_of(self._priorities[rank].first)

    def served(self, item: WaitQueue | Attempt, *, stays: bool = False) -> None:
        """Use up the turn of *item*, its tenant, its account and its priority; a queue *stays* for another turn or goes."""
        self._stride.served(item.rank)
        load, turn = self._turn_of(item.account, item.rank)
        turn.since = self._clock()
        if isinstance(item, Attempt):
            turn.queue_of(item).remove(item)  # mostly the first
        else:
            queues = turn.tenants.pop(item.tenant)
            queues.remove(item)
            if stays:
                queues.append(item)
            if queues:
                turn.tenants[item.tenant] = queues
        load.forget(item)
        self._place_all(load)

    # --- what holds accounts back

    def block(self, item: WaitQueue | Attempt, in_use: int = 0) -> None:
        """Serve nothing of the account of *item*, which has no permit for it now.

        *item* goes first afterwards, unless only the overdraft let it ask: that gives it a slot sooner, but no permit.
        """
        load = self._loads[item.account]
        load.refused = item
        if in_use < self._slots:
            load.head = item
        self._place_all(load)

    def unblock(self, account: Account) -> bool:
        """Serve *account* again, which may have a permit. Return whether anything of it may be served."""
        load = self._loads.get(account)
        if load is None:
            return False
        if load.refused is not None:
            load.refused = None
            self._place_all(load)
        return any(turn is not None and turn.entry is not None for turn in load.turns)

    def resized(self, queue: WaitQueue) -> None:
        """Serve the account of *queue* again if it is blocked because of *queue*, whose next work has become another."""
        load = self._loads.get(queue.account)
        if load is None or load.refused is not queue:
            return
        if not queue.due or queue.next_cost() != queue.account.refused:
            self.unblock(queue.account)

    def changed(self, account: Account) -> None:
        """Take account of what *account* has on the wire, has begun and has backing off, any of which has changed."""
        load = self._loads.get(account)
        if load is not None:
            self._place_all(load)

    def overdraws(self, permit: Permit, in_use: int) -> bool:
        """Return whether *permit*, just paid, uses the overdraft of high priority; `repaid` has to follow then."""
        if permit.rank != HIGH or (in_use < self._slots and permit.account.begun <= self._slots):
            return False
        self._overdrawn.add(permit.account)
        return True

    def repaid(self, account: Account) -> None:
        """Note that the high-priority call that *account* had beyond the slots is no longer on the wire."""
        self._overdrawn.discard(account)

    # --- inside

    def _turn_of(self, account: Account, rank: int) -> tuple[_Load, _AccountTurn]:
        load = self._loads.get(account)
        if load is None:
            others = list(self._loads.values()) if len(self._loads) == 1 else ()
            load = self._loads[account] = _Load()
            for other in others:
                self._place_all(other)  # it was alone, and its entries were not kept up to date; see `_place`
        turn = load.turns[rank]
        if turn is None:
            turn = load.turns[rank] = _AccountTurn(account, rank, self._clock())
        return load, turn

    def _may_begin(self, turn: _AccountTurn) -> bool:
        begun, resting = turn.account.begun, turn.account.backing_off
        if resting >= _OUTAGE_CALLS and 2 * resting > begun:
            return False
        return begun < self._slots + (self._overdraft if self._is_urgent(turn) else 0)

    def _may_overdraw(self, turn: _AccountTurn, beyond: int) -> bool:
        """Return whether *turn* may be served with *beyond* slots in use beyond the limit."""
        if self._is_urgent(turn):
            return beyond < self._overdraft
        # Its one high-priority call in the overdraft does not count, nor do those of all accounts, up to the half that is theirs.
        idle = turn.account.on_wire <= (turn.account in self._overdrawn)
        reserved = max(0, self._overdraft // 2 - len(self._overdrawn))
        return idle and beyond < self._overdraft - reserved

    def _is_urgent(self, turn: _AccountTurn) -> bool:
        return turn.rank == HIGH and turn.account not in self._overdrawn

    def _first_of(self, turn: _AccountTurn) -> WaitQueue | Attempt:
        """Return what is first of the account of *turn*, which may be served."""
        head, may_begin = self._loads[turn.account].head, self._may_begin(turn)
        if isinstance(head, Attempt) and (head.begun or may_begin):
            return head
        if turn.retries or (turn.fallbacks and may_begin):
            return (turn.retries or turn.fallbacks)[0]
        if head is not None and not isinstance(head, Attempt):
            return head
        return next(iter(turn.tenants.values()))[0]

    def _place_all(self, load: _Load) -> None:
        for turn in load.turns:
            if turn is not None:
                self._place(load, turn)

    def _place(self, load: _Load, turn: _AccountTurn) -> None:
        """Give *turn* the place in its priority that it is due now, or none; forget it if it is empty."""
        account, rank = turn.account, turn.rank
        priority = self._priorities[rank]
        if turn.empty:
            load.turns[rank] = None
            if not any(load.turns):
                del self._loads[account]
        if load.refused is not None or turn.empty or not (turn.retries or self._may_begin(turn)):
            if turn.entry is not None:
                turn.entry = None
                priority.servable -= 1
            return
        if turn.entry is not None and len(self._loads) == 1:
            return  # with one account there is nothing to compare with, and this is on every batch's path
        key = (rank == HIGH and account in self._overdrawn, account.on_wire, turn.since)
        if turn.entry is None:
            if not priority.servable:
                self._stride.enter(rank)
            priority.servable += 1
        elif turn.entry[:3] == key:
            return
        turn.entry = (*key, self._clock(), turn)
        priority.enter(turn.entry)
