"""Reading from clients and writing to them, and requests that are relayed unchanged."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from aiohttp import web

from microbatch.errors import MicrobatchError
from microbatch.gateway.access import PREFIX, is_private
from microbatch.gateway.errors import GatewayError, translate
from microbatch.gateway.served import served
from microbatch.transports.credentials import is_credential, says_who
from microbatch.transports.http import FRAMING, without
from microbatch.transports.relay import read_charge

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Sequence

    from microbatch.client import Microbatcher
    from microbatch.gateway.access import Caller
    from microbatch.transports.relay import Forwarded

_NOT_RELAYED: Final = frozenset({"alt-svc", "set-cookie", "set-cookie2", "strict-transport-security"})
"""Response headers about the upstream's host, which is not the host that the client addresses."""

_NO_BODY: Final = frozenset({204, 304})


class Relay:
    """Reads from clients, writes to them, and relays requests unchanged.

    Args:
        batcher: Forwards the requests.
        timeout: Longest time a client may take to send a body, or to read a piece of an answer, in seconds.
    """

    def __init__(self, batcher: Microbatcher, timeout: float) -> None:
        self._batcher = batcher
        self._timeout = timeout

    async def read_body(self, request: web.Request) -> bytes:
        """Return the body of *request*; raise if it is too long, broken, or slow."""
        try:
            async with asyncio.timeout(self._timeout):
                return await request.read()
        except TimeoutError:
            status, message, code = 408, f"The body did not arrive within {self._timeout:g} s.", "slow_body"
        except web.HTTPRequestEntityTooLarge as error:
            status, message, code = 413, error.text or "The body is too long.", "body_too_long"
        except (web.RequestPayloadError, ValueError):
            status, message, code = 400, "The body is broken.", "broken_body"
        raise GatewayError(status, message, code=code, close=True)

    async def write(self, response: web.StreamResponse, chunk: bytes) -> None:
        """Write *chunk*; raise `ConnectionError` if the client is gone, or has not read most of the earlier ones in time."""
        try:
            async with asyncio.timeout(self._timeout):
                await response.write(chunk)
        except TimeoutError:
            raise ConnectionAbortedError("the client does not read") from None

    async def send(
        self, request: web.Request, response: web.StreamResponse, pieces: AsyncIterable[bytes]
    ) -> web.StreamResponse:
        """Send *response* with a body of *pieces*, and return it.

        Raises:
            ConnectionError: The client is gone, or does not read; its connection has been cut.
        """
        try:
            await response.prepare(request)
            async for piece in pieces:
                await self.write(response, piece)
            await response.write_eof()
        except ConnectionError:
            _abort(request)
            raise
        return response

    async def serve(
        self, request: web.Request, path: str, body: bytes | None, caller: Caller, *, alone: Sequence[str] = ()
    ) -> web.StreamResponse:
        """Relay *request* to *path*, which has its query, below the upstream's address, and the answer to the client.

        *alone* are the names of the fields that keep it out of combined prompts, to be counted.

        Raises:
            GatewayError: The upstream cannot be reached.
            ConnectionError: The client is gone, or the answer broke off; the client's connection has been cut.
        """
        response: web.StreamResponse | None = None
        record = served(request)
        record.forwarded = True
        record.model = record.model or read_charge(body)[0]
        try:
            headers = _request_headers(request, caller)
            async with self._batcher.forward(
                request.method, path, headers, body, alone=alone, tenant=caller.tenant
            ) as answer:
                response = _response(answer)
                await response.prepare(request)
                try:
                    if request.method != "HEAD" and answer.status not in _NO_BODY:
                        async for chunk in answer:
                            await self.write(response, chunk)
                finally:
                    record.spent = None if answer.spent is None else answer.spent()
        except MicrobatchError as error:
            if response is None:
                raise translate(error, relayed=True) from error
            _abort(request)
            record.end(response.status)
            record.fail(type(error).__name__)
            raise ConnectionAbortedError("the upstream's answer broke off") from None
        except ConnectionError:
            _abort(request)
            raise
        with suppress(ConnectionError):
            await response.write_eof()
        return response


def _abort(request: web.Request) -> None:
    # The client must not take a part of the answer for the whole.
    if request.transport is not None:
        request.transport.abort()


def _request_headers(request: web.Request, caller: Caller) -> dict[str, str]:
    relayed: dict[str, str] = {}
    for name, value in without(request.headers.items(), FRAMING):
        lower = name.lower()
        if lower in caller.headers or lower.startswith(PREFIX) or is_private(lower):
            continue
        if is_credential(lower) or (caller.own_key and (says_who(lower) or lower.startswith("openai-"))):
            continue  # those that may be relayed are in caller.headers
        # RFC 9110, 5.2: headers of one name are one list.
        relayed[lower] = f"{relayed[lower]}, {value}" if lower in relayed else value
    return {**relayed, **caller.headers}


def _response(answer: Forwarded) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status)
    for name, value in answer.headers.items():
        lower = name.lower()
        if lower not in _NOT_RELAYED and not lower.startswith("access-control-"):
            response.headers.add(name, value)
    return response
