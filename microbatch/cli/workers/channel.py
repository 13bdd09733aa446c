"""Messages between the supervisor and a worker."""

from __future__ import annotations

import asyncio
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Self

import msgspec

from microbatch.gateway.report import Report  # noqa: TC001 the type of a field

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncGenerator

_LENGTH: Final = struct.Struct("!I")


class Hello(msgspec.Struct, tag=True):
    """To a new worker: the key of the tenants' digests, and the monotonic time at which the first worker began."""

    secret: bytes
    began: float


class Up(msgspec.Struct, tag=True):
    """To a worker: how many serve."""

    workers: int


class Ask(msgspec.Struct, tag=True):
    """To a worker: it is to report. From a worker, with its own report: it wants those of all others."""

    number: int
    report: Report | None = None


class Reports(msgspec.Struct, tag=True):
    """The answer to the `Ask` of this number; from a worker that ends, its last report, unasked."""

    number: int
    reports: list[Report]


class Retire(msgspec.Struct, tag=True):
    """To a worker: it gets no more connections, and is to end when those it has are closed."""


class Drain(msgspec.Struct, tag=True):
    """To a worker: it is to take no more requests, and to answer those under way."""


class End(msgspec.Struct, tag=True):
    """To a worker that has drained: it is to end."""


class Drained(msgspec.Struct, tag=True):
    """From a worker: no request is under way any more; until it is told to end it refuses what comes."""


class Ready(msgspec.Struct, tag=True):
    """From a worker: it serves."""


class Leaving(msgspec.Struct, tag=True):
    """From a worker: it was told to end by a signal, and wants to retire."""


Message = Hello | Up | Ask | Reports | Retire | Drain | End | Ready | Leaving | Drained

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final[msgspec.msgpack.Decoder[Message]] = msgspec.msgpack.Decoder(Message)


class Channel:
    """One end of a connection that carries messages."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, end: socket.socket) -> Self:
        """Return a channel over one end of a pair of sockets."""
        return cls(*await asyncio.open_unix_connection(sock=end))

    def send(self, message: Message) -> None:
        """Send *message*; nothing happens if the other side is gone."""
        body = _encoder.encode(message)
        self._writer.write(_LENGTH.pack(len(body)) + body)

    async def receive(self) -> AsyncGenerator[Message]:
        """Return the messages of the other side until it is gone."""
        while True:
            try:
                (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                body = await self._reader.readexactly(length)
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            yield _decoder.decode(body)

    async def aclose(self) -> None:
        """Send what waits, and close."""
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()
