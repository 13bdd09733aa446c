"""`Microbatcher`: the one place that stacks the concrete parts.

From the outside in: cache (`caching.answer_cache`) -> single flight (`batching.flight`) -> lanes and scheduler
(`batching.engine`) -> calls, fallback (`batching.call`, `batching.fallback`) -> attempts (`transports.retry`) -> the transport.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import uuid
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, Literal, Self, overload

import msgspec

from microbatch.accounting.events import Listeners
from microbatch.accounting.prices import PriceBook
from microbatch.accounting.stats import Ledger, Stats
from microbatch.accounting.tokens import TokenCounter
from microbatch.batching.attribution import UsageAttribution
from microbatch.batching.bulk import Prepared, bulk
from microbatch.batching.dispatch import Dispatcher
from microbatch.batching.engine import CLOSED_EARLY, Engine
from microbatch.batching.fallback import Fallback
from microbatch.batching.overhead import UNKNOWN_RATIO
from microbatch.batching.request import PLAIN, check_messages, read_options, remembering
from microbatch.batching.ticket import SHARED, UNSHARED, CallerOptions
from microbatch.caching.answer_cache import AnswerCache
from microbatch.caching.warming import Warmed, lasting
from microbatch.errors import BatcherClosed, ConfigError, DeadlineExceeded, Overloaded, StorageError
from microbatch.policy import FallbackPolicy, FlushPolicy, RetryPolicy, at_least, whole
from microbatch.prompt.codec import ChatCodec
from microbatch.prompt.compose import draw_endings
from microbatch.protocols import Cache, Transport
from microbatch.resources import Resource, acquire, release
from microbatch.spool.payload import Payload
from microbatch.spool.records import Name, Spool
from microbatch.spool.spool_client import SpoolClient
from microbatch.transports.accounts import Accounts
from microbatch.transports.credentials import credentials_in
from microbatch.transports.relay import read_charge
from microbatch.transports.retry import Sender

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
    from types import TracebackType

    from typing_extensions import TypeForm

    from microbatch.accounting.prices import Price
    from microbatch.batching.request import Options
    from microbatch.batching.single_flight import Seat
    from microbatch.batching.ticket import Ticket
    from microbatch.messages import Messages, Priority, Reply, Request, Result, T, Usage
    from microbatch.transports.rate_limit import RateLimit
    from microbatch.transports.relay import Forwarded


logger = logging.getLogger("microbatch")

_KNOWN: Final = ("cache", "shared")
"""Routes of answers that nothing was asked for."""


class Microbatcher:
    """Coalesces concurrent requests into combined prompts and gives each caller its own answer.

    Use it with `async with`, or `open` and `aclose`. One batcher belongs to one event loop and, unless callers pass `tenant=`, is
    one trust domain: the requests of a lane are read by the model together.

    Args:
        transport: The way to the model; may be shared by several batchers.
        policy: When requests leave, and how much may be under way.
        retry: When failed calls are made again.
        fallback: What is done about missing and broken answers.
        rate_limit: Requests and tokens a minute, for each endpoint, model and key; may be shared by several batchers. None sets
            no limit; a 429 then holds up the calls of its endpoint, model and key for as long as it asks.
        cache: Where answers are kept for those who ask the same again: `MemoryCache`, `SQLiteCache`, `RedisCache`, several of them
            as a `TieredCache`, or anything with the methods of `Cache`; may be shared by several batchers. None keeps nothing.
        spool: Where requests wait that nobody waits for, see `enqueue`: `SQLiteSpool`, `RedisSpool`, or anything with the methods of
            `Spool`; may be shared by several batchers.
        normalize: With a cache, makes the texts of last messages equal that are to share an answer (`str.strip`, say); what is sent
            stays as it was written. None tells every difference.
        prices: USD per million tokens by model: a mapping or a function, such as `genai_prices()`; what it does not know comes from
            a small built-in table.
        tokens: How tokens are counted: a function, "bytes" to count UTF-8 bytes and load no table, or None for the model's own
            encoding from the tables in this package.
        hooks: Objects with any of the methods `on_flush`, `on_call` and `on_settle`, which take a `Flushed`, a `Called` and a
            `Settled`, and `on_submit`, which takes nothing and is called in the context of each caller: what it returns is in the
            later events of that request. They are called on the event loop and have to be quick; what one raises is logged.
        draw_ids: Where the random part of item ids comes from; for tests.

    Raises:
        ConfigError: A setting is wrong.
    """

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
        draw_ids: Callable[[int], Sequence[str]] = draw_endings,
    ) -> None:
        if not isinstance(transport, Transport):
            raise ConfigError(f"transport must have send() and aclose(), got {type(transport).__name__}")
        if cache is not None and not isinstance(cache, Cache):
            raise ConfigError(f"cache must have get_many(), set_many() and aclose(), got {type(cache).__name__}")
        self._transport = transport
        self._policy = policy if policy is not None else FlushPolicy()
        fallback = fallback if fallback is not None else FallbackPolicy()
        model = getattr(transport, "model", None)
        self._tokens = TokenCounter(tokens, model)
        self._ledger = Ledger()
        retry = retry if retry is not None else RetryPolicy()
        self._sender = Sender(transport, retry)
        self._accounts = Accounts(transport, retry, rate_limit)
        self._prices = prices_by_model = PriceBook(prices)

        def price(name: str | None) -> Callable[[Usage], float] | None:
            found = prices_by_model.for_model(name)
            return None if found is None else found.cost

        def ratio(name: str | None) -> float:
            found = prices_by_model.for_model(name or model)
            return UNKNOWN_RATIO if found is None or not found.input else found.output / found.input

        listeners = Listeners(hooks)
        self._cache = None
        if cache is not None:
            self._cache = AnswerCache(
                cache,
                ledger=self._ledger,
                price=price,
                listeners=listeners,
                endpoint=getattr(transport, "base_url", ""),
                model=model,
                normalize=normalize,
            )
        self._read_options = remembering(read_options)
        self._shares = self._policy.share or cache is not None
        if spool is not None and not isinstance(spool, Spool):
            raise ConfigError(f"spool must have the methods of Spool, got {type(spool).__name__}")
        self._spool = None if spool is None else SpoolClient(spool)
        self._parts: list[Resource] = [part for part in (transport, cache, spool) if part is not None]
        self._engine = Engine(
            self._policy,
            self._ledger,
            self._accounts,
            count=self._tokens.count,
            upper=self._tokens.upper if callable(tokens) else None,
            ratio=ratio,
            listeners=listeners,
            model=model,
            canary=fallback.canary,
        )
        self._admission = self._engine.admission
        calls = Dispatcher(
            send=self._sender.send,
            codec=ChatCodec(
                draw_ids,
                canary=fallback.canary,
                keep_thoughts=getattr(transport, "thoughts", "strip") == "keep",
            ),
            ledger=self._ledger,
            attribution=UsageAttribution(
                self._ledger, self._engine.estimates, self._tokens.count, self._tokens.exact_for, price
            ),
            estimates=self._engine.estimates,
            bounds=self._engine.bounds,
            keep=None if self._cache is None else self._cache.keep,
            listeners=listeners,
            price=price,
            default_model=model,
            settled=self._engine.settled,
            now=lambda: self._loop.time() if self._loop is not None else 0.0,
            early=fallback.early,
        )
        self._fallback = Fallback(calls, self._engine.estimates, fallback, self._engine.fail)
        self._engine.wire(calls, self._fallback)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._host: asyncio.Task[None] | None = None
        self._undone: asyncio.Task[None] | None = None  # the host of an opening that failed

    # --- life

    async def open(self) -> Self:
        """Start; loads the token table in a thread. Return this batcher, so that it can stand in an expression.

        If it fails or is cancelled, what was opened is closed again, and it may be called once more.

        Raises:
            BatcherClosed: It was opened before, or closed while it was opening; a batcher is used once.
            ConfigError: The transport, the cache or the spool cannot be used, as its own `open` says.
        """
        if self._undone is not None and not self._undone.done():
            await asyncio.wait([self._undone])
        if self._host is not None:
            raise BatcherClosed("a Microbatcher is opened once; make a new one")
        self._loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = self._loop.create_future()
        # The group's scope has to be entered and left by one task, and opening and closing may be done by two: fixtures do that.
        # What is opened before is closed by that task as well, so it ends with it however the opening ends.
        host = self._host = self._loop.create_task(self._serve(ready), name="microbatch", context=contextvars.Context())
        host.add_done_callback(lambda _: _end(ready))
        try:
            await ready
            self._engine.admit()
        except BaseException:
            if not self._engine.closing:
                self._loop = self._host = None
                self._undone = host
            host.cancel()
            await asyncio.wait([host])
            _end(ready)
            raise
        return self

    async def _serve(self, ready: asyncio.Future[None]) -> None:
        try:
            await self._tokens.open()
            if self._prices.load is not None:
                await asyncio.to_thread(self._prices.load)
            await acquire(self._parts)
            try:
                await self._serve_on_parts(ready)
            finally:
                self._accounts.close()
                await release(self._parts)
        except Exception as error:
            if ready.done():
                logger.exception("a transport, cache or spool could not be opened or closed")
            else:
                ready.set_exception(error)

    async def _serve_on_parts(self, ready: asyncio.Future[None]) -> None:
        def begin() -> None:
            for part in (self._cache, self._spool):
                for service in part.services if part is not None else ():
                    self._engine.start_feeder(service)
            if not ready.done():
                ready.set_result(None)

        if self._cache is not None:
            await self._cache.open()
        try:
            await self._engine.serve(begin)
        except Exception:
            # Nobody awaits this task; its requests have been told, and so must be whoever reads the log.
            logger.exception("the batcher has ended because of a bug in microbatch")

    async def aclose(self, grace: float | None = 30.0) -> None:
        """Shut the door, send what waits, wait for what is under way, and end the rest with `ShutDown`.

        Goes on in the background if this call is cancelled. Calling it again waits for the same end. While the batcher opens, this
        ends the opening; a batcher that was never opened has nothing to close.

        Args:
            grace: Seconds to wait for answers. None waits as long as deadlines and timeouts allow.
        """
        at_least(0, grace=grace)
        if self._host is None:
            return
        self._check_loop()
        if self._engine.door is None and not self._engine.closing:
            self._host.cancel()  # it is still opening
        self._engine.close(grace)
        await asyncio.wait([self._host])

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose(30.0 if kind is None else 0.0)

    def _check_loop(self) -> None:
        if self._loop is None:
            raise BatcherClosed("the batcher is not open yet: use `async with`, or await open() first")
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is not self._loop:
            raise BatcherClosed("the batcher belongs to another event loop; make one for each loop")

    def _check_open(self) -> None:
        self._check_loop()
        if self._engine.closing:
            raise BatcherClosed("the batcher is closed")
        if self._engine.door is None:
            raise BatcherClosed("the batcher is not open yet: await open() first")

    # --- asking

    @overload
    async def submit(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        tenant: str | None = None,
        priority: Priority = "normal",
        timeout: float | None = None,
        use_cache: bool = True,
        ttl: float | None = None,
    ) -> Reply[str]: ...

    @overload
    async def submit(
        self,
        messages: Messages,
        *,
        output_type: TypeForm[T],
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        tenant: str | None = None,
        priority: Priority = "normal",
        timeout: float | None = None,
        use_cache: bool = True,
        ttl: float | None = None,
    ) -> Reply[T]: ...

    async def submit(
        self,
        messages: Messages,
        *,
        output_type: Any = str,
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        tenant: str | None = None,
        priority: Priority = "normal",
        timeout: float | None = None,
        use_cache: bool = True,
        ttl: float | None = None,
    ) -> Reply[Any]:
        """Ask, together with whoever asks the same kind of thing at the same time.

        Args:
            messages: OpenAI chat messages, dicts or `Message`. Requests share a prompt only if all but the text of the last user
                message is equal, the options below included.
            output_type: What the answer is decoded to: str, anything msgspec decodes, or a pydantic model.
            model: Model name; None for the transport's.
            max_tokens: Most tokens of the answer; a longer one in a combined reply is asked for again alone.
            temperature: Sampling temperature; None for the endpoint's default.
            params: Any other request field. Those that mean one answer (tools, n, logprobs, stop, seed...) make the request go
                alone, with the endpoint's JSON in `Reply.body`. `response_format` with a json_schema becomes the answer's schema.
            headers: This caller's headers. With a credential among them, in any header, the transport's own key is not sent.
            tenant: Name of a trust domain; requests of different tenants never share a prompt.
            priority: "high" goes alone at once; "low" waits for full batches, up to `low_max_wait`.
            timeout: Seconds from now until this submit gives up; None waits as long as the transport does.
            use_cache: Whether an answer that somebody else got will do. It may come from the cache, or, where `temperature` is 0,
                there is a cache or the policy says `share`, from an equal request that is under way.
            ttl: Seconds for which the cache may give this answer to others; None for the cache's own time.

        Returns:
            The caller's own answer, and its share of the cost.

        Raises:
            ConfigError: An argument is wrong, or the transport cannot send such a request; nothing was sent.
            BatcherClosed: The batcher is not open, or belongs to another event loop.
            Overloaded: `max_queued` requests are pending and `when_full` does not wait.
            RequestFailed: What ended the request; see its subclasses.
        """
        # One frame for all of it: a second one would take 300 bytes more for each request that waits.
        if (
            output_type is str
            and model is None
            and max_tokens is None
            and temperature is None
            and params is None
            and headers is None
            and tenant is None
            and priority == "normal"
        ):
            options = PLAIN
        else:
            options = self._read_options(output_type, model, max_tokens, temperature, params, headers, tenant, priority)
        shared = use_cache and (self._shares or options.cold)
        terms = SHARED if shared else UNSHARED
        if timeout is not None or ttl is not None:
            at_least(0, timeout=timeout, ttl=ttl)
            terms = CallerOptions(timeout, shared, None, ttl)
        if use_cache and self._cache is not None:
            found = await self._look_up(self._cache, messages, options, terms)
            if not isinstance(found, CallerOptions):
                return found
            terms = found
        if asyncio.get_running_loop() is not self._engine.door:
            self._check_open()
        if self._admission.must_wait(options.rank):
            place = self._when_full(options, terms)
            if place is not None:
                if terms.timeout is not None and terms.since is None:
                    terms = msgspec.structs.replace(terms, since=asyncio.get_running_loop().time())
                try:
                    await place
                except BaseException:
                    self._admission.give_up(place, options.rank)
                    raise
                self._admission.enter()
            del place  # or it lives as long as the request
        ticket = self._engine.accept(messages, options, terms)
        # The caller's dicts and texts are of no more use, and many submits may wait.
        del messages, params, headers, options, terms
        try:
            return await ticket.future
        except asyncio.CancelledError:
            self._engine.leave(ticket)
            raise

    async def _look_up(
        self, cache: AnswerCache, messages: Messages, options: Options, terms: CallerOptions
    ) -> Reply[Any] | CallerOptions:
        """Return the answer that the cache has for a request, or the terms on which it is to be asked.

        Raises:
            DeadlineExceeded: The timeout passed meanwhile.
        """
        self._check_open()
        check_messages(messages)
        key = cache.key(messages, options)
        if key is not None:
            created = asyncio.get_running_loop().time()
            value = None
            try:
                async with asyncio.timeout(terms.timeout):
                    value = await cache.look_up(key)
            except TimeoutError:
                raise DeadlineExceeded(f"no answer within the timeout of {terms.timeout} s") from None
            except StorageError:
                pass  # the batcher is closing
            reply = cache.read(key, value, options, created)
            if reply is not None:
                return reply
            return CallerOptions(terms.timeout, True, key, terms.ttl, created)
        return terms

    def _when_full(self, options: Options, terms: CallerOptions) -> asyncio.Future[None] | None:
        """Return what the policy says when no request may be accepted: a place to wait for, or None to bypass.

        Raises:
            Overloaded: It says neither.
        """
        when_full = self._policy.when_full
        if when_full == "wait":
            return self._admission.place(options.rank, options.tenant, terms)
        if self._admission.may_be_bypassed and not self._engine.scheduler.full:
            return None
        raise Overloaded(f"max_queued={self._policy.max_queued} requests are pending")

    def map(
        self,
        requests: Iterable[Request | Messages] | AsyncIterable[Request | Messages],
        *,
        max_pending: int | None = None,
        ordered: bool = False,
    ) -> AsyncIterator[Result[Any]]:
        """Answer any number of requests in full batches and bounded memory.

        Bulk requests wait for full batches, not for `max_wait`; what cannot fill one leaves when nothing more can come. An item's
        error is in its `Result` and never raised here. Leaving the iterator early cancels what is pending.

        Args:
            requests: An iterable or async iterable of `Request`, or of messages alone.
            max_pending: Most requests taken from it and not yet handed out; None for twice what all slots hold.
            ordered: Hand results out in the order of the requests, not of completion.

        Returns:
            An async iterator of `Result`. An error of *requests* itself is raised once, after the results of what was taken.

        Raises:
            ConfigError: An argument is wrong.
            BatcherClosed: The batcher is not open, or closes before the end.
        """
        whole(1, max_pending=max_pending)
        if not hasattr(requests, "__aiter__") and not hasattr(requests, "__iter__"):
            raise ConfigError(f"requests must be iterable, got {type(requests).__name__}")
        self._check_open()
        policy = self._policy
        return bulk(
            self._engine,
            self._prepare_bulk,
            self._accept_bulk,
            requests,
            max_pending=max_pending or 2 * policy.max_batch_size * policy.max_concurrent_batches,
            ordered=ordered,
            patience=policy.low_max_wait,
        )

    def _accept_bulk(self, request: Request, prepared: Prepared, on_taken: Callable[[Any], None]) -> Ticket | Seat:
        return self._engine.accept(request.messages, prepared.options, prepared.terms, on_taken)

    def _prepare_bulk(self, request: Request) -> Prepared:
        """Check the options of *request*, and begin to look it up.

        Raises:
            ConfigError: One is wrong.
        """
        options = self._read_options(
            request.output_type,
            request.model,
            request.max_tokens,
            request.temperature,
            request.params,
            request.headers,
            request.tenant,
            request.priority,
        )
        at_least(0, timeout=request.timeout, ttl=request.ttl)
        shared = request.use_cache and (self._shares or options.cold)
        cache = self._cache
        if cache is None or not request.use_cache:
            return Prepared(options, CallerOptions(request.timeout, shared))
        check_messages(request.messages)
        key = cache.key(request.messages, options)
        terms = CallerOptions(request.timeout, shared, key, request.ttl)
        if key is None:
            return Prepared(options, terms)
        created = asyncio.get_running_loop().time()

        def read(value: bytes | None) -> Reply[Any] | None:
            return cache.read(key, value, options, created)

        return Prepared(options, terms, cache.look_up(key, bulk=True), read)

    async def warm(
        self,
        requests: Iterable[Request | Messages] | AsyncIterable[Request | Messages],
        *,
        ttl: float | None = None,
        progress: Callable[[Warmed], None] | None = None,
    ) -> Warmed:
        """Fill the cache with the answers to *requests*, in full batches; what is in it already is not asked again.

        Args:
            requests: As for `map`.
            ttl: Seconds for which the answers are good, where a request does not say; None for the cache's own time.
            progress: Called with the figures so far after each request.

        Returns:
            What came of it.

        Raises:
            ConfigError: There is no cache, or an argument is wrong.
            BatcherClosed: The batcher is not open, or closes before the end.
        """
        if self._cache is None:
            raise ConfigError("warm() fills a cache: make the batcher with cache=")
        at_least(0, ttl=ttl)
        counts = Counter[str]()
        warmed = Warmed()
        async for result in self.map(lasting(requests, ttl)):
            found = "failed" if result.reply is None else "known" if result.reply.route in _KNOWN else "asked"
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
        id: str | None = None,  # noqa: A002 what everybody calls it
        output_type: Any = str,
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        params: Mapping[str, Any] | None = None,
        tenant: str | None = None,
    ) -> str:
        """Hand a request to the spool, for a worker (`microbatch worker SPOOL`) to answer in its own time.

        Once this returns, the request survives this process. It is asked with the worker's key: keys and headers are not spooled.

        Args:
            messages: As for `submit`, and so for all but `id`.
            id: The caller's name for the request, within its tenant: putting the same again does nothing. None makes one up.
            output_type: What the answer has to fit; pass it to `result` as well.
            model: Model name; None for that of this batcher's transport.
            max_tokens: Most tokens of the answer.
            temperature: Sampling temperature.
            params: Any other request field.
            tenant: Name of a trust domain.

        Returns:
            The id.

        Raises:
            ConfigError: There is no spool, or an argument is wrong; nothing was queued.
            IdConflict: Another request has this id; nothing was queued.
            StorageError: It may not be durable; calling again with the same id does no harm.
            BatcherClosed: The batcher is not open.
        """
        spool = self._spooling()
        name = _name(tenant, id if id is not None else uuid.uuid4().hex)
        payload = Payload.of(
            messages,
            output_type=output_type,
            model=model if model is not None else getattr(self._transport, "model", None),
            max_tokens=max_tokens,
            temperature=temperature,
            params=params,
        )
        admission = self._engine.admission
        admission.taken += 1  # so that closing waits for it
        try:
            await spool.put(payload.item(name))
        finally:
            admission.leave(1)
        return name.id

    @overload
    async def result(
        self,
        id: str,
        *,
        tenant: str | None = None,
        timeout: float | None = None,
    ) -> Reply[str]: ...

    @overload
    async def result(
        self,
        id: str,
        *,
        tenant: str | None = None,
        output_type: TypeForm[T],
        timeout: float | None = None,
    ) -> Reply[T]: ...

    async def result(
        self,
        id: str,  # noqa: A002 see `enqueue`
        *,
        tenant: str | None = None,
        output_type: Any = str,
        timeout: float | None = None,
    ) -> Reply[Any]:
        """Return the answer to a spooled request, as soon as there is one. It can be fetched again as long as the spool keeps it.

        Args:
            id: The request's id.
            tenant: Its tenant.
            output_type: What it is decoded to: the type it was queued with, or str for its text.
            timeout: Seconds to wait; None waits for ever, 0 only looks.

        Raises:
            ConfigError: There is no spool, or it knows no such request (any more).
            DeadlineExceeded: There is no answer yet.
            MalformedAnswer: The answer does not fit the type.
            RequestFailed: It was given up, after it had failed alone several times.
            StorageError: The spool cannot be read.
            BatcherClosed: The batcher is not open.
        """
        spool = self._spooling()
        at_least(0, timeout=timeout)
        return await spool.result(_name(tenant, id), output_type, timeout)

    def _spooling(self) -> SpoolClient:
        if self._spool is None:
            raise ConfigError("requests are spooled where there is a spool: make the batcher with spool=")
        self._check_open()
        return self._spool

    def flush(self) -> asyncio.Future[None]:
        """Send what waits in all lanes now, as far as slots are free.

        Returns:
            A future that is done; awaiting it only gives the calls a chance to start.

        Raises:
            BatcherClosed: The batcher is not open, or this is another event loop.
        """
        self._check_open()
        self._engine.flush()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    @asynccontextmanager
    async def forward(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> AsyncIterator[Forwarded]:
        """Relay a request that must reach the endpoint, and its answer that must come back, byte for byte.

        It takes a slot and a permit like any call, is counted in `upstream_calls`, and closing waits for it.

        Args:
            method: HTTP method.
            path: Path below the transport's base_url, with its query.
            headers: The request's headers; a credential among them, in any header, stands in place of the transport's own key.
            body: The request's body, or None.

        Yields:
            The response: `status`, `headers`, and its bytes by `async for` or `chunks()`.

        Raises:
            ConfigError: The transport cannot forward, or not this request; nothing was sent.
            BatcherClosed: The batcher is not open.
            Overloaded: `max_queued` requests are pending and `when_full` does not wait.
            TransportError: The endpoint could not be reached, or the connection broke.
        """
        self._check_open()
        relay = getattr(self._transport, "forward", None)
        if relay is None:
            raise ConfigError(
                f"{type(self._transport).__name__} has no forward(): it cannot relay requests as they are"
            )
        model, cost = read_charge(body)
        account_headers = {**headers, **credentials_in(path)}
        if self._admission.must_wait(PLAIN.rank):
            place = self._when_full(PLAIN, UNSHARED)
            if place is not None:
                await self._admission.wait_for(place, PLAIN.rank)
        async with self._engine.borrow_slot(model, account_headers, cost) as loan, AsyncExitStack() as relayed:
            self._ledger.upstream_calls += 1
            self._ledger.forwarded += 1
            try:
                response = await relayed.enter_async_context(relay(method, path, headers, body))
            except ConfigError:
                loan.used = False
                self._ledger.upstream_calls -= 1
                self._ledger.forwarded -= 1
                raise
            yield response

    # --- looking

    @property
    def upstream_calls(self) -> int:
        """HTTP attempts so far, refused and repeated ones included."""
        return self._ledger.upstream_calls

    @property
    def fallback_calls(self) -> int:
        """Calls made so far because an earlier reply left requests open."""
        return self._ledger.fallback_calls

    def stats(self) -> Stats:
        """Return the figures so far, as a snapshot that never changes."""
        self._ledger.retries = self._sender.repeats
        self._ledger.retries_denied = self._sender.unpaid + self._fallback.unpaid
        self._ledger.rate_limited = self._sender.rate_limited
        if self._cache is not None:
            self._ledger.cache_bypassed = self._cache.bypassed
            self._ledger.cache_evictions = self._cache.evictions
        spooled = None if self._spool is None else self._spool.look()
        return self._ledger.snapshot(
            queued=self._admission.taken,
            in_flight=self._engine.scheduler.in_use,
            spool_depth=None if spooled is None else spooled.depth,
            spool_dead=None if spooled is None else spooled.dead,
            spool_oldest=None if spooled is None else spooled.oldest,
        )

    def __repr__(self) -> str:
        """Tell the state and the load."""
        state = "closed" if self._engine.closing else "new" if self._engine.door is None else "open"
        return f"Microbatcher({state}, queued={self._admission.taken}, in_flight={self._engine.scheduler.in_use})"


def _end(opening: asyncio.Future[None]) -> None:
    """See that *opening* ends, and that asyncio does not complain if its caller is cancelled before it learns of an error."""
    if not opening.done():
        opening.set_exception(BatcherClosed(CLOSED_EARLY))
    if not opening.cancelled():
        opening.exception()


def _name(tenant: str | None, id: str) -> Name:  # noqa: A002 see `Microbatcher.enqueue`
    for word, value in (("id", id), ("tenant", tenant)):
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{word} must be a string, got {type(value).__name__}")
    if not id:
        raise ConfigError("id must not be empty")
    name = Name(tenant, id)
    try:
        _ = name.key
    except UnicodeEncodeError:
        raise ConfigError("id and tenant must be texts that UTF-8 can say") from None
    return name
