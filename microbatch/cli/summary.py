"""Parts of the summaries of the commands, for people and as JSON."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from microbatch.cli.console import COLUMNS, change, dollars, plural, seconds, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from microbatch.accounting.stats import Stats
    from microbatch.cli.plan import Plan

DAMAGE: Final = {
    "fallback_calls": ("call asked again", "calls asked again"),
    "unknown_ids": ("answer under an unknown id", "answers under unknown ids"),
    "cut_replies": ("reply cut off", "replies cut off"),
    "canaries_failed": ("canary failed", "canaries failed"),
    "lanes_parted": ("kind of question asked alone for a while", "times a kind of question asked alone for a while"),
}
"""Figures of replies that did not answer all that they were asked, with the words for one and for several."""

MAX_KINDS: Final = 20
MAX_EXAMPLES: Final = 5


def fields(stats: Stats, *names: str) -> dict[str, Any]:
    """Return fields of *stats* by name, with dollars rounded to 9 places."""
    values = {name: getattr(stats, name) for name in names}
    return {
        name: round(value, 9) if name.endswith("cost_usd") and value is not None else value
        for name, value in values.items()
    }


def comparison(stats: Stats) -> str:
    """Return a table of what was paid against one call for each answer."""
    counts = [
        ("calls", stats.upstream_calls, stats.unbatched_calls),
        ("prompt tokens", stats.prompt_tokens, stats.unbatched_prompt_tokens),
        ("completion tokens", stats.completion_tokens, stats.unbatched_completion_tokens),
    ]
    rows = [(name, f"{now:,}", f"{before:,}", change(now, before)) for name, now, before in counts]
    now, before = stats.cost_usd, stats.unbatched_cost_usd
    rows.append(("cost", dollars(now), dollars(before), change(now, before)))
    return table(("", "this run", "one call each", "change"), rows)


def merging(stats: Stats, plan: Plan) -> Iterator[str]:
    """Yield a line about when requests were combined, and why, if any were to be sent."""
    merge, rules = plan.policy.merge, {name: count for name, count in stats.merge_rules.items() if count}
    if plan.single or (merge == "auto" and not rules):
        return
    whys = {
        "priced": "when-cheaper{}, because prices are known and nothing limits the requests",
        "unpriced": "always{}, because no price is known for the model",
        "requests_limited": "always{}, because the endpoint's limit on requests was nearly used up",
    }
    if merge != "auto":
        why = f"{merge}, because --merge says so"
    elif plan.rate_limit is not None and plan.rate_limit.rpm is not None:
        why = "always, because --rpm limits the requests"
    else:
        counts = [f" for {plural(rules[name], 'item')}" if len(rules) > 1 else "" for name in whys if name in rules]
        why = "; ".join(map(str.format, (whys[name] for name in whys if name in rules), counts))
    yield textwrap.fill(f"merge: {why}", COLUMNS, subsequent_indent="       ")


def reuse(stats: Stats) -> Iterator[str]:
    """Yield lines about the answers that came from the cache or from an equal request, if there are any."""
    if stats.cache_hits or stats.cache_misses:
        looked_up = stats.cache_hits + stats.cache_misses
        age = f", {seconds(stats.cache_age)} old on average" if stats.cache_hits else ""
        yield f"cache: {stats.cache_hits:,} of {looked_up:,} found ({stats.cache_hit_rate:.0%}{age}), {stats.cache_stores:,} stored"
        if stats.cache_evictions:
            yield f"       {stats.cache_evictions:,} evicted because the cache is full"
        if stats.cache_bypassed:
            yield f"       {stats.cache_bypassed:,} not looked up: the cache failed or was too slow"
    if stats.shared:
        yield f"shared: {plural(stats.shared, 'item')} answered by an equal one under way"


def alone(stats: Stats) -> Iterator[str]:
    """Yield a line for each reason for which requests went alone, other than that an earlier call had left them unanswered.

    Audits are no requests, and have lines of their own.
    """
    for reason, count in sorted(stats.singles_by_reason.items(), key=lambda each: -each[1]):
        what = ""
        if reason == "not_combinable" and stats.alone_by_field:
            fields = sorted(stats.alone_by_field.items(), key=lambda each: -each[1])
            what = f" ({', '.join(f'{name}: {times:,}' for name, times in fields)})"
        if reason not in ("fallback", "audit"):
            line = f"alone: {plural(count, 'item')}, {reason.replace('_', ' ')}{what}"
            yield textwrap.fill(line, COLUMNS, subsequent_indent="       ")


def damage(stats: Stats) -> Iterator[str]:
    """Yield wrapped text with the counts of damaged replies and what was done about them, if there were any."""
    counts = {name: getattr(stats, name) for name in DAMAGE}
    if any(counts.values()):
        told = ", ".join(f"{count:,} {DAMAGE[name][count != 1]}" for name, count in counts.items() if count)
        yield textwrap.fill(f"damage: {told}", COLUMNS, subsequent_indent="        ")


def remarks(stats: Stats, plan: Plan, *, asked_again: bool = False) -> Iterator[str]:
    """Yield wrapped remarks on the figures of a run with *plan*; with *asked_again*, an audit has had items asked again."""
    found = []
    if stats.answered and not plan.single:
        compared = "not measured"
        if stats.singles_compared:
            compared = f"and corrected by what {plural(stats.singles_compared, 'single call')} took"
        found.append(f'"One call each" is calculated for the same answers, {compared}; --single measures it.')
    if stats.damage_costs_more and not plan.single:
        usage = stats.damage_usage
        price = "" if stats.damage_cost_usd is None else f" ({dollars(stats.damage_cost_usd)})"
        found.append(
            "Batching cost more than it saved here because of damaged replies: those without any answer, and asking again, took "
            f"{plural(usage.prompt_tokens + usage.completion_tokens, 'token')}{price}. Try a smaller --max-batch-size or "
            "another model, or use --single."
        )
    elif stats.costs_more and not plan.single:
        short = "the instructions that items share are shorter than what a combined prompt adds"
        found.append(
            "This run cost more than one call each would have. The answers that its audit has had asked again are included."
            if asked_again
            else f"Batching cost more than it saved here: {short}. Use --single for questions like these."
        )
    if stats.unreported_calls:
        found.append(
            f"{plural(stats.unreported_calls, 'call')} ended without reporting tokens; these are missing above."
        )
    if plan.simulated is not None:
        found.append(
            "The endpoint was simulated: the answers are made up, the tokens are counted by it, and dollars are "
            f"the list price of {plan.simulated} for them. Nothing was paid."
        )
    elif stats.answered and stats.cost_usd is None:
        found.append("The cost is unknown: there is no price for this model.")
    yield from (textwrap.fill(remark, COLUMNS, break_on_hyphens=False) for remark in found)


class Failures:
    """Failures by kind, with the first few examples of each."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._examples: dict[tuple[str, str], list[str]] = {}
        self._others = 0

    def add(self, problem: str, example: str, place: str = "") -> None:
        """Add a failure of the line or id *example*: *problem*, in the same words for all of a kind; *place* precedes examples."""
        kind = place, problem
        if kind not in self._counts and len(self._counts) >= MAX_KINDS:
            self._others += 1
            return
        self._counts[kind] += 1
        if self._counts[kind] <= MAX_EXAMPLES:
            self._examples.setdefault(kind, []).append(example)

    def lines(self) -> Iterator[str]:
        """Yield a line for each of the first `MAX_KINDS` kinds, and the number of the other failures."""
        for (place, problem), examples in self._examples.items():
            rest = self._counts[place, problem] - len(examples)
            more = f" and {rest:,} more" if rest else ""
            yield f"{place}{', '.join(examples)}{more}: {problem}"
        if self._others:
            yield f"and {plural(self._others, 'failure')} of other kinds"
