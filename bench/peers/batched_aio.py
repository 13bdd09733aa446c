"""batched: a decorator whose task looks at the queue every `timeout_ms`."""

from __future__ import annotations

from batched import aio

from bench.peers import BatchFunction, Collector


class Batched(Collector):
    name = "batched.aio"
    distribution = "batched"

    def __init__(self, function: BatchFunction, size: int = 32, wait: float = 0.005) -> None:
        @aio.dynamically(batch_size=size, timeout_ms=wait * 1000)
        async def batch(items):
            return await function(items)

        self.submit = batch


PEERS = (Batched,)
