r"""`microbatch calibrate INPUT... [options]`: find the size of batches that leaves answers as they are.

Before a job, ask a sample of it alone, alone once more, and in batches of each
size, upward, and compare the answers. What differs in batches, beyond what
differs between the two askings alone, is the excess; a size passes if the excess
is below --max-excess with 95 % confidence. The first size that fails ends it.

The flags are those of `run`. The answers are not kept: nothing comes from a
cache or goes there, and --sizes stands in place of --max-batch-size. Each size
takes up to 320 batches, or each item once if that is more, from several shuffles
of the sample; a size that does harm is left after a few dozen. Typed answers
(--labels, --schema) are compared by value, texts of at most 64 characters but
for case and white space; longer texts need microbatch.calibrate(same=) in
Python.

While the endpoint does not answer, nothing is sent; it goes on when it answers
again. Ctrl-C ends it, and shows the sizes that were tried.

Exit status: 0 a size is recommended (1: ask alone), 1 nothing can be said, or
the endpoint does not answer, 2 nothing sent because something is wrong with the
command or its files, 3 more would exceed --max-cost, 130 stopped.

Examples:
  microbatch calibrate products.jsonl --model gpt-4.1-mini \
      --system @instructions.txt --labels electronics,clothing,home,other \
      --template "Product: {name}\nDescription: {description}"

  microbatch calibrate products.jsonl ... --sample 600 --sizes 4,8,16
  microbatch calibrate products.jsonl ... --max-excess 0.05       (asks less)
  microbatch calibrate products.jsonl ... --simulate         (costs nothing)
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import sys
import textwrap
from typing import TYPE_CHECKING

import msgspec

from microbatch.audit.means import smallest_bound
from microbatch.calibration import SAMPLE, SIZES, Calibrator
from microbatch.cli import console
from microbatch.cli.arguments import add_bulk, add_flag, add_max_excess
from microbatch.cli.console import COLUMNS, UsageError, dollars, note, percent, plural, report_summary, seconds, table
from microbatch.cli.plan import prepare
from microbatch.cli.reading.input import BadLine, InputChanged
from microbatch.cli.session import Session
from microbatch.cli.stopping import stoppable
from microbatch.cli.summary import Failures, skipped
from microbatch.errors import BudgetExceeded, ConfigError, MicrobatchError
from microbatch.spool.endpoint import is_refusal, may_refuse_all

if TYPE_CHECKING:
    from collections.abc import Iterator

    from microbatch.audit.calibration import CalibratedSize, Calibration
    from microbatch.cli.plan import Plan
    from microbatch.cli.reading.input import Input
    from microbatch.client import Microbatcher
    from microbatch.messages import Request
    from microbatch.policy import FlushPolicy
    from microbatch.spool.endpoint import Endpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `calibrate`."""
    group = add_bulk(parser, "the calibration", sample=SAMPLE)
    sizes = f"sizes of batches to try (default: {','.join(map(str, SIZES))})"
    add_flag(group, "--sizes N,N,...", sizes, type=_sizes, default=None)
    add_max_excess(group)


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 2:  # noqa: PLR2004 the smallest batch
        raise argparse.ArgumentTypeError(f"must be whole numbers from 2 on, as in 2,4,8, got {text!r}")
    return sizes


def run(args: argparse.Namespace) -> int:
    """Ask a sample alone and in batches, print what was found, and return the exit status."""
    if args.single or args.max_batch_size is not None:
        raise UsageError("--sizes says which sizes are tried: leave out --single and --max-batch-size")
    args.cache = None  # every answer has to be the model's
    plan, source = prepare(args, draw=False)  # the calibrator does, and counts equal items once
    calibrating = _Calibrating(args, plan, source)
    asyncio.run(calibrating.go())
    return calibrating.report()


