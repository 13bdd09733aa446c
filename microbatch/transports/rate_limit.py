"""Requests and tokens per minute, as the caller declares them: one dual token bucket for each (endpoint, model, credentials).

Providers count over a minute, some over a sliding one, some with a bucket that refills. This keeps to the strictest reading: no
more than the limit in any 60 seconds. *Small* requests (at most the burst) are paid from a bucket that holds the burst and refills
so that burst and one minute's refill make the limit. Larger ones are granted when everything of the last minute and themselves fit
the limit; they leave the bucket in debt, which later small ones wait for, as far as it is of the last minute. Requests sent a
minute apart can arrive a little less apart, so a minute is taken to be a second longer than it is.

Several batchers may share a bucket. One whose request was refused has a *claim*: later ones are granted only what leaves room for
the oldest claim, so that small requests of one batcher cannot starve a large one of another. A batcher asks again when the request has
become another, such as a batch that has grown: a claim to what it needed before would not help it.

The endpoint's own count is followed where it reports it. If it has seen more than we can have sent, others use the same quota (or
our estimates are low): the surplus counts as used until the endpoint says otherwise. If it has seen less, it has given back what
`max_tokens` reserved and the reply did not use, and so do we.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, fields
from functools import partial
from heapq import merge
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec

from microbatch.checking import AtLeast, Count, check_fields
from microbatch.errors import ConfigError
from microbatch.lru import SharedLRU
from microbatch.transports.limit_store import LimitStore
from microbatch.transports.permits import LATENESS, MINUTE, WINDOW, burst, endpoint_counts
from microbatch.transports.shared_bucket import SharedBucket

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from microbatch.messages import Limits, Usage
    from microbatch.transports.permits import Limiter

Charge = Literal["reserved", "used"]

_CAPACITY: Final = 1_024

# A claim is renewed when its time has come. One that is not belongs to an abandoned request or a closed event loop.
_CLAIM_LATENESS: Final = 1.0
# Sums of floats may miss an exact limit by this much.
_TOLERANCE: Final = 1e-6


@dataclass(kw_only=True, eq=False)
class RateLimit:
    """Limits on requests and tokens per minute, for each endpoint, model and key.

    A request is charged when it is sent: 1 request, and the tokens of its prompt + `max_tokens`, as providers do; without
    `max_tokens`, the answer lengths learned so far. A combined call whose callers set none carries a bound of its own, which is
    charged likewise; prompt and bound are at most a quarter of `tpm`, unless the prompt alone takes nearly as much. Several
    batchers may share one object.

    Args:
        rpm: Requests per minute. None for no limit.
        tpm: Tokens per minute, prompt and answer together. None for no limit.
        share: The fraction of both that may be used: 1/n by each of n processes with one key and no *store*.
        charge: "reserved" keeps the charge for `max_tokens`, or for the bound, unless the endpoint's `x-ratelimit-remaining-*`
            headers show that it gave back the unused part; "used" gives it back as soon as the endpoint has reported its usage.
        store: Address of a Redis server, `redis://host:6379/0`, by which all processes with the same address have the limits together,
            for each endpoint, model and key; give all the same numbers. Permits are drawn in blocks, so most requests wait for no round
            trip. A process that has lost the server goes on with its part of the limits, 1/n for n processes; one that has not
            reached it yet waits. The object then serves one event loop at a time.
        adaptive: Whether the number of concurrent calls adapts as well: it grows by one with each round of successes, and halves
            when the endpoint is overloaded (429, 503, 529, timeouts).

    Raises:
        ConfigError: A setting is out of range, there is none, not even one request a minute is left, or the store's address or
            package is wrong.
    """

    rpm: Count | None = None
    tpm: Count | None = None
    share: Annotated[float, AtLeast(0)] = 1.0
    charge: Charge = "reserved"
    adaptive: bool = False
    store: str | None = field(default=None, repr=False)  # it may hold a password

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.share <= 1:
            raise ConfigError(f"share must be above 0 and at most 1, got {self.share!r}")
        if self.rpm is None and self.tpm is None and not self.adaptive:
            raise ConfigError("a RateLimit needs rpm=, tpm= or adaptive=True")
        for name, limit, one in (("rpm", self.rpm, "request"), ("tpm", self.tpm, "token")):
            if limit is not None and limit * self.share < 1:
                raise ConfigError(f"{name}={limit} times share={self.share} leaves less than one {one} a minute")
        if self.store is not None and self.rpm is None and self.tpm is None:
            raise ConfigError("store= shares limits: give rpm= or tpm= with it")
        self._buckets: SharedLRU[Hashable, Bucket] = SharedLRU(_CAPACITY)
        self._shared_buckets: SharedLRU[Hashable, SharedBucket] = SharedLRU(_CAPACITY)
        self.shared: LimitStore | None = None if self.store is None else LimitStore(self.store)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the settings: what is left of the limits is that of this process."""
        return partial(type(self), **{each.name: getattr(self, each.name) for each in fields(self)}), ()

    @property
    def max_tokens(self) -> int | None:
        """The most tokens that one request can be granted; None for no limit."""
        return None if self.tpm is None else int(self.tpm * self.share)

    def bucket(self, key: Hashable, now: float, name: Callable[[], str] = str) -> Limiter:
        """Return the bucket of one (endpoint, model, credentials); *name* returns what it is called in the store.

        Raises:
            ConfigError: The store is open in another event loop.
        """
        if self.shared is None:
            return self._buckets.get_or_make(key, lambda: Bucket(self), now)
        rates = [None if limit is None else limit * self.share for limit in (self.rpm, self.tpm)]
        make = partial(SharedBucket, (rates[0], rates[1]), self.charge, self.share)
        bucket = self._shared_buckets.get_or_make(key, make, now)
        self.shared.serve(bucket, name())
        return bucket


