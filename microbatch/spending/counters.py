"""Counters of what was spent, by period and tenant, in bounded memory."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, Literal

import msgspec

if TYPE_CHECKING:
    from asyncio import Future

Period = Literal["hour", "day", "month"]

CAPACITY: Final = 10_000
"""Most tenants whose counters are kept."""

_MONTH: Final = 32  # days, more than any month has


class Span(msgspec.Struct, frozen=True):
    """One period: its name, and its end in seconds since the epoch, None for no end."""

    name: str = "ever"
    end: float | None = None


def span_at(period: Period | None, now: float) -> Span:
    """Return the period that contains *now*, in seconds since the epoch."""
    if period is None:
        return Span()
    time = datetime.fromtimestamp(now, UTC).replace(minute=0, second=0, microsecond=0)
    if period == "hour":
        return Span(f"{time:%Y-%m-%dT%H}", (time + timedelta(hours=1)).timestamp())
    time = time.replace(hour=0)
    if period == "day":
        return Span(f"{time:%Y-%m-%d}", (time + timedelta(days=1)).timestamp())
    begin = time.replace(day=1)
    return Span(f"{begin:%Y-%m}", (begin + timedelta(days=_MONTH)).replace(day=1).timestamp())


class Counter(msgspec.Struct, eq=False):
    """The spending of one tenant, or of all, in a period.

    Attributes:
        tenant: As given to `Counters.of`.
        span: The period.
        usd: US dollars spent, charges of calls under way included.
        tokens: Tokens likewise.
        held_usd: The part of them that is charges of this process' calls under way.
        held_tokens: The same in tokens.
        calls: Number of those calls.
        ended: Number of calls of this process that have ended.
        waiting: Futures that are done when one of them has ended.
    """

    tenant: str | None
    span: Span
    usd: float = 0.0
    tokens: int = 0
    held_usd: float = 0.0
    held_tokens: int = 0
    calls: int = 0
    ended: int = 0
    waiting: list[Future[None]] = []

    def hold(self, usd: float, tokens: int) -> None:
        """Note that a call is under way, for which so much is charged."""
        self.calls += 1
        self.held_usd += usd
        self.held_tokens += tokens

    def release(self, usd: float, tokens: int) -> None:
        """Note that the call has ended for which so much was charged."""
        self.calls -= 1
        self.ended += 1
        # Sums of floats may miss zero by a little.
        self.held_usd = self.held_usd - usd if self.calls else 0.0
        self.held_tokens -= tokens
        waiting, self.waiting = self.waiting, []
        for change in waiting:
            if not change.done():
                change.set_result(None)


class Counters:
    """The counters of the present period.

    If there are more tenants than are kept, those that have spent least are forgotten. One that is not known counts as having spent
    as much as any of these, so that none gets more than the budget by being forgotten.
    """

    def __init__(self, period: Period | None, *, capacity: int = CAPACITY) -> None:
        self._period = period
        self._capacity = capacity
        self._counters: dict[str | None, Counter] = {}
        self._span: Span | None = None
        self._least_usd = 0.0
        self._least_tokens = 0
        self._forgotten_usd = 0.0
        self._forgotten_tokens = 0

    def of(self, tenant: str | None, now: float) -> Counter:
        """Return the counter of *tenant* in the period of *now*, in seconds since the epoch."""
        span = self._advance(now)
        counter = self._counters.get(tenant)
        if counter is None:
            if len(self._counters) >= self._capacity:
                self._forget()
            counter = Counter(tenant, span, self._least_usd, self._least_tokens)
            self._counters[tenant] = counter
        return counter

    def total(self, now: float) -> tuple[float, int]:
        """Return what all tenants together have spent in the period of *now*, at most: US dollars and tokens."""
        self._advance(now)
        counters = self._counters.values()
        usd = self._forgotten_usd + sum(counter.usd for counter in counters)
        return usd, self._forgotten_tokens + sum(counter.tokens for counter in counters)

    def _advance(self, now: float) -> Span:
        """Return the period of *now*; the present one if the clock was set back, or the same money could be spent twice."""
        span = span_at(self._period, now)
        if self._span is None or (span.end or 0.0) > (self._span.end or 0.0):
            self._span = span
            self._counters = {}
            self._least_usd = self._forgotten_usd = 0.0
            self._least_tokens = self._forgotten_tokens = 0
        return self._span

    def _forget(self) -> None:
        """Forget the half of the counters with the least spent; those with calls under way stay."""
        idle = [counter for counter in self._counters.values() if not counter.calls]
        idle.sort(key=lambda counter: (counter.usd, counter.tokens))
        for counter in idle[: max(1, self._capacity // 2)]:
            del self._counters[counter.tenant]
            self._least_usd = max(self._least_usd, counter.usd)
            self._least_tokens = max(self._least_tokens, counter.tokens)
            self._forgotten_usd += counter.usd
            self._forgotten_tokens += counter.tokens
