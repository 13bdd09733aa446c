"""Pauses between the reads of a streamed answer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import aiohttp

SHARE: Final = 4
"""A pause is at most this part of the time since the first one, so that a short answer is hardly delayed."""

SHORTEST: Final = 0.001
"""A shorter pause, in seconds, costs more than it saves."""


class Pacer:
    """Stops the connection of a streamed answer from being read for a while, so that events are read several at a time.

    An endpoint sends one event per token. A wake-up, a `recv` and an HTTP parse for each of them is most of the processor time
    of a stream; what arrives during a pause waits in the socket's buffer and is read at once.

    Only the socket transport is paused, not aiohttp's parser, whose flow control works as before. A connection goes back to the
    pool when the end of the answer has been parsed, hence never during a pause.

    Args:
        response: The answer.
        interval: Longest pause, in seconds; 0 disables pauses.
        end: Loop time at which the answer has to be complete; there are no pauses just before it.
    """

    def __init__(self, response: aiohttp.ClientResponse, interval: float, end: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._response = response
        self._interval = interval
        self._end = end
        self._since: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def pause(self) -> None:
        """Read no more until the pause is over; no effect on an answer read to its end."""
        now = self._loop.time()
        if self._since is None:
            self._since = now
        pause = min(self._interval, (now - self._since) / SHARE)
        connection = self._response.connection
        transport = None if connection is None else connection.transport
        if transport is None or pause < SHORTEST or now + 2 * pause > self._end:
            return
        if self._timer is not None:
            self._timer.cancel()
        try:
            transport.pause_reading()
        except (AttributeError, NotImplementedError, RuntimeError):  # it has no flow control, or is closing
            return
        # Full pauses of all streams end at the same moments: one iteration of the loop then serves them all.
        when = now + pause if pause < self._interval else (now // pause + 1) * pause
        self._timer = self._loop.call_at(when, _resume, transport)


def _resume(transport: asyncio.Transport) -> None:
    if not transport.is_closing():
        transport.resume_reading()
