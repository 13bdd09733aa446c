"""Transports, caches and spools that several batchers share: opened by the first, closed by the last."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Part(Protocol):
    """What can be closed, and may have an `open()`."""

    async def aclose(self) -> None:
        """Let go of what it holds."""
        ...


_users: dict[int, tuple[Part, int]] = {}
"""Shared parts and how many open batchers use each."""


async def lease(parts: Sequence[Part]) -> None:
    """Open each of *parts* unless another batcher has it open; if one cannot be opened, none is kept."""
    leased: list[Part] = []
    try:
        for part in parts:
            await _lease(part)
            leased.append(part)
    except BaseException:
        await give_back(leased)
        raise


async def give_back(parts: Iterable[Part]) -> None:
    """Close each of *parts* unless another batcher still uses it; what one raises is raised once all have had their turn."""
    async with AsyncExitStack() as stack:
        for part in parts:
            stack.push_async_callback(_give_back, part)


async def _lease(part: Part) -> None:
    _, users = _users.get(id(part), (part, 0))
    _users[id(part)] = (part, users + 1)
    opening = getattr(part, "open", None)
    if users or opening is None:
        return
    try:
        await opening()
    except BaseException:
        del _users[id(part)]
        raise


async def _give_back(part: Part) -> None:
    _, users = _users.pop(id(part), (part, 1))
    if users > 1:
        _users[id(part)] = (part, users - 1)
    else:
        await part.aclose()
