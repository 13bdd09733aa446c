"""When a worker begins nothing new: because something failed that is no request's fault, or because there is nothing to do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final

from microbatch.transience import Backoff

logger = logging.getLogger("microbatch")

RENEWALS: Final = 3
"""Renewals in the time of a lease, so that one may fail."""

PARTING: Final = 5.0
"""Seconds that a worker which is cancelled takes to give back what it holds."""


class Rest:
    """A rest after failures: twice as long each time, until something succeeds.

    Args:
        what: What happens meanwhile, for the log.
        first: Seconds of the first one.
        longest: Most seconds of any.
    """

    def __init__(self, what: str, *, first: float, longest: float) -> None:
        self._what = what
        self._backoff = Backoff(first, max(first, longest))
        self._until = 0.0

    @property
    def on(self) -> bool:
        """Whether it lasts."""
        return self.left > 0

    @property
    def left(self) -> float:
        """Seconds until it is over."""
        return max(0.0, self._until - asyncio.get_running_loop().time())

    def take(self, why: str) -> None:
        """Begin a rest, unless there is one: of many that were under way when the first failed, only that one counts."""
        if self.on:
            return
        seconds = self._backoff.next()
        self._until = asyncio.get_running_loop().time() + seconds
        logger.warning("%s for %g s, for reasons that are no request's fault: %s", self._what, seconds, why)

    def end(self) -> None:
        """Something has succeeded: the next rest is a first one."""
        self._backoff.reset()


async def wait(stopping: asyncio.Event, seconds: float | None) -> None:
    """Wait *seconds*, or until *stopping* is set; None waits only for that."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stopping.wait()
