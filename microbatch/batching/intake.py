"""Takes requests in: what they are, whether they may share a prompt, and where they wait.

This is on every submit's path, so it is written with care for what each step costs; see `python -m bench overhead`.
"""

from __future__ import annotations

import contextvars
import logging
from typing import TYPE_CHECKING, Any

from microbatch.batching.lane import Lane
from microbatch.batching.lane_table import MAX_LINE_BYTES
from microbatch.batching.request import canonical_messages, check_messages, own_text, read_messages, spec_of
from microbatch.batching.single_flight import Seat, awaited
from microbatch.batching.single_queue import SingleQueue
from microbatch.batching.ticket import HIGH, NEVER, AloneReason, Ticket
from microbatch.errors import ConfigError
from microbatch.prompt.compose import ID_TOKENS, item_line

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Hashable

    from microbatch.accounting.stats import Ledger
    from microbatch.batching.admission import AdmissionQueue
    from microbatch.batching.estimates import Estimates
    from microbatch.batching.lane_table import Lanes
    from microbatch.batching.permits import Account, Accounts
    from microbatch.batching.request import Options
    from microbatch.batching.single_flight import InFlightIndex, SingleFlight
    from microbatch.batching.ticket import CallerOptions, Charge, Spec
    from microbatch.messages import Messages, Reply
    from microbatch.policy import FlushPolicy

logger = logging.getLogger("microbatch")

_ALONE_WARNING = 100
"""Requests of one lane in a row that went alone, though they need not have by their form, before a warning is logged."""


