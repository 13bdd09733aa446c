"""An event loop on virtual time: sleeping takes no real time, and tests can state exact instants."""

from __future__ import annotations

import asyncio
import contextvars
import selectors
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Executor
    from typing import TypeVar

    from typing_extensions import TypeVarTuple, Unpack

    T = TypeVar("T")
    Ts = TypeVarTuple("Ts")

# Real seconds to wait for a thread or a socket when no timer is pending, before the test counts as stuck.
_PATIENCE = 5.0


class DeadlockError(RuntimeError):
    """Every task waits, no timer is pending and no event came from outside, so the loop would wait for ever."""


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for the next timer, puts the loop's clock forward to it."""

    def __init__(self, loop: VirtualClockLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        working = self._loop.working and timeout != 0
        events = super().select(_PATIENCE if timeout is None or working else 0)
        while not events and timeout is None and self._loop.working:
            events = super().select(_PATIENCE)
        if not events:
            if timeout is None:
                raise DeadlockError("every task waits and no timer is pending")
            self._loop.advance(max(0.0, timeout))
        return events


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer as soon as every task waits.

    `loop.time()` begins at 0. The clock stands while a function runs in an executor (`asyncio.to_thread`), for up to 5 real seconds
    without any event: then the thread may itself wait for the clock. It does not stand for real sockets and other threads. With
    pytest-asyncio, return it from the `pytest_asyncio_loop_factories` hook.

    Attributes:
        working: Functions that run in executors.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self.working: int = 0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._now

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Wait for the threads of `asyncio.to_thread` in real time; a timeout of virtual time would be over at once."""
        del timeout
        await super().shutdown_default_executor()

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """Run *func* in *executor*, and let the clock stand until it has ended."""

        def ended(_: object) -> None:
            self.working -= 1

        self.working += 1
        try:
            future = super().run_in_executor(executor, func, *args)
        except BaseException:
            self.working -= 1
            raise
        future.add_done_callback(ended, context=contextvars.Context())
        return future

    def advance(self, seconds: float) -> None:
        """Put the clock forward. Timers that fall due run at the loop's next turn."""
        self._now += seconds


def loop_factories() -> Mapping[str, type[asyncio.AbstractEventLoop]]:
    """Return the value for pytest-asyncio's `pytest_asyncio_loop_factories` hook that runs tests on virtual time."""
    return {"virtual": VirtualClockLoop}
