"""The scene of a probe: a batch function that answers by name, an event loop, callers in tasks, a limit on every wait, and a verdict."""

from __future__ import annotations

import asyncio
import re
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.peers import Peer

NO_CALLER = "no caller"
CALLER: ContextVar[str] = ContextVar("caller", default=NO_CALLER)
"""The caller in whose context code runs; a batch serves several and should see none of them."""

SIZE = 32
WAIT = 0.02
"""Seconds for which libraries hold the first item back."""

WORK = 0.02
"""Seconds that a call takes: long enough to cancel a caller meanwhile."""

SWEEP = 0.5
"""Seconds that leftover tasks of a library get to end after they were cancelled."""

RIGHT: Final = "right"
ARGUABLE: Final = "arguable"
WRONG: Final = "wrong"
HANG: Final = "hang"

MARKS: Final = {RIGHT: "✓", ARGUABLE: "~", WRONG: "✗", HANG: "✗✗"}
"""From best to worst, with their signs in tables."""

_PREFIX = "answer to "
_FOLDERS = re.compile(r"(?:/[\w.-]+)+/")


class Verdict(NamedTuple):
    """The outcome of a probe: one of `MARKS`, a word for the table, the fate of each caller, and how many got another one's answer."""

    mark: str
    word: str
    detail: str = ""
    misled: int = 0


def answer(item: str) -> str:
    return _PREFIX + item


def answered(result: str) -> str:
    """Return the item that *result* is the answer to."""
    return result.removeprefix(_PREFIX)


class Backend:
    """The batch function, with a record of its calls: their items, `CALLER` and tasks, and how many were cancelled.

    Args:
        first: Makes the results of the first call from its items, or raises; None answers them properly, as every later call does.
        work: Seconds that a call takes.
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


class End(NamedTuple):
    """The end of one caller: "answered", "wrong answer", "error", "cancelled" or "hang", with the answer or the error."""

    how: str
    value: Any = None

    def __str__(self) -> str:
        if self.how not in ("error", "wrong answer"):
            return self.how
        # asyncio names the file of a task; reports are for other machines too.
        return f"{self.how}: {_FOLDERS.sub('', repr(self.value))}"[:120]


class Stage:
    """One library, for one probe.

    Args:
        kind: The library's adapter.
        limit: Seconds after which a caller that is still waiting is said to hang.
        strays: Receives the complaints of the loops: exceptions that were never retrieved, callbacks that raised.
    """

    def __init__(self, kind: type[Peer], limit: float, strays: list[str]) -> None:
        self.kind = kind
        self.limit = limit
        self._strays = strays

    @contextmanager
    def loop(self) -> Iterator[asyncio.Runner]:
        """Yield a runner with a loop of its own; leftover tasks are cancelled in the end."""
        with asyncio.Runner() as runner:
            runner.get_loop().set_exception_handler(lambda _, context: self._strays.append(context["message"]))
            try:
                yield runner
            finally:
                runner.run(sweep())

    async def open(self, backend: Backend, *, variant: str | None = None, wait: float = WAIT) -> Peer:
        """Return the library over *backend*, started; in a variant of its adapter (see `bench.peers.Peer`) if it has that."""
        kind = (variant and getattr(self.kind, variant, None)) or self.kind
        peer = kind(backend.take, SIZE, wait)
        await peer.start()
        return peer

    def ask(self, peer: Peer, *items: str) -> list[asyncio.Task[Any]]:
        """Start a caller for each of *items*, each in a task and a context of its own."""
        loop = asyncio.get_running_loop()
        return [loop.create_task(call(peer, item)) for item in items]

    async def ends(
        self, tasks: Sequence[asyncio.Task[Any]], items: Sequence[str], limit: float | None = None
    ) -> list[End]:
        """Wait for *tasks*, which asked for *items*, and return how each ended; those that hang are cancelled."""
        await asyncio.wait(tasks, timeout=self.limit if limit is None else limit)
        ends = [end(task, item) for task, item in zip(tasks, items, strict=True)]
        if hanging := [task for task in tasks if not task.done()]:
            for task in hanging:
                task.cancel()
            await asyncio.wait(hanging, timeout=SWEEP)
            for task in hanging:
                end(task, "")  # retrieves what it may have raised on the way out
        return ends

    async def asks(self, peer: Peer, *items: str) -> list[End]:
        """Ask for *items* and return how each ended."""
        return await self.ends(self.ask(peer, *items), items)


async def call(peer: Peer, item: str) -> Any:
    CALLER.set(item)
    return await peer.submit(item)


def end(task: asyncio.Task[Any], item: str) -> End:
    if not task.done():
        return End("hang")
    if task.cancelled():
        return End("cancelled")
    if (error := task.exception()) is not None:
        return End("error", error)
    result = task.result()
    return End("answered" if result == answer(item) else "wrong answer", result)


async def sweep() -> None:
    """Cancel all other tasks of the loop."""
    if left := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=SWEEP)
