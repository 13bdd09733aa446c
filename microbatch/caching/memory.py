"""A cache in the memory of this process."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from microbatch.caching.deletion import Deleting
from microbatch.caching.entry import DEFAULT_TTL
from microbatch.checking import Count, Seconds, checks_arguments
from microbatch.lru import LRU
from microbatch.protocols import Cache

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

ENTRY_BYTES: Final = 264
"""Memory of an entry beside its key and value: object headers, tuple, time, and the mapping's slot and link (CPython 3.11 to 3.13,
measured)."""


class MemoryCache(Deleting, Cache):
    """Keeps the most recently used entries, up to a number of bytes; they are lost with the process.

    Closing has no effect: entries stay so that another batcher can use the cache.

    Args:
        max_bytes: Most bytes kept: keys, values, and `ENTRY_BYTES` for each entry. A larger entry is not kept.
        max_entries: Most entries kept, or None for no other limit than the bytes.
        ttl: Seconds for which answers are valid unless the request says otherwise; None for no limit.

    Attributes:
        ttl: As given.
        evictions: Number of entries dropped for lack of space.

    Raises:
        ConfigError: A limit is below its minimum.
    """

    @checks_arguments
    def __init__(
        self,
        *,
        max_bytes: Count = 64 * 1024 * 1024,
        max_entries: Count | None = None,
        ttl: Seconds | None = DEFAULT_TTL,
    ) -> None:
        self.ttl = ttl
        self.evictions: int = 0
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._entries: LRU[bytes, tuple[bytes, float]] = LRU(None)  # value, and loop time of its expiry
        self._bytes = 0

    def __len__(self) -> int:
        """Return the number of entries, including expired ones that have not been looked up or displaced since."""
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<MemoryCache: {len(self)} entries, {self._bytes} of {self._max_bytes} bytes>"

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        now = asyncio.get_running_loop().time()
        return [self._get(key, now) for key in keys]

    def _get(self, key: bytes, now: float) -> bytes | None:
        value, expires = self._entries.get(key) or (None, now)
        if value is not None and expires <= now:
            self._drop(key)
            return None
        return value

    async def set_many(self, entries: Sequence[tuple[bytes, bytes, float | None]]) -> None:
        now = asyncio.get_running_loop().time()
        for key, value, ttl in entries:
            self._drop(key)
            size = _size(key, value)
            if size <= self._max_bytes:
                self._entries.put(key, (value, float("inf") if ttl is None else now + ttl))
                self._bytes += size
                self._evict(now)

    def _evict(self, now: float) -> None:
        most = self._max_entries or len(self._entries)
        while (oldest := self._entries.oldest()) and (self._bytes > self._max_bytes or len(self._entries) > most):
            key, (_, expires) = oldest
            self._drop(key)
            self.evictions += expires > now

    def _drop(self, key: bytes) -> bool:
        """Drop *key*; return whether it was there."""
        entry = self._entries.pop(key)
        if entry is None:
            return False
        self._bytes -= _size(key, entry[0])
        return True

    async def entries(self) -> AsyncIterator[list[tuple[bytes, bytes]]]:
        yield [(key, value) for key, (value, _) in self._entries.items()]

    async def delete(self, keys: Sequence[bytes]) -> int:
        return sum([self._drop(key) for key in keys])

    async def aclose(self) -> None:
        """Do nothing."""


def _size(key: bytes, value: bytes) -> int:
    return len(key) + len(value) + ENTRY_BYTES
