"""A cache in Redis, shared by processes and machines."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from microbatch.caching.entry import DEFAULT_TTL, checked_values
from microbatch.caching.key import SECRET_BYTES
from microbatch.checking import Count, Positive, Seconds, checks_arguments
from microbatch.errors import StorageError
from microbatch.protocols import Cache
from microbatch.storage.redis import RedisStore, milliseconds, results_of, translated

if TYPE_CHECKING:
    from collections.abc import Sequence


class RedisCache(RedisStore, Cache):
    """Keeps answers on a Redis server, with one round trip for all entries read or stored together.

    What to drop when the server is full is the server's decision: set its `maxmemory`, and the policy `allkeys-lru`. Calls raise
    `StorageError` if the server cannot be reached or used.

    Args:
        url: `redis://`, `rediss://` or `unix://`, with the database number and credentials where needed.
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
        client = self._opened()
        with translated():
            secret = await client.get(self._secret_key)
            if secret is None:
                # Others may do the same now: the server takes one value, and all read that.
                await client.set(self._secret_key, self._secret or secrets.token_bytes(SECRET_BYTES), nx=True)
                secret = await client.get(self._secret_key)
        self._secret = checked_values([secret], 1)[0]
        return self._secret or b""

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        client = self._opened()
        if not keys:
            return []
        with translated():
            found = await client.mget([self._key(key) for key in keys])
        try:
            return checked_values(found, len(keys))
        except StorageError:
            # The connection, which is back in the pool, may be out of step.
            with translated():
                await client.connection_pool.disconnect(inuse_connections=False)
            raise

    async def set_many(self, entries: Sequence[tuple[bytes, bytes, float | None]]) -> None:
        """Store *entries*: key, value and seconds to live each, None for no limit. An error may leave some of them stored."""
        pipeline = self._opened().pipeline(transaction=False)
        if self._secret is not None:
            # The server may have lost the secret, without which other processes would not find the entries.
            pipeline.set(self._secret_key, self._secret, nx=True)
        for key, value, ttl in entries:
            if ttl is None:
                pipeline.set(self._key(key), value)
            elif ttl >= 0.001:  # noqa: PLR2004 a millisecond, the server's shortest time
                pipeline.set(self._key(key), value, px=milliseconds(ttl))
        with translated():
            await results_of(pipeline)

    def _key(self, key: bytes) -> bytes:
        return self._prefix.encode() + key
