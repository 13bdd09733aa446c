"""The state of each (endpoint, model, credentials): its limits, its retry budget, its breaker, and its calls under way.

A *permit* pays the attempts of one call, one by one. The scheduler grants each attempt its permit and its slot in one step; an
account only answers whether it can be paid now, and says when it is worth asking again.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import msgspec

from microbatch.errors import RateLimited, StatusError
from microbatch.lru import SharedLRU
from microbatch.messages import Limits
from microbatch.policy import MAX_WAIT
from microbatch.transports.breaker import Breaker
from microbatch.transports.concurrency import Concurrency
from microbatch.transports.credentials import says_who
from microbatch.transports.limit_headers import read_limits
from microbatch.transports.retry_budget import RetryBudget

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from microbatch.batching.permits import Slots
    from microbatch.errors import RequestFailed
    from microbatch.messages import Usage
    from microbatch.policy import RetryPolicy
    from microbatch.transports.bucket import Bucket, Grant
    from microbatch.transports.rate_limit import RateLimit

CAPACITY: Final = 1_024


class Permit:
    """Leave for one call to be sent; its attempts are paid one by one.

    Attributes:
        account: The account whose limits count.
        tokens: Tokens that each attempt is charged.
        rank: The priority of the requests that the call carries; 0 is the highest.
        combined: Whether the call carries several requests.
        begun: Whether the call has begun and not finished.
        paid: Whether the next attempt may be made: it has its permit and its slot.
        slot: Whether it holds a slot; the scheduler's mark.
        overdrawn: Whether that slot is one of high priority beyond the limit; the scheduler's mark.
        again: Whether the call asks again for what a cut left open.
        drawn: Whether the retry budget has paid for the next attempt.
        error: The error of the latest attempt, or None.
        grant: What the bucket has granted the latest attempt, or None.
        sent: Loop time at which the latest attempt was granted.
    """

    __slots__ = (
        "account",
        "again",
        "begun",
        "combined",
        "drawn",
        "error",
        "grant",
        "overdrawn",
        "paid",
        "rank",
        "sent",
        "slot",
        "tokens",
    )

    def __init__(self, account: Account, tokens: int, rank: int, *, again: bool = False) -> None:
        self.account = account
        self.tokens = tokens
        self.rank = rank
        self.combined = False
        self.again = self.drawn = again
        self.begun = self.paid = self.slot = self.overdrawn = False
        self.error: RequestFailed | None = None
        self.grant: Grant | None = None
        self.sent = 0.0

    def pay(self) -> bool:
        """Pay the next attempt; see `Account.pay`."""
        return self.account.pay(self)

    async def admit(self) -> None:
        """Wait until the next attempt is paid and has a slot, unless it could only be refused.

        Raises:
            StatusError: The breaker is open; nothing is held.
        """
        await self.account.admit(self)

    def finish(self) -> None:
        """Give back what was paid for an attempt that will not be made; the call is over. Calling it again has no effect."""
        self.cancel()
        if self.begun:
            self.begun = False
            self.account.finished()

    def cancel(self) -> None:
        """Give back what was paid for the next attempt, which will not be made."""
        if self.drawn:
            self.drawn = False
            self.account.budget.give_back()
        if self.paid:
            self.account.cancel(self)
        elif self.slot:
            self.account.release(self)  # granted so that the attempt could be refused

    def used(self) -> None:
        """Note that the attempt was made by a borrower of the slot, and that its outcome is not known."""
        if self.paid:
            self.paid = False
            self.account.dropped(self)


class Account:
    """One (endpoint, model, credentials).

    Args:
        retry: The rules of its retry budget.
        bucket: Its limits, or None.
        adaptive: Whether calls under way are limited by what the endpoint bears.
        max_tokens: The most tokens one request can ever be granted, or None.

    Attributes:
        budget: Its retries.
        breaker: Whether calls are stopped.
        max_tokens: As given, or a lower limit that the endpoint reports.
        has_worked: Whether a call was answered under its key.
        slots: The scheduler, None before there is one.
        on_wire: Attempts under way, each of which holds a slot.
        begun: Calls begun and not finished, back-off included.
        backing_off: Those of them that wait after a failure that time may heal.
        used: Loop time at which it was last used.
    """

    def __init__(
        self, retry: RetryPolicy, bucket: Bucket | None, *, adaptive: bool = False, max_tokens: int | None = None
    ) -> None:
        self.budget = RetryBudget(retry)
        self.breaker = Breaker()
        self.max_tokens = max_tokens
        self.has_worked = False
        self.slots: Slots | None = None
        self.on_wire = self.begun = self.backing_off = 0
        self.used = 0.0
        self._bucket = bucket
        self._name = object()  # in the bucket's books, which are not to hold the account itself
        self._concurrency = Concurrency() if adaptive else None
        self._unlimited = bucket is None and not adaptive
        self._paused_until = 0.0
        self._refused: int | None = None  # tokens of the latest attempt that was refused a permit
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        """Return a summary of the load."""
        return f"Account(on_wire={self.on_wire}, begun={self.begun}, bucket={self._bucket!r})"

    # --- permits

    def permit(self, tokens: int, rank: int, *, again: bool = False) -> Permit:
        """Return a permit of which nothing is paid yet; *again* if the retry budget has paid for its first attempt."""
        return Permit(self, tokens, rank, again=again)

    def pay(self, permit: Permit) -> bool:
        """Pay the next attempt of *permit*; return whether it need not wait.

        An attempt that can only be refused, because the breaker is open, need not wait and is not paid. If the account has no permit
        now, the scheduler is told when it is worth trying again.
        """
        now = asyncio.get_running_loop().time()
        breaker = self.breaker
        if not (self._unlimited and breaker.closed and not self._paused_until):  # mostly there is no limit
            if breaker.is_open(now):
                return True
            if self._wait(permit.tokens, now) > 0:
                self._refused = permit.tokens
                self._arm(now)
                return False
            self._refused = None
            if breaker.needs_probe(now):
                breaker.probe = permit
        permit.paid = True
        permit.sent = self.used = now
        self.on_wire += 1
        if not permit.begun:
            permit.begun = True
            self.begun += 1
        if self._bucket is not None:
            permit.grant = self._bucket.grant(permit.tokens, now, self._name)
        return True

    async def admit(self, permit: Permit) -> None:
        """See `Permit.admit`."""
        loop, slots = asyncio.get_running_loop(), self.slots
        if slots is None:
            raise AssertionError("an account is used before it has a scheduler")
        try:
            self.breaker.check(loop.time())
            while not permit.paid:
                await slots.admit(permit)
                self.breaker.check(loop.time())
        except BaseException:
            permit.cancel()
            raise

    def cancel(self, permit: Permit) -> None:
        """Take back what *permit* was granted and has not used."""
        permit.paid = False
        self.breaker.forget(permit)
        if self._bucket is not None and permit.grant is not None:
            self._bucket.cancel(permit.grant)
        self._attempt_ended(permit)

    def ended(
        self,
        permit: Permit,
        error: RequestFailed | None,
        usage: Usage | None = None,
        limits: Limits | Mapping[str, str] | None = None,
        *,
        reserved: bool = True,
    ) -> None:
        """Learn from an attempt of *permit*, which is over.

        Args:
            permit: Its permit.
            error: The error it failed with; None for an answer.
            usage: The usage that the endpoint reports, or None.
            limits: What the endpoint says of its limits, or its headers, or None.
            reserved: Whether `max_tokens` was sent, which endpoints charge whatever is used of it.
        """
        if error is None:
            self.has_worked = True
        if error is None and self._unlimited and self.breaker.closed and not self._paused_until:
            self._attempt_ended(permit)
            return
        now = asyncio.get_running_loop().time()
        self.breaker.note(error, sent=permit.sent, now=now, combined=permit.combined, permit=permit)
        if self._concurrency is not None:
            self._concurrency.note(error, sent=permit.sent, in_flight=self.on_wire, now=now)
        if isinstance(error, StatusError):
            limits = error.limits
            if isinstance(error, RateLimited) and error.retry_after is not None and error.retry_after <= MAX_WAIT:
                self._paused_until = max(self._paused_until, now + error.retry_after)
        if self._bucket is not None and permit.grant is not None:
            said = limits if limits is None or isinstance(limits, Limits) else read_limits(limits)
            self._bucket.ended(permit.grant, usage, said, now, reserved=reserved)
            self.max_tokens = self._bucket.max_tokens
        self._attempt_ended(permit)

    def dropped(self, permit: Permit) -> None:
        """Note that an attempt of *permit* was cancelled: what it would have taught is not known."""
        self.breaker.forget(permit)
        self._attempt_ended(permit)

    def finished(self) -> None:
        """Note that a call that had begun is over."""
        self.begun -= 1
        self._changed()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Count a call among those that back off, for as long as the block lasts."""
        self.backing_off += 1
        self._changed()
        try:
            yield
        finally:
            self.backing_off -= 1
            self._changed()

    def release(self, permit: Permit) -> None:
        """Give back the slot of *permit*."""
        if self.slots is not None:
            self.slots.released(permit)

    def _changed(self) -> None:
        if self.slots is not None:
            self.slots.changed(self)

    def _attempt_ended(self, permit: Permit) -> None:
        self.on_wire -= 1
        self.release(permit)
        self._ask_again()

    def _wait(self, tokens: int, now: float) -> float:
        """Return the seconds until a permit may be granted; infinite if only the end of a call can bring it."""
        if self.breaker.probe is not None:
            return float("inf")
        if self._concurrency is not None and not self._concurrency.allows(self.on_wire):
            return float("inf")
        if now >= self._paused_until:
            self._paused_until = 0.0
        pause = max(0.0, self._paused_until - now)
        return pause if self._bucket is None else max(pause, self._bucket.wait(tokens, now, self._name))

    def _ask_again(self) -> None:
        """Have the scheduler ask again if what was refused may be granted now; see that it is looked at in time if not."""
        if self._refused is None:
            return
        now = asyncio.get_running_loop().time()
        if self.breaker.is_open(now) or self._wait(self._refused, now) <= 0:
            self._refused = None
            if self.slots is not None:
                self.slots.ready(self)
        self._arm(now)

    def _arm(self, now: float) -> None:
        """Set the timer to when what was refused may be granted."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._refused is None:
            return
        wait = self._wait(self._refused, now)
        if wait < float("inf"):
            # Not in the context of the caller that happens to be refused.
            self._timer = asyncio.get_running_loop().call_at(
                now + max(0.0, wait), self._time_is_up, context=contextvars.Context()
            )

    def close(self) -> None:
        """Stop the timer; the scheduler is told nothing more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._bucket is not None:
            self._bucket.disclaim(self._name)

    def _time_is_up(self) -> None:
        self._timer = None
        self._ask_again()


