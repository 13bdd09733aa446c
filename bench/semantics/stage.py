"""Where a probe takes place: an event loop of its own, callers in tasks of their own, and a limit to every wait."""

from __future__ import annotations

import asyncio
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.semantics.backend import CALLER, answer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.peers import Peer
    from bench.semantics.backend import Backend


SIZE = 32
WAIT = 0.02
"""Seconds for which windowed libraries wait for company."""

SWEEP = 0.5
"""Seconds that what a library left behind gets to end after it was cancelled."""


_FOLDERS = re.compile(r"(?:/[\w.-]+)+/")


class End(NamedTuple):
    """How it ended for one caller.

    Attributes:
        how: "answered", "wrong answer", "error", "cancelled" or "hang".
        value: The answer or the error.
    """

    how: str
    value: Any = None

    def __str__(self) -> str:
        if self.how not in ("error", "wrong answer"):
            return self.how
        # asyncio tells in which file a task was; reports are for other machines too.
        return f"{self.how}: {_FOLDERS.sub('', repr(self.value))}"[:120]


class Stage:
    """One library, for one probe.

    Args:
        kind: The library's adapter.
        limit: Seconds after which a caller that is still waiting is said to hang; windows and calls take a twentieth of it or less.
        strays: Takes what the loops complain of: exceptions that nobody retrieved, callbacks that raised.
    """

    def __init__(self, kind: type[Peer], limit: float, strays: list[str]) -> None:
        self.kind = kind
        self.limit = limit
        self._strays = strays

    @contextmanager
    def loop(self) -> Iterator[asyncio.Runner]:
        """Return a runner with a loop of its own; what is left in it is cancelled in the end."""
        with asyncio.Runner() as runner:
            runner.get_loop().set_exception_handler(lambda _, context: self._strays.append(context["message"]))
            try:
                yield runner
            finally:
                runner.run(sweep())

    async def open(self, backend: Backend, *, variant: str | None = None, wait: float = WAIT) -> Peer:
        """Return the library over *backend*, started; in a variant of its adapter (see `bench.peers.Collector`) if it has that."""
        kind = (variant and getattr(self.kind, variant, None)) or self.kind
        peer = kind(backend.take, SIZE, wait)
        await peer.start()
        return peer

    def ask(self, peer: Peer, *items: str) -> list[asyncio.Task[Any]]:
        """Let a caller ask for each of *items*, each in a task and a context of its own."""
        loop = asyncio.get_running_loop()
        return [loop.create_task(call(peer, item)) for item in items]

    async def ends(
        self, tasks: Sequence[asyncio.Task[Any]], items: Sequence[str], limit: float | None = None
    ) -> list[End]:
        """Wait for *tasks*, which asked for *items*, and tell how each ended; those that hang are cancelled."""
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
        """Ask for *items* and tell how it ended for each."""
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
    """Cancel whatever else is in the loop."""
    if left := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=SWEEP)
