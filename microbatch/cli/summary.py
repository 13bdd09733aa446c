"""What a run came to, for people and for programs."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import msgspec

from microbatch.cli.console import COLUMNS, dollars, plural, saving, seconds, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from microbatch.accounting.stats import Stats


class Summary(msgspec.Struct, kw_only=True):
    """The figures of a run, as `--json` prints them; those of the same name are `Stats`'s.

    Attributes:
        items: Lines this run had to ask about, those it could not read included.
        answered: Those that were answered.
        failed: Those that were not, for reasons of their own.
        wall_s: Seconds from the first question to the last answer.
        changed: Ids that had the answer to another question in the output that was resumed.
        reused: Ids that were given the answer to the same question under another id.
        unasked: Those that were neither answered nor failed: the run ended before.
    """

    items: int
    answered: int
    failed: int
    upstream_calls: int
    batches: int
    fallback_calls: int
    retries: int
    prompt_tokens: int
    completion_tokens: int
    unbatched_calls: int
    unbatched_prompt_tokens: int
    cost_usd: float | None
    unbatched_cost_usd: float | None
    wall_s: float
    changed: int = 0
    reused: int = 0
    unasked: int = 0


def summarize(
    stats: Stats,
    *,
    items: int,
    answered: int,
    failed: int,
    wall_s: float,
    changed: int = 0,
    reused: int = 0,
    unasked: int = 0,
) -> Summary:
    """Return the summary of a run that ended with *stats*."""
    return Summary(
        items=items,
        answered=answered,
        failed=failed,
        upstream_calls=stats.upstream_calls,
        batches=stats.batches,
        fallback_calls=stats.fallback_calls,
        retries=stats.retries,
        prompt_tokens=stats.prompt_tokens,
        completion_tokens=stats.completion_tokens,
        unbatched_calls=stats.unbatched_calls,
        unbatched_prompt_tokens=stats.unbatched_prompt_tokens,
        cost_usd=None if stats.cost_usd is None else round(stats.cost_usd, 9),
        unbatched_cost_usd=None if stats.unbatched_cost_usd is None else round(stats.unbatched_cost_usd, 9),
        wall_s=round(wall_s, 3),
        changed=changed,
        reused=reused,
        unasked=unasked,
    )


def told(summary: Summary, stats: Stats, *, simulated: str | None, single: bool) -> Iterator[str]:
    """Yield the summary in words and a table.

    Args:
        summary: The figures.
        stats: Where they are from.
        simulated: The model whose prices stand in for those of the simulated endpoint; None if the endpoint is a real one.
        single: Whether coalescing was switched off.
    """
    ended = f"{summary.answered:,} of {plural(summary.items, 'item')} answered"
    left = f", {summary.unasked:,} left unasked" if summary.unasked else ""
    yield f"{ended}, {summary.failed:,} failed{left}, in {seconds(summary.wall_s)}"
    if stats.answered:
        yield ""
        yield comparison(stats)
        yield ""
    if stats.cache_hits or stats.cache_misses or stats.shared:
        yield from reuse(stats)
        yield ""
    for remark in remarks(stats, simulated=simulated, single=single):
        yield textwrap.fill(remark, COLUMNS)


def comparison(stats: Stats) -> str:
    """Return the table of what was paid against one call for each answer."""
    rows = [
        ("calls", stats.upstream_calls, stats.unbatched_calls),
        ("prompt tokens", stats.prompt_tokens, stats.unbatched_prompt_tokens),
        ("completion tokens", stats.completion_tokens, stats.unbatched_completion_tokens),
    ]
    cells = [(name, f"{now:,}", f"{before:,}", saving(now, before)) for name, now, before in rows]
    now, before = stats.cost_usd, stats.unbatched_cost_usd
    cells.append(("cost", dollars(now), dollars(before), saving(now, before)))
    return table(("", "this run", "one call each", "change"), cells)


def reuse(stats: Stats) -> Iterator[str]:
    """Yield what did not have to be asked, and what became of the cache."""
    if stats.cache_hits or stats.cache_misses:
        looked_up = stats.cache_hits + stats.cache_misses
        age = f", {seconds(stats.cache_age)} old on average" if stats.cache_hits else ""
        yield f"cache: {stats.cache_hits:,} of {looked_up:,} found ({stats.cache_hit_rate:.0%}{age}), {stats.cache_stores:,} stored"
        if stats.cache_evictions:
            yield f"       {stats.cache_evictions:,} dropped for want of room"
        if stats.cache_bypassed:
            yield f"       {stats.cache_bypassed:,} not looked up: it failed or was too slow"
    if stats.shared:
        yield f"shared: {plural(stats.shared, 'item')} answered by an equal one under way"


def remarks(stats: Stats, *, simulated: str | None, single: bool) -> Iterator[str]:
    """Yield what has to be known to read the figures; the arguments are those of `told`."""
    if stats.answered and not single:
        yield '"One call each" is worked out for the same answers, not measured; --single measures it.'
    if stats.costs_more and not single:
        yield (
            "Batching cost more than it saved here: the instructions that items share are shorter than what "
            "a combined prompt adds. Use --single for questions like these."
        )
    if stats.unreported_calls:
        yield f"{plural(stats.unreported_calls, 'call')} ended without reporting tokens; they are missing above."
    if simulated is not None:
        yield (
            f"The endpoint was simulated: the answers are made up, the tokens are counted by it, and dollars are "
            f"the list price of {simulated} for them. Nothing was paid."
        )
    elif stats.answered and stats.cost_usd is None:
        yield "The cost is unknown: there is no price for this model."
