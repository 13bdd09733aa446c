"""The supervisor: it accepts connections, hands them to workers, and keeps these running."""

from __future__ import annotations

import asyncio
import secrets
import signal
import time
from typing import TYPE_CHECKING, Any, Final

from microbatch.cli.console import UsageError, note, plural
from microbatch.cli.workers.channel import Ask, Hello, Reports, Up
from microbatch.cli.workers.worker import Worker
from microbatch.gateway.place import identity, origin_of, remove_socket
from microbatch.gateway.report import total

if TYPE_CHECKING:
    import socket
    from collections.abc import Coroutine, Sequence

    from microbatch.cli.workers.channel import Message
    from microbatch.gateway.place import Place
    from microbatch.gateway.report import Report

LONGEST_PAUSE: Final = 30.0
"""Longest time before a worker is started in place of one that has ended, in seconds; the first ones are shorter."""

FIRST_PAUSE: Final = 0.5
_MOST_DOUBLINGS: Final = 10
STEADY: Final = 30.0
"""Seconds after which a worker that ends does not count as one that ends again and again."""

REPORTING: Final = 2.0
"""Seconds between reports, of which the last one counts if a worker is killed."""

ENDING: Final = 15.0
"""Seconds beyond the grace in which workers have to end."""

_AT_ONCE: Final = 64
_PAUSE: Final = 0.05
"""Seconds without accepting, if no worker takes a connection, or there are no file descriptors left."""


