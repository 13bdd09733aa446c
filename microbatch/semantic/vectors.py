"""Vectors of one length, and which of them are nearest to others. Imports numpy late."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from microbatch.errors import ConfigError, MalformedAnswer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
    Numbers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
    Ranked: TypeAlias = list[tuple[float, int]]
    """Similarities and rows, the most similar first."""

_FIRST_BLOCK: Final = 4  # many partitions, those of conversations, hold one entry
_LARGEST_BLOCK: Final = 8_192
_FREE: Final = -1  # the group of rows that are not in use
_OTHER: Final = -2.0  # less than any similarity


def load_numpy() -> Any:
    """Return numpy.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import numpy as np  # noqa: PLC0415 optional
    except ImportError as error:
        raise ConfigError("a SemanticCache needs numpy: pip install 'microbatch[semantic]'") from error
    return np


def read_vectors(found: Any, count: int) -> list[Floats | None]:
    """Return the *count* vectors that an embedding function has *found*, with length 1; None for one that is none.

    Raises:
        MalformedAnswer: It has not found *count* of them.
    """
    np = load_numpy()
    vectors: list[Any] = [*found] if isinstance(found, Iterable) else []
    if len(vectors) != count:
        raise MalformedAnswer(f"{len(vectors)} vectors for {count} texts")
    return [_unit(np, vector) for vector in vectors]


def _unit(np: Any, vector: Any) -> Floats | None:
    try:
        # Wider than what is kept: squares of large numbers must not overflow.
        values = np.asarray(vector, dtype=np.float64)
        with np.errstate(over="ignore"):
            length = float(np.sqrt(values @ values)) if values.ndim == 1 and values.size else 0.0
    except (TypeError, ValueError, OverflowError):
        return None
    if not 0 < length < float("inf"):  # NaN is neither
        return None
    unit: Floats = (values / length).astype(np.float32)
    return unit


class Vectors:
    """Vectors of length 1, in numbered rows.

    They are in blocks that never move, so that adding one copies no others. A search may run in a thread while rows change: what it
    returns has to be looked at again.

    Args:
        dimension: The number of numbers in each vector.

    Attributes:
        count: Rows in use.
    """

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self.count: int = 0
        self._np = load_numpy()
        self._starts: list[int] = []  # the first row of each block
        self._blocks: list[tuple[Floats, Numbers]] = []  # vectors, and the groups they belong to
        self._free: list[int] = []
        self._rows = 0

    def add(self, vector: Floats, group: int) -> int:
        """Add *vector* to *group*; return its row."""
        row = self._free.pop() if self._free else self._new_row()
        (vectors, groups), place = self._find(row)
        vectors[place] = vector
        groups[place] = group
        self.count += 1
        return row

    def _new_row(self) -> int:
        if not self._blocks or self._rows == self._starts[-1] + len(self._blocks[-1][1]):
            size = min(_LARGEST_BLOCK, max(_FIRST_BLOCK, self._rows))
            np = self._np
            vectors = np.zeros((size, self.dimension), dtype=np.float32)
            self._starts.append(self._rows)
            self._blocks.append((vectors, np.full(size, _FREE, dtype=np.int64)))
        self._rows += 1
        return self._rows - 1

    def _find(self, row: int) -> tuple[tuple[Floats, Numbers], int]:
        number = bisect_right(self._starts, row) - 1
        return self._blocks[number], row - self._starts[number]

    def remove(self, row: int) -> None:
        """Remove the vector in *row*."""
        (vectors, groups), place = self._find(row)
        vectors[place] = 0.0
        groups[place] = _FREE
        self._free.append(row)
        self.count -= 1

    def vector(self, row: int) -> Floats:
        """Return a copy of the vector in *row*."""
        (vectors, _), place = self._find(row)
        copy: Floats = vectors[place].copy()
        return copy

    def similarity(self, vector: Floats, row: int) -> float:
        """Return the cosine of the angle between *vector*, of length 1, and that in *row*."""
        (vectors, _), place = self._find(row)
        return float(vectors[place] @ vector)

    @property
    def numbers(self) -> int:
        """The numbers that a search multiplies for one vector."""
        return self._rows * self.dimension

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(vectors.nbytes + groups.nbytes for vectors, groups in self._blocks)

    def search(self, asked: Sequence[tuple[Floats, int]], most: int) -> Callable[[], list[tuple[Ranked, Ranked]]]:
        """Return a function that searches, here or in a thread.

        It returns for each vector and group that is *asked* for at most *most* rows of the group, and the nearest row of any group.
        """
        np = self._np
        blocks = list(zip(self._starts, self._blocks, strict=True))

        def run() -> list[tuple[Ranked, Ranked]]:
            found: list[tuple[Ranked, Ranked]] = []
            for vector, group in asked:
                allowed: Ranked = []
                every: Ranked = []
                for start, (vectors, groups) in blocks:
                    # Not a product of matrices: its threads wait for each other, many times as long where the processors are busy.
                    similarities = np.where(groups == _FREE, np.float32(_OTHER), np.vecdot(vectors, vector))
                    every += _best(np, similarities, slice(None), 1, start)
                    (places,) = np.nonzero(groups == group)
                    allowed += _best(np, similarities, places, most, start)
                found.append((sorted(allowed, reverse=True)[:most], sorted(every, reverse=True)[:1]))
            return found

        return run


def _best(np: Any, similarities: Floats, places: Any, most: int, start: int) -> Ranked:
    """Return the *most* similar of the *places* in a block that begins at row *start*, in any order."""
    chosen = similarities[places]
    if most == 1:
        best = int(chosen.argmax())
        return [(float(chosen[best]), start + best)]
    if len(chosen) > most:
        places = places[np.argpartition(chosen, -most)[-most:]]
    return [(float(similarities[place]), start + int(place)) for place in places]
