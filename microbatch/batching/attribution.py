"""Attributes the cost of a call to its requests, and records it."""

from __future__ import annotations

import logging
from itertools import compress
from operator import mul
from typing import TYPE_CHECKING, Final

import msgspec

from microbatch.accounting.stats import divided
from microbatch.batching.overhead import measure_overhead
from microbatch.batching.single_flight import finish_cost
from microbatch.messages import Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from microbatch.accounting.stats import Beside
    from microbatch.batching.call_state import Batch, CallState
    from microbatch.batching.dependencies import Dependencies
    from microbatch.batching.lane_history import LaneHistory
    from microbatch.batching.ticket import Call, Ticket
    from microbatch.prompt.demultiplexer import Answer
    from microbatch.protocols import Completion

logger: Final = logging.getLogger("microbatch")

_ENOUGH_BATCHES = 20
"""Batches after which combining is judged for the log."""


class CallCost(msgspec.Struct, eq=False):
    """The cost of an ended call, and each request's share of it.

    Attributes:
        price: Prices a usage; None if the price is unknown.
        handed_out: Requests that were answered with their share on the reply, so that nothing of it is left to attribute.
    """

    completion: Completion
    usage: Usage
    shares: list[Usage]
    price: Callable[[Usage], float] | None
    handed_out: int = 0


