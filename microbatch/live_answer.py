"""An answer that its caller hands on while it arrives."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from microbatch.batching.ticket import NO_CONTEXT

if TYPE_CHECKING:
    from microbatch.batching.single_flight import Settlement
    from microbatch.batching.ticket import Ticket, Waiter
    from microbatch.messages import Reply


class LiveAnswer:
    """The answer to one request, of a caller that hands it on whatever it is; see `Microbatcher.open_answer`.

    Args:
        streamed: Whether the events of a call that carries only this request are to be read as they arrive.

    Attributes:
        alone: Whether a call that carries only this request has been accepted, and its events are to be read.
        begun: Whether events were taken; their call is not repeated.
    """

    def __init__(self, *, streamed: bool) -> None:
        self.streamed: bool = streamed
        self.alone: bool = False
        self.begun: bool = False
        self._events: list[bytes] = []
        self._changed = asyncio.Event()
        self._ticket: Ticket | None = None
        self._waiter: Waiter | None = None
        self._future: asyncio.Future[Reply[Any]] = asyncio.get_running_loop().create_future()

    def accepted(self, ticket: Ticket, waiter: Waiter) -> None:
        """Note that *waiter* will get the answer to *ticket*."""
        self._ticket, self._waiter, self._future = ticket, waiter, waiter.future
        waiter.future.add_done_callback(lambda _: self._changed.set(), context=NO_CONTEXT)

    def found(self, reply: Reply[Any]) -> None:
        """Note that the answer was known already."""
        self._future.set_result(reply)

    def take(self, data: bytes) -> None:
        """Take the data of an event of the call; an empty one says that the endpoint has accepted the call."""
        self.alone = True
        if data:
            self.begun = True
            self._events.append(data)
        self._changed.set()

    @property
    def done(self) -> bool:
        """True if `reply` returns or raises, and all events have been read."""
        return self._future.done() and not self._events

    @property
    def combined(self) -> bool:
        """True if the request is part of a combined call, or waits where it is likely to become one."""
        ticket = self._ticket
        if ticket is None:
            return False
        if ticket.queue is not None:
            return ticket.queue.has_company
        return ticket.call is not None and ticket.call.size > 1

    async def events(self, timeout: float) -> list[bytes]:
        """Return the data of the events since the last time, after at most *timeout* seconds; none then, and at the end."""
        if not self._events and not self._future.done():
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._changed.wait()
        events, self._events = self._events, []
        return events

    async def reply(self) -> Reply[Any]:
        """Return the reply when it is there; raise what `Microbatcher.submit` does."""
        reply = await self._future
        self._waiter = None
        return reply

    def close(self, settlement: Settlement) -> None:
        """Note that the caller is gone; a request whose reply it has not had is given up."""
        if self._ticket is not None and self._waiter is not None:
            self._future.cancel()
            settlement.leave(self._ticket, self._waiter)
        self._ticket = self._waiter = None  # the ticket refers to this object
        self._events, self.streamed = [], False
