"""Simulated embeddings: near where texts share words, and the same in every process and under every version of Python."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microbatch.testing import SimulatedEmbeddings, embedded

SMALL = "text-embedding-3-small"
LARGE = "text-embedding-3-large"
OWN = "our-own-model"

QUESTION = "How do I reset my password?"


def similarity(one: str, other: str, model: str = SMALL, dimensions: int | None = None) -> float:
    pairs = zip(embedded(one, model, dimensions), embedded(other, model, dimensions), strict=True)
    return sum(left * right for left, right in pairs)


@pytest.mark.parametrize(
    ("model", "length"), [(SMALL, 1_536), (LARGE, 3_072), ("text-embedding-ada-002", 1_536), (OWN, 384)]
)
def test_vectors_have_the_length_of_their_model_and_length_1(model: str, length: int) -> None:
    vector = embedded(QUESTION, model)
    assert (vector.typecode, len(vector)) == ("f", length)
    assert math.hypot(*vector) == pytest.approx(1, abs=1e-5)
    assert embedded(QUESTION, model) == vector
    assert len(SimulatedEmbeddings(dimensions=7).vector(QUESTION, model)) == 7


@pytest.mark.parametrize("dimensions", [None, 256])
@pytest.mark.parametrize("model", [SMALL, LARGE, OWN])
def test_texts_that_share_words_are_near_and_others_are_not(model: str, dimensions: int | None) -> None:
    reworded = similarity(QUESTION, "How can I reset my password", model, dimensions)
    related = similarity(QUESTION, "I have lost the password of my account", model, dimensions)
    unrelated = similarity(QUESTION, "Which trains to Vienna stop in Linz?", model, dimensions)
    assert reworded > 0.8
    assert reworded > related + 0.2
    assert related > unrelated
    assert abs(unrelated) < 0.3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("dog bites man", "man bites dog"),
        ("transfer 100 dollars", "transfer 900 dollars"),
        ("the card works", "the card works not"),
        ("card", "cards"),
        ("ok", "OK"),
        ("ok", "ok."),
    ],
)
def test_small_differences_leave_texts_near_but_never_equal(one: str, other: str) -> None:
    assert embedded(one, SMALL) != embedded(other, SMALL)
    assert similarity(one, other) > 0.35


def test_models_have_spaces_of_their_own() -> None:
    assert similarity(QUESTION, QUESTION) == pytest.approx(1, abs=1e-5)
    pairs = zip(embedded(QUESTION, SMALL), embedded(QUESTION, "text-embedding-ada-002"), strict=True)
    assert abs(sum(left * right for left, right in pairs)) < 0.3


@pytest.mark.parametrize("dimensions", [1, 2, 63, 256, 1_536])
@pytest.mark.parametrize("text", [QUESTION, "a", "", "   ", "日本語のテキスト", "\ud83d"])
def test_a_shorter_vector_is_the_beginning_of_the_longer_one(text: str, dimensions: int) -> None:
    beginning = embedded(text, SMALL)[:dimensions]
    length = math.hypot(*beginning)
    shortened = embedded(text, SMALL, dimensions)
    assert shortened.tolist() == pytest.approx([number / length for number in beginning], abs=1e-5)
    assert math.hypot(*shortened) == pytest.approx(1, abs=1e-5)


@given(st.text(), st.integers(1, 20), st.integers(1, 20))
def test_any_text_has_a_vector_of_length_1(text: str, length: int, shortened: int) -> None:
    vector = SimulatedEmbeddings(dimensions=length).vector(text, OWN, min(length, shortened))
    assert len(vector) == min(length, shortened)
    assert math.hypot(*vector) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("text", "digest"),
    [
        (QUESTION, "f0ed653ab390d075"),
        ("\u00dcbergr\u00f6\u00dfentr\u00e4ger", "67d773caa089ddcb"),
        ("", "aef5b0f09b153933"),
        ("a", "373d8384122dc941"),
    ],
)
def test_vectors_are_those_of_earlier_versions(text: str, digest: str) -> None:
    """Programs keep vectors in caches and test data."""
    assert hashlib.sha256(embedded(text, SMALL).tobytes()).hexdigest()[:16] == digest


def test_another_process_has_the_same_vectors() -> None:
    program = f"from microbatch.testing import embedded; print(embedded({QUESTION!r}, {SMALL!r}).tobytes().hex())"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert bytes.fromhex(printed) == embedded(QUESTION, SMALL).tobytes()
