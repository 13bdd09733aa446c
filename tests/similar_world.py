"""Questions about things, an embedder that knows what they are about, and a model that names it."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random

import numpy as np
from helpers import batcher_for

import microbatch as mb
from microbatch.testing import ScriptedTransport

THINGS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "islet", "jetty", "knoll", "ledge"]
_FILLINGS = [
    ["briefly", "calmly", "clearly", "frankly", "gladly", "kindly", "nicely", "plainly", "quietly", "simply"],
    ["advise", "answer", "explain", "hint", "mention", "reply", "say", "suggest", "tell", "write"],
    ["bread", "cloth", "coffee", "honey", "linen", "milk", "pasta", "peas", "salt", "sugar"],
]
SYSTEM = {"role": "system", "content": "Name the thing."}


def question(thing, number):
    """Return one of many questions about *thing*, which state the same facts."""
    first, second, third = (words[number // 10**place % 10] for place, words in enumerate(_FILLINGS))
    return f"please {first} {second} me what you know of the {third} and about {thing}"


def thing_of(text):
    return text.split(" about ")[1].split()[0]


def ask_about(thing, number, system=SYSTEM):
    return [system, {"role": "user", "content": question(thing, number)}]


def _direction(word, dimension):
    seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())
    return np.random.default_rng(seed).normal(size=dimension)


class Embedder:
    """Returns vectors that lie close together if, and only if, texts are about the same thing.

    Args:
        delay: Seconds a call takes.
        spread: Length of what distinguishes questions about one thing.

    Attributes:
        lists: The texts of each call.
        fault: Called with the right vectors; what it returns is returned, what it raises is raised. None for none.
    """

    def __init__(self, delay=0.0, spread=0.0, dimension=32, fault=None):
        self.delay, self.spread, self.dimension, self.fault = delay, spread, dimension, fault
        self.lists = []

    async def __call__(self, texts):
        self.lists.append(list(texts))
        if self.delay:
            await asyncio.sleep(self.delay)
        vectors = [self.vector(text) for text in texts]
        return vectors if self.fault is None else self.fault(vectors)

    def vector(self, text):
        return _direction(thing_of(text), self.dimension) + self.spread * _direction(text, self.dimension)


def one_point(vectors):
    return [[1.0, 2.0]] * len(vectors)


class Naming(ScriptedTransport):
    """Names the thing, in capitals; `wrong` maps texts to other answers."""

    def __init__(self, **options):
        self.wrong = {}
        super().__init__(
            answer=lambda text: self.wrong.get(text) or thing_of(text).upper(), **{"delay": 0.2, **options}
        )


def semantic(embed=None, exact=None, **options):
    """Return a cache that is proven after some hundred and twenty pairs."""
    exact = mb.MemoryCache() if exact is None else exact
    return mb.SemanticCache(exact, embed=embed or Embedder(), **{"max_error": 0.05, **options})


def similar_batcher(transport=None, cache=None, **options):
    return batcher_for(transport or Naming(), semantic() if cache is None else cache, **options)


async def settled(batcher):
    """Wait until look-ups, comparisons and checks are over."""
    for _ in range(30):
        await asyncio.sleep(0)
    await batcher.look_ups.checks.settled()


async def prove(batcher, things=THINGS, most=2_000, **options):
    """Ask until the kind is proven, or *most* questions; return the numbers of questions asked about each thing."""
    draws, numbers = random.Random(5), {thing: itertools.count() for thing in things}
    for _ in range(most):
        thing = draws.choice(things)
        await batcher.submit(ask_about(thing, next(numbers[thing])), **options)
        await settled(batcher)
        if any(kind.state != "shadow" for kind in batcher.stats().similar):
            break
    return numbers
