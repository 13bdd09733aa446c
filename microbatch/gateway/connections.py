"""The connections of a gateway, which come from its own sockets or from another process."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from aiohttp import web

from microbatch.gateway.place import BACKLOG, Place, identity, origin_of, remove_socket

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from microbatch.gateway.certificate import Certificate

HANDSHAKE_SECONDS: Final = 15.0
"""Longest time of a TLS handshake."""

CLOSING_SECONDS: Final = 5.0
"""Seconds in which clients have to read their answers when the gateway closes."""

KEEPALIVE: Final = 75.0
"""Seconds for which a connection may be idle, also before its first request."""

# aiohttp's own log quotes what it cannot parse, including headers with keys.
_silent: Final = logging.Logger("microbatch.gateway.silent")  # noqa: LOG001 it must have no parent to pass records to
_silent.addHandler(logging.NullHandler())


class _Handler(web.RequestHandler):
    """One of *connections*."""

    __slots__ = ("_connections",)

    def __init__(self, manager: web.Server, connections: Connections) -> None:
        super().__init__(
            manager,
            loop=asyncio.get_running_loop(),
            auto_decompress=False,
            access_log=None,  # type: ignore[arg-type]  # as web.AppRunner allows
            logger=_silent,
            keepalive_timeout=KEEPALIVE,
        )
        self._connections = connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection."""
        super().connection_made(transport)
        self._connections.added()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Count it no longer."""
        super().connection_lost(exc)
        self._connections.lost()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,  # noqa: ARG002 aiohttp's messages quote the request
        message: str | None = None,  # noqa: ARG002 likewise
    ) -> web.StreamResponse:
        """Return the answer to a request that cannot be read, or to which there is none."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        response = self._connections.refuse(request, status)
        response.force_close()
        return response


class Connections:
    """The connections of a gateway.

    Args:
        place: Where it listens.
        certificate: Encrypts its connections; None for none.
        refuse: Returns the answer to a request that cannot be read, given it and the status.

    Attributes:
        place: As given.
        port: The port in use.
        refuse: As given.
        on_close: Called for each connection that ends.
    """

    def __init__(
        self,
        place: Place,
        certificate: Certificate | None,
        refuse: Callable[[web.BaseRequest, int], web.Response],
    ) -> None:
        self.place = place
        self.port: int = place.port
        self.refuse = refuse
        self.on_close: Callable[[], None] | None = None
        self._certificate = certificate
        self._handshake = None if certificate is None else HANDSHAKE_SECONDS
        self._runner: web.AppRunner | None = None
        self._listening: list[asyncio.Server] = []
        self._closing = False
        self._socket_made: tuple[int, int] | None = None
        self._count = 0
        self._none_left = asyncio.Event()
        self._none_left.set()

    @property
    def open(self) -> bool:
        """True once there is, or was, an application that serves them."""
        return self._runner is not None

    @property
    def origin(self) -> str:
        """The scheme and the host of the gateway's addresses; "" if there is no port before it listens."""
        return origin_of(self.place, self.port, tls=self._certificate is not None)

    def added(self) -> None:
        """Note that there is one more."""
        self._count += 1
        self._none_left.clear()

    def lost(self) -> None:
        """Note that there is one less."""
        self._count -= 1
        if not self._count:
            self._none_left.set()
        if self.on_close is not None:
            self.on_close()

    async def start(self, application: web.Application) -> None:
        """Start *application*, which serves the connections."""
        runner = web.AppRunner(
            application, handler_cancellation=True, access_log=None, shutdown_timeout=CLOSING_SECONDS
        )
        await runner.setup()
        self._runner = runner

    def _protocol(self) -> _Handler:
        return _Handler(self._server, self)

    @property
    def _server(self) -> web.Server:
        server = None if self._runner is None else self._runner.server
        if server is None:
            raise ConnectionAbortedError("the gateway is not open")
        return server

    async def listen(self) -> None:
        """Accept connections, until `close`.

        Raises:
            OSError: The port or the Unix socket is taken.
        """
        loop, context = asyncio.get_running_loop(), None if self._certificate is None else self._certificate.context
        sockets = self.place.listen()
        if self.place.uds is None:
            self.port = sockets[0].getsockname()[1]
        else:
            self._socket_made = identity(self.place.uds)
        for each in sockets:
            server = await loop.create_server(
                self._protocol, sock=each, ssl=context, ssl_handshake_timeout=self._handshake, backlog=BACKLOG
            )
            self._listening.append(server)

    async def add(self, connection: socket.socket) -> None:
        """Add a connection that was accepted elsewhere; one that breaks in the TLS handshake is dropped."""
        context = None if self._certificate is None else self._certificate.context
        try:
            if self._closing:
                raise ConnectionAbortedError("the gateway is closing")
            await asyncio.get_running_loop().connect_accepted_socket(
                self._protocol, connection, ssl=context, ssl_handshake_timeout=self._handshake
            )
        except OSError:  # TimeoutError, of the handshake, is one
            connection.close()
            if self.on_close is not None:
                self.on_close()

    async def all_closed(self, patience: float) -> None:
        """Wait until there are none; after *patience* seconds close the idle ones, and each of the others when it is answered."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._none_left.wait()
        if self._runner is not None and self._runner.server is not None:
            self._runner.server.pre_shutdown()
        await self._none_left.wait()

    async def close(self) -> None:
        """Stop listening, close the connections when they have been answered, and end the application."""
        if self._runner is None:
            return
        self._closing = True
        # asyncio makes the transport of an accepted connection one turn of the loop later and announces it to aiohttp in the turn
        # after that (https://github.com/python/cpython/issues/109564).
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for each in self._listening:
            each.close()
        await self._runner.cleanup()
        if self.place.uds is not None:
            remove_socket(self.place.uds, self._socket_made)
