"""The state of each (endpoint, model, credentials): its limits, its retry budget, its breaker, and its calls under way.

The scheduler grants each attempt of a call its permit and its slot in one step. An account only answers whether it can pay now, and
notifies the scheduler when asking again may succeed.
"""

from __future__ import annotations

import asyncio
import contextvars
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from microbatch.errors import RateLimited, RequestFailed, StatusError
from microbatch.lru import SharedLRU
from microbatch.messages import Limits
from microbatch.policy import MAX_WAIT
from microbatch.protocols import Completion
from microbatch.transience import RetryBudget
from microbatch.transports.credentials import credentials_digest, is_credential, lasting_digest
from microbatch.transports.guards import Breaker, Concurrency
from microbatch.transports.response_headers import read_limits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from microbatch.policy import RetryPolicy
    from microbatch.transports.expenses import Expense
    from microbatch.transports.permits import Limiter
    from microbatch.transports.rate_limit import RateLimit

CAPACITY: Final = 1_024

_BINDS: Final = 0.2
"""A reported limit on requests binds once less than this part of it is left."""

_NEVER: Final = float("inf")

_MOST_TOKENS: Final = 2**31
"""A charge that no request reaches. Callers may name any `max_tokens`, and sums of floats with a larger one lose the others."""

_ASKED_WITHIN: Final = 1.0
"""Seconds after which what may be granted and was not asked for counts as withdrawn; it is asked for as soon as a slot is free."""


@dataclass(slots=True, eq=False)
class Permit:
    """Permission to send one call, attempt by attempt.

    Attributes:
        tokens: Tokens charged for each attempt.
        combined: Whether the call carries several requests.
        begun: Whether the call has begun and not finished.
        paid: Whether the next attempt may be made: it has its permit and its slot.
        slot: Whether it holds a slot; with `overdrawn`, one of the overdraft of high priority. Set by the scheduler.
        drawn: Whether the retry budget has paid for the next attempt.
        error: Error of the latest attempt.
        sent: Loop time of the latest grant.
        expense: Returns what the next attempt is expected to cost; None if it costs nothing, or there is no budget.
    """

    account: Account
    tokens: int
    rank: int
    combined: bool = False
    begun: bool = False
    paid: bool = False
    slot: bool = False
    overdrawn: bool = False
    drawn: bool = False
    error: RequestFailed | None = None
    grant: Any = None
    sent: float = 0.0
    expense: Callable[[], Expense] | None = None

    def pay(self) -> bool:
        """See `Account.pay`."""
        return self.account.pay(self)

    async def admit(self) -> None:
        """Wait until the next attempt is paid and has a slot; raise a `StatusError`, holding nothing, while the breaker is open."""
        loop, breaker = asyncio.get_running_loop(), self.account.breaker
        try:
            breaker.check(loop.time())
            while not self.paid:
                await self.account.slots.admit(self)
                breaker.check(loop.time())
        except BaseException:
            self.cancel()
            raise

    def hand_back(self) -> None:
        """Return the grant of the next attempt, which has to wait for something else and is granted anew then."""
        if self.paid:
            self.account.cancel(self)

    async def back_off(self, seconds: float) -> None:
        """Wait before the next attempt, counted as backing off."""
        account = self.account
        account.backing_off += 1
        account.slots.changed(account)
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            account.backing_off -= 1
            account.slots.changed(account)

    def finish(self) -> None:
        """Refund what was paid for an attempt that will not be made, and end the call. Idempotent."""
        self.cancel()
        if self.begun:
            self.begun = False
            self.account.begun -= 1
            self.account.slots.changed(self.account)

    def cancel(self) -> None:
        """Refund what was paid for the next attempt, which will not be made."""
        if self.drawn:
            self.drawn = False
            self.account.budget.give_back()
        if self.paid:
            self.account.cancel(self)
        elif self.slot:
            self.account.slots.released(self)  # granted so that the attempt could be refused

    def used(self) -> None:
        """Note that a borrower of the slot made the attempt, with unknown outcome."""
        if self.paid:
            self.paid = False
            self.account.dropped(self)


class Slots(Protocol):
    """The scheduler, as accounts use it."""

    def ready(self, account: Account) -> bool:
        """Note that *account* refused a permit and may have one now; return whether anything is going to ask for it."""
        ...

    def changed(self, account: Account) -> None:
        """Note that calls of *account* have begun, finished, or started or ended a back-off."""
        ...

    def released(self, permit: Permit) -> None:
        """Take back the slot of *permit*, whose attempt is over."""
        ...

    async def admit(self, permit: Permit) -> None:
        """Wait until the next attempt of *permit* is paid and has a slot, or could only be refused."""
        ...


