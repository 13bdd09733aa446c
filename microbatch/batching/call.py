"""One call: composed, sent, taken apart, its answers handed to their callers and its cost divided among them."""

from __future__ import annotations

import asyncio
import logging
from itertools import compress
from typing import TYPE_CHECKING, Any, Literal, Protocol

import anyio
import msgspec

from microbatch.accounting.stats import split
from microbatch.batching.demultiplexer import Demultiplexer
from microbatch.batching.framing import measure
from microbatch.batching.lane import AloneReason, output_reserve
from microbatch.batching.prompt import compose, instruction
from microbatch.errors import (
    BadRequest,
    ConfigError,
    ContextTooLong,
    Filtered,
    MalformedAnswer,
    MissingAnswer,
    Refused,
    ReplyError,
    RequestFailed,
    TransportError,
    TruncatedReply,
)
from microbatch.messages import Reply, Usage
from microbatch.protocols import ChatCall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    Pricing = Callable[[str | None], Callable[[Usage], float] | None]

    from microbatch.accounting.stats import Ledger
    from microbatch.batching.demultiplexer import Answer
    from microbatch.batching.lane import Learned, Ticket
    from microbatch.messages import Route
    from microbatch.protocols import Completion

USAGE_PATIENCE = 2.0
"""Seconds that the rest of a reply is read for its usage once every caller has been answered."""

# Batches after which it can be told whether combining pays.
_ENOUGH_BATCHES = 20

# Statuses of a refusal that one of the items may be to blame for. 404 names the model, not the request.
_BLAMEABLE = frozenset({400, 413, 422})

logger = logging.getLogger("microbatch")

Ending = Literal["complete", "length", "cut", "refused", "failed"]
"""How a combined call ended: with a reply, at the token limit, cut off, refused for something an item may be to blame for,
or failed for reasons that no item has to do with."""


class Send(Protocol):
    """See `microbatch.transports.retry.Sender.send`."""

    async def __call__(
        self, call: ChatCall, on_text: Callable[[str], None], on_attempt: Callable[[], None]
    ) -> Completion:
        """Send *call* until it succeeds or fails for good."""
        ...


class Exchange:
    """A call under way, how many callers still wait for it, and what their replies say of it.

    Attributes:
        waiting: Callers that have neither been answered nor left.
        size: Requests it carries.
        route: What their replies name as their route.
        sent: Loop time at which it was sent.
        price: What prices its usage, or None if that is unknown.
        ended: Whether it is over and its cost divided.
        scope: What cancels it, while it is being sent.
    """

    __slots__ = ("_ended", "ended", "price", "route", "scope", "sent", "size", "waiting")

    def __init__(self, size: int, route: Route, sent: float, price: Callable[[Usage], float] | None) -> None:
        self.waiting = self.size = size
        self.route: Route = route
        self.sent = sent
        self.price = price
        self.scope: asyncio.Timeout | None = None
        self.ended = False
        self._ended: anyio.Event | None = None

    def linger(self, now: float) -> None:
        """Everyone has been answered: only the usage is still of interest, for a while."""
        if self.scope is not None and not self.scope.expired():
            self.scope.reschedule(now + USAGE_PATIENCE)

    def abandoned(self) -> None:
        """One caller left without an answer; the last one takes the call with it."""
        self.waiting -= 1
        if self.waiting <= 0 and self.scope is not None and not self.scope.expired():
            self.scope.reschedule(0.0)

    def end(self) -> None:
        """The call is over and its cost divided."""
        self.ended = True
        if self._ended is not None:
            self._ended.set()

    async def wait(self) -> None:
        """Wait until the call is over and its cost divided."""
        if not self.ended:
            if self._ended is None:
                self._ended = anyio.Event()
            await self._ended.wait()


class Open(msgspec.Struct):
    """A request that a combined call left open, and the error its caller would get if it were not asked again."""

    ticket: Ticket
    error: ReplyError


