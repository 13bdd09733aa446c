"""async-batcher: a class to derive from; one batch at a time by default, any number with `concurrency=-1`."""

from __future__ import annotations

from typing import ClassVar

from async_batcher.batcher import AsyncBatcher

from bench.peers import BatchFunction, Collector


class OneAtATime(Collector):
    name = "async-batcher"
    distribution = "async-batcher"
    closes = True
    concurrency: ClassVar[int] = 1

    def __init__(self, function: BatchFunction, size: int = 32, wait: float = 0.005) -> None:
        class Batcher(AsyncBatcher):
            async def process_batch(self, batch):
                return await function(batch)

        self._batcher = Batcher(max_batch_size=size, max_queue_time=wait, concurrency=self.concurrency)
        self.submit = self._batcher.process

    async def stop(self) -> None:
        # Takes a second when idle: it looks at the flag only when its wait for the queue times out.
        await self._batcher.stop()


class AnyNumber(OneAtATime):
    name = "async-batcher (concurrency=-1)"
    concurrency = -1


PEERS = (OneAtATime, AnyNumber)
