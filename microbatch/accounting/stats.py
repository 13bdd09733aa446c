"""Counters, what they add up to, and how the cost of a shared call is divided."""

from __future__ import annotations

from collections import Counter
from itertools import repeat
from operator import floordiv, mod, mul
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.messages import Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """What a batcher has done so far; a snapshot that never changes.

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
        batches_by_reason: Batches that left a lane, by flush reason; asking again is not in here.
        singles_by_reason: Calls that carried one request, by reason.
        fallback_calls: Calls made because an earlier reply left requests open.
        forwarded: Requests relayed as they were; they are no items.
        retries: Attempts that repeated a failed one.
        prompt_tokens: Prompt tokens the endpoint reported.
        cached_tokens: The part of them it read from its prefix cache.
        completion_tokens: Generated tokens it reported.
        unreported_calls: Calls that ended without reporting tokens; nothing is added for them.
        cost_usd: Price of the reported tokens in US dollars; None if a model's price is unknown.
        unclaimed: The part of the tokens that belongs to no reply: of cancelled, failed or damaged requests.
        unbatched_calls: Calls that the answered requests would have taken one by one.
        unbatched_prompt_tokens: Prompt tokens that would have taken.
        unbatched_completion_tokens: Completion tokens that would have taken.
        unbatched_cost_usd: Price of that in US dollars; None like `cost_usd`.
        late_duplicates: Copies of delivered answers that were dropped.
        unknown_ids: Answers under ids that nobody asked for.
        retries_denied: Failed calls that were not retried because the retry budget was used up.
        rate_limited: Attempts that were answered with "too many requests" (429).
        canaries_failed: Complete replies that were distrusted because they got their canary wrong.
        lanes_parted: How often a lane stopped combining for a while, because asking again cost more than combining saved.
        shared: Requests that were answered by one under way that asked the same.
        cache_hits: Requests that were answered from the cache; they are among `answered`, and paid nothing.
        cache_misses: Requests that were looked up in vain, those for which the cache was too slow or out of order included.
        cache_bypassed: Those of them for which it was not asked, failed, or took too long.
        cache_stores: Answers put into the cache.
        cache_evictions: Answers that the cache dropped for want of room.
        cache_age: Mean age of the answers that were hit, in seconds.
        spool_depth: Requests in the spool that are neither answered nor dead, up to a second ago; None without a spool.
        spool_dead: Dead letters in it; None without a spool.
        spool_oldest: Age in seconds of the oldest that is neither answered nor dead; None if there is none.
    """

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

    @property
    def cache_hit_rate(self) -> float:
        """Hits among all look-ups, 0 to 1; 0.0 before the first."""
        return self.cache_hits / (self.cache_hits + self.cache_misses or 1)

    @property
    def costs_more(self) -> bool:
        """Whether combining has cost more than it saved: in dollars if prices are known, else in tokens."""
        alone = Usage(self.unbatched_prompt_tokens, self.unbatched_completion_tokens)
        return _dearer(Usage(self.prompt_tokens, self.completion_tokens), alone, self.cost_usd, self.unbatched_cost_usd)


def together(parts: Sequence[Stats]) -> Stats:
    """Return what several batchers have done as if it were one; where one price is unknown, so is the whole."""
    totals: dict[str, Any] = {}
    for name in Stats.__struct_fields__:
        values = [getattr(part, name) for part in parts]
        if name in _MEANS:
            weights = [getattr(part, _MEANS[name]) for part in parts]
            weighed = sum(value * weight for value, weight in zip(values, weights, strict=True))
            totals[name] = weighed / (sum(weights) or 1)
        elif isinstance(values[0], dict):
            totals[name] = dict(sum(map(Counter, values), Counter()))
        elif isinstance(values[0], Usage):
            totals[name] = sum(values, Usage())
        elif name not in _OF_THE_SPOOL:
            totals[name] = None if None in values else sum(values)
    return Stats(**totals)


_MEANS: Final = {"batch_size_mean": "batches", "cache_age": "cache_hits"}
"""Figures that are means, and of how many."""

_OF_THE_SPOOL: Final = ("spool_depth", "spool_dead", "spool_oldest")
"""Figures of one spool, whoever looks at it."""


def _dearer(paid: Usage, alone: Usage, cost_usd: float | None, alone_usd: float | None) -> bool:
    if cost_usd and alone_usd is not None:
        return cost_usd > alone_usd
    return paid.prompt_tokens + paid.completion_tokens > alone.prompt_tokens + alone.completion_tokens


