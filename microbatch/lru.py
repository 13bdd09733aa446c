"""A mapping that remembers what was used most recently."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from collections.abc import Callable


class _Used(Protocol):
    """What tells when it was last used.

    Attributes:
        used: The loop's time.
    """

    used: float


K = TypeVar("K")
V = TypeVar("V")
U = TypeVar("U", bound=_Used)

IDLE_EXPIRY: Final = 600.0
"""Seconds after which what nobody used is forgotten."""


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


class Kept(Generic[K, U]):
    """Values that are kept as long as somebody holds them, and for a while after.

    Args:
        capacity: Most values kept that nobody holds.
    """

    def __init__(self, capacity: int) -> None:
        self._held: WeakValueDictionary[K, U] = WeakValueDictionary()
        self._recent: Recent[K, U] = Recent(capacity)

    def __len__(self) -> int:
        """Return how many are kept or held."""
        return len(self._held)

    def get(self, key: K, now: float) -> U | None:
        """Return the value of *key*, or None."""
        value = self._held.get(key)
        return None if value is None else self.put(key, value, now)

    def put(self, key: K, value: U, now: float) -> U:
        """Keep *value*, and forget what nobody used for long; return *value*."""
        value.used = now
        self._held[key] = value
        self._recent.put(key, value)
        while (oldest := self._recent.oldest()) is not None and oldest[1].used < now - IDLE_EXPIRY:
            self._recent.forget(oldest[0])
        return value

    def values(self) -> list[U]:
        """Return all that are kept or held."""
        return list(self._held.values())


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
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key]

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

    def oldest(self) -> tuple[K, V] | None:
        """Return the least recently used key and its value, or None."""
        return next(iter(self._values.items()), None)

    def pop(self, key: K) -> V | None:
        """Remove *key*; return its value, or None."""
        return self._values.pop(key, None)
