"""The common scene: products to be put under six labels, at one model's prices, by an endpoint of one pace."""

from __future__ import annotations

import itertools
import random
from functools import cache
from typing import Any, NamedTuple

from bench.questions import products, shared_instructions, zipf
from microbatch.accounting.prices import Price
from microbatch.testing import Latency

MODEL = "gpt-4.1-mini"
PRICE = Price(0.40, 1.60, 0.10)

LATENCY = Latency(first_token=0.5, tokens_per_second=80.0)
TOKENS = 300
"""Tokens of the shared instructions, where their length is not the subject."""

SIZES = (4, 8, 16, 32, 50)
SIZE = 16
"""The default batch size, for which the targets are."""

AT_ONCE = 64
"""Calls under way at once where no quota limits them: the default of `max_concurrent_batches`."""

NO_LIMIT = 10**6

BATCHER, SDK, AIOHTTP, ALONE = "microbatch", "openai SDK", "aiohttp", "one call each"

labels_of = cache(products)
_instructions = cache(shared_instructions)


class Way(NamedTuple):
    """A way to have items answered.

    Attributes:
        name: Its name in tables.
        size: Most items in a call.
        zipf: Whether the items repeat by Zipf's law; otherwise each product comes in its turn.
        cached: Whether answers are kept.
    """

    name: str
    size: int = 1
    zipf: bool = False
    cached: bool = False


def together(size: int) -> Way:
    return Way(f"{BATCHER} {size}", size)


def questions(path: str, count: int, seed: int, *, repeated: bool = False) -> list[str]:
    """Return *count* questions: drawn by Zipf's law if *repeated*, else each product in its turn, in shuffled order."""
    texts = list(labels_of(path))
    if repeated:
        return zipf(texts, count, seed)
    order = random.Random(seed).sample(texts, len(texts))
    return list(itertools.islice(itertools.cycle(order), count))


def messages(question: str, tokens: int = TOKENS) -> list[dict[str, Any]]:
    return [{"role": "system", "content": _instructions(tokens)}, {"role": "user", "content": question}]
