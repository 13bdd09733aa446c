"""`map`: any number of requests through the lanes, in bounded memory.

Bulk requests wait for full batches, so something has to notice when no batch can get fuller: the consumer waits, nothing of this
run is due, and the source has ended, or nothing is in flight that would make room for more of it. Then everything that this run has
waiting leaves. The scheduler calls `_check` whenever anything has moved, which is when that can have become true.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.batching.request import arguments_of, check_messages, rank_of
from microbatch.batching.ticket import NO_CONTEXT, NORMAL, UNSHARED, CallerOptions, FlushReason
from microbatch.checking import as_seconds, whole
from microbatch.errors import BatcherClosed, ConfigError, ShutDown
from microbatch.messages import Request, Result

if TYPE_CHECKING:
    from microbatch.batching.engine import Engine
    from microbatch.batching.intake import Intake
    from microbatch.batching.request import Options
    from microbatch.batching.ticket import Ticket, Waiter
    from microbatch.caching.answer_cache import AnswerCache
    from microbatch.messages import Messages, Reply, Requests
    from microbatch.policy import FlushPolicy

    Answered = tuple[Ticket, Waiter]

_SLICE = 256
"""Requests read from a source before the event loop gets its turn; reading one takes some 10 microseconds."""

_CLOSED = "the batcher closed while map() was reading its source"


class _Item(msgspec.Struct):
    """A request whose options have been checked, at loop time *created*; `caller.key` is None if the cache is not asked."""

    index: int
    request: Request[Any]
    options: Options
    caller: CallerOptions
    created: float


@dataclass(eq=False, repr=False)
class BulkRun:
    """One `map`.

    Attributes:
        max_pending: Most requests taken from the source and not yet taken by the consumer.
        ordered: Yield in the order of the source, not of completion.
        patience: Seconds after which a silent source counts as having nothing more for now.
        audited: Whether its answers may be audited.
    """

    engine: Engine
    intake: Intake
    cache: AnswerCache | None
    source: Requests
    max_pending: int
    ordered: bool
    patience: float
    audited: bool = True
    _results: deque[tuple[Result[Any], Answered | None]] = field(default_factory=deque)
    _early: dict[int, tuple[Result[Any], Answered | None]] = field(default_factory=dict)
    """Ordered: results that came before their turn."""
    _taken: int = 0
    _yielded: int = 0
    # Dicts keep their order: the same run takes the same course each time.
    _unsent: dict[Waiter, Ticket] = field(default_factory=dict)
    _open: dict[Waiter, Ticket] = field(default_factory=dict)
    _looking: int = 0
    _exhausted: bool = False
    _source_error: Exception | None = None
    _left: bool = False
    _waiting: bool = False
    _silent: bool = False
    _silence: asyncio.TimerHandle | None = None
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _feeder: asyncio.Task[Any] | None = None
    _feeder_room: asyncio.Event = field(default_factory=asyncio.Event)
    _sync: Iterator[Request[Any] | Messages] | None = None

    @classmethod
    def of(
        cls,
        engine: Engine,
        intake: Intake,
        cache: AnswerCache | None,
        source: Requests,
        *,
        policy: FlushPolicy,
        max_pending: int | None = None,
        ordered: bool = False,
        audited: bool = True,
    ) -> BulkRun:
        """Return one for the arguments of `Microbatcher.map`.

        Raises:
            ConfigError: One is wrong.
        """
        whole(1, max_pending=max_pending)
        if not hasattr(source, "__aiter__") and not hasattr(source, "__iter__"):
            raise ConfigError(f"requests must be iterable, got {type(source).__name__}")
        pending = max_pending or 2 * policy.max_batch_size * policy.max_concurrent_batches
        return cls(engine, intake, cache, source, pending, ordered, policy.low_max_wait, audited)

    async def results(self) -> AsyncIterator[Result[Any]]:
        """Yield a `Result` for each request of the source."""
        if isinstance(self.source, AsyncIterable):
            self.engine.start(functools.partial(self._feed, aiter(self.source)))
        else:
            self._sync = iter(self.source)
        self.engine.scheduler.watchers[self._check] = None
        self.engine.admission.watchers[self._note_room] = None
        try:
            while True:
                await self._take_in()
                if self._results:
                    self._yielded += 1
                    yield self._results.popleft()[0]
                elif self._exhausted and not self._pending:
                    break
                else:
                    await self._wait()
            if self._source_error is not None:
                raise self._source_error
        finally:
            self._leave()

    # --- intake

    @property
    def _pending(self) -> int:
        return self._taken - self._yielded

    @property
    def _has_room(self) -> bool:
        return self._pending < self.max_pending and not self.engine.admission.must_wait(NORMAL)

    async def _take_in(self) -> None:
        """Take from a plain iterator what there is room for; an async one feeds itself."""
        if self.engine.closing:
            self._end_source(BatcherClosed(_CLOSED))
        if self._sync is None:
            if self._pending < self.max_pending:
                self._feeder_room.set()
            return
        if not self._pending and not self._has_room and (request := self._next_of(self._sync)) is not None:
            await self._acquire_place(request)
            self._queue(request)
        while True:
            for _ in range(_SLICE):
                if not self._has_room or (request := self._next_of(self._sync)) is None:
                    return
                self.engine.admission.occupied += 1
                self._queue(request)
            await asyncio.sleep(0)
            if self._results:
                return

    def _next_of(self, source: Iterator[Request[Any] | Messages]) -> Request[Any] | None:
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

    async def _acquire_place(self, request: Request[Any]) -> None:
        tenant = request.tenant if isinstance(request.tenant, str) else None  # what else it is is refused later
        await self.engine.admission.acquire(rank_of(request.priority), tenant, UNSHARED, patient=True)

    def _end_source(self, error: Exception | None) -> None:
        if not self._exhausted:
            self._exhausted = True
            self._source_error = error

    async def _feed(self, iterator: AsyncIterator[Request[Any] | Messages]) -> None:
        """Take from an async iterator as long as there is room."""
        self._feeder = asyncio.current_task()
        try:
            while not self._left:
                while self._pending >= self.max_pending and not self._left:
                    self._feeder_room.clear()
                    await self._feeder_room.wait()
                self._note_activity()
                request = _request_of(await anext(iterator))
                await self._acquire_place(request)
                if self.engine.closing:
                    self._end_source(BatcherClosed(_CLOSED))
                    self.engine.admission.release()
                    break
                if self._left:
                    self.engine.admission.release()
                else:
                    self._queue(request)
                    self._check()  # nothing more may come, if that was the last there was room for
            if isinstance(iterator, AsyncGenerator):
                await iterator.aclose()  # it is not asked again, so its `finally` is due
        except StopAsyncIteration:
            self._end_source(None)
        except asyncio.CancelledError:
            if not self._left:
                self._end_source(BatcherClosed(_CLOSED))
                raise
            if isinstance(iterator, AsyncGenerator):
                with contextlib.suppress(Exception):  # the consumer is gone
                    await iterator.aclose()
        except Exception as error:  # noqa: BLE001 the user's own; raised once, after the results of what was taken
            self._end_source(error)
        finally:
            self._wake.set()
            self._check()

    def _note_room(self) -> None:
        """Note that others have left a full batcher: a plain iterator can be asked for more."""
        if self._sync is not None and not self._exhausted and self._has_room:
            self._wake.set()

    def _note_activity(self) -> None:
        """Note that the source is being asked: it is not silent for the next `patience` seconds."""
        self._silent = False
        if self._silence is not None:
            self._silence.cancel()
        self._silence = asyncio.get_running_loop().call_later(self.patience, self._fall_silent, context=NO_CONTEXT)

    def _fall_silent(self) -> None:
        self._silent = True
        self._check()

    def _queue(self, request: Request[Any]) -> None:
        """Queue *request*, for which a place is occupied; the error of a bad one is its result."""
        index, self._taken = self._taken, self._taken + 1
        looking: asyncio.Future[bytes | None] | None = None
        try:
            item = self._read(index, request)
            if self.cache is not None and item.caller.key is not None and item.caller.shared:
                looking = self.cache.look_up(item.caller.key, bulk=True)
        except Exception as error:  # noqa: BLE001 misuse raises whatever it makes go wrong, and is this item's alone
            self._add(Result(index, request.id, None, error), None)
            self.engine.admission.release()
            return
        if looking is None:
            self._enter(item)
            return
        self._looking += 1
        looking.add_done_callback(functools.partial(self._looked_up, item), context=NO_CONTEXT)

    def _read(self, index: int, request: Request[Any]) -> _Item:
        """Return *request* with its options.

        Raises:
            ConfigError: An option is wrong.
        """
        options = self.intake.read_options(*arguments_of(request))
        timeout, ttl = as_seconds("timeout", request.timeout), as_seconds("ttl", request.ttl)
        shared = self.intake.may_share(request.use_cache, options)
        key: bytes | None = None
        if self.cache is not None and request.use_cache:
            check_messages(request.messages)
            key = self.cache.key(request.messages, options)
        caller = CallerOptions(timeout, shared, key, ttl, audited=self.audited)
        return _Item(index, request, options, caller, asyncio.get_running_loop().time())

    def _looked_up(self, item: _Item, looking: asyncio.Future[bytes | None]) -> None:
        """Hand out the answer that the cache has, or ask the model."""
        self._looking -= 1
        reply: Reply[Any] | None = None
        error: Exception | None = None
        if looking.exception() is not None or self._left:
            error = ShutDown(_CLOSED)
        elif self.cache is not None and item.caller.key is not None:
            try:
                reply = self.cache.read(item.caller.key, looking.result(), item.options, item.created)
            except Exception as unreadable:  # noqa: BLE001 see `_queue`
                error = unreadable
        if reply is None and error is None and self.engine.closing:
            error = ShutDown(_CLOSED)
        if reply is None and error is None:
            self._enter(item)
        else:
            self.engine.admission.release()
            self._add(Result(item.index, item.request.id, reply, error), None)
        self._check()

    def _enter(self, item: _Item) -> None:
        """Queue the request of *item*; if it cannot be sent, the error is its result."""
        request = item.request
        try:
            ticket, waiter = self.intake.accept(request.messages, item.options, item.caller, self._note_taken)
        except Exception as error:  # noqa: BLE001 see `_queue`
            self._add(Result(item.index, request.id, None, error), None)
            return
        if ticket.queue is not None:
            self._unsent[waiter] = ticket
        self._open[waiter] = ticket
        done = functools.partial(self._done, waiter, item.index, request.id)
        waiter.future.add_done_callback(done, context=NO_CONTEXT)

    def _note_taken(self, waiter: Waiter) -> None:
        self._unsent.pop(waiter, None)

    # --- results

    def _done(self, waiter: Waiter, index: int, name: str | None, future: asyncio.Future[Any]) -> None:
        ticket = self._open.pop(waiter, None)
        self._unsent.pop(waiter, None)  # if it has left a ticket that goes on
        if future.cancelled():
            return  # the consumer has left
        error = future.exception()
        if error is None:
            self._add(Result(index, name, future.result()), None if ticket is None else (ticket, waiter))
        elif isinstance(error, Exception):
            self._add(Result(index, name, None, error), None)

    def _add(self, result: Result[Any], answered: Answered | None) -> None:
        if not self.ordered:
            self._results.append((result, answered))
        else:
            self._early[result.index] = (result, answered)
            turn = self._yielded + len(self._results)
            while turn in self._early:
                self._results.append(self._early.pop(turn))
                turn += 1
        self._wake.set()

    async def _wait(self) -> None:
        """Wait until there may be a result, or room for more."""
        self._wake.clear()
        self._waiting = True
        try:
            self._check()
            if not self._exhausted or self._pending:
                await self._wake.wait()
        finally:
            self._waiting = False

    def _check(self) -> None:
        """Send what waits if no batch of it can get fuller."""
        if not self._waiting or self._wake.is_set() or not self._unsent:
            return
        may_come = not self._exhausted and self._has_room and not (self._sync is None and self._silent)
        makes_room = not self._exhausted and len(self._open) > len(self._unsent)
        if may_come or makes_room or self._looking:
            return
        queues = [*dict.fromkeys(queue for ticket in self._unsent.values() if (queue := ticket.queue) is not None)]
        if not any(queue.due for queue in queues):
            for queue in queues:
                queue.flush(FlushReason.DRAIN)

    def _leave(self) -> None:
        """Cancel what is pending, because the consumer is gone."""
        self._left = True
        self.engine.scheduler.watchers.pop(self._check, None)
        self.engine.admission.watchers.pop(self._note_room, None)
        if self._silence is not None:
            self._silence.cancel()
        settlement = self.engine.settlement
        for waiter, ticket in list(self._open.items()):
            waiter.future.cancel()  # in vain if it has just been answered
            settlement.leave(ticket, waiter)
        for _, answered in [*self._results, *self._early.values()]:
            if answered is not None:  # this answer will never be fetched
                settlement.leave(*answered)
        if self._feeder is not None and not self._feeder.done():
            self._feeder.cancel()
        self._feeder_room.set()


def _request_of(item: Request[Any] | Messages) -> Request[Any]:
    return item if isinstance(item, Request) else Request(item)
