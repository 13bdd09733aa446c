"""Vectors beyond those that are all compared: an approximate index of usearch, which is imported late."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from microbatch.semantic.vectors import Floats, Ranked


class Older:
    """Vectors of length 1 by numbers. An approximate search may miss some, which costs a hit and no more.

    Changes are made by the next search, which runs in a thread: each takes a millisecond or two.

    Args:
        index: A `usearch.index.Index` of inner products.
    """

    def __init__(self, index: Any) -> None:
        self._index = index
        self._changes: deque[tuple[int, Floats | None]] = deque()
        self._lock = threading.Lock()

    @classmethod
    def of(cls, dimension: int) -> Older | None:
        """Return an empty one for vectors of *dimension* numbers; None if usearch is not installed."""
        try:
            from usearch.index import Index  # noqa: PLC0415 optional
        except ImportError:
            return None
        return cls(Index(ndim=dimension, metric="ip", dtype="f32"))

    def add(self, number: int, vector: Floats) -> None:
        """Add *vector* under a *number* that was never used."""
        self._changes.append((number, vector))

    def remove(self, number: int) -> None:
        """Remove the vector under *number*."""
        self._changes.append((number, None))

    def search(self, vectors: Sequence[Floats], most: int) -> Callable[[], list[Ranked]]:
        """Return a function, to be run in a thread, that returns similarities and numbers of at most *most* near ones of each."""

        def run() -> list[Ranked]:
            with self._lock:
                self._apply()
                return [self._near(vector, most) for vector in vectors]

        return run

    def _apply(self) -> None:
        while self._changes:
            number, vector = self._changes.popleft()
            if vector is None:
                self._index.remove(number)
            else:
                self._index.add(number, vector, threads=1)

    def _near(self, vector: Floats, most: int) -> Ranked:
        if not len(self._index):
            return []
        found = self._index.search(vector, most, threads=1)
        return [(1.0 - float(far), int(number)) for number, far in zip(found.keys, found.distances, strict=True)]
