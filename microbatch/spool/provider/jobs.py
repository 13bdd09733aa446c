"""The life of a worker's batch jobs at a provider: recorded, created, polled, read and deleted."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from microbatch.errors import BadRequest, RateLimited, RequestFailed, StorageError
from microbatch.spool.endpoint import Cause
from microbatch.spool.provider.api import is_ambiguous
from microbatch.spool.provider.input_file import Content
from microbatch.spool.provider.output_file import Results
from microbatch.spool.records import Job

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from microbatch.spool.provider.api import OpenAIBatchApi, RemoteBatch
    from microbatch.spool.provider.input_file import Draft
    from microbatch.spool.provider.output_file import Pricing
    from microbatch.spool.records import Delivery, Spool
    from microbatch.spool.worker import Done
    from microbatch.transports.batch_wire import BatchWire

logger = logging.getLogger("microbatch")

T = TypeVar("T")

TOKEN: Final = "microbatch_job"  # noqa: S105 not a secret
"""Key of a job's token in the metadata of its batch."""

PATIENCE: Final = 3 * 86_400.0
"""Seconds after which a job is given up whose batch the provider does not know: batches take a day."""

MAX_LESSONS: Final = 8
"""Consecutive jobs with lines refused for unsupported features, or without any answer for reasons that may be the endpoint's, after
which such failures count for the requests."""

AT_ONCE: Final = 1_000  # most requests in one transaction of the spool
_SKEW: Final = 3_600.0  # seconds by which the provider's clock and ours may differ
_NOT_FOUND: Final = 404


class Held(msgspec.Struct):
    """A job that this worker holds, as recorded in the spool, with its uploaded file if that is known."""

    job: Job
    content: Content
    file_id: str | None = None

    def __repr__(self) -> str:
        return f"Held({self.job.token}, batch_id={self.job.batch_id!r})"  # without content


class Jobs:
    """Creates, polls and ends jobs.

    Attributes:
        held: The jobs held here, by token.
    """

    def __init__(self, spool: Spool, api: OpenAIBatchApi, wire: BatchWire, price: Pricing, done: Done) -> None:
        self.held: dict[str, Held] = {}
        self._spool = spool
        self._api = api
        self._results = partial(Results, wire=wire, price=price)
        self._done = done
        self._lessons = 0  # consecutive jobs after which lines are written differently
        self._fruitless = 0  # consecutive jobs without an answer

    async def begin(self, draft: Draft, *, lease: float) -> Held:
        """Record a job in the spool, before anything is sent to the provider."""
        content = await draft.content(_now())
        job = Job(draft.token, content.encode())
        await self._spool.begin_job(job, draft.deliveries, lease=lease)
        held = self.held[job.token] = Held(job, content)
        return held

    async def adopt(self, most: int, *, lease: float) -> None:
        """Take over jobs that no worker holds any more."""
        for job in await self._spool.take_jobs(most, lease=lease):
            if job.token in self.held:
                continue  # its lease had expired
            try:
                content = Content.decode(job.content)
            except StorageError as error:
                logger.exception("the batch job %s is given up", job.token)
                await self._spool.end_job(job.token, error=str(error))
            else:
                self.held[job.token] = Held(job, content)

    async def launch(self, held: Held, *, new: bool) -> None:
        """Create the batch of a job; unless the job is *new*, look first whether it was created.

        Raises:
            RequestFailed: The provider refused, and the job is given up; or it may have a batch, which `look_after` will look for.
        """
        batch = None if new else await self._find(held)
        if batch is None:
            try:
                batch = await self._create(held)
            except RequestFailed as error:
                if not is_ambiguous(error) and not isinstance(error, RateLimited):
                    await self._withdraw(held, str(error))
                raise
        job = msgspec.structs.replace(held.job, batch_id=batch.id)
        await self._spool.update_job(job)
        held.job = job

    async def _create(self, held: Held) -> RemoteBatch:
        if held.file_id is None:
            held.file_id = await self._api.upload(f"microbatch-{held.job.token}.jsonl", await held.content.file())
        return await self._api.create(held.file_id, {TOKEN: held.job.token})

    async def _find(self, held: Held) -> RemoteBatch | None:
        """Return the batch with a job's token among those created since the job was begun, or None."""
        after: str | None = None
        while True:
            page = await self._api.page(after)
            for batch in page.data:
                if (batch.metadata or {}).get(TOKEN) == held.job.token:
                    return batch
            if not page.data or not page.has_more or 0 < page.data[-1].created_at < held.content.begun_at - _SKEW:
                return None
            after = page.data[-1].id

    async def _withdraw(self, held: Held, why: str) -> None:
        """Give up a job that has no batch at the provider, and give its requests back uncounted."""
        await self.give_back(await self._spool.job_items(held.job.token), why, counted=False)
        await self._end(held, held.file_id)

    async def look_after(self, held: Held) -> Results | None:
        """Take the next step of a job; return its results, or None if it has not ended.

        After an error, `RequestFailed` or `StorageError`, it may be called again.
        """
        batch_id = held.job.batch_id
        if batch_id is None:
            await self.launch(held, new=False)
            return None
        try:
            batch = await self._api.get(batch_id)
        except BadRequest as error:
            if error.status == _NOT_FOUND and _now() > held.content.begun_at + PATIENCE:
                await self._withdraw(held, str(error))
            raise
        return await self._collect(held, batch) if batch.is_over else None

    async def _collect(self, held: Held, batch: RemoteBatch) -> Results:
        """Store the results of a finished batch, and end its job."""
        tied = {delivery.item.name.key: delivery for delivery in await self._spool.job_items(held.job.token)}
        files = [await self._content(name) for name in (batch.output_file_id, batch.error_file_id) if name is not None]
        results = self._results(batch, held.content, tied)
        await results.read(files)
        for answers in pieces(results.answers):
            await self._spool.finish(answers)
            self._done.add(answered=len(answers))
        for why, left in results.open.items():
            fruitless = why.cause is Cause.EITHER and self._fruitless >= MAX_LESSONS
            counted = results.blames(why) or fruitless or (why.again and self._lessons >= MAX_LESSONS)
            await self.give_back(left, why.error, counted=counted)
        self._fruitless = 0 if results.answers else self._fruitless + 1
        self._lessons = self._lessons + 1 if results.learned else 0 if results.answers else self._lessons
        await self._end(held, batch.input_file_id)
        return results

    async def give_back(self, deliveries: Sequence[Delivery], error: str, *, counted: bool) -> None:
        """Give *deliveries* back to the spool, in pieces."""
        for piece in pieces(deliveries):
            await self._spool.give_back(piece, error=error, counted=counted)
            self._done.add(**{"failed" if counted else "returned": len(piece)})

    async def _content(self, file_id: str) -> bytes:
        try:
            return await self._api.content(file_id)
        except BadRequest as error:
            if error.status != _NOT_FOUND:
                raise
            logger.error("the provider has lost the file %s of a batch", file_id)  # noqa: TRY400 a known error
            return b""

    async def _end(self, held: Held, file_id: str | None) -> None:
        await self._spool.end_job(held.job.token, error="the batch job ended without an answer to this request")
        self.held.pop(held.job.token, None)
        if file_id is not None:
            try:
                await self._api.delete(file_id)
            except RequestFailed as error:
                logger.warning("the input of batch job %s could not be deleted: %s", held.job.token, error)


def pieces(all_: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield *all_* in pieces of `AT_ONCE`, to keep transactions short."""
    for start in range(0, len(all_), AT_ONCE):
        yield all_[start : start + AT_ONCE]


def _now() -> float:
    return time.time()  # noqa: TID251 jobs outlive processes
