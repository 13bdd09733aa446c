"""A call under way: how many callers wait for it, what a combined one is made of, and the scope that ends it early."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from microbatch.errors import ConfigError, RequestFailed, TransportError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from microbatch.audit.lane_kind import LaneKind, StepRecord
    from microbatch.batching.lane_history import LaneHistory
    from microbatch.batching.latency import ReplyClock
    from microbatch.batching.ticket import Deadline, Ticket
    from microbatch.messages import Route, T, Usage
    from microbatch.prompt.codec import ChatCodec, CombinedCall
    from microbatch.prompt.demultiplexer import Answer
    from microbatch.prompt.outcome import CombinedReply
    from microbatch.protocols import ChatCall
    from microbatch.transports.accounts import Permit

USAGE_PATIENCE = 2.0
"""Seconds for which the rest of a reply is read, for its usage, once every caller has been answered."""


class CallState:
    """A call under way.

    Attributes:
        waiting: Callers that have neither been answered nor left.
        size: Requests it carries.
        found: Answers found in its reply so far.
        sent: Loop time at which it was sent.
        first_text: Loop time at which the first text came.
        until: Loop time at which its attempts end, because none of its callers waits longer; None if one sets no limit.
        permit: Pays its attempts; None once it is over, because replies refer to this object and must not keep the batcher alive.
        only_reasoning: Whether its reply, a single one, was the model's reasoning and nothing else.
        unenforced: Whether nothing in its reply, a single one, fits the schema.
        ended: Whether it is over and its cost attributed.
        model: The model that was asked; None if none is named.
        price: Prices a usage of the model that was asked, and once an attempt has ended of the one that answered; None if unknown.
        usage: What the endpoint has reported of all its attempts; None before the first report.
        cost_usd: The price of that in US dollars; None if a price is unknown.
        unbatched_cost_usd: The price of what its answered requests would have used one by one; None if it is unknown.
    """

    __slots__ = (
        "_cancelled",
        "_ended",
        "_task",
        "_timer",
        "attempts",
        "cost_usd",
        "ended",
        "first_text",
        "found",
        "model",
        "only_reasoning",
        "permit",
        "price",
        "route",
        "sent",
        "size",
        "unbatched_cost_usd",
        "unenforced",
        "until",
        "usage",
        "waiting",
    )

    def __init__(
        self,
        size: int,
        route: Route,
        sent: float,
        price: Callable[[Usage], float] | None,
        permit: Permit,
        model: str | None = None,
    ) -> None:
        self.waiting: int = size
        self.size: int = size
        self.found: int = 0
        self.route: Route = route
        self.sent: float = sent
        self.attempts: int = 0
        self.first_text: float | None = None
        self.until: float | None = None
        self.permit: Permit | None = permit
        self.model: str | None = model
        self.price: Callable[[Usage], float] | None = price
        self.only_reasoning: bool = False
        self.unenforced: bool = False
        self.ended: bool = False
        self.usage: Usage | None = None
        self.cost_usd: float | None = None
        self.unbatched_cost_usd: float | None = None
        self._ended: anyio.Event | None = None
        self._task: asyncio.Task[Any] | None = None  # while it is sent
        self._timer: asyncio.Handle | None = None
        self._cancelled = False

    def ends_before(self, deadline: Deadline | None) -> bool:
        """Return whether it may end for lack of time while a caller with *deadline*, None for none, goes on waiting."""
        return not self.ended and self.until is not None and (deadline is None or deadline.at > self.until)

    async def while_awaited(
        self, step: Callable[[], Coroutine[Any, Any, T]]
    ) -> tuple[T | None, RequestFailed | ConfigError | None]:
        """Await *step* as long as any caller waits; return its result or its error, neither if all callers have left.

        The task is cancelled to end it early, as `asyncio.timeout` does, which would take three times as long with every call.
        """
        task = asyncio.current_task()
        if self.waiting <= 0 or task is None:
            return None, None
        self._task, cancelling = task, task.cancelling()
        try:
            return await step(), None
        except (RequestFailed, ConfigError) as error:
            return None, error
        except asyncio.CancelledError as error:
            if task.cancelling() - self._cancelled > cancelling:
                raise
            if self._cancelled:
                return None, None
            # The task was not cancelled: a scope or a task within the transport was.
            failure = TransportError("the transport cancelled the call")
            failure.__cause__ = error
            return None, failure
        finally:
            if self._timer is not None:
                self._timer.cancel()
            if self._cancelled:
                task.uncancel()
            self._task = self._timer = None

    def paid(self, usage: Usage, price: Callable[[Usage], float] | None) -> None:
        """Note that an attempt used *usage*, at *price*."""
        before = 0.0 if self.usage is None else self.cost_usd
        self.price = price
        self.usage = usage if self.usage is None else self.usage + usage
        self.cost_usd = None if price is None or before is None else before + price(usage)

    def replaced(self, alone: Usage, price: Callable[[Usage], float] | None) -> None:
        """Note that answered requests would have used *alone*, at *price*, in calls of their own."""
        if price is not None:
            self.unbatched_cost_usd = price(alone) + (self.unbatched_cost_usd or 0.0)

    def abandoned(self) -> None:
        """Note that a caller left without an answer; the last one ends the call, unless only the reply's end is missing."""
        self.waiting -= 1
        if self.waiting <= 0 and self.found >= self.size:
            self.linger()
        elif self.waiting <= 0:
            self.stop()

    def linger(self) -> None:
        """Read on for the usage only, for a while: every caller has been answered."""
        if self._timer is None:
            self._end_in(USAGE_PATIENCE)

    def stop(self) -> None:
        """End the sending where it waits, at the next turn of the event loop."""
        self._end_in(0.0)

    def _end_in(self, seconds: float) -> None:
        if self._task is None or self._cancelled:
            return
        if self._timer is not None:
            self._timer.cancel()
        loop = self._task.get_loop()
        self._timer = loop.call_later(seconds, self._cancel) if seconds else loop.call_soon(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._cancelled = True
            self._task.cancel()

    def end(self) -> None:
        """Note that the call is over and its cost attributed."""
        self.ended = True
        self.permit = None
        if self._ended is not None:
            self._ended.set()

    async def wait(self) -> None:
        """Wait until the call is over and its cost attributed."""
        if not self.ended:
            if self._ended is None:
                self._ended = anyio.Event()
            await self._ended.wait()


def _no_op() -> None:
    pass


class Sample(msgspec.Struct, eq=False):
    """An item drawn for an audit.

    Attributes:
        record: The record of *step* when it was drawn; another one counts if the step has been tried again since.
        text: The answer from the batch; "" until it has come.
    """

    ticket: Ticket
    kind: LaneKind
    step: int
    record: StepRecord
    history: LaneHistory
    text: str = ""


class AloneAnswer(msgspec.Struct, frozen=True):
    """The answer to a request that was asked again alone.

    Attributes:
        text: The answer as the model wrote it; None if there is none that fits.
        model: The model as the endpoint names it.
        usage: The usage of the call; None if the endpoint has not reported it.
        kept: Whether the call ended in such a way that its answer may be kept.
    """

    text: str | None
    model: str | None
    usage: Usage | None
    kept: bool


class Batch:
    """A combined call, composed and ready to be sent.

    Attributes:
        line_bytes: The length of each request's line.
        bound: The bound it was composed with, None for none; that of the call may be lowered since.
        early: Whether answers are handed out before the end of the reply.
        tries: Whether the bound is larger than any that the model is known to accept.
        instead: Whether it is made instead of a call whose bound was too low.
        repeated: Whether it was sent again as it is, after a cut that left nothing.
        bug: An error of handing out answers.
        audited: The item drawn for an audit, until the call is over; None for none.
        clock: Takes the times of the reply; None without a limit on latency.
        taught: Called when the lane has learned from the first answers of the reply.
        answers: Answers found and not handed out yet.
        answer_bytes: The length of each answer so far.
    """

    def __init__(
        self,
        tickets: list[Ticket],
        lines: list[bytes],
        codec: ChatCodec,
        combined: CombinedCall,
        history: LaneHistory,
        permit: Permit,
        call_state: CallState,
    ) -> None:
        self.tickets = tickets
        self.codec = codec
        self.combined = combined
        self.call: ChatCall = combined.call
        self.history = history
        self.permit = permit
        self.call_state = call_state
        self.line_bytes: list[int] = [*map(len, lines)]
        self.bound: int | None = combined.call.bound
        self.early = self.tries = self.instead = self.repeated = False
        self.bug: BaseException | None = None
        self.audited: Sample | None = None
        self.clock: ReplyClock | None = None
        self.taught: Callable[[], None] = _no_op

    def note_found(self, now: float) -> None:
        """Note when the answers found so far have come; a lane that knows nothing of its replies' times learns from the first."""
        clock = self._running_clock
        if clock is None:
            return
        clock.found(self.call_state.found, now)
        if clock.learn_early():
            self.history.revised = True
            self.taught()

    def note_time(self, now: float, *, given_up: bool) -> None:
        """Note when the last answers have come, or that all callers have *given_up* before."""
        clock = self._running_clock
        if clock is not None and clock.ended(len(self.tickets), now, given_up=given_up):
            self.history.revised = True

    @property
    def _running_clock(self) -> ReplyClock | None:
        """The clock of the reply; None if nothing does, or they include waiting for another attempt."""
        return self.clock if self.call_state.attempts == 1 else None

    def reset(self) -> None:
        """Start on a new reply: nothing of the one before was used."""
        combined, decoders = self.combined, [ticket.answer.decode for ticket in self.tickets]
        self.reply: CombinedReply = self.codec.demultiplex(combined.ids, decoders, combined.canary, early=self.early)
        self.answers: list[Answer] = []
        self.answer_bytes: list[int] = [0] * len(self.tickets)
        self.call_state.found = 0