class UsageAttribution:
    """Attributes the cost of ended calls."""

    def __init__(self, given: Dependencies) -> None:
        self._given = given
        self._ledger = given.ledger
        self._estimates = given.estimates
        self._batches = 0

    def cost(
        self,
        call_state: CallState,
        completion: Completion | None,
        line_bytes: Sequence[int] = (1,),
        answer_bytes: Sequence[int] = (1,),
    ) -> CallCost | None:
        """Return the cost of an ended attempt, divided by the bytes of each request's line and answer; None if it is unknown."""
        if completion is None or completion.usage is None:
            return None
        shares = divided(completion.usage, line_bytes, answer_bytes)
        price = self._given.price(
            completion.model,
            completion.service_tier,
            asked=call_state.model,
            prompt_tokens=completion.usage.prompt_tokens,
        )
        call_state.paid(completion.usage, price)
        return CallCost(completion, completion.usage, shares, price)

    def attribute(
        self, batch: Batch, completion: Completion | None, call_cost: CallCost | None, *, each: bool = False
    ) -> list[Usage]:
        """Record the cost of an ended combined call, and each ticket's share of it; None if it is unknown.

        Returns:
            The usage that each ticket would have had alone, zero for those without an answer; [] if it is unknown, or not *each*
            is asked for.
        """
        tickets, alone = batch.tickets, []
        special = [ticket for ticket in tickets if ticket.waiters is not None or ticket.past is not None]
        complete = call_cost is not None and call_cost.handed_out == len(tickets)
        if completion is not None and not complete:
            _finish(tickets, completion)
        if call_cost is None:
            self._ledger.unreported_calls += completion is not None or batch.reply.heard
        else:
            if not complete:
                self._book(tickets, call_cost)
            alone = self._record(batch, call_cost, each=each or bool(special))
            prompt_tokens = call_cost.usage.prompt_tokens
            every = self._near_a_limit(batch, prompt_tokens)
            self._estimates.learn_together(tickets, batch.history, prompt_tokens, every=every)
        for ticket in special:
            finish_cost(ticket, self._ledger)
        return alone

    def _near_a_limit(self, batch: Batch, prompt_tokens: int) -> bool:
        """Return whether a prompt of *prompt_tokens* is large enough that the limits on prompts may bind."""
        policy = self._given.policy
        if policy.max_prompt_tokens is not None:
            return True
        # A limit is divided by four at most. In the model's own encoding prompts are not larger than we count.
        large = 4 * prompt_tokens > policy.max_batch_tokens
        return large and (batch.history.prompt_scale.factor > 1 or not self._given.exact(batch.call.model))

    def attribute_alone(
        self, ticket: Ticket, completion: Completion | None, call_cost: CallCost | None, history: LaneHistory | None
    ) -> None:
        """Record the cost of an ended single call; in *history* too, if a combined call had left *ticket* unanswered."""
        if call_cost is None:
            self._ledger.unreported_calls += 1
        else:
            usage, price = call_cost.usage, call_cost.price
            self._book([ticket], call_cost)
            alone = usage if ticket.reply is not None else Usage()
            self._ledger.pay(usage, alone, price, damage=history is not None)
            if ticket.call is not None:
                ticket.call.replaced(alone, price)
            self._record_joined(ticket, alone, price)
            self._estimates.learn_alone(ticket, usage)
            if history is not None:
                history.economics.record(usage, alone, price, again=True)
                self.learn_from_single(ticket, history)
        if completion is not None:
            _finish([ticket], completion)
        finish_cost(ticket, self._ledger)

    def attribute_list(
        self, tickets: Sequence[Ticket], completion: Completion | None, call_cost: CallCost | None, *, again: bool
    ) -> list[Usage]:
        """Record the cost of an ended embeddings call; *again* if it has asked again.

        Nothing but the texts is in such a call, so its tokens are those of calls for one each.

        Returns:
            The usage that each ticket would have had alone, which is its share; [] if it is unknown.
        """
        if call_cost is None:
            self._ledger.unreported_calls += completion is not None
        else:
            price, shares = call_cost.price, call_cost.shares
            self._book(tickets, call_cost)
            alone, call = Usage(), tickets[0].call
            for ticket, share in zip(tickets, shares, strict=True):
                if ticket.reply is not None:
                    alone += share
                    self._record_joined(ticket, share, price)
            self._ledger.pay(call_cost.usage, alone, price, damage=again or not alone.prompt_tokens)
            if call is not None:
                call.replaced(alone, price)
        if completion is not None:
            _finish(tickets, completion)
        for ticket in tickets:
            if ticket.waiters is not None or ticket.past is not None:
                finish_cost(ticket, self._ledger)
        return [] if call_cost is None else call_cost.shares

    def attribute_beside(self, what: Beside, call_cost: CallCost | None) -> None:
        """Record the cost of a call that belongs to no reply; see `Ledger.pay_beside`."""
        if call_cost is None:
            self._ledger.unreported_calls += 1
        else:
            self._ledger.pay_beside(what, call_cost.usage, call_cost.price)

    def learn_from_single(self, ticket: Ticket, history: LaneHistory) -> None:
        """Learn for the lane with *history* from the single call that has answered *ticket*, a request of its kind."""
        call, reply = ticket.call, ticket.reply
        if call is None or reply is None:
            return
        if history.times is not None and call.attempts == 1:
            history.times.singles.append(reply.latency - reply.waited)
        if call.usage is not None:
            answer_bytes = len(reply.text.encode("utf-8", "replace"))
            self.record_single(history, call, call.usage, len(ticket.line), answer_bytes)

    def record_single(self, history: LaneHistory, call: Call, usage: Usage, line_bytes: int, answer_bytes: int) -> None:
        """Record in the *history* of a lane that *call*, a single one, took *usage*; see `SingleReplies.record`."""
        history.record_single(usage, line_bytes, answer_bytes)
        if history.cache is not None:
            history.cache.learn(history.cache.alone, usage, call.sent, self._given.now())
        self._compare(history, call.price)

    def _compare(self, history: LaneHistory, price: Callable[[Usage], float] | None) -> None:
        """Correct what single calls would cost by those that a lane has made, and book what is missing of earlier answers."""
        singles, overhead = history.singles, history.overhead
        if singles is None or overhead is None:
            return
        compared = singles.compared
        missing = singles.correct(overhead)
        if missing is not None:
            self._ledger.correct(missing, price)
            self._ledger.singles_compared += singles.compared - compared

    def _book(self, tickets: Sequence[Ticket], call_cost: CallCost) -> None:
        """Book each ticket's share of an ended call: on its reply, on the ticket for later, or as unclaimed."""
        price = call_cost.price
        for ticket, share in zip(tickets, call_cost.shares, strict=True):
            reply, past = ticket.reply, ticket.past
            if reply is not None and reply.usage is share:
                continue  # handed out with it
            whole, cost_usd = with_earlier(ticket, share, price)
            if past is not None:
                past.usage = None
            if reply is not None:
                reply.usage = whole
                reply.cost_usd = cost_usd
            elif ticket.done:
                self._ledger.unclaimed += whole
            else:
                past = ticket.remember()
                past.usage, past.cost_usd = whole, cost_usd

    def _record(self, batch: Batch, call_cost: CallCost, *, each: bool) -> list[Usage]:
        """Record the cost of a combined call, and what its answered requests would have cost one by one; see `attribute`."""
        history, usage, price = batch.history, call_cost.usage, call_cost.price
        lines, answers = batch.line_bytes, batch.answer_bytes
        alone, asked, shares = Usage(), len(batch.tickets), call_cost.shares
        if call_cost.handed_out < asked:
            answered = [ticket.reply is not None for ticket in batch.tickets]
            shares = [*compress(shares, answered)]
            lines, answers = ([*map(mul, lengths, answered)] for lengths in (lines, answers))
        if shares:
            if (
                not batch.reply.elements.past_the_end
            ):  # else tokens of elements that were not asked for are among theirs
                history.record_answers([share.completion_tokens for share in shares])
            history.record_thinking(usage)
            if history.overhead is None:
                exact = self._given.exact(batch.call.model)
                history.overhead = measure_overhead(
                    batch.combined, batch.tickets, usage, self._given.count, exact=exact
                )
                if history.cache is not None:
                    history.cache.measured(history.overhead.shared, history.overhead.scale)
            alone = history.overhead.alone(
                usage,
                asked=asked,
                asked_bytes=sum(batch.line_bytes),
                answered=len(shares),
                line_bytes=sum(lines),
                answer_bytes=sum(answers),
            )
        if history.cache is not None:
            history.cache.learn(history.cache.combined, usage, batch.call_state.sent, self._given.now())
        fallback = batch.call_state.route == "fallback"
        fruitless = not shares and not all(ticket.done for ticket in batch.tickets)
        self._ledger.pay(usage, alone, price, damage=fallback or fruitless)
        batch.call_state.replaced(alone, price)
        self._compare(history, price)
        history.economics.record(usage, alone, price, again=fallback and not batch.instead)
        self._warn_if_dearer()
        if not (each and shares):
            return []
        singles = divided(alone, lines, answers)
        for ticket, single in zip(batch.tickets, singles, strict=True):
            self._record_joined(ticket, single, price)
        return singles

    def _record_joined(self, ticket: Ticket, alone: Usage, price: Callable[[Usage], float] | None) -> None:
        """Record what the requests that have joined *ticket* would have cost, each as much as *alone*."""
        if ticket.waiters is not None:
            for _ in range(len(ticket.waiters) - 1):
                self._ledger.pay(Usage(), alone, price)
                if ticket.call is not None:
                    ticket.call.replaced(alone, price)

    def _warn_if_dearer(self) -> None:
        """Log once, after enough batches, if combining costs more than it saves."""
        self._batches += 1
        if self._batches == _ENOUGH_BATCHES and self._ledger.costs_more:
            advice = "the messages they share are too short, or the answers too long"
            if self._ledger.damage_costs_more:
                advice = "replies were damaged or cut, and what they left unanswered was asked again"
            logger.warning("combining requests costs more than it saves here (%s): %s", self._ledger.comparison, advice)