class Grant(msgspec.Struct, eq=False):
    """The charge of one request.

    Attributes:
        tokens: Tokens charged and not given back.
        seen: Requests and tokens of the last minute right after it, itself included.
        sure: Tokens that the endpoint certainly counted at that time, plus all that had ever been given back.
    """

    at: float
    tokens: int
    seen: tuple[float, float]
    sure: int


class _Meter:
    """The requests, or the tokens, of one bucket."""

    def __init__(self, limit: float, unit: float) -> None:
        self.total = 0.0  # granted in the last window
        self.others = self.others_until = 0.0  # presumably used by other processes, until that time
        self._most = limit
        self._unit = unit
        self.resize(limit)
        self._level = self._burst
        self._at = 0.0

    def resize(self, limit: float) -> None:
        """Set the limit, to at most the first one."""
        self.limit = limit = min(limit, self._most)
        self._burst = burst(limit, self._unit)
        self._rate = (limit - self._burst) / WINDOW

    def refill(self, now: float) -> None:
        level = self._level + self._rate * (now - self._at)
        # Debt is of the last window only. Large requests may come a little faster than the bucket refills; if that added up for
        # hours, a small one would have to wait for it all.
        self._level = min(self._burst, max(level, self._burst - self.total))
        self._at = now
        if now >= self.others_until:
            self.others = 0.0

    def refill_seconds(self, amount: float, kept: float) -> float:
        """Return the seconds until the bucket can pay a small *amount* and, if that is small too, leave *kept*."""
        if amount > self._burst:
            return 0.0
        missing = (min(amount + kept, self._burst) if kept <= self._burst else amount) - self._level
        return missing / self._rate if missing > _TOLERANCE else 0.0

    def add(self, amount: float) -> None:
        self._level = min(self._burst, self._level - amount)
        self.total += amount


