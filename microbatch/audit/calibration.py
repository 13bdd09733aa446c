"""A calibration: which sizes of batches leave the answers of a sample as they are alone.

Theory of operation
-------------------
Every item of the sample is asked alone twice, and then in batches of one size after the other, upward. The batches of a size come from
shuffles of the sample, one after the other, because one pass holds too few batches to show a small excess: 600 items are 37 batches of
16, and even without any difference 173 are needed for a bound of 2 %.

Two sources of chance are told apart. The answers of one batch may fail together, so the unit of the evidence about the model is the
mean score of a batch. The items repeat from shuffle to shuffle, so these batches tell about this sample only; the unit of the evidence
about other items like these is the mean score of an item. A decision needs both, and the bound that is shown is the larger one.

Why both may be looked at after every round. Batches: given the sample, those of one shuffle are drawn without replacement, so they are
negatively associated, and the expected product of monotone factors is at most the product of their expectations (Joag-Dev and
Proschan, "Negative association of random variables, with applications", 1983); shuffles are independent. Items: the mean of one over
more and more shuffles is a martingale when it is looked at backwards, and so is the wealth, which is linear in each item's mean; the
inequality for martingales bounds its maximum all the same.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from microbatch.audit.evidence import ENOUGH
from microbatch.audit.means import Means, score

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Outcome = Literal["passes", "fails", "undecided", "not reached"]

MOST_BATCHES: Final = 320
"""Batches of a size that are asked at most, or each item once if that takes more."""

ROUND: Final = 32
"""Batches that are asked before the evidence is looked at again."""

_MOST_TIMES: Final = 100
"""Times as many items as were asked beyond which no number of them is named."""

_REACHED: Final = 0.5
"""Share of the items that batches of a size must answer, or the size counts as not reached."""


class CalibratedSize(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one size of batches in a calibration; an item counts as often as it was asked.

    Attributes:
        size: Items in a batch; 1 for those asked alone.
        outcome: "passes" if the excess was found to be below `max_excess`, "fails" if above; "undecided"; or "not reached": fewer
            than half of the items were answered by batches of this size, because limits on tokens or latency, or the form of the
            requests, kept batches smaller, or because most items had to be asked again. None for size 1.
        batches: Batches asked; for size 1 the questions.
        compared: Answers compared.
        not_comparable: Answers that cannot be compared.
        failed: Items that ended with an error.
        repaired: Answers that were asked for again because the reply of the batch lacked them. They are scored as they are.
        agreement: Share of the compared answers that are the same as one alone; for size 1, of those alone with each other.
        excess: The share that differs because of combining, beyond the model's disagreement with itself; may be negative.
        upper: The bound that the excess does not exceed with 95 % confidence.
        calls: HTTP attempts.
        fallback_calls: Those of them that asked again for what a batch left open.
        prompt_tokens: Prompt tokens that the endpoint reported.
        completion_tokens: Generated tokens that it reported.
        cost_usd: Price of these tokens; None if it is unknown.
        seconds: Time from the first call to the last answer.
    """

    size: int
    outcome: Outcome | None = None
    batches: int = 0
    compared: int = 0
    not_comparable: int = 0
    failed: int = 0
    repaired: int = 0
    agreement: float = 0.0
    excess: float = 0.0
    upper: float = 1.0
    calls: int = 0
    fallback_calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float | None = None
    seconds: float = 0.0


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `calibrate`.

    Attributes:
        recommended: The largest size that passes; 1 if the smallest size fails; None if nothing can be said.
        needed: Items that the sample needs, about, to decide what is undecided; None if nothing is, or no sample would.
        sample: Different requests that were drawn.
        compared: Those of them whose two answers alone were compared.
        not_comparable: Those whose answers cannot be compared, such as texts of more than 64 characters without `same`. If they are
            more than half, nothing is asked in batches.
        failed: Those that ended with an error alone.
        unusable: Requests left out before the draw because their form keeps them out of combined prompts.
        noise: Share of the compared ones whose two answers alone differ.
        max_excess: The largest excess that passes.
        seed: The seed of the sample and the shuffles.
        alone: The figures of asking alone, twice; None if nothing was asked.
        sizes: The figures of the sizes tried, in ascending order.
    """

    recommended: int | None = None
    needed: int | None = None
    sample: int = 0
    compared: int = 0
    not_comparable: int = 0
    failed: int = 0
    unusable: int = 0
    noise: float = 0.0
    max_excess: float = 0.02
    seed: int = 0
    alone: CalibratedSize | None = None
    sizes: tuple[CalibratedSize, ...] = ()


def recommended(sizes: Sequence[CalibratedSize]) -> int | None:
    """Return the size that the outcomes of *sizes*, in ascending order, recommend; None if they recommend none."""
    passing = [each.size for each in sizes if each.outcome == "passes"]
    if passing:
        return passing[-1]
    return 1 if sizes and sizes[0].outcome == "fails" else None


class Trial:
    """The trial of one size of batches.

    Args:
        size: Items in a batch.
        lanes: Numbers of the items that may share a prompt, for each group of them.
        max_excess: The largest excess that passes.
        seed: The seed of the shuffles.

    Attributes:
        batches: Batches asked.
        most: Batches that are asked at most; 0 if there are not enough items for one.
        compared: Answers compared.
        answered: Items answered.
        reached: Those of them that a batch of this size has answered.
        not_comparable: Answers that cannot be compared.
        failed: Items that ended with an error.
        repaired: Answers that were asked for again.
    """

    def __init__(self, size: int, lanes: Sequence[Sequence[int]], max_excess: float, seed: int) -> None:
        self.size = size
        self.batches: int = 0
        each_once = sum(len(lane) // size for lane in lanes)
        self.most: int = max(MOST_BATCHES, each_once) if each_once else 0
        self.compared: int = 0
        self.answered: int = 0
        self.reached: int = 0
        self.not_comparable: int = 0
        self.failed: int = 0
        self.repaired: int = 0
        self._lanes = lanes
        self._bound = max_excess
        self._random = random.Random(f"{seed} {size}")  # noqa: S311 repeatable, no secret
        self._shuffled: Iterator[list[int]] = self._shuffles()
        self._different = 0.0
        self._by_batch = Means()
        self._scores: dict[int, list[float]] = {}  # by item

    def _shuffles(self) -> Iterator[list[int]]:
        """Yield batches without end; what does not fill one is left out of its shuffle."""
        while True:
            batches = []
            for lane in self._lanes:
                order = self._random.sample(lane, len(lane))
                batches += [
                    order[start : start + self.size] for start in range(0, len(lane) - self.size + 1, self.size)
                ]
            self._random.shuffle(batches)
            yield from batches

    def next_round(self) -> list[list[int]]:
        """Return the batches to ask next, as numbers of items."""
        return [next(self._shuffled) for _ in range(min(ROUND, self.most - self.batches))]

    def add(self, item: int, *, first: bool, second: bool, alone: bool) -> float:
        """Count an answer to *item* and return its score; for the other arguments see `microbatch.audit.means.score`."""
        scored = score(first=first, second=second, alone=alone)
        self.compared += 1
        self._different += (2 - first - second) / 2
        self._scores.setdefault(item, []).append(scored)
        return scored

    def end_batch(self, scores: Sequence[float]) -> None:
        """Count a batch with these scores; without any it is no evidence."""
        self.batches += 1
        if scores:
            self._by_batch.add(sum(scores) / len(scores))

    @property
    def agreement(self) -> float:
        """Share of the compared answers that are the same as one alone."""
        return 1 - self._different / self.compared if self.compared else 0.0

    @property
    def _by_item(self) -> Means:
        return Means(Counter(sum(scores) / len(scores) for scores in self._scores.values()))

    @property
    def excess(self) -> float:
        """The mean score."""
        return sum(map(sum, self._scores.values())) / (self.compared or 1)

    @property
    def upper_bound(self) -> float:
        """The larger of the two bounds on the excess."""
        return max(self._by_batch.upper_bound, self._by_item.upper_bound)

    @property
    def outcome(self) -> Outcome | None:
        """The outcome that the batches so far show; None if more have to be asked."""
        if not self.most or (self.answered and self.reached < _REACHED * self.answered):
            return "not reached"
        units, bound = (self._by_batch, self._by_item), self._bound
        if min(unit.wealth_above(bound) for unit in units) >= ENOUGH:
            return "fails"
        if min(unit.wealth_below(bound) for unit in units) >= ENOUGH:
            return "passes"
        return "undecided" if self.batches >= self.most else None

    @property
    def needed(self) -> int | None:
        """Items that would be enough to pass if they were like these; None if no number would, or only a hundred times as many."""
        by_item, by_batch = self._by_item, self._by_batch
        times = by_item.times_needed(self._bound), by_batch.times_needed(self._bound)
        if times[0] is None or times[1] is None:
            return None
        batches = times[1] * by_batch.count
        # More batches than the most are asked of a sample that holds as many.
        items = max(times[0] * by_item.count, 0 if batches <= MOST_BATCHES else batches * self.size)
        return math.ceil(items) if items <= _MOST_TIMES * by_item.count else None
