"""Vectors as answers and as bytes, and the check that their numbers are finite. Pure."""

from __future__ import annotations

import math
import sys
from array import array
from typing import Any, Final

from microbatch.schema.answer_type import AnswerType
from microbatch.schema.decode import decode_text

_BYTES: Final = 4
"""Bytes of a number in a vector."""

_HIGH: Final = slice(3 if sys.byteorder == "little" else 0, None, _BYTES)
"""The bytes with the sign and most of the exponent of each number."""

_NOT_FINITE: Final = (b"\x7f", b"\xff")
"""Those bytes of all numbers that are not finite, and of few others."""


class VectorAnswer(AnswerType):
    """The answer type of a text to embed: a vector of 32-bit floats, an `array("f")`."""

    def __init__(self) -> None:
        super().__init__({"type": "array", "items": {"type": "number"}}, decode_text, "text")

    def again(self, output: Any, text: str) -> tuple[Any, str]:
        """Return a copy of the vector for another caller."""
        return array("f", output), text

    def stored(self, text: str, body: bytes | None) -> tuple[Any, str]:
        """Return the vector that a cache holds.

        Raises:
            ValueError: There is none.
        """
        return vector_of(body or b""), text


VECTOR: Final = VectorAnswer()


def is_finite(vector: array[float]) -> bool:
    """Return whether all numbers of *vector* are finite."""
    high = vector.tobytes()[_HIGH]
    if not any(byte in high for byte in _NOT_FINITE):
        return True
    return math.isfinite(sum(vector))  # numbers of 32 bits cannot add up to one that is not


def vector_bytes(vector: array[float]) -> bytes:
    """Return *vector* as 32-bit floats, little-endian."""
    if sys.byteorder == "big":
        vector = array("f", vector)
        vector.byteswap()
    return vector.tobytes()


def vector_of(data: bytes) -> array[float]:
    """Return the vector in *data*, as `vector_bytes` has written it.

    Raises:
        ValueError: There is none, or one of its numbers is not finite.
    """
    if not data or len(data) % _BYTES:
        raise ValueError("no vector")
    vector = array("f", data)
    if sys.byteorder == "big":
        vector.byteswap()
    if not is_finite(vector):
        raise ValueError("a vector with a number that is not finite")
    return vector
