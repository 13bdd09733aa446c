"""Answers kept in the memory of this process."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from microbatch.caching.terms import WEEK
from microbatch.lru import LRU
from microbatch.policy import at_least, whole

if TYPE_CHECKING:
    from collections.abc import Sequence

ENTRY_BYTES: Final = 264
"""What an entry costs beyond its key and value: the objects' heads, the tuple, the time and the mapping's slot and link (CPython
3.11 to 3.13, measured)."""


class MemoryCache:
    """Keeps what was used most recently, up to a number of bytes; it is gone with the process.

    Closing it changes nothing, so that one batcher after the other can use it.

    Args:
        max_bytes: Most bytes kept: keys, values, and `ENTRY_BYTES` for each entry. An entry that is larger is not kept.
        max_entries: Most entries kept, or None for as many as the bytes allow.
        ttl: Seconds for which answers are good unless the request says otherwise; None for ever.

    Attributes:
        ttl: As given.
        evictions: Entries dropped for want of room.

    Raises:
        ConfigError: A limit is below its minimum.
    """

    def __init__(
        self, *, max_bytes: int = 64 * 1024 * 1024, max_entries: int | None = None, ttl: float | None = WEEK
    ) -> None:
        whole(1, max_bytes=max_bytes, max_entries=max_entries)
        at_least(0, ttl=ttl)
        self.ttl = ttl
        self.evictions = 0
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._entries: LRU[bytes, tuple[bytes, float]] = LRU(None)  # value, and when it expires
        self._bytes = 0

    def __len__(self) -> int:
        """Return how many entries are kept, expired ones included until somebody asks for them or their room is needed."""
        return len(self._entries)

    def __repr__(self) -> str:
        """Tell how full it is."""
        return f"<MemoryCache: {len(self)} entries, {self._bytes} of {self._max_bytes} bytes>"

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the value of each key, None where there is none."""
        now = asyncio.get_running_loop().time()
        return [self._get(key, now) for key in keys]

    def _get(self, key: bytes, now: float) -> bytes | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        value, expires = entry
        if expires <= now:
            self._drop(key)
            return None
        return value

    async def set_many(self, entries: Sequence[tuple[bytes, bytes, float | None]]) -> None:
        """Keep *entries*: key, value, and seconds after which it is dropped, None for as long as there is room."""
        now = asyncio.get_running_loop().time()
        for key, value, ttl in entries:
            self._drop(key)
            size = _size(key, value)
            if size <= self._max_bytes:
                self._entries.put(key, (value, float("inf") if ttl is None else now + ttl))
                self._bytes += size
                self._make_room(now)

    def _make_room(self, now: float) -> None:
        while (oldest := self._entries.oldest()) is not None and (
            self._bytes > self._max_bytes or len(self._entries) > (self._max_entries or len(self._entries))
        ):
            key, (_, expires) = oldest
            self._drop(key)
            self.evictions += expires > now

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        if entry is not None:
            self._bytes -= _size(key, entry[0])

    async def aclose(self) -> None:
        """Nothing is held but memory."""


def _size(key: bytes, value: bytes) -> int:
    return len(key) + len(value) + ENTRY_BYTES
