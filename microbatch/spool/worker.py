"""A worker: takes requests from a spool, has them answered in combined prompts, and stores the answers.

Theory of operation
-------------------
A worker serves one stage at a time: full batches, then half batches, then requests alone, one by one. Requests in a later stage are
suspects, as a worker that held them failed or died: they are sent only when nothing else is under way here, so that if they bring
this worker down as well, they take no other request along. A stage that always has something to do gives way after a while.

Every request that was taken is *held* until its answer is stored or it is given back; until then its lease is renewed. If the worker
dies, the lease expires and others take the request. Storing an answer twice does no harm: the first one stays.

After an error that no request caused (the endpoint cannot be reached, the key is refused, there are too many requests) requests are
given back uncounted, and the worker pauses before it takes more.

The cause of many errors is uncertain: an endpoint in trouble answers 500, and so does one that fails on a certain request. Such a
request is *doubtful*: it is held until it is known whether the endpoint answers others. To find out, the worker sends again a request
that was answered before (the *control*); if that is answered, the doubtful requests are the cause. Before its first answer a worker
attributes no failure to a request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final, Protocol

import anyio
import msgspec

from microbatch.errors import BatcherClosed, ConfigError, ShutDown, StorageError
from microbatch.spool.endpoint import FIRST_PAUSE, LONGEST_PAUSE, Cause, Pause, cause_of, is_refusal, wait
from microbatch.spool.payload import Answer, Payload
from microbatch.spool.records import LEASE, Stage
from microbatch.storage.coalescer import Coalescer
from microbatch.transience import Backoff

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping

    from microbatch.messages import Request, Result
    from microbatch.spool.records import Delivery, Spool

logger: Final = logging.getLogger("microbatch")

MOST_AT_ONCE: Final = 256  # most requests taken from the spool in one step
PARTING: Final = 5.0  # seconds in which a cancelled worker gives back what it holds
FIRST_LOOK: Final = 0.05
RAREST_LOOK: Final = 1.0  # seconds between two looks into an empty spool, doubling from the one to the other
TURN: Final = 30.0  # seconds after which a stage that always has something to do gives way to the next
NO_MODEL: Final = (
    "requests in the spool name no model: give the worker one with --model NAME; they are left as they were"
)


class Asks(Protocol):
    """Has requests answered: see `Microbatcher.map`."""

    def map(
        self,
        requests: Iterable[Request] | AsyncIterator[Request],
        *,
        max_pending: int | None = None,
        ordered: bool = False,
    ) -> AsyncIterator[Result[Any]]:
        """Yield a result for each of *requests*."""
        ...


class Done(msgspec.Struct):
    """Figures of a worker: requests whose answers it stored, and those given back because they failed, or for other reasons.

    *report* is called with the figures whenever they change.
    """

    report: Callable[[Any], None] | None = None
    answered: int = 0
    failed: int = 0
    returned: int = 0

    def add(self, *, answered: int = 0, failed: int = 0, returned: int = 0) -> None:
        """Add to the figures."""
        self.answered += answered
        self.failed += failed
        self.returned += returned
        if self.report is not None:
            self.report(self)


class SpoolWorker(ABC):
    """Base of what drains a spool: it holds requests under leases, renews these, and gives back at the end what it still holds.

    Args:
        spool: The spool, open.
        pause: The pause after failures that no request caused.
        lease: Seconds for which requests are taken.
        until_empty: End when the spool holds no unanswered requests, those of other workers included.
    """

    _services: tuple[Callable[[], Coroutine[Any, Any, None]], ...] = ()  # what runs while it works

    def __init__(self, spool: Spool, pause: Pause, *, lease: float, until_empty: bool) -> None:
        self._spool = spool
        self._pause = pause
        self._lease = lease
        self._until_empty = until_empty
        self._held: dict[str, Delivery] = {}
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Take no more requests; `run` returns when calls under way have ended. A provider's batches continue without it."""
        self._stopping.set()

    async def run(self) -> None:
        """Work until stopped, or until the spool is empty if that is wanted.

        At the end, and when cancelled, what is still held is given back uncounted. A spool or an endpoint that fails is tried again
        after a pause.

        Raises:
            ConfigError: A request names no model, and no model is configured.
        """
        failure: Exception | None = None  # raised as it is, not in an exception group
        try:
            async with anyio.create_task_group() as tasks:
                for service in (self._renew_leases, *self._services):
                    tasks.start_soon(service)
                await asyncio.sleep(0)  # so that they have begun
                try:
                    await self._work()
                except Exception as error:  # noqa: BLE001 raised below
                    failure = error
                tasks.cancel_scope.cancel()
        finally:
            with anyio.move_on_after(PARTING, shield=True):
                await self._let_go()
        if failure is not None:
            raise failure

    @abstractmethod
    async def _work(self) -> None: ...

    @abstractmethod
    async def _let_go(self) -> None: ...

    async def _renew_leases(self) -> None:
        while True:
            await asyncio.sleep(self._lease / 3)  # so that one renewal may fail
            try:
                await self._renew()
            except StorageError as error:
                logger.warning("leases could not be renewed, others may take what is under way here: %s", error)

    async def _renew(self) -> None:
        if self._held:
            await self._spool.renew(list(self._held.values()), lease=self._lease)

    def _hold(self, deliveries: Iterable[Delivery]) -> None:
        self._held.update((delivery.item.name.key, delivery) for delivery in deliveries)

    def _drop(self, deliveries: Iterable[Delivery]) -> None:
        for delivery in deliveries:
            self._held.pop(delivery.item.name.key, None)


