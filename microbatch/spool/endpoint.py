"""Attribution of failures to the endpoint or to a request, and pauses while an endpoint does not answer.

A single failure does not show its cause. While other requests are answered, a request that fails repeatedly is the cause. While none
is answered, the endpoint is: requests are kept, and it is probed one at a time, less and less often, until it answers again.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
from typing import TYPE_CHECKING, Final

from microbatch.errors import (
    AuthFailed,
    BatcherClosed,
    BudgetExceeded,
    ConfigError,
    ConnectFailed,
    QuotaExhausted,
    RateLimited,
    ServerError,
    ShutDown,
    StatusError,
    TransportError,
)
from microbatch.transience import Backoff, is_transient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

logger: Final = logging.getLogger("microbatch")

FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 60.0  # seconds of the first and the longest pause after failures that no request caused
GIVE_UP_AFTER: Final = 600.0  # default number of seconds without a single answer after which a command stops
ENOUGH: Final = 3
"""Number of consecutive failures, with no answer to a later attempt, after which the endpoint counts as down."""

UNTRIED: Final = 8  # most attempts under way until the first one is answered
BURST: Final = 32
PACE: Final = 0.05
"""At most `BURST` attempts begin within `PACE` seconds: calls that end together are not followed by as many at once, all of which
would be lost if an outage begins."""

_DOWN: Final = frozenset({502, 503, 529})  # an endpoint that is overloaded or absent, whatever the request
_NOT_FOUND: Final = 404  # a wrong model or address if every request gets it; otherwise this request's
_UNAUTHORIZED: Final = 401


class Cause(enum.Enum):
    """The cause of a failure."""

    REQUEST = enum.auto()
    """The endpoint answers; it refuses this request, or the answer is unusable."""
    EITHER = enum.auto()
    """The request if others are answered meanwhile, otherwise the endpoint."""
    ENDPOINT = enum.auto()
    """The endpoint, the key, the account or the batcher, and no request."""


def cause_of(error: BaseException) -> Cause:
    """Return the cause of *error*."""
    if isinstance(error, StatusError) and error.again:
        return Cause.REQUEST
    if isinstance(error, BudgetExceeded | ConnectFailed | RateLimited | QuotaExhausted | ShutDown | BatcherClosed):
        return Cause.ENDPOINT
    if isinstance(error, AuthFailed):
        return Cause.ENDPOINT if error.status == _UNAUTHORIZED else Cause.EITHER
    if isinstance(error, StatusError):
        if error.status in _DOWN:
            return Cause.ENDPOINT
        doubtful = isinstance(error, ServerError) or error.status == _NOT_FOUND or is_transient(error)
        return Cause.EITHER if doubtful else Cause.REQUEST
    # A call that ended without an answer, and a missing model, key or header.
    return Cause.EITHER if isinstance(error, TransportError | ConfigError) else Cause.REQUEST


def is_refusal(error: BaseException) -> bool:
    """Return whether *error* refuses the key or the account: every request gets the same, and waiting does not help."""
    return isinstance(error, QuotaExhausted) or (isinstance(error, AuthFailed) and error.status == _UNAUTHORIZED)


def may_refuse_all(error: BaseException) -> bool:
    """Return whether *error* means a wrong key, address or model if other requests get it as well and none is answered."""
    return isinstance(error, AuthFailed | QuotaExhausted) or (
        isinstance(error, StatusError) and error.status == _NOT_FOUND
    )


class Pause:
    """Pauses after failures that no request caused, each twice as long as the one before, until something succeeds.

    *what* is the start of the log message; *first* and *longest* are durations in seconds.
    """

    def __init__(self, what: str, *, first: float, longest: float) -> None:
        self._what = what
        self._backoff = Backoff(first, max(first, longest))
        self._until = 0.0

    @property
    def left(self) -> float:
        """Seconds until the end of the present pause; 0 if there is none."""
        return max(0.0, self._until - asyncio.get_running_loop().time())

    def begin(self, why: str) -> None:
        """Begin a pause, unless there is one: of the attempts under way at the first failure only that one counts."""
        if self.left:
            return
        seconds = self._backoff.next()
        self._until = asyncio.get_running_loop().time() + seconds
        logger.warning("%s for %g s, for reasons that are no request's fault: %s", self._what, seconds, why)

    def reset(self) -> None:
        """Make the next pause a first one, after a success."""
        self._backoff.reset()


async def wait(event: asyncio.Event, seconds: float | None) -> None:
    """Wait for *event*, at most *seconds*; None for no limit."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


