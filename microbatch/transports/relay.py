"""Relayed requests: the tokens they are charged, and their answers."""

from __future__ import annotations

import asyncio
import json
import re
import zlib
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.messages import Usage
from microbatch.transports.http import HOP_BY_HOP, Clock, Pacer, timed, without
from microbatch.transports.reply_fields import read_tier, read_usage, total_usage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    import aiohttp


class _Body(msgspec.Struct):
    model: str | None = None
    n: Any = None
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool | None = None
    service_tier: Any = None


_BYTES_PER_TOKEN: Final = 4  # of English
_ANSWER: Final = 256
"""Tokens of an answer whose length is not known."""

_USAGE: Final = re.compile(rb'"usage(?:_metadata|Metadata)?"\s*:\s*(?=\{)')
_USAGE_BYTES: Final = 16_384
"""Longest usage object."""

_TIER: Final = re.compile(rb'"(?:service_tier|serviceTier)"\s*:\s*"(\w*)"')

_NAME_BYTES: Final = 64  # of the end of a chunk, in which a match may begin

# Beginnings of an event stream that is not compressed.
_EVENT_FIELDS: Final = (b":", b"data", b"event", b"id", b"retry", b"\n", b"\r", b"\xef\xbb\xbf")
# Text of an answer or a thought in the event of any API. Earlier events (keep-alives, the begin of an answer, its role) may come long
# before the model has read the prompt.
_WORDS: Final = re.compile(rb'"(?:arguments|content|delta|reasoning\w*|refusal|text|thinking)"\s*:\s*"[^"]')
_EVENT: Final = re.compile(rb"(?:^|[\r\n])data:")
_WORDS_BYTES: Final = 64  # of the previous chunk, in which a match may begin


def read_charge(body: bytes | None) -> tuple[str | None, int]:
    """Return the model that a request body names, or None, and an estimate of the tokens to be charged."""
    read = _read(body)
    if body is None or read is None:
        return None, 0
    return read.model, len(body) // _BYTES_PER_TOKEN + (read.max_completion_tokens or read.max_tokens or 0)


def expected_usage(body: bytes | None) -> Usage | None:
    """Return the usage that a request with *body* is likely to have; None if it names no model, and so costs nothing by itself."""
    read = _read(body)
    if body is None or read is None or read.model is None:
        return None
    answer = _ANSWER if read.messages or read.prompt else 0
    most = read.max_completion_tokens or read.max_tokens or answer
    return Usage(
        len(body) // _BYTES_PER_TOKEN,
        min(answer, most) * (read.n if isinstance(read.n, int) and read.n > 0 else 1),
        estimated=True,
    )


def asked_tier(body: bytes | None) -> str | None:
    """Return the service tier that a request with *body* asks for; None for the usual one."""
    read = _read(body)
    return None if read is None else read_tier(read.service_tier, None)


def asks_for_stream(body: bytes | None) -> bool:
    """Return whether the request with *body* wants a streamed answer."""
    read = _read(body)
    return read is not None and read.stream is True


def _read(body: bytes | None) -> _Body | None:
    """Return the fields of a chat completion's request, None if *body* is none."""
    try:
        return msgspec.json.decode(body, type=_Body) if body else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


class UsageReader:
    """Reads the usage that an answer of any API reports, from the bytes of a body or of an event stream.

    *encoding* is the answer's Content-Encoding; with one that is not known here no usage is found.

    Attributes:
        tier: The service tier that was reported last, in lower case; None for the usual one.
    """

    def __init__(self, encoding: str | None = None) -> None:
        word = (encoding or "identity").strip().lower()
        self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 32) if word in ("gzip", "x-gzip", "deflate") else None
        self._readable = self._inflate is not None or word == "identity"
        self._rest = b""
        self.tier: str | None = None
        self._reports: list[tuple[Usage, bool]] = []

    @property
    def usage(self) -> Usage | None:
        """The usage reported so far, or None."""
        return total_usage(self._reports)

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes."""
        if not self._readable:
            return
        if self._inflate is not None:
            try:
                chunk = self._inflate.decompress(chunk)
            except zlib.error:
                self._readable = False
                return
        data, kept = self._rest + chunk, -_NAME_BYTES
        for tier in _TIER.findall(data):
            self.tier = read_tier(tier.decode("ascii", "replace"), None)
        for match in _USAGE.finditer(data):
            try:
                found, _ = _decoder.raw_decode(
                    data[match.end() : match.end() + _USAGE_BYTES].decode("utf-8", "replace")
                )
            except (ValueError, RecursionError):
                kept = match.start() - len(data)
                break
            if (usage := read_usage(found)) is not None:
                self._reports = [(total_usage([*self._reports, (usage, False)]) or usage, False)]
        self._rest = data[max(kept, -_USAGE_BYTES - _NAME_BYTES) :]


_decoder: Final = json.JSONDecoder()


def _may_be_events(head: bytes) -> bool:
    """Return whether an event stream that is not compressed may begin with *head*, which may be a part of a field's name."""
    return any(head.startswith(field) or field.startswith(head) for field in _EVENT_FIELDS)


class Forwarded:
    """The answer to a relayed request, to be read inside the `async with` block that made it.

    Attributes:
        status: The HTTP status.
        headers: The endpoint's headers, repeated ones included, without hop-by-hop headers.
        on_chunk: Takes each piece of the body before it is passed on; None for nothing.
        spent: Returns the usage reported so far and its price, see `forwarded`; None for a request that names no model.
    """

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        where: str,
        end: float,
        idle: float | None,
        interval: float,
        first: tuple[float, float]
        | None = None,  # seconds until the first event, and the loop time from which they count
    ) -> None:
        self.status: int = response.status
        headers = response.headers.copy()
        headers.clear()
        headers.extend(without(response.headers.items(), HOP_BY_HOP))
        self.headers: Mapping[str, str] = headers
        self.on_chunk: Callable[[bytes], object] | None = None
        self.spent: Callable[[], tuple[Usage, float | None] | None] | None = None
        self._response = response
        self._where = where
        self._end = end
        self._idle = idle
        self._interval = interval
        self._first = first

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the bytes of the body as they arrive, compressed if the endpoint compressed them.

        Raises:
            ConnectFailed: The connection broke; chunks already yielded stand.
            TransportTimeout: The transport's `timeout` passed, the first event of a stream took longer than `first_timeout`, or a
                stream that had begun to answer was silent for `idle_timeout`.
        """
        latest: bytes | None = None
        begun = False
        pacer = Pacer(self._response, self._interval, self._end)
        while True:
            left = self._end - asyncio.get_running_loop().time()
            # Made for each read, so that the time for which the caller is busy with a chunk does not count as silence.
            clock = Clock(max(0.0, left), self._idle if begun else None, self._interval, *(self._first or ()))
            chunk = await timed(clock, pacer.read(), self._where)
            if not chunk:
                return
            if not begun and self._idle is not None:
                foreign = latest is None and not _may_be_events(chunk)
                latest = (latest or b"")[-_WORDS_BYTES:] + chunk
                begun = foreign or _WORDS.search(latest) is not None
                if begun or _EVENT.search(latest):
                    self._first = None
            if begun:
                pacer.pause()
            if self.on_chunk is not None:
                self.on_chunk(chunk)
            yield chunk

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self.chunks()

    def __repr__(self) -> str:
        return f"Forwarded(status={self.status})"
