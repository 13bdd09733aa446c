"""Other collectors, used as their documentation says, with the interface of `Peer`; and a minimal collector, as one would write it by hand.

Settings are each library's defaults, except for the size of a batch and the time to wait; caches are off.
"""

# ruff: noqa: ARG002 - some collectors do not wait
from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

import dike
import strawberry.dataloader
from aioautobatch import autobatch
from aiodataloader import DataLoader
from aiomisc import aggregate, aggregate_async
from async_batcher.batcher import AsyncBatcher
from batched import aio

BatchFunction = Callable[[list[Any]], Awaitable[list[Any]]]
"""Takes the items of several callers, returns as many results in the same order."""

Pair = tuple[Any, asyncio.Future[Any]]


class Peer:
    """One collector over one batch function, for one event loop; made while that loop runs.

    Attributes:
        name: Its name in tables.
        distribution: Where its version is found; "" for what stands in this file.
        waits: Whether it holds the first item back for a time; otherwise until the loop's next turn or while a call is under way.
        closes: Whether it can be closed so that pending items are dealt with. Otherwise `stop` does nothing.
        sharing: The same library set to send equal items once, where it can.
        failing_items: The same library in the form in which a function may fail items one by one, where that is another form.
        one_call: The same library set to one call at a time, where that is a setting.
    """

    name: ClassVar[str]
    distribution: ClassVar[str] = ""
    waits: ClassVar[bool] = True
    closes: ClassVar[bool] = False
    sharing: ClassVar[type[Peer] | None] = None
    failing_items: ClassVar[type[Peer] | None] = None
    one_call: ClassVar[type[Peer] | None] = None
    submit: Callable[[Any], Awaitable[Any]]

    def __init__(self, function: BatchFunction, size: int = 32, wait: float = 0.005) -> None:
        raise NotImplementedError

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass


class AsyncBatcherOne(Peer):
    """async-batcher: a class to derive from; one batch at a time by default."""

    name = distribution = "async-batcher"
    closes = True
    concurrency: ClassVar[int] = 1

    def __init__(self, function: BatchFunction, size: int = 32, wait: float = 0.005) -> None:
        class Batcher(AsyncBatcher):
            async def process_batch(self, batch):
                return await function(batch)

        self._batcher = Batcher(max_batch_size=size, max_queue_time=wait, concurrency=self.concurrency)
        self.submit = self._batcher.process

    async def stop(self) -> None:
        await self._batcher.stop()  # takes up to a second: it looks at its flag when its wait for the queue times out


class AsyncBatcherMany(AsyncBatcherOne):
    name = "async-batcher (concurrency=-1)"
    concurrency = -1


class Batched(Peer):
    """batched: a decorator whose task looks at the queue every `timeout_ms`."""

    name, distribution = "batched.aio", "batched"

    def __init__(self, function: BatchFunction, size: int = 32, wait: float = 0.005) -> None:
        @aio.dynamically(batch_size=size, timeout_ms=wait * 1000)
        async def batch(items):
            return await function(items)

        self.submit = batch


class Aggregate(Peer):
    """aiomisc: a decorator; the first caller whose wait is over runs the batch in its own task."""

    name, distribution = "aiomisc.aggregate", "aiomisc"

    def __init__(self, function: BatchFunction, size: int = 32, wait: float = 0.005) -> None:
        @aggregate(leeway_ms=wait * 1000, max_count=size)
        async def batch(*items):
            return await function(list(items))

        self.submit = batch


class AggregateAsync(Aggregate):
    def __init__(self, function: BatchFunction, size: int = 32, wait: float = 0.005) -> None:
        @aggregate_async(leeway_ms=wait * 1000, max_count=size)
        async def batch(*arguments):
            results = await function([argument.value for argument in arguments])
            settle_each([argument.future for argument in arguments], results)

        self.submit = batch


class Dike(Peer):
    """dike: a decorator over functions of lists, which it concatenates and cuts up again."""

    name, distribution = "dike.batch", "dike"

    def __init__(self, function: BatchFunction, size: int = 32, wait: float = 0.005) -> None:
        @dike.batch(target_batch_size=size, max_waiting_time=wait)
        async def batch(items):
            return await function(items)

        self._batch = batch

    async def submit(self, item: Any) -> Any:
        return (await self._batch([item]))[0]


class AutoBatch(Peer):
    """aioautobatch: a wrapper whose call returns a future to await."""

    name = distribution = "aioautobatch"

    def __init__(self, function: BatchFunction, size: int = 32, wait: float = 0.005) -> None:
        async def batch(calls):
            return await function([item for (item,) in calls])

        # The first batch waits for `start_delay`, those right behind it for `max_delay`.
        self._call = autobatch(batch, start_delay=wait, batch_size=size, max_delay=wait)

    async def submit(self, item: Any) -> Any:
        return await (await self._call(item))


class AutoBatchFutures(AutoBatch):
    def __init__(self, function: BatchFunction, size: int = 32, wait: float = 0.005) -> None:
        async def batch(calls, futures):
            settle_each(futures, await function([item for (item,) in calls]))

        self._call = autobatch(batch, start_delay=wait, batch_size=size, max_delay=wait)


class AioDataLoader(Peer):
    """aiodataloader: Facebook's DataLoader for asyncio; collects for one turn of the loop."""

    name = distribution = "aiodataloader"
    waits = False
    cache: ClassVar[bool] = False

    def __init__(self, function: BatchFunction, size: int = 32, wait: float = 0.005) -> None:
        async def batch(keys):
            return await function(keys)

        self._load = self.loader(batch, size)

    def loader(self, batch: BatchFunction, size: int) -> Any:
        return DataLoader(batch, max_batch_size=size, cache=self.cache).load

    async def submit(self, item: Any) -> Any:
        return await self._load(item)


class Strawberry(AioDataLoader):
    """Strawberry's DataLoader; collects for one turn of the loop."""

    name, distribution = "strawberry.DataLoader", "strawberry-graphql"

    def loader(self, batch: BatchFunction, size: int) -> Any:
        return strawberry.dataloader.DataLoader(load_fn=batch, max_batch_size=size, cache=self.cache).load


Aggregate.failing_items = AggregateAsync
AutoBatch.failing_items = AutoBatchFutures
# Their only way to send equal items once is the cache.
AioDataLoader.sharing = type("AioDataLoaderCaching", (AioDataLoader,), {"cache": True})
Strawberry.sharing = type("StrawberryCaching", (Strawberry,), {"cache": True})


class Minimal(Peer):
    """A list, a timer and a task for each batch: the least that size and time as triggers take."""

    name = "minimal"
    closes = True

    def __init__(self, function: BatchFunction, size: int = 32, wait: float = 0.005) -> None:
        self._function = function
        self._size = size
        self._wait = wait
        self._batch: list[Pair] = []
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

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


async def settle(function: BatchFunction, batch: list[Pair]) -> None:
    """Give each in *batch* the result at their place, or the error of all."""
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


def settle_each(futures: list[asyncio.Future[Any]], results: list[Any]) -> None:
    for future, result in zip(futures, results, strict=True):
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (AsyncBatcherOne, AsyncBatcherMany, Batched, Aggregate, Dike, AutoBatch, AioDataLoader, Strawberry)
}
DISTRIBUTIONS = list(dict.fromkeys(peer.distribution for peer in PEERS.values()))
