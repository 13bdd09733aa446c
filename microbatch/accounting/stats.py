"""Counters of a batcher, their snapshot, and the division of a shared call's tokens."""

from __future__ import annotations

import operator
from collections import Counter
from itertools import repeat
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from microbatch.accounting.audits import AuditedSize  # noqa: TC001 the type of a field
from microbatch.accounting.budget import BudgetFigures  # noqa: TC001 likewise
from microbatch.accounting.similar import SimilarKind  # noqa: TC001 likewise
from microbatch.messages import Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Beside = Literal["audit", "check", "look_up"]
    """Routes of calls that belong to no reply."""


class _Figures(msgspec.Struct, kw_only=True):
    items: int = 0
    answered: int = 0
    failed: int = 0
    cancelled: int = 0
    queued: int = 0
    in_flight: int = 0
    upstream_calls: int = 0
    batches: int = 0
    batch_size_mean: float = 0.0
    batches_by_reason: dict[str, int] = {}
    singles_by_reason: dict[str, int] = {}
    fallback_calls: int = 0
    forwarded: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    unreported_calls: int = 0
    cost_usd: float | None = 0.0
    unclaimed: Usage = Usage()
    unbatched_calls: int = 0
    unbatched_prompt_tokens: int = 0
    unbatched_completion_tokens: int = 0
    unbatched_cost_usd: float | None = 0.0
    late_duplicates: int = 0
    unknown_ids: int = 0
    retries_denied: int = 0
    rate_limited: int = 0
    canaries_failed: int = 0
    lanes_parted: int = 0
    shared: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    cache_bypassed: int = 0
    cache_stores: int = 0
    cache_evictions: int = 0
    cache_age: float = 0.0
    spool_depth: int | None = None
    spool_dead: int | None = None
    spool_oldest: float | None = None
    alone_by_field: dict[str, int] = {}
    audit: tuple[AuditedSize, ...] = ()
    singles_compared: int = 0
    cut_replies: int = 0
    damage_usage: Usage = Usage()
    damage_cost_usd: float | None = 0.0
    audit_usage: Usage = Usage()
    audit_cost_usd: float | None = 0.0
    budget: BudgetFigures | None = None
    unpriced_calls: int = 0
    merge_rules: dict[str, int] = {}
    similar_hits: int = 0
    shadow_pairs: int = 0
    similar_checks: int = 0
    false_hits: int = 0
    false_hit_interval: tuple[float, float] | None = None
    guard_refusals: dict[str, int] = {}
    look_ups: int = 0
    look_ups_late: int = 0
    look_ups_failed: int = 0
    look_up_usage: Usage = Usage()
    look_up_cost_usd: float | None = 0.0
    check_usage: Usage = Usage()
    check_cost_usd: float | None = 0.0
    similar_saved_usd: float | None = 0.0
    similar: tuple[SimilarKind, ...] = ()

    @property
    def costs_more(self) -> bool:
        """True if combining, without audits, has cost more than it saved: in dollars where prices are known, else in tokens."""
        return self._loss > 0

    @property
    def damage_costs_more(self) -> bool:
        """True if it has only because replies were damaged: without `damage_usage` it would not have."""
        return 0 < self._loss <= self._damage

    @property
    def _loss(self) -> float:
        """The cost of combining beyond that of single calls, audits aside, in the unit of `_damage`."""
        if self._priced:
            return (self.cost_usd or 0.0) - (self.audit_cost_usd or 0.0) - (self.unbatched_cost_usd or 0.0)
        unbatched_tokens = self.unbatched_prompt_tokens + self.unbatched_completion_tokens
        return self.prompt_tokens + self.completion_tokens - _tokens(self.audit_usage) - unbatched_tokens

    @property
    def _damage(self) -> float:
        return self.damage_cost_usd or 0.0 if self._priced else _tokens(self.damage_usage)

    @property
    def _priced(self) -> bool:
        return bool(self.cost_usd)


