"""A call under way: who waits for it, and what a combined one is made of."""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import anyio

from microbatch.prompt.canary import check_canary
from microbatch.prompt.demultiplexer import Demultiplexer

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable

    from microbatch.batching.lane_history import LaneHistory
    from microbatch.batching.permits import Permit
    from microbatch.batching.ticket import Ticket
    from microbatch.messages import Route, Usage
    from microbatch.prompt.demultiplexer import Answer
    from microbatch.protocols import ChatCall

USAGE_PATIENCE = 2.0
"""Seconds that the rest of a reply is read for its usage once every caller has been answered."""

# For `map`, which takes no step of Python's own for each request of a batch.
_line_of = attrgetter("line")
_decoder_of = attrgetter("first.answer.decode")


class CallState:
    """A call under way, how many callers still wait for it, and what their replies say of it.

    Attributes:
        waiting: Callers that have neither been answered nor left.
        size: Requests it carries.
        found: Answers found in its reply so far.
        route: What their replies name as their route.
        sent: Loop time at which it was sent.
        attempts: HTTP attempts so far.
        first_text: Loop time at which the first text came, or None.
        permit: What pays its attempts; None once it is over, because replies keep this and are not to keep the batcher.
        price: What prices its usage, or None if that is unknown.
        ended: Whether it is over and its cost divided.
        task: The task that sends it, while it does.
        stopped: Whether the sending was cancelled because nobody waits any more.
    """

    __slots__ = (
        "_ended",
        "_patience",
        "attempts",
        "ended",
        "first_text",
        "found",
        "permit",
        "price",
        "route",
        "sent",
        "size",
        "stopped",
        "task",
        "waiting",
    )

    def __init__(
        self, size: int, route: Route, sent: float, price: Callable[[Usage], float] | None, permit: Permit
    ) -> None:
        self.waiting = self.size = size
        self.found = 0
        self.route: Route = route
        self.sent = sent
        self.attempts = 0
        self.first_text: float | None = None
        self.permit: Permit | None = permit
        self.price = price
        self.task: asyncio.Task[Any] | None = None
        self.stopped = False
        self.ended = False
        self._ended: anyio.Event | None = None
        self._patience: asyncio.TimerHandle | None = None

    def carry(self, tickets: Iterable[Ticket]) -> None:
        """*tickets* travel in this call from now on."""
        for ticket in tickets:
            if ticket.call is not None:
                ticket.remember().attempts += ticket.call.attempts
            ticket.call = self

    def linger(self) -> None:
        """Everyone has been answered: only the usage is still of interest, for a while."""
        if self.task is not None and self._patience is None:
            self._patience = self.task.get_loop().call_later(USAGE_PATIENCE, self.stop)

    def abandoned(self) -> None:
        """One caller left without an answer; the last one takes the call with it, unless all of the reply but its end is there."""
        self.waiting -= 1
        if self.waiting <= 0 and self.found >= self.size:
            self.linger()
        elif self.waiting <= 0 and self.task is not None:
            self.task.get_loop().call_soon(self.stop)

    def stop(self) -> None:
        """Send no more. Called by the loop only, never from within the task: so the task ends where it waits, in `send`."""
        if self.task is not None and not self.stopped:
            self.stopped = True
            self.task.cancel()

    def end(self) -> None:
        """Note that the call is over and its cost divided."""
        self.ended = True
        self.permit = None
        if self._patience is not None:
            self._patience.cancel()
        if self._ended is not None:
            self._ended.set()

    async def wait(self) -> None:
        """Wait until the call is over and its cost divided."""
        if not self.ended:
            if self._ended is None:
                self._ended = anyio.Event()
            await self._ended.wait()


class Batch:
    """A combined call, composed and ready to go.

    Attributes:
        tickets: The requests it carries.
        ids: Their ids, in the same order.
        canary: The word that the last item, which is nobody's request, has to be answered with; None if there is none.
        call: What is sent.
        history: What is known of the lane.
        permit: What pays the call.
        call_state: The call under way.
        line_bytes: The length of each request's line.
        demultiplexer: What takes its reply apart.
        answers: What it has found and nobody has been handed yet: pairs of position and decoded answer.
        answer_bytes: The length of each answer so far.
        bug: What went wrong with handing them out.
        heard: Whether any text has come.
        repeated: Whether it was sent again as it is, after a cut that left nothing.
        bound: The bound it was composed with; that of the call may be lowered since. None if it has none.
        tries: Whether that is larger than any bound which the model is known to accept.
        instead: Whether it is made instead of a call whose bound was too low.
    """

    __slots__ = (
        "_asked",
        "_early",
        "answer_bytes",
        "answers",
        "bound",
        "bug",
        "call",
        "call_state",
        "canary",
        "demultiplexer",
        "heard",
        "history",
        "ids",
        "instead",
        "line_bytes",
        "permit",
        "repeated",
        "tickets",
        "tries",
    )

    def __init__(
        self,
        tickets: list[Ticket],
        ids: list[str],
        call: ChatCall,
        history: LaneHistory,
        permit: Permit,
        call_state: CallState,
        *,
        early: bool,
        canary: str | None = None,
        tries: bool = False,
    ) -> None:
        self.bound = call.bound
        self.tries = tries
        self.instead = False
        self.tickets = tickets
        self.ids = ids[: len(tickets)]
        self.canary = canary
        self.call = call
        self.history = history
        self.permit = permit
        self.call_state = call_state
        self._asked = ids
        self._early = early
        self.line_bytes = [*map(len, map(_line_of, tickets))]
        self.bug: BaseException | None = None
        self.repeated = False
        self.reset()

    @property
    def past_the_end(self) -> bool:
        """True if the reply goes on although nothing more is expected of it."""
        return self.demultiplexer.past_the_end

    def reset(self) -> None:
        """Start on a new reply: nothing of the one before was used."""
        decoders: list[Callable[[str], Any]] = [*map(_decoder_of, self.tickets)]
        if self.canary is not None:
            decoders.append(partial(check_canary, self.canary))
        self.demultiplexer = Demultiplexer(self._asked, decoders, early=self._early)
        self.answers: list[Answer] = []
        self.call_state.found = 0
        self.answer_bytes = [0] * len(self.tickets)
        self.heard = False
