"""Questions about the products of the bundled catalogue, the types of their answers, and the right answers."""

from __future__ import annotations

from typing import Literal

import msgspec

from microbatch.demo import catalogue
from microbatch.schema.answer_type import answer_type
from microbatch.testing import simulated_answer

SYSTEM = "You sort the products of an online shop."
PRODUCTS = catalogue()
TEXTS = [product.question for product in PRODUCTS]

Label = Literal["electronics", "clothing", "home", "beauty", "sports", "other"]


class Product(msgspec.Struct):
    category: Label
    brand: str | None
    price: float
    tags: list[str]


TYPES = {"str": str, "label": Label, "struct": Product}


def right(text, output_type=str):
    """Return what the simulated model answers to *text* alone."""
    if output_type is str:
        return simulated_answer(text, None)
    return msgspec.convert(simulated_answer(text, answer_type(output_type).schema), output_type)