class Stats(_Figures, frozen=True, kw_only=True):  # type: ignore[misc]  # msgspec allows it, unlike dataclasses
    """Figures of a batcher since its start; an immutable snapshot.

    Attributes:
        items: Requests accepted.
        answered: Requests that got an answer.
        failed: Requests that ended with an error.
        cancelled: Requests whose caller left before the answer.
        queued: Requests accepted and not settled, those in flight included.
        in_flight: Calls under way, each with its fallback.
        upstream_calls: HTTP attempts, refused and repeated ones included.
        batches: Calls that carried more than one request.
        batch_size_mean: Requests per such call, 0.0 before the first.
        batches_by_reason: Batches that left a lane, by flush reason; fallback calls are not counted.
        singles_by_reason: Calls that carried one request, by reason.
        fallback_calls: Calls made because an earlier reply left requests unanswered.
        forwarded: Requests relayed unchanged; they are not counted as items.
        retries: Attempts that repeated a failed one.
        prompt_tokens: Prompt tokens that the endpoint reported.
        cached_tokens: Those of them read from its prefix cache.
        completion_tokens: Generated tokens that it reported.
        unreported_calls: Calls that ended without reporting tokens; nothing is added for them.
        cost_usd: Price of the reported tokens in US dollars, without those of `unpriced_calls`; None if nothing was priced, because no
            model's price is known, or no call has reported any tokens.
        unclaimed: The tokens that belong to no reply: of cancelled, failed or damaged requests, and of audits.
        unbatched_calls: Calls that the answered requests would have taken one by one.
        unbatched_prompt_tokens: Prompt tokens of those calls.
        unbatched_completion_tokens: Completion tokens of those calls.
        unbatched_cost_usd: Their price in US dollars, without the requests of unpriced models, so that it compares with `cost_usd`;
            None if none of them was priced.
        late_duplicates: Copies of delivered answers that were dropped.
        unknown_ids: Answers under ids that were not asked for.
        retries_denied: Failed calls, and parts of calls that were cut off, not repeated because the retry budget was used up.
        rate_limited: Attempts refused with "too many requests" (429).
        canaries_failed: Complete replies that were discarded because they got their canary wrong.
        lanes_parted: How often a lane stopped combining for a while, because asking again cost more than combining saved.
        shared: Requests answered by the call of an identical request under way.
        cache_hits: Requests answered from the cache; they are among `answered`, and cost nothing.
        cache_misses: Requests not found in the cache, those included for which it was too slow or out of order.
        cache_bypassed: Those of them for which it was not asked, failed, or took too long.
        cache_stores: Answers put into the cache.
        cache_evictions: Answers that the cache dropped for lack of space.
        cache_age: Mean age of the answers that were hit, in seconds.
        spool_depth: Requests in the spool that are neither answered nor dead, up to a second ago; None without a spool.
        spool_dead: Dead letters in it; None without a spool.
        spool_oldest: Age in seconds of the oldest that is neither answered nor dead; None if there is none.
        alone_by_field: Requests that their form kept out of combined prompts, by the field or the kind of message that did: "seed",
            "messages: image part", "last message is not the user's"... A request with several such fields counts for each.
        audit: What `Microbatcher(audit=)` has found, for each kind of lane and size of batches.
        singles_compared: Single replies with which the `unbatched_` figures of combined replies of the same kind were compared; they
            are corrected if single replies take more or less than was calculated. 0 until there are at least 8 of a kind.
        cut_replies: Combined replies that were broken off, or hit a token limit.
        damage_usage: The tokens of the `fallback_calls`, and of combined calls whose reply answered nothing.
        damage_cost_usd: Their price in US dollars, like `cost_usd`.
        audit_usage: The tokens of audits; they are among `unclaimed`.
        audit_cost_usd: Their price in US dollars, like `cost_usd`.
        budget: What was spent of `Microbatcher(budget=)`, and what is left; None without a budget.
        unpriced_calls: Calls that reported tokens and whose model has no known price. Their tokens are counted, and no sum of dollars
            includes them.
        merge_rules: Requests under `merge="auto"`, by what it meant for them: "priced" is `merge="when-cheaper"`; "unpriced" and
            "requests_limited" are `merge="always"`, for want of a price, or because the number of requests is limited.
        similar_hits: Requests answered with the answer to a similar question; they are among `answered`.
        shadow_pairs: Answers to similar questions that were compared because their kind is not proven.
        similar_checks: Answers to similar questions that were handed out, and asked again.
        false_hits: Those of them that were wrong.
        false_hit_interval: The share of wrong ones among `similar_hits`, as in `SimilarKind`; None before the first check.
        guard_refusals: Look-ups whose most similar question states other facts, by the kind of fact: "numbers", "names"...
        look_ups: Questions for which a similar one was looked for.
        look_ups_late: Those of them whose vector came too late.
        look_ups_failed: Those of them that got no vector, or one that cannot be used.
        look_up_usage: The tokens of the vectors; they are among `unclaimed`. None are known of vectors from `SemanticCache(embed=)`.
        look_up_cost_usd: Their price in US dollars, like `cost_usd`.
        check_usage: The tokens of questions asked again to check answers to similar ones; they are among `unclaimed`.
        check_cost_usd: Their price in US dollars, like `cost_usd`.
        similar_saved_usd: The price of the calls that `similar_hits` would have taken one by one, like `unbatched_cost_usd`.
        similar: What a `SemanticCache` has found, for each kind of question.
    """

    @property
    def similar_net_usd(self) -> float | None:
        """Dollars saved by answers to similar questions, less the cost of look-ups and checks; None if a price is not known."""
        if self.similar_saved_usd is None or self.look_up_cost_usd is None or self.check_cost_usd is None:
            return None
        return self.similar_saved_usd - self.look_up_cost_usd - self.check_cost_usd

    @property
    def cache_hit_rate(self) -> float:
        """Hits among all look-ups, 0 to 1; 0.0 before the first."""
        return self.cache_hits / (self.cache_hits + self.cache_misses or 1)


