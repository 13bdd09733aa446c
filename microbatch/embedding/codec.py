"""The codec of embeddings calls: texts become one call, and its reply becomes their vectors.

Vectors are matched to texts by index alone. If the indices of a reply have any fault, no vector of it is used: a server that has
skipped a text and numbered the rest anew has shifted all that follow. Pure.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.embedding.vectors import is_finite
from microbatch.protocols import EmbeddingCall

if TYPE_CHECKING:
    from collections.abc import Sequence

    from microbatch.embedding.request import EmbeddingSpec
    from microbatch.protocols import Completion


class Vectors(msgspec.Struct):
    """The vectors of a reply.

    Attributes:
        found: For each text its vector; None where it has none that can be used.
        fault: What is wrong with the reply, or with what is None in it; None if nothing is.
        length: Length of the vectors; None if it is not known.
        odd: Whether the fault is a vector of another length.
        other: The length that all vectors have in place of the known one; None if it is the known one, or they differ.
    """

    found: list[array[float] | None]
    fault: str | None = None
    length: int | None = None
    odd: bool = False
    other: int | None = None

    @property
    def sound(self) -> bool:
        """True if any vector can be used."""
        return any(vector is not None for vector in self.found)


def compose(spec: EmbeddingSpec, texts: Sequence[str]) -> EmbeddingCall:
    """Return the call that asks for the vectors of *texts*."""
    return EmbeddingCall(
        inputs=texts, model=spec.model, dimensions=spec.dimensions, params=spec.params, headers=spec.headers
    )


def read(completion: Completion, asked: int, length: int | None) -> Vectors:
    """Return the vectors of the reply to a call with *asked* texts; *length* is that of each vector, or None if it is not known."""
    none: list[array[float] | None] = [None] * asked
    try:
        pairs = [(index, vector) for index, vector in completion.vectors]  # type: ignore[attr-defined] # checked here
    except (AttributeError, TypeError, ValueError):
        return Vectors(none, "the reply holds no vectors")
    if len(pairs) != asked:
        return Vectors(none, f"the reply holds {len(pairs)} vectors for {asked} texts")
    if asked > 1 and (fault := _fault_of([index for index, _ in pairs])) is not None:
        return Vectors(none, fault)
    found = none
    for place, (index, vector) in enumerate(pairs):
        found[index if asked > 1 else place] = _readable(vector)
    lengths = {len(vector) for vector in found if vector is not None}
    if length is None and len(lengths) > 1:
        return Vectors([None] * asked, "the vectors of the reply differ in length")
    expected = length if length is not None else next(iter(lengths), None)
    fault = (
        None if None not in found else "the reply holds a vector that cannot be read, or a number that is not finite"
    )
    odd = bool(lengths - {expected})
    if odd:
        other = next(len(vector) for vector in found if vector is not None and len(vector) != expected)
        fault = f"the reply holds a vector of {other} numbers in place of {expected}"
        found = [vector if vector is not None and len(vector) == expected else None for vector in found]
    return Vectors(found, fault, expected, odd, lengths.pop() if odd and len(lengths) == 1 else None)


def _fault_of(indices: list[Any]) -> str | None:
    """Return what is wrong with the *indices* of as many vectors; None if each text has its own."""
    if any(type(index) is not int for index in indices):
        return "the reply holds a vector without an index"
    if sorted(indices) == list(range(len(indices))):
        return None
    if len(set(indices)) < len(indices):
        return "the reply holds two vectors with the same index"
    return "the reply holds a vector with an index out of range"


def _readable(vector: object) -> array[float] | None:
    """Return a copy of *vector*, as the transport may keep it and the caller may change it; None if it cannot be used."""
    try:
        numbers: array[float] = array("f", vector)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        return None
    return numbers if numbers and is_finite(numbers) else None
