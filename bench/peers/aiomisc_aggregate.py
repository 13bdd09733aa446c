"""aiomisc: a decorator; the first caller whose wait is over runs the batch in its own task."""

from __future__ import annotations

from aiomisc import aggregate, aggregate_async

from bench.peers import BatchFunction, Collector


class Aggregate(Collector):
    name = "aiomisc.aggregate"
    distribution = "aiomisc"

    def __init__(self, function: BatchFunction, size: int = 32, wait: float = 0.005) -> None:
        @aggregate(leeway_ms=wait * 1000, max_count=size)
        async def batch(*items):
            return await function(list(items))

        self.submit = batch


class AggregateAsync(Aggregate):
    """Its other form, for functions that fail items one by one."""

    def __init__(self, function: BatchFunction, size: int = 32, wait: float = 0.005) -> None:
        @aggregate_async(leeway_ms=wait * 1000, max_count=size)
        async def batch(*arguments):
            results = await function([argument.value for argument in arguments])
            for argument, result in zip(arguments, results, strict=True):
                if isinstance(result, Exception):
                    argument.future.set_exception(result)
                else:
                    argument.future.set_result(result)

        self.submit = batch


Aggregate.failing_items = AggregateAsync

PEERS = (Aggregate,)
