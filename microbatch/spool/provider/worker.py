"""A worker that has requests answered by a provider's batch API: combined prompts, at half the price, within a day.

Theory of operation
-------------------
Requests are taken from the spool, one stage at a time, and make up a *job*: a file of combined prompts as OpenAI's batch lines. The
job is recorded in the spool, with its file and ids, before anything of it exists at the provider; from then on its requests are tied
to it, and the job is leased instead of them. Then the file is uploaded and the batch created, with the job's token in its metadata.

Whether the batch was created is unknown when the response is lost, or when the worker dies before it has recorded the batch's id. The
worker that holds the job then searches the provider's batches for the token before it creates another one. As the search comes some
time after the attempt (with the next poll, or after the lease of a dead worker), a request that was still under way can arrive.

A finished batch is read completely before anything is stored. Answers go into the spool; unanswered requests are given back: counted
if their line or their answer was at fault, so that they travel in half batches next and alone after that; uncounted if no request is
the cause, followed by a pause before new jobs. If the worker dies meanwhile, the next one reads the batch again, and finds only the
requests tied to the job that are still open.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio

from microbatch.errors import RequestFailed, StorageError
from microbatch.messages import Usage
from microbatch.policy import FlushPolicy, at_least, whole
from microbatch.spool.endpoint import Pause, wait
from microbatch.spool.provider.input_file import Composer
from microbatch.spool.provider.jobs import AT_ONCE, Jobs, pieces
from microbatch.spool.records import LEASE, Stage
from microbatch.spool.worker import PARTING, Done, renew_leases, run_with

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from microbatch.spool.provider.api import OpenAIBatchApi
    from microbatch.spool.provider.jobs import Held
    from microbatch.spool.provider.output_file import Pricing, Results
    from microbatch.spool.records import Delivery, Spool
    from microbatch.transports.batch_wire import BatchWire

logger = logging.getLogger("microbatch")

T = TypeVar("T")

POLL: Final = 30.0  # seconds between two looks at a batch
MAX_REQUESTS: Final = 20_000  # most requests of a job
MAX_JOBS: Final = 8  # most jobs that one worker has under way
LONGEST_PAUSE: Final = 600.0
"""Seconds of the longest pause without a new job after failures that no request caused; the first is as long as a poll."""


class Tally(Done):
    """Figures of a worker: also the jobs begun, the lines in them, and the reported usage with its price (None: unknown)."""

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
        policy: The size limits of one prompt; its other fields have no effect.
        price: Returns the price function of a model, at the usual price, of which batches cost half.
        canary: Whether each combined prompt ends in a canary.
        lease: Seconds for which requests and jobs are taken; renewed while `run` runs.
        poll_interval: Seconds between two looks at the batches under way, and into an empty spool.
        max_requests: Most requests of a job.
        max_jobs: Most jobs under way here.
        until_empty: End when the spool holds no unanswered requests, those of other workers included.
        progress: Called with the figures `done` whenever they change.

    Raises:
        ConfigError: A number is out of range.
    """

    def __init__(
        self,
        spool: Spool,
        api: OpenAIBatchApi,
        wire: BatchWire,
        *,
        policy: FlushPolicy | None = None,
        price: Pricing = lambda _model: None,
        canary: bool = False,
        lease: float = LEASE,
        poll_interval: float = POLL,
        max_requests: int = MAX_REQUESTS,
        max_jobs: int = MAX_JOBS,
        until_empty: bool = False,
        progress: Callable[[Tally], None] | None = None,
    ) -> None:
        at_least(0.001, lease=lease, poll_interval=poll_interval)
        whole(1, max_requests=max_requests, max_jobs=max_jobs)
        self.done = Tally(progress)
        self._spool = spool
        self._api = api
        self._composer = Composer(wire, policy or FlushPolicy(), canary=canary)
        self._jobs = Jobs(spool, api, wire, price, self.done)
        self._lease = lease
        self._poll_interval = poll_interval
        self._max_requests = self._most = max_requests
        self._max_jobs = max_jobs
        self._until_empty = until_empty
        self._turns = deque(Stage)
        self._taken: dict[str, Delivery] = {}
        self._stopping = asyncio.Event()
        self._pause = Pause("no new batch job", first=poll_interval, longest=LONGEST_PAUSE)

    def stop(self) -> None:
        """Begin nothing more; `run` returns soon. Batches under way continue, and the next worker reads them."""
        self._stopping.set()

    async def run(self) -> None:
        """Submit and poll until stopped, or until the spool is empty if that is wanted.

        At the end, and when cancelled, requests that were taken are given back uncounted, and jobs are free for others. A spool or a
        provider that fails is tried again after a pause.

        Raises:
            ConfigError: Requests name no model, and neither does the transport.
        """
        try:
            await run_with(self._work, partial(renew_leases, self._renew, self._lease))
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
                self._pause.begin(str(error))
            if not submitted:
                await wait(self._stopping, self._poll_interval)

    async def _renew(self) -> None:
        if self._taken:
            await self._spool.renew(list(self._taken.values()), lease=self._lease)
        if self._jobs.held:
            await self._spool.renew_jobs(list(self._jobs.held), lease=self._lease)

    async def _let_go(self) -> None:
        try:
            await self._give_back(list(self._taken.values()), "the worker has stopped", counted=False)
            if self._jobs.held:
                await self._spool.renew_jobs(list(self._jobs.held), lease=0.0)
        except StorageError as error:
            logger.warning("what was under way could not be given back, and is free when its leases expire: %s", error)
        self._jobs.held.clear()

    async def submit_some(self) -> bool:
        """Take requests from the spool and create batches of them; return whether there was anything to do.

        After an error requests that were taken are given back, or free when their leases expire; recorded jobs continue.

        Raises:
            ConfigError: Requests name no model, and neither does the transport.
            StorageError: The spool failed.
        """
        if len(self._jobs.held) >= self._max_jobs or self._pause.left:
            return False
        try:
            await self._take()
            drafts, rejected = await self._composer.drafts(list(self._taken.values()))
            for delivery, why in rejected:
                await self._give_back([delivery], why, counted=True)
            begun: list[Held] = []
            for draft in drafts:
                begun.append(await self._jobs.begin(draft, lease=self._lease))
                self._forget(draft.deliveries)
                self.done.jobs += 1
                self.done.lines += len(draft.lines)
                self.done.add()
        except Exception:
            with contextlib.suppress(StorageError):
                await self._give_back(list(self._taken.values()), "the worker failed", counted=False)
            raise
        for held in begun:
            await self._guarded(held, self._jobs.launch(held, new=True))
        return bool(begun or rejected)

    async def _take(self) -> None:
        """Take requests of one stage: suspects travel with suspects, even if they bring the worker down."""
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

    async def poll(self) -> bool:
        """Take the next step of all jobs, those left by dead workers included; return whether any of them has ended.

        After a `StorageError`, results that could not be stored are read again by the next poll.
        """
        await self._jobs.adopt(self._max_jobs, lease=self._lease)
        ended = False
        for held in list(self._jobs.held.values()):
            results = await self._guarded(held, self._jobs.look_after(held))
            if results is not None:
                ended = True
                self._learn(results)
        return ended

    async def _guarded(self, held: Held, step: Coroutine[Any, Any, T]) -> T | None:
        """Take a step of one job; if the provider fails, pause and return None."""
        try:
            return await step
        except RequestFailed as error:
            self._pause.begin(f"batch job {held.job.token}: {type(error).__name__}: {error}")
            return None

    def _learn(self, results: Results) -> None:
        """Adapt the size of jobs and the pause to how a job ended."""
        batch, done = results.batch, self.done
        if any(error.code == "token_limit_exceeded" for error in batch.complaints):
            # More than the provider lets wait at once; nothing of it was run.
            self._most = max(1, len(results.tied) // 2)
        elif batch.status == "completed":
            self._most = min(self._max_requests, 2 * self._most)
        if results.answers:
            self._pause.reset()
        if results.trouble is not None:
            self._pause.begin(results.trouble)
        done.usage += results.usage
        known = results.cost_usd is not None and done.cost_usd is not None
        done.cost_usd = (done.cost_usd or 0.0) + (results.cost_usd or 0.0) if known else None
        self.done.add()

    async def _give_back(self, deliveries: Sequence[Delivery], error: str, *, counted: bool) -> None:
        for piece in pieces(deliveries):
            await self._jobs.give_back(piece, error, counted=counted)
            self._forget(piece)

    def _forget(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self._taken.pop(delivery.item.name.key, None)
