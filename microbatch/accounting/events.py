"""What happens in a batcher, told to whoever listens. Where nobody does, nothing is made and nothing is called."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from microbatch.messages import Priority, Route, Usage

logger = logging.getLogger("microbatch")


class Flushed(msgspec.Struct, frozen=True, kw_only=True):
    """A batch, or a request alone, has left its queue; `on_flush` gets it.

    Attributes:
        reason: Why: the reason of the flush, or that for which a request goes alone.
        size: Requests in it.
        model: The model asked for, None for the transport's own.
        priority: Their priority.
        waited: Seconds that the oldest of them waited.
    """

    reason: str
    size: int
    model: str | None
    priority: Priority
    waited: float


class Called(msgspec.Struct, frozen=True, kw_only=True):
    """A call has ended, its repeated attempts included; `on_call` gets it.

    Attributes:
        route: What it was: "batch", "single" or "fallback".
        size: Requests it carried.
        model: The model that answered, else the one asked for; None if neither is known.
        requested_model: The model asked for, None if neither the caller nor the transport named one.
        duration: Seconds from its first attempt to its end.
        first_text: Seconds until the first text came; None if none did.
        attempts: HTTP attempts.
        streamed: Whether it was asked to be streamed.
        max_tokens: Most tokens it was to generate, or None.
        temperature: As asked for, or None.
        usage: What the endpoint reported, or None.
        cost_usd: The price of that in US dollars, or None.
        finish_reason: Why the model stopped, or None.
        request_id: The endpoint's id of it, or None.
        error: What it ended with, or None.
        origins: What `on_submit` returned for each request it carried.
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


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """A request has ended; `on_settle` gets it.

    Attributes:
        route: How the answer came; None if there is none.
        error: What it ended with; None if it was answered, or its caller left.
        model: The model that answered, else the one asked for; None if neither is known.
        priority: Its priority.
        waited: Seconds until the call that answered was sent.
        latency: Seconds from submit to the end.
        batch_size: Requests in the call that answered.
        usage: Its share of the tokens, an estimate where the call has not ended.
        cost_usd: The price of that in US dollars, or None.
        origin: What `on_submit` returned for it.
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


class Listeners:
    """Who listens.

    Args:
        hooks: Objects with any of the methods `on_submit`, `on_flush`, `on_call` and `on_settle`.

    Attributes:
        submit: Returns what hooks want to keep of a caller, asked in the caller's own context; None if none wants anything.
        flush: Takes `Flushed`; None if nobody listens, and so for the next two.
        call: Takes `Called`.
        settle: Takes `Settled`.
    """

    def __init__(self, hooks: Iterable[object] = ()) -> None:
        hooks = list(hooks)
        captures = [getattr(hook, "on_submit", None) for hook in hooks]
        self.submit: Callable[[], Any] | None = None
        if any(captures):
            self.submit = lambda: tuple(None if capture is None else _ask(capture) for capture in captures)
        self.flush: Callable[[Flushed], None] | None = _teller(_methods(hooks, "on_flush"))
        self.call: Callable[[Called], None] | None = _teller(_methods(hooks, "on_call"), self._own_origins)
        self.settle: Callable[[Settled], None] | None = _teller(_methods(hooks, "on_settle"), self._own_origin)

    @staticmethod
    def _own_origins(event: Called, position: int) -> Called:
        """Give each hook what it has returned itself."""
        origins = tuple(origin[position] for origin in event.origins if origin is not None)
        return msgspec.structs.replace(event, origins=origins)

    @staticmethod
    def _own_origin(event: Settled, position: int) -> Settled:
        origin = None if event.origin is None else event.origin[position]
        return msgspec.structs.replace(event, origin=origin)


def _methods(hooks: list[object], name: str) -> list[tuple[int, Callable[[Any], object]]]:
    found = ((position, getattr(hook, name, None)) for position, hook in enumerate(hooks))
    return [(position, method) for position, method in found if method is not None]


def _teller(
    methods: list[tuple[int, Callable[[Any], object]]], own: Callable[[Any, int], Any] | None = None
) -> Callable[[Any], None] | None:
    if not methods:
        return None

    def tell(event: Any) -> None:
        for position, method in methods:
            mine = event if own is None else own(event, position)
            _ask(method, mine)

    return tell


def _ask(hook: Callable[..., Any], *told: Any) -> Any:
    """Return what *hook* returns; whatever it raises is logged, and fails nobody."""
    try:
        return hook(*told)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a Rust panic is no Exception
        logger.warning("a hook raised %s; what it was told is lost to it", type(error).__name__, exc_info=error)
        return None