class Outcome(msgspec.Struct):
    """How a combined call ended.

    Attributes:
        ending: See `Ending`.
        asked: Requests it carried.
        open: Those that still wait for an answer.
        error: What ended it, for endings other than "complete" and "length".
    """

    ending: Ending
    asked: int
    open: list[Open]
    error: RequestFailed | None = None


class Batch:
    """A combined call, composed and ready to go."""

    __slots__ = ("answer_bytes", "call", "demultiplexer", "exchange", "heard", "ids", "learned", "tickets")

    def __init__(
        self,
        tickets: list[Ticket],
        ids: list[str],
        call: ChatCall,
        learned: Learned,
        exchange: Exchange,
        *,
        early: bool,
    ) -> None:
        self.tickets = tickets
        self.ids = ids
        self.call = call
        self.learned = learned
        self.exchange = exchange
        self.demultiplexer = Demultiplexer(ids, [ticket.answer.decode for ticket in tickets], early=early)
        self.answer_bytes = [0] * len(tickets)
        self.heard = False  # whether any text has come


class Calls:
    """Makes calls and settles what they answer.

    Args:
        send: Makes the attempts of a call.
        ledger: Where everything is counted.
        count: Counts a text's tokens.
        exact: Whether *count* is that of a model's own encoding; asked with None for the transport's model.
        price: What prices a model's usage.
        default_model: The transport's model, for prices when neither caller nor endpoint names one.
        settled: Told how many tickets have just been answered here.
        draw: Where id endings come from.
        now: The clock, in seconds.
        early: Whether callers are answered while the reply still streams.
    """

    def __init__(
        self,
        *,
        send: Send,
        ledger: Ledger,
        count: Callable[[str], int],
        exact: Callable[[str | None], bool],
        price: Pricing,
        default_model: str | None,
        settled: Callable[[int], None],
        draw: Callable[[int], Sequence[str]],
        now: Callable[[], float],
        early: bool,
    ) -> None:
        self._send = send
        self._ledger = ledger
        self._count = count
        self._exact = exact
        self._price = price
        self._default_model = default_model
        self._settled = settled
        self._draw = draw
        self._now = now
        self._early = early
        self._paid_batches = 0

    # --- combined calls

    def compose(self, tickets: list[Ticket], learned: Learned, *, route: Route = "batch") -> Batch:
        """Compose a combined call for *tickets*, which are of one lane and all still wait."""
        spec = tickets[0].spec
        prompt, ids = compose(instruction(spec.answer.words), [ticket.line for ticket in tickets], self._draw)
        somebody_awaits = any(ticket.on_taken is None for ticket in tickets)
        call = ChatCall(
            messages=[*spec.shared, {"role": "user", "content": prompt}],
            model=spec.model,
            params=spec.params,
            headers=spec.headers,
            schema=spec.answer.batch_schema,
            strict=spec.answer.strict,
            max_tokens=len(tickets) * output_reserve(spec.max_tokens) if spec.max_tokens else None,
            stream=self._early and somebody_awaits,
            timeout=self._remaining(tickets),
        )
        exchange = Exchange(len(tickets), route, self._now(), self._price(spec.model or self._default_model))
        for ticket in tickets:
            ticket.call = exchange
        batch = Batch(tickets, ids, call, learned, exchange, early=self._early)
        self._ledger.batches += 1
        self._ledger.batched_items += len(tickets)
        if route == "fallback":
            self._ledger.fallback_calls += 1
        return batch

    async def batch(self, batch: Batch) -> Outcome:
        """Send *batch*, answer whom it answers, and tell what it left open."""
        demultiplexer, exchange = batch.demultiplexer, batch.exchange

        def on_text(text: str) -> None:
            batch.heard = True
            answers = demultiplexer.feed(text)
            if answers:
                self._deliver(batch, answers)

        completion, error = await self._exchange(exchange, batch.call, on_text, batch.tickets)
        ending = _ending(completion, error, heard=batch.heard)
        answers = demultiplexer.close(ended=ending in ("complete", "length", "refused"))
        if answers:
            self._deliver(batch, answers)
        self._ledger.late_duplicates += demultiplexer.late_duplicates
        self._ledger.unknown_ids += demultiplexer.unknown_ids
        self._divide(batch, completion)
        if error is None:
            error = _complaint(completion)
        return Outcome(ending, len(batch.tickets), list(_left_open(batch, truncated=ending == "length")), error)

    def _deliver(self, batch: Batch, answers: list[Answer]) -> None:
        """Hand *answers*, pairs of position and decoded answer, to their callers."""
        now, exchange, tickets, sizes = self._now(), batch.exchange, batch.tickets, batch.answer_bytes
        limit = tickets[0].spec.max_tokens  # equal in a lane
        answered: list[tuple[Ticket, Any, str]] = []
        for index, (output, text) in answers:
            ticket = tickets[index]
            sizes[index] = length = len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
            if ticket.future.done() or (limit is not None and length > limit and self._longer_than(text, limit)):
                continue
            answered.append((ticket, output, text))
        self._answer(answered, exchange, now)
        exchange.waiting -= len(answered)
        if not exchange.waiting and batch.call.stream:
            exchange.linger(now)
        self._settled(len(answered))

    def _longer_than(self, text: str, limit: int) -> bool:
        try:
            return self._count(text) > limit
        except ConfigError:  # the counter failed; an answer is not dropped for that
            return False

    # --- single calls

    async def single(self, ticket: Ticket, *, route: Route = "single") -> RequestFailed | None:
        """Send *ticket* alone and answer it; return the error instead if it cannot be answered.

        An answer that is empty or does not fit is asked for once more.
        """
        error: RequestFailed | None = None
        for _ in range(2):
            if ticket.future.done():
                return None
            if route == "fallback":
                self._ledger.fallback_calls += 1
                self._ledger.singles_by_reason[AloneReason.FALLBACK] += 1
            error = await self._ask_alone(ticket, route)
            if not isinstance(error, MalformedAnswer):
                break
        return error

    def compose_alone(self, ticket: Ticket) -> ChatCall:
        """Return the call that carries *ticket* alone, with its own messages."""
        spec = ticket.spec
        return ChatCall(
            messages=ticket.messages or [*spec.shared, {"role": "user", "content": ticket.text}],
            model=spec.model,
            params=spec.params,
            headers=spec.headers,
            schema=ticket.answer.single_schema,
            strict=ticket.answer.strict,
            hint=ticket.answer.hint,
            max_tokens=spec.max_tokens,
            timeout=self._remaining([ticket]),
        )

    async def _ask_alone(self, ticket: Ticket, route: Route) -> RequestFailed | None:
        pieces: list[str] = []
        price = self._price(ticket.spec.model or self._default_model)
        exchange = ticket.call = Exchange(1, route, self._now(), price)
        completion, error = await self._exchange(exchange, self.compose_alone(ticket), pieces.append, [ticket])
        if completion is None:
            exchange.end()
            return error
        output, text, error = _read_alone(ticket, completion, "".join(pieces))
        if error is None and not ticket.future.done():
            self._answer([(ticket, output, text)], exchange, self._now(), completion.body)
            self._settled(1)
        self._divide_alone(ticket, completion)
        return error

    # --- both

    async def _exchange(
        self, exchange: Exchange, call: ChatCall, on_text: Callable[[str], None], tickets: list[Ticket]
    ) -> tuple[Completion | None, RequestFailed | None]:
        def on_attempt() -> None:
            self._ledger.upstream_calls += 1
            for ticket in tickets:
                ticket.attempts += 1

        if exchange.waiting <= 0:
            return None, None  # everybody left before the task of this call got its turn
        scope = exchange.scope = asyncio.timeout(None)
        try:
            async with scope:
                return await self._send(call, on_text, on_attempt), None
        except RequestFailed as error:
            return None, error
        except TimeoutError:
            return None, None  # nobody waits any more
        finally:
            exchange.scope = None

    def _remaining(self, tickets: list[Ticket]) -> float | None:
        """Return the longest time any caller will still wait, in seconds; None if one sets no limit."""
        latest = 0.0
        for ticket in tickets:
            if ticket.deadline is None:
                return None
            latest = max(latest, ticket.deadline)
        return max(0.0, latest - self._now())

    def _answer(
        self,
        answers: Iterable[tuple[Ticket, Any, str]],
        exchange: Exchange,
        now: float,
        body: dict[str, Any] | None = None,
    ) -> None:
        """Hand callers their answers (ticket, output and text of each), with an estimate of what they cost."""
        route, price, size, sent = exchange.route, exchange.price, exchange.size, exchange.sent
        wait = exchange.wait  # one bound method for all
        for ticket, output, text in answers:
            spec, created = ticket.spec, ticket.created
            # A token is about 4 bytes of English; this stands only until the call has ended.
            usage = Usage((spec.shared_chars // size + len(ticket.line)) // 4, len(text) // 4 + 1, 0, True)
            if ticket.usage is not None:
                usage = ticket.usage + usage
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
                spec.model or self._default_model,
                None,
                None,
                body,
                wait,
            )
            ticket.future.set_result(reply)
            if ticket.timer is not None:
                ticket.timer.cancel()

    def _divide(self, batch: Batch, completion: Completion | None) -> None:
        """Divide what the combined call cost among its tickets; it is over."""
        tickets, exchange = batch.tickets, batch.exchange
        usage = completion.usage if completion is not None else None
        if completion is not None:
            _finish(tickets, completion)
        if usage is None:
            self._ledger.unreported_calls += completion is not None or batch.heard
        else:
            lines = [len(ticket.line) for ticket in tickets]
            price = self._price_of(completion, exchange)
            self._book(tickets, _shares(usage, lines, batch.answer_bytes), price)
            self._pay(batch, usage, lines, price)
        exchange.end()

    def _divide_alone(self, ticket: Ticket, completion: Completion) -> None:
        usage = completion.usage
        if usage is None:
            self._ledger.unreported_calls += 1
        else:
            price = self._price_of(completion, ticket.call)
            self._book([ticket], [usage], price)
            self._ledger.pay(usage, usage if ticket.reply is not None else Usage(), price)
        _finish([ticket], completion)
        ticket.call.end()

    def _price_of(self, completion: Completion | None, exchange: Exchange) -> Callable[[Usage], float] | None:
        """Return the price of the model that answered, else of the one that was asked for."""
        answered = None if completion is None or completion.model is None else self._price(completion.model)
        return answered or exchange.price

    def _book(self, tickets: Sequence[Ticket], shares: Iterable[Usage], price: Callable[[Usage], float] | None) -> None:
        """Book each ticket's share of a call that has ended: on its reply, on the ticket for later, or as unclaimed."""
        for ticket, share in zip(tickets, shares, strict=True):
            cost_usd = None if price is None else price(share)
            if ticket.usage is not None:
                share = ticket.usage + share  # noqa: PLW2901 with its shares of earlier calls
                cost_usd = None if cost_usd is None or ticket.cost_usd is None else ticket.cost_usd + cost_usd
                ticket.usage = None
            reply = ticket.reply
            if reply is not None and not ticket.unclaimed:
                reply.usage = share
                reply.cost_usd = cost_usd
            elif ticket.future.done():
                self._ledger.unclaimed += share
            else:
                ticket.usage, ticket.cost_usd = share, cost_usd

    def _pay(self, batch: Batch, usage: Usage, lines: list[int], price: Callable[[Usage], float] | None) -> None:
        """Book the call, and what its answered requests would have cost one by one."""
        learned, asked, sizes = batch.learned, len(batch.tickets), batch.answer_bytes
        mine = [ticket.reply is not None for ticket in batch.tickets]
        answered = sum(mine)
        alone = Usage()
        if answered:
            tokens_a_byte = usage.completion_tokens / (sum(sizes) or 1)
            learned.record_answers([round(size * tokens_a_byte) for size in compress(sizes, mine)])
            if learned.framing is None:
                learned.framing = measure(
                    batch.call, batch.ids, batch.tickets, usage, self._count, exact=self._exact(batch.call.model)
                )
            share = sum(compress(lines, mine)) / sum(lines)
            alone = learned.framing.alone(usage, asked=asked, answered=answered, answered_share=share)
        self._ledger.pay(usage, alone, price)
        self._warn_if_dearer()

    def _warn_if_dearer(self) -> None:
        """Say once, when there is enough to judge by, that combining costs more than it saves."""
        self._paid_batches += 1
        if self._paid_batches != _ENOUGH_BATCHES or not self._ledger.costs_more:
            return
        logger.warning(
            "combining requests costs more than it saves here (%s): the messages they share are too short, or the answers too long",
            self._ledger.comparison,
        )


def _ending(completion: Completion | None, error: RequestFailed | None, *, heard: bool) -> Ending:
    if error is not None:
        if isinstance(error, ContextTooLong | Filtered) or (
            isinstance(error, BadRequest) and error.status in _BLAMEABLE
        ):
            return "refused"
        # An error after the first words is a cut: what was finished before it stands.
        return "cut" if heard and isinstance(error, TransportError) else "failed"
    if completion is None or completion.finish_reason in (None, "error"):
        return "cut"
    if completion.refusal is not None or completion.finish_reason == "content_filter":
        return "refused"
    return "length" if completion.finish_reason == "length" else "complete"


def _complaint(completion: Completion | None) -> RequestFailed | None:
    """Return what is wrong with a reply as a whole, or None."""
    if completion is None:
        return None
    if completion.refusal is not None:
        return Refused("the model declined to answer", raw=completion.refusal)
    if completion.finish_reason == "content_filter":
        return Filtered(
            "the endpoint's content filter stopped the answer", status=200, request_id=completion.request_id
        )
    if completion.finish_reason in (None, "error"):
        return TransportError("the reply was cut off: it ended without a finish_reason")
    return None


def _left_open(batch: Batch, *, truncated: bool) -> Iterator[Open]:
    """Yield the requests of an ended call that still wait, with what their callers would be told."""
    faults = {index: (fault, raw) for index, fault, raw in batch.demultiplexer.faults()}
    for index, ticket in enumerate(batch.tickets):
        if ticket.future.done():
            continue
        fault, raw = faults.get(index, ("overlong", ""))
        error: ReplyError
        if fault == "missing" and truncated:
            error = TruncatedReply("the combined reply hit the token limit before this answer")
        elif fault == "missing":
            error = MissingAnswer("the combined reply held no answer to this request")
        elif fault == "repeated":
            error = MalformedAnswer("the combined reply held several answers to this request")
        elif fault == "overlong":
            error = MalformedAnswer("the answer is longer than max_tokens allows")
        else:
            error = MalformedAnswer("the answer in the combined reply does not fit output_type", raw=raw)
        yield Open(ticket, error)


def _read_alone(ticket: Ticket, completion: Completion, content: str) -> tuple[Any, str, RequestFailed | None]:
    """Return output and text of a single reply, and the error if there is none to be had."""
    if ticket.messages is not None and ticket.answer.is_text and completion.finish_reason is not None:
        return content, content, None  # tool calls and the like: what matters is in `body`
    error = _complaint(completion)
    if error is None and completion.finish_reason == "length" and not ticket.answer.is_text:
        error = TruncatedReply("the answer was cut off by the token limit", raw=content)
    if error is not None:
        return None, "", error
    try:
        return *ticket.answer.decode_single(content), None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as reason:  # noqa: BLE001 a user's validator may raise anything; a Rust panic is no Exception
        wrong = "is empty" if not content.strip() else "does not fit output_type"
        malformed = MalformedAnswer(f"the answer {wrong}", raw=content)
        malformed.__cause__ = reason
        return None, "", malformed


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


def _shares(usage: Usage, lines: list[int], answer_bytes: list[int]) -> Iterator[Usage]:
    """Divide *usage* by the bytes of each request's line and answer."""
    prompts = split(usage.prompt_tokens, lines)
    completions = split(usage.completion_tokens, answer_bytes)
    cached = split(usage.cached_tokens, lines) if usage.cached_tokens else [0] * len(lines)
    return map(Usage, prompts, completions, cached)
