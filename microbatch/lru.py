"""Mappings of bounded size that drop the least recently used entries."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from collections.abc import Callable

K = TypeVar("K")
V = TypeVar("V")

IDLE_EXPIRY: Final = 600.0
"""Seconds after which a `SharedLRU` drops an unused value."""


class LRU(Generic[K, V]):
    """The most recently used keys and their values.

    Args:
        capacity: Maximum number of keys; None for no maximum.
    """

    def __init__(self, capacity: int | None) -> None:
        self._capacity = capacity
        self._values: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(self._values)

    def __contains__(self, key: K) -> bool:
        """Return whether *key* is there; this is no use of it."""
        return key in self._values

    def get(self, key: K) -> V | None:
        """Return the value of *key*, which becomes the most recently used one, or None."""
        try:
            self._values.move_to_end(key)
            return self._values[key]
        except KeyError:
            return None

    def put(self, key: K, value: V) -> V:
        """Set *value* as the most recently used one, drop the least recently used beyond the capacity, and return *value*."""
        self._values[key] = value
        self._values.move_to_end(key)
        while self._capacity is not None and len(self._values) > self._capacity:
            self._values.popitem(last=False)
        return value

    def get_or_make(self, key: K, make: Callable[[], V]) -> V:
        """Return the value of *key*; that of *make* if there is none."""
        value = self.get(key)
        return self.put(key, make()) if value is None else value

    def values(self) -> list[V]:
        """Return all values, the least recently used first."""
        return [*self._values.values()]

    def items(self) -> list[tuple[K, V]]:
        """Return all keys and their values, the least recently used first."""
        return [*self._values.items()]

    def oldest(self) -> tuple[K, V] | None:
        """Return the least recently used key and its value, or None."""
        return next(iter(self._values.items()), None)

    def pop(self, key: K) -> V | None:
        """Remove *key*; return its value, or None."""
        return self._values.pop(key, None)

    def clear(self) -> None:
        """Remove all keys."""
        self._values.clear()


class _Used(Protocol):
    used: float  # loop time of the latest use


U = TypeVar("U", bound=_Used)


class SharedLRU(Generic[K, U]):
    """Values that stay available while they are referenced elsewhere, and for `IDLE_EXPIRY` seconds after their latest use.

    Args:
        capacity: Maximum number of values kept without other references.
    """

    def __init__(self, capacity: int) -> None:
        self._referenced: WeakValueDictionary[K, U] = WeakValueDictionary()
        self._recent: LRU[K, U] = LRU(capacity)

    def __len__(self) -> int:
        """Return the number of values."""
        return len(self._referenced)

    def get_or_make(self, key: K, make: Callable[[], U], now: float) -> U:
        """Return the value of *key*, that of *make* if there is none; drop values that are unused for too long."""
        value = self._referenced.get(key)
        if value is None:
            value = self._referenced[key] = make()
        value.used = now
        self._recent.put(key, value)
        while (oldest := self._recent.oldest()) is not None and oldest[1].used < now - IDLE_EXPIRY:
            self._recent.pop(oldest[0])
        return value

    def values(self) -> list[U]:
        """Return all values."""
        return list(self._referenced.values())
