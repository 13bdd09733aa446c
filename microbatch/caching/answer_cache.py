"""The answer cache of a batcher: looks answers up before anything is asked, and stores new ones.

Look-ups of live callers take at most `LIVE_TIMEOUT`; an answer that is not available in time is a miss.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.batching.events import settled
from microbatch.batching.request import check_messages
from microbatch.caching import entry as entries
from microbatch.caching.entry import MAX_CLOCK_SKEW, VECTOR_KIND
from microbatch.caching.guard import LIVE_TIMEOUT, Deadline, Guard
from microbatch.caching.key import Keys
from microbatch.containment import contained
from microbatch.embedding.vectors import VECTOR, vector_bytes
from microbatch.errors import DeadlineExceeded, StorageError
from microbatch.messages import Reply, Usage
from microbatch.storage.coalescer import Coalescer
from microbatch.transports.chat_wire import completion_object

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from microbatch.accounting.events import Listeners
    from microbatch.accounting.stats import Ledger
    from microbatch.batching.call_state import AloneAnswer
    from microbatch.batching.request import Options
    from microbatch.batching.ticket import CallerOptions, Ticket
    from microbatch.embedding.request import EmbeddingOptions
    from microbatch.messages import Messages
    from microbatch.protocols import Cache
    from microbatch.schema.answer_type import AnswerType

    Stored = tuple[bytes, bytes, float | None]  # key, value, seconds to live

JITTER: Final = 0.1
"""Largest share by which a time to live is shortened, so that answers stored together do not expire together."""

BULK_TIMEOUT: Final = 2.0
"""Seconds that a store or a look-up of bulk work may take: no caller waits for it, and a miss has to be paid for."""

PAGE: Final = 128  # most keys in one look-up; the pages of a burst have a deadline each
_MAX_LOOK_UPS: Final = 2  # under way; a cache that serves them one by one would only make more of them wait

SECRET_REFRESH: Final = 1.0
"""Seconds after which the secret is read again: if the store was emptied, other processes may have agreed on a new one."""

FRESH: Final = 0.075
"""Seconds for which stored entries also stay in memory: longer than a look-up that was under way when they were stored."""


class AnswerCache:
    """The cache as the batcher uses it; for the arguments that make keys, see `Keys`.

    With *alone* the answers of combined calls are misses: a batcher that combines nothing is there to compare, or because combining
    does harm. The answer that it gets replaces them.

    Attributes:
        guard: The store of answers.
        is_condemned: Returns whether the answers of a kind of lane, named by its digest, from batches of a size, given at a time in
            seconds since 1970, are asked for anew; set by the audit, without which none are.
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
        alone: bool = False,
    ) -> None:
        self.guard: Guard = cache if isinstance(cache, Guard) else Guard(cache)
        self.is_condemned: Callable[[str, int, float], bool] = _never_condemned
        self._ledger = ledger
        self._price = price
        self._listeners = listeners
        self._make_keys = partial(Keys, endpoint=endpoint, model=model, normalize=normalize)
        self._alone = alone
        self._now = time.time  # noqa: TID251 entries outlive processes
        self._keys: Keys | None = None
        self._secret_read_at = float("-inf")  # loop time
        self._fresh: dict[bytes, bytes] = {}
        self._live = self._look_ups(LIVE_TIMEOUT)
        self._bulk = self._look_ups(BULK_TIMEOUT)
        self._stores: Coalescer[Stored, None] = Coalescer(self._store, lasting=True)
        self._secret_reads: Coalescer[None, None] = Coalescer(self._refresh_secret)

    @property
    def services(self) -> tuple[Callable[[], Coroutine[Any, Any, None]], ...]:
        """Functions that have to run while the cache is used."""
        return self._live.serve, self._bulk.serve, self._stores.serve, self._secret_reads.serve

    async def open(self) -> None:
        """Read the secret that keys the digests; while it is not available, look-ups are misses."""
        self._secret_read_at = asyncio.get_running_loop().time()
        await self._read_secret(LIVE_TIMEOUT)

    async def _refresh_secret(self, requests: list[None]) -> list[None]:
        await self._read_secret(BULK_TIMEOUT)
        return requests

    async def _read_secret(self, timeout: float) -> None:
        secret = await self.guard.secret(deadline=Deadline(timeout))
        if secret is not None and (self._keys is None or self._keys.secret != secret):
            self._keys = self._make_keys(secret)

    @property
    def keys(self) -> Keys | None:
        """The maker of keys; None while the secret is not available."""
        return self._keys

    # --- looking up

    def key(self, asked: Messages | bytes, options: Options | EmbeddingOptions) -> bytes | None:
        """Return the key of a request (see `Keys.of`); None, counted as a miss, while the secret is not available."""
        now = asyncio.get_running_loop().time()
        if self._keys is None or now - self._secret_read_at >= SECRET_REFRESH:
            self._secret_read_at = now
            self._secret_reads.submit_detached(None)
        if self._keys is not None:
            return self._keys.of(asked, options)
        self._ledger.cache_misses += 1
        return None

    def look_up(self, key: bytes, *, bulk: bool = False) -> asyncio.Future[bytes | None]:
        """Return a future of the value of *key*, for `read`; it fails only when the batcher closes."""
        value = self._fresh.get(key)
        if value is None:
            return (self._bulk if bulk else self._live).submit(key)
        found: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        found.set_result(value)
        return found

    async def look_up_entries(self, keys: Sequence[bytes]) -> tuple[list[entries.Entry | None], list[bytes]]:
        """Return the valid entry of each of *keys*, None without one, and the keys that are known to have none.

        None of them is known to while the cache fails or is bypassed, or the batcher closes.
        """
        before = self.guard.bypassed
        reading = [self.look_up(key) for key in keys]
        if reading:
            await asyncio.wait(reading)
        found = [
            None if value.exception() else self.entry(key, value.result())
            for key, value in zip(keys, reading, strict=True)
        ]
        failed = self.guard.bypassed != before or any(value.exception() for value in reading)
        return found, [] if failed else [key for key, entry in zip(keys, found, strict=True) if entry is None]

    def _look_ups(self, timeout: float) -> Coalescer[bytes, bytes | None]:
        async def get_many(keys: list[bytes]) -> list[bytes | None]:
            distinct = list(dict.fromkeys(keys))
            values = await self.guard.get_many(distinct, deadline=Deadline(timeout))
            found = dict(zip(distinct, values, strict=True))
            # If the value was stored during this look-up, its call has ended: without `_fresh` the caller would find neither, or that
            # which it replaced.
            return [self._fresh.get(key) or found[key] for key in keys]

        return Coalescer(get_many, max_items=PAGE, max_trips=_MAX_LOOK_UPS)

    def read(
        self, key: bytes, value: bytes | None, options: Options | EmbeddingOptions, created: float
    ) -> Reply[Any] | None:
        """Return the reply stored in *value*, counted as a hit; None, counted as a miss, if there is no valid one.

        It is decoded to the output type of *options*; *created* is the loop time of the caller's submit.
        """
        entry = self.entry(key, value, vector=options.answer is VECTOR)
        reply = None if entry is None else self.reply(entry, options.answer, created)
        if entry is None or reply is None:
            self._ledger.cache_misses += 1
            return None
        saved = self._count_hit(entry, self._now())
        if self._listeners.settle is not None:
            origin = None if self._listeners.submit is None else self._listeners.submit()
            now, model = asyncio.get_running_loop().time(), self._listeners.model
            self._listeners.settle(
                settled(options, created, origin, now, default_model=model, reply=reply, unbatched_cost_usd=saved)
            )
        return reply

    def entry(self, key: bytes, value: bytes | None, *, vector: bool = False) -> entries.Entry | None:
        """Return the entry, or *vector*, stored as *value* under *key*; None if it is not valid, or to be asked for anew."""
        now = self._now()
        entry = None if value is None else entries.read(value, key, now, alone=self._alone and not vector)
        if entry is None or _is_ahead(entry, now) or self._asks_anew(self._kind_of(entry), entry):
            return None
        return entry

    def reply(self, entry: entries.Entry, answer: AnswerType, created: float) -> Reply[Any] | None:
        """Return *entry* as a reply to a caller who wants it as *answer*, submitted at *created*; None if it does not fit."""
        with contained() as decoding:
            output, text = answer.stored(entry.text, entry.body)
            body, tool = entry.json(), answer.tool
        # A caller's validator may raise anything, which a new answer may satisfy; or the body is damaged.
        if decoding.error is not None:
            return None
        if body is None and tool is not None:
            reason, members = tool.finish_reason, tool.call(text)
            body = completion_object(None, model=entry.model, finish_reason=reason, members=members)
        return Reply(
            output,
            text,
            "cache",
            Usage(),
            0.0,
            entry.batch_size,
            latency=asyncio.get_running_loop().time() - created,
            model=entry.model,
            finish_reason="stop",
            body=body,
            lane_kind=self._kind_of(entry),
        )

    def _kind_of(self, entry: entries.Entry) -> str | None:
        """Return the digest of the kind of lane in which *entry* was asked for; None if it is not known."""
        if entry.lane_kind is None or entry.is_vector or self._keys is None:
            return None
        return self._keys.masked(entry.key, entry.lane_kind).hex()

    def _asks_anew(self, kind: str | None, entry: entries.Entry) -> bool:
        return kind is not None and entry.batch_size > 1 and self.is_condemned(kind, entry.batch_size, entry.stored_at)

    def _count_hit(self, entry: entries.Entry, now: float) -> float | None:
        """Count a hit; return the price of the call that it has saved, None if it is unknown."""
        ledger, price = self._ledger, self._price(entry.model)
        ledger.items += 1
        ledger.answered += 1
        ledger.cache_hits += 1
        ledger.cache_ages += max(0.0, now - entry.stored_at)
        ledger.pay(Usage(), entry.alone, price)
        return None if price is None else price(entry.alone)

    async def find(
        self, asked: Messages | bytes, options: Options | EmbeddingOptions, caller: CallerOptions
    ) -> Reply[Any] | CallerOptions:
        """Return the reply that is kept for a request, or the options with which it is to be asked.

        A caller that does not share has none of them: its answer will replace the one that is kept.

        Raises:
            ConfigError: The messages are wrong.
            DeadlineExceeded: The caller's timeout passed meanwhile.
        """
        if not isinstance(asked, bytes):
            check_messages(asked)
        key = self.key(asked, options)
        if key is None:
            return caller
        created, value = asyncio.get_running_loop().time(), None
        if not caller.shared:
            return msgspec.structs.replace(caller, key=key)
        try:
            async with asyncio.timeout(caller.timeout):
                value = await self.look_up(key)
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within the timeout of {caller.timeout} s") from None
        except StorageError:
            pass  # the batcher is closing
        reply = self.read(key, value, options, created)
        return msgspec.structs.replace(caller, key=key, since=created) if reply is None else reply

    # --- storing

    async def keep(self, answered: Sequence[tuple[Ticket, Usage]]) -> None:
        """Store the answers of one reply, which all have keys, each with the usage of a call for it alone; never raises.

        Return at once, as the call still holds its slot; for bulk work, when they are stored: otherwise answers could come faster than
        they can be stored.
        """
        storing: list[asyncio.Future[None]] = []
        for ticket, alone in answered:
            reply = ticket.reply
            assert reply is not None  # noqa: S101 see above
            as_it_came = not ticket.combinable or (reply.batch_size == 1 and ticket.answer.form is not None)
            body = msgspec.json.encode(reply.body) if reply.body is not None and as_it_came else None
            if ticket.answer is VECTOR:
                body = vector_bytes(reply.output)
            storing.append(self._put(ticket, reply.text, reply.model, alone, reply.batch_size, body))
        if all(ticket.bulk for ticket, _ in answered):
            await asyncio.wait(storing)

    async def correct(self, ticket: Ticket, answer: AloneAnswer) -> None:
        """Replace the answer to *ticket*, which has a key, by the *answer* alone, if that may be kept; never raises.

        Return at once, before it is stored.
        """
        if answer.kept and answer.text is not None:
            self._put(ticket, answer.text, answer.model, answer.usage or Usage())

    def _put(
        self,
        ticket: Ticket,
        text: str,
        model: str | None,
        alone: Usage,
        batch_size: int = 1,
        body: bytes | None = None,
    ) -> asyncio.Future[None]:
        """Store an answer to *ticket*; return a future that ends when it is stored, or could not be."""
        key, keys, spec, now = ticket.caller.key, self._keys, ticket.spec, self._now()
        assert key is not None and keys is not None  # noqa: S101, PT018 only answers with keys are stored
        ttl = self.guard.ttl if ticket.caller.ttl is None else ticket.caller.ttl
        if ttl is not None:
            ttl *= 1 - JITTER * random.random()  # noqa: S311 not a secret
        entry = entries.Entry(
            key,
            text,
            model,
            now,
            None if ttl is None else now + ttl,
            alone.prompt_tokens,
            alone.completion_tokens,
            alone.cached_tokens,
            body,
            batch_size,
            VECTOR_KIND
            if ticket.answer is VECTOR
            else None
            if spec.kind is None
            else keys.masked(key, bytes.fromhex(spec.kind.digest)),
            keys.tenant_digest(spec.tenant),
        )
        value = self._fresh[key] = entries.encode(entry)
        return self._stores.submit_detached((key, value, ttl))

    async def _store(self, stored: list[Stored]) -> list[None]:
        try:
            if await self.guard.store(stored, deadline=Deadline(BULK_TIMEOUT)):
                self._ledger.cache_stores += len(stored)
        finally:
            asyncio.get_running_loop().call_later(FRESH, self._forget, stored, context=contextvars.Context())
        return [None] * len(stored)

    def _forget(self, stored: list[Stored]) -> None:
        for key, value, _ in stored:
            if self._fresh.get(key) is value:  # else another answer has replaced it, and is being stored
                del self._fresh[key]


def _never_condemned(_kind: str, _size: int, _given_at: float) -> bool:
    return False


def _is_ahead(entry: entries.Entry, now: float) -> bool:
    """Return whether *entry* was stored in the future: the clock was set back since, so its age is unknown."""
    longest = MAX_CLOCK_SKEW
    if entry.expires_at is not None:
        longest = min(longest, entry.expires_at - entry.stored_at)
    return entry.stored_at - now > longest
