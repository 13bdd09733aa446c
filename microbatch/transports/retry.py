"""The attempts of one call: the only retry loop."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any, Final

from microbatch.errors import (
    UNPAID,
    ConfigError,
    ConnectFailed,
    RateLimited,
    RequestFailed,
    StatusError,
    TransportError,
)
from microbatch.policy import MAX_WAIT
from microbatch.protocols import EmbeddingCall
from microbatch.transience import Backoff, is_transient
from microbatch.transports.permits import WINDOW

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from microbatch.policy import RetryPolicy
    from microbatch.protocols import ChatCall, Completion, Embedded, Transport
    from microbatch.transports.accounts import Permit
    from microbatch.transports.expenses import Purse

# Structured output has two steps down, and an endpoint may refuse the names of max_tokens, temperature, stream and stream_options, and
# one schema; a transport that still learns after this many refusals is going round in circles.
_MAX_LESSONS: Final = 8


class Sender:
    """Sends calls through *transport*, repeating failed attempts as *policy* allows; *draw* returns random numbers from 0 to 1.

    With a *purse*, each attempt is paid for before it leaves.

    Attributes:
        repeats: Attempts that repeated a failed attempt of the same call.
        unpaid: Attempts not made because the retry budget was used up.
        rate_limited: Attempts refused with "too many requests".
    """

    def __init__(
        self,
        transport: Transport,
        policy: RetryPolicy,
        draw: Callable[[], float] = random.random,
        purse: Purse | None = None,
    ) -> None:
        self._transport = transport
        self._embed: Callable[[EmbeddingCall], Awaitable[Embedded]] = getattr(transport, "embed", _no_embed)
        self._policy = policy
        self._draw = draw
        self._purse = purse
        self.repeats: int = 0
        self.unpaid: int = 0
        self.rate_limited: int = 0

    async def send(
        self,
        call: ChatCall | EmbeddingCall,
        on_text: Callable[[str], None],
        *,
        on_attempt: Callable[[], None],
        on_cut: Callable[[Completion | None], bool],
        permit: Permit,
    ) -> Completion:
        """Send *call* until it succeeds or fails for good; its timeout is that of all attempts together.

        *on_attempt* is called before each attempt. *on_cut* is called when an attempt broke off after its first piece, or ended without
        a finish reason (then with its completion); it returns whether nothing of it was used, so that the call may be repeated as it
        is. What was used stands, and the call is not repeated.

        Returns:
            How the call ended; with a `finish_reason` of None if it was cut off and part of it was used.

        Raises:
            RequestFailed: The last attempt's error, or a `BudgetExceeded`. Anything else from a transport comes as a `TransportError`.
            ConfigError: The transport cannot send the call: the last attempt, though announced by *on_attempt*, was not made.
        """
        now = asyncio.get_running_loop().time
        end = None if call.timeout is None else now() + call.timeout
        backoff = Backoff(self._policy.base, self._policy.cap, draw=self._draw)
        failures = lessons = 0  # a lesson is a refusal from which the transport has learned
        paced_until: float | None = None
        while True:
            charge = await self._admit(permit, on_attempt)
            if end is not None:
                call.timeout = max(0.0, end - now())
            outcome, heard = await self._paid(charge, self._attempt(call, on_text, on_attempt, permit))
            if isinstance(outcome, RequestFailed):
                completion, failure = None, outcome
                cut = heard and (type(failure) is TransportError or is_transient(failure))
            elif outcome.finish_reason not in (None, "error"):
                return outcome
            else:
                completion, cut = outcome, True
                failure = TransportError("the reply was cut off: it ended without a finish_reason")
            if isinstance(failure, ConnectFailed) and failure.again and lessons < _MAX_LESSONS:
                lessons += 1
                continue
            permit.error = failure
            self.rate_limited += isinstance(failure, RateLimited)
            if (heard and not cut) or (cut and not on_cut(completion)):
                if completion is None:
                    raise failure
                return completion
            if isinstance(failure, StatusError) and failure.again and lessons < _MAX_LESSONS:
                lessons += 1
                continue
            if paced := isinstance(failure, RateLimited) and failure.token_limits is not None:
                # It only asks to wait for what our own bounds have reserved of this minute's tokens.
                paced_until = paced_until or now() + WINDOW
                paced = now() < paced_until
            failures += 1
            if not (cut or is_transient(failure)) or (failures >= self._policy.max_attempts and not paced):
                raise failure
            await self._back_off(permit, failure, backoff, free=paced)

    async def _admit(self, permit: Permit, on_attempt: Callable[[], None]) -> Any:
        """Wait until the next attempt has its permit and is charged; return the charge, None if there is nothing to pay."""
        while True:
            await permit.admit()
            if self._purse is None or permit.expense is None:
                return None
            try:
                charge = await self._purse.charge(permit.expense())
            except BaseException as error:
                permit.cancel()
                if isinstance(error, ConfigError):
                    on_attempt()  # see `send`
                raise
            if not isinstance(charge, asyncio.Future):
                return charge
            permit.hand_back()  # others may be able to pay
            await charge

    async def _paid(
        self, charge: Any, attempt: Coroutine[Any, Any, tuple[Completion | RequestFailed, bool]]
    ) -> tuple[Completion | RequestFailed, bool]:
        """Make an *attempt*, and correct its *charge* by how it ends."""
        purse = self._purse
        if charge is None or purse is None:
            return await attempt
        try:
            outcome, heard = await attempt
        except ConfigError:  # it was not made
            await purse.give_back(charge)
            raise
        except BaseException:
            purse.keep(charge)
            raise
        await purse.ended(charge, outcome, heard=heard)
        return outcome, heard

    async def _attempt(
        self,
        call: ChatCall | EmbeddingCall,
        on_text: Callable[[str], None],
        on_attempt: Callable[[], None],
        permit: Permit,
    ) -> tuple[Completion | RequestFailed, bool]:
        """Make one attempt; return how it ended, and whether it brought text. Raise `ConfigError` if it was not made."""
        heard = False

        def hear(text: str) -> None:
            nonlocal heard
            heard = True
            on_text(text)

        account = permit.account
        drawn, earned = permit.drawn, 0.0
        permit.paid = permit.drawn = False
        if permit.error is not None:
            self.repeats += 1
        elif not drawn:
            earned = account.budget.first()
        on_attempt()
        try:
            if isinstance(call, EmbeddingCall):
                completion: Completion = await self._embed(call)
                reserved = False
            else:
                completion = await self._transport.send(call, hear)
                reserved = call.max_tokens is not None or completion.bound is not None
            account.ended(permit, completion, reserved=reserved)
        except RequestFailed as error:
            account.ended(permit, error)
            return error, heard
        except Exception as error:
            if isinstance(error, ConfigError) and not heard:
                # Refund the attempt and uncount it.
                self.repeats -= permit.error is not None
                account.budget.take_back(earned)
                permit.paid, permit.drawn = True, drawn
                permit.cancel()
                raise
            failure = TransportError(f"the transport raised {type(error).__name__}")
            account.ended(permit, failure)
            raise failure from error
        except BaseException:
            account.dropped(permit)
            raise
        return completion, heard

    async def _back_off(self, permit: Permit, error: RequestFailed, backoff: Backoff, *, free: bool) -> None:
        """Wait before the next attempt, which is *free* or drawn from the retry budget; raise *error* if there may be none."""
        asked = (error.retry_after or 0.0) if isinstance(error, StatusError) else 0.0
        if asked > MAX_WAIT:
            raise error
        if not free and not permit.account.budget.draw():
            self.unpaid += 1
            error.add_note(UNPAID)
            raise error
        permit.drawn = not free
        # The delay that the endpoint asks for is the minimum; the random part spreads clients that were told the same.
        await permit.back_off(asked + backoff.next())


async def _no_embed(_call: EmbeddingCall) -> Embedded:
    raise ConfigError("the transport has no embed(): it cannot make embeddings calls")
