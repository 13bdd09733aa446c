"""Answers kept in Redis: processes and machines share them."""

from __future__ import annotations

import contextlib
import functools
import secrets
from typing import TYPE_CHECKING, Any, Final

from microbatch.caching.entry import DEFAULT_TTL
from microbatch.caching.key import SECRET_BYTES
from microbatch.errors import ConfigError, StorageError
from microbatch.policy import at_least, whole
from microbatch.storage.redis import connect, results_of, translated

if TYPE_CHECKING:
    from collections.abc import Sequence

_LONGEST: Final = 100 * 365 * 24 * 3600.0  # the server refuses times that do not fit its integers


class RedisCache:
    """Keeps answers on a Redis server, one round trip for as many as are asked for or kept together.

    What the server drops for want of room is its own affair: give it a `maxmemory`, and the policy `allkeys-lru`.

    Args:
        url: `redis://`, `rediss://` or `unix://`, with the number of the database and credentials if need be.
        ttl: Seconds for which answers are good unless the request says otherwise; None for ever.
        prefix: What the names of all keys begin with.
        timeout: Seconds for each of: connecting, each write, and each read. Whatever this says, a batcher waits 50 ms in all for what
            a caller waits for, and 2 s for stores and bulk work.
        max_connections: Most connections open at once. Who finds none free waits for one.

    Attributes:
        ttl: As given.
        evictions: 0; the server knows.

    Raises:
        ConfigError: The package redis is missing, the address is malformed, or a limit is below its minimum.
    """

    def __init__(
        self,
        url: str,
        *,
        ttl: float | None = DEFAULT_TTL,
        prefix: str = "microbatch:",
        timeout: float = 5.0,
        max_connections: int = 16,
    ) -> None:
        at_least(0, ttl=ttl)
        at_least(0.001, timeout=timeout)
        whole(1, max_connections=max_connections)
        if not isinstance(prefix, str):
            raise ConfigError(f"prefix must be a str, got {prefix!r}")
        self.ttl = ttl
        self.evictions = 0
        self._prefix = prefix.encode() + b"cache:"
        self._secret_name = prefix.encode() + b"cache-secret"
        self._connect = functools.partial(connect, url, timeout=timeout, max_connections=max_connections)
        self._connect()  # nothing is sent; a malformed address is told now
        self._client: Any = None
        self._secret: bytes | None = None  # as it was last read

    def __repr__(self) -> str:
        """Tell the names it uses, but not the address: it may hold a password."""
        return f"<RedisCache: {self._prefix.decode()}*, {'closed' if self._client is None else 'open'}>"

    async def open(self) -> None:
        """Get ready. Nothing is sent, so that a server that is down holds up nobody."""
        self._client = self._connect()

    async def secret(self) -> bytes:
        """Return the 32 random bytes that whoever came first has left on the server.

        If the server has lost them, those that this cache has read before are put back.

        Raises:
            StorageError: The server cannot be reached or used.
        """
        client = self._opened()
        with translated():
            secret = await client.get(self._secret_name)
            if secret is None:
                # Another may be about to do the same: the server takes one, and all read that.
                await client.set(self._secret_name, self._secret or secrets.token_bytes(SECRET_BYTES), nx=True)
                secret = await client.get(self._secret_name)
        self._secret = _bytes_each([secret], 1)[0]
        return self._secret or b""

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the value of each key, None where there is none.

        Raises:
            StorageError: The server cannot be reached or used.
        """
        client = self._opened()
        if not keys:
            return []
        with translated():
            found = await client.mget([self._prefix + key for key in keys])
        try:
            return _bytes_each(found, len(keys))
        except StorageError:
            # Whatever it was an answer to: on this connection it may go on like that. It is back in the pool by now.
            with translated():
                await client.connection_pool.disconnect(inuse_connections=False)
            raise

    async def set_many(self, entries: Sequence[tuple[bytes, bytes, float | None]]) -> None:
        """Keep *entries*: key, value, and seconds after which the server drops it, None for as long as there is room.

        The secret is put back with them if the server has lost it.

        Raises:
            StorageError: The server cannot be reached or used; some of the entries may be kept.
        """
        pipeline = self._opened().pipeline(transaction=False)
        if self._secret is not None:
            # The server may have been emptied, or have dropped it for want of room. Without it nobody else would find the entries.
            pipeline.set(self._secret_name, self._secret, nx=True)
        for key, value, ttl in entries:
            if ttl is None:
                pipeline.set(self._prefix + key, value)
            elif ttl >= 0.001:  # noqa: PLR2004 a millisecond is the least that the server knows
                pipeline.set(self._prefix + key, value, px=int(min(ttl, _LONGEST) * 1000))
        with translated():
            await results_of(pipeline)

    def _opened(self) -> Any:
        if self._client is None:
            raise StorageError("the cache in Redis is not open")
        return self._client

    async def aclose(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(StorageError), translated():
                await client.aclose()


def _bytes_each(found: Any, count: int) -> list[bytes | None]:
    """Return *found*.

    Raises:
        StorageError: It is not *count* values, each bytes or None.
    """
    if not (
        isinstance(found, list)
        and len(found) == count
        and all(value is None or isinstance(value, bytes) for value in found)
    ):
        raise StorageError("Redis: the answer does not belong to the question")
    return found
