"""Several caches as one: what is near and fast in front of what is shared and lasts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from microbatch.caching.guard import BUDGET, Guard
from microbatch.caching.patience import Patience
from microbatch.errors import ConfigError
from microbatch.resources import give_back, lease

if TYPE_CHECKING:
    from collections.abc import Sequence

    from microbatch.protocols import Cache


class TieredCache:
    """Asks the fastest cache first, and the next ones for what it has not.

    What a lower tier had is put into those above it, where it may stay for a `ttl` of theirs; values have to tell themselves when
    they expire, as those of the batcher do. Each tier is guarded on its own, so one that is down costs its own answers and
    not those of the others. A call takes as long as one cache may: each tier gets an equal share of what is left of that time.

    Args:
        tiers: Caches, the fastest first. A tier above the last keeps nothing for longer than its own `ttl`.

    Attributes:
        ttl: Of the last tier.
        keeps_time: For `Guard`: the tiers are guarded already.

    Raises:
        ConfigError: There is no tier.
    """

    keeps_time = True

    def __init__(self, *tiers: Cache) -> None:
        if not tiers:
            raise ConfigError("a TieredCache needs at least one tier")
        self.tiers = tiers
        self.ttl: float | None = getattr(tiers[-1], "ttl", None)
        self._guards = [Guard(tier) for tier in tiers]
        self._leased: tuple[Cache, ...] = ()

    def __repr__(self) -> str:
        """Tell the tiers and which are in use."""
        return f"<TieredCache: {self._guards}>"

    @property
    def bypassed(self) -> int:
        """Look-ups for which a tier was not asked, failed, or took too long, summed over the tiers."""
        return sum(guard.bypassed for guard in self._guards)

    @property
    def evictions(self) -> int:
        """Entries dropped for want of room, summed over the tiers."""
        return sum(guard.evictions for guard in self._guards)

    async def open(self) -> None:
        """Open the tiers.

        Raises:
            ConfigError: One cannot be opened; none is open then.
        """
        await lease(self.tiers)
        self._leased = self.tiers

    async def secret(self) -> bytes | None:
        """Return the 32 bytes that key the digests, from the last tier that has any; None if they cannot be had now."""
        holders = [guard for guard in self._guards if hasattr(guard.cache, "secret")]
        return await (holders or self._guards)[-1].secret()

    async def get_many(self, keys: Sequence[bytes], *, patience: Patience | None = None) -> list[bytes | None]:
        """Return the value of each key, None where there is none that can be had now.

        Args:
            keys: What to look up.
            patience: The time for all tiers together; None is `BUDGET`.
        """
        patience = Patience(BUDGET) if patience is None else patience
        found: dict[bytes, bytes] = {}
        gains: list[dict[bytes, bytes]] = []
        for position, guard in enumerate(self._guards):
            missing = [key for key in keys if key not in found]
            values = await guard.get_many(missing, patience=self._turn(position, patience))
            gains.append({key: value for key, value in zip(missing, values, strict=True) if value is not None})
            found.update(gains[-1])
        await self._fill(gains, patience)
        return [found.get(key) for key in keys]

    async def _fill(self, gains: list[dict[bytes, bytes]], patience: Patience) -> None:
        """Put what each tier had into those above it, as far as there is time."""
        below: dict[bytes, bytes] = {}
        for position in reversed(range(len(gains) - 1)):
            below |= gains[position + 1]
            if below and patience.left:
                ttl: float | None = getattr(self.tiers[position], "ttl", None)
                entries = [(key, value, ttl) for key, value in below.items()]
                await self._guards[position].set_many(entries, patience=patience.part(1))

    async def set_many(
        self, entries: Sequence[tuple[bytes, bytes, float | None]], *, patience: Patience | None = None
    ) -> None:
        """Keep *entries* in all tiers: key, value, and seconds to live, None for as long as there is room.

        Args:
            entries: What to keep.
            patience: The time for all tiers together; None is `BUDGET`.
        """
        patience = Patience(BUDGET) if patience is None else patience
        for position, guard in enumerate(self._guards):
            own: float | None = None if position == len(self._guards) - 1 else getattr(guard.cache, "ttl", None)
            await guard.set_many(
                [(key, value, _shorter(ttl, own)) for key, value, ttl in entries],
                patience=self._turn(position, patience),
            )

    def _turn(self, position: int, patience: Patience) -> Patience:
        """Return the time of the tier at *position*, if those after it are to be heard as well."""
        return patience.part(len(self._guards) - position)

    async def aclose(self) -> None:
        """Close the tiers, all of them even if one fails."""
        leased, self._leased = self._leased, ()
        await give_back(leased)


def _shorter(ttl: float | None, own: float | None) -> float | None:
    return min((seconds for seconds in (ttl, own) if seconds is not None), default=None)
