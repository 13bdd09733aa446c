"""An event loop that runs what is ready in an order drawn from a seed, on virtual time and without a selector."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from typing import TYPE_CHECKING

from anyio._backends import _asyncio as anyio_asyncio

from microbatch.testing import VirtualClockLoop

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

MAX_TURNS = 50_000
"""Turns after which a scenario counts as going round in circles; the longest sound one takes a tenth of that."""

MAX_SECONDS = 4_000.0
"""Virtual seconds after which it counts as never ending."""


class Stuck(RuntimeError):
    """Nothing can happen any more although tasks wait, or things happen for ever."""


class NumberedTask(asyncio.Task):
    """A task whose hash is its number, so that sets of tasks are walked in the same order in every run."""

    def __init__(self, coro, *, number, **options):
        self.number = number
        super().__init__(coro, **options)

    def __hash__(self):
        return self.number


class ShuffledLoop(VirtualClockLoop):
    """Runs what is ready in a turn, timers that fall due at the same instant included, in an order drawn from `order`.

    The order is one that asyncio allows or that a slightly different timing of the outside would have brought about: callbacks
    of one task, of one future, and of one object keep theirs, and nothing is held back beyond its turn.

    Args:
        order: Draws the order; None keeps asyncio's own.
        share: The share of turns that are shuffled.
    """

    def __init__(self, order: Random | None, share: float = 1.0) -> None:
        super().__init__()
        self.turns = 0
        self.limited = True
        self.complaints: list[str] = []
        self._order = order
        self._share = share
        self._numbers = itertools.count(1)
        self.set_task_factory(self._make_task)
        self.set_exception_handler(self._complain)

    def _make_task(self, loop, coro, **options):
        return NumberedTask(coro, loop=loop, number=next(self._numbers), **options)

    def _complain(self, loop, context) -> None:
        # A reference to the exception would keep the whole scenario alive.
        self.complaints.append(f"{context['message']}: {context.get('exception')!r}")

    def _run_once(self) -> None:
        """One turn. Nothing here waits for the outside, so asking a selector would only cost time."""
        self.turns += 1
        ready, timers = self._ready, self._scheduled
        while timers and timers[0]._cancelled:
            self._drop_timer()
        if not ready and not self._stopping:
            if not timers:
                raise Stuck("every task waits and no timer is pending")
            self.advance(max(0.0, timers[0]._when - self.time()))
        if self.limited and (self.turns > MAX_TURNS or self.time() > MAX_SECONDS):
            raise Stuck(f"no end after {self.turns} turns and {self.time()} s")
        now = self.time()
        while timers and timers[0]._when <= now:
            handle = self._drop_timer()
            if not handle._cancelled:
                ready.append(handle)
        if self._order is not None and len(ready) > 1 and self._order.random() < self._share:
            self._shuffle()
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()

    def _drop_timer(self) -> asyncio.TimerHandle:
        handle = heapq.heappop(self._scheduled)
        handle._scheduled = False
        if handle._cancelled:
            self._timer_cancelled_count -= 1
        return handle

    def _shuffle(self) -> None:
        ready = self._ready
        queues: dict[int, deque[asyncio.Handle]] = {}
        turns: list[int] = []
        for handle in ready:
            owner = _owner(handle)
            queues.setdefault(owner, deque()).append(handle)
            turns.append(owner)
        self._order.shuffle(turns)
        ready.clear()
        ready.extend(queues[owner].popleft() for owner in turns)


def _owner(handle: asyncio.Handle) -> int:
    """Return whose callback *handle* is: those of one owner keep their order."""
    owner = getattr(handle._callback, "__self__", None)
    if not isinstance(owner, asyncio.Task) and handle._args and isinstance(handle._args[0], asyncio.Future):
        owner = handle._args[0]
    return id(handle if owner is None else owner)


class Steady:
    """Takes the remaining chance out of the library for a while: anyio's sets of scopes, which are walked by address.

    Used as a context manager around each scenario.
    """

    def __enter__(self) -> None:
        numbers = itertools.count(1)
        by_address: dict[int, int] = {}

        def new(cls, *_, **__):
            scope = object.__new__(cls)
            by_address[id(scope)] = next(numbers)
            return scope

        self._undo = list(
            _patches(
                (anyio_asyncio.CancelScope, "__new__", new),
                (anyio_asyncio.CancelScope, "__hash__", lambda scope: by_address.get(id(scope), 0)),
            )
        )

    def __exit__(self, *_) -> None:
        for owner, name, old in reversed(self._undo):
            if old is None:
                delattr(owner, name)
            else:
                setattr(owner, name, old)


def _patches(*patches) -> Iterator[tuple[object, str, object]]:
    for owner, name, new in patches:
        yield owner, name, vars(owner).get(name)
        setattr(owner, name, new)
