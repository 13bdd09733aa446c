"""One call: composed, sent, taken apart, its answers handed to their callers."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from microbatch.batching.budget import estimate, output_reserve
from microbatch.batching.canary import CANARY_ANSWER_TOKENS, canary_line, draw_word
from microbatch.batching.exchange import Batch, Exchange
from microbatch.batching.prompt import compose, instruction
from microbatch.batching.telling import called, settled
from microbatch.batching.ticket import AloneReason
from microbatch.batching.verdict import Open, Outcome, complaint, ending, left_open, read_alone
from microbatch.errors import ConfigError, MalformedAnswer, RequestFailed, StatusError, TransportError
from microbatch.messages import Reply, Usage
from microbatch.protocols import ChatCall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from microbatch.accounting.events import Listeners
    from microbatch.accounting.stats import Ledger
    from microbatch.batching.account import Permit
    from microbatch.batching.books import Bill, Books, Pricing
    from microbatch.batching.bounds import Bounds
    from microbatch.batching.cost import Costs
    from microbatch.batching.demultiplexer import Answer
    from microbatch.batching.learned import Learned
    from microbatch.batching.ticket import Ticket
    from microbatch.messages import Route
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


class Calls:
    """Makes calls and settles what they answer.

    Args:
        send: Makes the attempts of a call.
        ledger: Where everything is counted.
        books: Where ended calls are booked.
        costs: What calls are charged, and how long their replies may be.
        bounds: Judges replies that are longer than expected.
        keep: Puts answers into the cache, after their callers have them; None if there is none.
        listeners: Who is told of calls and of answers.
        count: Counts a text's tokens.
        price: What prices a model's usage.
        default_model: The transport's model, for prices when neither caller nor endpoint names one.
        settled: Told how many tickets have just been answered here.
        draw: Where id endings come from.
        now: The clock, in seconds.
        early: Whether callers are answered while the reply still streams.
        canary: Whether combined prompts end in a canary.
    """

    def __init__(
        self,
        *,
        send: Send,
        ledger: Ledger,
        books: Books,
        costs: Costs,
        bounds: Bounds,
        keep: Keep | None,
        listeners: Listeners,
        count: Callable[[str], int],
        price: Pricing,
        default_model: str | None,
        settled: Callable[[int], None],
        draw: Callable[[int], Sequence[str]],
        now: Callable[[], float],
        early: bool,
        canary: bool,
    ) -> None:
        self._send = send
        self._ledger = ledger
        self._books = books
        self._costs = costs
        self._bounds = bounds
        self._keep = keep
        self._listeners = listeners
        self._count = count
        self._price = price
        self._default_model = default_model
        self._settled = settled
        self._draw = draw
        self._now = now
        self._early = early
        self._canary = canary

    # --- combined calls

    def compose(
        self, tickets: list[Ticket], learned: Learned, permit: Permit, *, route: Route = "batch", instead: bool = False
    ) -> Batch:
        """Compose a combined call.

        Args:
            tickets: What it carries. They are of one lane, and all still wait.
            learned: What is known of the lane.
            permit: What pays it.
            route: What replies name as their route.
            instead: Whether it is made instead of one whose bound was too low, which says nothing of what combining costs.
        """
        spec = tickets[0].spec
        lines = [ticket.line for ticket in tickets]
        canary = draw_word(self._draw) if self._canary else None
        if canary is not None:
            lines.append(canary_line(canary))
        prompt, ids = compose(instruction(spec.answer.words), lines, self._draw)
        max_tokens = len(tickets) * output_reserve(spec.max_tokens) if spec.max_tokens else None
        bound, tries = self._bounds.tried(
            spec, learned, len(tickets), self._costs.bound(tickets, learned, permit.account.max_tokens)
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
        exchange = Exchange(len(tickets), route, self._now(), self._price(spec.model or self._default_model), permit)
        exchange.carry(tickets)
        batch = Batch(tickets, ids, call, learned, permit, exchange, early=self._early, canary=canary, tries=tries)
        batch.instead = instead
        self._bounds.of(spec.model).trying += tries
        self._ledger.batches += 1
        self._ledger.batched_items += len(tickets)
        if route == "fallback":
            self._ledger.fallback_calls += 1
            learned.balance.calls += not instead
        else:
            learned.balance.begin(len(tickets))
        return batch

    async def batch(self, batch: Batch) -> Outcome:
        """Send *batch*, answer whom it answers, and tell what it left open."""
        exchange, loop = batch.exchange, asyncio.get_running_loop()

        def on_text(text: str) -> None:
            batch.heard = batch.heard or bool(text)
            if exchange.first_text is None:
                exchange.first_text = self._now()
            answers = batch.demultiplexer.feed(text)
            if answers:
                _measure(answers, batch.answer_bytes)
                if not batch.answers:
                    # When this turn is over: if it brings the end of the reply, all is known of it that there is to know.
                    loop.call_soon(self._answer_early, batch)
                batch.answers += answers
                exchange.found += len(answers)
            if batch.past_the_end and batch.call.stream:
                loop.call_soon(exchange.stop)  # what was answered stands; what would follow is for nobody

        def on_cut(completion: Completion | None) -> bool:
            self._hand_out(batch)
            # Cut once more, it is the size that is to blame (a proxy's time limit): a smaller call has better chances.
            if batch.repeated or exchange.waiting <= 0 or any(ticket.reply is not None for ticket in batch.tickets):
                return False
            self._books.divide(batch, completion, self._books.bill(batch, completion))
            batch.reset()
            batch.repeated = True
            return True

        try:
            completion, error = await self._exchange(exchange, batch.call, on_text, on_cut, partial(self._lower, batch))
            self._lower(batch, error)
            if batch.bug is not None:
                raise batch.bug
            how = ending(completion, error, heard=batch.heard)
            demultiplexer = batch.demultiplexer
            answers = demultiplexer.close(ended=how in ("complete", "length", "refused"))
            sound = exchange.found + len(answers) > 0
            trusted = batch.canary is None
            if not trusted:
                trusted = any(index == len(batch.tickets) for index, _ in answers)
                answers = [answer for answer in answers if answer[0] < len(batch.tickets)] if trusted else []
                self._ledger.canaries_failed += not trusted and how == "complete"
            _measure(answers, batch.answer_bytes)
            batch.answers += answers
            bill = self._books.bill(batch, completion)
            self._hand_out(batch, bill)
            alone = self._books.divide(batch, completion, bill, each=self._keep is not None)
        finally:
            exchange.end()
            self._bounds.of(batch.call.model).trying -= batch.tries
        if self._listeners.call is not None:
            told = called(
                *(exchange, batch.call, batch.tickets, completion, error, self._now()),
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
        open_: list[Open] = []
        if exchange.waiting > 0:
            open_ += left_open(batch.tickets, demultiplexer, truncated=how == "length", trusted=trusted)
        damaged = bool(open_) and (demultiplexer.damaged or any(True for _ in demultiplexer.faults()))
        outcome = Outcome(
            *(how, len(batch.tickets), open_, error, damaged),
            heard=batch.heard,
            sound=sound,
            in_order=not demultiplexer.disordered,
            past_the_end=batch.past_the_end,
            bounded=batch.bound is not None,
        )
        self._bounds.judge(batch.tickets[0].spec, batch.learned, outcome, completion, lambda: self._fresh(batch))
        return outcome

    def _fresh(self, batch: Batch) -> int | None:
        """Return the bound that *batch* would have by what is known now."""
        return self._costs.bound(batch.tickets, batch.learned, batch.permit.account.max_tokens)

    def _lower(self, batch: Batch, failure: RequestFailed | None) -> None:
        """Learn from a refusal of the bound of *batch*, so that neither its next attempt nor later calls exceed what is allowed."""
        said = failure.token_limits if isinstance(failure, StatusError) else None
        if said is None:
            return
        self._costs.learn_refused(batch.tickets, batch.learned, said)
        bound, fresh = batch.call.bound, self._fresh(batch)
        if bound is not None:
            batch.call.bound = bound if fresh is None else min(bound, fresh)
        elif said.context is not None and fresh is not None and batch.bound is not None and fresh < batch.bound:
            batch.call.bound = fresh  # the endpoint has named its window only; what that leaves is known here

    async def _keep_answers(self, completion: Completion | None, answered: Iterable[tuple[Ticket, Usage]]) -> None:
        """Put into the cache what a call has answered, if it ended as it should."""
        if self._keep is None or completion is None or completion.finish_reason != "stop":
            return
        kept = [pair for pair in answered if pair[0].terms.key is not None and pair[0].reply is not None]
        if kept:
            await self._keep(kept)

    def _answer_early(self, batch: Batch) -> None:
        """Hand out what has been found while the rest of the reply is still on its way; called by the loop."""
        if not batch.answers:
            return  # the reply has ended since
        try:
            self._hand_out(batch)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as bug:  # noqa: BLE001 it is the batch's; a Rust panic is no Exception
            batch.bug = bug
            batch.exchange.stop()
        else:
            if not batch.exchange.waiting and batch.call.stream:
                batch.exchange.linger()

    def _hand_out(self, batch: Batch, bill: Bill | None = None) -> None:
        """Hand the answers found to their callers, with their shares of *bill* if the call is over."""
        answers, batch.answers = batch.answers, []
        if answers:
            limit = batch.tickets[0].spec.max_tokens  # equal in a lane
            batch.exchange.waiting -= self._answer(
                batch.tickets, answers, batch.exchange, batch.answer_bytes, limit, bill=bill
            )

    def _longer_than(self, text: str, limit: int) -> bool:
        try:
            return estimate(text, self._count) > limit
        except ConfigError:  # the counter failed; an answer is not dropped for that
            return False

    # --- single calls

    async def single(self, ticket: Ticket, permit: Permit, *, learned: Learned | None = None) -> RequestFailed | None:
        """Send *ticket* alone and answer it; return the error instead if it cannot be answered.

        An answer that is empty or does not fit is asked for once more.

        Args:
            ticket: The request.
            permit: What pays the call.
            learned: What is known of its lane, if a combined call has left it open; else None.
        """
        if ticket.future.done():
            return None  # its caller left before this call got its turn
        error = await self._ask_alone(ticket, permit, learned)
        if isinstance(error, MalformedAnswer) and not ticket.future.done():
            error = await self._ask_alone(ticket, permit.account.permit(permit.tokens), learned)
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

    async def _ask_alone(self, ticket: Ticket, permit: Permit, learned: Learned | None) -> RequestFailed | None:
        if learned is not None:
            self._ledger.fallback_calls += 1
            self._ledger.singles_by_reason[AloneReason.FALLBACK] += 1
            learned.balance.calls += 1
        pieces: list[str] = []
        price = self._price(ticket.spec.model or self._default_model)
        route: Route = "single" if learned is None else "fallback"
        exchange = Exchange(1, route, self._now(), price, permit)
        exchange.carry([ticket])

        def on_text(text: str) -> None:
            pieces.append(text)
            if exchange.first_text is None:
                exchange.first_text = self._now()

        def on_cut(completion: Completion | None) -> bool:
            pieces.clear()
            if completion is None:
                self._ledger.unreported_calls += 1
            else:
                bill = self._books.bill_alone(completion, exchange)
                self._books.divide_alone(ticket, completion, bill, learned)
            return True

        completion: Completion | None = None
        error: RequestFailed | None = None
        call = self.compose_alone(ticket)
        try:
            completion, error = await self._exchange(exchange, call, on_text, on_cut)
            if completion is None:
                return error
            output, text, error = read_alone(ticket, completion, "".join(pieces))
            bill = self._books.bill_alone(completion, exchange)
            if error is None:
                answers, sizes = [(0, (output, text))], [0]
                _measure(answers, sizes)
                self._answer([ticket], answers, exchange, sizes, None, completion.body, bill)
            self._books.divide_alone(ticket, completion, bill, learned)
        finally:
            exchange.end()
            if self._listeners.call is not None:
                told = called(
                    *(exchange, call, [ticket], completion, error, self._now()), default_model=self._default_model
                )
                self._listeners.call(told)
        if error is None:
            await self._keep_answers(completion, [(ticket, completion.usage or Usage())])
        return error

    # --- both

    async def _exchange(
        self,
        exchange: Exchange,
        call: ChatCall,
        on_text: Callable[[str], None],
        on_cut: Callable[[Completion | None], bool],
        on_failure: Callable[[RequestFailed | None], None] | None = None,
    ) -> tuple[Completion | None, RequestFailed | None]:
        def on_attempt() -> None:
            if on_failure is not None and exchange.permit is not None:
                on_failure(exchange.permit.error)
            self._ledger.upstream_calls += 1
            exchange.attempts += 1

        if exchange.waiting <= 0:
            return None, None  # everybody left before the task of this call got its turn
        # A scope of our own: this is on every batch's path, and `asyncio.timeout` would be 1 % of a burst. The rules are the same.
        task = exchange.task = asyncio.current_task()
        asked_before = task.cancelling() if task is not None else 0
        try:
            return await self._send(call, on_text, on_attempt=on_attempt, on_cut=on_cut, permit=exchange.permit), None
        except RequestFailed as error:
            return None, error
        except asyncio.CancelledError as error:
            asked = task.cancelling() - asked_before if task is not None else 0
            if not asked:
                # Nobody wants this task to end: the transport was cancelled inside, by a scope or a task of its own.
                failure = TransportError("the transport cancelled the call")
                failure.__cause__ = error
                return None, failure
            if not exchange.stopped or asked > 1:
                raise  # somebody else wants the task to end
            return None, None  # nobody waits any more
        finally:
            exchange.task = None
            if exchange.stopped and task is not None:
                task.uncancel()

    def _remaining(self, tickets: list[Ticket]) -> float | None:
        """Return the longest time any caller will still wait, in seconds; None if one sets no limit."""
        latest = 0.0
        for ticket in tickets:
            if ticket.deadline is None:
                return None
            latest = max(latest, ticket.deadline.at)
        return max(0.0, latest - self._now())

    def _answer(
        self,
        tickets: Sequence[Ticket],
        answers: Iterable[Answer],
        exchange: Exchange,
        sizes: list[int],
        limit: int | None,
        body: dict[str, Any] | None = None,
        bill: Bill | None = None,
    ) -> int:
        """Hand callers their answers; return how many have been answered.

        Args:
            tickets: The requests of the call.
            answers: Position among them, and output and text, of each answer.
            exchange: The call.
            sizes: The bytes of the answers' texts, by position.
            limit: Tokens beyond which an answer is not handed out, or None.
            body: The endpoint's JSON of a single call, or None.
            bill: What each of the tickets has to pay for the call, which is over; None to hand out an estimate.
        """
        now, answered, estimated = self._now(), 0, 0
        route, price, size, sent = exchange.route, exchange.price, exchange.size, exchange.sent
        wait = exchange.wait  # one bound method for all
        spec = tickets[0].spec  # the requests of a call are of one lane
        model, shared = spec.model or self._default_model, spec.shared_chars // size
        finish_reason = request_id = shares = None
        if bill is not None:
            shares, price, final = bill.shares, bill.price, bill.completion
            model, finish_reason, request_id = final.model or model, final.finish_reason, final.request_id
        tell = self._listeners.settle
        for index, (output, text) in answers:
            ticket, length = tickets[index], sizes[index]
            future = ticket.future
            if future.done() or (limit is not None and length > limit and self._longer_than(text, limit)):
                continue
            if shares is not None and ticket.past is None:
                usage = shares[index]
            else:
                estimated += 1
                # A token is about 4 bytes of English; this stands only until the call has ended and is booked.
                usage = Usage((shared + len(ticket.line)) // 4, length // 4 + 1, 0, True)
                if ticket.past is not None and ticket.past.usage is not None:
                    usage = ticket.past.usage + usage
            created = ticket.created
            # By position, in the order of the fields: this is on every answer's path.
            ticket.reply = reply = Reply(
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
            future.set_result(reply)
            if ticket.deadline is not None:
                ticket.deadline.cancel()
            if ticket.file is not None:
                ticket.file.drop(ticket)
            if tell is not None and ticket.flight is None:
                tell(settled(spec, created, ticket.origin, now, reply=reply))
            answered += 1
        if bill is not None:
            bill.settled = answered - estimated
        self._settled(answered)
        return answered


def _measure(answers: Iterable[Answer], sizes: list[int]) -> None:
    """Note in *sizes* how many bytes the text of each answer has."""
    for index, (_, text) in answers:
        sizes[index] = len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
