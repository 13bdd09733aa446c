"""Breaks a call's body at its nth step: an exception at the nth await, or at the nth entry of a function that it is made of."""

from __future__ import annotations

import functools
import inspect
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import microbatch.batching.audits as audits_module
import microbatch.batching.dispatch as call_module
from microbatch.batching.attribution import UsageAttribution
from microbatch.batching.audits import Audits
from microbatch.batching.chat_calls import ChatCalls
from microbatch.batching.dispatch import Dispatcher
from microbatch.batching.fallback import Recovery
from microbatch.batching.sending import Sending
from microbatch.prompt.codec import ChatCodec
from microbatch.prompt.demultiplexer import Demultiplexer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BODY = (
    (
        Dispatcher,
        (
            "admit",
            "compose",
            "batch",
            "_take_text",
            "_take_end",
            "_hand_out",
            "single",
            "_ask_alone",
            "_answer_alone",
            "_answer",
        ),
    ),
    (Sending, ("begin", "exchange", "remaining")),
    (UsageAttribution, ("cost", "attribute", "attribute_alone", "_book", "_record")),
    (ChatCodec, ("compose", "demultiplex", "compose_alone", "read_alone")),
    (Demultiplexer, ("feed", "close", "_search", "_deliver")),
    (Recovery, ("after", "_together", "_ask", "_send")),
    (call_module, ("measure", "ending", "complaint")),
)
"""What a call's body is made of, between taking its requests and making sure that each of them has ended."""

AUDIT = ((Audits, ("_scored", "_ask", "_settle")), (Dispatcher, ("ask_again",)), (audits_module, ("agree",)))
"""Functions that an audit calls."""


class Panic(BaseException):
    """What a panic in a Rust extension looks like: no `Exception`."""


class Breaker:
    """Raises at the nth step.

    Attributes:
        steps: Steps so far.
        fired: Whether it has raised.
    """

    def __init__(self, at: int, error: Callable[[], BaseException]) -> None:
        self.steps = 0
        self.fired = False
        self._at = at
        self._error = error

    def step(self) -> None:
        """Count a step, and raise if it is the one."""
        self.steps += 1
        if self.steps - 1 == self._at:
            self.fired = True
            raise self._error()


class _Driven:
    """Awaits a coroutine; each time it goes on after a wait is a step, and raises there, inside it."""

    def __init__(self, coroutine: Any, breaker: Breaker) -> None:
        self._coroutine = coroutine
        self._breaker = breaker

    def __await__(self) -> Any:
        coroutine = self._coroutine
        resume: Callable[[], Any] = functools.partial(coroutine.send, None)
        while True:
            try:
                waited_for = resume()
            except StopIteration as stop:
                return stop.value
            try:
                yield waited_for
                self._breaker.step()
            except BaseException as error:  # noqa: BLE001 handed on to where the coroutine waits
                resume = functools.partial(coroutine.throw, error)
            else:
                resume = functools.partial(coroutine.send, None)


@contextmanager
def broken_awaits(breaker: Breaker) -> Iterator[None]:
    """Make each await of a call's body, and of its fallback's tasks, a step."""

    def driven(function: Any) -> Any:
        async def wrapper(*args: Any) -> Any:
            return await _Driven(function(*args), breaker)

        return wrapper

    with _wrapped(((ChatCalls, ("_answer_batch", "_answer_alone")), (Recovery, ("_ask",))), driven):
        yield


@contextmanager
def broken_functions(breaker: Breaker, body: Any = BODY) -> Iterator[None]:
    """Make each entry of a function of *body* a step."""

    def counted(function: Any) -> Any:
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                breaker.step()
                return await function(*args, **kwargs)
        else:

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                breaker.step()
                return function(*args, **kwargs)

        return wrapper

    with _wrapped(body, counted):
        yield


@contextmanager
def _wrapped(parts: Any, wrap: Callable[[Any], Any]) -> Iterator[None]:
    with ExitStack() as undo:
        for owner, names in parts:
            for name in names:
                function = vars(owner)[name]
                setattr(owner, name, wrap(function))
                undo.callback(setattr, owner, name, function)
        yield
