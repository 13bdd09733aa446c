"""Whether an endpoint or a request is to blame for a failure, and when to ask nothing more of an endpoint that does not answer.

One failure does not say whose fault it is. As long as other requests are answered, a request that fails again and again is at fault.
While nothing is answered, the endpoint is: its requests are kept, and it is asked one at a time, more and more rarely, until it
answers again.
"""

from __future__ import annotations

import asyncio
import enum
from typing import TYPE_CHECKING, Final

from microbatch.errors import (
    AuthFailed,
    BatcherClosed,
    ConfigError,
    ConnectFailed,
    QuotaExhausted,
    RateLimited,
    ServerError,
    ShutDown,
    StatusError,
    TransportError,
)
from microbatch.spool.rest import Rest, wait
from microbatch.transience import is_transient

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

FIRST_REST: Final = 1.0
LONGEST_REST: Final = 60.0
"""Seconds of the first and the longest rest after failures that are no request's fault."""

GIVE_UP_AFTER: Final = 600.0
"""Seconds without a single answer after which a command stops asking unless told otherwise."""

ENOUGH: Final = 3
"""Attempts that fail in a row, none answered that was sent later, before the endpoint counts as down."""

UNTRIED: Final = 8
"""Most attempts under way until the first one is answered."""

BURST: Final = 32
PACE: Final = 0.05
"""At most `BURST` attempts are begun within `PACE` seconds: calls that end together are not followed by as many at once, all of
which would be lost if an outage begins."""

# An endpoint that is overloaded or not there, whatever it is asked: bad gateway, unavailable, overloaded.
_DOWN: Final = frozenset({502, 503, 529})
# "No such model" or "no such address" if every request gets it; else this request names something that is not there.
_NOT_FOUND: Final = 404
_UNAUTHORIZED: Final = 401


class Cause(enum.Enum):
    """Who is to blame for a failure."""

    REQUEST = enum.auto()
    """The endpoint answers, and this request is refused or its answer is unusable."""
    EITHER = enum.auto()
    """The request if others are answered meanwhile, else the endpoint."""
    ENDPOINT = enum.auto()
    """The endpoint, the key, the account or the batcher: no request."""


def cause_of(error: BaseException) -> Cause:
    """Return who is to blame for *error*."""
    if isinstance(error, ConnectFailed | RateLimited | QuotaExhausted | ShutDown | BatcherClosed):
        return Cause.ENDPOINT
    if isinstance(error, AuthFailed):
        return Cause.ENDPOINT if error.status == _UNAUTHORIZED else Cause.EITHER
    if isinstance(error, StatusError):
        if error.status in _DOWN:
            return Cause.ENDPOINT
        doubtful = isinstance(error, ServerError) or error.status == _NOT_FOUND or is_transient(error)
        return Cause.EITHER if doubtful else Cause.REQUEST
    # A call that ended without an answer, and a model, key or header that is missing.
    return Cause.EITHER if isinstance(error, TransportError | ConfigError) else Cause.REQUEST


def is_refusal(error: BaseException) -> bool:
    """Return whether *error* refuses the key or the account: every other request gets the same, and waiting does not help."""
    return isinstance(error, QuotaExhausted) or (isinstance(error, AuthFailed) and error.status == _UNAUTHORIZED)


def may_refuse_all(error: BaseException) -> bool:
    """Return whether *error* is that of a wrong key, address or model, if other requests get it as well and none is answered."""
    return (
        is_refusal(error)
        or isinstance(error, AuthFailed)
        or (isinstance(error, StatusError) and error.status == _NOT_FOUND)
    )


