"""Strawberry's DataLoader; collects for one turn of the loop."""

from __future__ import annotations

from typing import ClassVar

from strawberry.dataloader import DataLoader

from bench.peers import BatchFunction, Collector


class Loader(Collector):
    name = "strawberry.DataLoader"
    distribution = "strawberry-graphql"
    windowed = False
    cache: ClassVar[bool] = False

    def __init__(self, function: BatchFunction, size: int = 32, wait: float = 0.005) -> None:  # noqa: ARG002, it has none
        self._load = DataLoader(load_fn=function, max_batch_size=size, cache=self.cache).load

    async def submit(self, item):
        return await self._load(item)


class CachingLoader(Loader):
    """Its only way to send equal requests once."""

    cache = True


Loader.sharing = CachingLoader

PEERS = (Loader,)