_MEANS: Final = {"batch_size_mean": "batches", "cache_age": "cache_hits"}
"""Figures that are means, and the counts they are means of."""


OF_THE_CACHE: Final = ("shadow_pairs", "similar_checks", "false_hits", "false_hit_interval", "similar")
"""Figures of a `SemanticCache`, which all batchers that share it report."""

_MAX_FIELDS: Final = 64
"""Most names in `alone_by_field`: callers may make them up."""

OTHER_FIELDS: Final = "other fields"


def together(parts: Sequence[Stats]) -> Stats:
    """Return the figures of several batchers as if they were one, without the spool's."""
    totals: dict[str, Any] = {}
    for name in Stats.__struct_fields__:
        values = [getattr(part, name) for part in parts]
        if name in _MEANS:
            weights = [getattr(part, _MEANS[name]) for part in parts]
            totals[name] = sum(map(operator.mul, values, weights)) / (sum(weights) or 1)
        elif isinstance(values[0], dict):
            totals[name] = dict(sum(map(Counter[str], values), Counter[str]()))
        elif name == "false_hit_interval":
            totals[name] = _one_interval(values)
        elif isinstance(values[0], Usage | tuple):
            totals[name] = sum(values, type(values[0])())
        elif name == "budget":
            totals[name] = _one_budget(values)
        elif not name.startswith("spool_"):  # the batchers may share one spool
            known = [value for value in values if value]
            totals[name] = None if None in values and not known else sum(known, 0.0 if name.endswith("_usd") else 0)
    return Stats(**totals)


def _one_interval(parts: Sequence[tuple[float, float] | None]) -> tuple[float, float] | None:
    """Return the interval of the only batcher that has one; None for several, whose figures are in `Stats.similar`."""
    found = {each for each in parts if each is not None}
    return found.pop() if len(found) == 1 else None


