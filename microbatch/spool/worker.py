"""A worker: takes requests from a spool, has them answered in combined prompts, and stores the answers.

Theory of operation
-------------------
A worker serves one stage at a time: full batches as long as there is anything for them, then half batches, then requests alone, one
by one. Whoever is served in a later stage has been in the hands of a worker that failed or died, so it is a suspect: it is asked about
only when nobody else is under way here, and if it brings this worker down as well, it takes nobody along. A stage that always has
something to do gives way to the next one after a while.

Every request that was taken is *held* until its answer is stored or it is given back; as long as it is held its lease is renewed. If
the worker dies, the lease runs out and others take the request. Storing an answer twice does no harm: the first one stays.

An error that no request is to blame for (the endpoint cannot be reached, the key is refused, there are too many requests) puts
requests back as if they had not been taken, and the worker rests before it takes more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, Final, Protocol

import anyio
import msgspec

from microbatch.errors import (
    AuthFailed,
    BatcherClosed,
    ConnectFailed,
    QuotaExhausted,
    RateLimited,
    ShutDown,
    StatusError,
    StorageError,
)
from microbatch.spool.payload import Answer, Payload
from microbatch.spool.records import LEASE, Stage
from microbatch.spool.rest import PARTING, RENEWALS, Rest, wait
from microbatch.storage.round_trips import RoundTrips

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from microbatch.messages import Request, Result
    from microbatch.spool.records import Delivery, Spool

logger = logging.getLogger("microbatch")

MOST_AT_ONCE: Final = 256
"""Most requests taken from the spool in one go."""

FIRST_LOOK: Final = 0.05
RAREST_LOOK: Final = 1.0
"""Seconds between two looks into an empty spool: they grow from the one to the other."""

TURN: Final = 30.0
"""Seconds after which a stage that never runs dry gives way to the next."""

FIRST_REST: Final = 1.0
LONGEST_REST: Final = 60.0
"""Seconds of the first and the longest rest after failures that are no request's fault."""

# Statuses of an endpoint that is down or overloaded, whatever it is asked: bad gateway, unavailable, gateway timeout, overloaded; and
# of a model or an address that is not there.
_NOBODYS_FAULT: Final = frozenset({404, 502, 503, 504, 529})


class Asks(Protocol):
    """What has requests answered: see `Microbatcher.map`."""

    def map(
        self, requests: AsyncIterator[Request], *, max_pending: int | None = None, ordered: bool = False
    ) -> AsyncIterator[Result[Any]]:
        """Yield a result for each of *requests*."""
        ...


class Done(msgspec.Struct):
    """What a worker has done so far.

    Attributes:
        answered: Requests whose answers it stored.
        failed: Requests given back because they failed; each counts as often as it did.
        returned: Requests given back for reasons that were not theirs.
    """

    answered: int = 0
    failed: int = 0
    returned: int = 0


