"""Parts of the summaries of the commands, for people and as JSON."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from microbatch.cli.console import COLUMNS, change, dollars, plural, seconds, table

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping

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

ALONE: Final = {
    "no_company": "nothing else that could share a prompt with {them} was left",
    "idle": "nothing else was waiting to share a prompt with {them}",
    "too_long": "too long to share a prompt (--max-batch-tokens, --max-prompt-tokens)",
    "output": "no room for several answers in one reply (--max-output-tokens, --tpm, the model's own limits)",
    "not_combinable": "not combinable",
    "high": "failed in combined prompts before",
    "not_cheaper": "cheaper alone than combined",
    "condemned": "the audit has found that combining changes the answers",
    "latency": "several answers would take longer than --max-latency",
}
"""Reasons for which items of a run go alone, in words for its summary."""

MAX_KINDS: Final = 20
MAX_EXAMPLES: Final = 5

_VARYING: Final = re.compile(r"\S*\d\S*")
"""Words with a digit."""


def fields(stats: Stats, *names: str) -> dict[str, Any]:
    """Return fields of *stats* by name, with dollars rounded to 9 places."""
    values = {name: getattr(stats, name) for name in names}
    return {
        name: round(value, 9) if name.endswith("cost_usd") and value is not None else value
        for name, value in values.items()
    }


def comparison(stats: Stats, this: str = "this run", single: str = "one call each") -> str:
    """Return a table of what was paid, under the heading *this*, against one call for each answer, under *single*."""
    counts = [
        ("calls", stats.upstream_calls, stats.unbatched_calls),
        ("prompt tokens", stats.prompt_tokens, stats.unbatched_prompt_tokens),
        ("completion tokens", stats.completion_tokens, stats.unbatched_completion_tokens),
    ]
    rows = [(name, f"{now:,}", f"{before:,}", change(now, before)) for name, now, before in counts]
    now, before = stats.cost_usd, stats.unbatched_cost_usd
    rows.append(("cost", dollars(now), dollars(before), change(now, before)))
    return table(("", this, single, "change"), rows)


def skipped(count: int) -> Iterator[str]:
    """Yield a line about the records that are not asked about because their fields are blank, if there are any."""
    if count:
        fields = "the fields of the template are blank"
        yield f"{plural(count, 'record')} skipped: {fields} (--on-empty ask|fail)"


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
            what = f" ({', '.join(f'{name}: {times:,}' for name, times in fields)}); see --combine-param"
        if reason not in ("fallback", "audit"):
            said = ALONE.get(reason, reason.replace("_", " ")).format(them="it" if count == 1 else "them")
            line = f"alone: {plural(count, 'item')}, {said}{what}"
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
        dollars_are = "" if stats.cost_usd is None else f", and dollars are the price of {plan.simulated} for them"
        found.append(
            f"The endpoint was simulated: the answers are made up, the tokens are counted by it{dollars_are}. Nothing was paid."
        )
    found += unpriced(stats)
    yield from (textwrap.fill(remark, COLUMNS, break_on_hyphens=False) for remark in found)


def unpriced(stats: Stats) -> Iterator[str]:
    """Yield wrapped text about what is left out of the dollars for want of a price, if anything is."""
    words = ""
    if stats.cost_usd is None and (stats.prompt_tokens or stats.completion_tokens):
        words = "The cost is unknown: there is no price for this model; see --prices FILE."
    elif stats.unpriced_calls:
        calls, verb = plural(stats.unpriced_calls, "call"), "is" if stats.unpriced_calls == 1 else "are"
        words = f"{calls} of unpriced models {verb} not included in the dollars, see --prices."
    if words:
        yield textwrap.fill(words, COLUMNS, break_on_hyphens=False)


class Failures:
    """Failures by kind, with the words of the first one and the first few examples of each."""

    def __init__(self) -> None:
        self._counts: Counter[Hashable] = Counter()
        self._kinds: dict[Hashable, tuple[str, str, list[str]]] = {}
        self._others = 0

    def add(self, problem: str, example: str, place: str = "", kind: Hashable = None) -> None:
        """Add a failure of the line or id *example*: *problem*, which is its *kind* unless one is given; *place* precedes examples."""
        kind = place, problem if kind is None else kind
        if kind not in self._kinds and len(self._kinds) >= MAX_KINDS:
            self._others += 1
            return
        self._counts[kind] += 1
        examples = self._kinds.setdefault(kind, (place, problem, []))[2]
        if len(examples) < MAX_EXAMPLES:
            examples.append(example)

    def add_error(self, error: Mapping[str, Any], name: str) -> None:
        """Add the failure of the item *name*, with the *error* of its output line.

        The kind is that of the error and its words, apart from numbers and ids in them, which differ from item to item.
        """
        words = _VARYING.sub("#", error["message"])
        kind = error["type"], error.get("status"), error.get("code"), words
        self.add(f"{error['type']}: {error['message']}", name, "id ", kind)

    def lines(self) -> Iterator[str]:
        """Yield a line for each of the first `MAX_KINDS` kinds, and the number of the other failures."""
        for kind, (place, problem, examples) in self._kinds.items():
            rest = self._counts[kind] - len(examples)
            more = f" and {rest:,} more" if rest else ""
            yield f"{place}{', '.join(examples)}{more}: {problem}"
        if self._others:
            yield f"and {plural(self._others, 'failure')} of other kinds"
