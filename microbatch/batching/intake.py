"""Takes requests in: what they are, whether they may share a prompt or an answer, and where they wait.

This is on every submit's path; see `python -m bench overhead` for what a step costs.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.batching.chat_calls import fitting
from microbatch.batching.request import (
    canonical_messages,
    check_messages,
    own_text,
    read_messages,
    read_options,
    remembering,
    spec_of,
)
from microbatch.batching.ticket import NEVER, NO_CONTEXT, AloneReason, Ticket, Waiter
from microbatch.errors import ConfigError
from microbatch.prompt.compose import item_line
from microbatch.prompt.message_forms import copy_of
from microbatch.prompt.parameters import HARMLESS

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from microbatch.batching.chat_calls import ChatCalls
    from microbatch.batching.dependencies import Dependencies
    from microbatch.batching.lane import Lane
    from microbatch.batching.lane_table import LaneTable
    from microbatch.batching.request import Options
    from microbatch.batching.single_queue import SingleQueues
    from microbatch.batching.ticket import CallerOptions, Deadline, InFlightIndex, Spec
    from microbatch.messages import Messages, UseCache
    from microbatch.schema.answer_type import AnswerType

logger: Final = logging.getLogger("microbatch")


class Intake:
    """The way in; *shares* if equal requests may share an answer unless they say otherwise.

    Attributes:
        look_up: Begins to look for the answer to a similar question, for a ticket that has just been queued; None if that is not done.
    """

    def __init__(
        self, given: Dependencies, lanes: LaneTable, singles: SingleQueues, chat: ChatCalls, *, shares: bool
    ) -> None:
        harmless = HARMLESS.union(given.policy.combine_params)
        self.read_options: Callable[..., Options] = remembering(partial(read_options, harmless=harmless))
        self.shares = shares
        self._given = given
        self._policy = given.policy
        self._ledger = given.ledger
        self._estimates = given.estimates
        self._admission = given.admission
        self._upper = given.upper
        self._capture = given.listeners.submit
        self._expire = given.settlement.expire
        self._lanes = lanes
        self._singles = singles
        self.look_up: Callable[[Ticket, Messages, Options], None] | None = None
        self._chat = chat
        chat.weigh_again = self.weigh_again
        self._bypasses = given.policy.when_full == "bypass"
        self._scratch = bytearray()
        self._shared: list[dict[str, Any]] = []  # of the latest request in an unusual form

    def may_share(self, use_cache: UseCache, options: Options) -> bool:
        """Return whether the answer to an equal request will do for one with *options*.

        Raises:
            ConfigError: *use_cache* is none of the values that it may have.
        """
        if use_cache is True:
            return self.shares or options.cold
        if use_cache is not False and use_cache != "refresh":
            raise ConfigError(f'use_cache must be True, False or "refresh", got {use_cache!r}')
        return False

    def accept(
        self,
        messages: Messages,
        options: Options,
        caller: CallerOptions,
        on_taken: Callable[[Waiter], None] | None = None,
    ) -> tuple[Ticket, Waiter]:
        """Queue a request whose caller occupies a place; its future is settled in the end, whatever happens.

        If the admission queue is overfull, the request goes alone at once, past those that wait. If it is not accepted, its place is
        released.

        *on_taken* makes it bulk work, which waits for full batches; it is called when the request leaves its queue. Return the ticket,
        which may have other callers, and this caller of it.

        Raises:
            ConfigError: The messages cannot be sent; nothing was queued.
        """
        try:
            if type(messages) is not list or not messages:
                check_messages(messages)
                messages = list(messages)
            loop = asyncio.get_running_loop()
            lane, text, own = self._chat.latest, None, None
            if lane is not None and (options is lane.options or lane.serves(options)):
                text = own_text(messages, lane.spec.plain)
            if text is None:
                lane, text, own = self._read(messages, options)
            if lane is None or text is None:
                ticket, waiter = self._accept_alone(messages, options, caller, loop, on_taken)
            else:
                line = item_line(text, self._scratch)
                ticket, waiter = self._accept_combinable(line, lane, options.answer, caller, loop, on_taken)
                if own is not None and waiter is ticket:
                    ticket.own = own
            if self.look_up is not None and caller.key is not None and waiter is ticket:
                self.look_up(ticket, messages, options)
            self._note_accepted(ticket, waiter, loop)
        except BaseException:
            self._admission.release()
            raise
        return ticket, waiter

    def accept_line(
        self,
        line: bytes,
        lane: Lane,
        caller: CallerOptions,
        on_taken: Callable[[Waiter], None] | None = None,
    ) -> tuple[Ticket, Waiter]:
        """Queue a request that is *line*, from `item_line`, in *lane*; otherwise as `accept` does.

        Raises:
            ConfigError: It can never be sent; nothing was queued.
        """
        try:
            loop = asyncio.get_running_loop()
            answer = lane.spec.answer
            ticket, waiter = self._accept_combinable(line, lane, answer, caller, loop, on_taken)
            self._note_accepted(ticket, waiter, loop)
        except BaseException:
            self._admission.release()
            raise
        return ticket, waiter

    def _note_accepted(self, ticket: Ticket, waiter: Waiter, loop: asyncio.AbstractEventLoop) -> None:
        if self._capture is not None:
            waiter.origin = self._capture()
        self._ledger.items += 1
        if waiter.deadline is not None:
            at = waiter.deadline.at
            waiter.deadline.timer = loop.call_at(at, self._expire, ticket, waiter, context=NO_CONTEXT)

    def _read(
        self, messages: Messages, options: Options
    ) -> tuple[Lane | None, str | None, list[dict[str, Any]] | None]:
        """Return the lane of *messages*, their own text, and a copy of them if they are in an unusual form; None if they go alone."""
        if options.alone:
            self.note_alone(options.alone)
            return None, None, None
        read = read_messages(messages, options)
        if isinstance(read, str):
            self.note_alone((read,))
            return None, None, None
        key, text, texts = read
        lane = self._lanes.find(self._chat, key, lambda: spec_of(texts[:-1], options, key))
        return lane, text, None if texts is messages else self._own(messages)

    def _own(self, messages: Messages) -> list[dict[str, Any]]:
        """Return a copy of *messages*, which shares those before the last with the copy before if they are equal."""
        *shared, last = copy_of(messages)
        if repr(shared) != repr(self._shared):  # 1 and True are equal, but not in JSON
            self._shared = shared
        return [*self._shared, last]

    def note_alone(self, reasons: Sequence[str]) -> None:
        """Count what keeps a request alone by its form: *reasons*, each told once."""
        for reason in reasons:
            if self._ledger.note_alone(reason):
                logger.warning(
                    "requests go alone that might be combined but for this: %s; see stats().alone_by_field", reason
                )

    # --- requests that may share a prompt

    def _accept_combinable(
        self,
        line: bytes,
        lane: Lane,
        answer: AnswerType,
        caller: CallerOptions,
        loop: asyncio.AbstractEventLoop,
        on_taken: Callable[[Waiter], None] | None,
    ) -> tuple[Ticket, Waiter]:
        now, bulk = loop.time(), on_taken is not None
        bypass = self._bypasses and self._admission.overfull(lane.rank)
        patience = NEVER if bulk else lane.max_wait
        deadline: Deadline | None = None
        if caller.timeout is not None:
            deadline = caller.deadline(now)
            if deadline is not None and not bulk:
                patience = min(patience, max(0.0, deadline.at - now) / 2)
        index: InFlightIndex | None = None
        name: Hashable = line
        if caller.shared:
            index = lane.index
            if caller.key is not None:
                index, name = self._given.in_flight.digests, caller.key
            equal = index.get(name)
            if equal is not None and not bypass:
                waiter = Waiter(loop.create_future(), answer, now, on_taken, deadline, None)
                if self._join(equal, waiter, lane.spec, patience, lane):
                    return equal, waiter
        elif caller.key is not None:
            self._supersede(caller.key)
        counted = None if self._upper is None else self._upper(lane.spec.counted_text(line))
        future = loop.create_future()
        ticket = Ticket(
            future,
            answer,
            now,
            on_taken,
            deadline,
            None,
            lane.spec,
            line,
            counted,
            patience,
            caller,
            bulk,
            index,
        )
        if bypass or len(line) > lane.fast_path_max_bytes:
            self._inspect_and_queue(ticket, lane, bypass=bypass)
        elif lane.add(ticket):
            self._lanes.joined(lane)
        if index is not None:
            index[name] = ticket
        return ticket, ticket

    def _inspect_and_queue(self, ticket: Ticket, lane: Lane, *, bypass: bool = False) -> None:
        """Queue *ticket* in *lane*, or alone if it is better off so."""
        try:
            alone = lane.calls.why_alone(ticket, lane, bypass=bypass)
        except ConfigError:
            self._lanes.drop_if_abandoned(lane)
            raise
        if alone is not None:
            self._singles.add(ticket, alone, lane.account)
            self._lanes.drop_if_abandoned(lane)
        elif lane.add(ticket):
            self._lanes.joined(lane)

    def weigh_again(self, ticket: Ticket) -> None:
        """Queue *ticket*, which has left a queue to go alone because that is cheaper, by the rule that `merge="auto"` means by now."""
        lane = self._lanes.find_again(self._chat, ticket.spec)
        ticket.patience = self._given.now() - ticket.created + lane.max_wait  # bulk work waits for it no longer
        self._given.ledger.merge_rules["priced"] -= 1
        self._inspect_and_queue(ticket, lane)

    # --- requests that go alone by their form

    def _accept_alone(
        self,
        messages: Messages,
        options: Options,
        caller: CallerOptions,
        loop: asyncio.AbstractEventLoop,
        on_taken: Callable[[Waiter], None] | None,
    ) -> tuple[Ticket, Waiter]:
        check_messages(messages)
        index: InFlightIndex | None = None
        name: Hashable = None
        key: tuple[Hashable, ...] = ()
        if caller.shared and caller.key is not None:
            index, name = self._given.in_flight.digests, caller.key
        elif caller.shared:
            index = self._given.in_flight.index_of(options.content)
            name = key = (canonical_messages(messages),)
        elif caller.key is not None:
            self._supersede(caller.key)
        spec = spec_of(messages, options, key)
        now = loop.time()
        deadline = caller.deadline(now)
        if index is not None:
            equal = index.get(name)
            if equal is not None:
                waiter = Waiter(loop.create_future(), options.answer, now, on_taken, deadline, None)
                if self._join(equal, waiter, spec, NEVER):
                    return equal, waiter
        ticket = Ticket(loop.create_future(), options.answer, now, on_taken, deadline, None, spec)
        ticket.caller, ticket.bulk, ticket.index = caller, on_taken is not None, index
        account = self._given.accounts.of(options.model, options.headers)
        if account.max_tokens is not None:
            ticket.charge = fitting(self._estimates.of_any(spec), account.max_tokens)
        self._singles.add(ticket, AloneReason.NOT_COMBINABLE, account)
        if index is not None:
            index[name] = ticket
        return ticket, ticket

    # --- requests that are under way already

    def _supersede(self, key: bytes) -> None:
        """Keep the answer to a request under way out of the cache, where it could replace that of a refresh, which is asked later."""
        older = self._given.in_flight.digests.get(key)
        if older is not None:
            older.unlist()
            older.index, older.caller = None, msgspec.structs.replace(older.caller, key=None)

    def _join(self, ticket: Ticket, waiter: Waiter, spec: Spec, patience: float, lane: Lane | None = None) -> bool:
        """Add *waiter* to *ticket*, an equal request, after seeing to it that it is as urgent; return False if it is too late.

        By itself the caller's request would wait for *patience* seconds in *lane*, or go alone, with *spec*.
        """
        if ticket.done:
            return False
        if ticket.queue is None and ticket.call is not None and ticket.call.ends_before(waiter.deadline):
            return False  # its call was given less time than this caller has
        due_at, bulk = waiter.created + patience, waiter.on_taken is not None
        if spec.rank < ticket.spec.rank:
            if ticket.queue is None:
                return False  # it is under way at the pace of its own priority
            # Bulk work has no time of its own, and flushes its queue only once: it is due in the other one too.
            patience = 0.0 if ticket.queue.flushed else min(ticket.patience, due_at - ticket.created)
            ticket.queue.discard(ticket, moved=True)
            ticket.spec, ticket.patience = spec, patience
            ticket.bulk = ticket.bulk and bulk
            if lane is None:
                account = self._given.accounts.of(spec.model, spec.headers)
                self._singles.add(ticket, AloneReason.NOT_COMBINABLE, account)
            else:
                self._inspect_and_queue(ticket, lane)
        elif ticket.queue is not None:
            ticket.queue.hasten(ticket, due_at, bulk=bulk)
        ticket.join(waiter)
        if lane is not None:
            self._lanes.drop_if_abandoned(lane)
        return True
