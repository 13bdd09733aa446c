"""Requests and tokens a minute: one dual bucket for each (endpoint, model, credentials).

How it counts
-------------
Providers count over a minute, some over a sliding one, some with a bucket that refills. This holds to the strictest reading: no
more than the limit in any 60 seconds, whenever they begin. What is *small* (at most the burst) is paid from a bucket that holds
the burst and refills at such a rate that burst and a minute's refill make the limit. What is larger is granted when everything
of the last minute and itself fit the limit; it leaves the bucket in debt, which the small ones after it wait out, though only as
far as it is of the last minute. The window bounds the sum at each grant; the bucket spreads small ones over the minute.

Requests sent a minute apart can arrive a little less apart, so a minute is taken to be a second longer than it is.

Several batchers may share a bucket. Each has its own line; who has been refused has a *claim*, and those after it are granted only
what leaves room for the eldest, so that no batcher's small requests keep another's large one waiting for ever.

The endpoint's own count is followed where it tells it. If it has seen more than we can have sent, others use the same quota
(or our estimates are low): the surplus counts as used until the endpoint says otherwise. If it has seen less, it has given back
what `max_tokens` reserved and the reply did not use, and so do we.

Nothing here waits or reads a clock.
"""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from microbatch.messages import Limits, Usage
    from microbatch.transports.rate_limit import RateLimit

_Claim: TypeAlias = tuple[int, float]  # tokens (or requests), and until when

MINUTE: Final = 60.0
_LATENESS: Final = 1.0
WINDOW: Final = MINUTE + _LATENESS

# A smaller burst wastes less of the steady rate: limit = burst + rate x window.
_BURST_SHARE: Final = 0.02
# A single request may be more than that of a low limit; then the burst is one request, up to this share.
_MAX_BURST_SHARE: Final = 0.05

# A claim is renewed when its time has come; one that is not is of a request that was given up, or of an event loop that is gone.
_CLAIM_LATENESS: Final = 1.0


class Grant:
    """What one request was charged.

    Attributes:
        at: When, on the loop's clock.
        tokens: Tokens charged and not given back.
        seen: Requests and tokens of the last minute just after it, itself included.
        sure: Tokens of what the endpoint counted then as well, by whatever clock, and of all that had ever been given back.
    """

    __slots__ = ("at", "seen", "sure", "tokens")

    def __init__(self, at: float, tokens: int, seen: tuple[float, float], sure: int) -> None:
        self.at = at
        self.tokens = tokens
        self.seen = seen
        self.sure = sure


class _Measure:
    """One of the two: requests or tokens."""

    __slots__ = ("_at", "_burst", "_level", "_most", "_rate", "_unit", "limit", "others", "others_until", "total")

    def __init__(self, limit: float, unit: float) -> None:
        self.total = 0.0  # granted in the last minute
        self.others = 0.0  # used by others, for all we know
        self.others_until = 0.0
        self._most = self.limit = limit
        self._unit = unit
        self.resize(limit)
        self._level = self._burst
        self._at = 0.0

    def resize(self, limit: float) -> bool:
        """Work with another limit from now on, though with none above the first; return whether it is a higher one."""
        before, self.limit = self.limit, min(limit, self._most)
        limit = self.limit
        self._burst = max(_BURST_SHARE * limit, min(self._unit, _MAX_BURST_SHARE * limit))
        self._rate = (limit - self._burst) / WINDOW
        return limit > before

    def refill(self, now: float) -> None:
        """Let time pass."""
        level = self._level + self._rate * (now - self._at)
        # What is owed is of the last minute. Large ones may come a little faster than the bucket refills; were that to add up
        # for hours, a small one would have to wait it all out.
        self._level = min(self._burst, max(level, self._burst - self.total))
        self._at = now
        if now >= self.others_until:
            self.others = 0.0

    def small(self, amount: float) -> bool:
        """Whether *amount* is paid from the bucket."""
        return amount <= self._burst

    def missing(self, amount: float, kept: float) -> float:
        """Return by how much the bucket is too low for *amount* and, if that is small too, *kept*; at most 0 if it is not."""
        return (min(amount + kept, self._burst) if kept <= self._burst else amount) - self._level

    def seconds_for(self, missing: float) -> float:
        """Return how long the bucket takes to gain *missing*."""
        return missing / self._rate

    def add(self, amount: float) -> None:
        """Charge *amount*, or give it back if it is negative."""
        self._level = min(self._burst, self._level - amount)
        self.total += amount


