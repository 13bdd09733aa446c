"""Reading from and writing to clients that may be slow, or gone."""

from __future__ import annotations

import asyncio

from aiohttp import web

from microbatch.gateway.errors import Refusal


async def read_body(request: web.Request, *, timeout: float) -> bytes:
    """Return the whole body of *request*.

    Args:
        request: Its application sets the most bytes that are taken.
        timeout: Seconds the client has to send it.

    Raises:
        Refusal: It is too long, too slow, or broken.
    """
    try:
        async with asyncio.timeout(timeout):
            return await request.read()
    except TimeoutError:
        raise Refusal(408, f"The body did not arrive within {timeout:g} s.", code="slow_body", close=True) from None
    except web.HTTPRequestEntityTooLarge as error:
        raise Refusal(413, error.text or "The body is too long.", code="body_too_long", close=True) from None
    except (web.RequestPayloadError, ValueError):
        raise Refusal(400, "The body is broken.", code="broken_body", close=True) from None


async def write_chunk(response: web.StreamResponse, chunk: bytes, *, timeout: float) -> None:
    """Send *chunk*, once the client has taken most of what was sent before.

    Args:
        response: A prepared response.
        chunk: The bytes.
        timeout: Seconds the client has for that.

    Raises:
        ConnectionError: The client is gone, or takes longer.
    """
    try:
        async with asyncio.timeout(timeout):
            await response.write(chunk)
    except TimeoutError:
        raise ConnectionAbortedError("the client does not read") from None
