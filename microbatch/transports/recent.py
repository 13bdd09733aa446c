"""A mapping that remembers what was used most recently."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The most recently used keys and their values.

    Args:
        capacity: Most keys remembered.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        """Return how many keys are remembered."""
        return len(self._values)

    def get(self, key: K) -> V | None:
        """Return the value of *key*, which is now the most recent, or None."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: K, value: V) -> V:
        """Remember *value*, and forget what was not used for longest if there are too many; return *value*."""
        self._values[key] = value
        self._values.move_to_end(key)
        while len(self._values) > self._capacity:
            self._values.popitem(last=False)
        return value

    def oldest(self) -> tuple[K, V] | None:
        """Return what was not used for longest, or None."""
        return next(iter(self._values.items()), None)

    def forget(self, key: K) -> None:
        """Forget *key*, if it is remembered."""
        self._values.pop(key, None)
