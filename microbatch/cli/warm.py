"""`microbatch warm`: asks about every line of a file before anybody else does, and leaves the answers in a cache."""

from __future__ import annotations

import asyncio
import textwrap
from typing import TYPE_CHECKING, Any, cast

import msgspec

from microbatch.cli.arguments import POLICY, add_endpoint, add_patience, add_policy, add_question, add_telling
from microbatch.cli.bulk_run import Work
from microbatch.cli.console import COLUMNS, note, plural, seconds, tell
from microbatch.cli.flags import number
from microbatch.cli.plan import Job, prepare
from microbatch.cli.stores import CACHE_HELP
from microbatch.cli.summary import comparison, remarks
from microbatch.errors import StorageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from microbatch.accounting.stats import Stats
    from microbatch.caching.guard import Guard
    from microbatch.messages import Reply

USAGE = "microbatch warm INPUT.jsonl --cache FILE|URL [options]"
HELP = "fill a cache with the answers to every line of a file"
DESCRIPTION = """\
Ask a model about every line of a JSON Lines file, many lines in one prompt, and
keep the answers in a cache, for a service or a run that will ask the same. What
the cache has already is not asked again.

Lines are those of `microbatch run`: any JSON objects, with a --template that
makes a question of them, or OpenAI Batch requests (custom_id, body). The key is
taken from OPENAI_API_KEY. Only who asks exactly the same finds the answers:
endpoint, model, messages, parameters and schema.

Exit status: 0 all answers are there, 1 some are not, 2 nothing sent because
something is wrong with the command or its files, 130 stopped.
"""
EXAMPLES = r"""
examples:
  microbatch warm products.jsonl --cache answers.sqlite --model gpt-4.1-mini \
      --system @instructions.txt --labels electronics,clothing,home,other \
      --template "Product: {name}\nDescription: {description}"

  microbatch warm products.jsonl --cache redis://localhost:6379/0 ...
  microbatch warm products.jsonl --cache answers.sqlite ... --ttl 86400  (a day)
  microbatch run products.jsonl --cache answers.sqlite -o answers.jsonl ...
                                              (the same flags: asks nothing)
"""


class Summary(msgspec.Struct, kw_only=True):
    """The figures of a warming, as `--json` prints them.

    Attributes:
        items: Lines, those that could not be read included.
        known: Those whose answers were in the cache already, or that were the same as another line.
        asked: Those that were answered now.
        failed: Those that were not, for reasons of their own.
        stored: Answers that the cache has taken. Less than asked if some were cut off or came with damaged ones.
        wall_s: Seconds from the first question to the last answer.
        unasked: Those that were neither answered nor failed: it ended before.
    """

    items: int
    known: int
    asked: int
    failed: int
    stored: int
    upstream_calls: int
    batches: int
    fallback_calls: int
    retries: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None
    wall_s: float
    unasked: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `warm`."""
    parser.add_argument("input", metavar="INPUT.jsonl", help="the lines to ask about")
    cache = parser.add_argument_group("the cache")
    cache.add_argument("--cache", metavar="FILE|URL", required=True, help=CACHE_HELP)
    cache.add_argument(
        "--ttl",
        metavar="SECONDS",
        type=number(1),
        help="how long the answers are good, in seconds, less up to a tenth, so that they do not all expire together "
        "(default: 604800, 7 days)",
    )
    add_question(parser.add_argument_group("what is asked"))
    add_endpoint(parser.add_argument_group("whom"))
    running = parser.add_argument_group("the warming")
    add_patience(running)
    add_telling(running)
    add_policy(parser.add_argument_group("batching", POLICY))


def run(args: argparse.Namespace) -> int:
    """Fill the cache.

    Raises:
        ConfigError: The cache cannot be used; nothing was sent.
        UsageError: Something is wrong with the command or its files; nothing was sent.
    """
    job = prepare(args)
    return asyncio.run(Warming(args, job, cast("Guard", job.cache)).go())


class Warming:
    """Asks, and leaves the answers to the cache."""

    def __init__(self, args: argparse.Namespace, job: Job, cache: Guard) -> None:
        self._args = args
        self._job = job
        self._cache = cache
        self._work = Work(
            job, self._take, self._fail, ttl=args.ttl, progress=args.progress, give_up_after=args.give_up_after
        )

    async def go(self) -> int:
        """Ask, tell how it went and return the exit status."""
        work = self._work
        await work.go()
        if work.broken is None:  # of the last answers, the cache may have failed to keep some
            work.broken = self._cache.failure
        self._tell()
        return work.status

    def _take(self, _name: str, _reply: Reply[Any]) -> None:
        """Go on only as long as answers are kept.

        Raises:
            StorageError: They are not.
        """
        if self._cache.failure is not None:
            raise self._cache.failure

    def _fail(self, name: str, error: dict[str, Any]) -> None:
        """Leave it to `Work.failures`."""

    def _tell(self) -> None:
        args, work = self._args, self._work
        for line in work.failures.told():
            note(line)
        summary = summarize(work)
        write = note if args.json else tell
        for line in told(summary, work.stats, ended=not work.unasked and work.broken is None):
            write(line)
        if summary.upstream_calls:
            single = self._job.policy.max_batch_size == 1
            for remark in remarks(work.stats, simulated=self._job.simulated, single=single):
                write(textwrap.fill(remark, COLUMNS))
        if args.json:
            tell(msgspec.json.encode(summary).decode())
        if work.broken is not None:
            lost = isinstance(work.broken, StorageError)
            note(f"microbatch warm: {'cannot use the cache any more: ' if lost else ''}{work.broken}")
        if work.unanswering is not None:
            note(f"microbatch warm: {work.unanswering}")
        if work.unasked or work.broken is not None:
            note("Answers so far are in the cache. For the rest, run the same command again.")


def summarize(work: Work) -> Summary:
    """Return the summary of *work* that has ended."""
    stats = work.stats
    known = stats.cache_hits + stats.shared
    return Summary(
        items=work.items,
        known=known,
        asked=work.answered - known,
        failed=work.failed,
        stored=stats.cache_stores,
        upstream_calls=stats.upstream_calls,
        batches=stats.batches,
        fallback_calls=stats.fallback_calls,
        retries=stats.retries,
        prompt_tokens=stats.prompt_tokens,
        completion_tokens=stats.completion_tokens,
        cost_usd=None if stats.cost_usd is None else round(stats.cost_usd, 9),
        wall_s=round(work.wall_s, 3),
        unasked=work.unasked,
    )


def told(summary: Summary, stats: Stats, *, ended: bool) -> Iterator[str]:
    """Yield the summary in words and a table.

    Args:
        summary: The figures.
        stats: Where most of them are from.
        ended: Whether the work came to its end; if not, that explains what is missing.
    """
    left = f", {summary.unasked:,} left unasked" if summary.unasked else ""
    yield (
        f"{plural(summary.items, 'item')}: {summary.known:,} known already, {summary.asked:,} asked, {summary.failed:,} failed{left}, "
        f"in {seconds(summary.wall_s)}"
    )
    if summary.asked:
        yield f"{plural(summary.stored, 'answer')} stored in the cache"
    if summary.stored < summary.asked and ended:
        missing = plural(summary.asked - summary.stored, "answer")
        yield f"{missing} not stored: they were cut off, or came with others that were damaged"
    if stats.cache_evictions:
        yield f"{plural(stats.cache_evictions, 'answer')} dropped for want of room"
    if summary.asked:
        yield ""
        yield comparison(stats)
        yield ""
