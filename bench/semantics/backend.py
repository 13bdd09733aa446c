"""The batch function under the probes: it answers every item by name, keeps a record, and may misbehave once."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

NOBODY = "nobody"
CALLER: ContextVar[str] = ContextVar("caller", default=NOBODY)
"""Who is asking; a batch serves several and should see none of them."""

WORK = 0.02
"""Seconds that a call takes: long enough to cancel somebody meanwhile."""

_PREFIX = "answer to "


def answer(item: str) -> str:
    return _PREFIX + item


def answered(result: str) -> str:
    """Return the item that *result* is the answer to."""
    return result.removeprefix(_PREFIX)


class Backend:
    """Takes batches.

    Args:
        first: Makes what the first call returns from its items, or raises; None answers them properly, as every later call does.
        work: Seconds that a call takes.

    Attributes:
        calls: The items of each call.
        callers: `CALLER` as each call saw it.
        tasks: In which each call ran.
        started: Set once a call has begun.
        ended: Set once a call has ended, however.
        cancelled: Calls that were cancelled.
    """

    def __init__(self, first: Callable[[list[str]], list[Any]] | None = None, work: float = WORK) -> None:
        self.calls: list[list[str]] = []
        self.callers: list[str] = []
        self.tasks: list[asyncio.Task[Any] | None] = []
        self.started = asyncio.Event()
        self.ended = asyncio.Event()
        self.cancelled = 0
        self._first = first
        self._work = work

    async def take(self, items: list[str]) -> list[Any]:
        self.calls.append(list(items))
        self.callers.append(CALLER.get())
        self.tasks.append(asyncio.current_task())
        self.started.set()
        try:
            await asyncio.sleep(self._work)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.ended.set()
        first, self._first = self._first, None
        return [answer(item) for item in items] if first is None else first(items)

    @property
    def asked(self) -> list[str]:
        """All items of all calls."""
        return [item for call in self.calls for item in call]
