"""The jobs that a worker has at a provider: recorded, made, looked after, read and forgotten."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import msgspec

from microbatch.errors import BadRequest, RateLimited, RequestFailed, StorageError
from microbatch.spool.provider.api import is_ambiguous
from microbatch.spool.provider.input_file import Content
from microbatch.spool.records import Job

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from microbatch.spool.provider.api import BatchApi, RemoteBatch
    from microbatch.spool.provider.input_file import Draft
    from microbatch.spool.provider.output_file import Reader
    from microbatch.spool.provider.replies import Results
    from microbatch.spool.records import Delivery, Spool

logger = logging.getLogger("microbatch")

T = TypeVar("T")

TOKEN: Final = "microbatch_job"  # noqa: S105 a name, and no secret
"""Under which the token of a job stands in the metadata of its batch."""

PATIENCE: Final = 3 * 86_400.0
"""Seconds after which a batch that the provider no longer knows is given up: batches take a day."""

MAX_LESSONS: Final = 8
"""Jobs in a row whose lines may be refused for what the endpoint turns out not to support, or in which no line is answered for
reasons that may be the endpoint's, before the requests are to blame."""

AT_ONCE: Final = 1_000
"""Most requests in one transaction of the spool."""

_SKEW: Final = 3_600.0  # seconds by which the provider's clock and ours may differ
_NOT_FOUND: Final = 404


class Counts(Protocol):
    """Takes the figures."""

    def __call__(self, *, answered: int = 0, failed: int = 0, returned: int = 0) -> None:
        """Count requests: answered, put back as counted, put back as if they had not been taken."""
        ...


class Held:
    """A job that this worker takes care of.

    Attributes:
        token: Its name.
        content: What was recorded.
        batch_id: Its batch, or None as long as none is known.
        recorded: Whether the spool knows that batch.
        file_id: Its file, if it is known to have been uploaded.
        attempted: Whether there may be a batch though none is known.
    """

    def __init__(self, job: Job, content: Content, *, attempted: bool) -> None:
        self.token = job.token
        self.content = content
        self.batch_id = job.batch_id
        self.recorded = job.batch_id is not None
        self.file_id: str | None = None
        self.attempted = attempted
        self._raw = job.content

    @property
    def job(self) -> Job:
        """The job as the spool keeps it."""
        return Job(self.token, self._raw, self.batch_id)

    def __repr__(self) -> str:
        """Tell which job it is."""
        return f"Held({self.token}, batch_id={self.batch_id!r})"


class Ended(msgspec.Struct, frozen=True):
    """How a job ended.

    Attributes:
        batch: Its batch.
        requests: How many waited for it.
        results: What it came to.
    """

    batch: RemoteBatch
    requests: int
    results: Results


