"""Deadline and circuit breaker around a cache."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from microbatch.caching.entry import checked_values
from microbatch.caching.key import SECRET_BYTES
from microbatch.errors import ConfigError, MicrobatchError, StorageError
from microbatch.transience import Backoff

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from types import TracebackType

    from microbatch.protocols import Cache

logger: Final = logging.getLogger("microbatch")

T = TypeVar("T")

LIVE_TIMEOUT: Final = 0.05  # seconds that a cache call may take while a caller waits for it
_CHECK_PATIENCE: Final = 2.0  # seconds for which the first contact is repeated by `Guard.open`
_RETRY_PAUSE: Final = 0.1

_FIRST_PAUSE: Final = 1.0  # seconds for which the cache is bypassed after a failure
_LONGEST_PAUSE: Final = 30.0

_STEPS: Final = 25
_ROUNDING: Final = 1e-9  # seconds

# For caches without a secret of their own. They do not outlive the process, and several batchers may share one.
_PROCESS_SECRET: Final = secrets.token_bytes(SECRET_BYTES)


class Deadline:
    """A time limit for an `async with` block, which ends with `TimeoutError` when it is reached.

    Delays of the event loop itself do not count: while the loop is busy elsewhere, an answer may have arrived without being seen. The
    time is therefore counted in 25 steps, and a step that ends late counts as one step. The object can be entered repeatedly.

    Args:
        seconds: The limit.
        of: The deadline of which this is a part: time used here is also used there.

    Attributes:
        left: Seconds left.
    """

    def __init__(self, seconds: float, *, of: Deadline | None = None) -> None:
        self.left = seconds
        self._step = seconds / _STEPS
        self._of = of
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timeout: asyncio.Timeout | None = None

    def part(self, parts: int) -> Deadline:
        """Return a deadline for one of *parts* equal parts of the time left."""
        return Deadline(self.left / parts, of=self)

    @property
    def expired(self) -> bool:
        """True if the last block was cancelled because the limit was reached."""
        return self._timeout is not None and self._timeout.expired()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._since = loop.time()
        self._timeout = await asyncio.timeout(None).__aenter__()
        self._tick(loop, self._timeout)
        return self

    def _tick(self, loop: asyncio.AbstractEventLoop, timeout: asyncio.Timeout) -> None:
        self._count(loop.time())
        if self.left > _ROUNDING:
            self._timer = loop.call_at(self._since + min(self._step, self.left), self._tick, loop, timeout)
        else:
            timeout.reschedule(self._since)

    def _count(self, now: float) -> None:
        used = min(now - self._since, self._step)
        self._since = now
        deadline: Deadline | None = self
        while deadline is not None:
            deadline.left = max(0.0, deadline.left - used)
            deadline = deadline._of  # noqa: SLF001 of its own class

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._count(asyncio.get_running_loop().time())
        if self._timeout is not None:
            await self._timeout.__aexit__(kind, error, traceback)


class Guard:
    """A cache whose calls never fail and never take long, around one whose calls may.

    A call fails if it raises, returns something else than the `Cache` protocol says, or misses its deadline. Then the cache is
    bypassed for 1 s, after each further failure for twice as long, up to 30 s; after the pause one call probes it. Look-ups, stores
    and requests for the secret have a breaker each: a full server or a slow disk still has its answers.

    A guard is itself a `Cache` and may be shared by several batchers. Where no deadline is given, the limit is `LIVE_TIMEOUT`.

    Args:
        cache: The cache. If it has a true attribute `keeps_deadline`, its methods take a `Deadline` as `deadline` and enforce it.
        patience: For bulk work, where each miss has to be paid for: seconds for which a failing call is repeated, whatever its
            deadline. When that fails too, stores, or after any other call the whole cache, are given up for good.

    Attributes:
        failure: Why the cache, or storing, was given up; None as long as it was not.
    """

    def __init__(self, cache: Cache, *, patience: float | None = None) -> None:
        self.cache = cache
        self.ttl: float | None = getattr(cache, "ttl", None)
        self.failure: StorageError | None = None
        self._patience = patience
        self._name = type(cache).__name__
        self._keeps_deadline = bool(getattr(cache, "keeps_deadline", False))
        self._missed = 0
        pauses = (_FIRST_PAUSE, _LONGEST_PAUSE) if patience is None else (float("inf"), float("inf"))
        self._look_ups, self._stores, self._secrets = (BreakerState(Backoff(*pauses)) for _ in range(3))

    def __repr__(self) -> str:
        return f"<Guard of {self._name}: {'bypassed' if self._bypasses else 'in use'}>"

    @property
    def bypassed(self) -> int:
        """Number of keys for which the cache, or a tier of it, was not asked, failed or took too long."""
        return self._missed + self._count("bypassed")

    @property
    def evictions(self) -> int:
        """Number of entries that the cache dropped for lack of space."""
        return self._count("evictions")

    def _count(self, name: str) -> int:
        with contextlib.suppress(Exception):  # an attribute of foreign code
            return int(getattr(self.cache, name, 0))
        return 0

    async def open(self) -> None:
        """Open the cache; if it cannot be used, close it and raise `ConfigError`."""
        opening: Callable[[], Awaitable[None]] | None = getattr(self.cache, "open", None)
        if opening is not None:
            await opening()
        try:
            await self._call(self._read_secret, Deadline(_CHECK_PATIENCE))
        except BaseException as error:
            await self.cache.aclose()
            if isinstance(error, StorageError):
                raise ConfigError(f"the cache cannot be used: {error}") from error
            raise

    async def aclose(self) -> None:
        """Close the cache."""
        await self.cache.aclose()

    async def get_many(self, keys: Sequence[bytes], *, deadline: Deadline | None = None) -> list[bytes | None]:
        """Return the value of each key; None where there is none, and for all keys if the cache is bypassed or fails."""
        if not keys:
            return []

        async def look_up(options: dict[str, Any]) -> list[bytes | None]:
            return checked_values(await self.cache.get_many(keys, **options), len(keys))

        found = await self._guarded(look_up, self._look_ups, deadline)
        if found is None:
            self._missed += len(keys)
            return [None] * len(keys)
        return found

    async def store(
        self, entries: Sequence[tuple[bytes, bytes, float | None]], *, deadline: Deadline | None = None
    ) -> bool:
        """Store *entries* (key, value, seconds to live) and return whether that succeeded."""
        if not entries:
            return True

        async def store(options: dict[str, Any]) -> bool:
            await self.cache.set_many(entries, **options)
            return True

        return await self._guarded(store, self._stores, deadline) is True

    async def set_many(self, entries: Sequence[tuple[bytes, bytes, float | None]]) -> None:
        """Store *entries*, if possible; see `store`."""
        await self.store(entries)

    async def secret(self, *, deadline: Deadline | None = None) -> bytes | None:
        """Return the 32 bytes that key the digests; None if they are not available now."""
        return await self._guarded(self._read_secret, self._secrets, deadline)

    async def _read_secret(self, _options: dict[str, Any]) -> bytes | None:
        return await secret_of(self.cache)

    async def _guarded(
        self, call: Callable[[dict[str, Any]], Awaitable[T]], breaker: BreakerState, deadline: Deadline | None
    ) -> T | None:
        """Return the result of *call*; None if it is not made or fails."""
        era = breaker.admit(asyncio.get_running_loop().time())
        if era is None:
            return None
        if self._patience is not None:
            deadline = Deadline(self._patience)
        try:
            result = await self._call(call, deadline or Deadline(LIVE_TIMEOUT))
        except StorageError as error:
            self._record_failure(breaker, era, error)
            return None
        if breaker.pause:
            breaker.record_success(era)
            if not self._bypasses:
                logger.info("the cache %s is in use again", self._name)
        return result

    async def _call(self, call: Callable[[dict[str, Any]], Awaitable[T]], deadline: Deadline) -> T:
        """Return the result of *call*, repeated if the guard has patience; raise `StorageError` if it fails in any way."""
        failure: StorageError | None = None
        options = {"deadline": deadline} if self._keeps_deadline else {}
        while True:
            try:
                async with contextlib.nullcontext() if self._keeps_deadline else deadline:
                    return await call(options)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                failure = StorageError("it was cancelled from within")
            except (KeyboardInterrupt, SystemExit, GeneratorExit):
                raise
            except BaseException as error:  # noqa: BLE001 foreign code; a Rust panic is a BaseException
                if not deadline.expired:
                    failure = StorageError(_loggable(error))
                elif failure is None:  # else the earlier reason says more
                    failure = StorageError("it took too long")
            if self._patience is None or deadline.left <= _RETRY_PAUSE:
                raise failure
            with contextlib.suppress(TimeoutError):
                async with deadline:
                    await asyncio.sleep(_RETRY_PAUSE)

    @property
    def _bypasses(self) -> bool:
        return bool(self._look_ups.pause or self._stores.pause or self._secrets.pause)

    def _record_failure(self, breaker: BreakerState, era: int, error: StorageError) -> None:
        before, now = self._bypasses, asyncio.get_running_loop().time()
        breaker.record_failure(era, now)
        if self._patience is not None:
            self.failure = error
            if breaker is not self._stores:
                for each in (self._look_ups, self._stores, self._secrets):
                    each.trip(now)
        if self._bypasses and not before:
            logger.warning("the cache %s has failed and is bypassed for now: %s", self._name, error)


async def secret_of(cache: Any) -> bytes | None:
    """Return the 32 bytes that key the digests of *cache*; None if they are not available now."""
    read: Callable[[], Awaitable[bytes | None]] | None = getattr(cache, "secret", None)
    if read is None:
        return _PROCESS_SECRET
    secret = await read()
    if secret is not None and not (isinstance(secret, bytes) and len(secret) == SECRET_BYTES):
        raise StorageError(f"its secret is not {SECRET_BYTES} bytes")
    return secret


class BreakerState:
    """Decides by the outcome of earlier calls whether a call is made.

    Calls belong to eras: the outcome of a call says nothing about a later era, so of many calls that fail together one counts.
    """

    def __init__(self, backoff: Backoff) -> None:
        self._backoff = backoff
        self._until = 0.0
        self._era = 0

    @property
    def pause(self) -> float:
        """Seconds of the present pause; 0 if the last call succeeded."""
        return self._backoff.limit

    def admit(self, now: float) -> int | None:
        """Return the era of a call that may be made now; None if none may be made."""
        if self.pause:
            if now < self._until:
                return None
            # Counted from here and not from the outcome: only one call probes, even if it never ends.
            self._until = now + self.pause
            self._era += 1
        return self._era

    def record_failure(self, era: int, now: float) -> None:
        """Begin a pause, unless the call belongs to an earlier era."""
        if era == self._era:
            self.trip(now)

    def trip(self, now: float) -> None:
        """Begin a pause."""
        self._until = now + self._backoff.next()
        self._era += 1

    def record_success(self, era: int) -> None:
        """End the pause, unless the call belongs to an earlier era."""
        if era == self._era:
            self._backoff.reset()


def _loggable(error: BaseException) -> str:
    # Foreign messages may contain keys, addresses and answers.
    return str(error) if isinstance(error, MicrobatchError) else type(error).__name__
