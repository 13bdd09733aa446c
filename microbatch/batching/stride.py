"""Weighted turns of the three priorities.

Stride scheduling (Waldspurger 1995): each turn moves a priority on by 1/weight, and the one furthest behind is next. A priority that
comes back after a rest starts level with the others, so that it makes up for nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

WEIGHTS: Final = (16, 4, 1)
"""Turns of the priorities high, normal and low, while all of them wait."""


class Stride:
    """How far the turns of each priority have moved it."""

    def __init__(self) -> None:
        self._moved = [0.0] * len(WEIGHTS)
        self._level = 0.0  # how far the priority of the latest turn had moved

    def enter(self, rank: int) -> None:
        """Note that *rank* waits again after a rest."""
        self._moved[rank] = max(self._moved[rank], self._level)

    def first(self, ranks: Iterable[int]) -> int | None:
        """Return which of *ranks* is next, the most urgent one of equals; None if there are none."""
        return min(ranks, key=self._moved.__getitem__, default=None)

    def served(self, rank: int) -> None:
        """Use up a turn of *rank*."""
        self._level = self._moved[rank]
        self._moved[rank] += 1 / WEIGHTS[rank]