# Sums of floats may miss an exact limit by a hair.
_HAIR: Final = 1e-6


class Bucket:
    """What one (endpoint, model, credentials) may be sent; told the time.

    Args:
        settings: The limits.
    """

    def __init__(self, settings: RateLimit) -> None:
        share = settings.share
        self._settings = settings
        self._requests = None if settings.rpm is None else _Measure(settings.rpm * share, 1.0)
        self._tokens = None if settings.tpm is None else _Measure(settings.tpm * share, 0.0)
        self._log: deque[Grant] = deque()
        # What was granted so lately that no endpoint has forgotten it yet, and its tokens.
        self._latest: deque[Grant] = deque()
        self._latest_tokens = 0
        self._given_back = 0  # all that ever was
        self._newest = float("-inf")  # when that request was granted whose reply told the endpoint's count
        self.used = 0.0  # when; see `Kept`
        self._claims: dict[object, _Claim] = {}  # by who waits, the eldest first

    def __repr__(self) -> str:
        """Tell what has been granted in the last minute."""
        requests, tokens = (None if measure is None else measure.total for measure in (self._requests, self._tokens))
        return f"Bucket(requests={requests}, tokens={tokens})"

    @property
    def max_tokens(self) -> int | None:
        """The most tokens that one request can ever be granted, for all we know; None for no limit."""
        return None if self._tokens is None else int(self._tokens.limit)

    def wait(self, tokens: int, now: float, who: object = None) -> float:
        """Return the seconds until a request of *tokens* may be granted if nothing else is; 0.0 for at once.

        Args:
            tokens: What it is charged.
            now: The time.
            who: Whose request it is; refused, it has a claim until it is granted.
        """
        self._pass_time(now)
        wait = 0.0
        claim = self._claim_before(who, now)
        if self._requests is not None:
            wait = self._wait_for(self._requests, 1, claim and (1, claim[1]), now)
        if self._tokens is not None:
            wait = max(wait, self._wait_for(self._tokens, tokens, claim, now))
        if wait > 0:
            self._claims[who] = tokens, now + wait + _CLAIM_LATENESS
        return wait

    def grant(self, tokens: int, now: float, who: object = None) -> Grant:
        """Charge a request of *tokens*, whose wait is over."""
        self._pass_time(now)
        self._claims.pop(who, None)
        for measure, amount in ((self._requests, 1), (self._tokens, tokens)):
            if measure is not None:
                measure.add(amount)
        self._latest_tokens += tokens
        grant = Grant(now, tokens, self._totals, self._latest_tokens + self._given_back)
        self._log.append(grant)
        self._latest.append(grant)
        return grant

    def disclaim(self, who: object) -> None:
        """*who* waits no longer."""
        self._claims.pop(who, None)

    def cancel(self, grant: Grant) -> None:
        """Take *grant* back: its request was not sent."""
        if grant in self._log:  # the latest grants are at the end, but few are ever taken back
            self._log.remove(grant)
            self._give_back(grant, grant.tokens)
            if self._requests is not None:
                self._requests.add(-1)
        grant.tokens = 0

    def ended(
        self, grant: Grant, usage: Usage | None, limits: Limits | None, now: float, *, reserved: bool = True
    ) -> bool:
        """Learn from how the request of *grant* ended.

        Args:
            grant: What it was charged.
            usage: What the endpoint says it used, or None.
            limits: What the endpoint says of its limits, or None.
            now: The time.
            reserved: Whether `max_tokens` was sent; if not, the answer's part of the charge was a guess, and is put right.

        Returns:
            Whether somebody may have to wait less than before.
        """
        self._pass_time(now)
        relieved = False
        if limits is not None and grant.at >= self._newest:  # a long reply's headers may be a minute old
            self._newest = grant.at
            relieved = self._follow(limits, grant, now)
        if self._tokens is None or usage is None:
            return relieved
        surplus = grant.tokens - usage.prompt_tokens - usage.completion_tokens
        if reserved and self._settings.charge == "reserved":
            # More than was reserved has been used in any case; less is given back only as far as the endpoint shows it.
            shown = 0 if limits is None else self._unseen(grant, limits)
            surplus = min(surplus, max(0, shown))
        if surplus and grant.at > now - WINDOW:
            self._give_back(grant, surplus)
            return True
        return relieved

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
        return (
            0.0 if self._requests is None else self._requests.total,
            0.0 if self._tokens is None else self._tokens.total,
        )

    def _pass_time(self, now: float) -> None:
        self.used = now
        while self._log and self._log[0].at <= now - WINDOW:
            old = self._log.popleft()
            if self._requests is not None:
                self._requests.total -= 1
            if self._tokens is not None:
                self._tokens.total -= old.tokens
        while self._latest and self._latest[0].at <= now - (MINUTE - _LATENESS):
            self._latest_tokens -= self._latest.popleft().tokens
        for measure in (self._requests, self._tokens):
            if measure is not None:
                measure.refill(now)

    def _claim_before(self, who: object, now: float) -> _Claim | None:
        """Return the eldest claim if it is not that of *who*."""
        while self._claims:
            eldest, claim = next(iter(self._claims.items()))
            if eldest is who:
                break
            if now < claim[1]:
                return claim
            del self._claims[eldest]
        return None

    def _wait_for(self, measure: _Measure, amount: float, claim: _Claim | None, now: float) -> float:
        # One that was accepted before the endpoint told of a lower limit could otherwise wait for ever.
        amount = min(amount, measure.limit)
        wait = kept = 0.0
        if claim is not None:
            kept = claim[0]
            if amount + kept > measure.limit:
                wait = claim[1] - now  # there is no room for both: when the claim has lapsed, at the latest
        if measure.small(amount):
            missing = measure.missing(amount, kept)
            if missing > _HAIR:
                wait = max(wait, measure.seconds_for(missing))
        over = measure.total + measure.others + min(amount + kept, measure.limit) - measure.limit
        if over > _HAIR:
            wait = max(wait, self._until_gone(measure, over, now))
        return wait

    def _until_gone(self, measure: _Measure, over: float, now: float) -> float:
        """Return the seconds until *over* of what counts now counts no more."""
        others, until = measure.others, measure.others_until
        when = now
        # Mostly the first few are enough: there may be thousands.
        for when, amount in chain(
            ((grant.at + WINDOW, 1 if measure is self._requests else grant.tokens) for grant in self._log),
            ((until, 0.0),),
        ):
            if others and until <= when:
                over -= others
                others = 0.0
                if over <= _HAIR:
                    return max(0.0, until - now)
            over -= amount
            if over <= _HAIR:
                break
        return max(0.0, when - now)

    def _follow(self, limits: Limits, grant: Grant, now: float) -> bool:
        """Take over what the endpoint counts beyond what we can have sent, by *grant*'s time or now."""
        relieved = False
        told = (
            (self._requests, limits.limit_requests, limits.remaining_requests, limits.reset_requests),
            (self._tokens, limits.limit_tokens, limits.remaining_tokens, limits.reset_tokens),
        )
        for (measure, limit, remaining, reset), *ours in zip(told, grant.seen, self._totals, strict=True):
            if measure is None or limit is None or remaining is None:
                continue
            if reset is not None and reset > MINUTE and remaining > 0:
                continue  # a limit of a longer period (requests a day), of which something is left
            if limit > 0:
                relieved = measure.resize(limit * self._settings.share) or relieved  # the settings may be too high
            expected = max(ours) + (1 - self._settings.share) * limit
            others = max(0.0, min(measure.limit, limit - remaining - expected))
            relieved = relieved or others < measure.others
            measure.others = others
            measure.others_until = now + (MINUTE if reset is None else min(reset, MINUTE))
        return relieved

    def _unseen(self, grant: Grant, limits: Limits) -> int:
        """Return how many tokens the endpoint counted at *grant*'s time that we had charged and have not given back since."""
        if limits.limit_tokens is None or limits.remaining_tokens is None:
            return 0
        return grant.sure - self._given_back - (limits.limit_tokens - limits.remaining_tokens)
