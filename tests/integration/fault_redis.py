"""A server that speaks the protocol of Redis, and says what no Redis would."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Literal, Self

Fault = Literal[
    "none",
    "silence",  # it accepts and never answers
    "garbage",  # what it answers is nothing of the protocol
    "other",  # what it answers would be right for another command
    "short",  # a value less than was asked for
    "misaligned",  # each look-up gets the answer to the one before on its connection
]


class FaultyRedis:
    """Knows SET, GET and MGET, and answers them as its fault says; what it is told it keeps in any case.

    Args:
        fault: What is wrong with it; may be changed at any time.
        delay: Seconds before it answers; may be changed at any time.
    """

    def __init__(self, fault: Fault = "none", *, delay: float = 0.0) -> None:
        self.fault = fault
        self.delay = delay
        self.values: dict[bytes, bytes] = {}
        self._serving: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._serving):
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._serving.add(task := asyncio.current_task())
        before = _array([None])
        try:
            # A client that leaves in the middle of a command, or is cut off, is nothing to complain of.
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while True:
                    command = await _command(reader)
                    await asyncio.sleep(self.delay)
                    said = self._answer(*command)
                    if self.fault == "misaligned" and command[0] == b"MGET":
                        said, before = before, said
                    writer.write(said)
                    await writer.drain()
        finally:
            writer.close()
            self._serving.discard(task)

    def _answer(self, name: bytes, *words: bytes) -> bytes:
        match name:
            case b"SET":
                self.values[words[0]] = words[1]
                said = b"+OK\r\n"
            case b"GET":
                said = _bulk(self.values.get(words[0]))
            case b"MGET":
                said = _array([self.values.get(word) for word in words])
            case _:
                said = b"+OK\r\n"
        match self.fault:
            case "silence":
                return b""
            case "garbage":
                return b"\x00\xffHTTP/1.1 400 Bad Request\r\n$nonsense\r\n\xf0\x28"
            case "other" if name == b"MGET":
                return b":7\r\n"
            case "short" if name == b"MGET":
                return _array([self.values.get(word) for word in words[1:]])
        return said


def _array(values: list[bytes | None]) -> bytes:
    return b"*%d\r\n" % len(values) + b"".join(map(_bulk, values))


def _bulk(value: bytes | None) -> bytes:
    return b"$-1\r\n" if value is None else b"$%d\r\n%s\r\n" % (len(value), value)


async def _command(reader: asyncio.StreamReader) -> list[bytes]:
    words = []
    for _ in range(int((await reader.readuntil(b"\r\n"))[1:])):
        size = int((await reader.readuntil(b"\r\n"))[1:])
        words.append((await reader.readexactly(size + 2))[:-2])
    return words
