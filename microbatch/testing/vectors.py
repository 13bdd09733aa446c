"""Simulated embeddings: vectors of texts in which texts that share words are near.

A text is a bag of features: its words, the three-letter sequences of its words (so that forms of a word are near), its pairs of
neighbouring words (so that order counts a little), and the text itself (so that no two texts have the same vector). Each feature adds
its weight, with a sign, to a few coordinates; both come from a hash of the model's name and the feature. This is a sparse random
projection, which keeps the angles between bags of features about as they are. All vectors have a part in common, the same number in
each coordinate, so that unrelated texts have a similarity of about 0.1 instead of 0. The vector is then scaled to length 1.

Letters are compared in lower case as far as they are ASCII, and nothing else depends on Unicode's tables: the same text has the same
vector in every process and under every version of Python. A shorter vector is the beginning of the longer one, scaled to length 1;
since more features have a coordinate near the beginning, similarities are about the same.
There is no meaning in it: synonyms are as far from each other as any two words.
"""

from __future__ import annotations

import math
import re
import struct
from array import array
from collections import Counter
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_WORD: Final = re.compile(rb"[a-z0-9\x80-\xff]+")
_COORDINATES: Final = 8  # of each feature
_HASHES: Final = struct.Struct(f"<{_COORDINATES}I")
_GRAM: Final = 3

# Weights are whole numbers, so that sums do not depend on their order.
_OF_WORD: Final = 6
_OF_SHORT_WORD: Final = 3  # of at most three letters, mostly articles and the like
_OF_PAIR: Final = 2
_OF_GRAM: Final = 3
_OF_TEXT: Final = 1
_COMMON_SHARE: Final = 0.1
"""Part of the squared length that vectors have in common, and so about the similarity of unrelated texts."""


def text_vector(text: str, model: str, dimensions: int, shortened: int | None = None) -> array[float]:
    """Return the vector of *text* by a *model* whose vectors have *dimensions* numbers, or its first *shortened* ones, of length 1."""
    numbers: Counter[int] = Counter()
    for feature, weight in _features(text).items():
        for at, sign in _places(feature, model, dimensions):
            numbers[at] += sign * weight
    common = math.sqrt(max(1, _sum_of_squares(numbers)) * _COMMON_SHARE / (1 - _COMMON_SHARE) / dimensions)
    length = dimensions if shortened is None else shortened
    kept = {at: number for at, number in numbers.items() if number and at < length}
    # Sums of whole numbers only: those of floats differ between versions of Python.
    squares = _sum_of_squares(kept) + 2 * common * sum(kept.values()) + common**2 * length
    norm = math.sqrt(max(0.0, squares)) or 1.0
    vector = array("f", [common / norm]) * length
    for at, number in kept.items():
        vector[at] = (number + common) / norm
    return vector


def _sum_of_squares(numbers: Mapping[int, int]) -> int:
    return sum(number * number for number in numbers.values())


def _features(text: str) -> Counter[bytes]:
    whole = text.encode("utf-8", "surrogatepass")
    words = _WORD.findall(whole.lower())
    features: Counter[bytes] = Counter({b"t" + whole: _OF_TEXT})
    for word in words:
        features[b"w" + word] += _OF_WORD if len(word) > _GRAM else _OF_SHORT_WORD
        framed = b"^" + word + b"$"
        if len(word) > _GRAM:
            for start in range(len(framed) - _GRAM + 1):
                features[b"g" + framed[start : start + _GRAM]] += _OF_GRAM
    for pair in pairwise(words):
        features[b"p" + b" ".join(pair)] += _OF_PAIR
    return features


@lru_cache(maxsize=65_536)
def _places(feature: bytes, model: str, dimensions: int) -> list[tuple[int, int]]:
    """Return the coordinates that *feature* adds to, each with the sign."""
    key = blake2b(model.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    hashed = blake2b(feature, digest_size=_HASHES.size, key=key).digest()
    # The first two coordinates are anywhere, the next two in the first half, then in the first quarter, and so on.
    lengths = (max(1, dimensions >> place // 2) for place in range(_COORDINATES))
    return [
        ((each >> 1) % length, 1 if each & 1 else -1)
        for each, length in zip(_HASHES.unpack(hashed), lengths, strict=True)
    ]