def _one_budget(parts: Sequence[BudgetFigures | None]) -> BudgetFigures | None:
    """Return the figures of the budget that batchers share; None if they have several."""
    found = [each for each in parts if each is not None]
    refused = sum(each.refused for each in found)
    totals = {msgspec.structs.replace(each, refused=refused) for each in found}
    return totals.pop() if len(totals) == 1 else None


class Ledger(_Figures, kw_only=True):
    """The running counters behind `Stats`, incremented by the batcher."""

    batched_items: int = 0  # requests in combined calls
    cache_ages: float = 0.0  # sum of the ages of all answers that were hit, in seconds
    # Tokens of single calls that were counted too many, by whether they have a price; too few are negative.
    owed: dict[bool, Usage] = {}
    priced: set[str] = set()  # the sums of dollars to which something was added

    def __post_init__(self) -> None:
        figures: _Figures = self  # whose fields these are, also for type checkers
        figures.batches_by_reason = Counter()
        figures.singles_by_reason = Counter()
        figures.alone_by_field = Counter()
        figures.merge_rules = Counter()
        figures.guard_refusals = Counter()

    def note_alone(self, field: str) -> bool:
        """Count a request that *field* keeps alone; return whether it is the first."""
        counts = self.alone_by_field
        if field not in counts and len(counts) >= _MAX_FIELDS:
            field = OTHER_FIELDS
        counts[field] += 1
        return counts[field] == 1

    def pay(self, usage: Usage, alone: Usage, price: Callable[[Usage], float] | None, *, damage: bool = False) -> None:
        """Add a call that reported *usage*; one by one, its answered requests would have used *alone*.

        *damage* if its reply answered nothing, or it asked again for what another had left unanswered.
        """
        if damage:
            self.damage_usage += usage
            self._add("damage_cost_usd", usage, price)
        figures: _Figures = self
        if self.owed:
            alone = self._less_owed(alone, priced=price is not None)
        figures.prompt_tokens += usage.prompt_tokens
        figures.cached_tokens += usage.cached_tokens
        figures.completion_tokens += usage.completion_tokens
        figures.unbatched_prompt_tokens += alone.prompt_tokens
        figures.unbatched_completion_tokens += alone.completion_tokens
        if price is None and (usage.prompt_tokens or usage.completion_tokens):
            figures.unpriced_calls += 1
        # Either both sums include a call or none, so that they compare.
        self._add("cost_usd", usage, price)
        self._add("unbatched_cost_usd", alone, price)

    def _add(self, name: str, usage: Usage, price: Callable[[Usage], float] | None) -> None:
        """Add the price of *usage* to the sum of dollars *name*, which is None as long as nothing in it was priced."""
        if not (usage.prompt_tokens or usage.completion_tokens):
            return
        if price is not None:
            setattr(self, name, (getattr(self, name) or 0.0) + price(usage))
            self.priced.add(name)
        elif name not in self.priced:
            setattr(self, name, None)

    def pay_beside(self, what: Beside, usage: Usage, price: Callable[[Usage], float] | None) -> None:
        """Add a call that reported *usage* and belongs to no reply: *what* it was for is part of the names of its sums."""
        setattr(self, f"{what}_usage", getattr(self, f"{what}_usage") + usage)
        self._add(f"{what}_cost_usd", usage, price)
        self.unclaimed += usage
        self.pay(usage, Usage(), price)

    def save(self, alone: Usage, price: Callable[[Usage], float] | None) -> None:
        """Add an answer to a similar question, instead of a call that would have used *alone*."""
        self.similar_hits += 1
        self._add("similar_saved_usd", alone, price)
        self.pay(Usage(), alone, price)

    def correct(self, missing: Usage, price: Callable[[Usage], float] | None) -> None:
        """Add *missing* to what single calls would have used. Negative tokens are taken from later calls: counters only grow."""
        priced = price is not None
        owed = self.owed.get(priced, Usage())
        self.owed[priced] = Usage(
            owed.prompt_tokens - missing.prompt_tokens, owed.completion_tokens - missing.completion_tokens
        )
        self.pay(Usage(), Usage(), price)

    def _less_owed(self, alone: Usage, *, priced: bool) -> Usage:
        """Return *alone* less the tokens that were counted too many before for calls that have, or have not, a price."""
        owed = self.owed.pop(priced, Usage())
        prompt, completion = alone.prompt_tokens - owed.prompt_tokens, alone.completion_tokens - owed.completion_tokens
        if prompt < 0 or completion < 0:
            self.owed[priced] = Usage(max(0, -prompt), max(0, -completion))
        prompt, completion = max(0, prompt), max(0, completion)
        cached = min(alone.cached_tokens, prompt)
        written = min(alone.cache_write_tokens, prompt - cached)
        return Usage(prompt, completion, cached, cache_write_tokens=written)

    @property
    def comparison(self) -> str:
        """The cost against that of single calls, for a log line."""
        if self.cost_usd and self.unbatched_cost_usd is not None:
            return f"{self.cost_usd:.4f} USD against about {self.unbatched_cost_usd:.4f} one by one"
        tokens = self.prompt_tokens + self.completion_tokens
        unbatched_tokens = self.unbatched_prompt_tokens + self.unbatched_completion_tokens
        return f"{tokens} tokens against about {unbatched_tokens} one by one"

    def snapshot(self, **others: Any) -> Stats:
        """Return the figures; *others* are those that are kept elsewhere."""
        figures: dict[str, Any] = {name: getattr(self, name) for name in Stats.__struct_fields__} | {
            "batch_size_mean": self.batched_items / (self.batches or 1),
            "batches_by_reason": dict(self.batches_by_reason),
            "singles_by_reason": dict(self.singles_by_reason),
            "alone_by_field": dict(self.alone_by_field),
            "merge_rules": dict(self.merge_rules),
            "guard_refusals": dict(self.guard_refusals),
            "unbatched_calls": self.answered,
            "cache_age": self.cache_ages / (self.cache_hits or 1),
        }
        if self.unreported_calls and not self.prompt_tokens and not self.completion_tokens:
            unknown = (
                "cost_usd",
                "unbatched_cost_usd",
                "damage_cost_usd",
                "audit_cost_usd",
                "check_cost_usd",
                "look_up_cost_usd",
            )
            figures |= dict.fromkeys(unknown)
        return Stats(**figures | others)


