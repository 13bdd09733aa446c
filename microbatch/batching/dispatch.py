"""Makes chat calls: composes and sends them, takes their replies apart, and hands the answers to their callers."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from microbatch.batching.attribution import UsageAttribution, estimated_usage, measure
from microbatch.batching.call_state import AloneAnswer, Batch, CallState
from microbatch.batching.latency import ReplyClock
from microbatch.batching.ticket import AloneReason
from microbatch.containment import contained
from microbatch.errors import ConfigError, RequestFailed, ShutDown, StatusError, TransportTimeout
from microbatch.messages import Reply, Usage
from microbatch.prompt.outcome import CallOutcome, complaint, ending, may_differ
from microbatch.transports.chat_wire import completion_object

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from microbatch.accounting.stats import Beside
    from microbatch.batching.attribution import CallCost
    from microbatch.batching.dependencies import Dependencies
    from microbatch.batching.lane_history import LaneHistory
    from microbatch.batching.sending import Sending
    from microbatch.batching.ticket import Ticket
    from microbatch.messages import Route
    from microbatch.prompt.codec import ChatCodec
    from microbatch.prompt.demultiplexer import Answer
    from microbatch.prompt.outcome import Ending
    from microbatch.protocols import Completion
    from microbatch.schema.asked_form import ForcedTool
    from microbatch.transports.accounts import Permit

    CallPath = tuple[int, ...]


class Dispatcher:
    """Makes chat calls and settles the requests that they answer.

    Args:
        given: What the parts of the batcher share.
        sending: Sends the calls.
        codec: Composes calls and reads their replies.

    Attributes:
        attribution: Attributes the cost of its calls.
    """

    def __init__(self, given: Dependencies, sending: Sending, codec: ChatCodec) -> None:
        self._ledger = given.ledger
        self._estimates = given.estimates
        self._bounds = given.bounds
        self._settlement = given.settlement
        self._now = given.now
        self._price = given.price
        self._default_model = given.default_model
        self._early = given.fallback.early
        self.attribution: UsageAttribution = UsageAttribution(given)
        self._sending = sending
        self._codec = codec

    async def admit(self, tickets: list[Ticket], permit: Permit) -> RequestFailed | ConfigError | None:
        """Wait for the slot of *permit* as long as any caller of *tickets* waits; return the error if it is refused."""
        _, refusal = await self._begin(tickets, "fallback", permit, None).while_awaited(permit.admit)
        return refusal

    def _begin(self, tickets: list[Ticket], route: Route, permit: Permit, lane: LaneHistory | None) -> CallState:
        """Return the state of a call that carries *tickets* from now on; a combined one has the history of its *lane*."""
        return self._sending.begin(tickets, route, permit, partial(self._estimates.expense, tickets, lane))

    # --- combined calls

    def compose(
        self,
        tickets: list[Ticket],
        history: LaneHistory,
        permit: Permit,
        *,
        route: Route = "batch",
        instead: bool = False,
        path: CallPath = (),
    ) -> Batch:
        """Compose a combined call for *tickets*, of one lane, which all still wait.

        *instead* if it is made instead of one whose bound was too low: then its cost is not held against combining. *path* is its
        place among the calls that ask again for what a batch left unanswered, see `Recovery.after`.
        """
        permit.combined = True
        spec, size = tickets[0].spec, len(tickets)
        bound, tries = self._bounds.tried(spec, history, size, self._bound(tickets, history, permit))
        lines = [ticket.line for ticket in tickets]
        combined = self._codec.compose(spec, spec.shared, lines, bound, apart=(spec.tenant, path))
        call, call_state = combined.call, self._begin(tickets, route, permit, history)
        unclocked = history.times is not None and history.times.size is None  # a stream shows the time of an answer
        for_callers = self._early and (unclocked or not all(ticket.bulk for ticket in tickets))
        call.stream = for_callers or history.may_overrun  # only a stream can be cut
        call.timeout = self._sending.remaining(tickets)
        batch = Batch(tickets, lines, self._codec, combined, history, permit, call_state)
        batch.early, batch.tries, batch.instead = for_callers and not history.drafts, tries, instead
        batch.reset()
        if history.times is not None:
            batch.clock = ReplyClock(history.times, call_state.sent)
        self._bounds.of(spec.model).trying += tries
        self._ledger.batches += 1
        self._ledger.batched_items += size
        if route != "fallback":
            history.alone = 0
            history.revised |= history.times is not None and history.times.left(size)
            history.economics.begin(size)
        return batch

    async def batch(self, batch: Batch) -> CallOutcome:
        """Send *batch* and hand out its answers; return how it ended and what is unanswered."""
        call, call_state, tickets, history = batch.call, batch.call_state, batch.tickets, batch.history
        take_text, on_cut = partial(self._take_text, batch), partial(self._repeats, batch)
        lower = partial(self._lower_bound, batch)
        try:
            caused_by = None if batch.instead else history
            completion, error = await self._sending.exchange(call_state, call, take_text, on_cut, caused_by, lower)
            lower(error)
            if batch.bug is not None:
                raise batch.bug
            reply = batch.reply
            how = ending(completion, error, heard=reply.heard, has_worked=batch.permit.account.has_worked)
            alone = self._take_end(batch, how, completion)
            given_up = completion is None and (error is None or isinstance(error, TransportTimeout))
            batch.note_time(self._now(), given_up=given_up)
            self._ledger.cut_replies += how in ("cut", "length") and not given_up
        finally:
            call_state.end()
            self._bounds.of(call.model).trying -= batch.tries
        self._sending.note_called(call_state, call, tickets, completion, error)
        # A reply with any fault answers the callers that wait, but is not cached.
        if how == "complete" and reply.trusted and not reply.elements.damaged:
            await self._sending.keep(completion, zip(tickets, alone, strict=False))
        unanswered: list[int] = []
        if call_state.waiting > 0:
            unanswered = [position for position, ticket in enumerate(tickets) if not ticket.done]
        error, bounded = error or complaint(completion), batch.bound is not None
        outcome = CallOutcome(how, len(tickets), unanswered, reply, completion, error, bounded)
        return self._bounds.judge(
            tickets[0].spec, history, outcome, lambda: self._bound(tickets, history, batch.permit)
        )

    def _take_text(self, batch: Batch, text: str) -> None:
        """Take a piece of the reply to *batch*."""
        call_state = batch.call_state
        self._note_text(call_state)
        answers = batch.reply.feed(text)
        if answers:
            measure(answers, batch.answer_bytes)
            if not batch.answers:
                # At the end of this turn: if it brings the end of the reply, its cost is known by then.
                asyncio.get_running_loop().call_soon(self._answer_early, batch)
            batch.answers += answers
            call_state.found += len(answers)
            if batch.clock is not None:
                batch.note_found(self._now())
        if batch.call.stream and batch.reply.elements.past_the_end:
            call_state.stop()  # the answers are valid, and nothing useful follows

    def _note_text(self, call_state: CallState) -> None:
        if call_state.first_text is None:
            call_state.first_text = self._now()

    def _repeats(self, batch: Batch, completion: Completion | None) -> bool:
        """Return whether *batch* is sent again as it is after a cut: only once, and only if nothing of the reply was used.

        After a second cut its size is the likely cause, for instance by a proxy's time limit; then smaller calls follow.
        """
        self._hand_out(batch)
        if batch.repeated or batch.call_state.waiting <= 0 or any(ticket.reply is not None for ticket in batch.tickets):
            return False
        self.attribution.attribute(batch, completion, self._cost(batch, completion))
        self._ledger.cut_replies += 1
        batch.reset()
        batch.repeated = True
        return True

    def _take_end(self, batch: Batch, how: Ending, completion: Completion | None) -> list[Usage]:
        """Hand out the last answers of *batch* and attribute its cost; return the usage that each request would have had alone."""
        reply, elements, ledger = batch.reply, batch.reply.elements, self._ledger
        answers = reply.close(how)
        if completion is not None:
            completion.thought = completion.thought or elements.thought
        batch.history.drafts |= elements.drafts
        ledger.canaries_failed += not reply.trusted and how == "complete"
        ledger.late_duplicates += elements.late_duplicates
        ledger.unknown_ids += elements.unknown_ids
        measure(answers, batch.answer_bytes)
        batch.answers += answers
        if answers and batch.clock is not None:
            batch.clock.found(batch.call_state.found + len(answers), self._now())
        call_cost = self._cost(batch, completion)
        self._hand_out(batch, call_cost)
        return self.attribution.attribute(batch, completion, call_cost, each=self._sending.keeps)

    def _cost(self, batch: Batch, completion: Completion | None) -> CallCost | None:
        return self.attribution.cost(batch.call_state, completion, batch.line_bytes, batch.answer_bytes)

    def _bound(self, tickets: Sequence[Ticket], history: LaneHistory, permit: Permit) -> int | None:
        """Return the bound of a combined call for *tickets* by what is known now."""
        return self._estimates.bound(tickets, history, permit.account.max_tokens)

    def _lower_bound(self, batch: Batch, failure: RequestFailed | ConfigError | None) -> None:
        """Learn from a refusal of the bound of *batch*, so that neither its next attempt nor later calls exceed what is allowed."""
        limits = failure.token_limits if isinstance(failure, StatusError) else None
        if limits is None:
            return
        self._estimates.learn_refused(batch.tickets, batch.history, limits)
        bound, fresh = batch.call.bound, self._bound(batch.tickets, batch.history, batch.permit)
        if bound is not None:
            batch.call.bound = bound if fresh is None else min(bound, fresh)
        elif limits.context is not None and fresh is not None and batch.bound is not None and fresh < batch.bound:
            batch.call.bound = fresh  # the endpoint has named its context window only; the rest is known here

    def _answer_early(self, batch: Batch) -> None:
        """Hand out the answers found so far while the reply goes on; called by the event loop."""
        if not batch.answers:
            return  # the reply has ended since
        with contained() as handing_out:
            self._hand_out(batch)
        if handing_out.error is not None:
            batch.bug = handing_out.error
            batch.call_state.stop()
        elif not batch.call_state.waiting and batch.call.stream:
            batch.call_state.linger()

    def _hand_out(self, batch: Batch, call_cost: CallCost | None = None) -> None:
        """Hand the answers found to their callers, with their shares of *call_cost* if the call is over."""
        answers, batch.answers = batch.answers, []
        if answers:
            call_state = batch.call_state
            call_state.waiting -= self._answer(batch.tickets, answers, call_state, batch.answer_bytes, None, call_cost)

    # --- single calls

    async def single(
        self, ticket: Ticket, permit: Permit, *, history: LaneHistory | None = None
    ) -> RequestFailed | ConfigError | None:
        """Send *ticket* alone and answer it; return the error if it cannot be answered.

        An answer that is empty or does not fit is asked for once more (see `may_differ`), unless its caller takes whatever it is.
        *history* is that of its lane, if a combined call has left it unanswered, else None.
        """
        if ticket.done:
            return None  # its caller left before this call got its turn
        error = await self._ask_alone(ticket, permit, history)
        unenforced = ticket.call is not None and ticket.call.unenforced
        live = ticket.caller.live
        final = live is not None and (history is None or live.begun)
        if not final and may_differ(error, after_combined=history is not None) and not ticket.done:
            permit.finish()  # or the second call might wait for this one to end
            other = permit.account.permit(permit.tokens, permit.rank)
            try:
                error = await self._ask_alone(ticket, other, history, unenforced=unenforced)
            finally:
                other.finish()
        return error

    async def _ask_alone(
        self, ticket: Ticket, permit: Permit, history: LaneHistory | None, *, unenforced: bool = False
    ) -> RequestFailed | ConfigError | None:
        if history is not None:
            self._ledger.singles_by_reason[AloneReason.FALLBACK] += 1
        pieces: list[str] = []
        call_state = self._begin([ticket], "single" if history is None else "fallback", permit, None)

        def on_text(text: str) -> None:
            if text:
                pieces.append(text)
                self._note_text(call_state)

        def on_cut(completion: Completion | None) -> bool:
            if live is not None and live.begun:
                return False
            pieces.clear()
            call_cost = self.attribution.cost(call_state, completion)
            self.attribution.attribute_alone(ticket, completion, call_cost, history)
            return True

        completion: Completion | None = None
        error: RequestFailed | ConfigError | None = None
        call = self._codec.compose_alone(ticket.spec, ticket.answer, ticket.messages, unenforced=unenforced)
        call.timeout = self._sending.remaining([ticket])
        live = ticket.caller.live
        if live is not None and live.streamed and not ticket.answer.wrapped:
            call.stream, call.on_event = True, live.take
        try:
            completion, error = await self._sending.exchange(call_state, call, on_text, on_cut, history)
            if completion is None:
                return error
            error = self._answer_alone(ticket, completion, "".join(pieces), call_state, history)
        finally:
            call_state.end()
            self._sending.note_called(call_state, call, [ticket], completion, error)
        if error is None:
            await self._sending.keep(completion, [(ticket, completion.usage or Usage())])
        else:
            error.completion = completion.body
        return error

    def _answer_alone(
        self, ticket: Ticket, completion: Completion, content: str, call_state: CallState, history: LaneHistory | None
    ) -> RequestFailed | None:
        """Answer *ticket* from a single reply and attribute its cost; return the error if it cannot be used."""
        reply = self._codec.read_alone(ticket.answer, completion, content, combinable=ticket.combinable)
        call_state.only_reasoning, call_state.unenforced = reply.only_reasoning, reply.unenforced
        call_cost = self.attribution.cost(call_state, completion)
        if reply.error is None:
            answers, sizes = [(0, (reply.output, reply.text))], [0]
            measure(answers, sizes)
            self._answer([ticket], answers, call_state, sizes, completion.body, call_cost)
        self.attribution.attribute_alone(ticket, completion, call_cost, history)
        return reply.error

    async def ask_again(
        self, ticket: Ticket, permit: Permit, history: LaneHistory | None, route: Beside = "audit"
    ) -> AloneAnswer:
        """Ask for *ticket*, which has been answered, alone again, for *history* too; raise what ends the call without a reply."""
        spec, pieces, model = ticket.spec, list[str](), ticket.spec.model or self._default_model
        call_state = CallState(1, route, self._now(), self._price(model, spec.tier), permit, model)
        permit.expense = partial(self._estimates.expense, [ticket], spare=True)
        call = self._codec.compose_alone(spec, ticket.answer, ticket.messages)

        def on_cut(completion: Completion | None) -> bool:
            pieces.clear()
            self.attribution.attribute_beside(route, self.attribution.cost(call_state, completion))
            return True

        self._ledger.singles_by_reason[AloneReason.AUDIT if route == "audit" else AloneReason.CHECK] += 1
        completion, error = None, None
        try:
            completion, error = await self._sending.exchange(call_state, call, pieces.append, on_cut, None)
            if completion is None:
                raise error or ShutDown("asking again was given up")
            call_cost = self.attribution.cost(call_state, completion)
            self.attribution.attribute_beside(route, call_cost)
        finally:
            call_state.end()
            self._sending.note_called(call_state, call, [ticket], completion, error)
        reply = self._codec.read_alone(ticket.answer, completion, "".join(pieces), combinable=ticket.combinable)
        text = reply.text if reply.error is None else None
        if text is not None and call_cost is not None and history is not None:
            size = len(text.encode("utf-8", "replace"))
            self.attribution.record_single(history, call_state, call_cost.usage, len(ticket.line), size)
        return AloneAnswer(text, completion.model or spec.model, call_state.usage, completion.finish_reason == "stop")

    # --- both

    def _answer(
        self,
        tickets: Sequence[Ticket],
        answers: Iterable[Answer],
        call_state: CallState,
        sizes: list[int],
        body: dict[str, Any] | None = None,
        call_cost: CallCost | None = None,
    ) -> int:
        """Hand callers their answers; return how many were answered.

        *sizes* are the bytes of the answers' texts, by position, *body* is the endpoint's JSON of a single call, and *call_cost* the
        cost of the call, if it is over; without it estimates are handed out.
        """
        now, estimated = self._now(), 0
        replies: list[tuple[Ticket, Reply[Any]]] = []
        spec, size = tickets[0].spec, call_state.size  # the requests of a call are of one lane
        limit = spec.max_tokens if size > 1 else None  # the endpoint enforces that of a single call
        price, shared_chars = call_state.price, spec.shared_chars // size
        route, sent, wait = call_state.route, call_state.sent, call_state.wait
        kind = None if spec.kind is None else spec.kind.digest
        model, finish_reason, request_id, shares = spec.model or self._default_model, None, None, None
        if call_cost is not None:
            end, price, shares = call_cost.completion, call_cost.price, call_cost.shares
            model, finish_reason, request_id = end.model or model, end.finish_reason, end.request_id
        for position, (output, text) in answers:
            ticket, length = tickets[position], sizes[position]
            if limit is not None and length > limit and self._estimates.exceeds(text, limit):
                continue
            if shares is not None and ticket.past is None:
                usage = shares[position]
            else:
                usage = estimated_usage(ticket, shared_chars, length)
                estimated += 1
            cost_usd = None if price is None else price(usage)
            waited, latency = sent - ticket.created, now - ticket.created
            # The fields in their order: names would cost a third more.
            reply: Reply[Any] = Reply(
                output,
                text,
                route,
                usage,
                cost_usd,
                size,
                waited,
                latency,
                model,
                finish_reason,
                request_id,
                body,
                kind,
            )
            reply._wait = wait  # noqa: SLF001 no field, see `Reply`
            replies.append((ticket, reply))
        if size > 1 and spec.answer.tool is not None:
            _hand_back(spec.answer.tool, replies)
        answered = self._settlement.answer(replies)
        if call_cost is not None:
            call_cost.handed_out = answered - estimated
        return answered


def _hand_back(tool: ForcedTool, replies: Iterable[tuple[Ticket, Reply[Any]]]) -> None:
    """Hand the answers of a combined reply back as calls of *tool*, which was asked for."""
    for _, reply in replies:
        members, reason = tool.call(reply.text), tool.finish_reason
        reply.body = completion_object(None, model=reply.model, finish_reason=reason, members=members)