class Ledger:
    """The running counters behind `Stats`; plain attributes, changed by the batcher as things happen."""

    def __init__(self) -> None:
        self.items = self.answered = self.failed = self.cancelled = 0
        self.upstream_calls = self.batches = self.batched_items = self.fallback_calls = self.forwarded = (
            self.retries
        ) = 0
        self.batches_by_reason: Counter[str] = Counter()
        self.singles_by_reason: Counter[str] = Counter()
        self.paid = Usage()
        self.unreported_calls = 0
        self.cost_usd: float | None = 0.0
        self.unclaimed = Usage()
        self.unbatched = Usage()
        self.unbatched_cost_usd: float | None = 0.0
        self.late_duplicates = self.unknown_ids = 0
        self.retries_denied = self.rate_limited = 0
        self.canaries_failed = self.lanes_parted = self.shared = 0
        self.cache_hits = self.cache_misses = self.cache_bypassed = self.cache_stores = self.cache_evictions = 0
        self.cache_ages = 0.0

    def pay(self, usage: Usage, alone: Usage, price: Callable[[Usage], float] | None) -> None:
        """Book a call that reported *usage*; one by one, its answered requests would have used *alone*."""
        self.paid += usage
        self.unbatched += alone
        if price is None:
            self.cost_usd = self.unbatched_cost_usd = None
            return
        if self.cost_usd is not None and self.unbatched_cost_usd is not None:
            self.cost_usd += price(usage)
            self.unbatched_cost_usd += price(alone)

    @property
    def costs_more(self) -> bool:
        """See `Stats.costs_more`."""
        return _dearer(self.paid, self.unbatched, self.cost_usd, self.unbatched_cost_usd)

    @property
    def comparison(self) -> str:
        """What was paid against what single calls would have cost, for people."""
        if self.cost_usd and self.unbatched_cost_usd is not None:
            return f"{self.cost_usd:.4f} USD against about {self.unbatched_cost_usd:.4f} one by one"
        paid, alone = (usage.prompt_tokens + usage.completion_tokens for usage in (self.paid, self.unbatched))
        return f"{paid} tokens against about {alone} one by one"

    def snapshot(
        self,
        *,
        queued: int,
        in_flight: int,
        spool_depth: int | None = None,
        spool_dead: int | None = None,
        spool_oldest: float | None = None,
    ) -> Stats:
        """Return the figures as they stand, with those that are kept elsewhere."""
        return Stats(
            items=self.items,
            answered=self.answered,
            failed=self.failed,
            cancelled=self.cancelled,
            queued=queued,
            in_flight=in_flight,
            upstream_calls=self.upstream_calls,
            batches=self.batches,
            batch_size_mean=self.batched_items / self.batches if self.batches else 0.0,
            batches_by_reason=dict(self.batches_by_reason),
            singles_by_reason=dict(self.singles_by_reason),
            fallback_calls=self.fallback_calls,
            forwarded=self.forwarded,
            retries=self.retries,
            prompt_tokens=self.paid.prompt_tokens,
            cached_tokens=self.paid.cached_tokens,
            completion_tokens=self.paid.completion_tokens,
            unreported_calls=self.unreported_calls,
            cost_usd=self.cost_usd,
            unclaimed=self.unclaimed,
            unbatched_calls=self.answered,
            unbatched_prompt_tokens=self.unbatched.prompt_tokens,
            unbatched_completion_tokens=self.unbatched.completion_tokens,
            unbatched_cost_usd=self.unbatched_cost_usd,
            late_duplicates=self.late_duplicates,
            unknown_ids=self.unknown_ids,
            retries_denied=self.retries_denied,
            rate_limited=self.rate_limited,
            canaries_failed=self.canaries_failed,
            lanes_parted=self.lanes_parted,
            shared=self.shared,
            cache_hits=self.cache_hits,
            cache_misses=self.cache_misses,
            cache_bypassed=self.cache_bypassed,
            cache_stores=self.cache_stores,
            cache_evictions=self.cache_evictions,
            cache_age=self.cache_ages / self.cache_hits if self.cache_hits else 0.0,
            spool_depth=spool_depth,
            spool_dead=spool_dead,
            spool_oldest=spool_oldest,
        )


def divided(usage: Usage, prompts: Sequence[int], completions: Sequence[int]) -> list[Usage]:
    """Divide *usage* into parts that add up to it exactly.

    Args:
        usage: The whole.
        prompts: The weight of each part for the prompt's tokens; at least one.
        completions: As many weights for the generated tokens.
    """
    none = [0] * len(prompts)  # most calls have no tokens of the rarer kinds, and this is done for every call
    return [
        *map(
            Usage,
            split(usage.prompt_tokens, prompts),
            split(usage.completion_tokens, completions),
            split(usage.cached_tokens, prompts) if usage.cached_tokens else none,
            repeat(usage.estimated),
            split(usage.cache_write_tokens, prompts) if usage.cache_write_tokens else none,
            split(usage.reasoning_tokens, completions) if usage.reasoning_tokens else none,
        )
    ]


def split(total: int, weights: Sequence[int]) -> list[int]:
    """Divide *total* in proportion to *weights* into whole numbers that add up to it exactly (largest remainder).

    Equal weights share alike, though all be zero; of equal remainders, the first ones are rounded up.
    """
    count = len(weights)
    if weights.count(weights[0]) == count:
        share, rest = divmod(total, count)
        return [share + 1] * rest + [share] * (count - rest)
    whole = sum(weights)
    # Without a step of Python's own for each: this is done twice for every call.
    parts = list(map(mul, weights, repeat(total)))
    shares = list(map(floordiv, parts, repeat(whole)))
    rest = total - sum(shares)
    if rest:
        remainders = list(map(mod, parts, repeat(whole)))
        # Reversed, yet stable.
        for index in sorted(range(count), key=remainders.__getitem__, reverse=True)[:rest]:
            shares[index] += 1
    return shares
