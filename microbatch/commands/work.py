"""Asks about every line of a job's input: what all commands that ask do alike."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

from microbatch.accounting.stats import Stats
from microbatch.caching.warming import lasting
from microbatch.commands import console
from microbatch.commands.answers import NotWritten, error_object
from microbatch.commands.failures import Failures
from microbatch.commands.progress import Progress, make_bar
from microbatch.commands.reading import BadLine, requests
from microbatch.commands.stopping import stoppable
from microbatch.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from microbatch.commands.job import Job
    from microbatch.messages import Reply, Request, Result


class Work:
    """One pass over the input.

    Args:
        job: What is asked, and of whom.
        take: Takes an id and the reply, settled. If it raises `NotWritten`, `OSError` or `StorageError`, the work ends there.
        fail: Takes an id and what an output line says of the error; like `take`.
        done: Digests of the ids that are not asked about any more.
        ttl: Seconds for which the answers are good; None for the cache's own time.
        progress: Whether progress is shown; None if stderr is a terminal.

    Attributes:
        items: Lines to ask about, those that cannot be read included.
        answered: Those of them that were answered so far.
        failed: Those that got no answer.
        failures: What failed, and with what.
        stats: The batcher's figures in the end.
        wall_s: Seconds from the first question to the last answer.
        stopped: Whether a signal ended it.
        broken: What else ended it early, or None.
    """

    def __init__(
        self,
        job: Job,
        take: Callable[[str, Reply[Any]], None],
        fail: Callable[[str, dict[str, Any]], None],
        *,
        done: Collection[int] = (),
        ttl: float | None = None,
        progress: bool | None = None,
    ) -> None:
        self._job = job
        self._take = take
        self._fail = fail
        self._done = done
        self._ttl = ttl
        self._shows = sys.stderr.isatty() if progress is None else progress
        self._progress = Progress(None, Stats)
        self.items = job.survey.items - len(done)
        self.answered = 0
        self.failed = 0
        self.failures = Failures()
        self.stats = Stats()
        self.wall_s = 0.0
        self.stopped = False
        self.broken: Exception | None = None

    @property
    def status(self) -> int:
        """The exit status."""
        if self.stopped:
            return console.STOPPED
        return console.SOME_FAILED if self.failed or self.broken is not None else console.OK

    async def go(self) -> None:
        """Do it, until it is done, stopped or broken.

        Raises:
            ConfigError: The cache cannot be used; nothing was sent.
        """
        self.stopped = True
        with stoppable():
            try:
                await self._ask()
            except (NotWritten, OSError, StorageError) as error:  # the disk is full, or the input cannot be read on
                self.broken = error
            self.stopped = False

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        batcher = self._job.batcher()
        try:
            async with batcher:
                start = loop.time()
                bar = make_bar(self.items) if self._shows else None
                try:
                    with Progress(bar, batcher.stats) as self._progress:
                        async for result in batcher.map(lasting(self._requests(), self._ttl)):
                            await self._settle(result)
                finally:
                    self.wall_s = loop.time() - start
        finally:
            self.stats = batcher.stats()  # the last answers were put into the cache meanwhile

    def _requests(self) -> Iterator[Request]:
        job = self._job
        return requests(job.source, job.survey, job.questions, self._done, self._reject)

    def _reject(self, line: BadLine, name: str) -> None:
        """Tell that *line* cannot be asked about."""
        path = self._job.source.path
        self._failed(name, line.error(path))
        self.failures.add(line.problem, str(line.number), f"{path}, line ")

    async def _settle(self, result: Result[Any]) -> None:
        name = result.id or ""
        if result.reply is None:
            error = error_object(result.error or RuntimeError("no reply"))
            self._failed(name, error)
            self.failures.add(f"{error['type']}: {error['message']}", name, "id ")
            return
        self._take(name, await result.reply.settled())
        self.answered += 1
        self._progress.advance()

    def _failed(self, name: str, error: dict[str, Any]) -> None:
        self._fail(name, error)
        self.failed += 1
        self._progress.advance()
