"""Support for calls of aiohttp: translation of errors, time limits, pauses of streams, validation of headers."""

from __future__ import annotations

import asyncio
import contextvars
import os
import re
import socket
import ssl
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

import aiohttp

from microbatch.errors import ConfigError, ConnectFailed, TransportError, TransportTimeout

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable, Mapping
    from types import SimpleNamespace

T = TypeVar("T")

HOP_BY_HOP: Final = frozenset({
    *("connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"),
    *("proxy-authenticate", "proxy-authorization", "proxy-connection"),
})  # fmt: skip
"""Headers of one connection (RFC 9110, 7.6.1), which are never relayed."""

FRAMING: Final = HOP_BY_HOP | {"content-length", "expect", "host"}
"""Headers that delimit and direct a request. If callers could set them, one request could be read as two."""

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE: Final = re.compile(r"[\t\x20-\x7e\x80-\ud7ff\ue000-\U0010ffff]*")

PAUSE_SHARE: Final = (
    4  # a pause is at most this part of the time since the first one, so that short answers are hardly delayed
)
SHORTEST_PAUSE: Final = 0.001  # shorter pauses, in seconds, cost more than they save
LOW_WATER: Final = 65_536  # bytes in a socket's buffer that end a pause early
# Whether lowering a socket's low-water mark makes it readable at once: in Linux since 4.18 (tcp_set_rcvlowat).
LOW_WATER_WAKES: Final = sys.platform == "linux" and [*map(int, re.findall(r"\d+", os.uname().release)[:2])] >= [4, 18]


# Seconds. A connection that the endpoint has closed while it was idle fails at once; later failures have another cause.
STALE_WITHIN: Final = 2.0


