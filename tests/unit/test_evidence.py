"""Evidence on the excess: bias, false alarms, and how many scores a decision takes."""

import math
import random
import statistics

import pytest
from helpers import each

from microbatch.audit.evidence import ENOUGH, DriftDetector, Evidence

BOUND = 0.02


def scores(seed, worse, better, count):
    """Return *count* scores that are 1 with probability *worse*, -1 with probability *better*, else 0."""
    rng = random.Random(seed)
    return [1 if (drawn := rng.random()) < worse else -1 if drawn > 1 - better else 0 for _ in range(count)]


def first(seed, worse, better, count, every=8):
    """Return after how many scores which hypothesis is rejected first."""
    evidence = Evidence()
    for number, score in enumerate(scores(seed, worse, better, count), 1):
        evidence.add(score)
        # Each wealth can only have grown by such a score.
        if score > 0 and evidence.wealth_above(BOUND) >= ENOUGH:
            return number, "above"
        if score <= 0 and number % every == 0 and evidence.wealth_below(BOUND) >= ENOUGH:
            return number, "below"
    return count, None


@each("worse, better, count", [(0.02, 0.0, 1000), (0.07, 0.05, 1000)])
def test_at_the_bound_neither_is_claimed_in_more_than_7_of_100_runs(worse, better, count):
    outcomes = [first(seed, worse, better, count)[1] for seed in range(200)]
    assert outcomes.count("above") <= 14
    assert outcomes.count("below") <= 14


@each("worse, better, within", [(0.26, 0.0, 60), (0.10, 0.0, 250), (0.20, 0.0, 100), (0.11, 0.01, 500)])
def test_a_large_excess_is_found(worse, better, within):
    outcomes = [first(seed, worse, better, within) for seed in range(200)]
    assert sum(claim == "above" for _, claim in outcomes) >= 190


def test_clean_scores_certify_after_197_and_noise_alone_never_condemns():
    assert first(0, 0.0, 0.0, 1000, every=1) == (197, "below")
    outcomes = [first(seed, 0.025, 0.025, 600)[1] for seed in range(200)]
    assert outcomes.count("above") <= 10


def test_the_mean_score_has_no_bias():
    means = []
    for seed in range(400):
        evidence = Evidence()
        for score in scores(seed, 0.04, 0.015, 2000):
            evidence.add(score)
        means.append(evidence.excess)
    assert abs(statistics.mean(means) - 0.025) < 0.002


def test_the_upper_bound_is_the_largest_excess_that_is_not_rejected():
    evidence = Evidence()
    assert evidence.upper_bound == pytest.approx(1.0)
    for score in [0] * 300 + [1] * 3 + [-1]:
        evidence.add(score)
        upper = evidence.upper_bound
        assert evidence.wealth_below(upper + 1e-5) >= ENOUGH or upper == pytest.approx(1.0)
        assert evidence.wealth_below(upper - 1e-5) < ENOUGH
    assert evidence.excess < upper < 0.1


@each("excess", [0.0, 0.02, 0.1])
def test_the_upper_bound_covers_the_truth_at_every_moment_in_95_of_100_runs(excess):
    def missed(seed):
        evidence = Evidence()
        for number, score in enumerate(scores(seed, excess, 0.0, 400)):
            evidence.add(score)
            if number % 8 == 0 and evidence.upper_bound < excess:
                return True
        return False

    assert sum(map(missed, range(200))) <= 20


def test_wealth_stays_a_number():
    evidence = Evidence(worse=10**7, equal=10**9)
    assert evidence.wealth_above(BOUND) == 0.0
    assert math.isfinite(evidence.wealth_below(BOUND))
    assert evidence.excess < evidence.upper_bound < 0.011
    assert Evidence(worse=1).upper_bound == 1.0


def test_the_detector_is_silent_for_long_and_finds_a_change_soon():
    def alarm(worse, better, count, seed):
        detector = DriftDetector(BOUND)
        return next((n for n, score in enumerate(scores(seed, worse, better, count), 1) if detector.add(score)), None)

    silent = [alarm(0.02, 0.0, 4000, seed) or 4000 for seed in range(100)]
    assert statistics.mean(silent) >= 1000
    found = [alarm(0.26, 0.0, 200, seed) for seed in range(100)]
    assert None not in found
    assert statistics.median(found) < 60
