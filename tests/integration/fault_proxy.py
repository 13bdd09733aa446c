"""A TCP proxy that does to connections what networks do to them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections import Counter
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

Fault = Literal[
    "none",
    "delay",  # every piece comes late
    "drip",  # one byte at a time, for some time
    "cut",  # FIN in the middle of an answer
    "reset",  # RST in the middle of an answer
    "half_close",  # FIN in the middle of an answer, but the connection stays open the other way
    "garbage",  # bytes that nobody sent in the middle of an answer
    "refuse",  # RST before anything is read
    "silence",  # nothing ever comes back
]

RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 seconds: closing sends RST instead of FIN
GARBAGE = b"\x00\xff\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno{\xf0\x28"


class FaultProxy:
    """Passes connections on to a server, and breaks each of them as its plan says.

    Args:
        port: Where the server listens on 127.0.0.1.
        faults: Kinds to draw from, one for each connection.
        seed: Another seed makes other choices.

    Attributes:
        faults: As given; connections to come follow what it is set to.
        dealt: How many connections met each fault; those that were closed before it could strike included.
    """

    def __init__(self, port: int, faults: Sequence[Fault], *, seed: int = 0) -> None:
        self.faults = faults
        self.dealt: Counter[Fault] = Counter()
        self._server_port = port
        self._random = random.Random(seed)
        self._serving: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self.left_alone(0)
        await self._server.wait_closed()

    async def left_alone(self, patience: float) -> bool:
        """Wait until every client is gone, at most *patience* seconds; cut off the rest and tell whether there was none."""
        serving = list(self._serving)
        _, left = await asyncio.wait(serving, timeout=patience) if serving else ((), ())
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        return not left

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._serving.add(task)
        fault = self._random.choice(self.faults)
        self.dealt[fault] += 1
        # From the first byte of a head to the thousands of a long stream, each power of two as likely as the next.
        breaks_after = int(2 ** self._random.uniform(0, 14))
        try:
            if fault != "refuse":
                await self._join(fault, breaks_after, reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # either side may go at any time
        finally:
            if fault in ("refuse", "reset"):
                with contextlib.suppress(OSError):
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                writer.transport.abort()
            writer.close()
            self._serving.discard(task)

    async def _join(
        self, fault: Fault, breaks_after: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._server_port)
        asking = asyncio.create_task(_pass_on(reader, to_server))
        try:
            await self._answer(fault, breaks_after, from_server, writer)
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            to_server.close()

    async def _answer(
        self, fault: Fault, breaks_after: int, from_server: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while piece := await from_server.read(65_536):
            if fault not in self.faults:
                fault = "none"  # the time of faults is over, for connections that have not broken yet as well
            match fault:
                case "silence":
                    continue
                case "delay":
                    await asyncio.sleep(self._random.uniform(0, 0.05))
                case "drip":
                    dripped, piece = piece[:breaks_after], piece[breaks_after:]
                    breaks_after -= len(dripped)
                    for at in range(len(dripped)):
                        writer.write(dripped[at : at + 1])
                        await writer.drain()  # raises once the client is gone
                        await asyncio.sleep(0)
                case "cut" | "reset" | "half_close" | "garbage":
                    head, piece = piece[:breaks_after], piece[breaks_after:]
                    breaks_after -= len(head)
                    writer.write(head)
                    if breaks_after:
                        continue
                    if fault == "garbage":
                        writer.write(GARBAGE)
                        fault = "none"
                    elif fault == "half_close":
                        writer.write_eof()
                        while await from_server.read(65_536):
                            pass
                        return
                    else:
                        await writer.drain()
                        return
            writer.write(piece)
            await writer.drain()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on what comes, and the end of it."""
    try:
        while piece := await reader.read(65_536):
            writer.write(piece)
            await writer.drain()
    finally:
        writer.close()
