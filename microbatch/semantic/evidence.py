"""Evidence on the answers to similar questions, by kind of question: from which similarity on they may be handed out.

The *score* of a pair, a question and a similar one whose answer is kept, is that of `microbatch.audit.evidence` with the kept answer in
the place of that from the batch: 1 if the question's own answer differs and the model says it again, -1 if the model then says what is
kept, else 0. Its expectation is the excess: the share of answers that would be wrong if the kept ones were handed out, beyond the
model's disagreement with itself.

A kind begins *in shadow*: its questions are asked, and the pairs compared.

- *Training* looks for a threshold: the lowest similarity from which on the pairs so far show an excess well below the bound.
- The *test* of a threshold takes fresh pairs only, and bets against "the excess at or above it is at least the bound", as audits do.
  At a wealth of 20 k (k + 1) in the k-th test the kind is *proven*, and answers are handed out at or above the threshold. By Ville's
  inequality the k-th test errs with a probability of at most 1 / (20 k (k + 1)), and all tests of a kind together with at most 5 %.
- A test that has lost most of its wealth and shows an excess above the bound, or is undecided after 10,000 pairs, is a failure:
  training goes on above its threshold.
- Of the answers that are handed out some are asked again. One that is wrong raises the threshold, which has to be proven anew. If
  their scores show that the excess is above the bound, the kind is *closed*.
- A kind is closed for good, too, after four failures, or if the most similar pairs are clearly above the bound.

Pairs of which the answers agree are known at once, others only when the question was asked again. So that a test does not see the good
ones first, a pair without a score counts as wrong until it has one.
"""

from __future__ import annotations

import math
from collections import deque
from itertools import groupby
from typing import Final, Literal

import msgspec

from microbatch.accounting.similar import SimilarKind
from microbatch.audit.evidence import ENOUGH, Evidence, below, wealth

State = Literal["shadow", "proven", "closed"]
Decision = Literal["proven", "raised", "closed"]

_BETS: Final = ((0.1, 0.06), (0.2, 0.08), (0.4, 0.12), (0.6, 0.12), (0.8, 0.12), (1.0, 0.5))
"""Bets on an excess below the bound, as parts of the largest that cannot lose more than everything, and their shares of the first
wealth. The largest needs the fewest pairs where none is wrong; one that is, loses it."""

_MOST_PAIRS: Final = 10_000
"""Pairs after which a test that is undecided is a failure."""

_HARDLY: Final = 0.05
"""A test whose wealth is less will hardly succeed, if its pairs show an excess above the bound."""

_MOST_TRAINING: Final = 4_000
"""Pairs among which a threshold is looked for: the latest. Training that has taken as many without finding one is the last."""

_MOST_FAILURES: Final = 4

_TOP: Final = 20
"""The most similar pairs: if they are clearly above the bound, no threshold helps."""

_TOP_OF: Final = 200
"""Pairs among which the most similar ones are judged."""

_LOOK_EVERY: Final = 20
"""Pairs of training after which a threshold is looked for again."""

_HOPELESS: Final = 10
"""Pairs of a similarity from which on the excess is more than so many times the bound are not compared: they cost calls."""

_DIGITS: Final = 4


def rounded(similarity: float) -> float:
    """Return *similarity* as it is compared with thresholds: equal vectors differ in the last bits of their product."""
    return round(max(-1.0, min(1.0, similarity)), _DIGITS)


class Pair(msgspec.Struct, frozen=True):
    """A pair that is compared: its similarity, and the number of the test that it counts for."""

    similarity: float
    test: int


