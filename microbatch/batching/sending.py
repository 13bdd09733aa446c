"""Sends calls of any kind: their state while they are under way, their attempts, their report, and what is kept of their answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from microbatch.batching.call_state import CallState
from microbatch.batching.events import called
from microbatch.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence

    from microbatch.batching.dependencies import Dependencies
    from microbatch.batching.lane_history import LaneHistory
    from microbatch.batching.ticket import Ticket
    from microbatch.errors import RequestFailed
    from microbatch.messages import Route, Usage
    from microbatch.protocols import ChatCall, Completion, EmbeddingCall
    from microbatch.transports.accounts import Permit
    from microbatch.transports.expenses import Expense

    Send = Callable[..., Coroutine[Any, Any, Completion]]  # `Sender.send`
    Keep = Callable[[Sequence[tuple[Ticket, Usage]]], Awaitable[None]]  # `AnswerCache.keep`


class Sending:
    """Sends calls of any kind.

    Args:
        given: The objects that the parts of the batcher share.
        send: Makes the attempts of a call.
        keep: Stores answers in the cache, after their callers have them; None without a cache.
    """

    def __init__(self, given: Dependencies, send: Send, keep: Keep | None = None) -> None:
        self._ledger = given.ledger
        self._listeners = given.listeners
        self._now = given.now
        self._price = given.price
        self._default_model = given.default_model
        self._send = send
        self._keep = keep

    @property
    def keeps(self) -> bool:
        """True if answers are stored in a cache."""
        return self._keep is not None

    def begin(self, tickets: list[Ticket], route: Route, permit: Permit, expense: Callable[[], Expense]) -> CallState:
        """Return the state of a call that carries *tickets*, of one lane or one alone, from now on; *expense* is its expected cost."""
        permit.expense = expense
        model, tier = tickets[0].spec.model or self._default_model, tickets[0].spec.tier
        call_state = CallState(len(tickets), route, self._now(), self._price(model, tier), permit, model)
        for ticket in tickets:
            if ticket.call is not None:
                ticket.remember().attempts += ticket.call.attempts
            ticket.call = call_state
        return call_state

    async def exchange(
        self,
        call_state: CallState,
        call: ChatCall | EmbeddingCall,
        on_text: Callable[[str], None],
        on_cut: Callable[[Completion | None], bool],
        history: LaneHistory | None,
        on_failure: Callable[[RequestFailed | None], None] | None = None,
    ) -> tuple[Completion | None, RequestFailed | ConfigError | None]:
        """Send *call* as long as any caller waits; return the completion or the error, neither if all callers have left.

        *history* counts it, if it asks again because of combining. *on_failure* gets the error of the attempt before each attempt.
        """
        permit = call_state.permit
        call_state.until = None if call.timeout is None else self._now() + call.timeout

        def on_attempt() -> None:
            if on_failure is not None and permit is not None:
                on_failure(permit.error)
            self._count_attempt(call_state, history, 1)

        def send() -> Coroutine[Any, Any, Completion]:
            return self._send(call, on_text, on_attempt=on_attempt, on_cut=on_cut, permit=permit)

        completion, error = await call_state.while_awaited(send)
        if isinstance(error, ConfigError):
            self._count_attempt(call_state, history, -1)  # nothing was sent
        return completion, error

    def _count_attempt(self, call_state: CallState, history: LaneHistory | None, count: int) -> None:
        """Count an attempt (1), or that it was not made after all (-1); in *history* too, if combining caused it."""
        first = call_state.attempts == (0 if count > 0 else 1)
        self._ledger.upstream_calls += count
        call_state.attempts += count
        if first and call_state.route == "fallback":
            self._ledger.fallback_calls += count
            if history is not None:
                history.economics.calls += count

    def note_called(
        self,
        call_state: CallState,
        call: ChatCall | EmbeddingCall,
        tickets: list[Ticket],
        completion: Completion | None,
        error: Exception | None,
    ) -> None:
        """Call the hooks for an ended call."""
        if self._listeners.call is not None:
            now, model = self._now(), self._default_model
            self._listeners.call(called(call_state, call, tickets, completion, error, now, default_model=model))

    async def keep(self, completion: Completion | None, answered: Iterable[tuple[Ticket, Usage]]) -> None:
        """Store the answers of a call in the cache, if it ended properly, each with the usage of a call for it alone."""
        if self._keep is None or completion is None or completion.finish_reason != "stop":
            return
        kept = [pair for pair in answered if pair[0].caller.key is not None and pair[0].reply is not None]
        if kept:
            await self._keep(kept)

    def remaining(self, tickets: list[Ticket]) -> float | None:
        """Return the longest time any caller will still wait, in seconds; None if one sets no limit."""
        latest = 0.0
        for ticket in tickets:
            deadline = ticket.last_deadline
            if deadline is None:
                return None
            latest = max(latest, deadline.at)
        return max(0.0, latest - self._now())
