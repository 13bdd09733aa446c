"""The edge to aiohttp: its failures in our words, one attempt's time, headers that are safe to send."""

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
"""Headers that say where a request begins, ends and goes. Set by hand they could make two requests of one."""

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
    """Await one step of aiohttp's.

    Raises:
        ConnectFailed: The connection could not be made, or broke.
    """
    try:
        return await step
    except (aiohttp.ClientError, OSError, ValueError, RuntimeError) as error:
        failure = connect_failed(error, where)
    # Raised out here, so that the original is not attached: aiohttp's errors hold the request's headers and its address, and with
    # them the key, wherever it is.
    raise failure


def connect_failed(error: Exception, where: str) -> ConnectFailed:
    """Return *error* in our words, which quote no header and no address beyond host and port."""
    match error:
        case aiohttp.ClientHttpProxyError():
            return ConnectFailed(f"the proxy refused to connect to {where}: status {error.status}")
        case aiohttp.ClientProxyConnectionError():
            return ConnectFailed(f"could not reach the proxy to {where}: {_said(error.os_error)}")
        case aiohttp.ClientConnectorCertificateError():
            return ConnectFailed(f"{where} has a certificate that is not trusted: {error.certificate_error}")
        case aiohttp.ClientConnectorDNSError():
            return ConnectFailed(f"could not resolve the host name of {where}: {_said(error.os_error)}")
        case aiohttp.ClientConnectorError():
            return ConnectFailed(f"could not connect to {where}: {_said(error.os_error)}")
        case aiohttp.ConnectionTimeoutError():
            return ConnectFailed(f"could not connect to {where}: no answer in time")
        case aiohttp.ServerDisconnectedError():
            return ConnectFailed(f"{where} closed the connection without an answer")
        case aiohttp.ClientPayloadError():
            return ConnectFailed(f"{where} closed the connection in the middle of the answer")
        case aiohttp.ClientResponseError():
            return ConnectFailed(f"{where} did not answer in HTTP")
        case OSError():
            return ConnectFailed(f"the connection to {where} broke: {_reason(error)}")
        case _:
            return ConnectFailed(f"the connection to {where} broke: {type(error).__name__}")


async def timed(clock: Clock, step: Awaitable[T], where: str) -> T:
    """Await one step of aiohttp's under *clock*.

    Raises:
        ConnectFailed: The connection could not be made, or broke.
        TransportTimeout: The time is up.
    """
    try:
        async with clock.scope:
            clock.feed()
            return await guarded(step, where)
    except TimeoutError:  # the clock's: one of the system's is a ConnectFailed by now
        failure = clock.error(where)
    raise failure


async def read_all(response: aiohttp.ClientResponse, limit: int, where: str, begun: bytearray) -> bytes:
    """Return the whole body, of which *begun* has been read.

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
    """Return what can be had of a body in *grace* seconds, at most *limit* bytes; never fails."""
    body = bytearray()
    try:
        async with asyncio.timeout(grace):
            while len(body) < limit and (chunk := await response.content.readany()):
                body += chunk
    except (aiohttp.ClientError, OSError):  # a TimeoutError is an OSError
        pass
    return bytes(body[:limit])


def checked(headers: Mapping[Any, Any], *, reserved: frozenset[str] = FRAMING) -> dict[str, str]:
    """Return *headers* once they are known to be what they seem: one line each.

    Raises:
        ConfigError: A name or a value could not be sent or would be read as more than one header, or the header is one
            that the transport writes itself. The message does not quote values.
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
    """Return all headers, a later layer replacing those of the same name (in any case) in the earlier ones."""
    result: dict[str, tuple[str, str]] = {}
    for layer in layers:
        result.update({name.lower(): (name, value) for name, value in layer.items()})
    return dict(result.values())


def without(headers: Iterable[tuple[str, str]], names: frozenset[str]) -> list[tuple[str, str]]:
    """Return *headers* less those named and those that a Connection header declares to be for one connection only."""
    pairs = list(headers)
    listed = {
        word.strip().lower() for name, value in pairs if name.lower() == "connection" for word in value.split(",")
    }
    return [(name, value) for name, value in pairs if name.lower() not in names | listed]


def _reason(error: OSError) -> str:
    """Return why the system says a connection broke. Only its number is read: aiohttp writes the address into the text."""
    number = error.errno or 0
    return os.strerror(number) if number > 0 and not isinstance(error, ssl.SSLError) else type(error).__name__


def _said(error: OSError) -> str:
    """Return why no connection could be made, in words of the resolver, of TLS or of the system, which know host and port only."""
    if type(error).__module__ == "builtins" and (error.errno or 0) > 0:
        return _reason(error)  # asyncio's own text for a refused connection is its address
    return error.strerror or str(error) or type(error).__name__
