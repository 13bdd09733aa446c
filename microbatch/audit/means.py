"""Evidence on the excess from mean scores: of the answers of a batch, or of an item in several batches.

All items of a calibration are asked alone twice (S1, S2), and in batches (B). The score of an answer is the mean of those of
`microbatch.audit.evidence` for (S1, S2) and (S2, S1), which are alike:

    (B differs from S1) / 2 + (B differs from S2) / 2 - (S1 differs from S2)

So its expectation is the excess as well, and it varies less. It is between -1/2 and 1, and so are means of it. The wealth is that of
the same gamblers as there. Their stakes are not equal: half of the wealth bets as much as it can against an excess above the bound,
so that 173 batches without a difference are enough for a bound of 2 %.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import Final

import msgspec

from microbatch.audit.evidence import ENOUGH, above, below, least_that_rejects, wealth

LEAST: Final = -0.5
"""The least score."""

_ABOVE: Final = ((0.05, 1 / 6), (0.1, 1 / 6), (0.2, 1 / 6), (0.4, 1 / 6), (0.7, 1 / 6), (0.95, 1 / 6))
_BELOW: Final = ((0.1, 0.06), (0.2, 0.08), (0.4, 0.12), (0.6, 0.12), (0.8, 0.12), (1.0, 0.5))
"""Bets for and against an excess above the bound, as parts of the largest that cannot lose more than everything, and their stakes."""

_HALVINGS: Final = 40
"""Halvings of an interval that is searched; more would reach 1.0, at which no bet is possible."""

_MOST_TIMES: Final = 1e6


def score(*, first: bool, second: bool, alone: bool) -> float:
    """Return the score of an answer that agrees with *first* and *second*, the answers alone, or not; *alone*: these agree."""
    return (2 - first - second) / 2 - (not alone)


class Means(msgspec.Struct):
    """Mean scores, counted. The order in which they came does not matter to the wealth.

    Attributes:
        counts: The number of times that each was added.
    """

    counts: Counter[float] = msgspec.field(default_factory=Counter)

    def add(self, mean: float) -> None:
        """Add a mean score."""
        self.counts[mean] += 1

    @property
    def count(self) -> int:
        """The number of means."""
        return self.counts.total()

    def wealth_above(self, bound: float, times: float = 1) -> float:
        """Return the wealth bet against "the excess is at most *bound*", if all had come so many *times*."""
        return wealth(partial(above, least=LEAST), bound, _ABOVE, self.counts.items(), times)

    def wealth_below(self, bound: float, times: float = 1) -> float:
        """Return the wealth bet against "the excess is at least *bound*", if all had come so many *times*."""
        return wealth(below, bound, _BELOW, self.counts.items(), times)

    @property
    def upper_bound(self) -> float:
        """The bound that the excess does not exceed with 95 % confidence: the largest that is not rejected; 1.0 for none.

        The wealth against "the excess is at least m" grows with m, because each factor does.
        """
        return least_that_rejects(self.wealth_below, LEAST, 1.0, _HALVINGS)

    def times_needed(self, bound: float) -> float | None:
        """Return how many times as many means like these show that the excess is below *bound*; None if it does not seem to be."""
        if not self.count or self.wealth_below(bound, _MOST_TIMES) < ENOUGH:
            return None
        return least_that_rejects(partial(self.wealth_below, bound), 0.0, _MOST_TIMES, _HALVINGS)


def least_count(bound: float) -> int:
    """Return the number of means that show an excess below *bound* if none of them differs from 0."""
    return math.ceil(Means(Counter({0.0: 1})).times_needed(bound) or _MOST_TIMES)


def smallest_bound(count: int) -> float:
    """Return the bound that *count* means show if none of them differs from 0."""
    return Means(Counter({0.0: count})).upper_bound
