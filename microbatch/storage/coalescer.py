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


class Coalescer(Generic[A, R]):
    """Collects what callers ask and asks it together.

    The trips run in a task of the batcher's own: a caller that is cancelled takes no trip with it, and none of its context
    variables travels along.

    Args:
        work: Asks several things at once; returns as many results, in the same order.
        most: Most things in one trip, or None for any number.
        at_once: Most trips under way at the same time, or None for any number. What is asked meanwhile shares the next one: with 1,
            many share one commit to a disk.
        lasting: Whether trips go on when serving ends, and `serve` returns after them; else they are cancelled.
    """

    def __init__(
        self,
        work: Callable[[list[A]], Awaitable[Sequence[R]]],
        *,
        most: int | None = None,
        at_once: int | None = None,
        lasting: bool = False,
    ) -> None:
        self._work = work
        self._most = most
        self._at_once = at_once
        self._lasting = lasting
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

    def ask_for_nobody(self, what: A) -> asyncio.Future[R]:
        """Make a trip for its effects, and return a future of its end. Its error need not be retrieved."""
        future = self.ask(what)
        future.add_done_callback(_retrieve)
        return future

    async def serve(self) -> None:
        """Make the trips, until cancelled."""
        self._asked = asyncio.Event()
        places = None if self._at_once is None else asyncio.Semaphore(self._at_once)
        try:
            async with anyio.create_task_group() as tasks:
                while True:
                    await self._asked.wait()
                    if places is not None:
                        await places.acquire()
                    trip = self._waiting[: self._most]
                    del self._waiting[: len(trip)]
                    if not self._waiting:
                        self._asked.clear()
                    tasks.start_soon(self._go, trip, places)
        finally:
            self._asked = None
            _fail(self._waiting, StorageError("the batcher has closed"))

    async def _go(self, trip: list[tuple[A, asyncio.Future[R]]], places: asyncio.Semaphore | None) -> None:
        try:
            with anyio.CancelScope(shield=self._lasting):
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
        finally:
            if places is not None:
                places.release()


def _retrieve(future: asyncio.Future[Any]) -> None:
    """See that asyncio does not complain of an error that nobody waits for."""
    if not future.cancelled():
        future.exception()


def _fail(trip: list[tuple[A, asyncio.Future[R]]], error: Exception) -> None:
    for _, future in trip:
        if not future.done():
            # One exception object per caller: notes and tracebacks stay apart.
            future.set_exception(error.replica() if isinstance(error, MicrobatchError) else StorageError(str(error)))
