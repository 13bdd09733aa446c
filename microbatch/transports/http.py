"""Use of aiohttp: translation of its errors, the time limits of one attempt, and headers that are safe to send."""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from typing import TYPE_CHECKING, Any, Final, TypeVar

import aiohttp

from microbatch.errors import ConfigError, ConnectFailed, TransportError, TransportTimeout

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable, Mapping

T = TypeVar("T")

HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Headers that belong to one connection (RFC 9110, 7.6.1); they are never passed on."""

FRAMING: Final = HOP_BY_HOP | {"content-length", "expect", "host"}
"""Headers that delimit or route a request. Set by a caller they could turn one request into two."""

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE: Final = re.compile(r"[\t\x20-\x7e\x80-\ud7ff\ue000-\U0010ffff]*")


class Clock:
    """The time one attempt may take: until a fixed end, and, from the first sign of life on, only so long in silence.

    Args:
        total: Seconds for all of it.
        idle: Seconds between two signs of life, or None for no such limit.
    """

    def __init__(self, total: float, idle: float | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._total = total
        self._idle = idle
        self._end = self._loop.time() + total
        self._silent = False
        self.scope = asyncio.timeout_at(self._end)

    def feed(self) -> None:
        """Note a sign of life."""
        if self._idle is not None:
            silent = self._loop.time() + self._idle
            self._silent = silent < self._end
            self._set(min(silent, self._end))

    def grace(self, seconds: float) -> None:
        """Allow at most *seconds* more, unless there is another sign of life."""
        self._set(min(self._end, self._loop.time() + seconds))

    def error(self, where: str) -> TransportTimeout:
        """Return what to raise when the time is up."""
        if self._silent:
            return TransportTimeout(f"{where} sent nothing for {self._idle:g} s (idle_timeout)")
        return TransportTimeout(f"{where} did not finish within {self._total:g} s (timeout)")

    def _set(self, when: float) -> None:
        if not self.scope.expired():
            self.scope.reschedule(when)


async def guarded(step: Awaitable[T], where: str) -> T:
    """Await a coroutine of aiohttp.

    Raises:
        ConnectFailed: The connection could not be made, or broke.
    """
    try:
        return await step
    except (aiohttp.ClientError, OSError, ValueError, RuntimeError) as error:
        failure = connect_failed(error, where)
    # Raised outside of `except`, so that the original is not attached: aiohttp's errors hold the request's headers and address,
    # and with them the key.
    raise failure


def connect_failed(error: Exception, where: str) -> ConnectFailed:
    """Return the error to raise for *error*, which quotes no header and no address beyond host and port."""
    match error:
        case aiohttp.ClientHttpProxyError():
            message = f"the proxy refused to connect to {where}: status {error.status}"
        case aiohttp.ClientProxyConnectionError():
            message = f"could not reach the proxy to {where}: {_connect_reason(error.os_error)}"
        case aiohttp.ClientConnectorCertificateError():
            message = f"{where} has a certificate that is not trusted: {error.certificate_error}"
        case aiohttp.ClientConnectorDNSError():
            message = f"could not resolve the host name of {where}: {_connect_reason(error.os_error)}"
        case aiohttp.ClientConnectorError():
            message = f"could not connect to {where}: {_connect_reason(error.os_error)}"
        case aiohttp.ConnectionTimeoutError():
            message = f"could not connect to {where}: no answer in time"
        case aiohttp.ServerDisconnectedError():
            message = f"{where} closed the connection without an answer"
        case aiohttp.ClientPayloadError():
            message = f"{where} closed the connection in the middle of the answer"
        case aiohttp.ClientResponseError():
            message = f"{where} did not answer in HTTP"
        case OSError():
            message = f"the connection to {where} broke: {_reason(error)}"
        case _:
            message = f"the connection to {where} broke: {type(error).__name__}"
    return ConnectFailed(message)


async def timed(clock: Clock, step: Awaitable[T], where: str) -> T:
    """Await a coroutine of aiohttp under *clock*.

    Raises:
        ConnectFailed: The connection could not be made, or broke.
        TransportTimeout: The time is up.
    """
    try:
        async with clock.scope:
            clock.feed()
            return await guarded(step, where)
    except TimeoutError:  # the clock's; one of the system's is a ConnectFailed by now
        failure = clock.error(where)
    raise failure


async def read_all(response: aiohttp.ClientResponse, limit: int, where: str, begun: bytearray) -> bytes:
    """Return the whole body, of which *begun* was already read.

    Raises:
        TransportError: It is longer than *limit* bytes.
        ConnectFailed: The connection broke.
    """
    body, chunk = begun, b""
    while len(body) <= limit and (chunk := await guarded(response.content.readany(), where)):
        body += chunk
    if len(body) > limit:
        raise TransportError(f"{where} sent an answer of more than {limit} bytes")
    return bytes(body)


async def read_some(response: aiohttp.ClientResponse, limit: int, grace: float) -> bytes:
    """Return as much of a body as arrives within *grace* seconds, at most *limit* bytes; never fails."""
    body = bytearray()
    try:
        async with asyncio.timeout(grace):
            while len(body) < limit and (chunk := await response.content.readany()):
                body += chunk
    except (aiohttp.ClientError, OSError):  # a TimeoutError is an OSError
        pass
    return bytes(body[:limit])


def checked(headers: Mapping[Any, Any], *, reserved: frozenset[str] = FRAMING) -> dict[str, str]:
    """Return a copy of *headers* if each is one valid header.

    Raises:
        ConfigError: A name or a value cannot be sent or would be read as several headers, or the transport writes the header
            itself. The message quotes no value.
    """
    for name, value in headers.items():
        if not isinstance(name, str) or not _TOKEN.fullmatch(name):
            raise ConfigError("headers= has a name that is no HTTP header name")
        if not isinstance(value, str) or not _VALUE.fullmatch(value):
            raise ConfigError(f"the header {name} must be text of one line, without line breaks or control characters")
        if name.lower() in reserved:
            raise ConfigError(f"the header {name} cannot be set, the transport writes it itself")
    return dict(headers)


def merged(*layers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers of all *layers*; a later one replaces those of the same name (in any case)."""
    result: dict[str, tuple[str, str]] = {}
    for layer in layers:
        result.update({name.lower(): (name, value) for name, value in layer.items()})
    return dict(result.values())


def without(headers: Iterable[tuple[str, str]], names: frozenset[str]) -> list[tuple[str, str]]:
    """Return *headers* without *names* and without those that a Connection header lists."""
    pairs = list(headers)
    connection = [value for name, value in pairs if name.lower() == "connection"]
    dropped = names.union(word.strip().lower() for value in connection for word in value.split(","))
    return [(name, value) for name, value in pairs if name.lower() not in dropped]


def _reason(error: OSError) -> str:
    """Return the system's text for the error number. The error's own text is not used: aiohttp writes the address into it."""
    number = error.errno or 0
    return os.strerror(number) if number > 0 and not isinstance(error, ssl.SSLError) else type(error).__name__


def _connect_reason(error: OSError) -> str:
    """Return why no connection was made, as the resolver, TLS or the system puts it; they know host and port only."""
    if type(error).__module__ == "builtins" and (error.errno or 0) > 0:
        return _reason(error)  # asyncio's own text for a refused connection is its address
    return error.strerror or str(error) or type(error).__name__
