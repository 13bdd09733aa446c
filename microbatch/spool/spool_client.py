"""The spool as the batcher uses it: puts requests, and fetches their answers by name."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final

from microbatch.errors import ConfigError, DeadlineExceeded, IdConflict, RequestFailed
from microbatch.spool.payload import Answer
from microbatch.spool.records import Counts
from microbatch.storage.coalescer import Coalescer
from microbatch.transience import Backoff

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from microbatch.messages import Reply
    from microbatch.spool.records import Found, Item, Name, PutOutcome, Spool

FIRST_LOOK: Final = 0.02
RAREST_LOOK: Final = 1.0
"""Seconds between two look-ups of an awaited answer, doubling from the one to the other: an answer may take hours."""

MOST: Final = 500  # most requests put or looked up in one step, to keep steps short
STALE: Final = 1.0  # seconds after which the counts are read again


class SpoolClient:
    """Puts requests into a spool and fetches answers from it.

    Requests of concurrent callers share one commit, and their look-ups one query.
    """

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._counts = Counts()  # as last read
        self._counted_at = float("-inf")  # loop time
        self._puts: Coalescer[Item, PutOutcome] = Coalescer(spool.put, max_items=MOST, max_trips=1)
        self._looks: Coalescer[Name, Found] = Coalescer(spool.find, max_items=MOST)
        self._recounts: Coalescer[None, None] = Coalescer(self._recount)

    @property
    def services(self) -> tuple[Callable[[], Coroutine[Any, Any, None]], ...]:
        """Functions that have to run while the spool is used."""
        return self._puts.serve, self._looks.serve, self._recounts.serve

    async def put(self, item: Item) -> None:
        """Queue *item*; it is durable when this returns.

        Raises:
            IdConflict: Another request has its name.
            StorageError: It may not be durable; putting it again does no harm.
        """
        if await self._puts.submit(item) == "conflict":
            raise IdConflict(f"the spool holds another request under the id {item.name.id!r}")

    async def result(self, name: Name, output_type: Any, timeout: float | None) -> Reply[Any]:
        """Return the answer to a request, waiting for it at most *timeout* seconds after the first look-up; None for no limit.

        The errors are those of `Microbatcher.result`.
        """
        found, looks = await self._look(name), Backoff(FIRST_LOOK, RAREST_LOOK)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while found is None:
                    await asyncio.sleep(looks.next())
                    found = await self._look(name)
        if found is None:
            raise DeadlineExceeded(f"no answer to the spooled request within the timeout of {timeout:g} s")
        if found.state == "lost":
            raise RequestFailed(
                "the spooled request is lost: the server has dropped it, or its answer, for lack of memory. Put it again"
            )
        if found.state == "dead" or found.result is None:
            raise RequestFailed(f"the spooled request is a dead letter: {found.error}")
        return Answer.decode(found.result).reply(output_type)

    async def _look(self, name: Name) -> Found | None:
        """Return the state of a request that has ended; None if it has not."""
        found = await self._looks.submit(name)
        if found.state == "unknown":
            raise ConfigError(
                f"the spool knows no request with the id {name.id!r}: it was never queued, or its answer was dropped"
            )
        return found if found.state in ("done", "dead", "lost") else None

    def look(self) -> Counts:
        """Return the latest counts, and have them read again if they are older than `STALE`."""
        now = asyncio.get_running_loop().time()
        if now - self._counted_at >= STALE:
            self._counted_at = now
            self._recounts.submit_detached(None)
        return self._counts

    async def _recount(self, requests: list[None]) -> list[None]:
        self._counts = await self._spool.counts()
        return requests
