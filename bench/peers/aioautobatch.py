"""aioautobatch: a wrapper whose call returns a future to await."""

from __future__ import annotations

from typing import Any

from aioautobatch import autobatch

from bench.peers import BatchFunction, Collector


class AutoBatch(Collector):
    name = "aioautobatch"
    distribution = "aioautobatch"

    def __init__(self, function: BatchFunction, size: int = 32, wait: float = 0.005) -> None:
        async def batch(calls):
            return await function([item for (item,) in calls])

        # The first batch waits for `start_delay`, those right behind it for `max_delay`: one window here.
        self._call = autobatch(batch, start_delay=wait, batch_size=size, max_delay=wait)

    async def submit(self, item: Any) -> Any:
        return await (await self._call(item))


class AutoBatchFutures(AutoBatch):
    """Its other form, for functions that fail items one by one."""

    def __init__(self, function: BatchFunction, size: int = 32, wait: float = 0.005) -> None:
        async def batch(calls, futures):
            results = await function([item for (item,) in calls])
            for future, result in zip(futures, results, strict=True):
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

        self._call = autobatch(batch, start_delay=wait, batch_size=size, max_delay=wait)


AutoBatch.failing_items = AutoBatchFutures

PEERS = (AutoBatch,)
