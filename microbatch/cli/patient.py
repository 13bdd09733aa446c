"""A cache under work that nobody waits for: what fails is tried again, where a service would do without."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, TypeVar

from microbatch.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from microbatch.caching.redis import RedisCache
    from microbatch.caching.sqlite import SQLiteCache

T = TypeVar("T")

PATIENCE: Final = 10.0
"""Seconds for which one look-up or store is tried, as a server may be about to come back."""

OPENING: Final = 2.0
"""Seconds for which the first contact is tried."""

_PAUSE: Final = 0.1


class PatientCache:
    """Gives a cache more time than a batcher does.

    A batcher does without a cache that needs longer than 50 ms, because callers wait. In bulk work a wait costs nothing, while each
    look-up or store that is left out costs a call, now or the next time. A cache that cannot be used from the start is a mistake in
    the command: better told before anything is paid for.

    Args:
        cache: The cache.

    Attributes:
        ttl: That of the cache.
        keeps_time: True, so that the batcher sets it no time.
        stored: Entries put into the cache.
        failure: Why stores, or all of the cache, were given up; None as long as it is used. Nothing that was given up is tried again. A
            server without room has its answers still, so a store that fails ends no look-ups.
    """

    keeps_time: Final = True

    def __init__(self, cache: SQLiteCache | RedisCache) -> None:
        self._cache = cache
        self.ttl = cache.ttl
        self.stored = 0
        self.failure: StorageError | None = None
        self._end: StorageError | None = None  # of look-ups as well

    @property
    def evictions(self) -> int:
        """Entries that the cache dropped for want of room."""
        return self._cache.evictions

    async def open(self) -> None:
        """Open the cache and see that it can be used.

        Raises:
            ConfigError: It cannot.
        """
        await self._cache.open()
        try:
            await self._patiently(self._cache.secret, OPENING)
        except BaseException as error:
            await self._cache.aclose()
            if isinstance(error, StorageError):
                raise ConfigError(f"--cache cannot be used: {error}") from error
            raise

    async def secret(self) -> bytes:
        """Return what keys the digests.

        Raises:
            StorageError: The cache is given up.
        """
        return await self._patiently(self._cache.secret, PATIENCE)

    async def get_many(self, keys: Sequence[bytes], *, patience: object = None) -> list[bytes | None]:  # noqa: ARG002
        """Return the value of each key, None where there is none. *patience*, that of a batcher, is too short here.

        Raises:
            StorageError: The cache is given up.
        """
        return await self._patiently(lambda: self._cache.get_many(keys), PATIENCE)

    async def set_many(
        self,
        entries: Sequence[tuple[bytes, bytes, float | None]],
        *,
        patience: object = None,  # noqa: ARG002 see `get_many`
    ) -> None:
        """Keep *entries*: key, value, and seconds after which it may be dropped, None for as long as there is room.

        Raises:
            StorageError: The cache is given up.
        """
        await self._patiently(lambda: self._cache.set_many(entries), PATIENCE, store=True)
        self.stored += len(entries)

    async def aclose(self) -> None:
        """Close the cache."""
        await self._cache.aclose()

    async def _patiently(self, call: Callable[[], Awaitable[T]], patience: float, *, store: bool = False) -> T:
        loop = asyncio.get_running_loop()
        end = loop.time() + patience
        error = StorageError(f"no answer within {patience:g} s")
        while (given_up := self.failure if store else self._end) is None:
            try:
                async with asyncio.timeout_at(end):
                    return await call()
            except StorageError as reason:
                error = reason
            except TimeoutError:
                pass  # an earlier reason says more than that the last try was cut off
            if loop.time() + _PAUSE < end:
                await asyncio.sleep(_PAUSE)
                continue
            self.failure = error
            if not store:
                self._end = error
        raise given_up.replica()
