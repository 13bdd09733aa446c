"""One call: composed, sent, taken apart, its answers handed to their callers."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from microbatch.batching.batch_limits import estimate, output_reserve
from microbatch.batching.call_state import Batch, CallState
from microbatch.batching.events import called
from microbatch.batching.ticket import AloneReason
from microbatch.containment import contained
from microbatch.errors import ConfigError, RequestFailed, StatusError, TransportError
from microbatch.messages import Reply, T, Usage
from microbatch.prompt.canary import CANARY_ANSWER_TOKENS, canary_line, draw_word
from microbatch.prompt.compose import compose, instruction
from microbatch.prompt.outcome import CallOutcome, Unanswered, complaint, ending, may_differ, read_alone, unanswered_of
from microbatch.protocols import ChatCall

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from microbatch.accounting.events import Listeners
    from microbatch.accounting.stats import Ledger
    from microbatch.batching.attribution import CallCost, Pricing, UsageAttribution
    from microbatch.batching.bounds import Bounds
    from microbatch.batching.estimates import Estimates
    from microbatch.batching.lane_history import LaneHistory
    from microbatch.batching.permits import Permit
    from microbatch.batching.single_flight import Settlement
    from microbatch.batching.ticket import Ticket
    from microbatch.messages import Route
    from microbatch.prompt.demultiplexer import Answer
    from microbatch.protocols import Completion


class Send(Protocol):
    """See `microbatch.transports.retry.Sender.send`."""

    async def __call__(
        self,
        call: ChatCall,
        on_text: Callable[[str], None],
        *,
        on_attempt: Callable[[], None],
        on_cut: Callable[[Completion | None], bool],
        permit: Any,
    ) -> Completion:
        """Send *call* until it succeeds or fails for good."""
        ...


class Keep(Protocol):
    """See `microbatch.caching.answer_cache.AnswerCache.keep`."""

    async def __call__(self, answered: Sequence[tuple[Ticket, Usage]]) -> None:
        """Keep the answers of tickets, each with what it would have cost alone; never raises."""
        ...


class Dispatcher:
    """Makes calls and settles what they answer.

    Args:
        send: Makes the attempts of a call.
        ledger: Where everything is counted.
        attribution: Where ended calls are booked.
        estimates: What calls are charged, and how long their replies may be.
        bounds: Judges replies that are longer than expected.
        keep: Puts answers into the cache, after their callers have them; None if there is none.
        listeners: Who is told of calls and of answers.
        count: Counts a text's tokens.
        price: What prices a model's usage.
        default_model: The transport's model, for prices when neither caller nor endpoint names one.
        settlement: Answers the callers.
        draw: Where id endings come from.
        now: The clock, in seconds.
        early: Whether callers are answered while the reply still streams.
        keep_thoughts: Whether a lone text keeps the thought before it.
        canary: Whether combined prompts end in a canary.
    """

    def __init__(
        self,
        *,
        send: Send,
        ledger: Ledger,
        attribution: UsageAttribution,
        estimates: Estimates,
        bounds: Bounds,
        keep: Keep | None,
        listeners: Listeners,
        count: Callable[[str], int],
        price: Pricing,
        default_model: str | None,
        settlement: Settlement,
        draw: Callable[[int], Sequence[str]],
        now: Callable[[], float],
        early: bool,
        canary: bool,
        keep_thoughts: bool = False,
    ) -> None:
        self._send = send
        self._ledger = ledger
        self._attribution = attribution
        self._estimates = estimates
        self._bounds = bounds
        self._keep = keep
        self._listeners = listeners
        self._count = count
        self._price = price
        self._default_model = default_model
        self._settlement = settlement
        self._draw = draw
        self._now = now
        self._early = early
        self._canary = canary
        self._keep_thoughts = keep_thoughts

    async def admit(self, tickets: list[Ticket], permit: Permit) -> RequestFailed | ConfigError | None:
        """Wait until *permit* has its slot, for as long as any caller of *tickets* waits; return why it will have none, or None."""
        call_state = CallState(len(tickets), "fallback", self._now(), None, permit)
        call_state.carry(tickets)
        _, refusal = await _while_awaited(call_state, permit.admit)
        return refusal

    # --- combined calls

    def compose(
        self,
        tickets: list[Ticket],
        history: LaneHistory,
        permit: Permit,
        *,
        route: Route = "batch",
        instead: bool = False,
    ) -> Batch:
        """Compose a combined call.

        Args:
            tickets: The requests it carries. They are of one lane, and all still wait.
            history: What is known of the lane.
            permit: The permit that pays it.
            route: The route that replies name.
            instead: Whether it is made instead of one whose bound was too low, which says nothing of what combining costs.
        """
        permit.combined = True
        spec = tickets[0].spec
        lines = [ticket.line for ticket in tickets]
        canary = draw_word(self._draw) if self._canary else None
        if canary is not None:
            lines.append(canary_line(canary))
        prompt, ids = compose(instruction(spec.answer.words), lines, self._draw)
        max_tokens = len(tickets) * output_reserve(spec.max_tokens) if spec.max_tokens else None
        bound, tries = self._bounds.tried(
            spec, history, len(tickets), self._estimates.bound(tickets, history, permit.account.max_tokens)
        )
        somebody_awaits = not all(ticket.bulk for ticket in tickets)
        call = ChatCall(
            messages=[*spec.shared, {"role": "user", "content": prompt}],
            model=spec.model,
            params=spec.params,
            headers=spec.headers,
            schema=spec.answer.batch_schema if canary is None else spec.answer.watched_schema,
            strict=spec.answer.strict,
            max_tokens=max_tokens if max_tokens is None or canary is None else max_tokens + CANARY_ANSWER_TOKENS,
            stream=self._early and somebody_awaits,
            timeout=self._remaining(tickets),
            bound=bound,
        )
        call_state = CallState(len(tickets), route, self._now(), self._price(spec.model or self._default_model), permit)
        call_state.carry(tickets)
        early = call.stream and not history.drafts
        batch = Batch(tickets, ids, call, history, permit, call_state, early=early, canary=canary, tries=tries)
        batch.instead = instead
        self._bounds.of(spec.model).trying += tries
        self._ledger.batches += 1
        self._ledger.batched_items += len(tickets)
        if route != "fallback":
            history.economics.begin(len(tickets))
        return batch

    async def batch(self, batch: Batch) -> CallOutcome:
        """Send *batch*, answer whom it answers, and tell what it left open."""
        call_state, loop = batch.call_state, asyncio.get_running_loop()

        def on_text(text: str) -> None:
            batch.heard = batch.heard or bool(text)
            if call_state.first_text is None:
                call_state.first_text = self._now()
            answers = batch.demultiplexer.feed(text)
            if answers:
                _measure(answers, batch.answer_bytes)
                if not batch.answers:
                    # When this turn is over: if it brings the end of the reply, all is known of it that there is to know.
                    loop.call_soon(self._answer_early, batch)
                batch.answers += answers
                call_state.found += len(answers)
            if batch.past_the_end and batch.call.stream:
                loop.call_soon(call_state.stop)  # what was answered stands; what would follow is for nobody

        def on_cut(completion: Completion | None) -> bool:
            self._hand_out(batch)
            # Cut once more, it is the size that is to blame (a proxy's time limit): a smaller call has better chances.
            if batch.repeated or call_state.waiting <= 0 or any(ticket.reply is not None for ticket in batch.tickets):
                return False
            self._attribution.divide(batch, completion, self._attribution.call_cost(batch, completion))
            batch.reset()
            batch.repeated = True
            return True

        try:
            lower = partial(self._lower, batch)
            completion, error = await self._exchange(
                call_state, batch.call, on_text, on_cut, None if batch.instead else batch.history, lower
            )
            self._lower(batch, error)
            if batch.bug is not None:
                raise batch.bug
            how = ending(completion, error, heard=batch.heard, has_worked=batch.permit.account.has_worked)
            demultiplexer = batch.demultiplexer
            answers = demultiplexer.close(ended=how in ("complete", "length", "refused"), complete=how == "complete")
            if completion is not None:
                completion.thought = completion.thought or demultiplexer.thought
            batch.history.drafts = batch.history.drafts or demultiplexer.drafts
            sound = call_state.found + len(answers) > 0
            trusted = batch.canary is None
            if not trusted:
                trusted = any(index == len(batch.tickets) for index, _ in answers)
                answers = [answer for answer in answers if answer[0] < len(batch.tickets)] if trusted else []
                self._ledger.canaries_failed += not trusted and how == "complete"
            _measure(answers, batch.answer_bytes)
            batch.answers += answers
            call_cost = self._attribution.call_cost(batch, completion)
            self._hand_out(batch, call_cost)
            alone = self._attribution.divide(batch, completion, call_cost, each=self._keep is not None)
        finally:
            call_state.end()
            self._bounds.of(batch.call.model).trying -= batch.tries
        if self._listeners.call is not None:
            told = called(
                *(call_state, batch.call, batch.tickets, completion, error, self._now()),
                default_model=self._default_model,
            )
            self._listeners.call(told)
        # A reply with anything odd about it answers who asked, but nobody who comes later.
        if how == "complete" and trusted and not demultiplexer.damaged:
            await self._keep_answers(completion, zip(batch.tickets, alone, strict=False))
        self._ledger.late_duplicates += demultiplexer.late_duplicates
        self._ledger.unknown_ids += demultiplexer.unknown_ids
        if error is None:
            error = complaint(completion)
        unanswered: list[Unanswered] = []
        if call_state.waiting > 0:
            unanswered += unanswered_of(batch.tickets, demultiplexer, truncated=how == "length", trusted=trusted)
        damaged = bool(unanswered) and (demultiplexer.damaged or any(True for _ in demultiplexer.faults()))
        outcome = CallOutcome(
            *(how, len(batch.tickets), unanswered, error, damaged),
            only_reasoning=how == "complete" and not batch.heard and completion is not None and completion.thought,
            heard=batch.heard,
            sound=sound,
            in_order=not demultiplexer.disordered,
            past_the_end=batch.past_the_end,
            bounded=batch.bound is not None,
        )
        self._bounds.judge(batch.tickets[0].spec, batch.history, outcome, completion, lambda: self._fresh(batch))
        return outcome

    def _fresh(self, batch: Batch) -> int | None:
        """Return the bound that *batch* would have by what is known now."""
        return self._estimates.bound(batch.tickets, batch.history, batch.permit.account.max_tokens)

    def _lower(self, batch: Batch, failure: RequestFailed | ConfigError | None) -> None:
        """Learn from a refusal of the bound of *batch*, so that neither its next attempt nor later calls exceed what is allowed."""
        said = failure.token_limits if isinstance(failure, StatusError) else None
        if said is None:
            return
        self._estimates.learn_refused(batch.tickets, batch.history, said)
        bound, fresh = batch.call.bound, self._fresh(batch)
        if bound is not None:
            batch.call.bound = bound if fresh is None else min(bound, fresh)
        elif said.context is not None and fresh is not None and batch.bound is not None and fresh < batch.bound:
            batch.call.bound = fresh  # the endpoint has named its window only; what that leaves is known here

    async def _keep_answers(self, completion: Completion | None, answered: Iterable[tuple[Ticket, Usage]]) -> None:
        """Put into the cache what a call has answered, if it ended as it should."""
        if self._keep is None or completion is None or completion.finish_reason != "stop":
            return
        kept = [pair for pair in answered if pair[0].caller.key is not None and pair[0].reply is not None]
        if kept:
            await self._keep(kept)

    def _answer_early(self, batch: Batch) -> None:
        """Hand out what has been found while the rest of the reply is still on its way; called by the loop."""
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
        """Hand the answers found to their callers, with their shares of *bill* if the call is over."""
        answers, batch.answers = batch.answers, []
        if answers:
            limit = batch.tickets[0].spec.max_tokens  # equal in a lane
            batch.call_state.waiting -= self._answer(
                batch.tickets, answers, batch.call_state, batch.answer_bytes, limit, call_cost=call_cost
            )

    def _longer_than(self, text: str, limit: int) -> bool:
        try:
            return estimate(text, self._count) > limit
        except ConfigError:  # the counter failed; an answer is not dropped for that
            return False

    # --- single calls

    async def single(
        self, ticket: Ticket, permit: Permit, *, history: LaneHistory | None = None
    ) -> RequestFailed | ConfigError | None:
        """Send *ticket* alone and answer it; return the error instead if it cannot be answered.

        An answer that is empty or does not fit is asked for once more; see `may_differ`.

        Args:
            ticket: The request.
            permit: What pays the call.
            history: What is known of its lane, if a combined call has left it open; else None.
        """
        if ticket.done:
            return None  # its caller left before this call got its turn
        error = await self._ask_alone(ticket, permit, history)
        if may_differ(error, after_combined=history is not None) and not ticket.done:
            permit.finish()  # or the other call might wait for this one to make way
            other = permit.account.permit(permit.tokens, permit.rank)
            try:
                error = await self._ask_alone(ticket, other, history)
            finally:
                other.finish()
        return error

    def compose_alone(self, ticket: Ticket) -> ChatCall:
        """Return the call that carries *ticket* alone, with its own messages."""
        spec = ticket.spec
        return ChatCall(
            messages=ticket.messages,
            model=spec.model,
            params=spec.params,
            headers=spec.headers,
            schema=ticket.answer.single_schema,
            strict=ticket.answer.strict,
            hint=ticket.answer.hint,
            max_tokens=spec.max_tokens,
            timeout=self._remaining([ticket]),
        )

    async def _ask_alone(
        self, ticket: Ticket, permit: Permit, history: LaneHistory | None
    ) -> RequestFailed | ConfigError | None:
        if history is not None:
            self._ledger.singles_by_reason[AloneReason.FALLBACK] += 1
        pieces: list[str] = []
        price = self._price(ticket.spec.model or self._default_model)
        route: Route = "single" if history is None else "fallback"
        call_state = CallState(1, route, self._now(), price, permit)
        call_state.carry([ticket])

        def on_text(text: str) -> None:
            pieces.append(text)
            if call_state.first_text is None:
                call_state.first_text = self._now()

        def on_cut(completion: Completion | None) -> bool:
            pieces.clear()
            if completion is None:
                self._ledger.unreported_calls += 1
            else:
                call_cost = self._attribution.bill_alone(completion, call_state)
                self._attribution.divide_alone(ticket, completion, call_cost, history)
            return True

        completion: Completion | None = None
        error: RequestFailed | ConfigError | None = None
        call = self.compose_alone(ticket)
        try:
            completion, error = await self._exchange(call_state, call, on_text, on_cut, history)
            if completion is None:
                return error
            said = "".join(pieces)
            output, text, error = read_alone(ticket, completion, said, keep_thoughts=self._keep_thoughts)
            call_cost = self._attribution.bill_alone(completion, call_state)
            if error is None:
                answers, sizes = [(0, (output, text))], [0]
                _measure(answers, sizes)
                self._answer([ticket], answers, call_state, sizes, None, completion.body, call_cost)
            self._attribution.divide_alone(ticket, completion, call_cost, history)
        finally:
            call_state.end()
            if self._listeners.call is not None:
                told = called(
                    *(call_state, call, [ticket], completion, error, self._now()), default_model=self._default_model
                )
                self._listeners.call(told)
        if error is None:
            await self._keep_answers(completion, [(ticket, completion.usage or Usage())])
        else:
            error.completion = completion.body
        return error

    # --- both

    async def _exchange(
        self,
        call_state: CallState,
        call: ChatCall,
        on_text: Callable[[str], None],
        on_cut: Callable[[Completion | None], bool],
        history: LaneHistory | None,
        on_failure: Callable[[RequestFailed | None], None] | None = None,
    ) -> tuple[Completion | None, RequestFailed | ConfigError | None]:
        def on_attempt() -> None:
            if on_failure is not None and call_state.permit is not None:
                on_failure(call_state.permit.error)
            self._count_attempt(call_state, history, 1)

        def send() -> Coroutine[Any, Any, Completion]:
            return self._send(call, on_text, on_attempt=on_attempt, on_cut=on_cut, permit=permit)

        permit = call_state.permit
        completion, error = await _while_awaited(call_state, send)
        if isinstance(error, ConfigError):
            self._count_attempt(call_state, history, -1)  # nothing was sent
        return completion, error

    def _count_attempt(self, call_state: CallState, history: LaneHistory | None, count: int) -> None:
        """Count an attempt of *exchange* (1), or that it was not made after all (-1); in *learned* too, if combining caused it."""
        first = call_state.attempts == (0 if count > 0 else 1)
        self._ledger.upstream_calls += count
        call_state.attempts += count
        if first and call_state.route == "fallback":
            self._ledger.fallback_calls += count
            if history is not None:
                history.economics.calls += count

    def _remaining(self, tickets: list[Ticket]) -> float | None:
        """Return the longest time any caller will still wait, in seconds; None if one sets no limit."""
        latest = 0.0
        for ticket in tickets:
            deadline = ticket.deadline
            if deadline is None:
                return None
            latest = max(latest, deadline.at)
        return max(0.0, latest - self._now())

    def _answer(
        self,
        tickets: Sequence[Ticket],
        answers: Iterable[Answer],
        call_state: CallState,
        sizes: list[int],
        limit: int | None,
        body: dict[str, Any] | None = None,
        call_cost: CallCost | None = None,
    ) -> int:
        """Hand callers their answers; return how many have been answered.

        Args:
            tickets: The requests of the call.
            answers: Position among them, and output and text, of each answer.
            call_state: The call.
            sizes: The bytes of the answers' texts, by position.
            limit: Tokens beyond which an answer is not handed out, or None.
            body: The endpoint's JSON of a single call, or None.
            call_cost: What each of the tickets has to pay for the call, which is over; None to hand out an estimate.
        """
        now, answered, estimated = self._now(), 0, 0
        route, price, size, sent = call_state.route, call_state.price, call_state.size, call_state.sent
        wait = call_state.wait  # one bound method for all
        spec = tickets[0].spec  # the requests of a call are of one lane
        model, shared = spec.model or self._default_model, spec.shared_chars // size
        finish_reason = request_id = shares = None
        if call_cost is not None:
            shares, price, final = call_cost.shares, call_cost.price, call_cost.completion
            model, finish_reason, request_id = final.model or model, final.finish_reason, final.request_id
        for index, (output, text) in answers:
            ticket, length = tickets[index], sizes[index]
            if limit is not None and length > limit and self._longer_than(text, limit):
                continue
            if shares is not None and ticket.past is None:
                usage = shares[index]
            else:
                estimated += 1
                # A token is about 4 bytes of English; this stands only until the call has ended and is booked.
                usage = Usage((shared + len(ticket.line)) // 4, length // 4 + 1, 0, True)
                if ticket.past is not None and ticket.past.usage is not None:
                    usage = ticket.past.usage + usage
            created = ticket.first.created
            # By position, in the order of the fields: this is on every answer's path.
            reply: Reply[Any] = Reply(
                output,
                text,
                route,
                usage,
                None if price is None else price(usage),
                size,
                sent - created,
                now - created,
                model,
                finish_reason,
                request_id,
                body,
                wait,
            )
            answered += self._settlement.answer(ticket, reply)
        if call_cost is not None:
            call_cost.settled = answered - estimated
        self._settlement.answered(answered)
        return answered


async def _while_awaited(
    call_state: CallState, step: Callable[[], Coroutine[Any, Any, T]]
) -> tuple[T | None, RequestFailed | ConfigError | None]:
    """Take a step of *exchange* for as long as any of its callers wait; return its outcome or its error, neither if all have left."""
    if call_state.waiting <= 0:
        return None, None
    # A scope of our own: this is on every batch's path, and `asyncio.timeout` would be 1 % of a burst. The rules are the same.
    task = call_state.task = asyncio.current_task()
    asked_before = task.cancelling() if task is not None else 0
    try:
        return await step(), None
    except (RequestFailed, ConfigError) as error:
        return None, error
    except asyncio.CancelledError as error:
        asked = task.cancelling() - asked_before if task is not None else 0
        if not asked:
            # The task itself was not cancelled: the transport was, inside, by a scope or a task of its own.
            failure = TransportError("the transport cancelled the call")
            failure.__cause__ = error
            return None, failure
        if not call_state.stopped or asked > 1:
            raise  # the task is to end for another reason
        return None, None
    finally:
        call_state.task = None
        if call_state.stopped and task is not None:
            task.uncancel()


def _measure(answers: Iterable[Answer], sizes: list[int]) -> None:
    """Note in *sizes* how many bytes the text of each answer has."""
    for index, (_, text) in answers:
        sizes[index] = len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
