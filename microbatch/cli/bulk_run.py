"""A run over all lines of an input, as `run` and `warm` make it.

Theory of operation
-------------------
The input is read in passes. A pass sends a request for every item that is not settled. An item is settled by an answer, or by a failure
that it caused itself. A failure that the endpoint may have caused leaves the item open for the next pass. While the endpoint is down
nothing more is read, calls wait unsent (`PausingTransport`), and each pass sends one item, a different one each time.

An item that fails again and again while the endpoint answers others is given up: first it is sent once more in a combined prompt,
because the failure may have come from an outage, and then alone, so that it cannot make others fail. To find out whether the endpoint
answers, an item that was answered before (the *control*) is sent again. A failure for want of capacity (429, 503) counts against an
item only if its pass answered nothing at all.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.accounting.stats import Stats
from microbatch.caching.warming import lasting
from microbatch.cli import console
from microbatch.cli.console import UsageError, dollars, note, plural, report_summary, seconds
from microbatch.cli.digests import Digests
from microbatch.cli.progress import Progress
from microbatch.cli.reading.input import BadLine, InputChanged, id_digest
from microbatch.cli.session import Session
from microbatch.cli.stopping import stoppable
from microbatch.cli.summary import Failures
from microbatch.cli.writing.output import NotWritten, error_object
from microbatch.cli.writing.target import STDOUT
from microbatch.errors import BudgetExceeded, ConfigError, ShutDown, StorageError
from microbatch.spool.endpoint import Cause, cause_of, is_refusal, may_refuse_all

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Iterator

    from microbatch.cli.asking_again import AskingAgain
    from microbatch.cli.plan import Plan
    from microbatch.cli.reading.input import Input
    from microbatch.client import Microbatcher
    from microbatch.messages import Reply, Request, Result

MAX_FAILURES: Final = 4
"""Failures of an item, each while the endpoint answered others, after which it is given up."""

MAX_COMBINED_FAILURES: Final = 2
"""Such failures after which it is sent alone."""

_QUIET_TURNS: Final = 100
"""Turns of the event loop without a settled item after which no answer is on its way from the wire to `_settle`."""


class BulkRun:
    """One run over an input.

    Args:
        args: The flags of `add_bulk`.
        take: Takes the request and the settled reply of each answered item. `NotWritten`, `OSError` and `StorageError` end the run.
        fail: Takes the id, the error object and the request of each item that failed; the request is None if its line made none.
        done: Digests of the ids that are left out, to which those of settled items are added; None for none.
        ttl: Seconds for which the answers are good; None for the cache's own time.
        again: The audit of the run; None for none.
        begin: Called when all is open, before anything is sent. `UsageError` is passed on, and nothing is sent then.

    Attributes:
        begun: True from then on.
        items: Records to ask about, those that cannot be read included.
        skipped: Records that are not asked about, because what the template names is blank.
        failed: Items that failed for reasons of their own.
        stopped: True if a signal ended the run.
        broken: The error that ended it early, or None.
        unanswering: Why the endpoint was given up; None if it was not.
        over_budget: True if the budget of `--max-cost` ended the run.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        plan: Plan,
        source: Input,
        take: Callable[[Request, Reply[Any]], None],
        fail: Callable[[str, dict[str, Any], Request | None], None] = lambda *_: None,
        *,
        done: Digests | None = None,
        ttl: float | None = None,
        again: AskingAgain | None = None,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self.begun: bool = False
        self._settled = Digests() if done is None else done
        self.items: int = source.items - len(self._settled)
        self.skipped: int = source.skipped
        self.answered: int = 0
        self.failed: int = 0
        self.failures: Failures = Failures()
        self.stats: Stats = Stats()
        self.wall_s: float = 0.0
        self.stopped: bool = False
        self.broken: Exception | None = None
        self.unanswering: str | None = None
        self.over_budget: bool = False
        self._args = args
        self._plan = plan
        self._source = source
        self._take = take
        self._report_failure = fail
        self._ttl = ttl
        self._again = again
        self._begin = begin
        self._session = Session(plan, give_up_after=args.give_up_after)
        self._endpoint = self._session.endpoint
        self._progress = Progress(self.items, self._session.stats, shown=args.progress)
        self._asked: dict[str, Request] = {}  # and not settled
        self._open: dict[str, Exception] = {}  # left open by this pass, with the error
        self._failures: Counter[str] = Counter()  # by item, while the endpoint answered others
        self._control: Request | None = None
        self._passes = 0
        self._once: Stats | None = None  # the figures when no item had been asked again; None until one is
        self._leave: Callable[[], None] = lambda: None

    @property
    def unasked(self) -> int:
        """Items that were neither answered nor failed; they are left for another run."""
        return self.items - self.answered - self.failed

    @property
    def asked_again(self) -> bool:
        """True if the audit has had items asked again."""
        return self._once is not None

    @property
    def _answers(self) -> int:
        """Answers so far, those that replaced another one included."""
        return self.answered + (0 if self._again is None else self._again.asked)

    @property
    def _ended(self) -> int:
        return self._answers + self.failed

    @property
    def _to_ask(self) -> int:
        """Items that are to be asked in the passes that follow."""
        return self.unasked + (0 if self._again is None else len(self._again.pending))

    @property
    def status(self) -> int:
        """The exit status."""
        if self.stopped:
            return console.STOPPED
        if self.over_budget:
            return console.OVER_BUDGET
        doubtful = self._again is not None and self._again.left
        return console.SOME_FAILED if self.failed or self.unasked or doubtful or self.broken is not None else console.OK

    def report(self, args: argparse.Namespace, lines: Iterable[str], figures: dict[str, Any]) -> None:
        """Print the failures, the summary, and why the run ended early."""
        for line in self.failures.lines():
            note(line)
        report_summary(args, lines, figures, stdout_taken=getattr(args, "output", None) == STDOUT)
        if self.over_budget:
            spent = None if self.stats.budget is None else self.stats.budget.spent_usd
            note(
                f"--max-cost: {dollars(spent)} of {dollars(args.max_cost)} are spent, and what comes next would cost more: "
                f"{plural(self._to_ask, 'item')} left unasked."
            )
        for why in (self.unanswering, self.broken):
            if why is not None:
                lost = "cannot use the cache any more: " if isinstance(why, StorageError) else ""
                note(f"microbatch {args.name}: {lost}{why}")

    async def go(self) -> None:
        """Run to the end, or until it is stopped or broken.

        Raises:
            ConfigError: The cache cannot be used, or a budget cannot be kept because a price is not known; nothing was sent.
            UsageError: The run cannot begin; nothing was sent.
        """
        with stoppable(self._stop) as self._leave:
            try:
                await self._ask()
                self._source.check()
            except (InputChanged, NotWritten, UsageError, OSError, StorageError) as error:
                if isinstance(error, UsageError) and not self.begun:
                    raise
                self.broken = error

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        session, again = self._session, self._again
        batcher = session.batcher(self._plan.policy, audit=self._plan.audit, hooks=[] if again is None else [again])
        self._endpoint.probe = self._probe
        try:
            async with batcher, session.prober:
                self._check_prices(batcher)
                try:
                    self._begin()
                except (NotWritten, OSError) as error:
                    raise UsageError(str(error)) from error
                self.begun = True
                if again is not None and batcher.audits is not None:
                    again.begin(batcher.audits)
                start = loop.time()
                try:
                    with self._progress:
                        await self._ask_all(batcher)
                        if again is not None:
                            await self._ask_doubtful(again, batcher)
                finally:
                    self.wall_s = loop.time() - start
        finally:
            # Closing the batcher has put the last answers into the cache.
            self.stats = session.stats() if self._once is None else _compared_with(self._once, session.stats())
            if again is not None and self.begun:
                again.end()

    def _check_prices(self, batcher: Microbatcher) -> None:
        """Raise `ConfigError` if a line names a model whose price a budget needs and does not know."""
        if batcher.spending is not None and self._args.template is None:  # else all lines are for the transport's model
            rows = self._source.rows(self._settled)
            batcher.spending.check({row[1].model for row in rows if not isinstance(row, BadLine)})

    # --- a pass over the input

    async def _ask_all(self, batcher: Microbatcher) -> None:
        while self._to_ask and not self._endpoint.stopped:
            await self._pass(batcher)

    async def _ask_doubtful(self, again: AskingAgain, batcher: Microbatcher) -> None:
        """Ask again, when all audits have ended, what they have made doubtful, until nothing is."""
        await again.settled()
        while not self._endpoint.stopped and (found := again.find()):
            self._once = self._once or self._session.stats()
            for item in found:
                self._settled.discard(item)
            self._progress.extend(len(found))
            await self._ask_all(batcher)
            await again.settled()

    async def _pass(self, batcher: Microbatcher) -> None:
        await self._endpoint.rested()
        answers, self._open = self._answers, {}
        self._passes += 1
        async for result in batcher.map(lasting(self._requests(down=self._endpoint.down), self._ttl)):
            await self._settle(result)
        if self._open and not self._endpoint.stopped:
            await self._judge(progress=self._answers > answers)

    def _requests(self, *, down: bool) -> Iterator[Request]:
        """Yield the requests that are not settled until the endpoint is down; with *down* one, a different one in each pass."""
        for request in islice(self._unsettled(), self._passes % self._to_ask if down else 0, None):
            name = request.id or ""
            if down or self._failures[name] >= MAX_COMBINED_FAILURES:
                request.priority = "high"  # alone
            if self._again is not None:
                request.use_cache = self._again.use_cache
            self._asked[name] = request
            yield self._asked[name]
            if down or self._endpoint.down or self._endpoint.stopped:
                return

    def _unsettled(self) -> Iterator[Request]:
        for row in self._source.requests(self._settled):
            if isinstance(row, BadLine):
                self._reject(row)
            else:
                yield row[1]

    def _reject(self, line: BadLine) -> None:
        """Count *line* as failed, unless an earlier pass has."""
        name = self._source.id_for(line)
        if id_digest(name) not in self._settled:
            self._fail(name, line.error())
            self.failures.add(line.problem, str(line.place.number), line.place.prefix)

    # --- the outcome of an item

    async def _settle(self, result: Result[Any]) -> None:
        name, error = result.id or "", result.error
        if result.reply is not None:
            item = id_digest(name)
            self._take(self._asked[name], await result.reply.settled())
            self._settled.add(item)
            self._control = self._asked.pop(name)
            if self._again is None or not self._again.answered(item, result.reply.batch_size):
                self.answered += 1
            self._progress.show(self._ended)
        elif isinstance(error, ConfigError) or error is None or cause_of(error) is Cause.REQUEST:
            self._give_up_item(name, error or RuntimeError("no reply"))
        else:
            self._leave_open(name, error)

    def _leave_open(self, name: str, error: Exception) -> None:
        """Leave an item for the next pass, or end the run if there will be none."""
        endpoint = self._endpoint
        if isinstance(error, BudgetExceeded):
            self._end_for_budget()
            return
        if endpoint.given_up:
            duration, last = seconds(endpoint.failing_for), _described(endpoint.error)
            self._give_up_endpoint(f"nothing was answered for {duration}; the last error was {last}")
        if isinstance(error, ShutDown):
            return
        self._open[name] = error
        if not endpoint.answered:
            if is_refusal(error) or (endpoint.down and may_refuse_all(error)):
                self._give_up_endpoint(f"the endpoint refuses to answer: {_described(error)}")
        elif is_refusal(error):
            endpoint.failed(error, asyncio.get_running_loop().time())  # such calls fail without being sent, for a while

    def _give_up_item(self, name: str, error: Exception) -> None:
        described = error_object(error)
        self._fail(name, described)
        self.failures.add_error(described, name)

    def _fail(self, name: str, error: dict[str, Any]) -> None:
        item, request = id_digest(name), self._asked.pop(name, None)
        self._settled.add(item)
        if self._again is None or not self._again.failed(item):
            self._report_failure(name, error, request)
            self.failed += 1
        self._progress.show(self._ended)

    async def _judge(self, *, progress: bool) -> None:
        """Decide which items that a pass has left open are given up."""
        errors = [*self._open.values()]
        if self._control is None:
            if all(map(may_refuse_all, errors)):
                self._give_up_endpoint(f"the endpoint refuses to answer: {_described(errors[0])}")
            return
        if not await self._endpoint.answers():
            return
        for name, error in self._open.items():
            if progress and cause_of(error) is Cause.ENDPOINT:
                continue
            self._failures[name] += 1
            if self._failures[name] >= MAX_FAILURES:
                self._give_up_item(name, error)

    async def _probe(self) -> bool | None:
        """Return whether the control is answered; None if nothing was answered before."""
        if self._control is None:
            return None
        control = msgspec.structs.replace(self._control, use_cache=False, priority="high")
        errors = [result.error async for result in self._session.prober.map([control])]
        return all(error is None or cause_of(error) is Cause.REQUEST for error in errors)

    # --- the end

    def _give_up_endpoint(self, why: str) -> None:
        if self.unanswering is None and not self.stopped:
            self.unanswering = why
            self._endpoint.stop(self._leave if self._endpoint.given_up else self._leave_soon)

    def _end_for_budget(self) -> None:
        """Start nothing more, and leave when the calls under way have ended."""
        if not (self.over_budget or self._endpoint.stopped):
            self.over_budget = True
            self._endpoint.stop(self._leave_soon)

    def _stop(self) -> None:
        """Start nothing more, and leave when the calls under way have ended."""
        self.stopped = True
        self._session.note_stop()
        self._endpoint.stop(self._leave_soon)

    def _leave_soon(self, turns: int = _QUIET_TURNS, settled: int = 0) -> None:
        """Leave after *turns* turns of the event loop in which no item is settled."""
        now = self._ended
        if not turns:
            self._leave()
        else:
            left = turns - 1 if settled == now else _QUIET_TURNS
            asyncio.get_running_loop().call_soon(self._leave_soon, left, now)


def _compared_with(once: Stats, stats: Stats) -> Stats:
    """Return *stats* with the calls one by one of *once*, when no item had been asked again: one for each item."""
    return msgspec.structs.replace(
        stats,
        unbatched_calls=once.unbatched_calls,
        unbatched_prompt_tokens=once.unbatched_prompt_tokens,
        unbatched_completion_tokens=once.unbatched_completion_tokens,
        unbatched_cost_usd=once.unbatched_cost_usd,
    )


def _described(error: Exception | None) -> str:
    return f"{type(error).__name__}: {error}"
