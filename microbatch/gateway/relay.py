"""Requests that reach the upstream as they are, and its answers that come back as they are."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

from aiohttp import web

from microbatch.errors import MicrobatchError
from microbatch.gateway.access import is_private
from microbatch.gateway.bodies import write_chunk
from microbatch.gateway.control_headers import PREFIX
from microbatch.gateway.errors import refusal_of
from microbatch.transports.credentials import is_credential, says_who
from microbatch.transports.http import FRAMING, without

if TYPE_CHECKING:
    from microbatch.client import Microbatcher
    from microbatch.gateway.access import Caller
    from microbatch.transports.relay import Forwarded

_KEPT_BACK: Final = frozenset({"alt-svc", "set-cookie", "set-cookie2", "strict-transport-security"})
"""Headers of an answer that are about the upstream's host, which is not the one that the client talks to."""

_NO_BODY: Final = frozenset({204, 304})


async def relay(
    batcher: Microbatcher, request: web.Request, path: str, body: bytes | None, caller: Caller, *, timeout: float
) -> web.StreamResponse:
    """Relay *request* and send the answer.

    Args:
        batcher: What forwards it.
        request: The request, read to its end.
        path: Where it goes, below the upstream's address, with its query.
        body: Its body, or None.
        caller: Who sent it.
        timeout: Seconds the client has to take a piece of the answer.

    Raises:
        Refusal: The upstream cannot be reached.
        ConnectionError: The client is gone; or the answer broke off, and so does what the client gets.
    """
    response: web.StreamResponse | None = None
    try:
        async with batcher.forward(request.method, path, _request_headers(request, caller), body) as answer:
            response = _response(answer)
            await response.prepare(request)
            if request.method != "HEAD" and answer.status not in _NO_BODY:
                async for chunk in answer:
                    await write_chunk(response, chunk, timeout=timeout)
    except MicrobatchError as error:
        if response is None:
            raise refusal_of(error, relayed=True) from error
        abort(request)
        raise ConnectionAbortedError("the upstream's answer broke off") from None
    except ConnectionError:
        abort(request)
        raise
    with suppress(ConnectionError):
        await response.write_eof()
    return response


def abort(request: web.Request) -> None:
    """Cut the connection, so that the client cannot take what it has for the whole answer."""
    if request.transport is not None:
        request.transport.abort()


def _request_headers(request: web.Request, caller: Caller) -> dict[str, str]:
    relayed: dict[str, str] = {}
    for name, value in without(request.headers.items(), FRAMING):
        low = name.lower()
        if low in caller.headers or low.startswith(PREFIX) or is_private(low):
            continue
        if is_credential(low) or (caller.own_key and (says_who(low) or low.startswith("openai-"))):
            continue  # what may go of these is among the caller's headers
        # RFC 9110, 5.2: headers of one name are one list.
        relayed[low] = f"{relayed[low]}, {value}" if low in relayed else value
    return {**relayed, **caller.headers}


def _response(answer: Forwarded) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status)
    for name, value in answer.headers.items():
        low = name.lower()
        if low not in _KEPT_BACK and not low.startswith("access-control-"):
            response.headers.add(name, value)
    return response
