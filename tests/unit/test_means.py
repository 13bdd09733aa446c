"""Evidence from mean scores, and the trial of a size: unbiased, bets that cannot be won by chance, and decisions that are right."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from fractions import Fraction

import pytest
from helpers import each
from hypothesis import given
from hypothesis import strategies as st

from microbatch.audit.calibration import MOST_BATCHES, ROUND, CalibratedSize, Trial, recommended
from microbatch.audit.evidence import ENOUGH
from microbatch.audit.means import LEAST, Means, least_count, score, smallest_bound

SHARES = st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any)
BOUNDS = (0.001, 0.02, 0.1, 0.5, 0.9)


@given(alone=SHARES, batched=SHARES)
def test_the_expected_score_is_the_disagreement_in_batches_less_that_alone(alone, batched):
    """Exactly, for any distribution of an item's answers alone, which are alike, and in batches."""
    alone = [Fraction(share, sum(alone)) for share in alone]
    batched = [Fraction(share, sum(batched)) for share in batched]
    expected = excess = Fraction(0)
    for first, second, answer in itertools.product(range(3), repeat=3):
        chance = alone[first] * alone[second] * batched[answer]
        value = score(first=answer == first, second=answer == second, alone=first == second)
        assert LEAST <= value <= 1
        expected += chance * Fraction(value)
        excess += chance * ((answer != first) - (first != second))
    assert expected == excess


def bets(means, bound):
    return means.wealth_above(bound), means.wealth_below(bound)


@each("bound", BOUNDS)
def test_at_the_bound_no_bet_is_expected_to_win_or_lose_whatever_the_spread(bound):
    for low, high in ((LEAST, 1.0), (0.0, 1.0), (LEAST, bound + 0.01), (bound - 0.01, 1.0)):
        chance = (bound - low) / (high - low)  # of the higher of two means whose expectation is the bound
        for times in (1, 3):
            wealth = [0.0, 0.0]
            for drawn in itertools.product((low, high), repeat=times):
                weight = chance ** drawn.count(high) * (1 - chance) ** drawn.count(low)
                won = bets(Means(Counter(drawn)), bound)
                assert min(won) >= 0
                wealth = [total + weight * each for total, each in zip(wealth, won, strict=True)]
            assert wealth == pytest.approx([1, 1])


@each(("bound", "most"), [(0.01, 400), (0.02, 200), (0.05, 80), (0.1, 40)])
def test_so_many_means_without_a_difference_are_enough_and_one_less_is_not(bound, most):
    count = least_count(bound)
    assert count <= most
    assert Means(Counter({0.0: count})).wealth_below(bound) >= ENOUGH
    assert Means(Counter({0.0: count - 1})).wealth_below(bound) < ENOUGH
    assert smallest_bound(count) <= bound < smallest_bound(count - 1)


@given(st.lists(st.sampled_from([LEAST, -0.25, 0.0, 0.125, 0.5, 1.0]), max_size=60))
def test_the_upper_bound_is_the_largest_that_is_not_rejected(drawn):
    means = Means(Counter(drawn))
    bound = means.upper_bound
    assert bound >= sum(drawn) / (len(drawn) or 1)
    if bound < 1:
        assert means.wealth_below(bound + 1e-6) >= ENOUGH
    assert means.wealth_below(bound - 1e-6) < ENOUGH


def test_more_of_the_same_is_enough_when_it_is_said_to_be():
    means = Means(Counter({0.0: 95, 0.5: 1, LEAST: 1}))
    times = means.times_needed(0.02)
    assert times > 1
    assert means.wealth_below(0.02, times + 1e-6) >= ENOUGH > means.wealth_below(0.02, times - 1e-6)
    assert Means(Counter({0.0: 90, 0.5: 10})).times_needed(0.02) is None
    assert Means().times_needed(0.02) is None


# --- the trial of a size