class Endpoint:
    """State of an endpoint, judged by the attempts sent to it; delays attempts while it does not answer.

    Attempts are compared by when they were sent: an answer to one sent before an outage says nothing about those sent later.

    Args:
        what: What a pause means, for the log.
        give_up_after: Seconds without an answer, counted from the first failed attempt, after which attempts are refused.

    Attributes:
        answered: Whether any attempt has succeeded.
        error: The error of the latest failure that counted, or None.
        sent: Number of attempts begun.
        on_wire: Number of those that have not ended.
        probe: Sends a request that was answered before, bypassing this object, and returns whether it is answered now; None if there
            is no such request yet. Without it, or then, one of the waiting attempts serves as the probe.
    """

    def __init__(self, what: str, *, give_up_after: float | None = None) -> None:
        self.answered: bool = False
        self.stopped: bool = False
        self.error: Exception | None = None
        self.sent: int = 0
        self.on_wire: int = 0
        self.probe: Callable[[], Awaitable[bool | None]] | None = None
        self._give_up_after = float("inf") if give_up_after is None else give_up_after
        self._pause = Pause(what, first=FIRST_PAUSE, longest=LONGEST_PAUSE)
        self._failures = 0  # consecutive
        self._failing_since = float("inf")  # when the first of them was sent
        self._latest = float("-inf")  # when the latest successful attempt was sent
        self._burst = 0  # attempts begun in the `PACE` seconds before `_burst_ends`
        self._burst_ends = 0.0
        self._probing = False
        self._changed = asyncio.Event()
        self._on_idle: Callable[[], object] | None = None

    @property
    def down(self) -> bool:
        """True if nothing succeeds."""
        return self._failures >= ENOUGH

    @property
    def given_up(self) -> bool:
        """True if nothing has succeeded for `give_up_after` seconds."""
        return self.down and self.failing_for >= self._give_up_after

    @property
    def failing_for(self) -> float:
        """Seconds since the first of the consecutive failures was sent; 0 if there is none."""
        return max(0.0, asyncio.get_running_loop().time() - self._failing_since)

    def stop(self, on_idle: Callable[[], object] | None = None) -> None:
        """Refuse all further attempts; *on_idle* is called once, as soon as none is under way."""
        self.stopped = True
        self._on_idle = on_idle
        self._note_change()
        self._report_idle()

    @contextlib.asynccontextmanager
    async def attempt(self) -> AsyncIterator[float]:
        """Wait until an attempt may be sent, and yield the loop time then; the block reports `succeeded` or `failed`.

        While the endpoint is down, attempts are sent one at a time, each after a pause.

        Raises:
            ShutDown: Attempts are refused.
        """
        probes = await self._allow()
        self.sent += 1
        self.on_wire += 1
        try:
            yield asyncio.get_running_loop().time()
        finally:
            self.on_wire -= 1
            if probes:
                self._probing = False
            self._note_change()
            self._report_idle()

    async def _allow(self) -> bool:
        """Wait until an attempt may be sent; return whether it is a probe."""
        while True:
            if self.stopped:
                raise ShutDown("not sent: stopped before its turn")
            if self.given_up:
                raise ShutDown(f"not sent: nothing was answered for {self.failing_for:.0f} s")
            if self.down:
                if not self._probing and not self._pause.left:
                    if await self._probed() is None:
                        self._probing = True
                        return True
                    continue
                left = self._give_up_after - self.failing_for
                left = min(self._pause.left or left, left)
            elif self.answered or self.on_wire < UNTRIED:
                left = self._pace()
                if not left:
                    return False
            else:
                left = float("inf")
            await wait(self._changed, None if left == float("inf") else left)

    async def rested(self) -> None:
        """Wait until there is no pause, or attempts are refused."""
        while self.down and self._pause.left and not self.stopped and not self.given_up:
            await wait(self._changed, min(self._pause.left, self._give_up_after - self.failing_for))

    def _pace(self) -> float:
        """Return the seconds until another attempt may begin; 0 counts it as begun."""
        now = asyncio.get_running_loop().time()
        if now >= self._burst_ends:
            self._burst, self._burst_ends = 0, now + PACE
        if self._burst >= BURST:
            return self._burst_ends - now
        self._burst += 1
        return 0.0

    async def answers(self) -> bool:
        """Return whether a request that was answered before is answered now; if not, the endpoint is down."""
        answered = await self._probed()
        if answered is False:
            self._failures = max(self._failures, ENOUGH)
        return bool(answered)

    async def _probed(self) -> bool | None:
        """Run `probe` and record its outcome; None if there is nothing to probe with."""
        sent = asyncio.get_running_loop().time()
        self._probing = True
        try:
            answered = None if self.probe is None else await self.probe()
        finally:
            self._probing = False
            self._note_change()
        if answered:
            self.succeeded(sent)
        elif answered is False:
            self._failing_since = min(self._failing_since, sent)
            self._begin_pause()
        return answered

    def succeeded(self, sent: float) -> None:
        """Record an answer to an attempt sent at the loop time *sent*."""
        self.answered = True
        self._latest = max(self._latest, sent)
        if sent >= self._failing_since:
            self._failures, self._failing_since = 0, float("inf")
            self._pause.reset()

    def failed(self, error: Exception, sent: float) -> None:
        """Record that an attempt sent at the loop time *sent* failed with *error*, whose cause may be the endpoint."""
        if sent < self._latest:
            return
        self.error = error
        self._failures += ENOUGH if is_refusal(error) else 1
        self._failing_since = min(self._failing_since, sent)
        if self.down and (self._probing or not self.answered or self.probe is None):
            self._begin_pause()  # otherwise `probe` comes first, and at once

    def _begin_pause(self) -> None:
        self._pause.begin(f"{type(self.error).__name__}: {self.error}")

    def _note_change(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _report_idle(self) -> None:
        if self.stopped and not self.on_wire and self._on_idle is not None:
            on_idle, self._on_idle = self._on_idle, None
            on_idle()
