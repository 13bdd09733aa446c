"""Whose turn it is: the queues that are due, in an order that is fair and starves nobody.

Priorities share by weight, 16 : 4 : 1, as long as all have something due (stride scheduling, Waldspurger 1995: each turn moves a
priority on by 1/weight, and the one furthest behind is next; one that comes back after a rest starts level with the others).
Within a priority accounts take turns, the one that was served longest ago first, within an account tenants, within a tenant queues.
Pure bookkeeping.

An account that has no permit to give is *blocked*: its queues are left out until it is ready again, so that it holds up nobody
else. The queue that was refused is its *head* and goes first then, so that a small request never overtakes a large one.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable

    from microbatch.batching.account import Account

WEIGHTS: Final = (16, 4, 1)
"""Turns of the priorities high, normal and low, while all have something due."""


class Due(Protocol):
    """What takes turns."""

    @property
    def account(self) -> Account:
        """Whose permits it needs."""
        ...

    @property
    def tenant(self) -> Hashable:
        """Whose requests it holds."""
        ...

    @property
    def rank(self) -> int:
        """Its priority, an index into `WEIGHTS`."""
        ...


Q = TypeVar("Q", bound=Due)


class _Share(Generic[Q]):
    """The queues of one priority and account: by tenant, in order. The dict serves as a ring: the first is next."""

    __slots__ = ("account", "listed", "tenants", "turn")

    def __init__(self, account: Account, turn: int) -> None:
        self.account = account
        self.tenants: dict[Hashable, deque[Q]] = {}
        self.turn = turn  # when it was served last, or came
        self.listed = False

    def __lt__(self, other: _Share[Q]) -> bool:
        return self.turn < other.turn


class _Priority(Generic[Q]):
    """The queues of one priority that are due and not blocked."""

    __slots__ = ("accounts", "list", "moved", "step")

    def __init__(self, weight: int) -> None:
        self.accounts: dict[Account, _Share[Q]] = {}
        # The same as a heap, so that an account that is blocked now and then does not lose its place. What is blocked or empty
        # stays in it until it comes up.
        self.list: list[_Share[Q]] = []
        self.moved = 0.0
        self.step = 1 / weight

    def enter(self, share: _Share[Q], level: float) -> None:
        """Let *share* take turns; after a rest this priority is level with the others."""
        if not self.accounts:
            self.moved = max(self.moved, level)
        self.accounts[share.account] = share
        if not share.listed:
            share.listed = True
            heappush(self.list, share)

    @property
    def first(self) -> _Share[Q]:
        """Whose turn it is. There must be somebody."""
        waiting = self.list
        while self.accounts.get(waiting[0].account) is not waiting[0]:
            heappop(waiting).listed = False
        return waiting[0]


class Turns(Generic[Q]):
    """The queues that are due."""

    def __init__(self) -> None:
        self._priorities: tuple[_Priority[Q], ...] = tuple(map(_Priority[Q], WEIGHTS))
        self._blocked: dict[Account, list[_Share[Q] | None]] = {}
        self._heads: dict[Account, Q] = {}
        self._turn = count().__next__
        self._level = 0.0  # how far the priority of the latest turn had moved

    def add(self, queue: Q) -> None:
        """Put *queue* last in its place."""
        account, rank = queue.account, queue.rank
        blocked = self._blocked.get(account)
        share = self._priorities[rank].accounts.get(account) if blocked is None else blocked[rank]
        if share is None:
            share = _Share(account, self._turn())
            if blocked is None:
                self._priorities[rank].enter(share, self._level)
            else:
                blocked[rank] = share
        share.tenants.setdefault(queue.tenant, deque()).append(queue)

    def next(self) -> Q | None:
        """Return the queue whose turn it is, which stays where it is; None if none is due, or all that are, are blocked."""
        first: _Priority[Q] | None = None
        for priority in self._priorities:
            if priority.accounts and (first is None or priority.moved < first.moved):
                first = priority
        if first is None:
            return None
        share = first.first
        head = self._heads.get(share.account)
        if head is not None:
            return head
        return next(iter(share.tenants.values()))[0]

    def served(self, queue: Q, *, stays: bool) -> None:
        """*queue* has had its turn, and so have its tenant, its account and its priority; it *stays* for another or goes."""
        priority = self._priorities[queue.rank]
        self._level = priority.moved
        priority.moved += priority.step
        if stays and not self._heads:
            share = priority.accounts[queue.account]
            if len(priority.accounts) == len(share.tenants) == len(share.tenants[queue.tenant]) == 1:
                return  # nobody else to let pass: the usual case of a busy service, and on every batch's path
        self.remove(queue)
        self._pass_on(priority, queue)
        if stays:
            self.add(queue)

    def _pass_on(self, priority: _Priority[Q], queue: Q) -> None:
        """Put the account and the tenant of *queue* last, if they have anything else due."""
        share = priority.accounts.pop(queue.account, None)
        if share is None:
            return
        rest = share.tenants.pop(queue.tenant, None)
        if rest is not None:
            share.tenants[queue.tenant] = rest
        # A new one, because the old one may be anywhere in the heap.
        later: _Share[Q] = _Share(queue.account, self._turn())
        later.tenants = share.tenants
        priority.enter(later, self._level)

    def remove(self, queue: Q) -> None:
        """*queue* is due no longer; nobody's turn is used up."""
        if self._heads.get(queue.account) is queue:
            del self._heads[queue.account]
        accounts = self._priorities[queue.rank].accounts
        tenants = accounts[queue.account].tenants
        queues = tenants[queue.tenant]
        queues.remove(queue)  # mostly the first
        if not queues:
            del tenants[queue.tenant]
            if not tenants:
                del accounts[queue.account]

    def block(self, queue: Q) -> None:
        """The account of *queue* has no permit for it now."""
        account = queue.account
        self._heads[account] = queue
        self._blocked[account] = [priority.accounts.pop(account, None) for priority in self._priorities]

    def unblock(self, account: Account) -> bool:
        """*account* may have a permit again. Return whether anything of it is due."""
        blocked = self._blocked.pop(account, [])
        for priority, share in zip(self._priorities, blocked, strict=False):
            if share is not None:
                priority.enter(share, self._level)
        return any(blocked)
