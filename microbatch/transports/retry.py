"""Makes the attempts of one call: the only retry loop there is."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Final

from microbatch.errors import (
    UNPAID,
    ConfigError,
    RateLimited,
    RequestFailed,
    StatusError,
    TransportError,
)
from microbatch.policy import MAX_WAIT
from microbatch.transience import Backoff, is_transient
from microbatch.transports.bucket import WINDOW

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.policy import RetryPolicy
    from microbatch.protocols import ChatCall, Completion, Transport
    from microbatch.transports.accounts import Permit

# The ladder has two steps, and an endpoint may refuse the names of max_tokens, temperature, stream and stream_options, and
# one schema; a transport that still learns after this many refusals is going round in circles.
_MAX_LESSONS: Final = 8


class Sender:
    """Sends calls through *transport* as often as it takes and the policy allows.

    Args:
        transport: Makes one attempt.
        policy: When a failed call is made again.
        draw: Makes the jitter: numbers from 0 to 1.

    Attributes:
        repeats: Attempts that repeated a failed attempt of the same call.
        unpaid: Attempts not made because the retry budget was used up.
        rate_limited: Attempts that were answered with "too many requests".
    """

    def __init__(self, transport: Transport, policy: RetryPolicy, draw: Callable[[], float] = random.random) -> None:
        self._transport = transport
        self._policy = policy
        self._draw = draw
        self.repeats = 0
        self.unpaid = 0
        self.rate_limited = 0

    async def send(
        self,
        call: ChatCall,
        on_text: Callable[[str], None],
        *,
        on_attempt: Callable[[], None],
        on_cut: Callable[[Completion | None], bool],
        permit: Permit,
    ) -> Completion:
        """Send *call* until it succeeds or fails for good.

        Args:
            call: What to ask. Its timeout is that of all attempts together.
            on_text: Takes the pieces of the answer.
            on_attempt: Called before each attempt.
            on_cut: Called when an attempt broke off after its first piece, or ended without saying why (then with its
                completion); tells whether nothing of it was used, so that the call may be repeated as it is. What was used
                stands, and the call is not repeated.
            permit: What pays the attempts.

        Returns:
            How the call ended; with a `finish_reason` of None if it was cut off and part of it was used.

        Raises:
            RequestFailed: The last attempt's error. Anything else a transport raises comes as a `TransportError` from it.
            ConfigError: The transport cannot send the call: the last attempt, though announced by *on_attempt*, was not made.
        """
        loop = asyncio.get_running_loop()
        end = None if call.timeout is None else loop.time() + call.timeout
        heard = False

        def hear(text: str) -> None:
            nonlocal heard
            heard = True
            on_text(text)

        account, send = permit.account, self._transport.send
        lessons = failures = 0
        backoff = Backoff(self._policy.base, self._policy.cap, draw=self._draw)
        excused_until: float | None = None
        while True:
            await permit.admit()
            drawn, earned = permit.drawn, 0.0
            permit.paid = permit.drawn = False
            if permit.error is not None:
                self.repeats += 1
            elif not permit.again:
                earned = account.budget.first()
            if end is not None:
                call.timeout = max(0.0, end - loop.time())
            on_attempt()
            completion: Completion | None = None
            try:
                completion = await send(call, hear)
                reserved = call.max_tokens is not None or completion.bound is not None
                account.ended(permit, None, completion.usage, completion.limits, reserved=reserved)
                if completion.finish_reason not in (None, "error"):
                    return completion
                failure: RequestFailed = TransportError("the reply was cut off: it ended without a finish_reason")
            except RequestFailed as error:
                failure = error
                account.ended(permit, failure)
            except Exception as error:
                if isinstance(error, ConfigError) and not heard:
                    self._undo(permit, drawn=drawn, earned=earned)
                    raise
                failure = TransportError(f"the transport raised {type(error).__name__}")
                account.ended(permit, failure)
                raise failure from error
            except BaseException:
                account.dropped(permit)
                raise
            permit.error = failure
            self.rate_limited += isinstance(failure, RateLimited)
            cut = completion is not None or (heard and (type(failure) is TransportError or is_transient(failure)))
            if (heard and not cut) or (cut and not on_cut(completion)):
                if completion is None:
                    raise failure
                return completion
            heard = False
            if isinstance(failure, StatusError) and failure.again and lessons < _MAX_LESSONS:
                lessons += 1
            else:
                failures += 1
                excused = isinstance(failure, RateLimited) and failure.token_limits is not None
                if excused and excused_until is None:
                    # Refused for the pace with a bound of ours: it waits for what our bounds have reserved of this minute's tokens.
                    excused_until = loop.time() + WINDOW
                excused = excused and loop.time() < (excused_until or 0.0)
                await self._back_off(
                    failure, failures, backoff, permit, worth=cut or is_transient(failure), excused=excused
                )

    def _undo(self, permit: Permit, *, drawn: bool, earned: float) -> None:
        """Give back what was paid for an attempt that was not made, and count it no more."""
        self.repeats -= permit.error is not None
        permit.account.budget.take_back(earned)
        permit.paid, permit.drawn = True, drawn
        permit.cancel()

    async def _back_off(
        self,
        error: RequestFailed,
        failures: int,
        backoff: Backoff,
        permit: Permit,
        *,
        worth: bool,
        excused: bool = False,
    ) -> None:
        """Wait until another attempt may be *worth* it; one that is *excused* neither counts nor draws on the budget.

        Raises:
            RequestFailed: *error* itself, if it is not, or the budget is used up.
        """
        policy, budget = self._policy, permit.account.budget
        asked = error.retry_after if isinstance(error, StatusError) else None
        if not worth or (failures >= policy.max_attempts and not excused) or (asked or 0.0) > MAX_WAIT:
            raise error
        if not excused and not budget.draw():
            self.unpaid += 1
            error.add_note(UNPAID)
            raise error
        permit.drawn = not excused
        # What the endpoint asks is the least; the random part keeps those who were told the same from coming back as one.
        try:
            with permit.account.resting():
                await asyncio.sleep((asked or 0.0) + backoff.next())
        except asyncio.CancelledError:
            permit.cancel()
            raise