class Bucket:
    """The rate limits of one (endpoint, model, credentials)."""

    def __init__(self, limit: RateLimit) -> None:
        self._share = limit.share
        self._charge = limit.charge
        self._requests = None if limit.rpm is None else _Meter(limit.rpm * limit.share, 1.0)
        self._tokens = None if limit.tpm is None else _Meter(limit.tpm * limit.share, 0.0)
        self._log: deque[Grant] = deque()  # grants of the last window
        self._latest: deque[Grant] = deque()  # those so recent that every endpoint still counts them
        self._latest_tokens = 0
        self._given_back = 0  # tokens ever given back
        self._newest = float("-inf")  # time of the grant whose reply reported the endpoint's count
        self.used: float = 0.0  # for `SharedLRU`
        self._claims: dict[object, tuple[int, float]] = {}  # tokens and expiry by claimant, the oldest first

    def __repr__(self) -> str:
        requests, tokens = (None if meter is None else meter.total for meter in (self._requests, self._tokens))
        return f"Bucket(requests={requests}, tokens={tokens})"

    @property
    def max_tokens(self) -> int | None:
        """The most tokens that one request can be granted; None for no limit."""
        return None if self._tokens is None else int(self._tokens.limit)

    @property
    def limits_requests(self) -> bool:
        """True if there is a limit on requests."""
        return self._requests is not None

    def wait(self, tokens: int, now: float, who: object = None) -> float:
        """Return the seconds until a request may be granted if nothing else is; if not 0.0, *who* has a claim until it is granted."""
        self._pass_time(now)
        claimed, until = self._claim_before(who, now)
        wait = 0.0
        for meter, amount in self._amounts(tokens):
            kept = 0 if not until else 1 if meter is self._requests else claimed
            wait = max(wait, self._wait_for(meter, amount, kept, until, now))
        if wait > 0:
            self._claims[who] = tokens, now + wait + _CLAIM_LATENESS
        return wait

    def grant(self, tokens: int, now: float, who: object = None) -> Grant:
        """Charge a request that need not wait."""
        self._pass_time(now)
        self._claims.pop(who, None)
        for meter, amount in self._amounts(tokens):
            meter.add(amount)
        self._latest_tokens += tokens
        grant = Grant(now, tokens, self._totals, self._latest_tokens + self._given_back)
        self._log.append(grant)
        self._latest.append(grant)
        return grant

    @property
    def trouble(self) -> str | None:
        """None: nothing can be wrong with it."""
        return None

    def watch(self, changed: Callable[[], None]) -> None:
        """Do nothing: only time changes what `wait` says."""

    def disclaim(self, who: object) -> None:
        """Drop the claim of *who*."""
        self._claims.pop(who, None)

    def cancel(self, grant: Grant) -> None:
        """Take back *grant*, whose request was not sent."""
        if grant in self._log:  # linear, but rare
            self._log.remove(grant)
            self._give_back(grant, grant.tokens)
            if self._requests is not None:
                self._requests.add(-1)
        grant.tokens = 0

    def ended(
        self, grant: Grant, usage: Usage | None, limits: Limits | None, now: float, *, reserved: bool = True
    ) -> None:
        """Learn from the end of a request, with *usage* and *limits* as the endpoint reports them.

        Unless *reserved*, no `max_tokens` was sent; then the charge for the answer was a guess, and is corrected.
        """
        self._pass_time(now)
        if limits is not None and grant.at >= self._newest:  # the headers of a long reply may be a minute old
            self._newest = grant.at
            self._follow(limits, grant, now)
        if self._tokens is None or usage is None or grant.at <= now - WINDOW:
            return
        surplus = grant.tokens - usage.prompt_tokens - usage.completion_tokens
        if reserved and self._charge == "reserved":
            # More than was reserved has been used in any case; less is given back only as far as the endpoint shows it.
            surplus = min(surplus, max(0, 0 if limits is None else self._unseen(grant, limits)))
        self._give_back(grant, surplus)

    def _amounts(self, tokens: int) -> list[tuple[_Meter, int]]:
        """Return what a request of *tokens* is charged in each limit that is set."""
        pairs = ((self._requests, 1), (self._tokens, tokens))
        return [(meter, amount) for meter, amount in pairs if meter is not None]

    def _give_back(self, grant: Grant, tokens: int) -> None:
        """Charge *grant* less by *tokens*, or more if that is negative."""
        grant.tokens -= tokens
        self._given_back += max(0, tokens)
        if self._latest and grant.at >= self._latest[0].at:
            self._latest_tokens -= tokens
        if self._tokens is not None:
            self._tokens.add(-tokens)

    @property
    def _totals(self) -> tuple[float, float]:
        requests, tokens = (0.0 if meter is None else meter.total for meter in (self._requests, self._tokens))
        return requests, tokens

    def _pass_time(self, now: float) -> None:
        self.used = now
        while self._log and self._log[0].at <= now - WINDOW:
            for meter, amount in self._amounts(self._log.popleft().tokens):
                meter.total -= amount
        while self._latest and self._latest[0].at <= now - (MINUTE - LATENESS):
            self._latest_tokens -= self._latest.popleft().tokens
        for meter, _ in self._amounts(0):
            meter.refill(now)

    def _claim_before(self, who: object, now: float) -> tuple[int, float]:
        """Return tokens and expiry of the oldest claim unless it is that of *who*; (0, 0.0) for none."""
        while self._claims:
            oldest, (tokens, until) = next(iter(self._claims.items()))
            if oldest is who:
                break
            if now < until:
                return tokens, until
            del self._claims[oldest]
        return 0, 0.0

    def _wait_for(self, meter: _Meter, amount: float, kept: int, until: float, now: float) -> float:
        """Return the seconds until *meter* has room for *amount* and for *kept*, which is claimed *until* then."""
        # A request accepted before the endpoint reported a lower limit could otherwise wait for ever.
        amount = min(amount, meter.limit)
        wait = meter.refill_seconds(amount, kept)
        if amount + kept > meter.limit:
            wait = max(wait, until - now)  # there is no room for both: when the claim has expired, at the latest
        over = meter.total + meter.others + min(amount + kept, meter.limit) - meter.limit
        return max(wait, self._until_gone(meter, over, now)) if over > _TOLERANCE else wait

    def _until_gone(self, meter: _Meter, over: float, now: float) -> float:
        """Return the seconds until *over* of what counts now counts no more."""
        wait = 0.0
        grants = ((grant.at + WINDOW, 1 if meter is self._requests else grant.tokens) for grant in self._log)
        others = [(meter.others_until, meter.others)] if meter.others else []
        for when, amount in merge(grants, others):  # usually the first few of maybe thousands are enough
            wait = max(0.0, when - now)
            over -= amount
            if over <= _TOLERANCE:
                break
        return wait

    def _follow(self, limits: Limits, grant: Grant, now: float) -> None:
        """Adopt the endpoint's count as far as it exceeds what we can have sent, at *grant*'s time or now."""
        meters, seen = (self._requests, self._tokens), map(max, grant.seen, self._totals)
        for meter, count, ours in zip(meters, endpoint_counts(limits, self._share), seen, strict=True):
            if meter is None or count is None:
                continue
            if count.limit > 0:
                meter.resize(count.limit * self._share)  # the settings may be too high
            meter.others = max(0.0, min(meter.limit, count.used - ours))
            meter.others_until = now + count.seconds

    def _unseen(self, grant: Grant, limits: Limits) -> int:
        """Return the tokens charged at *grant*'s time that the endpoint did not count, less those given back since."""
        if limits.limit_tokens is None or limits.remaining_tokens is None:
            return 0
        return grant.sure - self._given_back - (limits.limit_tokens - limits.remaining_tokens)
