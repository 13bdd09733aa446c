"""Whose turn it is: the queues that are due, in an order that is fair and starves nobody.

Priorities share by weight, 16 : 4 : 1, as long as all have something due (stride scheduling, Waldspurger 1995: each turn moves a
priority on by 1/weight, and the one furthest behind is next; one that comes back after a rest starts level with the others).
Within a priority accounts take turns, within an account tenants, within a tenant queues. Pure bookkeeping.

An account that has no permit to give is *blocked*: its queues are left out until it is ready again, so that it holds up nobody
else. The queue that was refused is its *head* and goes first then, so that a small request never overtakes a large one.
"""

from __future__ import annotations

from collections import deque
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


class _Priority(Generic[Q]):
    """The queues of one priority that are due: by account, by tenant, in order. Dicts serve as rings: the first is next."""

    __slots__ = ("accounts", "moved", "step")

    def __init__(self, weight: int) -> None:
        self.accounts: dict[Account, dict[Hashable, deque[Q]]] = {}
        self.moved = 0.0
        self.step = 1 / weight


class Turns(Generic[Q]):
    """The queues that are due."""

    def __init__(self) -> None:
        self._priorities: tuple[_Priority[Q], ...] = tuple(map(_Priority[Q], WEIGHTS))
        self._blocked: dict[Account, list[dict[Hashable, deque[Q]]]] = {}
        self._heads: dict[Account, Q] = {}
        self._level = 0.0  # how far the priority of the latest turn had moved

    def add(self, queue: Q) -> None:
        """Put *queue* last in its place."""
        blocked = self._blocked.get(queue.account)
        if blocked is not None:
            tenants = blocked[queue.rank]
        else:
            priority = self._priorities[queue.rank]
            if not priority.accounts:
                priority.moved = max(priority.moved, self._level)
            tenants = priority.accounts.setdefault(queue.account, {})
        tenants.setdefault(queue.tenant, deque()).append(queue)

    def next(self) -> Q | None:
        """Return the queue whose turn it is, which stays where it is; None if none is due, or all that are, are blocked."""
        first: _Priority[Q] | None = None
        for priority in self._priorities:
            if priority.accounts and (first is None or priority.moved < first.moved):
                first = priority
        if first is None:
            return None
        account = next(iter(first.accounts))
        head = self._heads.get(account)
        if head is not None:
            return head
        return next(iter(first.accounts[account].values()))[0]

    def served(self, queue: Q) -> None:
        """*queue* has had its turn: it goes, and so do the turns of its tenant, account and priority. To stay it is added anew."""
        priority = self._priorities[queue.rank]
        self._level = priority.moved
        priority.moved += priority.step
        self.remove(queue)
        tenants = priority.accounts.pop(queue.account, None)
        if tenants is not None:
            priority.accounts[queue.account] = tenants
            rest = tenants.pop(queue.tenant, None)
            if rest is not None:
                tenants[queue.tenant] = rest

    def remove(self, queue: Q) -> None:
        """*queue* is due no longer; nobody's turn is used up."""
        if self._heads.get(queue.account) is queue:
            del self._heads[queue.account]
        accounts = self._priorities[queue.rank].accounts
        tenants = accounts[queue.account]
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
        self._blocked[account] = [priority.accounts.pop(account, {}) for priority in self._priorities]

    def unblock(self, account: Account) -> bool:
        """*account* may have a permit again. Return whether anything of it is due."""
        blocked = self._blocked.pop(account, [])
        for priority, tenants in zip(self._priorities, blocked, strict=False):
            if tenants:
                if not priority.accounts:
                    priority.moved = max(priority.moved, self._level)
                priority.accounts[account] = tenants
        return any(blocked)
