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

Many errors may be the fault of either: an endpoint in trouble answers 500, and so does one that trips over a certain request. Such a
request is *doubtful*: it is held until it is known whether the endpoint answers others. To find out, the worker asks again what was
answered before (the *control*); if that is answered, the request is to blame. A worker that has never had an answer blames nobody.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, Final, Protocol

import anyio
import msgspec

from microbatch.errors import BatcherClosed, ConfigError, ShutDown, StorageError
from microbatch.spool.endpoint import FIRST_REST, LONGEST_REST, Cause, cause_of, is_refusal
from microbatch.spool.payload import Answer, Payload
from microbatch.spool.records import LEASE, Stage
from microbatch.spool.rest import PARTING, RENEWALS, Rest, wait
from microbatch.storage.coalescer import Coalescer

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

NO_MODEL: Final = (
    "requests in the spool name no model: give the worker one with --model NAME; they are left as they were"
)


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
        needs_model: Whether nothing but a request itself names a model.
        prober: Has the control answered; None takes the batcher of `Stage.ALONE`.
        progress: Called with the figures so far after each request.

    Attributes:
        done: What it has done so far.
        refused: The error with which the key or the account was refused before anything was answered, in words; then `run` returns.
            None if that did not happen.
    """

    def __init__(
        self,
        spool: Spool,
        batchers: Mapping[Stage, tuple[Asks, int]],
        *,
        lease: float = LEASE,
        until_empty: bool = False,
        needs_model: bool = False,
        prober: Asks | None = None,
        progress: Callable[[Done], None] | None = None,
    ) -> None:
        self.done = Done()
        self.refused: str | None = None
        self._spool = spool
        self._batchers = batchers
        self._lease = lease
        self._until_empty = until_empty
        self._needs_model = needs_model
        self._prober = prober or batchers[Stage.ALONE][0]
        self._progress = progress
        self._held: dict[str, Delivery] = {}
        self._doubtful: list[tuple[Delivery, str]] = []
        self._control: Request | None = None
        self._stores: set[asyncio.Future[None]] = set()
        self._stopping = asyncio.Event()
        self._storing: Coalescer[tuple[Delivery, bytes], None] = Coalescer(self._store, max_trips=1)
        self._rest = Rest("the worker rests", first=FIRST_REST, longest=LONGEST_REST)

    def stop(self) -> None:
        """Take no more; `run` returns when all that is held has been answered or given back."""
        self._stopping.set()

    async def run(self) -> None:
        """Work until stopped, or until the spool is empty if that is wanted.

        When cancelled, what is held is given back as if it had not been taken. A spool that cannot be used is tried again after a
        rest, like an endpoint.

        Raises:
            ConfigError: A request names no model, and nothing else does.
        """
        failure: ConfigError | None = None
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._storing.serve)
                tasks.start_soon(self._keep_leases)
                await asyncio.sleep(0)  # so that both have begun
                try:
                    await self._work()
                except ConfigError as error:
                    failure = error  # out of the group it would come as one
                tasks.cancel_scope.cancel()
            if failure is not None:
                raise failure
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
                if self._control is not None or len(self._doubtful) == len(self._held):
                    await self._decide()
        await self._decide()
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
                    continue
                if self._needs_model and request.model is None:
                    raise ConfigError(NO_MODEL)
                yield request
            if taken:
                pause = FIRST_LOOK
            elif not self._held:
                return
            else:
                await wait(self._stopping, pause)
                pause = min(2 * pause, RAREST_LOOK)

    async def _take(self, stage: Stage, most: int) -> list[Delivery]:
        if self._rest.on or self._doubtful:
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
            payload = Payload.decode(delivery.item.payload)
            self._control = msgspec.structs.replace(payload.request(delivery.item.name), use_cache=False)
            is_json = payload.is_typed
            answer = Answer.of(reply, time.time(), is_json=is_json).encode()  # noqa: TID251 answers outlive processes
            # Not awaited here: the next results come meanwhile, and share the next commit.
            store = self._storing.submit((delivery, answer))
            self._stores.add(store)
            store.add_done_callback(self._stored)
            return
        error = result.error or BatcherClosed("no reply")
        told, cause = f"{type(error).__name__}: {error}", cause_of(error)
        if cause is Cause.EITHER:
            self._doubtful.append((delivery, told))
            return
        if cause is Cause.ENDPOINT and not isinstance(error, ShutDown | BatcherClosed):
            self._rest.take(told)
            if is_refusal(error) and self._control is None and self.refused is None:
                self.refused = told
                self.stop()
        await self._give_back([delivery], told, counted=cause is Cause.REQUEST)

    async def _decide(self) -> None:
        """Put doubtful requests back: as counted if the endpoint answers others, else as if they had not been taken."""
        doubtful, self._doubtful = self._doubtful, []
        if not doubtful:
            return
        counted = not self._rest.on and bool(await self.probe())
        if not counted:
            self._rest.take(doubtful[-1][1])
        for delivery, told in doubtful:
            await self._give_back([delivery], told, counted=counted)

    async def probe(self) -> bool | None:
        """Return whether the endpoint answers what it has answered before; None if that is nothing."""
        if self._control is None:
            return None
        results = [result async for result in self._prober.map(_only(self._control))]
        return all(result.error is None or cause_of(result.error) is Cause.REQUEST for result in results)

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


async def _only(request: Request) -> AsyncIterator[Request]:
    yield request
