"""What is kept for each (endpoint, model, credentials): its limits, its retry budget, its breaker, and who waits for a permit.

A *permit* allows one attempt. The first one of a call is granted by the scheduler together with a slot, those of retries and of
asking again in order of arrival here; these go first, because they belong to requests that have waited longest and hold slots.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import secrets
from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec

from microbatch.errors import RateLimited, StatusError
from microbatch.messages import Limits
from microbatch.policy import MAX_WAIT
from microbatch.transports.breaker import Breaker
from microbatch.transports.concurrency import Concurrency
from microbatch.transports.http_edge import WHO
from microbatch.transports.limit_headers import read_limits
from microbatch.transports.recent import Kept
from microbatch.transports.retry_budget import RetryBudget

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from microbatch.errors import RequestFailed
    from microbatch.messages import Usage
    from microbatch.policy import RetryPolicy
    from microbatch.transports.bucket import Bucket, Grant
    from microbatch.transports.rate_limit import RateLimit

CAPACITY: Final = 1_024


class Permit:
    """Leave for one call to be sent; its attempts are paid through it one by one.

    Attributes:
        account: Whose limits count.
        tokens: What each attempt is charged.
        paid: Whether the next attempt has its permit already.
        again: Whether the call asks again for what a cut left open.
        drawn: Whether the retry budget has paid for the next attempt.
        error: What the latest attempt failed with, or None.
    """

    __slots__ = ("account", "again", "drawn", "error", "grant", "paid", "sent", "tokens")

    def __init__(self, account: Account, tokens: int, *, again: bool = False) -> None:
        self.account = account
        self.tokens = tokens
        self.again = self.drawn = again
        self.paid = False
        self.error: RequestFailed | None = None
        self.grant: Grant | None = None
        self.sent = 0.0

    def cancel(self) -> None:
        """Give back what was paid for the next attempt: it will not be made."""
        if self.drawn:
            self.drawn = False
            self.account.budget.give_back()
        if self.paid:
            self.account.cancel(self)

    def used(self) -> None:
        """The attempt was made by somebody who tells nothing of how it ended."""
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
        max_tokens: As given, or what the endpoint tells of a lower limit.
        has_worked: Whether a call was answered under its key.
        on_ready: Called when a permit that was refused may be had; set by the scheduler.
        used: When it was last used.
    """

    def __init__(
        self, retry: RetryPolicy, bucket: Bucket | None, *, adaptive: bool = False, max_tokens: int | None = None
    ) -> None:
        self.budget = RetryBudget(retry)
        self.breaker = Breaker()
        self.max_tokens = max_tokens
        self.has_worked = False
        self.on_ready: Callable[[Account], None] | None = None
        self.used = 0.0
        self._bucket = bucket
        self._name = object()  # in the bucket's books, which are not to hold the account itself
        self._concurrency = Concurrency() if adaptive else None
        self._unlimited = bucket is None and not adaptive
        self._in_flight = 0
        self._paused_until = 0.0
        self._waiters: deque[tuple[Permit, asyncio.Future[None]]] = deque()
        self._refused: int | None = None  # tokens of the scheduler's latest request, if it was refused
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        """Tell the load."""
        return f"Account(in_flight={self._in_flight}, waiting={len(self._waiters)}, bucket={self._bucket!r})"

    # --- permits

    def permit(self, tokens: int, *, again: bool = False) -> Permit:
        """Return a permit whose attempts wait for their turn; see `admit`."""
        return Permit(self, tokens, again=again)

    def pay(self, tokens: int) -> Permit | None:
        """Return a permit with the first attempt paid, or None: then `on_ready` is called when it is worth trying again."""
        permit = Permit(self, tokens)
        now = asyncio.get_running_loop().time()
        if self._unlimited and self.breaker.closed and not self._paused_until:
            permit.paid = True  # the usual case of who sets no limit, and on every batch's path
            permit.sent = self.used = now
            self._in_flight += 1
            return permit
        if self.breaker.is_open(now):
            return permit  # it will fail without being sent
        if self._waiters or self._wait(tokens, now) > 0:
            self._refused = tokens
            self._arm(now)
            return None
        self._refused = None
        self._grant(permit, now)
        return permit

    async def admit(self, permit: Permit) -> None:
        """See that the next attempt of *permit* is paid, in order of arrival, unless it could only be refused.

        Raises:
            StatusError: The breaker is open.
        """
        loop = asyncio.get_running_loop()
        try:
            while not permit.paid and not self.breaker.is_open(loop.time()):
                await self._acquire(permit)
            self.breaker.check(loop.time())
        except BaseException:
            permit.cancel()
            raise

    async def _acquire(self, permit: Permit) -> None:
        """Wait for a permit; returns without it if the breaker opens."""
        loop = asyncio.get_running_loop()
        if not self._waiters and self._wait(permit.tokens, loop.time()) <= 0:
            self._grant(permit, loop.time())
            return
        place: asyncio.Future[None] = loop.create_future()
        self._waiters.append((permit, place))
        self._arm(loop.time())
        try:
            await place
        except asyncio.CancelledError:
            self._serve()
            raise

    def cancel(self, permit: Permit) -> None:
        """Take back what *permit* was granted and has not used."""
        permit.paid = False
        self._in_flight -= 1
        if self._bucket is not None and permit.grant is not None:
            self._bucket.cancel(permit.grant)
        self._serve()

    def ended(
        self,
        permit: Permit,
        error: RequestFailed | None,
        usage: Usage | None = None,
        limits: Limits | Mapping[str, str] | None = None,
        *,
        reserved: bool = True,
    ) -> None:
        """An attempt of *permit* is over.

        Args:
            permit: Its permit.
            error: What it failed with; None for an answer.
            usage: What the endpoint says it used, or None.
            limits: What the endpoint says of its limits, or its headers, or None.
            reserved: Whether `max_tokens` was sent, which endpoints charge whatever is used of it.
        """
        if error is None:
            self.has_worked = True
        if error is None and self._unlimited and self.breaker.closed and not self._paused_until:
            self._in_flight -= 1
            return
        now = asyncio.get_running_loop().time()
        self.breaker.note(error, sent=permit.sent, now=now)
        if self._concurrency is not None:
            self._concurrency.note(error, sent=permit.sent, in_flight=self._in_flight, now=now)
        self._in_flight -= 1
        if isinstance(error, StatusError):
            limits = error.limits
            if isinstance(error, RateLimited) and error.retry_after is not None and error.retry_after <= MAX_WAIT:
                self._paused_until = max(self._paused_until, now + error.retry_after)
        if self._bucket is not None and permit.grant is not None:
            said = limits if limits is None or isinstance(limits, Limits) else read_limits(limits)
            self._bucket.ended(permit.grant, usage, said, now, reserved=reserved)
            self.max_tokens = self._bucket.max_tokens
        self._serve()

    def dropped(self, permit: Permit) -> None:
        """An attempt of *permit* was cancelled: what it would have taught is not known."""
        del permit
        self._in_flight -= 1
        self._serve()

    def _grant(self, permit: Permit, now: float) -> None:
        permit.paid = True
        permit.sent = now
        self.used = now
        self._in_flight += 1
        if self._bucket is not None:
            permit.grant = self._bucket.grant(permit.tokens, now, self._name)

    def _wait(self, tokens: int, now: float) -> float:
        """Return the seconds until a permit may be granted; infinite if only the end of a call can bring it."""
        if self._concurrency is not None and not self._concurrency.allows(self._in_flight):
            return float("inf")
        if now >= self._paused_until:
            self._paused_until = 0.0
        pause = max(0.0, self._paused_until - now)
        return pause if self._bucket is None else max(pause, self._bucket.wait(tokens, now, self._name))

    def _serve(self) -> None:
        """Grant what can be granted now, first come first served; see that the rest is looked at in time."""
        if not self._waiters and self._refused is None:
            return
        now = asyncio.get_running_loop().time()
        failing = self.breaker.is_open(now)  # then nobody has anything to wait for
        while self._waiters:
            permit, place = self._waiters[0]
            if not place.done():
                if not failing:
                    if self._wait(permit.tokens, now) > 0:
                        break
                    self._grant(permit, now)
                place.set_result(None)
            self._waiters.popleft()
        if not self._waiters and self._refused is not None and (failing or self._wait(self._refused, now) <= 0):
            self._refused = None
            if self.on_ready is not None:
                self.on_ready(self)
        self._arm(now)

    def _arm(self, now: float) -> None:
        """Set the timer to when the next in line may be granted its permit."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        tokens = self._waiters[0][0].tokens if self._waiters else self._refused
        if tokens is None:
            return
        wait = self._wait(tokens, now)
        if wait < float("inf"):
            # Not in the context of whoever happens to be refused.
            self._timer = asyncio.get_running_loop().call_at(
                now + max(0.0, wait), self._time_is_up, context=contextvars.Context()
            )

    def close(self) -> None:
        """Wake nobody any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._bucket is not None:
            self._bucket.disclaim(self._name)

    def _time_is_up(self) -> None:
        self._timer = None
        self._serve()


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
        self._kept: Kept[object, Account] = Kept(CAPACITY)
        self._ready: Callable[[Account], None] | None = None

    def __len__(self) -> int:
        """Return how many are remembered or in use."""
        return len(self._kept)

    def of(self, model: str | None, headers: Mapping[str, str]) -> Account:
        """Return the account of calls to *model* with *headers*."""
        key = (self._base_url, model or self._model, _credentials(headers) if headers else b"")
        now = asyncio.get_running_loop().time()
        return self._kept.get(key, now) or self._kept.put(key, self._make(key, now), now)

    def listen(self, ready: Callable[[Account], None]) -> None:
        """Call *ready* with an account that refused a permit and may have one now."""
        self._ready = ready

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
        account.on_ready = self._ready
        return account


# Credentials are kept as digests only; the key makes them useless to whoever reads a dump and guesses.
_SALT: Final = secrets.token_bytes(16)


def _credentials(headers: Mapping[str, str]) -> bytes:
    """Return a digest of the headers that say who asks."""
    who = sorted((name.lower(), value) for name, value in headers.items() if name.lower() in WHO)
    return hashlib.blake2b(msgspec.json.encode(who), digest_size=16, key=_SALT).digest() if who else b""
