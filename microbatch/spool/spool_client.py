"""The spool as the batcher sees it: requests handed over for later, and answers asked for by their id."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final

from microbatch.errors import ConfigError, DeadlineExceeded, IdConflict, RequestFailed
from microbatch.spool.payload import Answer
from microbatch.spool.records import Counts
from microbatch.storage.coalescer import Coalescer

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from microbatch.messages import Reply
    from microbatch.spool.records import Found, Item, Name, PutOutcome, Spool

FIRST_LOOK: Final = 0.02
RAREST_LOOK: Final = 1.0
"""Seconds between two looks for an answer: they grow from the one to the other, as an answer may take hours."""

MOST: Final = 500
"""Most requests put or looked for in one step, so that none holds up the others' for long."""

STALE: Final = 1.0
"""Seconds for which a count of the spool is shown before it is counted anew."""


class SpoolFront:
    """Hands requests to a spool and fetches answers from it.

    Requests of concurrent callers share one commit, and their look-ups one query.

    Args:
        spool: The spool.

    Attributes:
        spool: As given.
        counts: How many requests were where, when that was last counted.
    """

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.counts = Counts()
        self._counted_at: float | None = None
        self._puts: Coalescer[Item, PutOutcome] = Coalescer(self._put, max_items=MOST, max_trips=1)
        self._looks: Coalescer[Name, Found] = Coalescer(self._find, max_items=MOST)
        self._recounts: Coalescer[None, None] = Coalescer(self._recount)

    @property
    def services(self) -> tuple[Callable[[], Coroutine[Any, Any, None]], ...]:
        """What has to run as long as the spool is used."""
        return self._puts.serve, self._looks.serve, self._recounts.serve

    async def put(self, item: Item) -> None:
        """Queue *item*; it is durable when this returns.

        Raises:
            IdConflict: Another request has its name.
            StorageError: It may not be durable; putting it again does no harm.
        """
        if await self._puts.submit(item) == "conflict":
            raise IdConflict(f"the spool holds another request under the id {item.name.id!r}")

    async def _put(self, items: list[Item]) -> list[PutOutcome]:
        return await self.spool.put(items)

    async def result(self, name: Name, output_type: Any, timeout: float | None) -> Reply[Any]:
        """Return the answer to a request, once a worker has got it.

        Args:
            name: The request's name.
            output_type: What its text is decoded to.
            timeout: Seconds to wait beyond a first look; None waits for ever.

        Raises:
            ConfigError: The spool does not know the name, or the type cannot be used.
            DeadlineExceeded: There is no answer yet.
            MalformedAnswer: The answer does not fit the type.
            RequestFailed: The request is a dead letter, or the server has lost it.
            StorageError: The spool cannot be read.
        """
        found = await self._look(name)
        if found is None and timeout != 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    found = await self._wait_for(name)
        if found is None:
            raise DeadlineExceeded(f"no answer to the spooled request within the timeout of {timeout:g} s")
        if found.state == "lost":
            raise RequestFailed(
                "the spooled request is lost: the server has dropped it, or its answer, for want of room. Put it again"
            )
        if found.state == "dead" or found.result is None:
            raise RequestFailed(f"the spooled request was given up, a dead letter: {found.error}")
        return Answer.decode(found.result).reply(output_type)

    async def _look(self, name: Name) -> Found | None:
        """Return how the request ended; None if it has not."""
        found = await self._looks.submit(name)
        if found.state == "unknown":
            raise ConfigError(
                f"the spool knows no request with the id {name.id!r}: it was never queued, or its answer was dropped"
            )
        return found if found.state in ("done", "dead", "lost") else None

    async def _wait_for(self, name: Name) -> Found:
        pause = FIRST_LOOK
        while True:
            await asyncio.sleep(pause)
            found = await self._look(name)
            if found is not None:
                return found
            pause = min(2 * pause, RAREST_LOOK)

    async def _find(self, names: list[Name]) -> list[Found]:
        return await self.spool.find(names)

    # --- how much there is

    def look(self) -> Counts:
        """Return the latest counts, and see that they are counted anew if they are old."""
        now = asyncio.get_running_loop().time()
        if self._counted_at is None or now - self._counted_at >= STALE:
            self._counted_at = now
            self._recounts.submit_detached(None)
        return self.counts

    async def _recount(self, asked: list[None]) -> list[None]:
        self.counts = await self.spool.counts()
        return asked