@each(("size", "lanes"), [(2, [600]), (16, [600]), (32, [100]), (7, [20, 3, 50])])
def test_batches_have_the_size_lie_in_one_lane_and_hold_no_item_twice_in_a_shuffle(size, lanes):
    numbers = iter(range(sum(lanes)))
    lanes = [[next(numbers) for _ in range(count)] for count in lanes]
    trial = Trial(size, lanes, 0.02, seed=1)
    in_a_shuffle = sum(len(lane) // size for lane in lanes)
    assert trial.most == max(MOST_BATCHES, in_a_shuffle)
    drawn = []
    while trial.batches < trial.most:
        batches = trial.next_round()
        assert 1 <= len(batches) <= ROUND
        for _ in batches:
            trial.end_batch([])
        drawn += batches
    assert len(drawn) == trial.most
    home = {number: place for place, lane in enumerate(lanes) for number in lane}
    for batch in drawn:
        assert len(set(batch)) == size
        assert len({home[number] for number in batch}) == 1
    for start in range(0, len(drawn), in_a_shuffle):
        shuffle = drawn[start : start + in_a_shuffle]
        assert len(set().union(*shuffle)) == size * len(shuffle)
    assert drawn[:in_a_shuffle] != drawn[in_a_shuffle : 2 * in_a_shuffle]
    again = Trial(size, lanes, 0.02, seed=1)
    assert again.next_round() == drawn[:ROUND]
    assert Trial(size, lanes, 0.02, seed=2).next_round() != drawn[:ROUND]


class Planted:
    """A sample whose answers are wrong by chance: a share of the items is unsure at every asking."""

    def __init__(self, items, noise, seed):
        self.random = random.Random(seed)
        self.unsure = [self.random.random() < noise for _ in range(items)]
        self.alone = [(self.answer(number), self.answer(number)) for number in range(items)]

    def answer(self, number, excess=0.0):
        wrong = self.random.random() < excess
        return wrong ^ (self.unsure[number] and self.random.random() < 0.5)

    def tried(self, size, excess, *, together=False, bound=0.02):
        """Return the trial of *size*, in which answers differ with the chance *excess*: all of a batch, or each by itself."""
        trial = Trial(size, [range(len(self.unsure))], bound, seed=self.random.random())
        while trial.outcome is None:
            for batch in trial.next_round():
                scores = []
                broken = together and self.random.random() < excess
                for number in batch:
                    answer = self.answer(number, broken if together else excess)
                    first, second = self.alone[number]
                    agrees = {"first": answer == first, "second": answer == second}
                    scores.append(trial.add(number, **agrees, alone=first == second))
                    trial.answered += 1
                    trial.reached += 1
                trial.end_batch(scores)
        return trial


def outcomes(runs, items, noise, size, excess, **options):
    trials = [Planted(items, noise, seed).tried(size, excess, **options) for seed in range(runs)]
    return Counter(trial.outcome for trial in trials), trials


@each("size", [2, 4, 8, 16, 32])
def test_without_noise_what_does_no_harm_passes_and_what_does_fails_each_time(size):
    assert outcomes(3, 600, 0, size, 0.0)[0] == {"passes": 3}
    found, trials = outcomes(20, 600, 0, size, 0.10)
    assert found == {"fails": 20}
    assert max(trial.batches for trial in trials) <= 5 * ROUND
    assert all(trial.upper_bound > 0.10 for trial in trials[:5])


@each(("size", "excess"), [(4, 0.04), (8, 0.05), (16, 0.05)])
def test_with_noise_an_excess_of_twice_the_bound_does_not_pass(size, excess):
    found, _ = outcomes(40, 600, 0.10, size, excess)
    assert found["passes"] <= 2


def test_an_excess_at_the_bound_seldom_passes_or_fails():
    for noise in (0.0, 0.1):
        found, _ = outcomes(40, 400, noise, 16, 0.02)
        assert found["undecided"] >= 36


def test_answers_that_fail_together_are_no_more_evidence_than_one():
    """One batch in twenty breaks as a whole: among 16 times as many items the bound would be found to hold by chance."""
    found, _ = outcomes(30, 600, 0, 16, 0.05, together=True)
    assert found["passes"] <= 2


@each("size", [4, 8, 16])
def test_an_item_that_is_always_wrong_in_batches_counts_once_however_many_batches_there_are(size):
    """One of 180 such items is seen by chance where 1 of 40 are wrong; any number of batches of this sample would look clean."""
    trial = Trial(size, [range(180)], 0.02, seed=1)
    while trial.outcome is None:
        for batch in trial.next_round():
            scores = [trial.add(number, first=number != 7, second=number != 7, alone=True) for number in batch]
            trial.end_batch(scores)
    assert trial.outcome == "undecided"
    assert trial.upper_bound > 0.025
    assert trial.needed > 180


def test_a_sample_of_the_size_that_is_needed_mostly_passes():
    _, trials = outcomes(12, 300, 0.1, 8, 0.0)
    needed = sorted(trial.needed for trial in trials if trial.outcome == "undecided")
    assert needed[0] > 300
    found, _ = outcomes(12, 2 * needed[len(needed) // 2], 0.1, 8, 0.0)
    assert found["passes"] >= 7


def test_no_number_of_items_is_named_for_an_excess_above_the_bound_or_almost_there():
    trial = Trial(4, [range(400)], 0.02, seed=0)
    for number in range(400):
        trial.add(number, first=number >= 8, second=number >= 8, alone=True)
    for batch in range(100):
        trial.end_batch([0.02] if batch else [0.0199])
    assert trial.needed is None
    trial.add(0, first=False, second=False, alone=True)
    assert trial.needed is None


def test_a_size_that_other_batches_answer_is_not_reached():
    trial = Trial(4, [range(400)], 0.02, seed=0)
    trial.answered, trial.reached = 10, 5
    assert trial.outcome is None
    trial.reached = 4
    assert trial.outcome == "not reached"
    assert Trial(4, [range(3), range(3)], 0.02, seed=0).outcome == "not reached"


@each(
    ("outcomes", "size"),
    [
        ([], None),
        (["fails"], 1),
        (["passes"], 2),
        (["passes", "passes", "fails"], 4),
        (["undecided"], None),
        (["undecided", "fails"], None),
        (["undecided", "passes", "not reached"], 4),
        (["passes", "undecided"], 2),
        (["not reached"], None),
    ],
)
def test_the_largest_size_that_passes_is_recommended(outcomes, size):
    rows = [CalibratedSize(size=2 ** (place + 1), outcome=outcome) for place, outcome in enumerate(outcomes)]
    assert recommended(rows) == size
