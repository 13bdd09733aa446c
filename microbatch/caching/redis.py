"""A cache in Redis, shared by processes and machines."""

from __future__ import annotations

import logging
import re
import secrets
from typing import TYPE_CHECKING, Any, Final

from microbatch.caching.deletion import Deleting
from microbatch.caching.entry import DEFAULT_TTL, checked_values
from microbatch.caching.key import SECRET_BYTES
from microbatch.checking import Count, Positive, Seconds, checks_arguments
from microbatch.errors import StorageError
from microbatch.protocols import Cache
from microbatch.storage.redis import RedisStore, Server, milliseconds, results_of, translated

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from microbatch.caching.deletion import Matches

logger: Final = logging.getLogger("microbatch")

_PAGE: Final = 500  # entries read or deleted at once
_PATTERNS: Final = re.compile(r"([*?\[\]\\^])")  # what the server's patterns give a meaning
_SHORTEST: Final = 0.001  # seconds, the server's shortest time to live


class RedisCache(RedisStore, Deleting, Cache):
    """Keeps answers on a Redis server, with one round trip for all entries read or stored together, or one to each node of a cluster.

    What to drop when the server is full is the server's decision: set its `maxmemory`, and the policy `allkeys-lru`. Calls raise
    `StorageError` if the server cannot be reached or used.

    Args:
        url: `redis://`, `rediss://` or `unix://`, with the database number and credentials where needed; `valkey://` and `valkeys://`
            for Valkey. Of a cluster, the address of any node.
        ttl: Seconds for which answers are valid unless the request says otherwise; None for no limit.
        prefix: Prefix of all keys.
        timeout: Seconds for each of: connecting, each write, and each read. In any case a batcher waits at most 50 ms for a look-up of
            a live caller, and 2 s for stores and bulk work.
        max_connections: Most connections open at a time; further calls wait for one.

    Attributes:
        ttl: As given.
        evictions: Always 0; see the server's own count.

    Raises:
        ConfigError: The package redis is missing, the address is malformed, or a limit is below its minimum.
    """

    @checks_arguments
    def __init__(
        self,
        url: str,
        *,
        ttl: Seconds | None = DEFAULT_TTL,
        prefix: str = "microbatch:",
        timeout: Positive = 5.0,
        max_connections: Count = 16,
    ) -> None:
        super().__init__(url, prefix=prefix, timeout=timeout, max_connections=max_connections)
        self.ttl = ttl
        self.evictions = 0
        self._secret_key = f"{prefix}cache-secret"
        self._prefix = f"{prefix}cache:"
        self._secret: bytes | None = None  # as last read

    async def secret(self) -> bytes:
        """Return the 32 random bytes that the first process has left on the server.

        If the server has lost them, those read before are put back.
        """
        async with self._in_use() as client:
            secret = await client.get(self._secret_key)
            if secret is None:
                # Others may do the same now: the server takes one value, and all read that.
                await client.set(self._secret_key, self._secret or secrets.token_bytes(SECRET_BYTES), nx=True)
                secret = await client.get(self._secret_key)
        self._secret = checked_values([secret], 1)[0]
        return self._secret or b""

    def _met(self, server: Server) -> None:
        if server.replica and not server.cluster:
            logger.warning(
                "the Redis server of the cache is a read-only replica: answers are found there, but none can be stored; "
                "give the address of the primary"
            )

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        self._opened()
        return await self._values([self._key(key) for key in keys]) if keys else []

    async def _values(self, names: Sequence[bytes]) -> list[bytes | None]:
        """Return the value of each of *names*, the server's keys."""
        async with self._in_use() as client:
            if self._server is not None and self._server.cluster:
                # One command takes keys of one slot only.
                pipeline = client.pipeline()
                for name in names:
                    pipeline.get(name)
                found: Any = await results_of(pipeline)
            else:
                found = await client.mget(names)
        try:
            return checked_values(found, len(names))
        except StorageError:
            await self._drop_connections()
            raise

    async def set_many(self, entries: Sequence[tuple[bytes, bytes, float | None]]) -> None:
        """Store *entries*: key, value and seconds to live each, None for no limit. An error may leave some of them stored."""
        async with self._in_use() as client:
            pipeline = client.pipeline(transaction=False)
            if self._secret is not None:
                # The server may have lost the secret, without which other processes would not find the entries.
                pipeline.set(self._secret_key, self._secret, nx=True)
            for key, value, ttl in entries:
                if ttl is None:
                    pipeline.set(self._key(key), value)
                elif ttl >= _SHORTEST:
                    pipeline.set(self._key(key), value, px=milliseconds(ttl))
                else:
                    pipeline.delete(self._key(key))  # what it would have replaced is no longer good either
            await results_of(pipeline)

    async def entries(self) -> AsyncIterator[list[tuple[bytes, bytes]]]:
        begin = len(self._key(b""))
        async for names in self._names():
            values = await self._values(names)
            yield [(name[begin:], value) for name, value in zip(names, values, strict=True) if value is not None]

    async def _names(self) -> AsyncIterator[list[bytes]]:
        """Yield the server's keys of all entries, in pages."""
        async with self._in_use() as client:
            found = client.scan_iter(match=_PATTERNS.sub(r"\\\1", self._prefix) + "*", count=_PAGE)
        page: list[bytes] = []
        name: bytes | None = b""
        while name is not None:
            with translated():
                name = await anext(found, None)
            if name is not None:
                page.append(name)
            if page and (name is None or len(page) == _PAGE):
                yield page
                page = []

    async def delete(self, keys: Sequence[bytes]) -> int:
        return await self._delete([self._key(key) for key in keys])

    async def _delete(self, names: Sequence[bytes]) -> int:
        async with self._in_use() as client:
            pipeline = client.pipeline(transaction=False)
            for name in names:
                pipeline.delete(name)
            return sum(await results_of(pipeline)) if names else 0

    async def erase(self, matches: Matches | None) -> int:
        if matches is not None:
            return await super().erase(matches)
        return sum([await self._delete(names) async for names in self._names()])

    def _key(self, key: bytes) -> bytes:
        return self._prefix.encode() + key
