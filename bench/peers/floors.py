"""What is reachable: collectors that do nothing but collect. The bare floor, a future for each caller, needs no collector."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.peers import BatchFunction


class Queue:
    """A queue and one task that takes from it whatever is there; one batch at a time."""

    name = "floor-queue"
    distribution = ""
    windowed = False
    closes = True

    def __init__(self, function: BatchFunction, size: int = 32, wait: float = 0.005) -> None:  # noqa: ARG002, it does not wait
        self._function = function
        self._size = size
        self._queue: asyncio.Queue[tuple[Any, asyncio.Future]] = asyncio.Queue()

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._work())

    async def submit(self, item: Any) -> Any:
        future = self._loop.create_future()
        self._queue.put_nowait((item, future))
        return await future

    async def _work(self) -> None:
        queue = self._queue
        while True:
            batch = [await queue.get()]
            while len(batch) < self._size and not queue.empty():
                batch.append(queue.get_nowait())
            await settle(self._function, batch)
            for _ in batch:
                queue.task_done()

    async def stop(self) -> None:
        await self._queue.join()
        self._task.cancel()


class Minimal:
    """A list, a timer and a task for each batch: what is reachable with triggers of size and time."""

    name = "minimal"
    distribution = ""
    windowed = True
    closes = True

    def __init__(self, function: BatchFunction, size: int = 32, wait: float = 0.005) -> None:
        self._function = function
        self._size = size
        self._wait = wait
        self._batch: list[tuple[Any, asyncio.Future]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task] = set()

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()

    async def submit(self, item: Any) -> Any:
        future = self._loop.create_future()
        self._batch.append((item, future))
        if len(self._batch) >= self._size:
            self._flush()
        elif self._timer is None:
            self._timer = self._loop.call_later(self._wait, self._flush)
        return await future

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch, self._batch = self._batch, []
        task = self._loop.create_task(settle(self._function, batch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        if self._batch:
            self._flush()
        if self._tasks:
            await asyncio.wait(self._tasks)


async def settle(function: BatchFunction, batch: list[tuple[Any, asyncio.Future]]) -> None:
    """Give everyone in *batch* the result of their place, or the error of all."""
    try:
        results = await function([item for item, _ in batch])
        if len(results) != len(batch):
            raise ValueError(f"{len(results)} results for {len(batch)} items")  # noqa: TRY301
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)
    except Exception as error:  # noqa: BLE001, whatever it is, callers must not hang
        for _, future in batch:
            if not future.done():
                future.set_exception(error)


FLOORS = {floor.name: floor for floor in (Queue, Minimal)}
