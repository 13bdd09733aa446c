"""Transports, caches and spools that several batchers share: opened for the first that uses them, closed after the last.

Opening and closing a part are steps of their own tasks, which begin when the step before has ended. So a user that is cancelled
takes nothing from the others, and a part is never opened and closed at the same time.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Protocol

from microbatch.errors import ConfigError, MicrobatchError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence


class Resource(Protocol):
    """What can be closed, and may have an `open()`."""

    async def aclose(self) -> None:
        """Let go of what it holds."""
        ...


class _Shared:
    """A part in use.

    Attributes:
        part: The part.
        users: Number of leases that were not given back, those that wait for the opening included.
        opening: The step that opens it for the present users; None if there is none yet.
        is_open: Whether it has been opened and not closed since.
        steps: The steps that have not ended, oldest first; all but the first wait for those before them.
    """

    def __init__(self, part: Resource) -> None:
        self.part = part
        self.users = 0
        self.opening: asyncio.Task[None] | None = None
        self.is_open = False
        self.steps: list[asyncio.Task[None]] = []

    def begin(self, step: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Return a task that takes *step* when the earlier ones have ended."""
        earlier = [task for task in self.steps if not task.done()]

        async def in_turn() -> None:
            if earlier:
                await asyncio.wait(earlier)
            await step()

        task = asyncio.get_running_loop().create_task(in_turn())
        self.steps.append(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.steps.remove(task)
        if not task.cancelled():
            task.exception()  # retrieved: if its users were cancelled, asyncio would complain of it
        if not self.users and not self.steps and _users.get(id(self.part)) is self:
            del _users[id(self.part)]

    async def open(self) -> None:
        opening = getattr(self.part, "open", None)
        if opening is not None:
            await opening()
        self.is_open = True

    async def close(self) -> None:
        if self.is_open:
            self.is_open = False
            await self.part.aclose()


_users: dict[int, _Shared] = {}
"""The parts in use, by identity."""


async def lease(parts: Sequence[Resource]) -> None:
    """Return when all of *parts* are open, each opened unless it is already.

    Raises:
        ConfigError: One is being opened or closed in another event loop.
        Exception: What the opening of one raised, for all who wait for it; then no lease is held.
    """
    leased: list[Resource] = []
    try:
        for part in parts:
            await _lease(part)
            leased.append(part)
    except BaseException:
        await give_back(leased)
        raise


async def give_back(parts: Iterable[Resource]) -> None:
    """Close each of *parts* that has no other users; what one raises is raised once all have had their turn."""
    async with AsyncExitStack() as stack:
        for part in parts:
            stack.push_async_callback(_give_back, part)


async def _lease(part: Resource) -> None:
    shared = _users.get(id(part))
    if shared is None or _left_behind(shared):
        shared = _users[id(part)] = _Shared(part)
    shared.users += 1
    try:
        if shared.opening is None or (shared.opening.done() and not shared.is_open):
            shared.opening = shared.begin(shared.open)
        await _result(shared.opening)
    except BaseException:
        await _release(shared)
        raise


async def _give_back(part: Resource) -> None:
    shared = _users.get(id(part))
    if shared is not None:
        await _release(shared)


async def _release(shared: _Shared) -> None:
    """Take one user away; after the last one, close the part, and return when it is closed."""
    shared.users -= 1
    if shared.users:
        return
    if shared.opening is not None:
        shared.opening.cancel()  # in vain if it has ended
        shared.opening = None
    await _result(shared.begin(shared.close))


def _left_behind(shared: _Shared) -> bool:
    """Return whether a step will never end, because its event loop is closed.

    Raises:
        ConfigError: One is under way in another event loop.
    """
    loops = {step.get_loop() for step in shared.steps if not step.done()} - {asyncio.get_running_loop()}
    if not all(loop.is_closed() for loop in loops):
        raise ConfigError(
            f"another event loop is opening or closing the {type(shared.part).__name__}: wait until it has"
        )
    return bool(loops)


async def _result(step: asyncio.Task[None]) -> None:
    """Wait for the end of *step*, which goes on if the caller is cancelled; raise what it raised, as an error of the caller's own."""
    if not step.done():
        await asyncio.wait([step])
    try:
        step.result()
    except MicrobatchError as error:
        raise error.replica() from error