class Endpoint:
    """Whether an endpoint answers, told from the attempts made at it; keeps attempts back while it does not.

    An attempt is `allow`ed, begun, and then either `succeeded` or `failed`. Attempts are compared by when they were sent: the answer
    to one that was sent before an outage began says nothing about what was sent later.

    Args:
        what: What happens during a rest, for the log.
        give_up_after: Seconds without an answer, from the sending of the first attempt that failed, after which every attempt is
            refused; None goes on for ever.

    Attributes:
        answered: Whether any attempt has succeeded.
        stopped: Whether attempts are refused because `stop` was called.
        error: What the latest attempt that counted failed with, or None.
        sent: Attempts that were begun.
        on_wire: Those that are under way.
        probe: Asks a question that was answered before, past this object, and returns whether it is answered now; None if there is
            no such question yet. Without it, or then, the attempt whose turn it is tries whether the endpoint answers again.
    """

    def __init__(self, what: str, *, give_up_after: float | None = None) -> None:
        self.answered = False
        self.stopped = False
        self.error: Exception | None = None
        self.sent = 0
        self.on_wire = 0
        self.probe: Callable[[], Awaitable[bool | None]] | None = None
        self._give_up_after = float("inf") if give_up_after is None else give_up_after
        self._rest = Rest(what, first=FIRST_REST, longest=LONGEST_REST)
        self._failures = 0  # in a row
        self._failing_since = float("inf")  # when the first of them was sent
        self._latest = float("-inf")  # when the latest attempt that succeeded was sent
        self._burst = 0  # attempts begun since `PACE` seconds before the time that follows
        self._burst_ends = 0.0
        self._probing = False
        self._changed = asyncio.Event()
        self._on_idle: Callable[[], object] | None = None

    @property
    def down(self) -> bool:
        """Whether nothing succeeds."""
        return self._failures >= ENOUGH

    @property
    def given_up(self) -> bool:
        """Whether nothing has succeeded for too long."""
        return self.down and self.failing_for >= self._give_up_after

    @property
    def failing_for(self) -> float:
        """Seconds since the first attempt was sent of those that have failed in a row; 0 if none has."""
        return max(0.0, asyncio.get_running_loop().time() - self._failing_since)

    def stop(self, on_idle: Callable[[], object] | None = None) -> None:
        """Refuse every further attempt.

        Args:
            on_idle: Called once when no attempt is under way any more; at once if none is now.
        """
        self.stopped = True
        self._on_idle = on_idle
        self._note_change()
        self._tell_if_idle()

    async def allow(self) -> bool:
        """Wait until an attempt may be sent; while the endpoint is down one is sent at a time, after a rest.

        Returns:
            Whether it is the one that tries whether the endpoint answers again; then `tried` must be called in the end.

        Raises:
            ShutDown: Attempts are refused.
        """
        while True:
            if self.stopped:
                raise ShutDown("not sent: stopped before its turn")
            if self.given_up:
                raise ShutDown(f"not sent: nothing was answered for {self.failing_for:.0f} s")
            if self.down:
                if not self._probing and not self._rest.on:
                    if await self._probed() is None:
                        self._probing = True
                        return True
                    continue
                left = self._give_up_after - self.failing_for
                left = min(self._rest.left or left, left)
            elif self.answered or self.on_wire < UNTRIED:
                left = self._pause()
                if not left:
                    return False
            else:
                left = float("inf")
            await wait(self._changed, None if left == float("inf") else left)

    async def rested(self) -> None:
        """Wait until no rest lasts, or attempts are refused."""
        while self.down and self._rest.on and not self.stopped and not self.given_up:
            await wait(self._changed, min(self._rest.left, self._give_up_after - self.failing_for))

    def _pause(self) -> float:
        """Return the seconds until another attempt may begin; 0 counts it as begun."""
        now = asyncio.get_running_loop().time()
        if now >= self._burst_ends:
            self._burst, self._burst_ends = 0, now + PACE
        if self._burst >= BURST:
            return self._burst_ends - now
        self._burst += 1
        return 0.0

    async def answers(self) -> bool:
        """Return whether a question that was answered before is answered now; if not, the endpoint is down."""
        answered = await self._probed()
        if answered is False:
            self._failures = max(self._failures, ENOUGH)
        return bool(answered)

    async def _probed(self) -> bool | None:
        """Ask what was answered before, and note how that ends; None if nothing was."""
        sent = asyncio.get_running_loop().time()
        self._probing = True
        try:
            answered = None if self.probe is None else await self.probe()
        finally:
            self.tried()
        if answered:
            self.succeeded(sent)
        elif answered is False:
            self._failing_since = min(self._failing_since, sent)
            self._begin_rest()
        return answered

    def tried(self) -> None:
        """The attempt that tries whether the endpoint answers again has ended."""
        self._probing = False
        self._note_change()

    def begin(self) -> None:
        """Note that an attempt is sent."""
        self.sent += 1
        self.on_wire += 1

    def end(self) -> None:
        """Note that an attempt has ended, after how it did."""
        self.on_wire -= 1
        self._note_change()
        self._tell_if_idle()

    def succeeded(self, sent: float) -> None:
        """Note an answer to an attempt that was sent at the loop time *sent*."""
        self.answered = True
        self._latest = max(self._latest, sent)
        if sent >= self._failing_since:
            self._failures, self._failing_since = 0, float("inf")
            self._rest.end()

    def failed(self, error: Exception, sent: float) -> None:
        """Note that an attempt sent at the loop time *sent* failed with *error*, for which the endpoint may be to blame."""
        if sent < self._latest:
            return
        self.error = error
        self._failures += ENOUGH if is_refusal(error) else 1
        self._failing_since = min(self._failing_since, sent)
        if self.down and (self._probing or not self.answered or self.probe is None):
            self._begin_rest()  # else the control is asked first, and at once

    def _begin_rest(self) -> None:
        self._rest.take(f"{type(self.error).__name__}: {self.error}")

    def _note_change(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _tell_if_idle(self) -> None:
        if self.stopped and not self.on_wire and self._on_idle is not None:
            told, self._on_idle = self._on_idle, None
            told()
