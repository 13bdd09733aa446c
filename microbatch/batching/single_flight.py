"""Single flight: callers who ask the same thing at the same time are answered by one ticket.

Theory of operation
-------------------
A ticket that others may join is filed under a key. The first one to join turns it into a *flight*: the ticket gets a future that
belongs to nobody, and each caller, the first one included, a *seat* with a future and a deadline of its own. From then on the
ticket is settled like any other, and whatever settles it is handed on to the seats one turn of the loop later (the flight *lands*).

Until it has landed a seat can be left without harm to the others; the last one to leave takes the ticket with it. A place in the
room is held by each seat. A ticket that nobody has joined costs no more than its entry in the files.

Usage is divided among the seats that were answered, and divided anew when the call ends and the true figures are known.
"""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import msgspec

from microbatch.accounting.stats import divided
from microbatch.batching.events import settled
from microbatch.errors import ConfigError, MalformedAnswer, RequestFailed

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Hashable

    from microbatch.accounting.events import Listeners
    from microbatch.accounting.stats import Ledger
    from microbatch.batching.admission import AdmissionQueue
    from microbatch.batching.ticket import Deadline, Ticket
    from microbatch.messages import Reply, Usage
    from microbatch.schema.answer_type import AnswerType

_NO_CONTEXT = contextvars.Context()  # callbacks and timers run in it, not in that of the caller who set them


class InFlightIndex(dict["Hashable", "Ticket"]):
    """Tickets that may be joined, of requests that are told apart by one thing: the latest under each name.

    The name is the request's digest, if it has one; else its line; else, for one that goes alone, its spec's key.
    """

    __slots__ = ("__weakref__",)

    def drop(self, ticket: Ticket) -> None:
        """Let nobody join *ticket* any more."""
        name = ticket.terms.key or ticket.line or ticket.spec.key
        filed = self.pop(name, ticket)
        if filed is not ticket:
            self[name] = filed  # a later one that has taken its place


class Seat(msgspec.Struct, eq=False):
    """One caller of a flight.

    Attributes:
        future: The caller's own.
        flight: The flight.
        answer: How its answer is decoded.
        created: Loop time of its submit, in seconds.
        deadline: When it gives up, or None.
        on_taken: For bulk work: called when the ticket leaves its queue.
        ticket: The ticket, for who came first and knows it by that; None for those who joined.
        reply: What it was answered.
        place: Its position among those who were answered.
        unclaimed: Whether its caller was gone when the answer came to be fetched.
        origin: What hooks keep of its caller.
    """

    future: asyncio.Future[Reply[Any]]
    flight: Flight
    answer: AnswerType
    created: float
    deadline: Deadline | None = None
    on_taken: Callable[[Any], None] | None = None
    ticket: Ticket | None = None
    reply: Reply[Any] | None = None
    place: int = 0
    unclaimed: bool = False
    origin: Any = None

    @property
    def queue(self) -> Any:
        """Where the ticket waits to be sent, or None once it was."""
        return self.flight.ticket.queue


class SingleFlight:
    """The tickets that can be joined.

    Args:
        ledger: Where everything is counted.
        admission: The places for accepted requests.
        abandon: Ends a ticket that nobody waits for any more.
        disown: Books an answer that nobody had any more when it came.
        late: Returns the error of a caller whose timeout, which it is told, has passed.
        listeners: Who is told how callers ended.
        now: The clock, in seconds.

    Attributes:
        digests: Those that are told apart by their digests.
    """

    def __init__(
        self,
        ledger: Ledger,
        admission: AdmissionQueue,
        *,
        abandon: Callable[[Ticket], None],
        disown: Callable[[Ticket], None],
        late: Callable[[Ticket, float], RequestFailed],
        listeners: Listeners,
        now: Callable[[], float],
    ) -> None:
        self.ledger = ledger
        self.admission = admission
        self.abandon = abandon
        self.disown = disown
        self.late = late
        self._listeners = listeners
        self._now = now
        self.digests = InFlightIndex()
        self._files: WeakValueDictionary[Hashable, InFlightIndex] = WeakValueDictionary()

    def tell(self, seat: Seat, error: Exception | None = None) -> None:
        """Tell who listens that *seat* was answered, ended with *error*, or was left."""
        if self._listeners.settle is not None:
            spec = seat.flight.ticket.spec
            self._listeners.settle(settled(spec, seat.created, seat.origin, self._now(), reply=seat.reply, error=error))

    def __len__(self) -> int:
        """Return how many can be joined."""
        return len(self.digests) + sum(map(len, self._files.values()))

    def file_of(self, content: Hashable) -> InFlightIndex:
        """Return the file of all requests that have *content* in common; it lives as long as a lane or a ticket holds it."""
        file = self._files.get(content)
        if file is None:
            file = self._files[content] = InFlightIndex()
        return file

    def join(
        self,
        ticket: Ticket,
        answer: AnswerType,
        now: float,
        on_taken: Callable[[Any], None] | None,
        loop: asyncio.AbstractEventLoop,
    ) -> Seat:
        """Return a seat for another caller of *ticket*, which is `awaited`."""
        if ticket.flight is None:
            ticket.flight = Flight(ticket, self, loop)
        return ticket.flight.board(answer, now, on_taken, loop)


