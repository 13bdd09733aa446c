"""The time that one call of a cache may take, of which the event loop's own delays are no part."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from types import TracebackType

_STEPS: Final = 25
_NOTHING: Final = 1e-9  # seconds: what rounding leaves


class Patience:
    """A time limit for what is done inside `async with`, counted only while the event loop keeps up.

    An answer may be there and not be seen, because the loop was busy with something else. So the time is counted in steps, and a
    step that ends late counts as one step: a loop that stands still for a second takes a 25th of the limit.

    It may be entered several times, one after the other; what was used is gone.

    Args:
        seconds: The limit. The block is cancelled when it is reached, and ends with `TimeoutError`.
        of: What this is a part of; the time used here is used there as well. None if it is a whole.

    Attributes:
        left: Seconds that are left.
    """

    def __init__(self, seconds: float, *, of: Patience | None = None) -> None:
        self.left = seconds
        self._step = seconds / _STEPS
        self._of = of
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timeout: asyncio.Timeout | None = None

    def part(self, parts: int) -> Patience:
        """Return an equal part of what is left, one of *parts*."""
        return Patience(self.left / parts, of=self)

    @property
    def expired(self) -> bool:
        """Whether the latest block was cancelled because the limit was reached."""
        return self._timeout is not None and self._timeout.expired()

    async def __aenter__(self) -> Self:
        """Begin to count.

        Raises:
            TimeoutError: Later, out of the block: nothing is left.
        """
        loop = asyncio.get_running_loop()
        self._since = loop.time()
        self._timeout = await asyncio.timeout_at(None if self.left > _NOTHING else self._since).__aenter__()
        if self.left > _NOTHING:
            self._arm(loop, self._timeout)
        return self

    def _arm(self, loop: asyncio.AbstractEventLoop, timeout: asyncio.Timeout) -> None:
        self._timer = loop.call_at(self._since + min(self._step, self.left), self._end_step, loop, timeout)

    def _end_step(self, loop: asyncio.AbstractEventLoop, timeout: asyncio.Timeout) -> None:
        self._count(loop.time())
        if self.left > _NOTHING:
            self._arm(loop, timeout)
        else:
            timeout.reschedule(loop.time())

    def _count(self, now: float) -> None:
        self._use(min(now - self._since, self._step))
        self._since = now

    def _use(self, seconds: float) -> None:
        self.left = max(0.0, self.left - seconds)
        if self._of is not None:
            self._of._use(seconds)  # noqa: SLF001 of its own class

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop counting."""
        if self._timer is not None:
            self._timer.cancel()
        self._count(asyncio.get_running_loop().time())
        if self._timeout is not None:
            await self._timeout.__aexit__(kind, error, traceback)
