"""An event loop on virtual time: sleeping takes no real time, and tests can state exact instants."""

from __future__ import annotations

import asyncio
import selectors
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

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
        events = super().select(0 if timeout is not None else _PATIENCE)
        if not events:
            if timeout is None:
                raise DeadlockError("every task waits and no timer is pending")
            self._loop.advance(max(0.0, timeout))
        return events


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer as soon as every task waits.

    `loop.time()` begins at 0. Only for code that keeps to the loop's clock: real sockets and threads take real time, in which
    this clock does not stop for them. With pytest-asyncio, return it from the `pytest_asyncio_loop_factories` hook.
    """

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._now

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Wait for the threads of `asyncio.to_thread` in real time; a timeout of virtual time would be over at once."""
        del timeout
        await super().shutdown_default_executor()

    def advance(self, seconds: float) -> None:
        """Put the clock forward. Timers that fall due run at the loop's next turn."""
        self._now += seconds


def loop_factories() -> Mapping[str, type[asyncio.AbstractEventLoop]]:
    """Return the value for pytest-asyncio's `pytest_asyncio_loop_factories` hook that runs tests on virtual time."""
    return {"virtual": VirtualClockLoop}
