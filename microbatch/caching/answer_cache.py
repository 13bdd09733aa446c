"""Looks answers up before anything is asked, and keeps what was answered.

Whatever a store does, a caller loses no more than the time that its guard allows: what cannot be had in time is a miss.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
import time
from typing import TYPE_CHECKING, Any, Final

from microbatch.accounting.events import Settled
from microbatch.batching.request import check_messages
from microbatch.batching.ticket import CallerOptions
from microbatch.caching import entry as entries
from microbatch.caching.guard import Guard
from microbatch.caching.key import Keys
from microbatch.caching.patience import Patience
from microbatch.errors import DeadlineExceeded, StorageError
from microbatch.messages import Reply, Usage
from microbatch.storage.coalescer import Coalescer

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from microbatch.accounting.events import Listeners
    from microbatch.accounting.stats import Ledger
    from microbatch.batching.request import Options
    from microbatch.batching.ticket import Ticket
    from microbatch.messages import Messages
    from microbatch.protocols import Cache

JITTER: Final = 0.1
"""Answers are kept for up to this share less than they might be, so that what was stored together does not expire together."""

PATIENCE: Final = 2.0
"""Seconds that a store or a look-up of bulk work may take: no caller waits for it, and what is missed has to be paid for."""

PAGE: Final = 128
"""Most keys in one look-up: a burst is looked up page by page, and each page has the whole time of a look-up."""

_AT_ONCE: Final = 2  # look-ups under way: more would only wait for each other where a cache does one after the other

AGREED: Final = 1.0
"""Seconds after which the secret is asked for once more. What it is read from may have been emptied, and others may have agreed on
another one since: entries under the old one would be found by this process only."""

AHEAD: Final = 60.0
"""Seconds by which the clocks of processes that share a cache may differ."""

FRESH: Final = 0.075
"""Seconds for which what was just stored is kept at hand: more than a look-up may take, for those that were on their way before."""


Stored = list[tuple[bytes, bytes, float | None]]
"""Entries to be stored: key, value, seconds to live."""


class AnswerCache:
    """The cache as the batcher sees it.

    Args:
        cache: Where answers are kept.
        ledger: Where everything is counted.
        price: What prices a model's usage.
        listeners: Who is told of hits.
        endpoint: Address of the endpoint.
        model: Its model when a request names none.
        normalize: See `Keys`.
        now: Seconds since 1970: entries outlive processes.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        ledger: Ledger,
        price: Callable[[str | None], Callable[[Usage], float] | None],
        listeners: Listeners,
        endpoint: str,
        model: str | None,
        normalize: Callable[[str], str] | None,
        now: Callable[[], float] = time.time,  # noqa: TID251 see above
    ) -> None:
        self._guard = Guard(cache)
        self._ttl: float | None = getattr(cache, "ttl", None)
        self._ledger = ledger
        self._price = price
        self._listeners = listeners
        self._endpoint = endpoint
        self._model = model
        self._normalize = normalize
        self._now = now
        self._keys: Keys | None = None
        self._agreed_at = float("-inf")  # loop time
        self._fresh: dict[bytes, bytes] = {}
        self._look_ups: Coalescer[bytes, bytes | None] = Coalescer(self._get_many, most=PAGE, at_once=_AT_ONCE)
        self._bulk_look_ups: Coalescer[bytes, bytes | None] = Coalescer(
            self._get_many_patiently, most=PAGE, at_once=_AT_ONCE
        )
        self._stores: Coalescer[Stored, None] = Coalescer(self._store, lasting=True)
        self._unlockings: Coalescer[None, None] = Coalescer(self._unlock)

    @property
    def services(self) -> tuple[Callable[[], Coroutine[Any, Any, None]], ...]:
        """What has to run as long as the cache is used."""
        return self._look_ups.serve, self._bulk_look_ups.serve, self._stores.serve, self._unlockings.serve

    async def open(self) -> None:
        """Learn the secret that keys the digests, if it can be had now; else look-ups are misses until it can."""
        self._agreed_at = asyncio.get_running_loop().time()
        await self._agree(None)

    async def _unlock(self, asked: list[None]) -> list[None]:
        await self._agree(Patience(PATIENCE))
        return asked

    async def _agree(self, patience: Patience | None) -> None:
        secret = await self._guard.secret(patience=patience)
        if secret is not None and (self._keys is None or self._keys.secret != secret):
            self._keys = Keys(secret, endpoint=self._endpoint, model=self._model, normalize=self._normalize)

    @property
    def bypassed(self) -> int:
        """Look-ups for which the cache was not asked, failed, or took too long."""
        return self._guard.bypassed

    @property
    def evictions(self) -> int:
        """Answers that the cache dropped for want of room."""
        return self._guard.evictions

    # --- looking up

    def key(self, messages: Messages, options: Options) -> bytes | None:
        """Return the key of a request; None as long as the secret cannot be had, which counts as a miss.

        Raises:
            ConfigError: The messages are no JSON, or `normalize` failed.
        """
        now = asyncio.get_running_loop().time()
        if self._keys is None or now - self._agreed_at >= AGREED:
            self._agreed_at = now
            self._unlockings.ask_for_nobody(None)
        if self._keys is not None:
            return self._keys.of(messages, options)
        self._ledger.cache_misses += 1
        return None

    def look_up(self, key: bytes, *, bulk: bool = False) -> asyncio.Future[bytes | None]:
        """Return a future of what is kept under *key*, for `read`; None if nothing is. It fails only when the batcher closes.

        Args:
            key: The key.
            bulk: Whether it is for bulk work, which has more patience.
        """
        value = self._fresh.get(key)
        if value is None:
            return (self._bulk_look_ups if bulk else self._look_ups).ask(key)
        found: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        found.set_result(value)
        return found

    async def _get_many_patiently(self, keys: list[bytes]) -> list[bytes | None]:
        return await self._get_many(keys, Patience(PATIENCE))

    async def _get_many(self, keys: list[bytes], patience: Patience | None = None) -> list[bytes | None]:
        asked = list(dict.fromkeys(keys))
        found = dict(zip(asked, await self._guard.get_many(asked, patience=patience), strict=True))
        # What was stored while this look-up was on its way: whoever asked would otherwise find neither the answer nor its call.
        return [found[key] or self._fresh.get(key) for key in keys]

    def read(self, key: bytes, value: bytes | None, options: Options, created: float) -> Reply[Any] | None:
        """Return the reply that *value* holds, decoded for this caller and booked as a hit; None, booked as a miss, if it holds none.

        Args:
            key: The request's key.
            value: What `look_up` found.
            options: The caller's options.
            created: Loop time of its submit.
        """
        now = self._now()
        entry = None if value is None else entries.read(value, key, now)
        if entry is None or _is_ahead(entry, now):
            self._ledger.cache_misses += 1
            return None
        try:
            output, text = options.answer.decode_again(entry.text)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # noqa: BLE001 a validator of the caller's type may raise anything; the model may please it
            self._ledger.cache_misses += 1
            return None
        self._ledger.items += 1
        self._ledger.answered += 1
        self._ledger.cache_hits += 1
        self._ledger.cache_ages += max(0.0, now - entry.stored_at)
        price = self._price(entry.model)
        self._ledger.pay(Usage(), entry.alone, price)
        reply = Reply(
            output,
            text,
            "cache",
            Usage(),
            0.0,
            latency=asyncio.get_running_loop().time() - created,
            model=entry.model,
            finish_reason="stop",
            body=entry.json(),
        )
        if self._listeners.settle is not None:
            origin = None if self._listeners.submit is None else self._listeners.submit()
            self._listeners.settle(
                Settled(
                    route="cache",
                    error=None,
                    model=reply.model,
                    priority=options.priority,
                    waited=0.0,
                    latency=reply.latency,
                    batch_size=1,
                    usage=reply.usage,
                    cost_usd=0.0,
                    origin=origin,
                )
            )
        return reply

    async def find(self, messages: Messages, options: Options, caller: CallerOptions) -> Reply[Any] | CallerOptions:
        """Return the reply that is kept for a request, or the options with which it is to be asked.

        Raises:
            ConfigError: The messages are wrong.
            DeadlineExceeded: The caller's timeout passed meanwhile.
        """
        check_messages(messages)
        key = self.key(messages, options)
        if key is None:
            return caller
        created, value = asyncio.get_running_loop().time(), None
        try:
            async with asyncio.timeout(caller.timeout):
                value = await self.look_up(key)
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within the timeout of {caller.timeout} s") from None
        except StorageError:
            pass  # the batcher is closing
        reply = self.read(key, value, options, created)
        return CallerOptions(caller.timeout, True, key, caller.ttl, created) if reply is None else reply

    # --- keeping

    async def keep(self, answered: Sequence[tuple[Ticket, Usage]]) -> None:
        """Keep the answers of one reply, each with what it would have cost alone; never raises.

        Returns at once, as a slot is held meanwhile and others wait for it; for bulk work when they are stored, or its answers would
        come faster than they can be stored.
        """
        if self._keys is None:
            return
        now = self._now()
        stored: Stored = []
        for ticket, alone in answered:
            reply, key = ticket.reply, ticket.caller.key
            if reply is None or key is None:
                continue  # for its caller only, or asked while the secret could not be had
            ttl = self._ttl if ticket.caller.ttl is None else ticket.caller.ttl
            if ttl is not None:
                ttl *= 1 - JITTER * random.random()  # noqa: S311 no secret
            value = entries.encode(
                entries.Entry(
                    key,
                    reply.text,
                    reply.model,
                    now,
                    None if ttl is None else now + ttl,
                    alone.prompt_tokens,
                    alone.completion_tokens,
                    alone.cached_tokens,
                    entries.body_of(reply.body) if not ticket.combinable else None,
                )
            )
            stored.append((key, value, ttl))
        if not stored:
            return
        self._fresh.update((key, value) for key, value, _ in stored)
        storing = self._stores.ask_for_nobody(stored)
        if all(ticket.bulk for ticket, _ in answered):
            await asyncio.wait([storing])

    async def _store(self, replies: list[Stored]) -> list[None]:
        stored = [entry for reply in replies for entry in reply]
        try:
            if await self._guard.set_many(stored, patience=Patience(PATIENCE)):
                self._ledger.cache_stores += len(stored)
        finally:
            keys = [key for key, _, _ in stored]
            asyncio.get_running_loop().call_later(FRESH, self._forget, keys, context=contextvars.Context())
        return [None] * len(replies)

    def _forget(self, keys: list[bytes]) -> None:
        for key in keys:
            self._fresh.pop(key, None)


def _is_ahead(entry: entries.Entry, now: float) -> bool:
    """Return whether *entry* was stored at a time yet to come: the clock was set back since, and how old it is cannot be known."""
    longest = AHEAD if entry.expires_at is None else min(AHEAD, entry.expires_at - entry.stored_at)
    return entry.stored_at - now > longest