def _finish(tickets: Iterable[Ticket], completion: Completion) -> None:
    """Set on the replies how the call that answered them ended."""
    for ticket in tickets:
        reply = ticket.reply
        if reply is not None:
            reply.finish_reason = completion.finish_reason
            reply.request_id = completion.request_id
            if completion.model is not None:
                reply.model = completion.model


def with_earlier(ticket: Ticket, share: Usage, price: Callable[[Usage], float] | None) -> tuple[Usage, float | None]:
    """Return the usage of *ticket*, its *share* of a call and those of earlier calls that are on no reply, and its cost."""
    cost_usd, past = None if price is None else price(share), ticket.past
    if past is None or past.usage is None:
        return share, cost_usd
    return past.usage + share, None if cost_usd is None or past.cost_usd is None else past.cost_usd + cost_usd


def estimated_usage(ticket: Ticket, shared_chars: int, answer_bytes: int) -> Usage:
    """Return the usage of *ticket* until its call has ended."""
    usage = estimated_call(shared_chars + len(ticket.line), answer_bytes)
    if ticket.past is not None and ticket.past.usage is not None:
        usage = ticket.past.usage + usage
    return usage


def estimated_call(prompt_bytes: int, answer_bytes: int) -> Usage:
    """Return the usage of a call whose own is not known: a token is about 4 bytes of English."""
    return Usage(prompt_bytes // 4, answer_bytes // 4 + 1, 0, True)


def measure(answers: Iterable[Answer], sizes: list[int]) -> None:
    """Store in *sizes* how many bytes the text of each answer has."""
    for position, (_, text) in answers:
        sizes[position] = len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