class Accounts:
    """The accounts in use, and those used lately.

    Args:
        transport: The way to the endpoint.
        retry: The rules of retries.
        limit: The rate limit, or None.
    """

    def __init__(
        self,
        transport: object,
        retry: RetryPolicy,
        limit: RateLimit | None,
    ) -> None:
        self._base_url = getattr(transport, "base_url", "")
        self._model = getattr(transport, "model", None)
        self._retry = retry
        self._limit = limit
        self._kept: SharedLRU[object, Account] = SharedLRU(CAPACITY)
        self._slots: Slots | None = None

    def __len__(self) -> int:
        """Return how many are remembered or in use."""
        return len(self._kept)

    def of(self, model: str | None, headers: Mapping[str, str]) -> Account:
        """Return the account of calls to *model* with *headers*."""
        key = (self._base_url, model or self._model, _credentials(headers) if headers else b"")
        now = asyncio.get_running_loop().time()
        return self._kept.get_or_make(key, lambda: self._make(key, now), now)

    def serve(self, slots: Slots) -> None:
        """Make *slots* the scheduler of all accounts made from now on."""
        self._slots = slots

    def close(self) -> None:
        """Look after nobody any more."""
        for account in self._kept.values():
            account.close()

    def _make(self, key: object, now: float) -> Account:
        limit = self._limit
        if limit is None:
            account = Account(self._retry, None)
        else:
            account = Account(
                self._retry,
                limit.bucket(key, now) if limit.rpm or limit.tpm else None,
                adaptive=limit.adaptive,
                max_tokens=limit.max_tokens,
            )
        account.slots = self._slots
        return account


# Credentials are kept as digests only; the key makes them useless to whoever reads a dump and guesses.
_SALT: Final = secrets.token_bytes(16)


def _credentials(headers: Mapping[str, str]) -> bytes:
    """Return a digest of the headers that say who asks."""
    who = sorted((name.lower(), value) for name, value in headers.items() if says_who(name))
    return hashlib.blake2b(msgspec.json.encode(who), digest_size=16, key=_SALT).digest() if who else b""
