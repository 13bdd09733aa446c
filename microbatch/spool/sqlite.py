"""A spool in an SQLite file: it outlives every process, and several may use it at once."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Concatenate, Final, ParamSpec, TypeVar

from microbatch.policy import at_least, whole
from microbatch.spool import sqlite_steps as steps
from microbatch.spool.records import KEEP, MAX_ALONE, as_kept
from microbatch.storage.sqlite import Database

if TYPE_CHECKING:
    import os
    import sqlite3
    from collections.abc import AsyncIterator, Callable, Sequence

    from microbatch.spool.records import Counts, DeadLetter, Delivery, Found, Item, Job, Kept, Name, PutOutcome, Stage

P = ParamSpec("P")
T = TypeVar("T")

_BUSY: Final = 30.0  # seconds; a request is not lost because others are many


class SQLiteSpool:
    """A durable queue in a file. Each call is one transaction, on the disk when the call returns.

    Requests of a stage are taken in the order in which they were put, whatever became of them meanwhile. Leases run by the wall
    clock, so processes on several machines need clocks that agree; several machines should rather use `RedisSpool`, as SQLite's
    locks cannot be trusted on network file systems.

    Args:
        path: The file; it is made if it is missing, and readable by its owner only.
        keep: Seconds that answers are kept; later writes drop them in small portions.
        max_alone: Deliveries alone after which a request is dead.

    Raises:
        ConfigError: A limit is below its minimum.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep: float = KEEP, max_alone: int = MAX_ALONE) -> None:
        at_least(0, keep=keep)
        whole(1, max_alone=max_alone)
        self._keep = keep
        self._max_alone = max_alone
        self._database = Database(path, steps.SCHEMA, kind="spool", version=1, durable=True, busy=_BUSY)
        self._now = time.time  # noqa: TID251 requests outlive the process

    async def open(self) -> None:
        """Open the file.

        Raises:
            ConfigError: It cannot be opened, is no database, or is another's.
        """
        await self._database.open()

    async def aclose(self) -> None:
        """Finish what is under way and close the file."""
        await self._database.aclose()

    async def _write(
        self, step: Callable[Concatenate[sqlite3.Connection, float, P], T], *args: P.args, **options: P.kwargs
    ) -> T:
        # The time is that of the transaction: who had to wait for others has the whole lease still.
        return await self._database.run(lambda db: step(db, self._now(), *args, **options))

    async def _read(
        self, step: Callable[Concatenate[sqlite3.Connection, float, P], T], *args: P.args, **options: P.kwargs
    ) -> T:
        return await self._database.read(lambda db: step(db, self._now(), *args, **options))

    # --- requests

    async def put(self, items: Sequence[Item]) -> list[PutOutcome]:
        """Queue *items*; once this returns they are on the disk. The first of several with one name counts."""
        return await self._write(steps.put, items) if items else []

    async def take(self, stage: Stage, most: int, *, lease: float) -> list[Delivery]:
        """Take up to *most* requests of *stage* for *lease* seconds, in the order in which they were put."""
        return await self._write(steps.take, stage, most, lease=lease, max_alone=self._max_alone)

    async def renew(self, deliveries: Sequence[Delivery], *, lease: float) -> None:
        """Hold *deliveries* for *lease* seconds from now; those that others may have by now are passed over."""
        if deliveries:
            await self._write(steps.renew, _held(deliveries), lease=lease)

    async def finish(self, results: Sequence[tuple[Delivery, bytes]]) -> None:
        """Store the results and acknowledge the requests, in one transaction; the first result of a request stays."""
        if results:
            rows = [(delivery.item.name.key, delivery.item.digest, result) for delivery, result in results]
            await self._write(steps.finish, rows, keep=self._keep)

    async def give_back(self, deliveries: Sequence[Delivery], *, error: str, counted: bool) -> None:
        """Put requests back that were not answered: on their next stage if *counted*, else where they were."""
        if deliveries:
            await self._write(
                steps.give_back,
                _held(deliveries),
                error=as_kept(error),
                counted=counted,
                max_alone=self._max_alone,
            )

    # --- looking

    async def find(self, names: Sequence[Name]) -> list[Found]:
        """Return what is known of each of *names*."""
        return await self._read(steps.find, [name.key for name in names]) if names else []

    async def counts(self) -> Counts:
        """Return how many requests are where."""
        return await self._read(steps.counts, max_alone=self._max_alone)

    async def export(self) -> AsyncIterator[Kept]:
        """Yield everything that is kept, in the order in which it was put."""
        last = 0
        while page := await self._read(steps.export, last):
            for last, kept in page:  # noqa: B007 the next page begins there
                yield kept

    # --- dead letters

    async def dead_letters(self) -> AsyncIterator[DeadLetter]:
        """Yield the dead letters, oldest first; those whose last lease has run out by now are among them."""
        await self._write(steps.pass_on_lost, self._max_alone)
        after = 0.0, 0
        while page := await self._read(steps.dead_letters, after):
            for number, letter in page:
                after = letter.died_at, number
                yield letter

    async def requeue(self, names: Sequence[Name] | None = None) -> int:
        """Queue dead letters anew, as if they had never been delivered: those of *names*, or all; return how many."""
        keys = None if names is None else [name.key for name in names]
        return await self._write(steps.requeue, keys, max_alone=self._max_alone)

    # --- batch jobs at the provider

    async def begin_job(self, job: Job, deliveries: Sequence[Delivery], *, lease: float) -> None:
        """Record *job*, held for *lease* seconds, and tie *deliveries* to it; those that others may have by now are passed over."""
        await self._write(steps.begin_job, job, _held(deliveries), lease=lease)

    async def update_job(self, job: Job) -> None:
        """Record what is known of *job* by now; nothing, if it has ended."""
        await self._write(steps.update_job, job)

    async def take_jobs(self, most: int, *, lease: float) -> list[Job]:
        """Take up to *most* jobs that nobody holds, for *lease* seconds."""
        return await self._write(steps.take_jobs, most, lease=lease)

    async def renew_jobs(self, tokens: Sequence[str], *, lease: float) -> None:
        """Hold jobs for *lease* seconds from now."""
        if tokens:
            await self._write(steps.renew_jobs, tokens, lease=lease)

    async def job_items(self, token: str) -> list[Delivery]:
        """Return the requests that are still tied to a job, in the order in which they were put."""
        return await self._read(steps.job_items, token)

    async def end_job(self, token: str, *, error: str) -> None:
        """Forget a job. Requests still tied to it are given back as counted, with *error*."""
        await self._write(steps.end_job, token, error=as_kept(error), max_alone=self._max_alone)


def _held(deliveries: Sequence[Delivery]) -> steps.Held:
    return [(delivery.item.name.key, delivery.lease) for delivery in deliveries]
