"""Builds the events of requests and calls; only called when a hook is registered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, get_args

from microbatch.accounting.events import Called, Flushed, Settled
from microbatch.messages import Priority, Usage
from microbatch.protocols import ChatCall

if TYPE_CHECKING:
    from collections.abc import Sequence

    from microbatch.batching.call_state import CallState
    from microbatch.batching.ticket import Ticket
    from microbatch.messages import Reply
    from microbatch.protocols import Completion, EmbeddingCall


class Asked(Protocol):
    """As much of a request's options as its event tells; see `Options` and `Spec`."""

    @property
    def model(self) -> str | None: ...  # noqa: D102

    @property
    def rank(self) -> int: ...  # noqa: D102

    @property
    def tenant(self) -> str | None: ...  # noqa: D102


_PRIORITIES: tuple[Priority, ...] = get_args(Priority)


def flushed(tickets: Sequence[Ticket], reason: str, now: float) -> Flushed:
    """Return the event that *tickets*, of one lane or one alone, have left their queue."""
    spec = tickets[0].spec
    return Flushed(
        reason=str(reason),
        size=len(tickets),
        model=spec.model,
        priority=_PRIORITIES[spec.rank],
        waited=now - min(ticket.created for ticket in tickets),
    )


def called(
    call_state: CallState,
    call: ChatCall | EmbeddingCall,
    tickets: Sequence[Ticket],
    completion: Completion | None,
    error: Exception | None,
    now: float,
    *,
    default_model: str | None,
) -> Called:
    """Return the event that *call*, which carried *tickets*, has ended."""
    requested = call.model if call.model is not None else default_model
    chat = call if isinstance(call, ChatCall) else None
    temperature = call.params.get("temperature")
    return Called(
        route=call_state.route,
        size=len(tickets),
        model=requested if completion is None or completion.model is None else completion.model,
        requested_model=requested,
        duration=now - call_state.sent,
        first_text=None if call_state.first_text is None else call_state.first_text - call_state.sent,
        attempts=call_state.attempts,
        streamed=chat is not None and chat.stream,
        max_tokens=None if chat is None else chat.bound if chat.max_tokens is None else chat.max_tokens,
        temperature=temperature if isinstance(temperature, int | float) else None,
        usage=call_state.usage,
        cost_usd=call_state.cost_usd,
        finish_reason=None if completion is None else completion.finish_reason,
        request_id=None if completion is None else completion.request_id,
        error=error,
        origins=tuple(waiter.origin for ticket in tickets for waiter in ticket.callers),
        tenant=tickets[0].spec.tenant,
        unbatched_cost_usd=call_state.unbatched_cost_usd,
        operation="embeddings" if chat is None else "chat",
    )


def settled(
    spec: Asked,
    created: float,
    origin: Any,
    now: float,
    *,
    default_model: str | None,
    reply: Reply[Any] | None = None,
    error: Exception | None = None,
    unbatched_cost_usd: float | None = None,
) -> Settled:
    """Return the event that a request has ended: with *reply*, with *error*, or because its caller has left; see `Settled`."""
    return Settled(
        route=None if reply is None else reply.route,
        error=error,
        model=spec.model if reply is None else reply.model,
        priority=_PRIORITIES[spec.rank],
        waited=0.0 if reply is None else reply.waited,
        latency=now - created,
        batch_size=0 if reply is None else reply.batch_size,
        usage=Usage() if reply is None else reply.usage,
        cost_usd=None if reply is None else reply.cost_usd,
        origin=origin,
        tenant=spec.tenant,
        requested_model=default_model if spec.model is None else spec.model,
        unbatched_cost_usd=unbatched_cost_usd,
    )