class Account:
    """One (endpoint, model, credentials); *adaptive* limits the calls under way to what the endpoint can handle.

    Attributes:
        max_tokens: Maximum tokens of one grant, None for no limit; follows the limit that the endpoint reports.
        has_worked: Whether any call was answered.
        on_wire: Attempts under way, each of which holds a slot.
        begun: Calls begun and not finished, back-off included.
        backing_off: Begun calls that wait after a transient failure.
        requests_bind: Whether the number of requests is limited: by a `RateLimit`, or since the endpoint reported that few are left.
        refused: Tokens of the latest attempt, if it was refused a permit and none may be had yet; else None.
    """

    def __init__(self, retry: RetryPolicy, bucket: Limiter | None, slots: Slots, *, adaptive: bool = False) -> None:
        self.budget: RetryBudget = RetryBudget(retry)
        self.breaker: Breaker = Breaker()
        self.max_tokens = None if bucket is None else bucket.max_tokens
        self.requests_bind: bool = bucket is not None and bucket.limits_requests
        self.has_worked: bool = False
        self.slots = slots
        self.on_wire: int = 0
        self.begun: int = 0
        self.backing_off = 0
        self.used: float = 0.0
        self._bucket = bucket
        self._claimant = object()  # identifies this account to the bucket, which must not keep the account alive
        self._concurrency = Concurrency() if adaptive else None
        self._paused_until = 0.0
        self.refused: int | None = None
        self._timer: asyncio.TimerHandle | None = None
        if bucket is not None:
            bucket.watch(self._ask_again)

    @property
    def trouble(self) -> str | None:
        """The reason for which its requests wait although they are within the limits; None if nothing is wrong."""
        return None if self._bucket is None or self.refused is None else self._bucket.trouble

    def permit(self, tokens: int, rank: int, *, again: bool = False) -> Permit:
        """Return an unpaid permit; *again* if the retry budget has paid for its first attempt, which repeats a call."""
        return Permit(self, min(tokens, _MOST_TOKENS), rank, drawn=again)

    def pay(self, permit: Permit) -> bool:
        """Pay for the next attempt of *permit*; return whether it need not wait.

        While the breaker is open the attempt need not wait, as it can only be refused, and is not paid. If the account cannot pay
        now, the scheduler is notified when trying again may succeed.
        """
        now = asyncio.get_running_loop().time()
        if self.breaker.is_open(now):
            return True
        if (wait := self._wait(permit.tokens, now)) > 0:
            self.refused = permit.tokens
            self._ask_again_at(now + wait)
            return False
        self.refused = None
        if self.breaker.needs_probe(now):
            self.breaker.probe = permit
        self._charge(permit, now)
        return True

    def pay_lent(self, permit: Permit) -> float:
        """Pay for the attempt that a borrower of the slot makes, unless it is paid: one that no open breaker refuses.

        Return the seconds after which to try again, infinite if only the end of a call can help; 0.0 if it is paid now.
        """
        now = asyncio.get_running_loop().time()
        if permit.paid:
            return 0.0
        wait = self._wait(permit.tokens, now)
        if wait <= 0:
            self._charge(permit, now)
        return max(0.0, wait)

    def _charge(self, permit: Permit, now: float) -> None:
        permit.paid = True
        permit.sent = self.used = now
        self.on_wire += 1
        if not permit.begun:
            permit.begun = True
            self.begun += 1
        if self._bucket is not None:
            permit.grant = self._bucket.grant(permit.tokens, now, self._claimant)

    def cancel(self, permit: Permit) -> None:
        """Take back what was granted to *permit* and not used."""
        permit.paid = False
        if self._bucket is not None and permit.grant is not None:
            self._bucket.cancel(permit.grant)
        self.dropped(permit)

    def ended(self, permit: Permit, outcome: Completion | RequestFailed, *, reserved: bool = True) -> None:
        """Learn from an attempt that is over; *reserved* if it had a `max_tokens`, which endpoints charge even if less is generated."""
        now = asyncio.get_running_loop().time()
        error, usage = (outcome, None) if isinstance(outcome, RequestFailed) else (None, outcome.usage)
        self.has_worked |= error is None
        self.breaker.note(error, sent=permit.sent, now=now, combined=permit.combined, permit=permit)
        if self._concurrency is not None:
            self._concurrency.note(error, sent=permit.sent, in_flight=self.on_wire, now=now)
        if isinstance(error, RateLimited) and error.retry_after is not None and error.retry_after <= MAX_WAIT:
            self._paused_until = max(self._paused_until, now + error.retry_after)
        limits = outcome.limits if isinstance(outcome, Completion | StatusError) else None
        reported = limits if limits is None or isinstance(limits, Limits) else read_limits(limits)
        self.requests_bind = self.requests_bind or (reported is not None and _bind(reported))
        if self._bucket is not None and permit.grant is not None:
            self._bucket.ended(permit.grant, usage, reported, now, reserved=reserved)
            self.max_tokens = self._bucket.max_tokens
        self._attempt_ended(permit)

    def dropped(self, permit: Permit) -> None:
        """Note the end of an attempt that was cancelled: nothing can be learned from it."""
        self.breaker.forget(permit)
        self._attempt_ended(permit)

    def close(self) -> None:
        """Stop the timer; the scheduler is not notified any more."""
        self._stop_timer()
        self.refused = None
        if self._bucket is not None:
            self._bucket.disclaim(self._claimant)

    def _attempt_ended(self, permit: Permit) -> None:
        self.on_wire -= 1
        self.slots.released(permit)
        if self.refused is not None:
            self._ask_again()

    def _wait(self, tokens: int, now: float) -> float:
        """Return the seconds until a permit may be granted; infinite if only the end of a call can make it so."""
        if self.breaker.probe is not None:
            return _NEVER
        if self._concurrency is not None and not self._concurrency.allows(self.on_wire):
            return _NEVER
        pause = max(0.0, self._paused_until - now)
        return pause if self._bucket is None else max(pause, self._bucket.wait(tokens, now, self._claimant))

    def _ask_again(self) -> None:
        """Have the scheduler ask again as soon as it may be granted what it was refused."""
        self._stop_timer()
        if self.refused is None:
            return
        now = asyncio.get_running_loop().time()
        wait = 0.0 if self.breaker.is_open(now) else self._wait(self.refused, now)
        if wait <= 0:
            self.refused = None
            # The claim stays until it is asked for: without it, two batchers with large requests would give way to each other for ever.
            if not self.slots.ready(self):
                self._disclaim()
            elif self._bucket is not None:
                self._call_at(now + _ASKED_WITHIN, self._disclaim)
        else:
            self._ask_again_at(now + wait)

    def _disclaim(self) -> None:
        """Drop the claim to what was refused, if that was withdrawn."""
        self._stop_timer()
        if self.refused is None and self._bucket is not None:
            self._bucket.disclaim(self._claimant)

    def _ask_again_at(self, when: float) -> None:
        self._stop_timer()
        if when < _NEVER:  # else the end of a call leads to it
            self._call_at(when, self._ask_again)

    def _call_at(self, when: float, call: Callable[[], None]) -> None:
        # An empty context: not that of the caller that happens to be refused.
        self._timer = asyncio.get_running_loop().call_at(when, call, context=contextvars.Context())

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Accounts:
    """The accounts in use, and those used recently; `base_url` and `model` of *transport* identify them."""

    def __init__(self, transport: object, retry: RetryPolicy, limit: RateLimit | None, slots: Slots) -> None:
        self._transport = transport
        self._base_url = getattr(transport, "base_url", "")
        self._model = getattr(transport, "model", None)
        self._retry = retry
        self._limit = limit
        self._slots = slots
        self._kept: SharedLRU[object, Account] = SharedLRU(CAPACITY)

    def of(self, model: str | None, headers: Mapping[str, str]) -> Account:
        """Return the account of calls to *model* with *headers*."""
        key = (self._base_url, model or self._model, credentials_digest(headers.items()) if headers else b"")
        now = asyncio.get_running_loop().time()
        return self._kept.get_or_make(key, lambda: self._make(key, now, partial(self._name, model, headers)), now)

    def close(self) -> None:
        """Stop the timers of all accounts."""
        for account in self._kept.values():
            account.close()

    def _make(self, key: object, now: float, name: Callable[[], str]) -> Account:
        limit = self._limit
        bucket = limit.bucket(key, now, name) if limit is not None and (limit.rpm or limit.tpm) else None
        return Account(self._retry, bucket, self._slots, adaptive=limit is not None and limit.adaptive)

    def _name(self, model: str | None, headers: Mapping[str, str]) -> str:
        """Return what names the account of calls to *model* with *headers* in every process; it does not show the key."""
        own = b"" if any(map(is_credential, headers)) else getattr(self._transport, "account_digest", b"")
        parts = [self._base_url, model or self._model, own, lasting_digest(headers.items())]
        return blake2b(msgspec.json.encode(parts), digest_size=16).hexdigest()


def _bind(limits: Limits) -> bool:
    """Return whether an endpoint that reports *limits* is about to limit the number of requests."""
    limit, left = limits.limit_requests, limits.remaining_requests
    return limit is not None and left is not None and left < _BINDS * limit
