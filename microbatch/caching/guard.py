"""Keeps a cache from harming anyone: it may take little time, and is left alone for a while when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from typing import TYPE_CHECKING, Any, Final, TypeVar

from microbatch.caching.patience import Patience
from microbatch.caching.terms import SECRET_BYTES
from microbatch.errors import MicrobatchError, StorageError
from microbatch.transience import Backoff

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from microbatch.protocols import Cache

logger = logging.getLogger("microbatch")

T = TypeVar("T")

BUDGET: Final = 0.05
"""Seconds that one call of a cache may take while somebody waits for it."""

_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 30.0

# Of caches that have none of their own: what they hold does not outlive the process, and batchers of one process may share them.
_SECRET: Final = secrets.token_bytes(SECRET_BYTES)


class Guard:
    """A cache that never raises and never takes long, around one that may.

    A cache that raises, answers with anything but what the protocol says, or has not answered within its time, is left alone: for a
    second at first, twice as long each time it fails again, up to half a minute. Then one call tries whether it is well, and the others
    do without until that one has succeeded. All of an outage is told in one warning, and its end in one line more.

    Look-ups, stores and asking for the secret are judged apart. A server that is full, or a disk that is slow, still has the answers
    that are there; if its stores spoke for all, each look-up that succeeds would end an outage and the next store begin another.

    Args:
        cache: What to guard. It may have `keeps_time`: true if it sees to it itself that no call takes longer than `BUDGET`, or
            than the `Patience` that its methods are given as `patience`.

    Attributes:
        cache: As given.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self._name = type(cache).__name__
        self._keeps_time = bool(getattr(cache, "keeps_time", False))
        self._missed = 0
        self._look_ups = _BreakerState()
        self._stores = _BreakerState()
        self._secrets = _BreakerState()

    def __repr__(self) -> str:
        """Tell whether the cache is in use."""
        return f"<Guard of {self._name}: {'left alone' if self._distrusted else 'in use'}>"

    @property
    def bypassed(self) -> int:
        """Look-ups, counted by key, for which the cache was not asked, failed, or took too long; those of its own tiers included."""
        return self._missed + self._count("bypassed")

    @property
    def evictions(self) -> int:
        """Entries that the cache says it dropped for want of room."""
        return self._count("evictions")

    def _count(self, name: str) -> int:
        with contextlib.suppress(Exception):  # the cache may be anybody's
            return int(getattr(self.cache, name, 0))
        return 0

    async def get_many(self, keys: Sequence[bytes], *, patience: Patience | None = None) -> list[bytes | None]:
        """Return the value of each key, None where there is none, and None for all when the cache cannot be asked.

        Args:
            keys: What to look up.
            patience: The time for it; None gives the cache `BUDGET`.
        """
        if not keys:
            return []

        async def look_up() -> list[bytes | None]:
            return _checked(await self.cache.get_many(keys, **self._given(patience)), len(keys))

        found = await self._ask(look_up, self._look_ups, patience)
        if found is None:
            self._missed += len(keys)
            return [None] * len(keys)
        return found

    async def set_many(
        self, entries: Sequence[tuple[bytes, bytes, float | None]], *, patience: Patience | None = None
    ) -> bool:
        """Keep *entries*, if the cache can; return whether it did.

        Args:
            entries: Key, value and seconds to live, as in `Cache.set_many`.
            patience: The time for it; None gives the cache `BUDGET`.
        """
        if not entries:
            return True

        async def store() -> bool:
            await self.cache.set_many(entries, **self._given(patience))
            return True

        return await self._ask(store, self._stores, patience) is True

    async def secret(self, *, patience: Patience | None = None) -> bytes | None:
        """Return the 32 bytes that key the digests; None if they cannot be had now.

        Args:
            patience: The time for it; None gives the cache `BUDGET`.
        """
        ask: Callable[[], Awaitable[Any]] | None = getattr(self.cache, "secret", None)
        if ask is None:
            return _SECRET

        async def checked() -> bytes | None:
            secret = await ask()
            if secret is not None and not (isinstance(secret, bytes) and len(secret) == SECRET_BYTES):
                raise StorageError(f"its secret is not {SECRET_BYTES} bytes")
            return secret

        return await self._ask(checked, self._secrets, patience)

    async def _ask(self, call: Callable[[], Awaitable[T]], trust: _BreakerState, patience: Patience | None) -> T | None:
        """Return what *call* brings; None if it is not made, fails or is late."""
        now = asyncio.get_running_loop().time()
        era = trust.let_through(now)
        if era is None:
            return None
        limit = Patience(BUDGET) if patience is None else patience
        try:
            async with contextlib.nullcontext() if self._keeps_time else limit:
                result = await call()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            self._failed(trust, era, "it was cancelled from within")  # and not by who waits for it
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 the cache may be anybody's; panics of Rust derive from BaseException
            self._failed(trust, era, "it took too long" if limit.expired else _told(error))
        else:
            self._succeeded(trust, era)
            return result
        return None

    def _given(self, patience: Patience | None) -> dict[str, Any]:
        return {"patience": patience} if self._keeps_time and patience is not None else {}

    @property
    def _distrusted(self) -> bool:
        return bool(self._look_ups.pause or self._stores.pause or self._secrets.pause)

    def _failed(self, trust: _BreakerState, era: int, reason: str) -> None:
        before = self._distrusted
        trust.lose(era, asyncio.get_running_loop().time())
        if self._distrusted and not before:
            logger.warning("%s is left alone for a while, and callers do without: %s", self._name, reason)

    def _succeeded(self, trust: _BreakerState, era: int) -> None:
        if trust.pause:
            trust.regain(era)
            if not self._distrusted:
                logger.info("%s is in use again", self._name)


class _BreakerState:
    """Whether something is asked, by how it has answered."""

    def __init__(self) -> None:
        self._backoff = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)
        self._until = 0.0
        self._era = 0  # how a call ends tells nothing of a later era

    @property
    def pause(self) -> float:
        """Seconds for which it is left alone each time it fails; 0 as long as it does not."""
        return self._backoff.limit

    def let_through(self, now: float) -> int | None:
        """Return the era of a call that may be made, None if it may not."""
        if self.pause:
            if now < self._until:
                return None
            # Counted from here and not from the outcome: so only one call tries, even if it never comes back.
            self._until = now + self.pause
            self._era += 1
        return self._era

    def lose(self, era: int, now: float) -> None:
        """A call of *era* has failed; of many that were under way together the first one counts."""
        if era == self._era:
            self._until = now + self._backoff.next()
            self._era += 1

    def regain(self, era: int) -> None:
        """A call of *era* has succeeded."""
        if era == self._era:
            self._backoff.reset()


def _checked(found: Sequence[Any], count: int) -> list[bytes | None]:
    """Return *found* as a list.

    Raises:
        StorageError: It is not *count* values, each bytes or None.
    """
    values = list(found)
    if len(values) != count or not all(value is None or isinstance(value, bytes) for value in values):
        raise StorageError(f"it did not answer with {count} values, each bytes or None")
    return values


def _told(error: BaseException) -> str:
    """Return what may be logged of *error*: the words of others may hold keys, addresses and answers."""
    return str(error) if isinstance(error, MicrobatchError) else type(error).__name__
