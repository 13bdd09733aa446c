"""The work that is measured: products of a shop, each to be put under one of six labels."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Literal

import msgspec

from microbatch.accounting.tokens import load_encoding
from microbatch.demo import Product, catalogue, instructions

Label = Literal["electronics", "clothing", "home", "beauty", "sports", "other"]
"""The output type."""

BESIDE = Path(__file__).parent.parent.parent / "shared" / "data" / "products.jsonl"
"""More products than the bundled catalogue has, where they lie beside the project."""


def products(path: str = "") -> dict[str, str]:
    """Return the label of each question, from the JSON lines at *path*; "" for those beside the project, else the bundled catalogue."""
    file = Path(path) if path else BESIDE
    bundled = not path and not file.exists()
    found = catalogue() if bundled else msgspec.json.Decoder(Product).decode_lines(file.read_bytes())
    return {product.question: product.label for product in found}


def shared_instructions(tokens: int) -> str:
    """Return instructions of *tokens* tokens by o200k_base."""
    encoding = load_encoding("o200k_base")
    ids = encoding.encode_ordinary(instructions() * (1 + tokens // 300))
    return encoding.decode(ids[:tokens])


def zipf(questions: list[str], count: int, seed: int) -> list[str]:
    """Draw *count* questions by Zipf's law (s = 1), the ranks shuffled."""
    draw = random.Random(seed)
    ranked = draw.sample(questions, len(questions))
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(ranked) + 1)))
    return draw.choices(ranked, cum_weights=weights, k=count)