class Intake:
    """The way in.

    Args:
        policy: What may travel together.
        ledger: Where everything is counted.
        admission: The places for accepted requests.
        lanes: Where requests wait that may share a prompt.
        flights: Those that others may join.
        accounts: Whose permits each needs.
        estimates: What each is charged.
        count: Counts a text's tokens.
        upper: Bounds a line's tokens from above, or None to use its bytes.
        ratio: Tells what a generated token of a model costs, in prompt tokens.
        capture: Returns what hooks keep of a caller, in whose context it is called; None if they keep nothing.
        enqueue: Lets a queue that is due take its turns.
        expire: Ends a ticket whose timeout has passed.

    Attributes:
        alone: The queues of requests that go alone, by account, tenant and priority.
    """

    def __init__(
        self,
        policy: FlushPolicy,
        ledger: Ledger,
        *,
        admission: AdmissionQueue,
        lanes: Lanes,
        flights: SingleFlight,
        accounts: Accounts,
        estimates: Estimates,
        count: Callable[[str], int],
        upper: Callable[[str], int] | None,
        ratio: Callable[[str | None], float],
        capture: Callable[[], Any] | None,
        enqueue: Callable[[SingleQueue], None],
        expire: Callable[[Ticket], None],
    ) -> None:
        self.alone: dict[Hashable, SingleQueue] = {}
        self._policy = policy
        self._bypasses = policy.when_full == "bypass"
        self._ledger = ledger
        self._admission = admission
        self._lanes = lanes
        self._flights = flights
        self._scratch = bytearray()
        self._accounts = accounts
        self._estimates = estimates
        self._count = count
        self._upper = upper
        self._ratio = ratio
        self._capture = capture
        self._enqueue = enqueue
        self._expire = expire
        self._loop: asyncio.AbstractEventLoop
        self._context = contextvars.Context()  # timers run in it, not in that of the caller who set them

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Serve callers of *loop* from now on."""
        self._loop = loop

    def accept(
        self,
        messages: Messages,
        options: Options,
        terms: CallerOptions,
        on_taken: Callable[[Any], None] | None = None,
    ) -> Ticket | Seat:
        """Queue a request; the future of what is returned is settled in the end, whatever happens.

        If there is no room for it, it goes alone at once, past those who wait. If it is not accepted, its place goes to the next caller
        that waits for one.

        Args:
            messages: The chat messages, checked here.
            options: The checked options.
            terms: On what terms its caller asks.
            on_taken: For bulk work, which waits for full batches: called when it leaves its queue.

        Raises:
            ConfigError: The messages cannot be sent; nothing was queued.
        """
        try:
            if type(messages) is not list or not messages:
                check_messages(messages)
            loop, admission, lane = self._loop, self._admission, self._lanes.latest
            now = loop.time()
            deadline = None if terms.timeout is None else terms.deadline(now)
            text: str | None = None
            if lane is not None and (options is lane.options or lane.serves(options)):
                text = own_text(messages, lane.spec.plain)
            if text is None and options.combinable:
                lane, text = self._read(messages, options)
            if text is None or lane is None:
                who = self._take_alone(messages, options, now, on_taken, terms)
            else:
                line = item_line(text, self._scratch)
                counted = None if self._upper is None else self._upper(f" {line.decode()}\n")
                bypass = self._bypasses and admission.full(options.rank)
                patience = lane.max_wait
                if on_taken is not None:
                    patience = NEVER
                elif deadline is not None:
                    patience = min(patience, max(0.0, deadline.at - now) / 2)
                seat = file = None
                name: Hashable = line
                if terms.shared:
                    file = lane.file
                    if terms.key is not None:
                        file, name = self._flights.digests, terms.key
                    if name in file and not bypass:
                        seat = self._join(file[name], options, now, on_taken, lane.spec, patience, lane)
                if seat is not None:
                    who = seat
                else:
                    future: asyncio.Future[Reply[Any]] = loop.create_future()
                    who = Ticket(future, lane.spec, options.answer, now, line, counted, patience, terms, on_taken, file)
                    self._place(who, lane, bypass=bypass)
                    if file is not None:
                        file[name] = who
            if self._capture is not None:
                who.origin = self._capture()
            admission.taken += 1
            self._ledger.items += 1
            if deadline is not None:
                if isinstance(who, Seat):
                    who.flight.expire_at(who, deadline, loop)
                else:
                    deadline.timer = loop.call_at(deadline.at, self._expire, who, context=self._context)
                    who.deadline = deadline
        except BaseException:
            # Whatever it is: the place that this request would have taken, and may have waited for, goes to the next.
            self._admission.decline()
            raise
        return who

    def _read(self, messages: Messages, options: Options) -> tuple[Lane | None, str | None]:
        """Return the lane of *messages* and their own text; None and None if they go alone."""
        read = read_messages(messages, options)
        if read is None:
            return None, None
        key, text = read
        return self._lanes.find(key, messages, options), text

    def _place(self, ticket: Ticket, lane: Lane, *, bypass: bool = False) -> None:
        """Queue *ticket* in *lane*, or alone if it is better off so."""
        if bypass or len(ticket.line) > lane.welcome:
            alone = self._look_closely(ticket, lane, bypass=bypass)
            if alone is not None:
                self.queue_alone(ticket, alone, lane.account)
                self._lanes.drop_if_abandoned(lane)
                return
        if lane.add(ticket) and not lane.queued:
            self._lanes.joined(lane)

    def _take_alone(
        self,
        messages: Messages,
        options: Options,
        now: float,
        on_taken: Callable[[Any], None] | None,
        terms: CallerOptions,
    ) -> Ticket | Seat:
        check_messages(messages)
        file: InFlightIndex | None = None
        name: Hashable = None
        key: tuple[Hashable, ...] = ()
        if terms.key is not None:
            file = self._flights.digests
            name = terms.key
        elif terms.shared:
            file = self._flights.file_of(options.content)
            name = key = (canonical_messages(messages),)
        spec = spec_of(messages, options, key)
        if file is not None:
            equal = file.get(name)
            seat = None if equal is None else self._join(equal, options, now, on_taken, spec, NEVER)
            if seat is not None:
                return seat
        ticket = Ticket(
            self._loop.create_future(), spec, options.answer, now, terms=terms, on_taken=on_taken, file=file
        )
        account = self._accounts.of(options.model, options.headers)
        if account.max_tokens is not None:
            ticket.charge = _fitting(self._estimates.of_any(spec), account.max_tokens)
        self.queue_alone(ticket, AloneReason.NOT_COMBINABLE, account)
        if file is not None:
            file[name] = ticket
        return ticket

    def _join(
        self,
        ticket: Ticket,
        options: Options,
        now: float,
        on_taken: Callable[[Any], None] | None,
        spec: Spec,
        patience: float,
        lane: Lane | None = None,
    ) -> Seat | None:
        """Return a seat with *ticket*, after seeing to it that it is as urgent; None if it is too late for that.

        Args:
            ticket: An equal request that was accepted before.
            options: The caller's options.
            now: Loop time.
            on_taken: See `accept`.
            spec: What the request would travel with by itself.
            patience: Seconds that it would wait for company.
            lane: The lane of that; None if it goes alone.
        """
        if not awaited(ticket):
            return None
        queue = ticket.queue
        if spec.rank < ticket.spec.rank:
            if queue is None:
                return None  # it is under way at the pace of its own priority
            self._promote(ticket, spec, now + patience, lane)
        elif isinstance(queue, Lane):
            self._lanes.hasten(queue, ticket, now + patience)
        if lane is not None:
            self._lanes.drop_if_abandoned(lane)
        return self._flights.join(ticket, options.answer, now, on_taken, self._loop)

    def _promote(self, ticket: Ticket, spec: Spec, due_at: float, lane: Lane | None) -> None:
        """Let *ticket*, which waits, wait in a queue of a higher priority instead."""
        queue = ticket.queue
        if isinstance(queue, Lane):
            self._lanes.discard(queue, ticket, moved=True)
        else:
            queue.discard(ticket, moved=True)
        ticket.spec, ticket.patience = spec, min(ticket.patience, due_at - ticket.created)
        if lane is None:
            self.queue_alone(ticket, AloneReason.NOT_COMBINABLE, self._accounts.of(spec.model, spec.headers))
        else:
            self._place(ticket, lane)

    def _look_closely(self, ticket: Ticket, lane: Lane, *, bypass: bool) -> AloneReason | None:
        """Return why *ticket* goes alone, or None if it does not."""
        alone = self._weigh(ticket, lane) if lane.careful else None
        if bypass:
            return AloneReason.BYPASS
        if ticket.tokens > lane.budget.tokens - ID_TOKENS or len(ticket.line) > MAX_LINE_BYTES:
            alone = alone or self._too_long(ticket, lane)
        return alone

    def _weigh(self, ticket: Ticket, lane: Lane) -> AloneReason | None:
        """Work out what *ticket* costs alone, and tell why it goes alone if that is why.

        Raises:
            ConfigError: It can never be sent, because it is larger than the whole quota.
        """
        history, quota = lane.history, lane.account.max_tokens
        if quota is not None:
            try:
                ticket.charge = _fitting(self._estimates.alone(ticket, history), quota)
            except ConfigError:
                self._lanes.drop_if_abandoned(lane)
                raise
        if lane.rank == HIGH:
            return AloneReason.HIGH
        if history.suspended_for or self._policy.merge == "always" or self.pays(lane, lane.budget.size):
            return None
        self._note_alone(lane, "not cheaper together")
        return AloneReason.NOT_CHEAPER

    def pays(self, lane: Lane, items: int) -> bool:
        """Return whether *items* of *lane* cost less together than alone, by all that is known of it."""
        spec = lane.spec
        return self._estimates.is_cheaper_combined(spec, lane.history, items, self._ratio(spec.model))

    def _too_long(self, ticket: Ticket, lane: Lane) -> AloneReason | None:
        """Tell whether *ticket*, whose bound is over the lane's budget, cannot share a prompt at all."""
        if len(ticket.line) <= MAX_LINE_BYTES and ticket.count(self._count) <= lane.budget.tokens - ID_TOKENS:
            return None
        self._note_alone(
            lane,
            f"too long to share a prompt (max_batch_tokens={self._policy.max_batch_tokens}, "
            f"max_prompt_tokens={self._policy.max_prompt_tokens}, {MAX_LINE_BYTES} bytes)",
        )
        return AloneReason.TOO_LONG

    def _note_alone(self, lane: Lane, why: str) -> None:
        if lane.history.note_alone() == _ALONE_WARNING:
            logger.warning("%d requests in a row were %s: each goes alone, and nothing is saved", _ALONE_WARNING, why)

    def queue_alone(self, ticket: Ticket, reason: AloneReason, account: Account) -> None:
        """Queue *ticket* among those of its account, tenant and priority that go alone."""
        spec = ticket.spec
        key = (account, spec.tenant, spec.rank)
        queue = self.alone.get(key)
        if queue is None:
            queue = self.alone[key] = SingleQueue(account, spec.tenant, spec.rank)
        queue.add(ticket, reason)
        self._enqueue(queue)


def _fitting(charge: Charge, quota: int) -> Charge:
    """Return *charge* if it can ever be granted.

    Raises:
        ConfigError: It is larger than the whole quota.
    """
    if charge.tokens > quota:
        raise ConfigError(
            f"this request would be charged about {charge.tokens} tokens (its prompt and max_tokens), but the rate limit grants "
            f"{quota} a minute, so it could never be sent: shorten it, lower max_tokens or raise tpm="
        )
    return charge
