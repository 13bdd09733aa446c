"""A worker: a gateway whose connections come from the supervisor."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from microbatch.cli.workers.channel import (
    Ask,
    Channel,
    Drain,
    Drained,
    End,
    Hello,
    Leaving,
    Ready,
    Reports,
    Retire,
    Up,
)
from microbatch.cli.workers.worker import CONNECTION, REPORT_SECONDS, VARIABLE
from microbatch.gateway.crew import Crew

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from microbatch.cli.workers.channel import Message
    from microbatch.gateway.report import Report
    from microbatch.gateway.server import Gateway

PATIENCE: Final = 10.0
"""Seconds in which the clients of a worker that retires have to send another request, with whose answer their connection ends."""


def sockets_of_worker() -> tuple[socket.socket, socket.socket] | None:
    """Return the sockets for messages and for connections that the supervisor has given this process; None if it is no worker."""
    numbers = os.environ.pop(VARIABLE, "")
    if not numbers:
        return None
    messages, door = map(int, numbers.split(","))
    return socket.socket(fileno=messages), socket.socket(fileno=door)


class Work:
    """Serves connections until the supervisor says otherwise, or ends.

    Args:
        sockets: Those of `sockets_of_worker`.
        make: Makes the gateway, given the key of the tenants' digests.
        workers: How many workers there are.
        grace: Seconds to answer what is under way at the end.
    """

    def __init__(
        self,
        sockets: tuple[socket.socket, socket.socket],
        make: Callable[[bytes], Gateway],
        *,
        workers: int,
        grace: float,
    ) -> None:
        self._messages, self._door = sockets
        self._make = make
        self._grace = grace
        self._crew = Crew(workers, self._others)
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[list[Report]]] = {}
        self._adding: set[asyncio.Task[None]] = set()
        self._closed = 0  # connections of which the supervisor has not been told
        self._last = asyncio.Event()  # there will be no further connection

    async def run(self) -> None:
        """Serve until the end."""
        self._channel = await Channel.over(self._messages)
        received = self._channel.receive()
        hello = await anext(received)
        assert isinstance(hello, Hello)  # noqa: S101 the supervisor's first message
        self._gateway = gateway = self._make(hello.secret)
        gateway.connections.on_close = self._note_closed
        await gateway.start(self._crew, hello.began)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._channel.send, Leaving())
        for ignored in (signal.SIGINT, signal.SIGHUP):
            signal.signal(ignored, signal.SIG_IGN)
        self._door.setblocking(False)
        loop.add_reader(self._door, self._take_in)
        self._channel.send(Ready())
        orders: asyncio.Queue[Retire | Drain | End] = asyncio.Queue()
        listening = loop.create_task(self._listen(received, orders))
        try:
            if isinstance(await orders.get(), Drain) or not await self._retire(orders):
                await gateway.drain(self._grace)
                self._channel.send(Drained())
                while not isinstance(await orders.get(), End):
                    pass
            await gateway.aclose(self._grace)
        finally:
            loop.remove_reader(self._door)
            self._channel.send(Reports(0, [gateway.report()]))
            await self._channel.aclose()
            listening.cancel()
            self._door.close()

    async def _listen(self, received: AsyncGenerator[Message], orders: asyncio.Queue[Retire | Drain | End]) -> None:
        async for message in received:
            match message:
                case Up(workers):
                    self._crew.up = workers
                case Ask(number):
                    self._channel.send(Reports(number, [self._gateway.report()]))
                case Reports(number, reports):
                    asked = self._asked.get(number)
                    if asked is not None and not asked.done():
                        asked.set_result(reports)
                case Retire() | Drain() | End():
                    orders.put_nowait(message)
                case _:
                    pass
        for order in (Drain(), End()):  # the supervisor has ended
            orders.put_nowait(order)

    async def _retire(self, orders: asyncio.Queue[Retire | Drain | End]) -> bool:
        """Serve until the connections are closed; return False if there was another order before."""
        loop = asyncio.get_running_loop()

        async def retire() -> None:
            await self._last.wait()
            if self._adding:
                await asyncio.wait(self._adding)
            await self._gateway.retire(min(PATIENCE, self._grace))

        retiring, other = loop.create_task(retire()), loop.create_task(orders.get())
        await asyncio.wait({retiring, other}, return_when=asyncio.FIRST_COMPLETED)
        retired = retiring.done()
        for task in (retiring, other):
            task.cancel()
        return retired

    # --- connections

    def _take_in(self) -> None:
        """Serve the connections that have been handed over."""
        while True:
            try:
                sent, given, _, _ = socket.recv_fds(self._door, len(CONNECTION), 1)
            except BlockingIOError:
                return
            except OSError:
                sent, given = b"", []
            if not sent:
                asyncio.get_running_loop().remove_reader(self._door)
                self._last.set()
                return
            if not given:  # there was no file descriptor left, and the connection is lost
                self._note_closed()
            for number in given:
                connection = socket.socket(fileno=number)
                connection.setblocking(False)
                task = asyncio.get_running_loop().create_task(self._gateway.connections.add(connection))
                self._adding.add(task)
                task.add_done_callback(self._adding.discard)

    def _note_closed(self) -> None:
        self._closed += 1
        with suppress(OSError):  # a full pipe: the next one tells
            self._closed -= self._door.send(CONNECTION * self._closed)

    # --- figures

    async def _others(self) -> list[Report]:
        """Return what all others have counted; nothing if the supervisor is gone."""
        number = next(self._numbers)
        asked: asyncio.Future[list[Report]] = asyncio.get_running_loop().create_future()
        self._asked[number] = asked
        self._channel.send(Ask(number, self._gateway.report()))
        try:
            async with asyncio.timeout(2 * REPORT_SECONDS):
                return await asked
        except TimeoutError:
            return []
        finally:
            del self._asked[number]
