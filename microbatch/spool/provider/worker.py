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

import contextlib
import logging
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from microbatch.checking import at_least, whole
from microbatch.errors import BadRequest, RateLimited, RequestFailed, StorageError
from microbatch.messages import Usage
from microbatch.policy import FlushPolicy
from microbatch.prompt.ids import IdKey
from microbatch.spool.endpoint import Cause, Pause, wait
from microbatch.spool.provider.api import is_ambiguous
from microbatch.spool.provider.input_file import Composer, Content
from microbatch.spool.provider.output_file import Results
from microbatch.spool.records import LEASE, Job, Stage
from microbatch.spool.worker import Done, SpoolWorker

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence

    from microbatch.spool.provider.api import OpenAIBatchApi, RemoteBatch
    from microbatch.spool.provider.input_file import Draft
    from microbatch.spool.provider.output_file import Pricing
    from microbatch.spool.records import Delivery, Spool
    from microbatch.transports.chat_wire import BatchWire

logger: Final = logging.getLogger("microbatch")

T = TypeVar("T")

POLL: Final = 30.0  # seconds between two looks at a batch
MAX_REQUESTS: Final = 20_000  # most requests of a job
MAX_JOBS: Final = 8  # most jobs that one worker has under way
AT_ONCE: Final = 1_000  # most requests in one transaction of the spool
LONGEST_PAUSE: Final = 600.0  # seconds of the longest pause without a new job; the first is as long as a poll
PATIENCE: Final = 3 * 86_400.0  # seconds after which a job is given up whose batch the provider does not know
TOKEN: Final = "microbatch_job"  # noqa: S105 key of a job's token in the metadata of its batch
MAX_LESSONS: Final = 8
"""Consecutive jobs with lines refused for unsupported features, or without any answer for reasons that may be the endpoint's, after
which such failures count for the requests."""

_SKEW: Final = 3_600.0  # seconds by which the provider's clock and ours may differ
_NOT_FOUND: Final = 404


class _Held(msgspec.Struct):
    """A job that this worker holds, as recorded in the spool, with its uploaded file if that is known."""

    job: Job
    content: Content
    file_id: str | None = None

    def __repr__(self) -> str:
        return f"_Held({self.job.token}, batch_id={self.job.batch_id!r})"  # without content


class Tally(Done):
    """Figures of a worker: also the jobs begun, the lines in them, and the reported usage with its price (None: unknown).

    `unpriced` counts the replies that reported tokens without a price; `cost_usd` is that of the others.
    """

    jobs: int = 0
    lines: int = 0
    usage: Usage = Usage()
    cost_usd: float | None = 0.0
    unpriced: int = 0


