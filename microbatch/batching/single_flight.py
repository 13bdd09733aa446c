"""Single flight: callers that ask the same at the same time share one ticket, and each of them is settled by itself.

A ticket that others may join is listed in an index until it ends. It is settled for each of its callers exactly once: by an answer,
an error, the caller's own deadline, or the caller leaving. A caller can leave without harm to the others; when the last one has
ended without an answer, the ticket is withdrawn from its queue or its call. Each caller occupies a place in the admission queue until
it is settled.

A cancelled caller is noticed one step of the event loop after its future is done. Until then it is neither answered nor counted.

The cost of an answer is divided among the callers that were answered, and divided anew when the call ends and the true figures are
known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import msgspec

from microbatch.accounting.stats import divided
from microbatch.batching.events import settled
from microbatch.batching.ticket import InFlightIndex
from microbatch.containment import contained
from microbatch.errors import ConfigError, DeadlineExceeded, MalformedAnswer, RequestFailed
from microbatch.schema.decode import misfit_message

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from microbatch.accounting.events import Listeners
    from microbatch.accounting.stats import Ledger
    from microbatch.batching.admission import AdmissionQueue
    from microbatch.batching.ticket import Ticket, Waiter
    from microbatch.messages import Reply, Usage


class InFlight:
    """The indexes of tickets that may be joined: one of those that have a digest, and one for each kind of content."""

    def __init__(self) -> None:
        self.digests: InFlightIndex = InFlightIndex()
        self._by_content: WeakValueDictionary[Hashable, InFlightIndex] = WeakValueDictionary()

    def __len__(self) -> int:
        """Return the number of tickets that may be joined."""
        return len(self.digests) + sum(map(len, self._by_content.values()))

    def index_of(self, content: Hashable) -> InFlightIndex:
        """Return the index of all requests that have *content* in common; it lives as long as a lane or a ticket holds it."""
        index = self._by_content.get(content)
        if index is None:
            index = self._by_content[content] = InFlightIndex()
        return index


class Settlement:
    """Ends requests: answers, fails and withdraws tickets, counts and reports how each caller ended, and releases its place."""

    def __init__(
        self, ledger: Ledger, admission: AdmissionQueue, listeners: Listeners, now: Callable[[], float]
    ) -> None:
        self._ledger = ledger
        self._admission = admission
        self._listeners = listeners
        self._now = now

    # --- answers

    def answer(self, replies: Iterable[tuple[Ticket, Reply[Any]]], *, saved: float | None = None) -> int:
        """Hand each reply to the callers of its ticket that still wait; return the number of tickets that were answered.

        *saved* is the price of the call that a reply without one has saved each caller; None if there is none, or it is unknown.
        """
        answered, reports = 0, self._listeners.settle is not None
        for ticket, reply in replies:
            future = ticket.future
            if ticket.waiters is not None:
                answered += self._answer_each(ticket, reply, ticket.waiters, saved)
            elif not future.done():
                if ticket.index is not None:
                    ticket.unlist()
                ticket.reply = reply
                future.set_result(reply)
                if ticket.deadline is not None:
                    ticket.deadline.cancel()
                if reports:
                    self._report(ticket, ticket, reply, saved=saved)
                answered += 1
        self._ledger.answered += answered
        self._admission.release(answered)
        return answered

    def _answer_each(self, ticket: Ticket, reply: Reply[Any], waiters: dict[Waiter, None], saved: float | None) -> bool:
        waiting = [waiter for waiter in waiters if not waiter.future.done()]
        if not waiting:
            return False
        ticket.unlist()
        answered = {waiter: None for waiter in waiting if self._answer_copy(ticket, waiter, reply, saved)}
        self._ledger.failed += len(waiting) - len(answered)
        if not answered:
            self._remove(ticket, waiting)
            return False
        ticket.reply, ticket.waiters = reply, answered
        self._ledger.answered += len(answered) - 1
        self._ledger.shared += len(answered) - 1 if reply.route != "similar" else 0
        self._admission.release(len(waiting) - 1)
        share_cost(ticket)
        return True

    def _answer_copy(self, ticket: Ticket, waiter: Waiter, reply: Reply[Any], saved: float | None) -> bool:
        """Answer one of several callers with a reply object of its own; return False if the answer does not fit its type."""
        output, text = reply.output, reply.text
        if waiter is not ticket:
            with contained() as decoding:
                output, text = waiter.answer.again(output, text)
            if decoding.error is not None:
                error = MalformedAnswer(misfit_message(decoding.error), raw=reply.text)
                error.__cause__ = decoding.error
                self._end(ticket, waiter, error)
                return False
        mine = msgspec.structs.replace(
            reply,
            output=output,
            text=text,
            route=reply.route if waiter is ticket or reply.route == "similar" else "shared",
            waited=max(0.0, ticket.created + reply.waited - waiter.created),
            latency=ticket.created + reply.latency - waiter.created,
            body=reply.body if waiter is ticket else _copy_of(reply.body),
        )
        mine._wait = reply._wait  # noqa: SLF001 no field, see `Reply`
        waiter.future.set_result(mine)
        if waiter.deadline is not None:
            waiter.deadline.cancel()
        self._report(ticket, waiter, mine, saved=saved)
        return True

    # --- errors

    def fail(self, ticket: Ticket, error: RequestFailed | ConfigError) -> None:
        """End every caller that still waits for *ticket* with an error object of its own."""
        waiting = [waiter for waiter in ticket.callers if not waiter.future.done()]
        for waiter in waiting:
            self._end(ticket, waiter, error.replica())
        self._ledger.failed += len(waiting)
        if waiting:
            self._remove(ticket, waiting)

    def expire(self, ticket: Ticket, waiter: Waiter) -> None:
        """End *waiter*, whose deadline has passed, unless it is done."""
        if waiter.deadline is None or waiter.future.done():
            return
        permit = None if ticket.call is None else ticket.call.permit
        failure = None if permit is None else permit.error
        latest = "" if failure is None else f"; the latest attempt failed: {type(failure).__name__}: {failure}"
        account = ticket.queue.account if ticket.queue is not None else None if permit is None else permit.account
        if account is not None and account.trouble is not None:
            latest += f"; {account.trouble}"
        self._end(
            ticket, waiter, DeadlineExceeded(f"no answer within the timeout of {waiter.deadline.timeout:g} s{latest}")
        )
        self._ledger.failed += 1
        self._remove(ticket, [waiter])

    def _end(self, ticket: Ticket, waiter: Waiter, error: RequestFailed | ConfigError) -> None:
        error.attempts = ticket.attempts
        waiter.future.set_exception(error)
        if waiter.deadline is not None:
            waiter.deadline.cancel()
        self._report(ticket, waiter, error=error)

    # --- leaving

    def leave(self, ticket: Ticket, waiter: Waiter) -> None:
        """Note that *waiter* was cancelled and takes no answer."""
        if waiter.future.cancelled():
            self._ledger.cancelled += 1
            if waiter.deadline is not None:
                waiter.deadline.cancel()
            self._report(ticket, waiter)
            self._remove(ticket, [waiter])
        elif waiter.own_reply is not None:
            # Answered in the very step in which it was cancelled: its share of the cost belongs to no reply. An error was retrieved by
            # this look, so that asyncio does not complain of it.
            self._ledger.answered -= 1
            self._ledger.cancelled += 1
            if ticket.call is not None and ticket.call.ended:
                give_up_share(ticket, waiter, self._ledger)
            else:
                ticket.remember().unclaimed.append(waiter)

    def _remove(self, ticket: Ticket, waiters: Sequence[Waiter]) -> None:
        """Remove callers that ended without an answer, and release their places; withdraw the ticket after the last one."""
        if ticket.waiters is not None and ticket.reply is None:
            for waiter in waiters:
                del ticket.waiters[waiter]
        if not ticket.waiters and ticket.reply is None:
            self._withdraw(ticket)
        self._admission.release(len(waiters))

    def _withdraw(self, ticket: Ticket) -> None:
        ticket.unlist()
        if ticket.queue is not None:
            ticket.queue.discard(ticket)
        elif ticket.call is not None:
            ticket.call.abandoned()
        if ticket.past is not None and ticket.past.usage is not None:
            self._ledger.unclaimed += ticket.past.usage
            ticket.past.usage = None

    def _report(
        self,
        ticket: Ticket,
        waiter: Waiter,
        reply: Reply[Any] | None = None,
        error: Exception | None = None,
        saved: float | None = None,
    ) -> None:
        """Report that *waiter* was answered with *reply*, ended with *error*, or left."""
        if self._listeners.settle is not None:
            now, model = self._now(), self._listeners.model
            event = settled(
                ticket.spec,
                waiter.created,
                waiter.origin,
                now,
                default_model=model,
                reply=reply,
                error=error,
                unbatched_cost_usd=saved,
            )
            self._listeners.settle(event)


def share_cost(ticket: Ticket) -> None:
    """Divide the cost of the answer to *ticket*, which has several callers, and copy what is known of the end of its call."""
    whole = ticket.reply
    if whole is None or not ticket.waiters:
        return
    count = len(ticket.waiters)
    cost_usd = None if whole.cost_usd is None else whole.cost_usd / count
    for waiter, share in zip(ticket.waiters, _divided(whole.usage, count), strict=True):
        reply = waiter.own_reply
        if reply is not None:
            reply.usage, reply.cost_usd = share, cost_usd
            reply.finish_reason, reply.request_id, reply.model = whole.finish_reason, whole.request_id, whole.model


def finish_cost(ticket: Ticket, ledger: Ledger) -> None:
    """Book the cost of the answer to *ticket*, whose call has ended: divide it, and count the shares of callers that have left."""
    if ticket.waiters is not None:
        share_cost(ticket)
    past = ticket.past
    if past is not None and past.unclaimed:
        for waiter in past.unclaimed:
            give_up_share(ticket, waiter, ledger)
        past.unclaimed = []


def give_up_share(ticket: Ticket, waiter: Waiter, ledger: Ledger) -> None:
    """Count the share of *waiter*, which does not take its answer, as unclaimed."""
    reply = waiter.own_reply
    if reply is None:
        return
    if not reply.usage.estimated:
        ledger.unclaimed += reply.usage
    elif ticket.past is not None and ticket.past.usage is not None:
        # The last call reported nothing: only what earlier calls have reported is known.
        waiters = [*ticket.callers]
        ledger.unclaimed += _divided(ticket.past.usage, len(waiters))[waiters.index(waiter)]


def _copy_of(body: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a copy of an endpoint's JSON, so that no caller changes another's."""
    return None if body is None else msgspec.json.decode(msgspec.json.encode(body))


def _divided(usage: Usage, count: int) -> list[Usage]:
    """Divide *usage* into *count* equal parts that add up to it."""
    alike = [1] * count
    return divided(usage, alike, alike)
