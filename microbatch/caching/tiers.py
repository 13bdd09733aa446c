"""Several caches as one: fast local ones in front of shared, durable ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from microbatch.caching.deletion import Deleting
from microbatch.caching.guard import LIVE_TIMEOUT, Deadline, Guard
from microbatch.checking import checks_arguments
from microbatch.errors import ConfigError, StorageError
from microbatch.protocols import Cache
from microbatch.resources import acquire, release

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from microbatch.caching.deletion import Matches


class TieredCache(Deleting):
    """Asks the fastest cache first, and the next ones for the keys that are still missing.

    Values found in a lower tier are copied to the tiers above it for those tiers' `ttl`; values must therefore record themselves
    when they expire, as the batcher's do. Each tier is guarded separately, so a tier that is down costs its own answers only. One
    call may take as long as that of a single cache: each tier gets an equal share of the time left.

    Args:
        tiers: Caches, the fastest first. A tier above the last keeps nothing for longer than its own `ttl`.

    Attributes:
        ttl: That of the last tier.

    Raises:
        ConfigError: There is no tier.
    """

    keeps_deadline = True  # see `Guard`

    @checks_arguments
    def __init__(self, *tiers: Cache) -> None:
        if not tiers:
            raise ConfigError("a TieredCache needs at least one tier")
        self.tiers = tiers
        self.ttl: float | None = getattr(tiers[-1], "ttl", None)
        self._guards = [Guard(tier) for tier in tiers]
        self._acquired: tuple[Cache, ...] = ()

    def __repr__(self) -> str:
        return f"<TieredCache: {self._guards}>"

    @property
    def bypassed(self) -> int:
        """Number of look-ups for which a tier was not asked, failed or took too long, summed over the tiers."""
        return sum(guard.bypassed for guard in self._guards)

    @property
    def evictions(self) -> int:
        """Number of entries dropped for lack of space, summed over the tiers."""
        return sum(guard.evictions for guard in self._guards)

    async def open(self) -> None:
        """Open the tiers; if one cannot be opened, close the others and raise its error."""
        await acquire(self.tiers)
        self._acquired = self.tiers

    async def secret(self) -> bytes | None:
        """Return the 32 bytes that key the digests, from the last tier that has any; None if they are not available now."""
        holders = [guard for guard in self._guards if hasattr(guard.cache, "secret")]
        return await (holders or self._guards)[-1].secret()

    async def get_many(self, keys: Sequence[bytes], *, deadline: Deadline | None = None) -> list[bytes | None]:
        """Return the value of each key, None where there is none or its tier is down; *deadline* None means 50 ms in total."""
        deadline = deadline or Deadline(LIVE_TIMEOUT)
        found: dict[bytes, bytes] = {}
        gains: list[dict[bytes, bytes]] = []
        for position, guard in enumerate(self._guards):
            missing = [key for key in keys if key not in found]
            values = await guard.get_many(missing, deadline=deadline.part(len(self._guards) - position))
            gains.append({key: value for key, value in zip(missing, values, strict=True) if value is not None})
            found.update(gains[-1])
        await self._fill(gains, deadline)
        return [found.get(key) for key in keys]

    async def _fill(self, gains: list[dict[bytes, bytes]], deadline: Deadline) -> None:
        """Copy the values found in each tier to the tiers above it, as far as there is time."""
        below: dict[bytes, bytes] = {}
        for position in reversed(range(len(gains) - 1)):
            below |= gains[position + 1]
            if below and deadline.left:
                guard = self._guards[position]
                await guard.store([(key, value, guard.ttl) for key, value in below.items()], deadline=deadline.part(1))

    async def set_many(
        self, entries: Sequence[tuple[bytes, bytes, float | None]], *, deadline: Deadline | None = None
    ) -> None:
        """Store *entries* (key, value, seconds to live) in all tiers; *deadline* None means 50 ms in total."""
        deadline = deadline or Deadline(LIVE_TIMEOUT)
        last = len(self._guards) - 1
        for position, guard in enumerate(self._guards):
            own = None if position == last else guard.ttl
            kept = [(key, value, _shorter(ttl, own)) for key, value, ttl in entries]
            await guard.store(kept, deadline=deadline.part(len(self._guards) - position))

    async def entries(self) -> AsyncIterator[list[tuple[bytes, bytes]]]:
        """Yield the entries of the last tier, in pages of keys and values."""
        async for page in self._deleting()[-1].entries():
            yield page

    async def delete(self, keys: Sequence[bytes]) -> int:
        """Delete the entries with *keys* in all tiers; return the largest number that one had. For errors see `clear`."""
        return await self._in_each(lambda tier: tier.delete(keys))

    async def erase(self, matches: Matches | None) -> int:
        """Delete the entries that match in all tiers, all with None; return the largest number that one had."""
        return await self._in_each(lambda tier: tier.erase(matches))

    def _deleting(self) -> list[Deleting]:
        tiers: list[Deleting] = [tier for tier in self.tiers if isinstance(tier, Deleting)]
        if len(tiers) < len(self.tiers):
            names = sorted(type(tier).__name__ for tier in self.tiers if not isinstance(tier, Deleting))
            raise ConfigError(f"entries cannot be deleted in {', '.join(names)}")
        return tiers

    async def _in_each(self, act: Callable[[Deleting], Awaitable[int]]) -> int:
        """Do it in all tiers, even if one fails, the last first, as what is found there is copied to those above it."""
        numbers, failures = [], []
        for tier in reversed(self._deleting()):
            try:
                numbers.append(await act(tier))
            except StorageError as error:
                failures.append(error)
        if failures:
            raise failures[0]
        return max(numbers)

    async def aclose(self) -> None:
        """Close the tiers, all of them even if one fails."""
        acquired, self._acquired = self._acquired, ()
        await release(acquired)


def _shorter(ttl: float | None, own: float | None) -> float | None:
    return min((seconds for seconds in (ttl, own) if seconds is not None), default=None)