def awaited(ticket: Ticket) -> bool:
    """Return whether somebody waits for the answer of *ticket*; one whose callers have all gone is not joined."""
    return not ticket.future.done() and not (ticket.flight is not None and ticket.flight.deserted)


class Flight:
    """A ticket with several callers.

    Attributes:
        ticket: The ticket that travels for all of them.
        seats: Those who have not left, in order of arrival; once it has landed, those who were answered. A dict that serves as a
            set with an order: many may leave at once.
        bulk: Whether only bulk work has come aboard, and nobody waits for it alone.
    """

    __slots__ = ("_desk", "_known", "_landed", "bulk", "first", "seats", "ticket")

    def __init__(self, ticket: Ticket, desk: SingleFlight, loop: asyncio.AbstractEventLoop) -> None:
        self.ticket = ticket
        self._desk = desk
        self._landed = False
        self._known: list[Usage] | None = (
            None  # shares of what is known to have been spent, once somebody's is nobody's
        )
        self.first = Seat(
            ticket.future,
            self,
            ticket.answer,
            ticket.created,
            on_taken=ticket.on_taken,
            ticket=ticket,
            origin=ticket.origin,
        )
        self.seats = {self.first: None}
        self.bulk = ticket.on_taken is not None
        if ticket.deadline is not None:
            ticket.deadline.cancel()
            self.expire_at(self.first, ticket.deadline, loop)
            ticket.deadline = None
        ticket.future = loop.create_future()
        ticket.future.add_done_callback(self._land, context=_NO_CONTEXT)
        ticket.on_taken = self._taken if ticket.on_taken is not None else None

    @property
    def deserted(self) -> bool:
        """Whether every caller has gone, though it may not have been noticed yet."""
        return all(seat.future.done() for seat in self.seats)

    @property
    def deadline(self) -> Deadline | None:
        """When the most patient caller gives up, as long as which a call for the ticket may take; None if one never does."""
        latest: Deadline | None = None
        for seat in self.seats:
            if seat.deadline is None:
                return None
            if latest is None or seat.deadline.at > latest.at:
                latest = seat.deadline
        return latest

    def board(
        self, answer: AnswerType, now: float, on_taken: Callable[[Any], None] | None, loop: asyncio.AbstractEventLoop
    ) -> Seat:
        """Return a seat for another caller."""
        seat = Seat(loop.create_future(), self, answer, now, on_taken=on_taken)
        self.seats[seat] = None
        if on_taken is None:
            self.bulk = False
        else:
            self.ticket.on_taken = self._taken
        return seat

    def expire_at(self, seat: Seat, deadline: Deadline, loop: asyncio.AbstractEventLoop) -> None:
        """End *seat* at *deadline*."""
        deadline.timer = loop.call_at(deadline.at, self._expire, seat, context=_NO_CONTEXT)
        seat.deadline = deadline

    def _taken(self, _: Ticket) -> None:
        for seat in self.seats:
            if seat.on_taken is not None:
                seat.on_taken(seat if seat.ticket is None else seat.ticket)

    # --- leaving

    def leave(self, seat: Seat) -> None:
        """The caller of *seat* has gone without taking an answer."""
        ledger = self._desk.ledger
        if seat.reply is not None:
            # Answered in the very moment it was cancelled. Its share of the cost is nobody's now.
            ledger.answered -= 1
            ledger.cancelled += 1
            call = self.ticket.call
            if call is not None and call.ended:
                self._give_up(seat)
            else:
                seat.unclaimed = True
        elif seat.future.cancelled():
            if not self.ticket.future.done():  # else `_land` counts it, or has
                ledger.cancelled += 1
                self._withdraw(seat)
                self._desk.tell(seat)
        elif seat.future.done():
            seat.future.exception()  # retrieved, so that asyncio does not complain of it

    def _expire(self, seat: Seat) -> None:
        if not seat.future.done() and seat.deadline is not None:
            error = self._desk.late(self.ticket, seat.deadline.timeout)
            seat.future.set_exception(error)
            self._desk.tell(seat, error)
            if not self.ticket.future.done():
                self._desk.ledger.failed += 1
                self._withdraw(seat)

    def _withdraw(self, seat: Seat) -> None:
        if seat.deadline is not None:
            seat.deadline.cancel()
        del self.seats[seat]
        if self.seats:
            self._desk.admission.leave(1)
        else:
            self.ticket.future.cancel()
            self._desk.abandon(self.ticket)

    # --- landing

    def _land(self, future: asyncio.Future[Any]) -> None:
        """The ticket has settled: hand what it got to each seat."""
        if future.cancelled():
            return  # everybody had left
        error = future.exception()
        aboard, self.seats, self._landed = self.seats, {}, True
        answered = failed = 0
        for seat in aboard:
            if seat.deadline is not None:
                seat.deadline.cancel()
            if seat.future.done():
                failed += not seat.future.cancelled()
            elif isinstance(error, RequestFailed | ConfigError):
                twin = error.replica()
                twin.attempts = self.ticket.attempts
                seat.future.set_exception(twin)
                self._desk.tell(seat, twin)
                failed += 1
            elif self._answer(seat):
                answered += 1
            else:
                failed += 1
        ledger = self._desk.ledger
        # One was counted when the ticket was settled.
        ledger.answered += answered - (error is None)
        ledger.failed += failed - (error is not None)
        ledger.cancelled += len(aboard) - answered - failed
        ledger.shared += max(0, answered - 1)
        if error is None and not answered:
            self._desk.disown(self.ticket)
        self.spread(final=False)
        self._desk.admission.leave(len(aboard) - 1)

    def _answer(self, seat: Seat) -> bool:
        """Answer *seat* with an object of its own; return whether that was possible."""
        ticket = self.ticket
        reply = ticket.reply
        if reply is None:
            raise AssertionError("a ticket without a reply has landed without an error")
        first = seat is self.first
        try:
            output, text = (reply.output, reply.text) if first else seat.answer.decode_again(reply.text)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as reason:  # noqa: BLE001 a user's validator may raise anything; a Rust panic is no Exception
            malformed = MalformedAnswer("the answer does not fit output_type", raw=reply.text, attempts=ticket.attempts)
            malformed.__cause__ = reason
            seat.future.set_exception(malformed)
            self._desk.tell(seat, malformed)
            return False
        created, sent = ticket.created, ticket.created + reply.waited
        seat.reply = msgspec.structs.replace(
            reply,
            output=output,
            text=text,
            route=reply.route if first else "shared",
            waited=max(0.0, sent - seat.created),
            latency=created + reply.latency - seat.created,
            body=reply.body if first else copy_of_body(reply.body),
        )
        seat.future.set_result(seat.reply)
        self._desk.tell(seat)
        seat.place = len(self.seats)
        self.seats[seat] = None
        return True

    # --- what it cost

    @property
    def size(self) -> int:
        """Callers that wait or were answered."""
        return len(self.seats)

    def spread(self, *, final: bool) -> None:
        """Divide what the answer cost among those who got it, and tell them how the call ended.

        Args:
            final: Whether the call is over and its cost divided.
        """
        whole = self.ticket.reply
        if whole is None or not self._landed:
            return
        shares = _divided(whole.usage, len(self.seats))
        for seat, share in zip(self.seats, shares, strict=True):
            reply = seat.reply
            if reply is None:
                continue
            reply.usage = share
            reply.cost_usd = None if whole.cost_usd is None else whole.cost_usd / len(self.seats)
            reply.finish_reason, reply.request_id, reply.model = whole.finish_reason, whole.request_id, whole.model
            if final and seat.unclaimed:
                self._give_up(seat)

    def _give_up(self, seat: Seat) -> None:
        """The share of *seat*, whose call is over, is nobody's."""
        whole = self.ticket.reply
        if whole is None:
            return
        # Where the last call has reported nothing, only what those before it have reported is known.
        known = self.ticket.usage if whole.usage.estimated else whole.usage
        if known is not None:
            if self._known is None:
                self._known = _divided(known, len(self.seats))
            self._desk.ledger.unclaimed += self._known[seat.place]


def copy_of_body(body: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a copy of an endpoint's JSON, so that nobody changes another's."""
    return None if body is None else msgspec.json.decode(msgspec.json.encode(body))


def _divided(usage: Usage, count: int) -> list[Usage]:
    """Divide *usage* into *count* parts that add up to it."""
    alike = [1] * count
    return divided(usage, alike, alike) if count else []