class Worker:
    """Drains a spool.

    Args:
        spool: The spool, open.
        batchers: Who has the requests of each stage answered, and how many it may have pending. That of `Stage.ALONE` sends every
            request by itself.
        lease: Seconds for which requests are taken.
        until_empty: End when nothing is left in the spool, not even in the hands of other workers; else go on for ever.
        progress: Called with the figures so far after each request.
    """

    def __init__(
        self,
        spool: Spool,
        batchers: Mapping[Stage, tuple[Asks, int]],
        *,
        lease: float = LEASE,
        until_empty: bool = False,
        progress: Callable[[Done], None] | None = None,
    ) -> None:
        self.done = Done()
        self._spool = spool
        self._batchers = batchers
        self._lease = lease
        self._until_empty = until_empty
        self._progress = progress
        self._held: dict[str, Delivery] = {}
        self._stores: set[asyncio.Future[None]] = set()
        self._stopping = asyncio.Event()
        self._storing: RoundTrips[tuple[Delivery, bytes], None] = RoundTrips(self._store, at_once=1)
        self._rest = Rest("the worker rests", first=FIRST_REST, longest=LONGEST_REST)

    def stop(self) -> None:
        """Take no more; `run` returns when all that is held has been answered or given back."""
        self._stopping.set()

    async def run(self) -> None:
        """Work until stopped, or until the spool is empty if that is wanted.

        When cancelled, what is held is given back as if it had not been taken. A spool that cannot be used is tried again after a
        rest, like an endpoint.
        """
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._storing.serve)
                tasks.start_soon(self._keep_leases)
                await asyncio.sleep(0)  # so that both have begun
                await self._work()
                tasks.cancel_scope.cancel()
        finally:
            with anyio.move_on_after(PARTING, shield=True):
                await self._give_back(list(self._held.values()), "the worker has stopped", counted=False)

    async def _work(self) -> None:
        pause = FIRST_LOOK
        while not self._stopping.is_set():
            busy = False
            for stage in Stage:
                busy = await self._serve(stage) or busy
            if busy:
                pause = FIRST_LOOK
                continue
            if self._until_empty and await self._is_empty():
                return
            await wait(self._stopping, pause)
            pause = min(2 * pause, RAREST_LOOK)

    async def _is_empty(self) -> bool:
        try:
            return not (await self._spool.counts()).depth
        except StorageError as error:
            self._rest.take(str(error))
            return False

    async def _serve(self, stage: Stage) -> bool:
        """Serve *stage* until it has nothing more to do, or its turn is over; return whether it had anything."""
        batcher, most = self._batchers[stage]
        served = False
        async for result in batcher.map(self._requests(stage, most), max_pending=most):
            served = True
            delivery = self._held.get(result.id or "")
            if delivery is not None:
                await self._take_result(delivery, result)
        if self._stores:
            await asyncio.wait(self._stores)
        return served

    async def _requests(self, stage: Stage, most: int) -> AsyncIterator[Request]:
        """Yield what there is to do for *stage*. While some of it is under way, wait for more to come."""
        loop = asyncio.get_running_loop()
        end = loop.time() + TURN
        pause = FIRST_LOOK
        while not self._stopping.is_set() and loop.time() < end:
            taken = await self._take(stage, most)
            self._held.update((delivery.item.name.key, delivery) for delivery in taken)
            for delivery in taken:
                try:
                    request = Payload.decode(delivery.item.payload).request(delivery.item.name)
                except StorageError as error:
                    await self._give_back([delivery], str(error), counted=True)
                else:
                    yield request
            if taken:
                pause = FIRST_LOOK
            elif not self._held:
                return
            else:
                await wait(self._stopping, pause)
                pause = min(2 * pause, RAREST_LOOK)

    async def _take(self, stage: Stage, most: int) -> list[Delivery]:
        if self._rest.on:
            return []
        try:
            return await self._spool.take(stage, min(most, MOST_AT_ONCE), lease=self._lease)
        except StorageError as error:
            self._rest.take(str(error))
            return []

    async def _take_result(self, delivery: Delivery, result: Result[Any]) -> None:
        if result.reply is not None:
            reply = await result.reply.settled()
            self._rest.end()
            is_json = Payload.decode(delivery.item.payload).is_typed
            answer = Answer.of(reply, time.time(), is_json=is_json).encode()  # noqa: TID251 answers outlive processes
            # Not awaited here: the next results come meanwhile, and share the next commit.
            store = self._storing.ask((delivery, answer))
            self._stores.add(store)
            store.add_done_callback(self._stored)
            return
        error = result.error or BatcherClosed("no reply")
        told = f"{type(error).__name__}: {error}"
        counted = not _is_nobodys_fault(error)
        if not counted and not isinstance(error, ShutDown | BatcherClosed):
            self._rest.take(told)
        await self._give_back([delivery], told, counted=counted)

    # --- what is held

    def _stored(self, store: asyncio.Future[None]) -> None:
        self._stores.discard(store)
        if not store.cancelled() and store.exception() is not None:
            logger.warning("an answer could not be stored, and will be asked for again: %s", store.exception())

    async def _store(self, results: list[tuple[Delivery, bytes]]) -> list[None]:
        try:
            await self._spool.finish(results)
        finally:
            for delivery, _ in results:
                self._held.pop(delivery.item.name.key, None)
        self._count(answered=len(results))
        return [None] * len(results)

    async def _give_back(self, deliveries: list[Delivery], error: str, *, counted: bool) -> None:
        if not deliveries:
            return
        try:
            await self._spool.give_back(deliveries, error=error, counted=counted)
        except StorageError as problem:
            logger.warning("requests could not be given back, and are free when their leases run out: %s", problem)
        finally:
            for delivery in deliveries:
                self._held.pop(delivery.item.name.key, None)
        self._count(**{"failed" if counted else "returned": len(deliveries)})

    def _count(self, *, answered: int = 0, failed: int = 0, returned: int = 0) -> None:
        done = self.done
        done.answered += answered
        done.failed += failed
        done.returned += returned
        if self._progress is not None:
            self._progress(done)

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.sleep(self._lease / RENEWALS)
            try:
                await self._spool.renew(list(self._held.values()), lease=self._lease)
            except StorageError as error:
                logger.warning("leases could not be renewed, others may take what is under way here: %s", error)


def _is_nobodys_fault(error: BaseException) -> bool:
    """Return whether *error* says nothing about the request that it ended."""
    if isinstance(error, StatusError) and error.status in _NOBODYS_FAULT:
        return True
    return isinstance(error, ConnectFailed | AuthFailed | QuotaExhausted | RateLimited | ShutDown | BatcherClosed)
