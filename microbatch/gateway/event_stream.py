"""Answers as event streams: headers before the answer is there, comments in a silence, events as they arrive, errors as events."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import msgspec
from aiohttp import web

from microbatch.transports.lenient import as_object

if TYPE_CHECKING:
    from collections.abc import Mapping

    from microbatch.gateway.errors import GatewayError
    from microbatch.gateway.relay import Relay
    from microbatch.live_answer import LiveAnswer

HEARTBEAT: Final = 15.0
"""Seconds of silence after which a comment is sent: proxies end connections that are silent for 30 to 60 s."""

_FIRST_LOOK: Final = 0.03
"""Seconds until the first check whether other requests have joined the one that waits alone."""

_ALONE: Final = {"X-Microbatch-Route": "single", "X-Microbatch-Batch-Size": "1"}
_COMMENT: Final = b": keep-alive\n\n"
DONE: Final = b"data: [DONE]\n\n"
_FINISH: Final = re.compile(rb'"finish_reason"\s*:\s*["{]')
"""A finish reason that is not null; inside a text its quotation marks would have backslashes."""


class EventStream:
    """The answer to one streamed request.

    Args:
        include_usage: Whether the client asked for the event that holds the usage.

    Attributes:
        response: The response, once its headers are sent; from then on errors are events.
        relayed: Whether the endpoint's own events were sent.
        told_usage: Whether the usage was among them.
        told_finish: Whether a finish reason was among them.
    """

    def __init__(self, request: web.Request, relay: Relay, *, include_usage: bool) -> None:
        self.response: web.StreamResponse | None = None
        self.relayed: bool = False
        self.told_usage: bool = False
        self.told_finish: bool = False
        self._request = request
        self._relay = relay
        self._include_usage = include_usage

    async def begin(self, headers: Mapping[str, str]) -> None:
        """Send the headers, unless they are sent."""
        if self.response is None:
            # X-Accel-Buffering keeps nginx from holding events back.
            fixed = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
            self.response = web.StreamResponse(headers={**headers, **fixed, "X-Accel-Buffering": "no"})
            await self.response.prepare(self._request)

    async def follow(self, live: LiveAnswer) -> None:
        """Return when the reply to *live* is there, or an error; meanwhile hand on the events of a call of its own.

        A request that is, or is about to be, part of a combined call gets the headers at once. Else they come with the endpoint's, so
        that a refusal has its own status.
        """
        look = 0.0 if live.combined else _FIRST_LOOK
        while not live.done:
            if self.response is None and (live.alone or live.combined or look >= HEARTBEAT):
                await self.begin(_ALONE if live.alone else {})
            silent = self.response is not None
            events = await live.events(HEARTBEAT if silent else look)
            if events:
                await self.begin(_ALONE)
                await self._relay_events(events)
            elif silent and not live.done:
                await self._write(_COMMENT)
            look *= 2

    async def _relay_events(self, events: list[bytes]) -> None:
        self.relayed = True
        self.told_finish = self.told_finish or any(map(_FINISH.search, events))
        kept = [event for event in events if self._is_for_client(event)]
        if kept:
            await self._write(b"".join(b"data: " + event.replace(b"\n", b"\ndata: ") + b"\n\n" for event in kept))

    def _is_for_client(self, event: bytes) -> bool:
        """Return whether *event* is sent on: the usage, which is always asked for here, only if the client asked for it."""
        if b'"usage"' not in event:
            return True
        try:
            chunk = as_object(msgspec.json.decode(event))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return True
        has_usage = bool(chunk.get("usage"))
        self.told_usage = self.told_usage or has_usage
        return self._include_usage or not has_usage or bool(chunk.get("choices"))

    async def _write(self, data: bytes) -> None:
        assert self.response is not None  # noqa: S101 `begin` is called before
        await self._relay.write(self.response, data)

    async def send(self, events: bytes) -> None:
        """Send *events*."""
        await self._write(events)

    async def end(self, events: bytes) -> web.StreamResponse:
        """Send the last *events*, and end the stream."""
        await self._write(events)
        assert self.response is not None  # noqa: S101 see `_write`
        await self.response.write_eof()
        return self.response

    async def fail(self, error: GatewayError) -> web.StreamResponse:
        """End the stream with *error*, as OpenAI does."""
        return await self.end(b"data: " + msgspec.json.encode({"error": error.error}) + b"\n\n")
