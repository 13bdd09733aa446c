"""What a user would pick instead: other collectors, each used as its own documentation says, behind one face.

A library is imported when it is asked for, so that one that is missing costs its column and nothing else. Settings are the library's
defaults but for the size of a batch and the time to wait; caches are off.
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any, ClassVar, Protocol

BatchFunction = Callable[[list[Any]], Awaitable[list[Any]]]
"""An `async def`: takes what several callers asked, returns as many results in the same order."""


class Peer(Protocol):
    """One collector over one batch function, for one event loop; made while that loop runs.

    Attributes:
        name: What it is called in tables.
        distribution: Where its version is found; "" for what stands in this folder.
        windowed: Whether it waits for company for a time; otherwise until the loop's next turn or while a call is under way.
        closes: Whether there is a way to close it that deals with what is pending. Without one, `stop` does nothing, and what it
            left running ends with the loop.
    """

    name: ClassVar[str]
    distribution: ClassVar[str]
    windowed: ClassVar[bool]
    closes: ClassVar[bool]

    def __init__(self, function: BatchFunction, size: int = 32, wait: float = 0.005) -> None: ...

    async def start(self) -> None: ...

    async def submit(self, item: Any) -> Any: ...

    async def stop(self) -> None: ...


class Collector:
    """What most peers have in common: they start by themselves and cannot be closed.

    Attributes:
        sharing: The same library set to send equal requests once, where it can.
        failing_items: The same library in the form in which a function may fail items one by one, where that is another form.
        one_call: The same library making one call at a time, where that is a setting and makes for fuller batches.
    """

    windowed: ClassVar[bool] = True
    closes: ClassVar[bool] = False
    sharing: ClassVar[type[Peer] | None] = None
    failing_items: ClassVar[type[Peer] | None] = None
    one_call: ClassVar[type[Peer] | None] = None

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass


MODULES = {
    "async-batcher": "async_batcher",
    "batched.aio": "batched_aio",
    "aiomisc.aggregate": "aiomisc_aggregate",
    "dike.batch": "dike_batch",
    "aioautobatch": "aioautobatch",
    "aiodataloader": "aiodataloader",
    "strawberry.DataLoader": "strawberry_dataloader",
    "ray.serve.batch": "ray_serve",
}

DISTRIBUTIONS = (
    "async-batcher",
    "batched",
    "aiomisc",
    "dike",
    "aioautobatch",
    "aiodataloader",
    "strawberry-graphql",
    "ray",
)


def installed() -> dict[str, type[Peer]]:
    """Return the peers that can be imported here, by name."""
    return dict(_found()[0])


def absent() -> dict[str, str]:
    """Return why each other one cannot, by name."""
    return dict(_found()[1])


@cache
def _found() -> tuple[dict[str, type[Peer]], dict[str, str]]:
    peers: dict[str, type[Peer]] = {}
    missing: dict[str, str] = {}
    for name, module in MODULES.items():
        try:
            adapters = importlib.import_module(f"bench.peers.{module}").PEERS
        except ImportError as error:
            # The first line names what is missing; in brackets may follow where it was looked for.
            missing[name] = str(error).splitlines()[0].partition(" (")[0]
        else:
            peers.update((adapter.name, adapter) for adapter in adapters)
    return peers, missing
