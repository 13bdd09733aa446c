"""Transports, caches and spools shared by several batchers: opened for the first user, closed after the last.

Each opening and closing is a task of its own that begins when the one before it has ended. A cancelled user therefore takes nothing
from the others, and a resource is never opened and closed at the same time.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Protocol

from microbatch.errors import ConfigError, MicrobatchError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence


class Resource(Protocol):
    """An object that can be closed, and may have a coroutine function `open`."""

    async def aclose(self) -> None:
        """Release what it holds."""


class _Shared:
    """A resource in use.

    Attributes:
        users: Number of users, those that wait for the opening included.
        opening: The task that opens it for the present users.
        steps: Openings and closings that have not ended, oldest first.
    """

    def __init__(self, resource: Resource) -> None:
        self.resource = resource
        self.users = 0
        self.is_open = False
        self.opening: asyncio.Task[None] | None = None
        self.steps: list[asyncio.Task[None]] = []

    def begin(self, step: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Return a task that runs *step* after the earlier steps."""
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
            task.exception()  # retrieved, in case all users were cancelled
        if not self.users and not self.steps and _in_use.get(id(self.resource)) is self:
            del _in_use[id(self.resource)]

    async def open(self) -> None:
        opening = getattr(self.resource, "open", None)
        if opening is not None:
            await opening()
        self.is_open = True

    async def close(self) -> None:
        if self.is_open:
            self.is_open = False
            await self.resource.aclose()

    async def add_user(self) -> None:
        self.users += 1
        try:
            if self.opening is None or (self.opening.done() and not self.is_open):
                self.opening = self.begin(self.open)
            await _result(self.opening)
        except BaseException:
            await self.remove_user()
            raise

    async def remove_user(self) -> None:
        self.users -= 1
        if self.users:
            return
        if self.opening is not None:
            self.opening.cancel()  # no effect if it has ended
            self.opening = None
        await _result(self.begin(self.close))


_in_use: dict[int, _Shared] = {}  # by the resource's id()


async def acquire(resources: Sequence[Resource]) -> None:
    """Open each of *resources* that is not open yet.

    Raises:
        ConfigError: Another event loop is opening or closing one.
        Exception: One could not be opened; every caller that waited for it gets this error, and none is acquired.
    """
    acquired: list[Resource] = []
    try:
        for resource in resources:
            shared = _in_use.get(id(resource))
            if shared is None or _is_stale(shared):
                shared = _in_use[id(resource)] = _Shared(resource)
            await shared.add_user()
            acquired.append(resource)
    except BaseException:
        await release(acquired)
        raise


async def release(resources: Iterable[Resource]) -> None:
    """Close each of *resources* that has no other user; an error is raised when all have been processed."""
    async with AsyncExitStack() as stack:
        for resource in resources:
            stack.push_async_callback(_release, resource)


async def _release(resource: Resource) -> None:
    shared = _in_use.get(id(resource))
    if shared is not None:
        await shared.remove_user()


def _is_stale(shared: _Shared) -> bool:
    """Return whether a step can never end because its event loop is closed.

    Raises:
        ConfigError: A step is under way in another event loop.
    """
    loops = {step.get_loop() for step in shared.steps if not step.done()} - {asyncio.get_running_loop()}
    if not all(loop.is_closed() for loop in loops):
        name = type(shared.resource).__name__
        raise ConfigError(f"another event loop is opening or closing the {name}: wait until it has")
    return bool(loops)


async def _result(step: asyncio.Task[None]) -> None:
    """Wait for *step*, which continues if the caller is cancelled; raise a copy of its error."""
    if not step.done():
        await asyncio.wait([step])
    try:
        step.result()
    except MicrobatchError as error:
        raise error.replica() from error