class _Calibrating:
    """A calibration of the items of *source*."""

    def __init__(self, args: argparse.Namespace, plan: Plan, source: Input) -> None:
        self._args = args
        self._plan = plan
        self._source = source
        self._session = Session(plan, give_up_after=args.give_up_after)
        self._once = _Once()
        self._failures = Failures()
        self._broken: Exception | None = None
        self._left: bool = True
        self._calibrator = Calibrator(
            self._batcher,
            plan.policy,
            sample=args.sample,
            sizes=args.sizes or SIZES,
            max_excess=args.max_excess,
            seed=args.seed,
            outage=self._wait,
            ended=self._note_size,
        )

    async def go(self) -> None:
        """Calibrate, until the end or a signal. Raise `ConfigError` or `UsageError` if nothing was sent."""
        logger = logging.getLogger("microbatch")
        logger.addFilter(self._once)
        try:
            with stoppable():
                await self._calibrator.run(self._requests())
                self._left = False
        except InputChanged as error:
            raise UsageError(str(error)) from error
        except MicrobatchError as error:
            if isinstance(error, ConfigError) and not self._session.endpoint.sent:
                raise
            self._broken, self._left = error, False
        finally:
            logger.removeFilter(self._once)

    def _batcher(self, policy: FlushPolicy) -> Microbatcher:
        self._once.size = policy.max_batch_size
        return self._session.batcher(policy)

    def _requests(self) -> Iterator[Request]:
        for row in self._source.requests():
            if isinstance(row, BadLine):
                self._failures.add(row.problem, str(row.place.number), row.place.prefix)
            else:
                yield row[1]

    async def _wait(self, error: Exception) -> bool:
        """Wait after *error* while the endpoint does not answer; see *outage* of `Calibrator`."""
        endpoint = self._session.endpoint
        was_down = endpoint.down
        refused = is_refusal(error) or (was_down and may_refuse_all(error))
        if refused and not endpoint.answered:
            raise error
        await endpoint.rested()
        if endpoint.given_up:
            raise _last(endpoint, error)
        return was_down

    def _note_size(self, row: CalibratedSize) -> None:
        if self._args.progress or (self._args.progress is None and sys.stderr.isatty()):
            outcome = row.outcome or "asked"
            note(f"size {row.size}: {outcome} after {plural(row.calls, 'call')} in {seconds(row.seconds)}")

    def report(self) -> int:
        """Print what was found, and return the exit status."""
        result = self._calibrator.result
        for line in (*self._failures.lines(), *skipped(self._source.skipped)):
            note(line)
        report_summary(self._args, _lines(result, self._plan), msgspec.to_builtins(result))
        if isinstance(self._broken, BudgetExceeded):
            limit = dollars(self._args.max_cost)
            note(f"--max-cost: {limit} do not suffice for the sizes that are left; give more, or fewer --sizes.")
        elif self._broken is not None:
            note(f"microbatch calibrate: {type(self._broken).__name__}: {self._broken}")
        if self._left:
            note("Stopped before the end.")
            return console.STOPPED
        if isinstance(self._broken, BudgetExceeded):
            return console.OVER_BUDGET
        return console.SOME_FAILED if self._broken is not None or result.recommended is None else console.OK


def _last(endpoint: Endpoint, error: Exception) -> Exception:
    return error if endpoint.error is None else endpoint.error


class _Once(logging.Filter):
    """Passes each kind of warning once, because every size has a batcher of its own, which would repeat it, and adds the size."""

    def __init__(self) -> None:
        super().__init__()
        self.size: int = 1
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno > logging.WARNING:
            return True
        new = record.msg not in self._seen
        self._seen.add(record.msg)
        record.msg = f"size {self.size}: {record.msg}"
        return new


# --- for people


def _lines(result: Calibration, plan: Plan) -> Iterator[str]:
    """Yield what was found, for people."""
    if result.alone is not None:
        batches = ", asked alone twice and in batches of each size" if result.compared else ", asked alone"
        yield f"{plural(result.sample, 'different item')}{batches}\n"
        yield from ([f"{_answers(result)}\n"] if result.compared else [])
        yield f"{_costs(result)}\n"
    for remark in _remarks(result, plan):
        yield textwrap.fill(remark, COLUMNS)


def _answers(result: Calibration) -> str:
    rows = []
    for row in _rows(result):
        shares = [row.agreement, *([row.excess, row.upper] if row.outcome else [])] if row.compared else []
        cells = [percent(share) for share in shares] + [""] * (3 - len(shares))
        rows.append((str(row.size), f"{row.batches:,}", f"{row.compared:,}", *cells, row.outcome or ""))
    return table(("size", "prompts", "compared", "agree", "excess", "at most", "outcome"), rows)


def _costs(result: Calibration) -> str:
    rows = []
    for row in _rows(result):
        tokens = row.prompt_tokens + row.completion_tokens
        counts = f"{row.calls:,}", f"{row.fallback_calls:,}", f"{tokens:,}", f"{_each(row)[0]:,.0f}"
        rows.append((str(row.size), *counts, dollars(row.cost_usd), seconds(row.seconds)))
    return table(("size", "calls", "fallback", "tokens", "per item", "cost", "time"), rows)


