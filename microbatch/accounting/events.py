"""Events of a batcher, and the hooks that receive them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from microbatch.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from microbatch.accounting.audits import Audited
    from microbatch.messages import Priority, Route, Usage

logger: Final = logging.getLogger("microbatch")

_METHODS: Final = ("on_submit", "on_flush", "on_call", "on_settle", "on_audit")


BESIDE: Final = ("audit", "check", "look_up")
"""Routes of calls that belong to no request."""


class Flushed(msgspec.Struct, frozen=True, kw_only=True):
    """The event of `on_flush`: a batch, or a request alone, has left its queue.

    Attributes:
        reason: The reason of the flush, or why a request goes alone.
        size: Number of requests.
        model: The model asked for; None for the transport's own.
        waited: Seconds that the oldest of them waited.
    """

    reason: str
    size: int
    model: str | None
    priority: Priority
    waited: float


class Called(msgspec.Struct, frozen=True, kw_only=True):
    """The event of `on_call`: a call has ended, its repeated attempts included. What is None was not given, or is not known.

    Attributes:
        route: "batch", "single", "fallback", "audit", "check" (asked again to check the answer to a similar question), or
            "look_up" (the vectors of questions for a `SemanticCache`).
        size: Number of requests.
        model: The model that answered, else the one asked for.
        requested_model: The model that the caller, else the transport, named.
        duration: Seconds from its first attempt to its end.
        first_text: Seconds until the first text.
        attempts: Number of HTTP attempts.
        streamed: Whether a stream was asked for.
        max_tokens: The limit on generated tokens.
        usage: The usage that the endpoint reported, of all attempts.
        cost_usd: Its price in US dollars.
        request_id: The endpoint's id of the call.
        error: The error it ended with.
        origins: What `on_submit` returned for each request.
        tenant: The tenant of all its requests, or None.
        unbatched_cost_usd: The price, in US dollars, of what its answered requests would have used one by one.
        operation: "chat" or "embeddings".
    """

    route: Route
    size: int
    model: str | None
    requested_model: str | None
    duration: float
    first_text: float | None
    attempts: int
    streamed: bool
    max_tokens: int | None
    temperature: float | None
    usage: Usage | None
    cost_usd: float | None
    finish_reason: str | None
    request_id: str | None
    error: Exception | None
    origins: tuple[Any, ...]
    tenant: str | None = None
    unbatched_cost_usd: float | None = None
    operation: Literal["chat", "embeddings"] = "chat"


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """The event of `on_settle`: a request has ended.

    Attributes:
        route: How the answer came; None if there is none.
        error: The error it ended with; None if it was answered, or its caller left.
        model: The model that answered, else the one asked for; None if neither is known.
        waited: Seconds until the call that answered was sent.
        latency: Seconds from submit to the end.
        batch_size: Number of requests in the call that answered, for an answer from the cache in the call that once gave it.
        usage: Its share of the tokens; an estimate if the call has not ended.
        cost_usd: The price of that in US dollars, or None.
        origin: What `on_submit` returned for it.
        tenant: Its tenant, or None.
        requested_model: The model that the caller, else the transport, named.
        unbatched_cost_usd: For an answer from the cache, or to a similar question, the price of the call it has saved; else None, as
            the event of the call has it.
    """

    route: Route | None
    error: Exception | None
    model: str | None
    priority: Priority
    waited: float
    latency: float
    batch_size: int
    usage: Usage
    cost_usd: float | None
    origin: Any
    tenant: str | None = None
    requested_model: str | None = None
    unbatched_cost_usd: float | None = None


class Listeners:
    """The hooks of a batcher. A method that no hook has is None here, so that its events need not be built.

    Args:
        hooks: Objects with any of the methods `on_submit`, `on_flush`, `on_call`, `on_settle` and `on_audit`.
        model: The transport's model, or None.

    Attributes:
        model: As given.
        submit: Returns what the hooks want to keep of a caller, called in the caller's context.
    """

    def __init__(self, hooks: Iterable[object] = (), model: str | None = None) -> None:
        self.model: str | None = model
        hooks = list(hooks)
        for position, hook in enumerate(hooks):
            kind = type(hook)
            if isinstance(hook, type) or (kind.__module__ == "builtins" and kind is not object):  # a function, None...
                what = f"the class {hook.__name__}" if isinstance(hook, type) else type(hook).__name__
                raise ConfigError(
                    f"hooks[{position}] must be an object with {', '.join(_METHODS)} or some of them, got {what}"
                )
        captures = [getattr(hook, "on_submit", None) for hook in hooks]
        self.submit: Callable[[], Any] | None = None
        if any(captures):
            self.submit = lambda: tuple(None if capture is None else _call(capture) for capture in captures)
        self.flush: Callable[[Flushed], None] | None = _sender(hooks, "on_flush")
        self.call: Callable[[Called], None] | None = _sender(hooks, "on_call")
        self.settle: Callable[[Settled], None] | None = _sender(hooks, "on_settle")
        self.audit: Callable[[Audited], None] | None = _sender(hooks, "on_audit")


def _sender(hooks: list[object], name: str) -> Callable[[Any], None] | None:
    """Return a function that passes an event to the method *name* of all hooks; None if no hook has it."""
    found = [(position, getattr(hook, name, None)) for position, hook in enumerate(hooks)]
    methods = [(position, method) for position, method in found if method is not None]

    def send(event: Any) -> None:
        for position, method in methods:
            _call(method, _with_own_origin(event, position))

    return send if methods else None


def _with_own_origin(event: Any, position: int) -> Any:
    """Return *event* with what the hook at *position* returned itself from `on_submit`."""
    if isinstance(event, Called):
        origins = tuple(origin[position] for origin in event.origins if origin is not None)
        return msgspec.structs.replace(event, origins=origins)
    if isinstance(event, Settled) and event.origin is not None:
        return msgspec.structs.replace(event, origin=event.origin[position])
    return event


def _call(hook: Callable[..., Any], *event: Any) -> Any:
    """Return what *hook* returns; an error is logged and goes no further."""
    try:
        return hook(*event)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a Rust panic is no Exception
        logger.warning("a hook raised %s; it has missed an event", type(error).__name__, exc_info=error)
        return None
