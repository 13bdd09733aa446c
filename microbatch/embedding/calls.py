"""The calls of lanes of texts: what a lane allows, and how a list of texts is asked for, answered and paid for; see `Calls`."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from microbatch.batching.attribution import with_earlier
from microbatch.batching.estimates import Budget
from microbatch.batching.lane import Lane, why_only_one
from microbatch.batching.lane_history import LaneHistories
from microbatch.batching.overhead import estimate
from microbatch.batching.ticket import HIGH, LOW, AloneReason, Charge
from microbatch.embedding import codec
from microbatch.embedding.recovery import ListHistory, ListOutcome, Recovery
from microbatch.errors import ConfigError
from microbatch.messages import Reply, Usage
from microbatch.prompt.outcome import complaint, ending
from microbatch.transports.expenses import Expense

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from microbatch.batching.attribution import CallCost, UsageAttribution
    from microbatch.batching.call_state import CallState
    from microbatch.batching.dependencies import Dependencies
    from microbatch.batching.lane import LaneOwner, Work
    from microbatch.batching.lane_table import LaneTable
    from microbatch.batching.sending import Sending
    from microbatch.batching.ticket import Spec, Ticket
    from microbatch.embedding.codec import Vectors
    from microbatch.embedding.request import EmbeddingSpec
    from microbatch.messages import Route
    from microbatch.protocols import Completion
    from microbatch.transports.accounts import Permit

MAX_INPUTS: Final = 2_048
"""Most texts of one call. OpenAI takes as many; many servers take fewer and refuse the list, from which its lane learns."""

MAX_TOKENS: Final = 300_000
"""Most tokens of one call, which is OpenAI's limit."""

_MARGIN: Final = 1.05
"""Divisor of a limit where tokens are counted in another encoding than the model's: the counts of most texts differ by less."""

_BYTES_A_TOKEN: Final = 4
"""Bytes of a token of English text, for the estimate of usage that is not reported."""


