"""`BlockingMicrobatcher`: a batcher for code that is not async, with its event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import atexit
import os
import queue
import threading
import time
from collections.abc import AsyncIterable, Iterator
from contextlib import aclosing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, NoReturn, Self, TypeVar, cast

import msgspec
from anyio.from_thread import start_blocking_portal

from microbatch.checking import whole
from microbatch.client import Microbatcher
from microbatch.errors import BatcherClosed, ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
    from concurrent.futures import Future
    from contextlib import AbstractContextManager
    from types import TracebackType

    from anyio.from_thread import BlockingPortal

    from microbatch.accounting.stats import Stats
    from microbatch.binding import BoundQuestion
    from microbatch.messages import Embedding, Messages, Reply, Request, Requests, Result, Source
    from microbatch.protocols import Transport

T = TypeVar("T")

_AT_ONCE: Final = 64
"""Most items that are read from a source in one go, and results that are taken before the event loop hears of it."""

_AHEAD: Final = 4
"""One part of `max_pending` in so many may be read further ahead."""

_READING: Final = 0.001
"""Seconds after which reading in one go ends, so that a slow source does not hold results back."""

_FORKED = "the batcher was opened before this process was forked: make another one here, or open it after forking only"
_CLOSED = "the batcher is closed"


class BlockingMicrobatcher:
    """A `Microbatcher` for threads: requests of all threads of a process share prompts.

    It opens at its first use, in each process by itself, so it may be a global of a module that is imported before a server forks its
    workers. Use it with `with`, or call `close`; else it closes at the exit of the process. It is opened once: a submit after closing
    raises `BatcherClosed`, and so does any use in a child of a process that was forked after opening.

    Args:
        transport: The way to the model.
        settings: The other settings of `Microbatcher`, by name. Hooks and validators run in the thread of the event loop, and must not
            call the batcher.

    Raises:
        ConfigError: A setting is wrong.
    """

    def __init__(self, transport: Transport, **settings: Any) -> None:
        self._batcher = Microbatcher(transport, **settings)
        self._lock = threading.Lock()
        self._running: AbstractContextManager[BlockingPortal] | None = None
        self._portal: BlockingPortal | None = None
        self._closed = False
        self._pid: int | None = None  # of the process that opened it
        self._maps: set[_BlockingMap[Any]] = set()  # those under way; used on the event loop only

    # --- life

    def open(self) -> Self:
        """Open the batcher, unless it is open, and return it.

        Raises:
            BatcherClosed: It was closed, or opened in a process that this one was forked from.
            ConfigError: The transport, the cache or the spool cannot be used.
        """
        self._open()
        return self

    def _open(self) -> BlockingPortal:
        if self._portal is not None and self._pid == os.getpid():
            return self._portal
        self.check_process()  # first, as another thread may have held the lock when the process was forked
        with self._lock:
            if self._closed:
                raise BatcherClosed(_CLOSED)
            if self._portal is None:
                self._pid = os.getpid()
                running = start_blocking_portal("asyncio", name="microbatch")
                portal = running.__enter__()
                try:
                    portal.call(self._batcher.open)
                except BaseException:
                    self._pid = None
                    running.__exit__(None, None, None)
                    raise
                self._running, self._portal = running, portal
                atexit.register(self.close)
            return self._portal

    def close(self, grace: float | None = 30.0) -> None:
        """Accept no more requests, wait up to *grace* seconds for answers, and stop the thread; return when all is closed.

        None waits as long as deadlines and timeouts allow. It may be called again, and in a forked child does nothing.
        """
        if self._pid not in (None, os.getpid()):
            return  # before the lock, as in `_open`
        with self._lock:
            self._closed = True
            running, portal = self._running, self._portal
            self._running = self._portal = None
        if running is not None and portal is not None:
            atexit.unregister(self.close)
            try:
                portal.call(self._end, grace)
            finally:
                running.__exit__(None, None, None)

    async def _end(self, grace: float | None) -> None:
        try:
            await self._batcher.aclose(grace)
        finally:
            for each in self._maps:
                each.release()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(30.0 if kind is None else 0.0)

    # --- asking

    def submit(self, messages: Messages, **options: Any) -> Reply[Any]:
        """Return the answer to *messages*; see `Microbatcher.submit`, which documents the options and errors.

        An interruption of the calling thread, such as Ctrl-C, gives the request up.
        """
        return self.call(self._batcher.submit, messages, **options)

    def embed(self, text: str, **options: Any) -> Embedding:
        """Return the vector of *text*; see `Microbatcher.embed`."""
        return self.call(self._batcher.embed, text, **options)

    def embed_many(self, texts: Iterable[str], **options: Any) -> list[Embedding]:
        """Return the vectors of *texts*, in their order; see `Microbatcher.embed_many`. An iterator is read to its end first."""
        given = tuple(texts) if isinstance(texts, Iterator) else texts  # read in this thread, which may wait for it
        return self.call(self._batcher.embed_many, given, **options)

    def enqueue(self, messages: Messages, **options: Any) -> str:
        """Hand a request to the spool, and return its id; see `Microbatcher.enqueue`."""
        return self.call(self._batcher.enqueue, messages, **options)

    def result(self, id: str, **options: Any) -> Reply[Any]:  # noqa: A002 as there
        """Return the answer to a spooled request; see `Microbatcher.result`."""
        return self.call(self._batcher.result, id, **options)

    def map(
        self, requests: Requests, *, max_pending: int | None = None, ordered: bool = False
    ) -> Iterator[Result[Any]]:
        """Yield a `Result` for each request; see `Microbatcher.map`.

        *requests* are read in the calling thread, when the batcher has room for more; results wait meanwhile. An async iterable is read
        on the batcher's event loop.
        """
        whole(1, max_pending=max_pending)
        return _BlockingMap[Any](self, self._maps, requests, max_pending, ordered=ordered).results()

    def bind(
        self, system: str | None, *, output_type: Any = str, template: str = "{}", **options: Any
    ) -> BlockingQuestion[Any]:
        """Return a function of one item that returns the answer; see `Microbatcher.bind`."""
        return BlockingQuestion(self, self._batcher.bind(system, output_type=output_type, template=template, **options))

    def stats(self) -> Stats:
        """Return the figures so far, as a snapshot that never changes."""
        return self._batcher.stats()

    def call(self, function: Callable[..., Awaitable[T]], *args: Any, **options: Any) -> T:
        """Run an async function on the event loop, and return its result."""
        future: Future[T] | None = None
        try:
            future = self.start(partial(function, *args, **options))
            return future.result()
        except BaseException:
            if future is not None:
                future.cancel()  # without effect if it has ended
            raise

    def start(self, function: Callable[[], Awaitable[T]]) -> Future[T]:
        """Run an async function on the event loop, in the context of this call; return its future result."""
        portal = self._open()
        try:
            return portal.start_task_soon(function)
        except RuntimeError as error:
            if self._portal is portal:
                raise ConfigError(
                    "a hook or a validator of the batcher must not wait for it: it runs on the batcher's event loop"
                ) from error
            raise BatcherClosed(_CLOSED) from None

    def check_process(self) -> None:
        """Raise `BatcherClosed` if this process was forked after opening."""
        if self._pid not in (None, os.getpid()):
            raise BatcherClosed(_FORKED)

    @property
    def batcher(self) -> Microbatcher:
        """The batcher on the event loop, for coroutines that `start` runs."""
        return self._batcher

    def __reduce__(self) -> NoReturn:
        raise TypeError("a BlockingMicrobatcher cannot be pickled or copied; make one in each process")

    def __repr__(self) -> str:
        """Return the state."""
        state = "closed" if self._closed else "new" if self._portal is None else "open"
        return f"BlockingMicrobatcher({state})"


class BlockingQuestion(Generic[T]):
    """A function of one item that returns the answer; made by `BlockingMicrobatcher.bind`."""

    def __init__(self, batcher: BlockingMicrobatcher, bound: BoundQuestion[T]) -> None:
        self._batcher = batcher
        self._bound = bound

    def __call__(self, item: Any) -> T:
        """Return the answer about *item*; see `BoundQuestion`."""
        return self._batcher.call(self._bound, item)

    def map(self, items: Source[Any], *, max_pending: int | None = None) -> Iterator[Result[T]]:
        """Yield a `Result` for each of *items*, in their order; see `BlockingMicrobatcher.map`."""
        requests = self._bound.requests(items)
        return map(requests.result, self._batcher.map(requests.source, max_pending=max_pending, ordered=True))


class _Ended(msgspec.Struct):
    """The end of a map, by *error* if it is not None."""

    error: BaseException | None = None


class _BlockingMap(Generic[T]):
    """One `map` for a thread, which reads the source and takes the results; the event loop asks for both.

    Everything comes to the thread through one queue: None asks it to read more of its source.
    """

    def __init__(
        self,
        batcher: BlockingMicrobatcher,
        running: set[_BlockingMap[Any]],
        requests: Requests,
        max_pending: int | None,
        *,
        ordered: bool,
    ) -> None:
        self._batcher = batcher
        self._running = running
        self._requests = requests
        self._options: dict[str, Any] = {"max_pending": max_pending, "ordered": ordered}
        self._events: queue.SimpleQueue[Result[T] | _Ended | None] = queue.SimpleQueue()
        self._at_once = _AT_ONCE if max_pending is None else max(1, min(_AT_ONCE, max_pending // _AHEAD))
        self._ready = 0  # results that the thread has not taken, as far as the event loop knows
        self._released = False
        self._loop: asyncio.AbstractEventLoop
        self._room: asyncio.Event
        self._items: asyncio.Future[tuple[list[Request[Any] | Messages], Exception | None]]

    def results(self) -> Iterator[Result[T]]:
        """Begin, and return the results."""
        if isinstance(self._requests, AsyncIterable):
            return self._take(iter(()), self._batcher.start(partial(self._run, self._requests)))
        if not hasattr(self._requests, "__iter__"):
            raise ConfigError(f"requests must be iterable, got {type(self._requests).__name__}")
        return self._take(iter(self._requests), self._batcher.start(partial(self._run, self._source())))

    # --- on the event loop

    async def _run(self, source: Requests) -> None:
        self._loop, self._room = asyncio.get_running_loop(), asyncio.Event()
        error: BaseException | None = None
        self._running.add(self)
        try:
            mapping = cast("AsyncGenerator[Result[T]]", self._batcher.batcher.map(source, **self._options))
            async with aclosing(mapping) as results:
                async for result in results:
                    self._events.put(result)
                    self._ready += 1
                    while self._ready > 2 * _AT_ONCE and not self._released:
                        self._room.clear()
                        await self._room.wait()
        except BaseException as failure:
            error = failure
            raise
        finally:
            self._running.discard(self)
            self._events.put(_Ended(error))

    def release(self) -> None:
        """Wait for the thread no longer: the batcher is closed, and the thread may never take the rest."""
        self._released = True
        self._room.set()

    async def _source(self) -> AsyncIterator[Request[Any] | Messages]:
        ended = None
        while ended is None:
            self._items = self._loop.create_future()
            self._events.put(None)
            items, ended = await self._items
            for item in items:
                yield item
        if not isinstance(ended, StopIteration):
            raise ended

    def _taken(self, count: int) -> None:
        self._ready -= count
        self._room.set()

    def _brought(self, items: list[Request[Any] | Messages], ended: Exception | None) -> None:
        if not self._items.done():
            self._items.set_result((items, ended))

    # --- in the thread

    def _take(self, source: Iterator[Request[Any] | Messages], run: Future[None]) -> Iterator[Result[T]]:
        taken = 0
        try:
            while True:
                self._batcher.check_process()
                event = self._events.get()
                if event is None:
                    self._tell(self._brought, *_read(source, self._at_once))
                elif not isinstance(event, _Ended):
                    taken += 1
                    if taken == _AT_ONCE:
                        self._tell(self._taken, taken)
                        taken = 0
                    yield event
                elif event.error is None:
                    return
                elif isinstance(event.error, asyncio.CancelledError):
                    raise BatcherClosed(_CLOSED)
                else:
                    raise event.error
        finally:
            run.cancel()

    def _tell(self, callback: Callable[..., object], *args: Any) -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it the map
            self._loop.call_soon_threadsafe(callback, *args)


def _read(
    source: Iterator[Request[Any] | Messages], most: int
) -> tuple[list[Request[Any] | Messages], Exception | None]:
    """Return at most *most* next items of *source*, and the error that ended it: `StopIteration` at its end, None for no end."""
    items: list[Request[Any] | Messages] = []
    end = time.monotonic() + _READING
    try:
        while len(items) < most and (not items or time.monotonic() < end):
            items.append(next(source))
    except Exception as error:  # noqa: BLE001 the user's own; raised after the results of what was read
        return items, error
    return items, None
