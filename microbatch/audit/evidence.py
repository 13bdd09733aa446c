"""Evidence on the excess: the disagreement that combining causes, beyond that of the model with itself.

An item that was answered in a batch (B) is asked alone (S1) and, if S1 differs from B, alone once more (S2). Its *score* is 1 if S2
agrees with S1, -1 if S2 agrees with B, else 0. The expected score is P(B differs from S1) - P(S2 differs from S1): the excess, without
bias, because S1 and S2 are alike.

Hypotheses about it are tested by betting (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", 2023).
A gambler who starts with 1 and bets a fixed part of it against a true hypothesis at every score expects to have 1 at any time, and by
Ville's inequality ever reaches 20 with a probability of at most 5 %. So the wealth may be looked at after every score, unlike an
interval for a fixed number of scores. The wealth used here is the mean of several such gamblers, who differ in their bets.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Factor = Callable[[float, float, float], float]
    Bets = Sequence[tuple[float, float]]
    Counts = Iterable[tuple[float, int]]

Natural = Annotated[int, msgspec.Meta(ge=0)]
"""A number of things in a record that is kept: a negative one shows that the record was damaged."""

ENOUGH: Final = 20.0
"""The wealth that rejects a hypothesis, with an error of at most 5 %."""

_ABOVE_BETS: Final = (*((bet, 0.4 / 6) for bet in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)), (0.95, 0.6))
_BELOW_BETS: Final = tuple((bet, 1 / 7) for bet in (0.1, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0))
"""Bets on an excess above the bound, and below it: parts of the largest that cannot lose more than everything, each with its share of
the first wealth. Small bets find a small excess of a noisy model; the largest finds an excess of 0.05 and more first."""

_RUN_LENGTH: Final = 1_000.0
"""Mean number of scores between false alarms of `DriftDetector`, at least."""

_LARGEST_LOG: Final = 700.0
"""A larger wealth counts as this one: `exp` would overflow."""

_HALVINGS: Final = 20
"""Halvings of the interval in which the upper bound is searched: it is exact to 2 / 2**20."""


def above(score: float, bound: float, bet: float, least: float = -1.0) -> float:
    """Return the factor by which *score*, from *least* to 1, multiplies the wealth bet on an excess above *bound*."""
    return 1 + bet * (score - bound) / (bound - least)


def below(score: float, bound: float, bet: float) -> float:
    """Return the factor by which *score* multiplies the wealth bet on an excess below *bound*."""
    return 1 - bet * (score - bound) / (1 - bound)


def wealth(factor: Factor, bound: float, bets: Bets, counts: Counts, times: float = 1.0) -> float:
    """Return the wealth of all gamblers together after *counts*, which are scores and their numbers, have come so many *times*."""
    total = 0.0
    for bet, share in bets:
        log = sum(_log_power(factor(score, bound, bet), count) for score, count in counts)
        total += share * math.exp(min(times * log, _LARGEST_LOG))
    return total


def least_that_rejects(wealth_at: Callable[[float], float], low: float, high: float, halvings: int) -> float:
    """Return the least number between *low* and *high* at which the wealth, which grows with it, is enough; *high* for none.

    It is exact to (high - low) / 2**halvings.
    """
    for _ in range(halvings):
        middle = (low + high) / 2
        if wealth_at(middle) >= ENOUGH:
            high = middle
        else:
            low = middle
    return high


class Evidence(msgspec.Struct):
    """Scores, counted. The order in which they came does not matter to the wealth.

    Attributes:
        worse: Scores of 1.
        equal: Scores of 0.
        better: Scores of -1.
    """

    worse: Natural = 0
    equal: Natural = 0
    better: Natural = 0

    @property
    def count(self) -> int:
        """The number of scores."""
        return self.worse + self.equal + self.better

    @property
    def excess(self) -> float:
        """The mean score, 0.0 before the first."""
        return (self.worse - self.better) / (self.count or 1)

    def add(self, score: int) -> None:
        """Add a score: 1, 0 or -1."""
        self.worse += score > 0
        self.equal += score == 0
        self.better += score < 0

    def wealth_above(self, bound: float) -> float:
        """Return the wealth bet against "the excess is at most *bound*"."""
        return wealth(above, bound, _ABOVE_BETS, self.counts)

    def wealth_below(self, bound: float) -> float:
        """Return the wealth bet against "the excess is at least *bound*"."""
        return wealth(below, bound, _BELOW_BETS, self.counts)

    @property
    def counts(self) -> Counts:
        """The scores with their numbers."""
        return (1, self.worse), (0, self.equal), (-1, self.better)

    @property
    def upper_bound(self) -> float:
        """The excess that is not exceeded with 95 % confidence, whenever it is looked at: the least that is rejected; 1.0 for none."""
        return _upper_bound(self.worse, self.equal, self.better)

    @property
    def lower_bound(self) -> float:
        """The excess that is exceeded with 95 % confidence, whenever it is looked at; -1.0 for none."""
        return -_upper_bound(self.better, self.equal, self.worse)


@lru_cache(4_096)
def _upper_bound(worse: int, equal: int, better: int) -> float:
    # The wealth against "the excess is at least m" grows with m, because each factor does.
    return least_that_rejects(Evidence(worse, equal, better).wealth_below, -1.0, 1.0, _HALVINGS)


def _log_power(factor: float, count: int) -> float:
    if not count:
        return 0.0
    return count * math.log(factor) if factor > 0 else -math.inf


class DriftDetector(msgspec.Struct):
    """Watches for an excess that rises above *bound* after it was found to be below.

    It is the detector of Shiryaev and Roberts: at each score another gambler enters with a wealth of 1, so a change is found however
    long ago the beginning was. While the excess is at most *bound*, the mean time between false alarms is at least 1,000 scores,
    because the sum of the wealth, less the number of scores, is expected not to grow.
    """

    bound: float
    wealth: list[float] = msgspec.field(default_factory=lambda: [0.0] * len(_ABOVE_BETS))

    def __post_init__(self) -> None:
        """Raise `ValueError` if a record holds another number of gamblers, such as one of another version."""
        if len(self.wealth) != len(_ABOVE_BETS):
            raise ValueError(f"{len(_ABOVE_BETS)} gamblers expected, got {len(self.wealth)}")

    def add(self, score: int) -> bool:
        """Add a score; return whether it raises the alarm."""
        factors = [above(score, self.bound, bet) for bet, _ in _ABOVE_BETS]
        self.wealth = [(wealth + 1) * factor for wealth, factor in zip(self.wealth, factors, strict=True)]
        return sum(share * wealth for wealth, (_, share) in zip(self.wealth, _ABOVE_BETS, strict=True)) >= _RUN_LENGTH
