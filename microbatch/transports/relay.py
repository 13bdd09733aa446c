"""Requests relayed byte for byte, and their answers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from microbatch.transports.http_edge import HOP_BY_HOP, Clock, timed, without

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    import aiohttp


class _Body(msgspec.Struct):
    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


_read_body = msgspec.json.Decoder(_Body).decode

_BYTES_A_TOKEN = 4  # of English


def read_charge(body: bytes | None) -> tuple[str | None, int]:
    """Return the model that a request's body names, or None, and the tokens it will roughly be charged."""
    if not body:
        return None, 0
    try:
        read = _read_body(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None, 0  # no chat completion
    return read.model, len(body) // _BYTES_A_TOKEN + (read.max_completion_tokens or read.max_tokens or 0)


class Forwarded:
    """A relayed answer, to be read inside the `async with` that gave it.

    Attributes:
        status: The HTTP status, whatever it is.
        headers: The endpoint's headers, in any case, repeated ones included, without those that concern one connection only.
    """

    def __init__(self, response: aiohttp.ClientResponse, where: str, end: float, idle: float | None) -> None:
        self.status = response.status
        headers = response.headers.copy()
        headers.clear()
        headers.extend(without(response.headers.items(), HOP_BY_HOP))
        self.headers: Mapping[str, str] = headers
        self._response = response
        self._where = where
        self._end = end
        self._idle = idle

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body's bytes as they arrive, compressed if the endpoint compressed them.

        Raises:
            ConnectFailed: The connection broke; what was yielded stands.
            TransportTimeout: The transport's `timeout` is over, or an event stream was silent for `idle_timeout`.
        """
        idle = None  # until the first bytes, only the time of the whole attempt counts
        while True:
            loop = asyncio.get_running_loop()
            clock = Clock(max(0.0, self._end - loop.time()), idle)
            # The time runs while waiting for the endpoint only, not while the caller is busy with a chunk.
            chunk = await timed(clock, self._response.content.readany(), self._where)
            if not chunk:
                return
            yield chunk
            idle = self._idle

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Iterate over `chunks()`."""
        return self.chunks()

    def __repr__(self) -> str:
        """Tell the status."""
        return f"Forwarded(status={self.status})"