class Clock:
    """The time limits of one attempt, which runs in `scope`: *total* seconds, and *idle* seconds of silence after the first activity.

    Activity may be noticed late by *interval* seconds, the longest pause of a `Pacer`. With *first*, `begin` has to be called within so
    many seconds, which are counted from the loop time *since*, None for now.
    """

    def __init__(
        self,
        total: float,
        idle: float | None,
        interval: float = 0.0,
        first: float | None = None,
        since: float | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._total = total
        self._idle = idle
        self._first = first
        self.interval = interval
        now = self._loop.time()
        self.since: float = now if since is None else since
        self.end: float = now + total
        self.scope: asyncio.Timeout = asyncio.timeout_at(
            self.end if first is None else min(self.end, self.since + first)
        )

    def begin(self) -> None:
        """Record the beginning of the reply, which may be long before its first words."""
        if self._first is not None:
            self._first = None
            self.grace(self._total)

    def feed(self) -> None:
        """Record activity of the endpoint."""
        if self._idle is not None:
            self.grace(self._idle + self.interval)

    def grace(self, seconds: float) -> None:
        """Allow at most *seconds* more, unless there is further activity."""
        if not self.scope.expired():
            self.scope.reschedule(min(self.end, self._loop.time() + seconds))

    def error(self, where: str) -> TransportTimeout:
        """Return the error to raise when the time is up."""
        if self.scope.when() != self.end:
            if self._first is not None:
                return TransportTimeout(f"{where} did not begin to answer within {self._first:g} s (first_timeout)")
            return TransportTimeout(f"{where} sent nothing for {self._idle:g} s (idle_timeout)")
        return TransportTimeout(f"{where} did not finish within {self._total:g} s (timeout)")


class Pacer:
    """Reads a streamed answer with pauses, so that several events are read together.

    An endpoint sends one event per token. A wake-up, a `recv` and an HTTP parse for each of them is most of the processor time of a
    stream. During a pause, bytes wait in the socket's buffer: the socket's low-water mark is raised, below TLS, and the flow control of
    aiohttp works as before. Without a usable mark the transport is paused, which saves less under TLS.

    Pauses take at most *interval* seconds. There are none just before *end*, the loop time at which the answer has to be complete.
    """

    def __init__(self, response: aiohttp.ClientResponse, interval: float, end: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._response = response
        self._interval = interval
        self._end = end
        self._since: float | None = None
        self._paused: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def read(self) -> bytes:
        """Return the bytes that have arrived by the end of the pause, b"" at the end of the answer."""
        try:
            return await self._response.content.readany()
        finally:
            self._resume()  # the connection may be back in the pool, also within a pause: a full buffer ends it early

    def pause(self) -> None:
        """Begin a pause, which the next `read` waits for; no effect on an answer read to its end."""
        now = self._loop.time()
        if self._since is None:
            self._since = now
        pause = min(self._interval, (now - self._since) / PAUSE_SHARE)
        connection = self._response.connection
        transport = None if connection is None else connection.transport
        if transport is None or pause < SHORTEST_PAUSE or now + 2 * pause > self._end or not _hold(transport, True):
            return
        self._paused = transport
        # Full pauses of all streams end at the same moments, so that one iteration of the loop serves them all.
        when = now + pause if pause < self._interval else (now // pause + 1) * pause
        self._timer = self._loop.call_at(when, self._resume)

    def _resume(self) -> None:
        transport, self._paused = self._paused, None
        if transport is not None:
            _hold(transport, False)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _hold(transport: asyncio.Transport, held: bool) -> bool:
    """Pause the reading of a connection, or resume it; return whether that is possible."""
    if transport.is_closing():
        return False
    try:
        connection = transport.get_extra_info("socket")
        if LOW_WATER_WAKES and connection.family != socket.AF_UNIX:  # where the mark has no effect
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, LOW_WATER if held else 1)
        elif held:
            transport.pause_reading()
        else:
            transport.resume_reading()
    except (AttributeError, NotImplementedError, OSError, RuntimeError):
        return False  # the transport has no socket or no flow control, or is closing
    return True


class StaleConnection(aiohttp.ServerDisconnectedError):
    """A connection that was kept open was closed when the next request was written. Most likely it was not read (RFC 9112, 9.3.1)."""


class _Use:
    """The connection that a request went out on; *reused* if it was open before."""

    reused = False


async def _note_reuse(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
    use = context.trace_request_ctx
    if use is not None:  # as it is for relayed requests, which are not made again
        use.reused = True


async def requested(session: aiohttp.ClientSession, method: str, url: str, **options: Any) -> aiohttp.ClientResponse:
    """Make a request; raise `StaleConnection` if it failed on a connection that the endpoint was just closing."""
    if not session.trace_configs:
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_note_reuse)
        trace.freeze()
        session.trace_configs.append(trace)
    now = asyncio.get_running_loop().time
    use, begun = _Use(), now()
    try:
        return await session.request(method, url, trace_request_ctx=use, **options)
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError):
        if not use.reused or now() - begun > STALE_WITHIN:
            raise
    raise StaleConnection


def end_with_connection(response: aiohttp.ClientResponse) -> None:
    """Have the body of *response* end with an error when its connection ends before it.

    aiohttp drops a body at a fault in its chunks, and closes the connection; without this, its reader would wait on.
    """
    protocol = None if response.connection is None else response.connection.protocol
    closed = None if protocol is None else protocol.closed
    if closed is None:
        return
    content = response.content

    def end(_: asyncio.Future[None]) -> None:
        if not content.is_eof() and content.exception() is None:
            content.set_exception(aiohttp.ClientPayloadError("the connection ended"))

    def leave() -> None:
        closed.remove_done_callback(end)  # the connection may serve many more

    closed.remove_done_callback(_retrieve)
    closed.add_done_callback(_retrieve, context=contextvars.Context())
    closed.add_done_callback(end)
    content.on_eof(leave)


def _retrieve(closed: asyncio.Future[None]) -> None:
    """Mark the error of *closed* as seen, as no one else awaits it."""
    if not closed.cancelled():
        closed.exception()


_NEVER_CONNECTED: Final = (
    *(aiohttp.ClientHttpProxyError, aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorError),
    aiohttp.ConnectionTimeoutError,
)
"""Errors before anything of a request was sent."""


async def guarded(step: Awaitable[T], where: str) -> T:
    """Await *step*, a call of aiohttp; raise `ConnectFailed` for its errors."""
    try:
        return await step
    except (aiohttp.ClientError, OSError, ValueError, RuntimeError) as error:
        failure = connect_failed(error, where)
    # Raised outside the except block, so that the original is not attached: aiohttp's errors hold the request's address and headers,
    # and with them the key.
    raise failure


def connect_failed(error: Exception, where: str) -> ConnectFailed:
    """Return the error for one of aiohttp's; its message has no headers, and of the address only host and port."""
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
        case StaleConnection():
            stale = ConnectFailed(f"{where} closed the connection, which was kept open, without an answer")
            stale.again = True
            return stale
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
    failure = ConnectFailed(message)
    failure.unsent = isinstance(error, _NEVER_CONNECTED)
    return failure


async def timed(clock: Clock, step: Awaitable[T], where: str) -> T:
    """Await *step*, a call of aiohttp, within the limits of *clock*; raise `ConnectFailed` or `TransportTimeout`."""
    try:
        async with clock.scope:
            clock.feed()
            return await guarded(step, where)
    except TimeoutError:  # the clock's; a TimeoutError of the system has become a ConnectFailed
        failure = clock.error(where)
    raise failure


async def read_all(response: aiohttp.ClientResponse, limit: int, where: str, begun: bytearray) -> bytes:
    """Return the whole body, of which *begun* was read before; raise `TransportError` if it exceeds *limit* bytes."""
    await read_into(begun, response, limit, where)
    return bytes(begun)


async def read_into(body: bytearray, response: aiohttp.ClientResponse, limit: int, where: str) -> None:
    """Append the rest of a body to *body*; raise `TransportError` if that exceeds *limit* bytes."""
    while len(body) <= limit and (chunk := await guarded(response.content.readany(), where)):
        body += chunk
    if len(body) > limit:
        raise TransportError(f"{where} sent an answer of more than {limit} bytes")


async def read_some(response: aiohttp.ClientResponse, limit: int, grace: float) -> bytes:
    """Return the part of a body that arrives in *grace* seconds, at most *limit* bytes; never raise."""
    body = bytearray()
    with suppress(aiohttp.ClientError, OSError):  # a TimeoutError is an OSError
        async with asyncio.timeout(grace):
            while len(body) < limit and (chunk := await response.content.readany()):
                body += chunk
    return bytes(body[:limit])


def checked(headers: Mapping[Any, Any]) -> dict[str, str]:
    """Return *headers*; raise `ConfigError`, which quotes no value, if one cannot be sent as one header, or is of `FRAMING`."""
    for name, value in headers.items():
        if not isinstance(name, str) or not _TOKEN.fullmatch(name):
            raise ConfigError("headers= has a name that is no HTTP header name")
        if not isinstance(value, str) or not _VALUE.fullmatch(value):
            raise ConfigError(f"the header {name} must be text of one line, without line breaks or control characters")
        if name.lower() in FRAMING:
            raise ConfigError(f"the header {name} cannot be set, the transport writes it itself")
    return dict(headers)


def merged(*layers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers of all layers; later layers replace headers of the same name, in any case."""
    result: dict[str, tuple[str, str]] = {}
    for layer in layers:
        result.update({name.lower(): (name, value) for name, value in layer.items()})
    return dict(result.values())


def without(headers: Iterable[tuple[str, str]], names: frozenset[str]) -> list[tuple[str, str]]:
    """Return *headers* without those in *names* and those that a Connection header lists."""
    pairs = list(headers)
    connection = [value for name, value in pairs if name.lower() == "connection"]
    dropped = names.union(word.strip().lower() for value in connection for word in value.split(","))
    return [(name, value) for name, value in pairs if name.lower() not in dropped]


def _reason(error: OSError) -> str:
    """Return why a connection broke, from the error number only: aiohttp writes the address into the text."""
    number = error.errno or 0
    return os.strerror(number) if number > 0 and not isinstance(error, ssl.SSLError) else type(error).__name__


def _connect_reason(error: OSError) -> str:
    """Return why a connection failed, in the text of the resolver, of TLS or of the system, which has host and port at most."""
    if type(error).__module__ == "builtins" and (error.errno or 0) > 0:
        return _reason(error)  # asyncio's text for a refused connection is the address
    return error.strerror or str(error) or type(error).__name__
