"""`Microbatcher`: the public interface. `microbatch.assembly` builds what is behind it."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, overload

from microbatch.accounting.prices import Price
from microbatch.assembly import Assembly, Host, Settings
from microbatch.batching.ticket import SHARED, UNSHARED, CallerOptions, FlushReason
from microbatch.binding import Binds
from microbatch.bulk import BulkRun
from microbatch.caching.warming import Warmed, lasting
from microbatch.checking import as_seconds, at_least, checks_arguments
from microbatch.embedding.methods import Embeds
from microbatch.errors import ConfigError
from microbatch.forwarding import forwarded
from microbatch.live_answer import LiveAnswer
from microbatch.policy import AuditPolicy, FallbackPolicy, FlushPolicy, RetryPolicy
from microbatch.protocols import Cache, Transport
from microbatch.spending.budget import Budget
from microbatch.spool.payload import Payload
from microbatch.spool.records import Name, Spool
from microbatch.transports.rate_limit import RateLimit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import TracebackType

    from typing_extensions import TypeForm, TypeVar

    from microbatch.accounting.stats import Stats
    from microbatch.batching.audits import Audits
    from microbatch.messages import Messages, Priority, Reply, Request, Requests, Result, Source, UseCache
    from microbatch.semantic.look_ups import LookUps
    from microbatch.spending.spending import Spending
    from microbatch.spool.spool_client import SpoolClient
    from microbatch.transports.relay import Forwarded

    T = TypeVar("T", default=str)


class Microbatcher(Embeds, Binds):
    """Coalesces concurrent requests into combined prompts and gives each caller its own answer.

    Use it with `async with`, or `open` and `aclose`. One batcher belongs to one event loop and, unless callers pass `tenant=`, is
    one trust domain: the requests of a lane are read by the model together.

    Args:
        transport: The way to the model; may be shared by several batchers.
        policy: When requests leave, and how much may be under way.
        retry: When failed calls are made again.
        fallback: What is done about missing and broken answers.
        rate_limit: Requests and tokens per minute for each endpoint, model and key; may be shared as well. None sets no limit; a 429
            then holds up the calls of its endpoint, model and key for as long as it asks.
        cache: Keeps answers: `MemoryCache`, `SQLiteCache`, `RedisCache`, `TieredCache`, `SemanticCache` or any `Cache`; may be shared.
        spool: Keeps requests for workers, see `enqueue`: `SQLiteSpool`, `RedisSpool`, or any `Spool`; may be shared as well.
        normalize: With a cache, maps the texts of last messages that are to share an answer to the same text (for example `str.strip`);
            what is sent is not changed. None compares texts as they are.
        prices: USD per million tokens by model: a mapping or a function, such as `genai_prices()`; the extra `prices` knows others.
        tokens: Counts tokens: a function, "bytes" to count UTF-8 bytes and load no table, or None for the model's packaged encoding.
        hooks: Objects with any of the methods `on_flush`, `on_call`, `on_settle` and `on_audit`, which take a `Flushed`, `Called`,
            `Settled` and `Audited`, and `on_submit`, which takes nothing and is called in the context of each caller: what it returns
            is in the later events of that request. They are called on the event loop and have to be quick; what one raises is logged.
        draw_ids: Source of the random part of item ids, instead of *id_secret*; for tests.
        id_secret: Key that ids are derived from, together with the prompt, so that the same batch has the same ids; for exact reruns.
            With it a text can be made that holds the ids of its own batch, so keep it secret. None draws one for this process.
        audit: Measures what combining does to answers, and limits the size of batches by it; None audits nothing.
        budget: The most that calls may cost; may be shared. None sets no limit.

    Options of a request, the same for `submit`, `map` and `enqueue`:
        output_type: What the answer is decoded to: str, anything msgspec decodes, or a pydantic model.
        model: Model name; None for the transport's.
        max_tokens: Most tokens of the answer; a longer one in a combined reply is asked for again alone. None sets no limit.
        temperature: Sampling temperature; None for the endpoint's default.
        params: Any other request field; the fields of an `extra_body` among them are request fields too, as in OpenAI's SDK. Those that
            act on a whole reply (n, logprobs, stop, seed, grammars, penalties...), and any that is not known to act on each of several
            answers alike, make the request go alone, with the endpoint's JSON in `Reply.body`; see `FlushPolicy.combine_params`.
            `response_format` becomes the answer's schema, json_object that of any object. So do those of a tool if it must be called
            (`tool_choice` names it, or is "required" with one tool): then `Reply.text` has its arguments, and `Reply.body` its call.
        headers: This caller's headers. With a credential among them, in any header, the transport's own key is not sent.
        tenant: Name of a trust domain; requests of different tenants never share a prompt. None for the batcher's own.
        priority: "high" goes alone at once; "low" waits for full batches, up to `low_max_wait`.
        timeout: Seconds from now until the caller gives up; None waits as long as the transport does.
        use_cache: Whether the answer to an equal request will do: from the cache, or, where `temperature` is 0, there is a cache or the
            policy says `share`, from a request under way. "refresh" asks anew, and replaces the answer that the cache has.
        ttl: Seconds for which the cache may give this answer to others; None for the cache's own time.

    Raises:
        ConfigError: A setting is wrong.
    """

    @checks_arguments
    def __init__(
        self,
        transport: Transport,
        *,
        policy: FlushPolicy | None = None,
        retry: RetryPolicy | None = None,
        fallback: FallbackPolicy | None = None,
        rate_limit: RateLimit | None = None,
        cache: Cache | None = None,
        spool: Spool | None = None,
        normalize: Callable[[str], str] | None = None,
        prices: Mapping[str, Price] | Callable[[str], Price | None] | None = None,
        tokens: Callable[[str], int] | Literal["bytes"] | None = None,
        hooks: Sequence[object] = (),
        draw_ids: Callable[[int], Sequence[str]] | None = None,
        id_secret: bytes | str | None = None,
        audit: AuditPolicy | None = None,
        budget: Budget | None = None,
    ) -> None:
        self._policy = FlushPolicy() if policy is None else policy
        self._parts = parts = Assembly(
            Settings(
                transport=transport,
                policy=self._policy,
                retry=RetryPolicy() if retry is None else retry,
                fallback=FallbackPolicy() if fallback is None else fallback,
                rate_limit=rate_limit,
                cache=cache,
                spool=spool,
                normalize=normalize,
                prices=prices,
                tokens=tokens,
                hooks=hooks,
                draw_ids=draw_ids,
                id_secret=id_secret,
                audit=audit,
                budget=budget,
            )
        )
        self._host = Host(parts)
        self._engine = parts.engine
        self._intake = parts.intake
        self._admission = parts.admission
        self._settlement = parts.settlement
        self._cache = parts.cache
        self._embedder = parts.embedder
        self._embedder.check_open = self._host.check_open
        self.audits: Audits | None = parts.audits
        """The audits; None without an audit."""
        self.look_ups: LookUps | None = parts.look_ups
        """The look-ups of a semantic cache; None without one."""
        self.spending: Spending | None = parts.spending
        """The account of the budget; None without one."""

    # --- life

    async def open(self) -> Self:
        """Start, and return this batcher. If it fails or is cancelled, what was opened is closed again, and it may be called once more.

        Raises:
            BatcherClosed: It was opened before, or closed while it was opening; a batcher is used once.
            ConfigError: The transport, the cache or the spool cannot be used.
        """
        await self._host.open()
        return self

    async def aclose(self, grace: float | None = 30.0) -> None:
        """Accept no more requests, send what waits, wait for what is under way, and end the rest with `ShutDown`.

        It goes on in the background if this call is cancelled, and may be called again. While the batcher opens, it ends the opening.
        *grace* are the seconds to wait for answers; None waits as long as deadlines and timeouts allow.
        """
        at_least(0, grace=grace)
        await self._host.close(grace)

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose(30.0 if kind is None else 0.0)

    # --- asking

    async def submit(
        self,
        messages: Messages,
        *,
        output_type: TypeForm[T] = str,  # type: ignore[assignment]
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        tenant: str | None = None,
        priority: Priority = "normal",
        timeout: float | None = None,
        use_cache: UseCache = True,
        ttl: float | None = None,
    ) -> Reply[T]:
        """Return the answer to *messages*, asked together with requests of the same kind, and this caller's share of the cost.

        They are OpenAI chat messages, dicts or `Message`. Requests share a prompt only if all but the text of the last user message
        is equal, the options included; those are described at `Microbatcher`.

        Raises:
            ConfigError: An argument is wrong, or the transport cannot send such a request; nothing was sent.
            BatcherClosed: The batcher is not open, or belongs to another event loop.
            Overloaded: `max_queued` requests are pending and `when_full` does not wait.
            RequestFailed: What ended the request; see its subclasses.
        """
        # Long waits are awaited here: the frame of another coroutine would take 300 bytes for each request that waits, and each
        # local variable takes 8.
        options = self._intake.read_options(
            output_type, model, max_tokens, temperature, params, headers, tenant, priority
        )
        caller: CallerOptions | Reply[Any]
        caller = SHARED if self._intake.may_share(use_cache, options) else UNSHARED
        if timeout is not None or ttl is not None:
            timeout, ttl = as_seconds("timeout", timeout), as_seconds("ttl", ttl)
            caller = CallerOptions(timeout, caller.shared, None, ttl, asyncio.get_running_loop().time())
        if use_cache and self._cache is not None:
            self._host.check_open()
            caller = await self._cache.find(messages, options, caller)
            if not isinstance(caller, CallerOptions):
                return caller
        if asyncio.get_running_loop() is not self._engine.accepting_loop:
            self._host.check_open()
        place = self._admission.enter(options.rank, options.tenant, caller)
        if place is not None:
            try:
                await place
            except BaseException:
                self._admission.cancel(place, options.rank)
                raise
        ticket, waiter = self._intake.accept(messages, options, caller)
        # Many submits may wait: what is of no more use is not kept.
        del messages, params, headers, options, caller, place
        try:
            return await waiter.future
        except asyncio.CancelledError:
            self._settlement.leave(ticket, waiter)
            raise

    @asynccontextmanager
    async def open_answer(
        self, messages: Messages, *, streamed: bool, timeout: float | None, use_cache: UseCache, **options: Any
    ) -> AsyncIterator[LiveAnswer]:
        """Ask as `submit` does, for a front end such as the gateway, which hands answers on as they are.

        An answer of a call that carries only this request is not asked for again because it is empty or does not fit: its JSON is in
        the error (`RequestFailed.completion`). With *streamed* the events of such a call can be read as they arrive.

        Yields:
            The answer to be; leaving the block gives the request up unless its reply was read.

        Raises:
            MicrobatchError: The request was not accepted; what ends it afterwards is raised by `LiveAnswer.reply`.
        """
        asked = self._intake.read_options(str, **options)
        at_least(0, timeout=timeout)
        self._host.check_open()
        live = LiveAnswer(streamed=streamed)
        shared = self._intake.may_share(use_cache, asked)
        since = asyncio.get_running_loop().time()
        caller = CallerOptions(timeout, shared, since=since, live=live)
        found: CallerOptions | Reply[Any] = caller
        if use_cache and self._cache is not None:
            found = await self._cache.find(messages, asked, caller)
        if isinstance(found, CallerOptions):
            await self._admission.acquire(asked.rank, asked.tenant, found)
            live.accepted(*self._intake.accept(messages, asked, found))
        else:
            live.found(found)
        try:
            yield live
        finally:
            live.close(self._settlement)

    @overload
    def map(
        self, requests: Source[Request[T]], *, max_pending: int | None = None, ordered: bool = False
    ) -> AsyncIterator[Result[T]]: ...

    @overload
    def map(
        self, requests: Source[Messages], *, max_pending: int | None = None, ordered: bool = False
    ) -> AsyncIterator[Result[str]]: ...

    @overload
    def map(
        self, requests: Requests, *, max_pending: int | None = None, ordered: bool = False
    ) -> AsyncIterator[Result[Any]]: ...

    def map(
        self, requests: Requests, *, max_pending: int | None = None, ordered: bool = False
    ) -> AsyncIterator[Result[Any]]:
        """Answer any number of requests in full batches and bounded memory.

        Bulk requests wait for full batches, not for `max_wait`; what cannot fill one leaves when nothing more can come. An item's
        error is in its `Result` and never raised here; an error of *requests* itself is raised once, after the results of what was
        taken. Leaving the iterator early cancels what is pending.

        Args:
            requests: An iterable or async iterable of `Request`, or of messages alone.
            max_pending: Most requests taken from it and not yet handed out; None for twice what all slots hold.
            ordered: Hand results out in the order of the requests, not of completion.

        Raises:
            ConfigError: An argument is wrong.
            BatcherClosed: The batcher is not open, or closes before the end.
        """
        return self._map(requests, max_pending=max_pending, ordered=ordered)

    def _map(self, requests: Requests, **options: Any) -> AsyncIterator[Result[Any]]:
        self._host.check_open()
        return BulkRun.of(self._engine, self._intake, self._cache, requests, policy=self._policy, **options).results()

    async def warm(
        self, requests: Requests, *, ttl: float | None = None, progress: Callable[[Warmed], None] | None = None
    ) -> Warmed:
        """Fill the cache with the answers to *requests*, in full batches, and return the figures; what is in it is not asked again.

        Args:
            requests: As for `map`.
            ttl: Seconds for which the answers are good, where a request does not say; None for the cache's own time.
            progress: Called with the figures so far after each request.

        Raises:
            ConfigError: There is no cache, or an argument is wrong.
            BatcherClosed: The batcher is not open, or closes before the end.
        """
        if self._cache is None:
            raise ConfigError("warm() fills a cache: make the batcher with cache=")
        at_least(0, ttl=ttl)
        counts = Counter[str]()
        warmed = Warmed()
        async for result in self._map(lasting(requests, ttl), audited=False):
            found = (
                "failed" if result.reply is None else "known" if result.reply.route in ("cache", "shared") else "asked"
            )
            counts.update((found, "items"))
            warmed = Warmed(**counts)
            if progress is not None:
                progress(warmed)
        return warmed

    # --- asking without waiting

    async def enqueue(
        self,
        messages: Messages,
        *,
        id: str | None = None,  # noqa: A002 the usual name
        output_type: Any = str,
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        params: Mapping[str, Any] | None = None,
        tenant: str | None = None,
    ) -> str:
        """Hand a request to the spool, for a worker (`microbatch worker SPOOL`) to answer in its own time.

        Once this returns, the request survives this process. It is asked with the worker's key: keys and headers are not spooled.
        Pass *output_type* to `result` as well. *id* is the caller's name for the request, within its tenant: putting the same again
        does nothing; None makes one up. Return the id.

        Raises:
            ConfigError: There is no spool, or an argument is wrong; nothing was queued.
            IdConflict: Another request has this id; nothing was queued.
            StorageError: It may not be durable; calling again with the same id does no harm.
            BatcherClosed: The batcher is not open.
        """
        spool = self._spooling()
        name = Name.checked(tenant, id if id is not None else uuid.uuid4().hex)
        payload = Payload.of(
            messages,
            output_type=output_type,
            model=model if model is not None else self._parts.model,
            max_tokens=max_tokens,
            temperature=temperature,
            params=params,
        )
        self._admission.occupied += 1  # so that closing waits for it
        try:
            await spool.put(payload.item(name))
        finally:
            self._admission.release()
        return name.id

    async def result(
        self,
        id: str,  # noqa: A002 see `enqueue`
        *,
        tenant: str | None = None,
        output_type: TypeForm[T] = str,  # type: ignore[assignment]
        timeout: float | None = None,
    ) -> Reply[T]:
        """Return the answer to a spooled request as soon as there is one. It can be fetched again as long as the spool keeps it.

        Args:
            id: The request's id, within its tenant.
            tenant: Its trust domain, or None.
            output_type: What it is decoded to: the type it was queued with, or str for its text.
            timeout: Seconds to wait; None waits without limit, 0 does not wait.

        Raises:
            ConfigError: There is no spool, or it knows no such request (any more).
            DeadlineExceeded: There is no answer yet.
            MalformedAnswer: The answer does not fit the type.
            RequestFailed: It is a dead letter: it has failed alone several times.
            StorageError: The spool cannot be read.
            BatcherClosed: The batcher is not open.
        """
        spool = self._spooling()
        at_least(0, timeout=timeout)
        return await spool.result(Name.checked(tenant, id), output_type, timeout)

    def _spooling(self) -> SpoolClient:
        if self._parts.spool is None:
            raise ConfigError("requests are spooled where there is a spool: make the batcher with spool=")
        self._host.check_open()
        return self._parts.spool

    def flush(self) -> asyncio.Future[None]:
        """Send what waits in all lanes now, as far as slots are free. Return a done future; awaiting it lets the calls start.

        Raises:
            BatcherClosed: The batcher is not open, or this is another event loop.
        """
        self._host.check_open()
        self._engine.lanes.flush(FlushReason.EXPLICIT)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    @asynccontextmanager
    async def forward(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes | None = None,
        *,
        alone: Sequence[str] = (),
        tenant: str | None = None,
    ) -> AsyncIterator[Forwarded]:
        """Relay a request to the endpoint and its answer back, byte for byte. It takes a slot and a permit like any call.

        Args:
            method: HTTP method.
            path: Path below the transport's base_url, with its query.
            headers: The request's headers; a credential among them, in any header, stands in place of the transport's own key.
            body: The request's body, or None.
            alone: What keeps the request out of combined prompts, to be counted in `Stats.alone_by_field`.
            tenant: Name of the trust domain whose budget pays, or None.

        Yields:
            The response: `status`, `headers`, and its bytes by `async for` or `chunks()`.

        Raises:
            ConfigError: The transport cannot forward, or not this request; nothing was sent.
            BatcherClosed: The batcher is not open.
            Overloaded: `max_queued` requests are pending and `when_full` does not wait.
            BudgetExceeded: It would cost more than is left of the budget; nothing was sent.
            TransportError: The endpoint could not be reached, or the connection broke.
        """
        self._host.check_open()
        async with forwarded(self._parts, method, path, headers, body, alone=alone, tenant=tenant) as response:
            yield response

    # --- looking

    @property
    def base_url(self) -> str:
        """The transport's address, "" if it has none."""
        return getattr(self._parts.settings.transport, "base_url", "")

    @property
    def upstream_calls(self) -> int:
        """HTTP attempts so far, refused and repeated ones included."""
        return self._parts.ledger.upstream_calls

    @property
    def fallback_calls(self) -> int:
        """Calls made so far because an earlier reply left requests open."""
        return self._parts.ledger.fallback_calls

    def stats(self) -> Stats:
        """Return the figures so far, as a snapshot that never changes."""
        return self._parts.stats()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Microbatcher cannot be pickled or copied: it belongs to one event loop; make one where it is used"
        )

    def __repr__(self) -> str:
        """Return the state and the load."""
        state = "closed" if self._engine.closing else "new" if self._engine.accepting_loop is None else "open"
        return f"Microbatcher({state}, queued={self._admission.occupied}, in_flight={self._engine.scheduler.in_use})"
