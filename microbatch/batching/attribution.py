"""Divides what a call cost among its requests, and books it."""

from __future__ import annotations

import logging
from itertools import compress
from operator import attrgetter
from typing import TYPE_CHECKING

import msgspec

from microbatch.accounting.stats import divided
from microbatch.batching.economics import UNKNOWN_RATIO
from microbatch.batching.overhead import measure
from microbatch.batching.single_flight import finish_cost
from microbatch.messages import Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from microbatch.accounting.stats import Ledger
    from microbatch.batching.call_state import Batch, CallState
    from microbatch.batching.estimates import Estimates
    from microbatch.batching.lane_history import LaneHistory
    from microbatch.batching.ticket import Ticket
    from microbatch.protocols import Completion

    Pricing = Callable[[str | None], Callable[[Usage], float] | None]

logger = logging.getLogger("microbatch")

_completion_of = attrgetter("completion_tokens")

# Batches after which it can be told whether combining pays.
_ENOUGH_BATCHES = 20


class CallCost(msgspec.Struct, eq=False):
    """What each request of a call that is over has to pay.

    Attributes:
        completion: How it ended.
        usage: What it used.
        shares: Each one's share of that.
        price: What prices that, or None if it is unknown.
        settled: How many have been answered with their share on the reply, and owe nothing for calls before it.
    """

    completion: Completion
    usage: Usage
    shares: list[Usage]
    price: Callable[[Usage], float] | None
    settled: int = 0