class Supervisor:
    """Keeps workers running behind one place.

    Args:
        place: Where it listens.
        words: The arguments of the command, with which workers are started.
        count: How many workers there are.
        grace: Seconds to answer what is under way at the end.
        tls: Whether workers encrypt connections.
    """

    def __init__(self, place: Place, words: Sequence[str], count: int, *, grace: float, tls: bool) -> None:
        self._place = place
        self._words = list(words)
        self._count = count
        self._grace = grace
        self._tls = tls
        self._sockets: list[socket.socket] = []
        self._socket_made: tuple[int, int] | None = None
        self._held: list[socket.socket] = []  # accepted, and not handed over yet
        self._accepting = False
        self._refused: str | None = None  # why no connection could be accepted at the latest try
        self._workers: list[Worker] = []  # those that run
        self._team: list[Worker | None] = [None] * count  # those that take connections, or will
        self._past: Report | None = None
        self._hello = Hello(secrets.token_bytes(32), time.monotonic())
        self._pauses = 0
        self._stopping = False
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def origin(self) -> str:
        """Scheme and host of the address for clients."""
        port = 0 if self._place.uds is not None else self._sockets[0].getsockname()[1]
        return origin_of(self._place, port, tls=self._tls)

    # --- lifecycle

    async def open(self) -> None:
        """Listen, and start the workers.

        Raises:
            OSError: It cannot listen.
            WorkerFailed: A worker has ended before it served.
        """
        self._sockets = self._place.listen()
        if self._place.uds is not None:
            self._socket_made = identity(self._place.uds)
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(self._count):
                    group.create_task(self._fill(number))
        except BaseException as error:
            self.kill()
            await self._all_ended()
            self._close_sockets()
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from None
            raise
        self._in_background(self._report_regularly())

    async def _fill(self, number: int) -> None:
        worker = await self._start()
        self._team[number] = worker
        if not await worker.settled():
            raise WorkerFailed(await worker.ended())
        self._note_change()

    async def aclose(self) -> None:
        """Have all workers answer what is under way, and refuse what comes until the last one has."""
        self._stopping = True
        for worker in self._workers:
            worker.drain()
        await self._all([worker.drained() for worker in self._workers], self._grace + ENDING)
        for worker in self._workers:
            worker.end()
        await self._all_ended()
        self._close_sockets()
        for task in self._tasks:
            task.cancel()

    async def _all_ended(self) -> None:
        await self._all([worker.ended() for worker in self._workers], ENDING)

    async def _all(self, work: Sequence[Coroutine[Any, Any, Any]], patience: float) -> None:
        """Wait for *work*; after *patience* seconds kill the workers."""
        if not work:
            return
        loop = asyncio.get_running_loop()
        _, late = await asyncio.wait([loop.create_task(each) for each in work], timeout=patience)
        if late:
            self.kill()
            await asyncio.wait(late)

    def kill(self) -> None:
        """End all workers at once."""
        self._stopping = True
        for worker in self._workers:
            worker.kill()

    def _close_sockets(self) -> None:
        self._accept(wanted=False)
        for each in (*self._sockets, *self._held):
            each.close()
        if self._place.uds is not None:
            remove_socket(self._place.uds, self._socket_made)

    def _in_background(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- workers

    async def _start(self) -> Worker:
        worker = await Worker.start(self._words, self._hello)
        worker.on_message = self._receive
        self._workers.append(worker)
        if self._stopping:
            worker.drain()
        self._in_background(self._watch(worker))
        return worker

    async def _watch(self, worker: Worker) -> None:
        """Wait until *worker* has ended, keep what it has counted, and start another one if it is missed."""
        status = await worker.ended()
        self._workers.remove(worker)
        if worker.report is not None:
            ended = worker.report.ended()
            self._past = ended if self._past is None else total([self._past, ended])
        if worker in self._team and worker.ready and not self._stopping:
            number = self._team.index(worker)
            self._note_change()
            loop = asyncio.get_running_loop()
            self._pauses = self._pauses + 1 if loop.time() - worker.began < STEADY else 0
            await self._refill(number, f"{worker} {_ended(status)}")

    async def _refill(self, number: int, told: str) -> None:
        """Start a worker in place of one that has ended, with growing pauses as long as that fails."""
        while not self._stopping:
            pause = pause_after(self._pauses)
            note(f"{told}; another one starts{f' in {pause:g} s' if pause else ''}.")
            await asyncio.sleep(pause)
            present = self._team[number]
            if self._stopping or (present is not None and present.status is None):
                return  # it has been replaced meanwhile
            self._pauses += 1
            try:
                worker = self._team[number] = await self._start()
            except OSError as error:  # too many processes, no memory
                told = f"no worker can be started ({error.strerror})"
                continue
            if await worker.settled():
                self._note_change()
                return
            told = f"{worker} {_ended(await worker.ended())} before it served"

    async def replace_all(self) -> None:
        """Replace one worker after the other by a new one, which reads all files again; what was begun is brought to an end."""
        for number in range(self._count):
            if not await self._replace(number):
                if self._stopping:
                    return
                note("Not reloaded: the new worker has not started; those that were not replaced serve on.")
                return
        note(f"Reloaded: {plural(self._count, 'worker')} replaced.")

    async def _replace(self, number: int) -> bool:
        """Start a worker, and let the one at *number* retire if it serves; return whether it does."""
        if self._stopping:
            return False
        try:
            worker = await self._start()
        except OSError as error:
            note(f"microbatch serve: no worker can be started: {error.strerror}")
            return False
        if not await worker.settled():
            return False
        before, self._team[number] = self._team[number], worker
        if before is not None:
            before.retire()
        self._note_change()
        return True

    def _note_change(self) -> None:
        """Send the workers the number of those that serve, and accept connections if any does."""
        up = sum(worker is not None and worker.welcome for worker in self._team)
        for worker in self._workers:
            worker.send(Up(up))
        self._accept(wanted=up > 0)

    def _receive(self, worker: Worker, message: Message) -> None:
        if isinstance(message, Ask):
            self._in_background(self._tell(worker, message.number))
        elif worker in self._team and not self._stopping:  # it is leaving
            self._in_background(self._replace(self._team.index(worker)))

    # --- figures

    async def _tell(self, worker: Worker, number: int) -> None:
        """Send *worker* the reports of all others, as the answer to its question *number*."""
        worker.send(Reports(number, await self._reports(worker)))

    async def _reports(self, asking: Worker | None = None) -> list[Report]:
        others = [worker for worker in self._workers if worker is not asking]
        await _update_reports(others)
        # One may have ended meanwhile, and be among those of the past.
        running = [worker.report for worker in others if worker in self._workers and worker.report is not None]
        return running if self._past is None else [*running, self._past]

    async def _report_regularly(self) -> None:
        while True:
            await asyncio.sleep(REPORTING)
            await _update_reports(self._workers)

    @property
    def counted(self) -> Report | None:
        """The figures of all workers that have ended; None if none has."""
        return self._past

    # --- connections

    def _accept(self, *, wanted: bool) -> None:
        if wanted is not self._accepting:
            self._accepting = wanted
            loop = asyncio.get_running_loop()
            for each in self._sockets:
                if wanted:
                    loop.add_reader(each, self._take_in, each)
                else:
                    loop.remove_reader(each)

    def _take_in(self, listener: socket.socket) -> None:
        """Accept connections and hand them over."""
        self._held = [each for each in self._held if not self._hand_over(each)]
        for _ in range(_AT_ONCE):
            if self._held:
                break
            try:
                connection, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.strerror != self._refused:  # once, not at each try
                    self._refused = error.strerror
                    note(f"microbatch serve: no connection can be accepted: {error.strerror}")
                break
            self._refused = None
            connection.setblocking(False)
            if not self._hand_over(connection):
                self._held.append(connection)
        else:
            return
        self._accept(wanted=False)
        asyncio.get_running_loop().call_later(_PAUSE, self._go_on)

    def _go_on(self) -> None:
        self._accept(wanted=bool(self._sockets) and self._sockets[0].fileno() >= 0 and bool(self._welcoming()))

    def _welcoming(self) -> list[Worker]:
        return sorted(
            (worker for worker in self._team if worker is not None and worker.welcome),
            key=lambda worker: (worker.connections, worker.handed),
        )

    def _hand_over(self, connection: socket.socket) -> bool:
        return any(worker.hand_over(connection) for worker in self._welcoming())


class WorkerFailed(UsageError):
    """A worker has ended before it served; it has said why.

    Attributes:
        status: Its exit status.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"a worker {_ended(status)} before it served")
        self.status = status


def pause_after(failures: int) -> float:
    """Return the seconds to wait before a worker is started, after so many have ended soon or could not be started."""
    if not failures:
        return 0.0
    doublings = min(failures - 1, _MOST_DOUBLINGS)  # 2.0**1024 overflows
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0**doublings)


async def _update_reports(workers: Sequence[Worker]) -> None:
    async with asyncio.TaskGroup() as group:
        for worker in workers:
            group.create_task(worker.update_report())


def _ended(status: int) -> str:
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"
