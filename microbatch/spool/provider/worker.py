"""A worker that has requests answered by a provider's batch API: combined prompts, at half the price, within a day.

Theory of operation
-------------------
Requests are taken from the spool, one stage at a time, and make up a *job*: a file of combined prompts, written as OpenAI's batch
lines. The job is recorded in the spool, file and ids and all, before anything of it exists at the provider; from then on its requests
are tied to it, and it is the job that is leased. Then the file is uploaded and the batch made, with the job's token in its metadata.

So there is a moment in which nobody knows whether the batch was made: when the answer to making it is lost, or the worker dies before
it has recorded the batch's id. Whoever then takes care of the job looks the token up among the provider's batches before it makes
another one. That the look-up comes some time after the attempt (the next poll, or the end of a dead worker's lease) lets a request
that was still under way arrive.

A batch that is over is read to its end before anything is stored. Answers go into the spool; what has none is put back: as counted if
its line or its answer was at fault, so that it goes in half batches next and alone after that; as if it had not been taken if no
request is to blame, and then nothing new is sent for a while. If the worker dies in between, the next one reads the batch again, and
finds only those requests tied to the job that are still open.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import anyio
import msgspec

from microbatch.errors import RequestFailed, StorageError
from microbatch.messages import Usage
from microbatch.policy import FlushPolicy, at_least, whole
from microbatch.prompt.compose import draw_endings
from microbatch.spool.provider.input_file import Composer, Writes
from microbatch.spool.provider.jobs import AT_ONCE, Jobs, pieces
from microbatch.spool.provider.output_file import Reader
from microbatch.spool.provider.replies import Reads, Replies
from microbatch.spool.records import LEASE, Stage
from microbatch.spool.rest import PARTING, RENEWALS, Rest, wait

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from microbatch.spool.provider.api import BatchApi
    from microbatch.spool.provider.jobs import Ended, Held
    from microbatch.spool.provider.replies import Pricing
    from microbatch.spool.records import Delivery, Spool

logger = logging.getLogger("microbatch")

T = TypeVar("T")

POLL: Final = 30.0
"""Seconds between two looks at a batch."""

MAX_REQUESTS: Final = 20_000
"""Most requests of a job."""

MAX_JOBS: Final = 8
"""Most jobs that one worker has under way."""

LONGEST_REST: Final = 600.0
"""Most seconds without a new job after failures that are no request's fault; the first rest is as long as a poll."""


class Wire(Writes, Reads, Protocol):
    """What writes and reads the bodies of lines: see `BatchWire`."""


class Tally(msgspec.Struct):
    """What a worker has done so far.

    Attributes:
        answered: Requests whose answers it stored.
        failed: Requests put back because they failed; each counts as often as it did.
        returned: Requests put back for reasons that were not theirs.
        jobs: Jobs begun.
        lines: Prompts in them.
        usage: The tokens that the provider reported.
        cost_usd: What they cost, in US dollars; None once a price is unknown.
    """

    answered: int = 0
    failed: int = 0
    returned: int = 0
    jobs: int = 0
    lines: int = 0
    usage: Usage = Usage()
    cost_usd: float | None = 0.0