def _each(row: CalibratedSize) -> tuple[float, float | None]:
    """Return the tokens and the dollars of one item."""
    items = row.batches * row.size or 1
    return (row.prompt_tokens + row.completion_tokens) / items, None if row.cost_usd is None else row.cost_usd / items


def _rows(result: Calibration) -> list[CalibratedSize]:
    return [row for row in (result.alone, *result.sizes) if row is not None]


def _remarks(result: Calibration, plan: Plan) -> Iterator[str]:
    """Yield what follows from the figures."""
    yield from _recommendation(result)
    yield from _dearer(result)
    if result.noise:
        yield f"Of the answers alone {percent(result.noise)} differ from each other: that is the model's own noise."
    if result.unusable:
        yield f"{plural(result.unusable, 'item')} left out: their form keeps them out of combined prompts."
    if result.not_comparable:
        nothing = "" if result.compared else ": nothing can be recommended"
        yield (
            f"The answers to {result.not_comparable:,} of {plural(result.sample, 'item')} cannot be compared, because they are texts "
            f"of more than 64 characters{nothing}. In Python, microbatch.calibrate(..., same=) takes a function that compares them."
        )
    if result.failed:
        yield f"{plural(result.failed, 'item')} failed alone, and took no part."
    if plan.simulated is not None and result.alone is not None:
        yield f"The endpoint was simulated, at the price of {plan.simulated}. Nothing was paid."


def _recommendation(result: Calibration) -> Iterator[str]:
    rows = {row.size: row for row in result.sizes}
    last = result.sizes[-1] if result.sizes else None
    bound = f"{100 * result.max_excess:g} %"
    if not result.compared:
        yield from _no_answers(result, bound)
    elif result.recommended == 1 and last is not None:
        yield f"Recommended: ask alone (--single). Batches of {last.size} change about {percent(last.excess)} of the answers."
    elif result.recommended is not None:
        row = rows[result.recommended]
        yield (
            f"Recommended: --max-batch-size {row.size}. Because of combining at most {percent(row.upper)} of the answers differ "
            "(95 % confidence)."
        )
    undecided = [row for row in result.sizes if row.outcome == "undecided" and row.size > (result.recommended or 0)]
    if undecided and result.needed is not None:
        yield (
            f"For batches of {undecided[0].size} the sample is too small: to show an excess of at most {bound}, about "
            f"{result.needed:,} items are needed (--sample {result.needed})."
        )
    elif undecided:
        yield f"Batches of {undecided[0].size} are undecided: their excess is too close to {bound}, or above it."
    if last is not None and last.outcome == "not reached":
        yield f"Batches of {last.size} were not reached: {_why_not_reached(last)}"


def _why_not_reached(row: CalibratedSize) -> str:
    if not row.batches:
        return "so many items of the sample do not have the same instructions."
    return (
        "fewer than half of the items were answered by batches of that size. Limits make batches smaller (--max-batch-tokens, "
        "--max-prompt-tokens, --max-output-tokens, --max-latency), and items may have to be asked again."
    )


def _dearer(result: Calibration) -> Iterator[str]:
    """Yield a remark if an item costs more at the size recommended than alone."""
    row = next((row for row in result.sizes if row.size == result.recommended), None)
    if row is None or result.alone is None:
        return
    (tokens, cost), (alone_tokens, alone_cost) = _each(row), _each(result.alone)
    if cost is not None and alone_cost is not None:
        if cost > alone_cost:
            yield f"But 1,000 items cost {dollars(1_000 * cost)} at that size, and {dollars(1_000 * alone_cost)} alone."
    elif tokens > alone_tokens:
        yield f"But an item takes {tokens:,.0f} tokens at that size, and {alone_tokens:,.0f} alone."


def _no_answers(result: Calibration, bound: str) -> Iterator[str]:
    """Yield why nothing was compared in batches."""
    if result.needed is not None:
        yield (
            f"The sample is too small: {plural(result.sample, 'item')}; to show an excess of at most {bound}, {result.needed:,} are "
            "needed, even if no answer differs."
        )
    if result.needed is not None and result.alone is None:
        smallest = math.ceil(1_000 * smallest_bound(result.sample)) / 1_000
        yield f"Nothing was sent. {plural(result.sample, 'item')} can show --max-excess {smallest:g}."
