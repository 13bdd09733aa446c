"""Coalesces requests made in the same turn of the event loop into one round trip."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import anyio

from microbatch.errors import MicrobatchError, StorageError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

A = TypeVar("A")
R = TypeVar("R")


class Coalescer(Generic[A, R]):
    """Collects items from callers and processes them together.

    Trips run in tasks of the batcher: cancelling a caller does not cancel a trip, and no caller's context variables reach it.

    Args:
        work: Processes several items; returns as many results, in the same order.
        max_items: Most items in one trip.
        max_trips: Most trips under way at a time. Items submitted meanwhile share the next one: with 1, many share one commit.
        lasting: Whether `serve`, when cancelled, waits for trips under way; otherwise they are cancelled.
    """

    def __init__(
        self,
        work: Callable[[list[A]], Awaitable[Sequence[R]]],
        *,
        max_items: int | None = None,
        max_trips: int = sys.maxsize,
        lasting: bool = False,
    ) -> None:
        self._work = work
        self._max_items = max_items
        self._max_trips = max_trips
        self._lasting = lasting
        self._waiting: list[tuple[A, asyncio.Future[R]]] = []
        self._submitted: asyncio.Event | None = None

    def submit(self, item: A) -> asyncio.Future[R]:
        """Return a future of the result for *item*; it fails as its trip does, or with `StorageError` if `serve` is not running."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        if self._submitted is None:
            future.set_exception(StorageError("the batcher is not open"))
        else:
            self._waiting.append((item, future))
            self._submitted.set()
        return future

    def submit_detached(self, item: A) -> asyncio.Future[R]:
        """Return a future of the result for *item* whose error need not be retrieved."""
        future = self.submit(item)
        future.add_done_callback(_retrieve)
        return future

    async def serve(self) -> None:
        """Make trips until cancelled."""
        self._submitted = asyncio.Event()
        free = asyncio.Semaphore(self._max_trips)
        try:
            async with anyio.create_task_group() as tasks:
                while True:
                    await self._submitted.wait()
                    await free.acquire()
                    trip = self._waiting[: self._max_items]
                    del self._waiting[: len(trip)]
                    if not self._waiting:
                        self._submitted.clear()
                    tasks.start_soon(self._run, trip, free)
        finally:
            self._submitted = None
            _fail(self._waiting, StorageError("the batcher has closed"))

    async def _run(self, trip: list[tuple[A, asyncio.Future[R]]], free: asyncio.Semaphore) -> None:
        try:
            with anyio.CancelScope(shield=self._lasting):
                results = await self._work([item for item, _ in trip])
        except asyncio.CancelledError:
            _fail(trip, StorageError("the batcher has closed"))
            raise
        except Exception as error:  # noqa: BLE001 raised in the callers; other trips continue
            _fail(trip, error)
        else:
            for (_, future), result in zip(trip, results, strict=True):
                if not future.done():
                    future.set_result(result)
        finally:
            free.release()


def _retrieve(future: asyncio.Future[Any]) -> None:
    # Otherwise asyncio would log an unretrieved error.
    if not future.cancelled():
        future.exception()


def _fail(trip: list[tuple[A, asyncio.Future[R]]], error: Exception) -> None:
    for _, future in trip:
        if not future.done():
            # One exception object per caller: notes and tracebacks stay apart.
            future.set_exception(error.replica() if isinstance(error, MicrobatchError) else StorageError(str(error)))
            _retrieve(future)  # its caller may have been cancelled