class ProviderBatches:
    """Drains a spool through a provider's batch API.

    Args:
        spool: The spool, open.
        api: The provider's files and batches.
        wire: Writes and reads the bodies of lines.
        policy: How much one prompt may hold; nothing else of it concerns batches.
        price: What prices a model's usage, at the usual price, of which batches cost half.
        count: Counts a text's tokens; None takes its bytes, which bound them, so that prompts are smaller than they might be.
        canary: Whether each combined prompt ends in an item whose only right answer is a random word; a reply that gets it wrong is
            distrusted as a whole.
        lease: Seconds for which requests and jobs are taken; renewed while `run` runs.
        poll_interval: Seconds between two looks at the batches that are under way, and into an empty spool.
        max_requests: Most requests of a job.
        max_jobs: Most jobs under way here.
        until_empty: End when nothing is left in the spool, not even in the hands of other workers; else go on for ever.
        progress: Called with the figures so far whenever they change.
        draw: Where id endings come from.

    Attributes:
        done: What was done so far.

    Raises:
        ConfigError: A number is out of range.
    """

    def __init__(
        self,
        spool: Spool,
        api: BatchApi,
        wire: Wire,
        *,
        policy: FlushPolicy | None = None,
        price: Pricing = lambda _model: None,
        count: Callable[[str], int] | None = None,
        canary: bool = False,
        lease: float = LEASE,
        poll_interval: float = POLL,
        max_requests: int = MAX_REQUESTS,
        max_jobs: int = MAX_JOBS,
        until_empty: bool = False,
        progress: Callable[[Tally], None] | None = None,
        draw: Callable[[int], Sequence[str]] = draw_endings,
    ) -> None:
        at_least(0.001, lease=lease, poll_interval=poll_interval)
        whole(1, max_requests=max_requests, max_jobs=max_jobs)
        self.done = Tally()
        self._spool = spool
        self._api = api
        self._composer = Composer(wire, policy or FlushPolicy(), count=count, canary=canary, draw=draw)
        self._jobs = Jobs(spool, api, Reader(Replies(wire, price, count)), self._count)
        self._lease = lease
        self._poll_interval = poll_interval
        self._max_requests = self._most = max_requests
        self._max_jobs = max_jobs
        self._until_empty = until_empty
        self._progress = progress
        self._turns = deque(Stage)
        self._taken: dict[str, Delivery] = {}
        self._stopping = asyncio.Event()
        self._rest = Rest("no new batch job", first=poll_interval, longest=LONGEST_REST)

    # --- the loop

    def stop(self) -> None:
        """Begin nothing more; `run` returns soon. Batches that are under way stay so, and whoever runs next reads them."""
        self._stopping.set()

    async def run(self) -> None:
        """Submit and poll until stopped, or until the spool is empty if that is wanted.

        In the end, and when cancelled, what was taken is given back as if it had not been, and jobs are free for others. A spool
        or a provider that cannot be used is tried again after a rest.

        Raises:
            ConfigError: Requests name no model, and neither does the transport.
        """
        failure: Exception | None = None
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._keep_leases)
                try:
                    await self._work()
                except Exception as error:  # noqa: BLE001 raised below: out of the group it would come as one
                    failure = error
                tasks.cancel_scope.cancel()
            if failure is not None:
                raise failure
        finally:
            with anyio.move_on_after(PARTING, shield=True):
                await self._let_go()

    async def _work(self) -> None:
        while not self._stopping.is_set():
            submitted = False
            try:
                submitted = await self.submit_some()
                await self.poll()
                if self._until_empty and not self._jobs.held and not (await self._spool.counts()).depth:
                    return
            except StorageError as error:
                self._rest.take(str(error))
            if not submitted:
                await wait(self._stopping, self._poll_interval)

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.sleep(self._lease / RENEWALS)
            try:
                await self._spool.renew(list(self._taken.values()), lease=self._lease)
                await self._spool.renew_jobs(list(self._jobs.held), lease=self._lease)
            except StorageError as error:
                logger.warning("leases could not be renewed, others may take what is under way here: %s", error)

    async def _let_go(self) -> None:
        try:
            await self._put_back(list(self._taken.values()), "the worker has stopped", counted=False)
            await self._spool.renew_jobs(list(self._jobs.held), lease=0.0)
        except StorageError as error:
            logger.warning("what was under way could not be given back, and is free when its leases run out: %s", error)
        self._jobs.held.clear()

    # --- to the provider

    async def submit_some(self) -> bool:
        """Take requests from the spool and make batches of them; return whether there was anything to do.

        Raises:
            ConfigError: Requests name no model, and neither does the transport; they are put back.
            StorageError: The spool failed. What was taken is put back, or free when its lease runs out; jobs that were recorded go on.
        """
        if len(self._jobs.held) >= self._max_jobs or self._rest.on:
            return False
        try:
            await self._take()
            drafts, rejected = await self._composer.drafts(list(self._taken.values()))
            for one in rejected:
                await self._put_back([one.delivery], one.error, counted=True)
            begun: list[Held] = []
            for draft in drafts:
                begun.append(await self._jobs.begin(draft, lease=self._lease))
                for delivery in draft.deliveries:
                    self._taken.pop(delivery.item.name.key, None)
                self.done.jobs += 1
                self.done.lines += len(draft.lines)
                self._count()
        except Exception:
            with contextlib.suppress(StorageError):
                await self._put_back(list(self._taken.values()), "the worker failed", counted=False)
            raise
        for held in begun:
            await self._guarded(held, self._jobs.launch(held))
        return bool(begun or rejected)

    async def _take(self) -> None:
        """Take requests of one stage. Suspects travel with suspects, even if it is the worker that they bring down."""
        for _ in Stage:
            stage = self._turns[0]
            self._turns.rotate(-1)
            while len(self._taken) < self._most:
                most = min(AT_ONCE, self._most - len(self._taken))
                taken = await self._spool.take(stage, most, lease=self._lease)
                self._taken.update((delivery.item.name.key, delivery) for delivery in taken)
                if len(taken) < most:
                    break
            if self._taken:
                return

    # --- and back

    async def poll(self) -> bool:
        """Look after all jobs, those left by dead workers included; return whether any of them has ended.

        Raises:
            StorageError: The spool failed; what could not be stored now is read again by the next poll.
        """
        await self._jobs.adopt(self._max_jobs, lease=self._lease)
        ended = False
        for held in list(self._jobs.held.values()):
            end = await self._guarded(held, self._jobs.look_after(held))
            if end is not None:
                ended = True
                self._learn(end)
        return ended

    async def _guarded(self, held: Held, step: Coroutine[Any, Any, T]) -> T | None:
        """Take a step for one job; others have theirs even if the provider fails."""
        try:
            return await step
        except RequestFailed as error:
            self._rest.take(f"batch job {held.token}: {type(error).__name__}: {error}")
            return None

    def _learn(self, end: Ended) -> None:
        """Draw conclusions from how a job ended."""
        if any(error.code == "token_limit_exceeded" for error in end.batch.complaints):
            # More than the provider lets wait at once; nothing of it was run.
            self._most = max(1, end.requests // 2)
        elif end.batch.status == "completed":
            self._most = min(self._max_requests, 2 * self._most)
        results, done = end.results, self.done
        if results.answers:
            self._rest.end()
        if results.trouble is not None:
            self._rest.take(results.trouble)
        done.usage += results.usage
        known = results.cost_usd is not None and done.cost_usd is not None
        done.cost_usd = (done.cost_usd or 0.0) + (results.cost_usd or 0.0) if known else None
        self._count()

    # --- what was taken

    async def _put_back(self, deliveries: Sequence[Delivery], error: str, *, counted: bool) -> None:
        for piece in pieces(deliveries):
            await self._spool.give_back(piece, error=error, counted=counted)
            for delivery in piece:
                self._taken.pop(delivery.item.name.key, None)
            self._count(**{"failed" if counted else "returned": len(piece)})

    def _count(self, *, answered: int = 0, failed: int = 0, returned: int = 0) -> None:
        self.done.answered += answered
        self.done.failed += failed
        self.done.returned += returned
        if self._progress is not None:
            self._progress(self.done)
