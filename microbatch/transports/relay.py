"""Requests relayed byte for byte, and their answers."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Final

import msgspec

from microbatch.transports.http import HOP_BY_HOP, Clock, timed, without
from microbatch.transports.pacing import Pacer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    import aiohttp


class _Body(msgspec.Struct):
    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


_read_body = msgspec.json.Decoder(_Body).decode

_BYTES_A_TOKEN = 4  # of English

_EVENT_FIELDS: Final = (b":", b"data", b"event", b"id", b"retry", b"\n", b"\r", b"\xef\xbb\xbf")
"""How an event stream begins, if it is not compressed."""

_WORDS: Final = re.compile(rb'"(?:arguments|content|delta|reasoning\w*|refusal|text|thinking)"\s*:\s*"[^"]')
"""A piece of an answer, or of a thought, in the event of any API. What comes before it (keep-alives, events that say that the answer
was begun, or whose it will be) may come long before the model has read the prompt."""

_WORDS_BYTES: Final = 64
"""Bytes within which `_WORDS` is found where it was cut in two."""


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

    def __init__(
        self, response: aiohttp.ClientResponse, where: str, end: float, idle: float | None, interval: float
    ) -> None:
        self.status = response.status
        headers = response.headers.copy()
        headers.clear()
        headers.extend(without(response.headers.items(), HOP_BY_HOP))
        self.headers: Mapping[str, str] = headers
        self._response = response
        self._where = where
        self._end = end
        self._idle = idle
        self._interval = interval

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body's bytes as they arrive, compressed if the endpoint compressed them.

        Raises:
            ConnectFailed: The connection broke; what was yielded stands.
            TransportTimeout: The transport's `timeout` is over, or an event stream that had begun to answer was silent for
                `idle_timeout`.
        """
        latest: bytes | None = None
        begun = False
        pacer = Pacer(self._response, self._interval, self._end)
        while True:
            loop = asyncio.get_running_loop()
            clock = Clock(max(0.0, self._end - loop.time()), self._idle if begun else None, self._interval)
            # The time runs while waiting for the endpoint only, not while the caller is busy with a chunk.
            chunk = await timed(clock, self._response.content.readany(), self._where)
            if not chunk:
                return
            if not begun and self._idle is not None:
                foreign = latest is None and not chunk.startswith(_EVENT_FIELDS)
                latest = (latest or b"")[-_WORDS_BYTES:] + chunk
                begun = foreign or _WORDS.search(latest) is not None
            if begun:
                pacer.pause()
            yield chunk

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Iterate over `chunks()`."""
        return self.chunks()

    def __repr__(self) -> str:
        """Tell the status."""
        return f"Forwarded(status={self.status})"