class Worker(SpoolWorker):
    """Has the requests of a spool answered by batchers; for the further arguments, see `SpoolWorker`.

    Args:
        batchers: For each stage, what answers its requests, and how many may be pending there. That of `Stage.ALONE` sends every
            request by itself.
        needs_model: Whether only a request itself can name a model.
        prober: Answers the control; None for the batcher of `Stage.ALONE`.
        progress: Called with the figures `done` whenever they change.

    Attributes:
        refused: The message of an error that refused the key or the account before anything was answered, after which `run` returns.
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
        pause = Pause("the worker pauses", first=FIRST_PAUSE, longest=LONGEST_PAUSE)
        super().__init__(spool, pause, lease=lease, until_empty=until_empty)
        self.done: Done = Done(progress)
        self.refused: str | None = None
        self._batchers = batchers
        self._needs_model = needs_model
        self._prober = prober or batchers[Stage.ALONE][0]
        self._doubtful: list[tuple[Delivery, str]] = []
        self._control: Request | None = None
        self._stores: set[asyncio.Future[None]] = set()
        self._storing: Coalescer[tuple[Delivery, bytes], None] = Coalescer(self._store, max_trips=1)
        self._services = (self._storing.serve,)

    async def _work(self) -> None:
        looks = Backoff(FIRST_LOOK, RAREST_LOOK)
        while not self._stopping.is_set():
            served = [await self._serve(stage) for stage in Stage]
            if any(served):
                looks.reset()
            elif self._until_empty and await self._is_empty():
                return
            else:
                await wait(self._stopping, looks.next())

    async def _is_empty(self) -> bool:
        try:
            return not (await self._spool.counts()).depth
        except StorageError as error:
            self._pause.begin(str(error))
            return False

    async def _serve(self, stage: Stage) -> bool:
        """Serve *stage* until it has nothing more to do, or its turn is over; return whether it had anything."""
        batcher, most = self._batchers[stage]
        served = False
        try:
            async for result in batcher.map(self._requests(stage, most), max_pending=most):
                served = True
                delivery = self._held.get(result.id or "")
                if delivery is not None:
                    await self._take_result(delivery, result)
                    if self._control is not None or len(self._doubtful) == len(self._held):
                        await self._decide()
            await self._decide()
        except Exception:
            await self._stored()  # the answers are paid for
            raise
        await self._stored()
        return served

    async def _stored(self) -> None:
        if self._stores:
            await asyncio.wait(self._stores)

    async def _requests(self, stage: Stage, most: int) -> AsyncIterator[Request]:
        """Yield the requests of *stage*. While some are under way, wait for more."""
        loop = asyncio.get_running_loop()
        end = loop.time() + TURN
        looks = Backoff(FIRST_LOOK, RAREST_LOOK)
        while not self._stopping.is_set() and loop.time() < end:
            taken = await self._take(stage, most)
            self._hold(taken)
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
                looks.reset()
            elif not self._held:
                return
            else:
                await wait(self._stopping, looks.next())

    async def _take(self, stage: Stage, most: int) -> list[Delivery]:
        if self._pause.left or self._doubtful:
            return []
        try:
            return await self._spool.take(stage, min(most, MOST_AT_ONCE), lease=self._lease)
        except StorageError as error:
            self._pause.begin(str(error))
            return []

    async def _take_result(self, delivery: Delivery, result: Result[Any]) -> None:
        if result.reply is not None:
            reply = await result.reply.settled()
            self._pause.reset()
            payload = Payload.decode(delivery.item.payload)
            self._control = msgspec.structs.replace(payload.request(delivery.item.name), use_cache=False)
            answer = Answer.of(reply, time.time(), is_json=payload.is_typed)  # noqa: TID251 answers outlive processes
            # Not awaited here: the next results come meanwhile, and share the next commit.
            store = self._storing.submit_detached((delivery, answer.encode()))
            self._stores.add(store)
            store.add_done_callback(self._stores.discard)
            return
        error = result.error or BatcherClosed("no reply")
        message, cause = f"{type(error).__name__}: {error}", cause_of(error)
        if cause is Cause.EITHER:
            self._doubtful.append((delivery, message))
            return
        if cause is Cause.ENDPOINT and not isinstance(error, ShutDown | BatcherClosed):
            self._pause.begin(message)
            if is_refusal(error) and self._control is None and self.refused is None:
                self.refused = message
                self.stop()
        await self._give_back([delivery], message, counted=cause is Cause.REQUEST)

    async def _decide(self) -> None:
        """Give doubtful requests back: counted if the endpoint answers others, otherwise uncounted."""
        doubtful, self._doubtful = self._doubtful, []
        if not doubtful:
            return
        counted = not self._pause.left and bool(await self.probe())
        if not counted:
            self._pause.begin(doubtful[-1][1])
        for delivery, message in doubtful:
            await self._give_back([delivery], message, counted=counted)

    async def probe(self) -> bool | None:
        """Return whether the endpoint answers the control; None if there is none yet."""
        if self._control is None:
            return None
        errors = [result.error async for result in self._prober.map([self._control])]
        return all(error is None or cause_of(error) is Cause.REQUEST for error in errors)

    async def _store(self, results: list[tuple[Delivery, bytes]]) -> list[None]:
        try:
            await self._spool.finish(results)
        except Exception as error:  # noqa: BLE001 the worker continues
            logger.warning("answers could not be stored, and will be asked for again (%d): %s", len(results), error)
        else:
            self.done.add(answered=len(results))
        self._drop(delivery for delivery, _ in results)  # not if cancelled: then they are given back
        return [None] * len(results)

    async def _give_back(self, deliveries: list[Delivery], error: str, *, counted: bool) -> None:
        if not deliveries:
            return
        try:
            await self._spool.give_back(deliveries, error=error, counted=counted)
        except StorageError as problem:
            logger.warning("requests could not be given back, and are free when their leases expire: %s", problem)
        self._drop(deliveries)
        self.done.add(**{"failed" if counted else "returned": len(deliveries)})

    async def _let_go(self) -> None:
        await self._give_back(list(self._held.values()), "the worker has stopped", counted=False)
