"""dike: a decorator over functions of lists, which it concatenates and cuts up again."""

from __future__ import annotations

from typing import Any

import dike

from bench.peers import BatchFunction, Collector


class Dike(Collector):
    name = "dike.batch"
    distribution = "dike"

    def __init__(self, function: BatchFunction, size: int = 32, wait: float = 0.005) -> None:
        @dike.batch(target_batch_size=size, max_waiting_time=wait)
        async def batch(items):
            return await function(items)

        self._batch = batch

    async def submit(self, item: Any) -> Any:
        results = await self._batch([item])
        return results[0]


PEERS = (Dike,)