class EmbeddingCalls:
    """The calls of lanes of texts; see `Calls`.

    Args:
        given: The objects that the parts of a batcher share.
        sending: Sends the calls.
        attribution: Attributes their cost.
        lanes: The open lanes.
        may_be_low: Returns whether our count of tokens may be too low for a model.

    Attributes:
        latest: See `Calls`.
    """

    def __init__(
        self,
        given: Dependencies,
        sending: Sending,
        attribution: UsageAttribution,
        lanes: LaneTable,
        *,
        may_be_low: Callable[[str | None], bool],
    ) -> None:
        self.latest: Lane | None = None
        self._given = given
        self._policy = given.policy
        self._ledger = given.ledger
        self._settlement = given.settlement
        self._sending = sending
        self._attribution = attribution
        self._lanes = lanes
        self._may_be_low = may_be_low
        self._histories = LaneHistories(ListHistory)

    # --- lanes

    def open(self, spec: Spec, owner: LaneOwner) -> Lane:
        """See `Calls`."""
        given, policy = self._given, self._policy
        history, account = self._histories.of(spec.key), given.accounts.of(spec.model, spec.headers)
        index = given.in_flight.index_of(spec.content)
        # Used where the upper bound of a text does not decide; a long text keeps its bound, as counting it would block the event loop.
        count = given.estimates.tokens_of
        lane = Lane(spec, account, history, Budget(1, 1), index, count, self, owner)
        lane.max_wait = 0.0 if lane.rank == HIGH else policy.low_max_wait if lane.rank == LOW else policy.max_wait
        self.revise(lane)
        return lane

    def revise(self, lane: Lane) -> None:
        """See `Calls`."""
        history, quota = lane.history, lane.account.max_tokens
        size = 1 if history.suspended_for else MAX_INPUTS if history.batch_size is None else history.batch_size
        tokens = int(MAX_TOKENS / _MARGIN) if self._may_be_low(lane.spec.model) else MAX_TOKENS
        lane.rebudget(Budget(size, tokens if quota is None else min(tokens, quota), frame=0))
        lane.fast_path_max_bytes = sys.maxsize if quota is None else -1

    def cost(self, lane: Lane, items: int, tokens: int, oldest: Ticket) -> int:  # noqa: ARG002 see `Calls`
        """See `Calls`."""
        return tokens

    def why_alone(self, ticket: Ticket, lane: Lane, *, bypass: bool) -> AloneReason | None:
        """See `Calls`: none goes alone, as no text affects the vector of another; beyond a full queue one does not wait for others."""
        quota = lane.account.max_tokens
        if quota is not None and ticket.charge is None:  # else it was accepted when the quota was larger
            ticket.counted = estimate(ticket.text, self._given.count)
            ticket.charge = Charge(ticket.counted)
            if ticket.counted > quota:
                raise ConfigError(
                    f"this text would be charged about {ticket.counted} tokens, but the rate limit grants {quota} a minute, so it "
                    "could never be sent: shorten it or raise tpm="
                )
        if bypass:
            ticket.patience = 0.0
        return None

    # --- calls

    def begin(self, work: Work) -> bool:
        """See `Calls`."""
        lane = work.lane
        if lane is not None and len(work.tickets) == 1:
            suspended = lane.history.consume_suspension()
            self._lanes.revise(lane)
            work.reason = AloneReason.NOT_CHEAPER if suspended else why_only_one(work.reason)
        return True

    async def make(self, work: Work) -> None:
        """See `Calls`."""
        lane, permit = work.lane, work.permit
        tickets = [ticket for ticket in work.tickets if not ticket.done]
        if lane is None or not tickets:
            return
        outcome = await self.ask(tickets, lane, permit, "batch" if len(tickets) > 1 else "single")
        permit.finish()  # the calls of its recovery have permits of their own
        self._lanes.taught(lane)
        if not outcome.complete:
            await Recovery(self, self._given, self._lanes, lane, permit).after(outcome)

    def ended(self, work: Work) -> None:
        """See `Calls`."""

    def permit(self, tickets: Sequence[Ticket], like: Permit) -> Permit:
        """Return a permit for a call with *tickets* that asks again, for the account of *like*."""
        quota = like.account.max_tokens
        cost = 0 if quota is None else min(quota, sum(ticket.tokens for ticket in tickets))
        return like.account.permit(cost, like.rank)

    async def ask(self, tickets: list[Ticket], lane: Lane, permit: Permit, route: Route) -> ListOutcome:
        """Ask for the vectors of *tickets*, of *lane*, and answer those whose vector is sound; return how the call ended."""
        spec, size = cast("EmbeddingSpec", lane.spec), len(tickets)
        permit.combined = size > 1
        if size > 1:
            self._ledger.batches += 1
            self._ledger.batched_items += size
        elif route == "fallback":
            self._ledger.singles_by_reason[AloneReason.FALLBACK] += 1
        call = codec.compose(spec, [ticket.text for ticket in tickets])
        call.timeout = self._sending.remaining(tickets)
        call_state = self._sending.begin(tickets, route, permit, partial(self._expense, tickets))

        def on_cut(completion: Completion | None) -> bool:
            self._attribution.attribute_list(
                tickets, completion, self._cost(call_state, completion, tickets), again=route == "fallback"
            )
            return True

        completion, error, outcome = None, None, ListOutcome(tickets)
        try:
            completion, error = await self._sending.exchange(call_state, call, _ignore, on_cut, None)
            error = error or complaint(completion)
            outcome.error = error
            if error is not None:
                how = ending(completion, error, heard=False, has_worked=permit.account.has_worked)
                outcome.ending = "refused" if how == "refused" else "failed"
            if completion is not None:
                alone = self._take(outcome, completion, call_state, lane, again=route == "fallback")
        finally:
            call_state.end()
            self._sending.note_called(call_state, call, tickets, completion, error)
        if completion is not None:
            await self._sending.keep(completion, zip(tickets, alone, strict=True))
        return outcome

    def _take(
        self, outcome: ListOutcome, completion: Completion, call_state: CallState, lane: Lane, *, again: bool
    ) -> list[Usage]:
        """Take a reply: answer the texts with a sound vector, and attribute its cost; return what each text would take alone."""
        tickets, history = outcome.tickets, cast("ListHistory", lane.history)
        call_cost = self._cost(call_state, completion, tickets)
        if outcome.error is None:
            dimensions = cast("EmbeddingSpec", lane.spec).dimensions
            vectors = codec.read(completion, len(tickets), history.length if dimensions is None else dimensions)
            outcome.ending, outcome.fault = "complete" if vectors.fault is None else "wrong", vectors.fault
            outcome.sound, outcome.odd, outcome.other = vectors.sound, vectors.odd, vectors.other
            history.learn(vectors, len(tickets), again=again)
            self._answer(tickets, vectors, completion, call_state, call_cost)
        alone = self._attribution.attribute_list(tickets, completion, call_cost, again=again)
        return alone or [Usage()] * len(tickets)

    def _answer(
        self,
        tickets: list[Ticket],
        vectors: Vectors,
        completion: Completion,
        call_state: CallState,
        call_cost: CallCost | None,
    ) -> None:
        now, route, sent, size = self._given.now(), call_state.route, call_state.sent, call_state.size
        model = completion.model or call_state.model
        replies: list[tuple[Ticket, Reply[Any]]] = []
        for position, (ticket, vector) in enumerate(zip(tickets, vectors.found, strict=True)):
            if vector is None:
                continue
            if call_cost is None:
                estimated = Usage(len(ticket.line) // _BYTES_A_TOKEN + 1, estimated=True)
                usage, cost_usd = with_earlier(ticket, estimated, call_state.price)
            else:
                usage, cost_usd = with_earlier(ticket, call_cost.shares[position], call_cost.price)
            waited, latency = sent - ticket.created, now - ticket.created
            # The fields in their order: names would cost a third more.
            reply: Reply[Any] = Reply(
                *(vector, "", route, usage, cost_usd, size, waited, latency, model, "stop", completion.request_id)
            )
            reply._wait = call_state.wait  # noqa: SLF001 no field, see `Reply`
            replies.append((ticket, reply))
        call_state.waiting -= self._settlement.answer(replies)

    def _cost(self, call_state: CallState, completion: Completion | None, tickets: list[Ticket]) -> CallCost | None:
        """Return the cost of an ended attempt, divided by the tokens of each text if all are counted, else by their bytes."""
        counts = [ticket.counted for ticket in tickets]
        weights = [len(ticket.line) for ticket in tickets] if None in counts else [count or 1 for count in counts]
        return self._attribution.cost(call_state, completion, weights, weights)

    def _expense(self, tickets: Sequence[Ticket]) -> Expense:
        """Return what a call for *tickets* is likely to cost; the tokens of many characters are estimated from samples."""
        spec = tickets[0].spec
        counted = sum(ticket.counted for ticket in tickets if ticket.counted is not None)
        uncounted = "".join(ticket.text for ticket in tickets if ticket.counted is None)
        tokens = counted + (estimate(uncounted, self._given.count) if uncounted else 0)
        return Expense(Usage(tokens), spec.model, spec.tenant, False, spec.tier)


def _ignore(_text: str) -> None:
    pass
