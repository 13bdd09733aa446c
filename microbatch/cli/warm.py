r"""`microbatch warm INPUT... --cache FILE|URL [options]`: fill a cache with the answers to every record of files.

Ask a model about every record of files, many records in one prompt, and keep
the answers in a cache, for a service or a run that will ask the same. What the
cache has already is not asked again.

Files and records are those of `microbatch run`. The key is taken as by `run`.
The answers are found only by requests that are equal
in endpoint, model, messages, parameters and schema.

Exit status: 0 all answers are there, 1 some are not, 2 nothing sent because
something is wrong with the command or its files, 3 the rest would exceed
--max-cost, 130 stopped.

Examples:
  microbatch warm products.jsonl --cache answers.sqlite --model gpt-4.1-mini \
      --system @instructions.txt --labels electronics,clothing,home,other \
      --template "Product: {name}\nDescription: {description}"

  microbatch warm products.jsonl --cache redis://localhost:6379/0 ...
  microbatch warm products.jsonl --cache answers.sqlite ... --ttl 86400  (a day)
  microbatch run products.jsonl --cache answers.sqlite -o answers.jsonl ...
                                              (the same flags: asks nothing)
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from microbatch.cli.arguments import add_bulk, add_flag
from microbatch.cli.bulk_run import BulkRun
from microbatch.cli.console import note, plural, seconds
from microbatch.cli.plan import prepare
from microbatch.cli.summary import DAMAGE, comparison, damage, fields, remarks, skipped

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from microbatch.caching.guard import Guard
    from microbatch.messages import Reply, Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `warm`."""
    group = add_bulk(parser, "the warming", needs_cache=True)
    ttl = "seconds for which the answers are good, less up to a tenth, so that they do not all expire together"
    add_flag(group, "--ttl SECONDS", f"{ttl} (default: 604800, 7 days)", least=1)


def run(args: argparse.Namespace) -> int:
    """Fill the cache, and return the exit status."""
    plan, source = prepare(args)
    cache = cast("Guard", plan.cache)

    def take(_request: Request, _reply: Reply[Any]) -> None:
        if cache.failure is not None:  # the batcher has put the answer into the cache, or tried to
            raise cache.failure

    bulk = BulkRun(args, plan, source, take, ttl=args.ttl)
    asyncio.run(bulk.go())
    if bulk.broken is None:
        bulk.broken = cache.failure  # storing the last answers may have failed
    lines = [*summary_lines(bulk)]
    if bulk.stats.upstream_calls:
        lines += damage(bulk.stats)
        lines += remarks(bulk.stats, plan)
    bulk.report(args, lines, summarize(bulk))
    if bulk.unasked or bulk.broken is not None:
        note("Answers so far are in the cache. For the rest, run the same command again.")
    return bulk.status


def summarize(bulk: BulkRun) -> dict[str, Any]:
    """Return the figures of a warming, as `--json` prints them. The `known` items were in the cache, or equal to another."""
    stats = bulk.stats
    known = stats.cache_hits + stats.shared
    return {
        "items": bulk.items,
        "known": known,
        "asked": bulk.answered - known,
        "failed": bulk.failed,
        "stored": stats.cache_stores,
        **fields(stats, "upstream_calls", "batches", "fallback_calls", "retries"),
        **fields(stats, "prompt_tokens", "completion_tokens", "cost_usd"),
        "wall_s": round(bulk.wall_s, 3),
        "unasked": bulk.unasked,
        "alone_by_field": stats.alone_by_field,
        **fields(stats, *DAMAGE, "singles_compared", "unpriced_calls"),
        "skipped": bulk.skipped,
    }


def summary_lines(bulk: BulkRun) -> Iterator[str]:
    """Yield the figures of a warming for people."""
    figures = summarize(bulk)
    asked, stored = figures["asked"], figures["stored"]
    unasked = f", {bulk.unasked:,} left unasked" if bulk.unasked else ""
    answered = f"{plural(bulk.items, 'item')}: {figures['known']:,} known already, {asked:,} asked"
    yield f"{answered}, {bulk.failed:,} failed{unasked}, in {seconds(bulk.wall_s)}"
    yield from skipped(bulk.skipped)
    if asked:
        yield f"{plural(stored, 'answer')} stored in the cache"
    if stored < asked and not bulk.unasked and bulk.broken is None:  # else that is why
        yield f"{plural(asked - stored, 'answer')} not stored: they were cut off, or came with others that were damaged"
    if bulk.stats.cache_evictions:
        yield f"{plural(bulk.stats.cache_evictions, 'answer')} evicted because the cache is full"
    if asked:
        yield f"\n{comparison(bulk.stats)}\n"
