"""Makes one round trip of what is asked in the same turn of the event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import anyio

from microbatch.errors import MicrobatchError, StorageError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

A = TypeVar("A")
R = TypeVar("R")


class RoundTrips(Generic[A, R]):
    """Collects what callers ask and asks it together.

    The trips run in a task of the batcher's own: a caller that is cancelled takes no trip with it, and none of its context
    variables travels along.

    Args:
        work: Asks several things at once; returns as many results, in the same order.
        in_turn: Whether a trip waits for the one before, so that all that is asked meanwhile shares the next one. That is how many
            share one commit to a disk.
    """

    def __init__(self, work: Callable[[list[A]], Awaitable[Sequence[R]]], *, in_turn: bool = False) -> None:
        self._work = work
        self._in_turn = in_turn
        self._waiting: list[tuple[A, asyncio.Future[R]]] = []
        self._asked: asyncio.Event | None = None

    def ask(self, what: A) -> asyncio.Future[R]:
        """Return a future of the result for *what*. It fails with what the trip fails with, `StorageError` when serving has ended."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        if self._asked is None:
            future.set_exception(StorageError("the batcher is not open"))
        else:
            self._waiting.append((what, future))
            self._asked.set()
        return future

    def ask_for_nobody(self, what: A) -> None:
        """Make a trip for its effects; nobody waits for the result or an error."""
        self.ask(what).add_done_callback(_retrieve)

    async def serve(self) -> None:
        """Make the trips, until cancelled."""
        self._asked = asyncio.Event()
        try:
            async with anyio.create_task_group() as tasks:
                while True:
                    await self._asked.wait()
                    self._asked.clear()
                    trip, self._waiting = self._waiting, []
                    if self._in_turn:
                        await self._go(trip)
                    else:
                        tasks.start_soon(self._go, trip)
        finally:
            self._asked = None
            _fail(self._waiting, StorageError("the batcher has closed"))

    async def _go(self, trip: list[tuple[A, asyncio.Future[R]]]) -> None:
        try:
            results = await self._work([what for what, _ in trip])
        except asyncio.CancelledError:
            _fail(trip, StorageError("the batcher has closed"))
            raise
        except Exception as error:  # noqa: BLE001 whoever asked is told, and the other trips go on
            _fail(trip, error)
        else:
            for (_, future), result in zip(trip, results, strict=True):
                if not future.done():
                    future.set_result(result)


def _retrieve(future: asyncio.Future[Any]) -> None:
    """See that asyncio does not complain of an error that nobody waits for."""
    if not future.cancelled():
        future.exception()


def _fail(trip: list[tuple[A, asyncio.Future[R]]], error: Exception) -> None:
    for _, future in trip:
        if not future.done():
            # One exception object per caller: notes and tracebacks stay apart.
            future.set_exception(error.replica() if isinstance(error, MicrobatchError) else StorageError(str(error)))