class Jobs:
    """Takes care of jobs.

    Args:
        spool: Where they are recorded.
        api: Where their batches are.
        reader: Reads what these come to.
        count: Takes the figures.

    Attributes:
        held: The jobs that are taken care of here, by their tokens.
    """

    def __init__(self, spool: Spool, api: BatchApi, reader: Reader, count: Counts) -> None:
        self.held: dict[str, Held] = {}
        self._spool = spool
        self._api = api
        self._reader = reader
        self._count = count
        self._lessons = 0
        self._fruitless = 0  # jobs in a row without an answer

    async def begin(self, draft: Draft, *, lease: float) -> Held:
        """Record a job: from here on it is not forgotten, whatever happens."""
        content = await draft.content(_now())
        job = Job(draft.token, content.encode())
        await self._spool.begin_job(job, draft.deliveries, lease=lease)
        held = self.held[job.token] = Held(job, content, attempted=False)
        return held

    async def adopt(self, most: int, *, lease: float) -> None:
        """Take over jobs that nobody takes care of any more."""
        for job in await self._spool.take_jobs(most, lease=lease):
            if job.token in self.held:
                continue  # our own lease ran out, and now we have it again
            try:
                content = Content.decode(job.content)
            except StorageError as error:
                logger.exception("the batch job %s is given up", job.token)
                await self._spool.end_job(job.token, error=str(error))
            else:
                self.held[job.token] = Held(job, content, attempted=True)

    async def launch(self, held: Held) -> None:
        """Make the batch of a job, or find it if it was made.

        Raises:
            RequestFailed: The provider refused, and the job is given up; or it is not known whether it has a batch, and
                `look_after` goes on from there.
        """
        batch = await self._find(held) if held.attempted else None
        if batch is None:
            try:
                batch = await self._create(held)
            except RequestFailed as error:
                if not is_ambiguous(error) and not isinstance(error, RateLimited):
                    await self._withdraw(held, str(error))
                raise
        held.batch_id = batch.id
        await self._record(held)

    async def _create(self, held: Held) -> RemoteBatch:
        if held.file_id is None:
            held.file_id = await self._api.upload(f"microbatch-{held.token}.jsonl", await held.content.file())
        held.attempted = True
        return await self._api.create(held.file_id, {TOKEN: held.token})

    async def _find(self, held: Held) -> RemoteBatch | None:
        """Return the batch that has a job's token, or None if none has that was made since the job was begun."""
        after: str | None = None
        while True:
            page = await self._api.page(after)
            for batch in page.data:
                if (batch.metadata or {}).get(TOKEN) == held.token:
                    return batch
            if not page.data or not page.has_more or 0 < page.data[-1].created_at < held.content.begun_at - _SKEW:
                return None
            after = page.data[-1].id

    async def _record(self, held: Held) -> None:
        await self._spool.update_job(held.job)
        held.recorded = True

    async def _withdraw(self, held: Held, why: str) -> None:
        """Give up a job of which nothing is under way at the provider: its requests are not to blame."""
        await self._put_back(await self._spool.job_items(held.token), why, counted=False)
        await self._end(held, held.file_id)

    async def look_after(self, held: Held) -> Ended | None:
        """Do what can be done for a job now; return how it ended, None if it did not.

        Raises:
            RequestFailed: The provider could not be asked.
            StorageError: The spool failed; what could not be stored is read again the next time.
        """
        if held.batch_id is None:
            await self.launch(held)
            return None
        if not held.recorded:
            await self._record(held)
        try:
            batch = await self._api.get(held.batch_id)
        except BadRequest as error:
            if error.status == _NOT_FOUND and _now() > held.content.begun_at + PATIENCE:
                await self._withdraw(held, str(error))
            raise
        return await self._collect(held, batch) if batch.is_over else None

    async def _collect(self, held: Held, batch: RemoteBatch) -> Ended:
        """Store what a batch that is over has come to, and forget its job."""
        deliveries = await self._spool.job_items(held.token)
        tied = {delivery.item.name.key: delivery for delivery in deliveries}
        files = [await self._content(name) for name in (batch.output_file_id, batch.error_file_id) if name is not None]
        results = await self._reader.read(batch, held.content, tied, files)
        for answers in pieces(results.answers):
            await self._spool.finish(answers)
            self._count(answered=len(answers))
        for why, left in results.open.items():
            fruitless = why.doubtful and self._fruitless >= MAX_LESSONS
            counted = results.blames(why) or fruitless or (why.again and self._lessons >= MAX_LESSONS)
            await self._put_back(left, why.error, counted=counted)
        self._fruitless = 0 if results.answers else self._fruitless + 1
        self._lessons = self._lessons + 1 if results.learned else 0 if results.answers else self._lessons
        await self._end(held, batch.input_file_id)
        return Ended(batch, len(deliveries), results)

    async def _content(self, file_id: str) -> bytes:
        try:
            return await self._api.content(file_id)
        except BadRequest as error:
            if error.status != _NOT_FOUND:
                raise
            logger.error("the provider has lost the file %s of a batch", file_id)  # noqa: TRY400 known, and told in full
            return b""

    async def _end(self, held: Held, file_id: str | None) -> None:
        await self._spool.end_job(held.token, error="the batch job ended without an answer to this request")
        self.held.pop(held.token, None)
        if file_id is not None:
            try:
                await self._api.delete(file_id)
            except RequestFailed as error:
                logger.warning("the input of batch job %s could not be deleted: %s", held.token, error)

    async def _put_back(self, deliveries: Sequence[Delivery], error: str, *, counted: bool) -> None:
        for piece in pieces(deliveries):
            await self._spool.give_back(piece, error=error, counted=counted)
            self._count(**{"failed" if counted else "returned": len(piece)})


def pieces(all_: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield *all_* in pieces that are no burden for a transaction."""
    for start in range(0, len(all_), AT_ONCE):
        yield all_[start : start + AT_ONCE]


def _now() -> float:
    return time.time()  # noqa: TID251 jobs outlive processes
