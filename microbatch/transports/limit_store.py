"""Contacts with the Redis server of a shared limit: one task for each limit in use."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import logging
import secrets
from importlib import resources
from typing import TYPE_CHECKING, Final, NamedTuple
from weakref import WeakSet, ref

from microbatch.errors import ConfigError, StorageError
from microbatch.storage.redis import RedisStore, is_about_reach, milliseconds
from microbatch.transports.permits import WINDOW
from microbatch.transports.shared_bucket import GAP, GRACE, LEASE, LICENCE, SharedBucket

if TYPE_CHECKING:
    from microbatch.transports.shared_bucket import Order

logger: Final = logging.getLogger("microbatch")

_TIMEOUT: Final = 1.0
"""Seconds for connecting, each write and each read. With the time between two tries it is less than `GRACE`."""

_CONNECTIONS: Final = 8
_TIMES: Final = tuple(map(milliseconds, (WINDOW, LEASE, GRACE, GAP, LICENCE)))
_KEYS: Final = ("state", "members", "log", "amounts")


class _Member(NamedTuple):
    """A bucket, as the server knows it.

    Attributes:
        limit: Beginning of the keys of its limit.
        identity: Distinguishes it from the other members of that limit.
    """

    limit: str
    identity: str


class LimitStore(RedisStore):
    """The limits that processes share by a Redis server.

    Raises:
        ConfigError: The package redis is missing, or the address is malformed.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url, prefix="microbatch:limit:", timeout=_TIMEOUT, max_connections=_CONNECTIONS)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: dict[SharedBucket, asyncio.Task[None]] = {}
        self._served: WeakSet[SharedBucket] = WeakSet()
        self._failing = self._closing = False

    async def open(self) -> None:
        """Ask the server what it is. One that cannot be reached delays requests, not the start.

        Raises:
            ConfigError: It answers, and cannot be used.
        """
        await super().open()
        self._loop = asyncio.get_running_loop()
        self._tasks, self._served, self._closing = {}, WeakSet(), False
        try:
            await self._check()
        except BaseException:
            await super().aclose()
            raise

    async def _check(self) -> None:
        try:
            await self.reach()
            await self._run_script("return 1", [f"{self._prefix}check"], [])
        except StorageError as error:
            if not is_about_reach(error):
                raise ConfigError(
                    f"the store of the rate limit cannot be used: {error}; write the address of a Redis server that takes scripts "
                    "and writes, with its password and database number: redis://:PASSWORD@host:6379/0"
                ) from error
            self._note(error)
            return
        if self._server is not None and self._server.replica and not self._server.cluster:
            raise ConfigError(
                "the store of the rate limit cannot be used: this Redis server is a replica, which takes no writes; "
                "give the address of the primary"
            )

    def serve(self, bucket: SharedBucket, name: str) -> None:
        """Keep *bucket* in contact with the limit called *name*, from its first use until `aclose`.

        Raises:
            ConfigError: The store is open in another event loop.
        """
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            raise ConfigError("a RateLimit with a store serves one event loop at a time: make one for each loop")
        if bucket in self._served:
            return
        self._served.add(bucket)
        # A member for each bucket and each opening: buckets number their reports, and a forked process has copies of them. What those
        # hold was granted to the process that was forked.
        bucket.leave()
        member = _Member(f"{self._prefix}{{{name}}}", secrets.token_hex(8))
        woken, reference = asyncio.Event(), ref(bucket)

        def wake() -> None:
            woken.set()
            bucket = reference()
            if bucket is not None and bucket not in self._tasks and not self._closing:
                # An empty context: not that of the caller that happens to be the first.
                keeping = self._keep(bucket, member, woken)
                task = loop.create_task(keeping, name="microbatch limit", context=contextvars.Context())
                self._tasks[bucket] = task

        bucket.wake = wake

    async def _keep(self, bucket: SharedBucket, member: _Member, woken: asyncio.Event) -> None:
        """Stay in contact until *bucket* is no longer used."""
        now = asyncio.get_running_loop().time
        used = True
        try:
            while used:
                while not (self._closing or bucket.is_over(now())):
                    woken.clear()
                    await self._contact(bucket, bucket.order(now()), member)
                    bucket.notify()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(bucket.pause(now())):
                            await woken.wait()
                await self._leave(bucket, member)
                used = not (self._closing or bucket.is_over(now()))  # a request may have come during the leave
        except Exception:
            logger.exception("contact with the store of the rate limit has ended because of a bug in microbatch")
        finally:
            self._tasks.pop(bucket, None)

    async def _contact(self, bucket: SharedBucket, order: Order, member: _Member) -> None:
        now = asyncio.get_running_loop().time
        keys = [f"{member.limit}:{key}" for key in _KEYS]
        try:
            answer = await self._run_script(_script(), keys, [*_TIMES, member.identity, *order.arguments])
        except StorageError as error:
            bucket.failed(order, str(error), now())
            self._note(error)
        except asyncio.CancelledError:
            bucket.failed(order, "closed", now())  # it may not have arrived
            raise
        else:
            bucket.answered(order, answer, now())
            self._failing = False

    def _note(self, error: StorageError) -> None:
        if not self._failing:  # once for each outage
            self._failing = True
            logger.warning(
                "the store of the rate limit cannot be used; until it can, requests wait or are sent at a reduced rate: %s",
                error,
            )

    async def aclose(self) -> None:
        """Give back what was drawn and not used, and close the connections."""
        # Each task ends its contact, and takes leave. Cancelling it would not be certain: a cancellation may get lost in the client.
        self._closing = True
        tasks = dict(self._tasks)
        for bucket in tasks:
            bucket.wake()
        try:
            if tasks:
                await asyncio.wait(tasks.values())
        finally:
            for bucket in self._served:
                bucket.wake = _nothing
            self._served.clear()
            await super().aclose()

    async def _leave(self, bucket: SharedBucket, member: _Member) -> None:
        if bucket.is_member:
            await self._contact(bucket, bucket.order(asyncio.get_running_loop().time(), leaving=True), member)
            bucket.leave()


def _nothing() -> None:
    pass


@functools.cache
def _script() -> str:
    return (resources.files(__package__) / "shared_limit.lua").read_text("utf-8")
