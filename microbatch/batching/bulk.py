"""`map`: any number of requests through the lanes, in bounded memory.

Bulk requests wait for full batches, so something has to notice when no batch can get fuller: the consumer waits, nothing of this
run is due or in flight, and no more can be taken in. Then everything that this run has waiting leaves. The scheduler calls
`check` whenever anything has moved, which is when that can have become true.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.batching.batch_limits import FlushReason
from microbatch.batching.lane import Lane
from microbatch.batching.request import rank_of
from microbatch.batching.ticket import NORMAL, UNSHARED
from microbatch.errors import BatcherClosed, ShutDown
from microbatch.messages import Request, Result

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.batching.engine import Engine
    from microbatch.batching.request import Options
    from microbatch.batching.single_flight import Seat
    from microbatch.batching.ticket import CallerOptions, Ticket
    from microbatch.messages import Messages, Reply

    Handle = Ticket | Seat
    Prepare = Callable[[Request], "Prepared"]
    Accept = Callable[[Request, "Prepared", Callable[[Any], None]], Handle]

_SLICE = 256
"""Requests read from a source before the event loop gets its turn; reading one takes some 10 microseconds."""


class Prepared(msgspec.Struct):
    """A request whose options have been checked.

    Attributes:
        options: The options.
        terms: On what terms its caller asks.
        looking: Done with what the cache has for it; None if the cache is not asked.
        read: Returns the reply in that, or None. It is asked once.
    """

    options: Options
    terms: CallerOptions
    looking: asyncio.Future[bytes | None] | None = None
    read: Callable[[bytes | None], Reply[Any] | None] | None = None


_CLOSED = "the batcher closed while map() was reading its source"


async def bulk(
    engine: Engine,
    prepare: Prepare,
    accept: Accept,
    source: Iterable[Request | Messages] | AsyncIterable[Request | Messages],
    *,
    max_pending: int,
    ordered: bool,
    patience: float,
) -> AsyncIterator[Result[Any]]:
    """Yield a `Result` for each request of *source*.

    Args:
        engine: Where the lanes are.
        prepare: Checks one request, and begins to look it up.
        accept: Queues one request; told what to call when it leaves its queue.
        source: The requests.
        max_pending: Most requests taken from the source and not yet taken by the consumer.
        ordered: Yield in the order of the source, not of completion.
        patience: Seconds after which a silent source counts as having nothing more for now.
    """
    run = _Run(engine, prepare, accept, source, max_pending, ordered=ordered, patience=patience)
    try:
        while True:
            await run.take_in()
            result = run.next_result()
            if result is not None:
                yield result
            elif run.finished:
                break
            else:
                await run.wait()
        if run.source_error is not None:
            raise run.source_error
    finally:
        run.leave()


class _Run:
    """One `map` under way."""

    def __init__(
        self,
        engine: Engine,
        prepare: Prepare,
        accept: Accept,
        source: Iterable[Request | Messages] | AsyncIterable[Request | Messages],
        max_pending: int,
        *,
        ordered: bool,
        patience: float,
    ) -> None:
        self._engine = engine
        self._prepare = prepare
        self._accept = accept
        self._max_pending = max_pending
        self._ordered = ordered
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.Context()
        self._results: deque[tuple[Result[Any], Handle | None]] = deque()
        self._early: dict[int, tuple[Result[Any], Handle | None]] = {}  # ordered: results that came before their turn
        self._taken = 0
        self._yielded = 0
        # As sets that keep their order: the same run takes the same course each time.
        self._unsent: dict[Handle, None] = {}
        self._open: dict[Handle, asyncio.Future[Any]] = {}
        self._looking = 0
        self._waiting = False
        self._wake = asyncio.Event()
        self._exhausted = False
        self._left = False
        self._silence: asyncio.TimerHandle | None = None
        self._silent = False
        self._feeder: asyncio.Task[Any] | None = None
        self._feeder_room = asyncio.Event()
        self.source_error: Exception | None = None
        self._sync: Iterator[Request | Messages] | None = None
        if isinstance(source, AsyncIterable):
            iterator = aiter(source)
            engine.start_feeder(functools.partial(self._feed, iterator))
        else:
            self._sync = iter(source)
        engine.scheduler.watch(self.check)
        engine.admission.watchers[self._note_room] = None

    # --- intake

    @property
    def _pending(self) -> int:
        return self._taken - self._yielded

    @property
    def finished(self) -> bool:
        """Whether the source has ended and every result has been yielded."""
        return self._exhausted and not self._pending

    @property
    def _has_room(self) -> bool:
        return self._pending < self._max_pending and not self._engine.admission.must_wait(NORMAL)

    async def take_in(self) -> None:
        """Take from a plain iterator what there is room for; an async one feeds itself."""
        if self._engine.closing:
            self._end_source(BatcherClosed(_CLOSED))
        if self._sync is None:
            if self._pending < self._max_pending:
                self._feeder_room.set()
            return
        if not self._pending and not self._has_room and (request := self._next_of(self._sync)) is not None:
            await self._wait_for_place(request)
            self._queue(request)
        while True:
            for _ in range(_SLICE):
                if not self._has_room or (request := self._next_of(self._sync)) is None:
                    return
                self._queue(request)
            await asyncio.sleep(0)
            if self._results:
                return

    def _next_of(self, source: Iterator[Request | Messages]) -> Request | None:
        """Return the next request of *source*; None if it has ended."""
        if self._exhausted:
            return None
        try:
            return _request_of(next(source))
        except StopIteration:
            self._end_source(None)
        except Exception as error:  # noqa: BLE001 the user's own; raised once, after the results of what was taken
            self._end_source(error)
        return None

    async def _wait_for_place(self, request: Request) -> None:
        """Wait until *request* may come in; it has to be queued, or the place declined, in the step of the return."""
        admission, rank = self._engine.admission, rank_of(request.priority)
        if admission.must_wait(rank):
            tenant = request.tenant if isinstance(request.tenant, str) else None  # what else it is is refused later
            await admission.wait_for(admission.place(rank, tenant, UNSHARED), rank)

    def _end_source(self, error: Exception | None) -> None:
        if not self._exhausted:
            self._exhausted = True
            self.source_error = error

    async def _feed(self, iterator: AsyncIterator[Request | Messages]) -> None:
        """Take from an async iterator as long as there is room."""
        self._feeder = asyncio.current_task()
        try:
            while not self._left:
                while self._pending >= self._max_pending and not self._left:
                    self._feeder_room.clear()
                    await self._feeder_room.wait()
                self._note_activity()
                request = _request_of(await anext(iterator))
                await self._wait_for_place(request)
                if self._engine.closing:
                    self._end_source(BatcherClosed(_CLOSED))
                    self._engine.admission.decline()
                    break
                if self._left:
                    self._engine.admission.decline()  # to the next who waits, if a place was kept for this item
                else:
                    self._queue(request)
                    self.check()  # nothing more may come, if that was the last there was room for
            if isinstance(iterator, AsyncGenerator):
                await iterator.aclose()  # nobody will ask it again, so its `finally` is due
        except StopAsyncIteration:
            self._end_source(None)
        except asyncio.CancelledError:
            if not self._left:
                self._end_source(BatcherClosed(_CLOSED))
                raise
            if isinstance(iterator, AsyncGenerator):
                with contextlib.suppress(Exception):  # nobody is left to be told
                    await iterator.aclose()
        except Exception as error:  # noqa: BLE001 the user's own; raised once, after the results of what was taken
            self._end_source(error)
        finally:
            self._wake.set()
            self.check()

    def _note_room(self) -> None:
        """Others have left a full batcher: a plain iterator can be asked for more."""
        if self._sync is not None and not self._exhausted and self._has_room:
            self._wake.set()

    def _note_activity(self) -> None:
        """The source is being asked: it is not silent for the next `patience` seconds."""
        self._silent = False
        if self._silence is not None:
            self._silence.cancel()
        self._silence = self._loop.call_later(self._patience, self._fall_silent, context=self._context)

    def _fall_silent(self) -> None:
        self._silent = True
        self.check()

    def _queue(self, request: Request) -> None:
        """Queue *request* in the place it has; the error of a bad one is its result, and its place goes to the next."""
        index, self._taken = self._taken, self._taken + 1
        try:
            prepared = self._prepare(request)
        except Exception as error:  # noqa: BLE001 misuse raises whatever it makes go wrong, and is this item's alone
            self._add(Result(index, request.id, None, error), None)
            self._engine.admission.decline()
            return
        if prepared.looking is None:
            self._enter(index, request, prepared)
            return
        # It holds its place while it is looked up: by then others may have taken what was free.
        self._engine.admission.taken += 1
        self._looking += 1
        found = functools.partial(self._looked_up, index, request, prepared)
        prepared.looking.add_done_callback(found, context=self._context)

    def _looked_up(
        self, index: int, request: Request, prepared: Prepared, looking: asyncio.Future[bytes | None]
    ) -> None:
        """The cache has been asked: hand out what it has, or ask the model."""
        self._looking -= 1
        admission = self._engine.admission
        failed = looking.exception() is not None
        if self._left or failed or prepared.read is None:
            admission.leave(1)
            if not self._left:
                self._add(Result(index, request.id, None, ShutDown(_CLOSED)), None)
            return
        result: Result[Any] | None = None
        try:
            reply = prepared.read(looking.result())
        except Exception as error:  # noqa: BLE001 see `_queue`
            result = Result(index, request.id, None, error)
        else:
            if reply is not None:
                result = Result(index, request.id, reply)
            elif self._engine.closing:
                result = Result(index, request.id, None, ShutDown(_CLOSED))
        if result is None:
            admission.enter()
            self._enter(index, request, prepared)
        else:
            admission.leave(1)
            self._add(result, None)
        self.check()

    def _enter(self, index: int, request: Request, prepared: Prepared) -> None:
        """Queue *request*; if it cannot be sent, the error is its result."""
        try:
            handle = self._accept(request, prepared, self._note_taken)
        except Exception as error:  # noqa: BLE001 see `_queue`
            self._add(Result(index, request.id, None, error), None)
            return
        if handle.queue is not None:
            self._unsent[handle] = None
        self._open[handle] = future = handle.future
        future.add_done_callback(functools.partial(self._done, handle, index, request.id), context=self._context)

    def _note_taken(self, handle: Handle) -> None:
        self._unsent.pop(handle, None)

    # --- results

    def _done(self, handle: Handle, index: int, name: str | None, future: asyncio.Future[Any]) -> None:
        self._open.pop(handle, None)
        self._unsent.pop(handle, None)  # if it has left a flight that goes on
        if future.cancelled():
            return  # the consumer has left
        error = future.exception()
        if error is None:
            self._add(Result(index, name, future.result()), handle)
        elif isinstance(error, Exception):
            self._add(Result(index, name, None, error), None)

    def _add(self, result: Result[Any], answered: Handle | None) -> None:
        if not self._ordered:
            self._results.append((result, answered))
        else:
            self._early[result.index] = (result, answered)
            turn = self._yielded + len(self._results)
            while turn in self._early:
                self._results.append(self._early.pop(turn))
                turn += 1
        self._wake.set()

    def next_result(self) -> Result[Any] | None:
        """Return the next result if there is one."""
        if not self._results:
            return None
        self._yielded += 1
        return self._results.popleft()[0]

    async def wait(self) -> None:
        """Wait until there may be a result, or room for more."""
        self._wake.clear()
        self._waiting = True
        try:
            self.check()
            if not self.finished:
                await self._wake.wait()
        finally:
            self._waiting = False

    def check(self) -> None:
        """Send what waits if no batch of it can get fuller."""
        if not self._waiting or self._wake.is_set() or not self._unsent:
            return
        may_come = not self._exhausted and self._has_room and not (self._sync is None and self._silent)
        in_flight = len(self._open) > len(self._unsent)
        if may_come or in_flight or self._looking:
            return
        lanes = dict.fromkeys(handle.queue for handle in self._unsent)
        if not any(lane.due for lane in lanes):
            self._engine.flush(FlushReason.DRAIN, [lane for lane in lanes if isinstance(lane, Lane)])

    def leave(self) -> None:
        """The consumer is gone: cancel what is pending."""
        self._left = True
        self._engine.scheduler.unwatch(self.check)
        self._engine.admission.watchers.pop(self._note_room, None)
        if self._silence is not None:
            self._silence.cancel()
        for handle, future in list(self._open.items()):
            future.cancel()  # in vain if it has just been answered
            self._engine.leave(handle)
        for _, answered in [*self._results, *self._early.values()]:
            if answered is not None:  # nobody will ever have this answer
                self._engine.leave(answered)
        if self._feeder is not None and not self._feeder.done():
            self._feeder.cancel()
        self._feeder_room.set()


def _request_of(item: Request | Messages) -> Request:
    return item if isinstance(item, Request) else Request(item)
