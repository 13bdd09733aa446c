"""The evidence on answers to similar questions: how often it errs, and when it decides."""

import random

import pytest
import similar_runs
from helpers import each
from similar_runs import BOUND, SCENARIOS, flat, nothing, one, play, steep

from microbatch.audit.evidence import ENOUGH, Evidence
from microbatch.semantic.evidence import KindEvidence, rounded

AT_THE_BOUND = [name for name in SCENARIOS if "just above" in name or name == "the same, noise 0.02"]


def kind_with(scores, similarity=0.9, **options):
    """Return a kind that has got *scores*, all at one similarity."""
    kind = KindEvidence(digest="", bound=BOUND, **options)
    for score in scores:
        kind.add(kind.begin(similarity), score)
    return kind


# --- how often it errs


@pytest.mark.slow
@pytest.mark.promise(of="similar")
@pytest.mark.parametrize("name", AT_THE_BOUND)
def test_a_threshold_above_which_too_many_are_wrong_is_proven_in_five_per_cent_of_the_runs_at_most(name):
    options = {**SCENARIOS[name], "questions": 2_500}
    beyond = sum(play(seed, **options).beyond for seed in range(400))
    assert beyond <= 0.05 * 400


@pytest.mark.promise(of="similar")
@each("name", AT_THE_BOUND)
def test_the_same_for_a_few_runs(name):
    options = {**SCENARIOS[name], "questions": 2_500}
    assert sum(play(seed, **options).beyond for seed in range(12)) <= 2


@each("share", [1.0, 0.9, 0.5, 0.1, 0.05])
def test_an_embedder_that_maps_everything_to_one_point_is_found_out(share):
    for seed in range(6):
        run = play(seed, flat(share), draw=one)
        assert (run.hits, run.kind.state) == (0, "closed")


def test_errors_that_come_with_dissimilarity_leave_the_similar_ones():
    runs = [play(seed, steep, questions=10_000) for seed in range(12)]
    assert any(run.hits for run in runs)
    assert not any(run.beyond for run in runs)


def test_a_kind_that_gets_worse_ends():
    runs = [play(seed, nothing, later=flat(0.2), questions=8_000) for seed in range(6)]
    assert all(run.proven_after is not None and run.kind.state != "proven" for run in runs)
    # One in twenty is asked again, so about twenty are wrong before that is seen.
    assert sum(run.false for run in runs) <= 6 * 60


# --- when it decides


def test_without_errors_it_takes_some_five_hundred_pairs():
    runs = [play(seed, nothing) for seed in range(5)]
    assert {run.proven_after for run in runs} == {520}


@each("bound, most", [(0.01, 530), (0.02, 280), (0.05, 120), (0.2, 60)])
def test_the_number_of_pairs_falls_with_the_bound(bound, most):
    kind = KindEvidence(digest="", bound=bound)
    while kind.state == "shadow":
        kind.add(kind.begin(0.9), 0)
    assert kind.pairs <= most


def test_a_pair_without_a_score_counts_as_wrong_until_it_has_one():
    kind = kind_with([0] * 100)
    waiting = [kind.begin(0.9) for _ in range(3)]
    for _ in range(425):
        assert kind.add(kind.begin(0.9), 0) is None
    assert kind.state == "shadow"
    assert [kind.add(pair, 0) for pair in waiting] == [None, None, "proven"]


def test_pairs_begun_before_a_test_do_not_count_for_it():
    kind = kind_with([0] * 99)
    early = kind.begin(0.9)
    kind.add(kind.begin(0.9), 0)
    assert kind.threshold == 0.9
    kind.add(early, 0)
    assert kind.test.count == 0


def test_each_further_test_has_to_show_more():
    needed = []
    for tests in (0, 1, 4):
        kind = kind_with([0] * 99, tests=tests)
        kind.add(kind.begin(0.9), 0)
        while kind.state == "shadow":
            kind.add(kind.begin(0.9), 0)
        needed.append(kind.test.count)
    assert needed == sorted(needed)
    assert needed[0] < needed[1] < needed[2]


def test_the_error_probabilities_of_all_tests_add_up_to_five_per_cent():
    assert sum(1 / (ENOUGH * k * (k + 1)) for k in range(1, 100_000)) == pytest.approx(0.05, rel=1e-3)


def test_a_wrong_answer_that_was_handed_out_raises_the_threshold_and_back_to_shadow():
    rng, kind = random.Random(1), KindEvidence(digest="", bound=BOUND)
    while kind.state == "shadow":
        kind.add(kind.begin(rounded(rng.random())), 0)
    before = kind.threshold
    assert kind.add_live(0.5, 1) == "raised"
    assert kind.state == "shadow"
    assert kind.threshold is not None
    assert kind.threshold > max(before, 0.5)
    assert not kind.allows(1.0)
    assert not kind.wants(0.5)
    assert kind.wants(kind.threshold)


def test_many_wrong_answers_that_were_handed_out_close_the_kind_for_good():
    rng, kind = random.Random(1), KindEvidence(digest="", bound=BOUND)
    while kind.state == "shadow":
        kind.add(kind.begin(rounded(rng.random())), 0)
    for _ in range(20):
        kind.add_live(0.5, 1)
    assert kind.state == "closed"
    assert kind.why
    assert not kind.wants(1.0)
    assert kind.add(kind.begin(1.0), 0) is None
    assert kind.state == "closed"


def test_noise_is_no_error():
    kind = KindEvidence(digest="", bound=0.05)
    rng = random.Random(3)
    while kind.state == "shadow" and kind.pairs < 5_000:
        kind.add(kind.begin(0.9), rng.choice((0, 0, 0, 0, 0, 0, 0, 0, 1, -1)))
    assert kind.state == "proven"


@each("worse, equal, better", [(0, 0, 0), (0, 40, 0), (3, 40, 1), (5, 0, 0), (0, 0, 5)])
def test_the_lower_bound_is_the_upper_one_of_the_opposite(worse, equal, better):
    evidence, opposite = Evidence(worse, equal, better), Evidence(better, equal, worse)
    assert evidence.lower_bound == -opposite.upper_bound
    assert evidence.lower_bound <= evidence.excess <= evidence.upper_bound


@each("similarity", [1.0, 1.0000002, 0.99999994, 2.0])
def test_the_similarity_of_equal_vectors_is_one(similarity):
    assert rounded(similarity) == 1.0


def test_the_scenarios_can_be_played():
    for options in SCENARIOS.values():
        play(0, **{**options, "questions": 60})
    assert similar_runs.mean_above(nothing, one, 0.5) == 0
