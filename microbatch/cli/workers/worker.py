"""A worker as the supervisor sees it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Self

from microbatch.cli.workers.channel import Ask, Channel, Drain, Drained, End, Hello, Leaving, Ready, Reports, Retire

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from microbatch.cli.workers.channel import Message
    from microbatch.gateway.report import Report

VARIABLE: Final = "_MICROBATCH_WORKER"
"""The environment variable that holds the numbers of a worker's two sockets: for messages, and for connections."""

_PATH_VARIABLE: Final = "_MICROBATCH_PATH"
_PROGRAM: Final = (
    f"import os, sys; sys.path[:] = os.environ.pop({_PATH_VARIABLE!r}).split(os.pathsep); "
    "from microbatch.cli.main import main; sys.exit(main())"
)
"""The program of a worker: the command, with no modules of the current directory, where `-m` would look first."""

CONNECTION: Final = b"c"
"""The byte that goes with a connection; the worker sends one back when it has been closed."""

REPORT_SECONDS: Final = 2.0
"""Longest time that a worker may take to report; then its last report counts."""


class Worker:
    """A worker process.

    Attributes:
        ready: Whether it serves.
        retiring: Whether it gets no more connections.
        connections: How many it has.
        handed: How many it was given.
        report: The last report that it gave; None before the first.
        began: Time at which it was started.
        on_message: Called for the messages that are not dealt with here.
    """

    def __init__(self, process: asyncio.subprocess.Process, channel: Channel, door: socket.socket) -> None:
        self.ready: bool = False
        self.retiring: bool = False
        self.connections: int = 0
        self.handed: int = 0
        self.report: Report | None = None
        self.began: float = asyncio.get_running_loop().time()
        self.on_message: Callable[[Worker, Message], None] | None = None
        self._process = process
        self._channel = channel
        self._door = door
        self._asked: dict[int, asyncio.Future[None]] = {}
        self._settled = asyncio.Event()  # it serves, or has ended
        self._drained = asyncio.Event()  # it has drained, or has ended
        loop = asyncio.get_running_loop()
        loop.add_reader(door, self._note_closed)
        self._listening = loop.create_task(self._listen())
        self._ended = loop.create_task(self._wait())

    @classmethod
    async def start(cls, words: Sequence[str], hello: Hello) -> Self:
        """Start a process of the command with the arguments *words*, and say *hello*."""
        mine, theirs = socket.socketpair()
        door, their_door = socket.socketpair()
        with theirs, their_door:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-c", _PROGRAM, *words),
                stdin=asyncio.subprocess.DEVNULL,
                env={
                    **os.environ,
                    VARIABLE: f"{theirs.fileno()},{their_door.fileno()}",
                    _PATH_VARIABLE: os.pathsep.join(sys.path),
                },
                pass_fds=(theirs.fileno(), their_door.fileno()),
                start_new_session=True,  # the signals of a terminal are for the supervisor
            )
        door.setblocking(False)
        channel = await Channel.over(mine)
        channel.send(hello)
        return cls(process, channel, door)

    def __repr__(self) -> str:
        """Return the number of the process."""
        return f"worker {self._process.pid}"

    @property
    def status(self) -> int | None:
        """The exit status; negative for the number of a signal, None while it runs."""
        return self._process.returncode

    @property
    def welcome(self) -> bool:
        """True if it takes connections."""
        return self.ready and not self.retiring and self.status is None

    async def settled(self) -> bool:
        """Wait until it serves or has ended; return whether it serves."""
        await self._settled.wait()
        return self.ready and self.status is None

    async def drained(self) -> None:
        """Wait until it has answered what was under way after `drain`, or has ended."""
        await self._drained.wait()

    async def ended(self) -> int:
        """Wait until it has ended, and return the exit status."""
        await asyncio.shield(self._ended)
        return self._process.returncode or 0

    async def _wait(self) -> None:
        await self._process.wait()
        await self._listening  # what it has sent before
        asyncio.get_running_loop().remove_reader(self._door)
        self._door.close()
        await self._channel.aclose()
        for asked in self._asked.values():
            if not asked.done():
                asked.set_result(None)
        self._settled.set()
        self._drained.set()

    async def _listen(self) -> None:
        async for message in self._channel.receive():
            match message:
                case Ready():
                    self.ready = True
                    self._settled.set()
                case Reports(number, (report,)):
                    self.report = report
                    asked = self._asked.get(number)
                    if asked is not None and not asked.done():
                        asked.set_result(None)
                case Drained():
                    self._drained.set()
                case Leaving() | Ask() if self.on_message is not None:
                    if isinstance(message, Ask):
                        self.report = message.report
                    self.on_message(self, message)
                case _:
                    pass

    # --- connections

    def hand_over(self, connection: socket.socket) -> bool:
        """Give it a connection, of which nothing is kept; return whether it was taken."""
        try:
            socket.send_fds(self._door, [CONNECTION], [connection.fileno()])
        except OSError:  # it takes no more at the moment, or has ended
            return False
        connection.close()
        self.connections += 1
        self.handed += 1
        return True

    def _note_closed(self) -> None:
        with suppress(OSError):
            closed = len(self._door.recv(65_536))
            self.connections -= closed
            if not closed:
                asyncio.get_running_loop().remove_reader(self._door)

    # --- orders

    def send(self, message: Message) -> None:
        """Send *message* to it."""
        self._channel.send(message)

    async def update_report(self) -> None:
        """Ask it for a report; without an answer in time, the last report stays."""
        if self.status is not None or not self.ready:
            return
        number = max(self._asked, default=0) + 1
        asked = self._asked[number] = asyncio.get_running_loop().create_future()
        self._channel.send(Ask(number))
        with suppress(TimeoutError):
            async with asyncio.timeout(REPORT_SECONDS):
                await asked
        self._asked.pop(number, None)

    def retire(self) -> None:
        """Give it no more connections, and let it end when those it has are closed."""
        self.retiring = True
        with suppress(OSError):
            self._door.shutdown(socket.SHUT_WR)
        self._channel.send(Retire())

    def drain(self) -> None:
        """Have it answer the requests under way, and refuse others until it is told to end."""
        self._channel.send(Drain())

    def end(self) -> None:
        """Have it end, after `drain`."""
        self._channel.send(End())

    def kill(self) -> None:
        """End it at once."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