class KindEvidence(msgspec.Struct, kw_only=True):
    """The evidence on one kind of question; it holds no text.

    Attributes:
        digest: Names the kind.
        model: The model asked; None if none is named.
        bound: The largest excess that is accepted.
        threshold: The similarity that is tested or proven; None in training.
        why: Why it was closed.
        pairs: Pairs with a score.
        not_comparable: Kept answers that cannot be compared, so that they are never handed out.
        test: The scores of the present test, or of that which has proven the threshold.
        live: The scores of answers that were handed out and asked again.
        tests: Tests begun.
        failures: Tests failed.
    """

    digest: str
    model: str | None = None
    bound: float = 0.01
    state: State = "shadow"
    threshold: float | None = None
    why: str | None = None
    pairs: int = 0
    not_comparable: int = 0
    test: Evidence = msgspec.field(default_factory=Evidence)
    live: Evidence = msgspec.field(default_factory=Evidence)
    tests: int = 0
    failures: int = 0
    _above: float = -1.0  # the threshold is to be above it
    _floor: float = -1.0  # less similar pairs are not compared in training
    _trained: int = 0  # pairs since training began
    _pending: int = 0  # pairs of the present test without a score
    _pool: deque[tuple[float, int]] = msgspec.field(default_factory=lambda: deque(maxlen=_MOST_TRAINING))

    # --- pairs

    def allows(self, similarity: float) -> bool:
        """Return whether an answer of that *similarity* may be handed out."""
        return self.state == "proven" and self.threshold is not None and similarity >= self.threshold

    def wants(self, similarity: float) -> bool:
        """Return whether a pair of that *similarity* is evidence for the present training or test."""
        if self.state != "shadow":
            return False
        return similarity > self._above and similarity >= (self._floor if self.threshold is None else self.threshold)

    def begin(self, similarity: float) -> Pair:
        """Return a pair that is going to have a score."""
        pair = Pair(similarity, self.tests if self.threshold is not None and self.state == "shadow" else 0)
        self._pending += self._counts(pair)
        return pair

    def _counts(self, pair: Pair) -> bool:
        """Return whether *pair* is one of the present test."""
        return pair.test == self.tests > 0 and self.threshold is not None and self.state == "shadow"

    def add(self, pair: Pair, score: int) -> Decision | None:
        """Add the *score* of *pair*; return what it decides."""
        self.pairs += 1
        self._pool.append((pair.similarity, score))
        if self.state != "shadow":
            return None
        if self.threshold is None:
            self._trained += 1
            return self._train() if self._trained % _LOOK_EVERY == 0 else None
        if self._counts(pair):
            self._pending -= 1
            self.test.add(score)
        return self._judge()

    def add_not_comparable(self) -> None:
        """Note that a kept answer cannot be compared; after enough of them, and no other, the kind is closed."""
        self.not_comparable += 1
        if not self.pairs and self.not_comparable >= _TOP:
            self._close("its answers cannot be compared: give same=")

    def add_live(self, similarity: float, score: int) -> Decision | None:
        """Add the *score* of an answer that was handed out; return what it decides."""
        self.live.add(score)
        self._pool.append((similarity, score))
        if self.state == "closed" or score <= 0:
            return None
        if self.live.wealth_above(self.bound) >= ENOUGH:
            return self._close("answers that were handed out and asked again were wrong too often")
        if not self.allows(similarity):
            return None  # the threshold has been raised since
        return self._raise(similarity)

    # --- decisions

    def _judge(self) -> Decision | None:
        """Return what the present test says."""
        test = self.test
        least = Evidence(test.worse + self._pending, test.equal, test.better)
        left = wealth(below, self.bound, _BETS, least.counts)
        if left >= ENOUGH * self.tests * (self.tests + 1):
            self.state = "proven"
            return "proven"
        hopeless = left < _HARDLY and test.excess > self.bound
        if not hopeless and test.count < _MOST_PAIRS:
            return None
        self.failures += 1
        if self.failures >= _MOST_FAILURES:
            return self._close(f"{self.failures} thresholds have failed")
        return self._raise(self.threshold or -1.0)

    def _raise(self, wrong: float) -> Decision:
        """Train above the similarity of what was *wrong*, as far as there are pairs; close if there are none above the threshold."""
        ranked = self._ranked()
        beyond = next((similarity for similarity, count, _ in ranked if count >= _TOP), None)
        before = self.threshold or -1.0
        if beyond is None or beyond <= before:
            return self._close("even the most similar questions have different answers")
        lower = max((similarity for similarity, _, _ in ranked if similarity < beyond), default=before)
        self.state, self.threshold, self._trained = "shadow", None, 0
        self._above = max(before, min(wrong, lower))
        decision = self._train()
        return "closed" if decision == "closed" else "raised"

    def _train(self) -> Decision | None:
        """Look for a threshold among the pairs so far, and begin to test it."""
        enough, chosen, floor = math.ceil(1 / self.bound), None, None
        ranked = self._ranked()
        # Of few pairs the most similar ones are not very similar, unless none can be more.
        final = len(self._pool) >= _TOP_OF or ranked[0][1] >= _TOP
        for similarity, count, excess in ranked:
            if count >= _TOP and floor is None:
                floor = similarity
                if final and _top(self._pool, similarity).wealth_above(self.bound) >= ENOUGH:
                    return self._close("even the most similar questions have different answers")
            if count >= _TOP and excess <= _HOPELESS * self.bound * count:
                floor = similarity
            # A quarter of the bound, and a quarter of a wrong pair more than there were, so that a few good ones are not enough.
            if similarity > self._above and count >= enough and 4 * excess + 1 <= self.bound * count * (1 + 1e-9):
                chosen = similarity
        self._floor = self._floor if floor is None else floor
        if chosen is not None:
            self.threshold, self.test, self._pending = chosen, Evidence(), 0
            self.tests += 1
        elif self._trained >= _MOST_TRAINING:
            return self._close("no threshold was found from which on answers are the same")
        return None

    def _ranked(self) -> list[tuple[float, int, int]]:
        """Return each similarity of the pool, the highest first, with number and sum of the scores from it on."""
        ranked: list[tuple[float, int, int]] = []
        count = excess = 0
        for similarity, group in groupby(sorted(self._pool, reverse=True), key=lambda pair: pair[0]):
            for _, score in group:
                count += 1
                excess += score
            ranked.append((similarity, count, excess))
        return ranked

    def figures(self) -> SimilarKind:
        """Return the figures so far."""
        measurable = bool(self.pairs) or not self.not_comparable
        live = self.live
        return SimilarKind(
            kind=self.digest,
            model=self.model,
            state=self.state if measurable else "not measurable",
            why=self.why,
            threshold=self.threshold,
            pairs=self.pairs,
            not_comparable=self.not_comparable,
            excess=self.test.excess,
            upper=self.test.upper_bound,
            tests=self.tests,
            failures=self.failures,
            checked=live.count,
            false_hits=live.worse,
            false_hit_interval=interval(live),
        )

    def _close(self, why: str) -> Decision:
        self.state, self.why = "closed", why
        self._pool.clear()
        return "closed"


def interval(live: Evidence) -> tuple[float, float]:
    """Return the share of wrong answers beyond noise that *live* shows, from and to, with 95 % confidence each."""
    return max(0.0, live.lower_bound), max(0.0, live.upper_bound)


def _top(pool: deque[tuple[float, int]], least: float) -> Evidence:
    """Return the evidence of the pairs from the similarity *least* on."""
    evidence = Evidence()
    for similarity, score in pool:
        if similarity >= least:
            evidence.add(score)
    return evidence
