"""The demo's catalogue and instructions are what the demo says they are."""

from __future__ import annotations

import re
from collections import Counter
from importlib import resources
from itertools import pairwise
from typing import Any

import msgspec
import pytest

from microbatch.accounting.tokens import load_encoding

LABELS = {"electronics", "clothing", "home", "beauty", "sports", "other"}
DEMO = resources.files("microbatch.demo")


@pytest.fixture(scope="module")
def catalogue() -> list[dict[str, Any]]:
    lines = (DEMO / "catalogue.jsonl").read_bytes().splitlines()
    return [msgspec.json.decode(line) for line in lines]


@pytest.fixture(scope="module")
def instructions() -> str:
    return (DEMO / "instructions.txt").read_text(encoding="utf-8")


def sentences(description: str) -> list[str]:
    return [part.strip().casefold() for part in re.split(r"(?<=[.!?])\s+", description) if part.strip()]


def test_the_catalogue_has_at_least_320_products(catalogue):
    assert len(catalogue) >= 320


def test_every_product_has_the_same_four_text_fields(catalogue):
    for product in catalogue:
        assert list(product) == ["id", "name", "description", "label"]
        assert all(isinstance(value, str) and value == value.strip() and value for value in product.values())


def test_no_text_holds_a_line_break(catalogue):
    assert all(len(value.splitlines()) == 1 for product in catalogue for value in product.values())


def test_ids_count_up_from_p001(catalogue):
    assert [product["id"] for product in catalogue] == [f"p{number:03d}" for number in range(1, len(catalogue) + 1)]


@pytest.mark.parametrize("field", ["id", "name", "description"])
def test_no_two_products_share_an_id_a_name_or_a_description(catalogue, field):
    counts = Counter(product[field].casefold() for product in catalogue)
    assert [value for value, count in counts.items() if count > 1] == []


def test_no_two_descriptions_share_a_sentence(catalogue):
    counts = Counter(sentence for product in catalogue for sentence in sentences(product["description"]))
    assert [sentence for sentence, count in counts.items() if count > 1] == []


def test_exactly_the_six_labels_are_used_and_each_40_to_75_times(catalogue):
    counts = Counter(product["label"] for product in catalogue)
    assert set(counts) == LABELS
    assert all(40 <= count <= 75 for count in counts.values()), counts


def test_labels_are_mixed_so_that_neighbours_seldom_agree(catalogue):
    agreeing = sum(a["label"] == b["label"] for a, b in pairwise(catalogue))
    assert agreeing < len(catalogue) / 3


def test_descriptions_are_12_to_60_words_of_varied_length(catalogue):
    lengths = [len(product["description"].split()) for product in catalogue]
    assert min(lengths) >= 12
    assert max(lengths) <= 60
    assert len(set(lengths)) >= 20


def test_some_products_are_written_beyond_ascii(catalogue):
    assert sum(not product["description"].isascii() for product in catalogue) >= 20


def test_the_instructions_take_250_to_400_tokens(instructions):
    assert 250 <= len(load_encoding("o200k_base").encode(instructions)) <= 400


def test_the_instructions_define_every_label_once(instructions):
    for label in LABELS:
        assert len(re.findall(rf"^{label}: ", instructions, flags=re.MULTILINE)) == 1


def test_the_instructions_know_nothing_of_batches_or_json(instructions):
    assert re.search(r"batch|json", instructions, flags=re.IGNORECASE) is None
