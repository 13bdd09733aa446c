"""The scene of all parts: products to be put under six labels, at one model's prices, by an endpoint of one pace."""

from __future__ import annotations

import itertools
import random
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from bench.questions import Label, products, shared_instructions, zipf
from microbatch.accounting.prices import PRICES
from microbatch.schema.answer_type import answer_type
from microbatch.testing import Latency

MODEL = "gpt-4.1-mini"
PRICE = PRICES[MODEL]
RATIO = PRICE.output / PRICE.input
"""What a generated token costs, in prompt tokens."""

LATENCY = Latency(first_token=0.5, tokens_per_second=80.0)
TOKENS = 300
"""Of the instructions that all requests share, where their length is not the subject."""

SIZES = (4, 8, 16, 32, 50)
SIZE = 16
"""The default batch size, for which the targets are."""

QUICK_SIZES = (4, SIZE)
"""Of the short form, where the others take too long to be steady."""

AT_ONCE = 64
"""Calls under way at once where no quota limits them: the default of `max_concurrent_batches`."""

NEVER_BINDS = 10**6
"""For limits that are not the subject."""


BATCHER, SDK, AIOHTTP = "microbatch", "openai SDK", "aiohttp"


class Way(NamedTuple):
    """A way to have items answered.

    Attributes:
        name: As tables have it.
        size: Most items in a call.
        by: Whose client asks.
        zipf: Whether the items repeat by Zipf's law; else every product has its turn.
        cached: Whether answers are kept.
    """

    name: str
    size: int = 1
    by: str = BATCHER
    zipf: bool = False
    cached: bool = False


def together(size: int) -> Way:
    return Way(f"{BATCHER} {size}", size)


CACHED = Way(f"{BATCHER} {SIZE} + cache, Zipf", SIZE, zipf=True, cached=True)


def labels_of(path: str | None) -> dict[str, str]:
    """Return the label of each question about the products of the file at *path*; None for those that are at hand."""
    return dict(products(None if path is None else Path(path)))


def questions(path: str | None, count: int, seed: int, *, repeated: bool) -> list[str]:
    """Return *count* questions: drawn by Zipf's law if *repeated*, else each product in its turn, in shuffled order."""
    texts = list(labels_of(path))
    if repeated:
        return zipf(texts, count, seed)
    order = random.Random(seed).sample(texts, len(texts))
    return list(itertools.islice(itertools.cycle(order), count))


def messages(question: str, tokens: int = TOKENS) -> list[dict[str, Any]]:
    return [{"role": "system", "content": _instructions(tokens)}, {"role": "user", "content": question}]


_instructions = cache(shared_instructions)


def response_format() -> dict[str, Any]:
    """Return what a single call asks for a label with: the same schema that the batcher's own single calls have."""
    schema = {"name": "answers", "strict": True, "schema": answer_type(Label).single_schema}
    return {"type": "json_schema", "json_schema": schema}