def _tokens(usage: Usage) -> int:
    return usage.prompt_tokens + usage.completion_tokens


def divided(usage: Usage, prompts: Sequence[int], completions: Sequence[int]) -> list[Usage]:
    """Divide *usage* into parts that add up to it exactly, by the weights of each part for *prompts* and for *completions*."""
    parts = map(
        Usage,
        split(usage.prompt_tokens, prompts),
        split(usage.completion_tokens, completions),
        split(usage.cached_tokens, prompts),
        repeat(usage.estimated),
        split(usage.cache_write_tokens, prompts),
        split(usage.reasoning_tokens, completions),
    )
    return list(parts)


def split(total: int, weights: Sequence[int]) -> list[int]:
    """Divide *total* in proportion to *weights* into whole numbers that add up to it exactly (largest remainder).

    If all weights are zero they count as equal; of equal remainders, the first ones are rounded up.
    """
    if not total:
        return [0] * len(weights)
    count = len(weights)
    if len(set(weights)) == 1:  # often, and with every call
        share, rest = divmod(total, count)
        return [share + 1] * rest + [share] * (count - rest)
    whole = sum(weights)
    shares = [total * weight // whole for weight in weights]
    rest = total - sum(shares)
    if rest:
        remainders = [total * weight % whole for weight in weights]
        for index in sorted(range(count), key=remainders.__getitem__, reverse=True)[:rest]:
            shares[index] += 1
    return shares
