"""Asks about every line of a job's input: what all commands that ask do alike.

Theory of operation
-------------------
The input is read in passes. A pass asks about every line that is not settled yet; an item is settled by an answer, or by a failure that
is its own. A failure that may be the endpoint's leaves it open, for the next pass. While the endpoint is down nothing is read, calls
wait unsent (`RestingTransport`), and a pass asks about one item, a different one each time.

An item that fails again and again while the endpoint answers others is given up: first it is asked once more in a combined prompt,
which costs little if an outage was the reason, and then alone, so that it spoils no other. That the endpoint answers is known from a
*control*: an item that was answered before is asked again. A pass in which an item failed for want of capacity (429, 503) counts
against it only if that pass answered nothing at all.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.accounting.stats import Stats, together
from microbatch.caching.warming import lasting
from microbatch.cli import console
from microbatch.cli.answers import NotWritten, error_object
from microbatch.cli.console import note, plural, seconds
from microbatch.cli.failures import Failures
from microbatch.cli.plan import prober
from microbatch.cli.progress import Progress, make_bar
from microbatch.cli.questions import question_digest
from microbatch.cli.reading import BadLine, InputChanged, digest, requests
from microbatch.cli.stopping import stoppable_in_order
from microbatch.errors import ConfigError, ShutDown, StorageError
from microbatch.spool.endpoint import Cause, Endpoint, cause_of, is_refusal, may_refuse_all

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from microbatch.cli.plan import Job
    from microbatch.client import Microbatcher
    from microbatch.messages import Reply, Request, Result

CHANCES: Final = 4
"""Failures of an item, each while the endpoint answered others, after which it is given up."""

COMPANY: Final = 2
"""Such failures after which it is asked alone."""

_TURNS: Final = 100  # of the event loop: more than an answer needs from the wire to `_settle`


class Work:
    """One job, from its first line to its last.

    Args:
        job: What is asked, and of whom.
        take: Takes an id and the reply, settled. If it raises `NotWritten`, `OSError` or `StorageError`, the work ends there.
        fail: Takes an id and what an output line says of the error; like `take`.
        done: Digests of the ids that are not asked about any more.
        ttl: Seconds for which the answers are good; None for the cache's own time.
        progress: Whether progress is shown; None if stderr is a terminal.
        give_up_after: Seconds without an answer after which the rest is left unasked.

    Attributes:
        items: Lines to ask about, those that cannot be read included.
        answered: Those of them that were answered so far.
        failed: Those that got no answer, for reasons of their own.
        failures: What failed, and with what.
        stats: The batcher's figures in the end.
        wall_s: Seconds from the first question to the last answer.
        stopped: Whether a signal ended it.
        broken: What else ended it early, or None.
        unanswering: Why the endpoint was given up, in words; None if it was not.
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
        give_up_after: float | None = None,
    ) -> None:
        self._job = job
        self._take = take
        self._fail = fail
        self._settled = set(done)
        self._ttl = ttl
        self._shows = sys.stderr.isatty() if progress is None else progress
        self._progress = Progress(None, Stats)
        self._endpoint = Endpoint("the endpoint is left alone", give_up_after=give_up_after)
        self._asked: dict[str, Request] = {}  # and not settled
        self._open: dict[str, Exception] = {}  # what this pass has left open, and why
        self._chances: Counter[str] = Counter()
        self._control: Request | None = None
        self._prober: Microbatcher | None = None
        self._passes = 0
        self._leave: Callable[[], None] = lambda: None
        self.items = job.survey.items - len(done)
        self.answered = 0
        self.failed = 0
        self.failures = Failures()
        self.stats = Stats()
        self.wall_s = 0.0
        self.stopped = False
        self.broken: Exception | None = None
        self.unanswering: str | None = None

    @property
    def unasked(self) -> int:
        """Lines that were neither answered nor failed: they are left for the next time."""
        return self.items - self.answered - self.failed

    @property
    def status(self) -> int:
        """The exit status."""
        if self.stopped:
            return console.STOPPED
        return console.SOME_FAILED if self.failed or self.unasked or self.broken is not None else console.OK

    async def go(self) -> None:
        """Do it, until it is done, stopped or broken.

        Raises:
            ConfigError: The cache cannot be used; nothing was sent.
        """
        with stoppable_in_order(self._stop) as self._leave:
            try:
                await self._ask()
                self._job.source.check(self._job.survey)
            except (InputChanged, NotWritten, OSError, StorageError) as error:
                self.broken = error

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        batcher = self._job.batcher(self._endpoint)
        probing = self._prober = prober(self._job.transport)
        self._endpoint.probe = self._probe
        try:
            async with batcher, probing:
                start = loop.time()
                bar = make_bar(self.items) if self._shows else None
                try:
                    with Progress(bar, batcher.stats) as self._progress:
                        while self.unasked and not self._endpoint.stopped:
                            await self._pass(batcher)
                finally:
                    self.wall_s = loop.time() - start
        finally:
            # The last answers were put into the cache meanwhile. Calls that waited in vain for their turn were no calls.
            stats = msgspec.structs.replace(batcher.stats(), upstream_calls=self._endpoint.sent)
            self.stats = together([stats, probing.stats()])

    # --- a pass over the input

    async def _pass(self, batcher: Microbatcher) -> None:
        """Ask about what is not settled, and decide what becomes of what fails."""
        await self._endpoint.rested()
        answered, self._open = self.answered, {}
        down, self._passes = self._endpoint.down, self._passes + 1
        questions = self._one() if down else self._questions()
        async for result in batcher.map(lasting(questions, self._ttl)):
            await self._settle(result)
        if self._open and not self._endpoint.stopped:
            await self._judge(progress=self.answered > answered)

    def _questions(self) -> Iterator[Request]:
        """Yield the questions that are not settled, as long as the endpoint answers."""
        for request in self._unsettled():
            yield self._noted(request)
            if self._endpoint.down or self._endpoint.stopped:
                return

    def _one(self) -> Iterator[Request]:
        """Yield one question, another one in each pass."""
        for request in islice(self._unsettled(), self._passes % self.unasked, None):
            yield self._noted(msgspec.structs.replace(request, priority="high"))
            return

    def _unsettled(self) -> Iterator[Request]:
        job = self._job
        return requests(job.source, job.survey, job.questions, self._settled, self._reject)

    def _noted(self, request: Request) -> Request:
        """Return *request* as it is asked now: alone, once it is a suspect."""
        name = request.id or ""
        if self._chances[name] >= COMPANY:
            request = msgspec.structs.replace(request, priority="high")
        self._asked[name] = request
        return request

    def _reject(self, line: BadLine, name: str) -> None:
        """Count *line*, which cannot be asked about, as failed; a later pass comes upon it again."""
        if digest(name) in self._settled:
            return
        path = self._job.source.path
        self._failed(name, line.error(path))
        self.failures.add(line.problem, str(line.number), f"{path}, line ")

    # --- what becomes of an item

    def digest_of(self, name: str) -> str | None:
        """Return the digest of a question that was asked and is not settled yet; None if there is none."""
        request = self._asked.get(name)
        return None if request is None else question_digest(request, self._job.transport.model)

    async def _settle(self, result: Result[Any]) -> None:
        name, error = result.id or "", result.error
        if result.reply is not None:
            self._take(name, await result.reply.settled())
            self._settled.add(digest(name))
            self._control = self._asked.pop(name)
            self.answered += 1
            self._progress.advance()
        elif isinstance(error, ConfigError) or error is None or cause_of(error) is Cause.REQUEST:
            self._lose(name, error or RuntimeError("no reply"))
        else:
            self._leave_open(name, error)

    def _leave_open(self, name: str, error: Exception) -> None:
        """Note an item that is not settled, and end the work if that is for good."""
        endpoint = self._endpoint
        if endpoint.given_up:
            self._give_up(f"nothing was answered for {seconds(endpoint.failing_for)}, at last {_told(endpoint.error)}")
        if isinstance(error, ShutDown):
            return
        self._open[name] = error
        if not endpoint.answered:
            if is_refusal(error) or (endpoint.down and may_refuse_all(error)):
                self._give_up(f"the endpoint refuses to answer: {_told(error)}")
        elif is_refusal(error):
            endpoint.failed(error, asyncio.get_running_loop().time())  # such calls fail without being sent, for a while

    def _lose(self, name: str, error: Exception) -> None:
        """Give up an item that failed for a reason of its own."""
        told = error_object(error)
        self._failed(name, told)
        self.failures.add(f"{told['type']}: {told['message']}", name, "id ")

    def _failed(self, name: str, error: dict[str, Any]) -> None:
        self._fail(name, error)
        self._settled.add(digest(name))
        self._asked.pop(name, None)
        self.failed += 1
        self._progress.advance()

    async def _judge(self, *, progress: bool) -> None:
        """Decide what becomes of the items that a pass has left open."""
        errors = [*self._open.values()]
        if self._control is None:
            if all(map(may_refuse_all, errors)):
                self._give_up(f"the endpoint refuses to answer: {_told(errors[0])}")
            return
        if not await self._endpoint.answers():
            return
        for name, error in self._open.items():
            if progress and cause_of(error) is Cause.ENDPOINT:
                continue
            self._chances[name] += 1
            if self._chances[name] >= CHANCES:
                self._lose(name, error)

    async def _probe(self) -> bool | None:
        """Return whether the control is answered; None if nothing was answered before."""
        if self._control is None or self._prober is None:
            return None
        control = msgspec.structs.replace(self._control, use_cache=False, priority="high")
        errors = [result.error async for result in self._prober.map([control])]
        return all(error is None or cause_of(error) is Cause.REQUEST for error in errors)

    # --- the end

    def _give_up(self, why: str) -> None:
        """Leave the rest unasked."""
        if self.unanswering is None and not self.stopped:
            self.unanswering = why
            self._endpoint.stop(self._leave if self._endpoint.given_up else self._leave_soon)

    def _stop(self) -> None:
        """Begin nothing more, and leave when what is under way has ended."""
        self.stopped = True
        calls = plural(self._endpoint.on_wire, "call")
        note(
            f"Stopping: {calls} under way may end, and the answers are kept. Press Ctrl-C again to stop now, without them."
        )
        self._endpoint.stop(self._leave_soon)

    def _leave_soon(self, turns: int = _TURNS, settled: int = 0) -> None:
        """Leave when no answer is on its way any more from the wire to `_settle`."""
        now = self.answered + self.failed
        if not turns:
            self._leave()
        else:
            left = turns - 1 if settled == now else _TURNS
            asyncio.get_running_loop().call_soon(self._leave_soon, left, now)


def _told(error: Exception | None) -> str:
    return f"{type(error).__name__}: {error}"
