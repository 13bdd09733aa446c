"""A set of digests in little memory: about 25 bytes for each, where a `set` of integers takes 100."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

_BYTES: Final = 16
_FREE: Final = 0xFFFF_FFFF
_DELETED: Final = 0xFFFF_FFFE
_LEAST_SLOTS: Final = 8


class Digests:
    """A set of digests of 128 bits, each with a number: 0, 1, ... in the order in which they were added.

    Numbers serve as positions in arrays with more about each digest. A digest that was discarded and is added again gets a new number.
    The digests are kept one after the other; a hash table with linear probing, whose slots are their low bits, finds them.
    """

    def __init__(self, digests: Iterable[int] = ()) -> None:
        self._kept = bytearray()
        self._slots = _free_slots(_LEAST_SLOTS)
        self._used = 0  # slots that are not free
        self._size = 0
        for digest in digests:
            self.add(digest)

    def __len__(self) -> int:
        return self._size

    def __contains__(self, digest: object) -> bool:
        return isinstance(digest, int) and self.number(digest) is not None

    def number(self, digest: int) -> int | None:
        """Return the number of *digest*; None if it is not in the set."""
        found = self._slots[self._slot_of(digest)]
        return None if found == _FREE else found

    def add(self, digest: int) -> int:
        """Add *digest*, unless it is in the set, and return its number."""
        slot = self._slot_of(digest)
        found = self._slots[slot]
        if found != _FREE:
            return found
        number = len(self._kept) // _BYTES
        self._kept += digest.to_bytes(_BYTES, "little")
        self._slots[slot] = number
        self._used += 1
        self._size += 1
        if self._used * 3 > len(self._slots) * 2:
            self._grow()
        return number

    def discard(self, digest: int) -> None:
        """Remove *digest*, if it is in the set."""
        slot = self._slot_of(digest)
        if self._slots[slot] != _FREE:
            self._slots[slot] = _DELETED
            self._size -= 1

    def _slot_of(self, digest: int) -> int:
        """Return the slot that holds *digest*, else the free one where it belongs."""
        slots, kept, key = self._slots, self._kept, digest.to_bytes(_BYTES, "little")
        mask = len(slots) - 1
        slot = digest & mask
        while (number := slots[slot]) != _FREE:
            if number != _DELETED and kept.startswith(key, number * _BYTES):
                break
            slot = slot + 1 & mask
        return slot

    def _grow(self) -> None:
        """Move the digests that are left to a table of twice as many slots, or of as many if most of them were discarded."""
        old, size = self._slots, len(self._slots)
        self._slots = slots = _free_slots(size * 2 if self._size * 3 > size else size)
        self._used, mask, kept = self._size, len(slots) - 1, self._kept
        for number in old:
            if number >= _DELETED:
                continue
            start = number * _BYTES
            slot = int.from_bytes(kept[start : start + 8], "little") & mask
            while slots[slot] != _FREE:
                slot = slot + 1 & mask
            slots[slot] = number


def _free_slots(size: int) -> array[int]:
    return array("I", [_FREE]) * size