class ProviderBatches(SpoolWorker):
    """Has the requests of a spool answered by a provider's batch API; for the further arguments, see `SpoolWorker`.

    Args:
        api: The provider's files and batches.
        wire: Writes and reads the bodies of lines.
        policy: The size limits of one prompt; its other fields have no effect.
        price: Returns the price of a model, by the name in the reply and the one it was asked for. Its tier "batch" is charged, else
            half of the usual price.
        canary: Whether each combined prompt ends in a canary.
        id_secret: As for `Microbatcher`.
        poll_interval: Seconds between two looks at the batches under way, and into an empty spool.
        max_requests: Most requests of a job.
        max_jobs: Most jobs under way here.
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
        price: Pricing = lambda _model, _asked: None,
        canary: bool = False,
        id_secret: bytes | str | None = None,
        lease: float = LEASE,
        poll_interval: float = POLL,
        max_requests: int = MAX_REQUESTS,
        max_jobs: int = MAX_JOBS,
        until_empty: bool = False,
        progress: Callable[[Tally], None] | None = None,
    ) -> None:
        at_least(0.001, lease=lease, poll_interval=poll_interval)
        whole(1, max_requests=max_requests, max_jobs=max_jobs)
        pause = Pause("no new batch job", first=poll_interval, longest=LONGEST_PAUSE)
        super().__init__(spool, pause, lease=lease, until_empty=until_empty)
        self.done: Tally = Tally(progress)
        self._api = api
        self._composer = Composer(wire, policy or FlushPolicy(), canary=canary, key=IdKey(id_secret))
        self._results = partial(Results, wire=wire, price=price)
        self._poll_interval = poll_interval
        self._max_requests = self._most = max_requests
        self._max_jobs = max_jobs
        self._turns = deque(Stage)
        self._jobs: dict[str, _Held] = {}  # by token
        self._lessons = 0  # consecutive jobs after which lines are written differently
        self._fruitless = 0  # consecutive jobs without an answer

    async def _work(self) -> None:
        while not self._stopping.is_set():
            submitted = False
            try:
                submitted = await self.submit_some()
                await self.poll()
                if self._until_empty and not self._jobs and not (await self._spool.counts()).depth:
                    return
            except StorageError as error:
                self._pause.begin(str(error))
            if not submitted:
                await wait(self._stopping, self._poll_interval)

    async def _renew(self) -> None:
        await super()._renew()
        if self._jobs:
            await self._spool.renew_jobs(list(self._jobs), lease=self._lease)

    async def _let_go(self) -> None:
        try:
            await self._give_back(list(self._held.values()), "the worker has stopped", counted=False)
            if self._jobs:
                await self._spool.renew_jobs(list(self._jobs), lease=0.0)
        except StorageError as error:
            logger.warning("what was under way could not be given back, and is free when its leases expire: %s", error)
        self._jobs.clear()

    # --- new jobs

    async def submit_some(self) -> bool:
        """Take requests from the spool and create batches of them; return whether there was anything to do.

        After an error requests that were taken are given back, or free when their leases expire; recorded jobs continue.

        Raises:
            ConfigError: Requests name no model, and neither does the transport.
            StorageError: The spool failed.
        """
        if len(self._jobs) >= self._max_jobs or self._pause.left:
            return False
        try:
            await self._take()
            drafts, rejected = await self._composer.drafts(list(self._held.values()))
            for delivery, why in rejected:
                await self._give_back([delivery], why, counted=True)
            begun = [await self._begin(draft) for draft in drafts]
        except Exception:
            with contextlib.suppress(StorageError):
                await self._give_back(list(self._held.values()), "the worker failed", counted=False)
            raise
        for held in begun:
            await self._guarded(held, self._launch(held, new=True))
        return bool(begun or rejected)

    async def _take(self) -> None:
        """Take requests of one stage: suspects travel with suspects, even if they bring the worker down."""
        for _ in Stage:
            stage = self._turns[0]
            self._turns.rotate(-1)
            while len(self._held) < self._most:
                most = min(AT_ONCE, self._most - len(self._held))
                taken = await self._spool.take(stage, most, lease=self._lease)
                self._hold(taken)
                if len(taken) < most:
                    break
            if self._held:
                return

    async def _begin(self, draft: Draft) -> _Held:
        """Record a job in the spool, before anything is sent to the provider."""
        content = await draft.content(_now())
        job = Job(draft.token, content.encode())
        await self._spool.begin_job(job, draft.deliveries, lease=self._lease)
        held = self._jobs[job.token] = _Held(job, content)
        self._drop(draft.deliveries)
        self.done.jobs += 1
        self.done.lines += len(draft.lines)
        self.done.add()
        return held

    # --- jobs under way

    async def poll(self) -> bool:
        """Take the next step of all jobs, those left by dead workers included; return whether any of them has ended.

        After a `StorageError`, results that could not be stored are read again by the next poll.
        """
        await self._adopt()
        ended = False
        for held in list(self._jobs.values()):
            ended |= await self._guarded(held, self._look_after(held))
        return ended

    async def _adopt(self) -> None:
        """Take over jobs that no worker holds any more."""
        for job in await self._spool.take_jobs(self._max_jobs, lease=self._lease):
            if job.token in self._jobs:
                continue  # its lease had expired
            try:
                content = Content.decode(job.content)
            except StorageError as error:
                logger.exception("the batch job %s is given up", job.token)
                await self._spool.end_job(job.token, error=str(error))
            else:
                self._jobs[job.token] = _Held(job, content)

    async def _guarded(self, held: _Held, step: Coroutine[Any, Any, bool | None]) -> bool:
        """Take a step of one job, and return whether that has ended; if the provider fails, pause."""
        try:
            return bool(await step)
        except RequestFailed as error:
            self._pause.begin(f"batch job {held.job.token}: {type(error).__name__}: {error}")
            return False

    async def _look_after(self, held: _Held) -> bool:
        """Take the next step of a job; return whether it has ended."""
        batch_id = held.job.batch_id
        if batch_id is None:
            await self._launch(held, new=False)
            return False
        try:
            batch = await self._api.get(batch_id)
        except BadRequest as error:
            if error.status == _NOT_FOUND and _now() > held.content.begun_at + PATIENCE:
                await self._withdraw(held, str(error))
            raise
        if batch.is_over:
            await self._collect(held, batch)
        return batch.is_over

    async def _launch(self, held: _Held, *, new: bool) -> None:
        """Create the batch of a job; unless the job is *new*, look first whether it was created.

        If the provider refuses, give the job up; after another failure it may have a batch, which the next poll will look for.
        """
        token = held.job.token
        batch = None if new else await self._api.find(TOKEN, token, since=held.content.begun_at - _SKEW)
        if batch is None:
            try:
                if held.file_id is None:
                    held.file_id = await self._api.upload(f"microbatch-{token}.jsonl", await held.content.file())
                batch = await self._api.create(held.file_id, {TOKEN: token})
            except RequestFailed as error:
                if not is_ambiguous(error) and not isinstance(error, RateLimited):
                    await self._withdraw(held, str(error))
                raise
        job = msgspec.structs.replace(held.job, batch_id=batch.id)
        await self._spool.update_job(job)
        held.job = job

    async def _withdraw(self, held: _Held, why: str) -> None:
        """Give up a job that has no batch at the provider, and give its requests back uncounted."""
        await self._give_back(await self._spool.job_items(held.job.token), why, counted=False)
        await self._end(held, held.file_id)

    async def _collect(self, held: _Held, batch: RemoteBatch) -> None:
        """Store the results of a finished batch, and end its job."""
        tied = {delivery.item.name.key: delivery for delivery in await self._spool.job_items(held.job.token)}
        files = [await self._content(name) for name in (batch.output_file_id, batch.error_file_id) if name is not None]
        results = self._results(batch, held.content, tied)
        await results.read(files)
        for answers in _pieces(results.answers):
            await self._spool.finish(answers)
            self.done.add(answered=len(answers))
        for why, left in results.open.items():
            fruitless = why.cause is Cause.EITHER and self._fruitless >= MAX_LESSONS
            counted = results.blames(why) or fruitless or (why.again and self._lessons >= MAX_LESSONS)
            await self._give_back(left, why.error, counted=counted)
        self._fruitless = 0 if results.answers else self._fruitless + 1
        self._lessons = self._lessons + 1 if results.learned else 0 if results.answers else self._lessons
        await self._end(held, batch.input_file_id)
        self._learn(results)

    async def _content(self, file_id: str) -> bytes:
        try:
            return await self._api.content(file_id)
        except BadRequest as error:
            if error.status != _NOT_FOUND:
                raise
            logger.error("the provider has lost the file %s of a batch", file_id)  # noqa: TRY400 a known error
            return b""

    async def _end(self, held: _Held, file_id: str | None) -> None:
        await self._spool.end_job(held.job.token, error="the batch job ended without an answer to this request")
        self._jobs.pop(held.job.token, None)
        if file_id is not None:
            try:
                await self._api.delete(file_id)
            except RequestFailed as error:
                logger.warning("the input of batch job %s could not be deleted: %s", held.job.token, error)

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
        done.unpriced += results.unpriced
        if results.cost_usd is not None:
            done.cost_usd = (done.cost_usd or 0.0) + results.cost_usd
        elif results.unpriced and not done.cost_usd:
            done.cost_usd = None
        done.add()

    async def _give_back(self, deliveries: Sequence[Delivery], error: str, *, counted: bool) -> None:
        for piece in _pieces(deliveries):
            await self._spool.give_back(piece, error=error, counted=counted)
            self._drop(piece)
            self.done.add(**{"failed" if counted else "returned": len(piece)})


def _pieces(all_: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield *all_* in pieces of `AT_ONCE`, to keep transactions short."""
    for start in range(0, len(all_), AT_ONCE):
        yield all_[start : start + AT_ONCE]


def _now() -> float:
    return time.time()  # noqa: TID251 jobs outlive processes