class UsageAttribution:
    """Keeps the accounts of calls that have ended.

    Args:
        ledger: Where everything is counted.
        estimates: Told how the endpoint counts.
        count: Counts a text's tokens.
        exact: Whether *count* is that of a model's own encoding; asked with None for the transport's model.
        price: What prices a model's usage.
    """

    def __init__(
        self,
        ledger: Ledger,
        estimates: Estimates,
        count: Callable[[str], int],
        exact: Callable[[str | None], bool],
        price: Pricing,
    ) -> None:
        self._ledger = ledger
        self._estimates = estimates
        self._count = count
        self._exact = exact
        self._price = price
        self._paid_batches = 0

    def call_cost(self, batch: Batch, completion: Completion | None) -> CallCost | None:
        """Divide what a combined call cost by the bytes of each request's line and answer; None if that is not known."""
        usage = None if completion is None else completion.usage
        if completion is None or usage is None:
            return None
        shares = divided(usage, batch.line_bytes, batch.answer_bytes)
        return CallCost(completion, usage, shares, self._price_of(completion, batch.call_state))

    def bill_alone(self, completion: Completion, call_state: CallState) -> CallCost | None:
        """Return what the request of a single call has to pay; None if that is not known."""
        usage = completion.usage
        return None if usage is None else CallCost(completion, usage, [usage], self._price_of(completion, call_state))

    def divide(
        self, batch: Batch, completion: Completion | None, call_cost: CallCost | None, *, each: bool = False
    ) -> list[Usage]:
        """Book what the combined call cost, and each ticket's share of it; it is over.

        Args:
            batch: The call.
            completion: How it ended; None if that is not known.
            call_cost: Who pays what; None if that is not known.
            each: Whether it is asked what each ticket would have cost alone.

        Returns:
            That of each ticket, none for those that were not answered; [] if it is not known, or nobody asks.
        """
        tickets = batch.tickets
        if completion is not None and (call_cost is None or call_cost.settled < len(tickets)):
            _finish(tickets, completion)
        if call_cost is None:
            self._ledger.unreported_calls += completion is not None or batch.heard
            alone = []
        else:
            if call_cost.settled < len(tickets):
                self._book(tickets, call_cost)
            alone = self._pay(batch, call_cost, each=each or any(ticket.waiters for ticket in tickets))
            self._estimates.learn_together(tickets, batch.history, call_cost.usage.prompt_tokens)
        for ticket in tickets:
            if ticket.waiters is not None or ticket.past is not None:
                finish_cost(ticket, self._ledger)
        return alone

    def divide_alone(
        self, ticket: Ticket, completion: Completion, call_cost: CallCost | None, history: LaneHistory | None = None
    ) -> None:
        """Book what the single call of *ticket* cost; it is over.

        Args:
            ticket: The request.
            completion: How the call ended.
            call_cost: What it has to pay; None if that is not known.
            history: What is known of its lane, if a combined call had left it open; else None.
        """
        if call_cost is None:
            self._ledger.unreported_calls += 1
        else:
            usage, price = call_cost.usage, call_cost.price
            self._book([ticket], call_cost)
            alone = usage if ticket.reply is not None else Usage()
            self._ledger.pay(usage, alone, price)
            self._pay_joined(ticket, alone, price)
            self._estimates.learn_alone(ticket, usage.prompt_tokens)
            if history is not None:
                history.economics.mending += _weight(usage, price)
                history.economics.alone += _weight(alone, price)
        _finish([ticket], completion)
        finish_cost(ticket, self._ledger)

    def _price_of(self, completion: Completion, call_state: CallState) -> Callable[[Usage], float] | None:
        """Return the price of the model that answered, else of the one that was asked for."""
        answered = None if completion.model is None else self._price(completion.model)
        return answered or call_state.price

    def _book(self, tickets: Sequence[Ticket], call_cost: CallCost) -> None:
        """Book each ticket's share of a call that has ended: on its reply, on the ticket for later, or as unclaimed."""
        price = call_cost.price
        for ticket, share in zip(tickets, call_cost.shares, strict=True):
            reply, past = ticket.reply, ticket.past
            if reply is not None and reply.usage is share:
                continue  # handed out with it
            cost_usd = None if price is None else price(share)
            if past is not None and past.usage is not None:
                share = past.usage + share  # noqa: PLW2901 with its shares of earlier calls
                cost_usd = None if cost_usd is None or past.cost_usd is None else past.cost_usd + cost_usd
                past.usage = None
            if reply is not None:
                reply.usage = share
                reply.cost_usd = cost_usd
            elif ticket.done:
                self._ledger.unclaimed += share
            else:
                past = ticket.remember()
                past.usage, past.cost_usd = share, cost_usd

    def _pay(self, batch: Batch, call_cost: CallCost, *, each: bool) -> list[Usage]:
        """Book the call, and what its answered requests would have cost one by one; return that of *each* ticket if asked."""
        history, asked, sizes, lines = batch.history, len(batch.tickets), batch.answer_bytes, batch.line_bytes
        usage, price = call_cost.usage, call_cost.price
        mine = [True] * asked
        if call_cost.settled < asked:
            mine = [ticket.reply is not None for ticket in batch.tickets]
        answered = sum(mine)
        alone = Usage()
        if answered:
            if not batch.past_the_end:  # else what nobody asked for would count as theirs
                history.record_answers([*compress(map(_completion_of, call_cost.shares), mine)])
            history.record_thinking(usage)
            if history.overhead is None:
                history.overhead = measure(
                    batch.call,
                    batch.ids,
                    batch.tickets,
                    usage,
                    self._count,
                    exact=self._exact(batch.call.model),
                    canary=batch.canary is not None,
                )
            share = 1.0 if answered == asked else sum(compress(lines, mine)) / sum(lines)
            alone = history.overhead.alone(usage, asked=asked, answered=answered, answered_share=share)
        self._ledger.pay(usage, alone, price)
        economics = history.economics
        if batch.call_state.route == "fallback" and not batch.instead:
            economics.mending += _weight(usage, price)
        else:
            economics.combined += _weight(usage, price)
        economics.alone += _weight(alone, price)
        self._warn_if_dearer()
        if not (each and answered):
            return []
        singles = divided(alone, [line * got for line, got in zip(lines, mine, strict=True)], sizes)
        for ticket, single in zip(batch.tickets, singles, strict=True):
            self._pay_joined(ticket, single, price)
        return singles

    def _pay_joined(self, ticket: Ticket, alone: Usage, price: Callable[[Usage], float] | None) -> None:
        """Book what those who have joined *ticket* would have cost, each as much as *alone*."""
        if ticket.waiters is not None:
            for _ in range(len(ticket.waiters) - 1):
                self._ledger.pay(Usage(), alone, price)

    def _warn_if_dearer(self) -> None:
        """Say once, when there is enough to judge by, that combining costs more than it saves."""
        self._paid_batches += 1
        if self._paid_batches != _ENOUGH_BATCHES or not self._ledger.costs_more:
            return
        logger.warning(
            "combining requests costs more than it saves here (%s): the messages they share are too short, or the answers too long",
            self._ledger.comparison,
        )


def _weight(usage: Usage, price: Callable[[Usage], float] | None) -> float:
    """Return what *usage* costs, in whatever unit: it is compared within one lane only."""
    return usage.prompt_tokens + UNKNOWN_RATIO * usage.completion_tokens if price is None else price(usage)


def _finish(tickets: Iterable[Ticket], completion: Completion) -> None:
    """Tell the replies how the call that answered them ended."""
    finish_reason, request_id, model = completion.finish_reason, completion.request_id, completion.model
    for ticket in tickets:
        reply = ticket.reply
        if reply is not None:
            reply.finish_reason = finish_reason
            reply.request_id = request_id
            if model is not None:
                reply.model = model
