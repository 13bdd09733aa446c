"""Builds the parts of a batcher from its settings, in dependency order, and runs them in a task of their own.

From the outside in: cache (`caching.answer_cache`) -> intake and single flight (`batching.intake`) -> lanes, scheduler and engine
(`batching.engine`) -> calls and fallback (`batching.dispatch`, `batching.fallback`) -> attempts (`transports.retry`) -> the transport.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

from microbatch.accounting.events import Listeners
from microbatch.accounting.prices import PriceBook
from microbatch.accounting.stats import Ledger, Stats
from microbatch.accounting.tokens import TokenCounter
from microbatch.audit.lane_kind import LaneKinds
from microbatch.batching.admission import AdmissionQueue
from microbatch.batching.audits import Audits
from microbatch.batching.bounds import Bounds
from microbatch.batching.chat_calls import ChatCalls
from microbatch.batching.dependencies import Dependencies
from microbatch.batching.dispatch import Dispatcher
from microbatch.batching.engine import CLOSED_EARLY, Engine
from microbatch.batching.estimates import Estimates
from microbatch.batching.intake import Intake
from microbatch.batching.lane_table import LaneTable
from microbatch.batching.scheduler import Scheduler
from microbatch.batching.sending import Sending
from microbatch.batching.single_flight import InFlight, Settlement
from microbatch.batching.single_queue import SingleQueues
from microbatch.caching.answer_cache import AnswerCache
from microbatch.embedding.calls import EmbeddingCalls
from microbatch.embedding.embedder import Embedder
from microbatch.errors import BatcherClosed, ConfigError
from microbatch.prompt.codec import ChatCodec
from microbatch.prompt.ids import IdKey
from microbatch.resources import acquire, release
from microbatch.semantic.cache import SemanticCache
from microbatch.semantic.checks import Checks
from microbatch.semantic.embedding import EndpointEmbedder, by_function
from microbatch.semantic.look_ups import LookUps
from microbatch.spending.spending import Spending
from microbatch.spool.spool_client import SpoolClient
from microbatch.transports.accounts import Accounts
from microbatch.transports.retry import Sender

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from microbatch.accounting.prices import Price
    from microbatch.batching.attribution import UsageAttribution
    from microbatch.batching.request import Options
    from microbatch.batching.ticket import Ticket
    from microbatch.messages import Usage
    from microbatch.policy import AuditPolicy, FallbackPolicy, FlushPolicy, RetryPolicy
    from microbatch.protocols import Cache, Transport
    from microbatch.resources import Resource
    from microbatch.semantic.embedding import Embed
    from microbatch.spending.budget import Budget
    from microbatch.spool.records import Spool
    from microbatch.transports.rate_limit import RateLimit

logger: Final = logging.getLogger("microbatch")


@dataclass(frozen=True)
class Settings:
    """The arguments of `Microbatcher`, which documents them."""

    transport: Transport
    policy: FlushPolicy
    retry: RetryPolicy
    fallback: FallbackPolicy
    rate_limit: RateLimit | None
    cache: Cache | None
    spool: Spool | None
    normalize: Callable[[str], str] | None
    prices: Mapping[str, Price] | Callable[[str], Price | None] | None
    tokens: Callable[[str], int] | Literal["bytes"] | None
    hooks: Sequence[object]
    draw_ids: Callable[[int], Sequence[str]] | None
    id_secret: bytes | str | None = field(repr=False)
    audit: AuditPolicy | None
    budget: Budget | None = None


class Assembly:
    """The parts of one batcher; see `Microbatcher` for the arguments.

    Raises:
        ConfigError: A setting is wrong.
    """

    def __init__(self, settings: Settings) -> None:
        policy, transport = settings.policy, settings.transport
        self.settings = settings
        self.model: str | None = getattr(transport, "model", None)
        self.tokens: TokenCounter = TokenCounter(settings.tokens, self.model)
        self.prices: PriceBook = PriceBook(settings.prices, base_url=getattr(transport, "base_url", None) or "")
        self.ledger: Ledger = Ledger()
        self.scheduler: Scheduler = Scheduler(policy.max_concurrent_batches)
        self.accounts: Accounts = Accounts(transport, settings.retry, settings.rate_limit, self.scheduler)
        budget = settings.budget
        self.spending: Spending | None = None if budget is None else Spending(budget, self.prices.pricing, self.model)
        self.sender: Sender = Sender(transport, settings.retry, purse=self.spending)
        self.admission: AdmissionQueue = AdmissionQueue(
            policy.max_queued,
            policy.when_full,
            bypass=policy.max_concurrent_batches,
            slot_free=lambda: not self.scheduler.full,
        )
        self.in_flight: InFlight = InFlight()
        listeners = Listeners(settings.hooks, self.model)
        self.settlement: Settlement = Settlement(self.ledger, self.admission, listeners, _loop_time)
        canary = settings.fallback.canary
        bounds = Bounds(self.model, canary=canary)
        self.given: Dependencies
        self.given = given = Dependencies(
            policy=policy,
            fallback=settings.fallback,
            default_model=self.model,
            ledger=self.ledger,
            listeners=listeners,
            accounts=self.accounts,
            count=self.tokens.count,
            exact=self.tokens.exact_for,
            upper=self.tokens.count if callable(settings.tokens) else None,
            price=self.prices.pricing,
            price_of=self._price_of,
            now=_loop_time,
            bounds=bounds,
            estimates=Estimates(self.tokens.count, bounds, canary=canary),
            scheduler=self.scheduler,
            admission=self.admission,
            in_flight=self.in_flight,
            settlement=self.settlement,
        )
        similar = settings.cache if isinstance(settings.cache, SemanticCache) else None
        self.exact: Cache | None = settings.cache if similar is None else similar.exact
        self.cache: AnswerCache | None = None if self.exact is None else self._make_cache(self.exact)
        self.spool: SpoolClient | None = None if settings.spool is None else SpoolClient(settings.spool)
        kinds = LaneKinds(getattr(transport, "base_url", ""), self.model)
        lanes = LaneTable(self.scheduler, policy.idle)
        singles = SingleQueues(self.scheduler.enqueue)
        keep_thoughts = getattr(transport, "thoughts", "strip") == "keep"
        key = IdKey(settings.id_secret)
        codec = ChatCodec(settings.draw_ids, key=key, canary=canary, keep_thoughts=keep_thoughts)
        sending = Sending(given, self.sender.send, None if self.cache is None else self._keep)
        dispatcher = Dispatcher(given, sending, codec)
        self.audits: Audits | None = None
        if settings.audit is not None:
            self.audits = Audits(
                given,
                settings.audit,
                kinds,
                dispatcher=dispatcher,
                singles=singles,
                draw=random.Random("".join(key.draws(b"audits")(8))),  # noqa: S311 it chooses what is audited
                correct=None if self.cache is None else self.cache.correct,
            )
            if self.cache is not None:
                self.cache.is_condemned = self.audits.is_condemned
        names_prefix = getattr(transport, "takes_prompt_cache_key", False)
        chat = ChatCalls(given, dispatcher, lanes, singles, kinds=kinds, audits=self.audits, names_prefix=names_prefix)
        self.intake: Intake = Intake(given, lanes, singles, chat, shares=policy.share or self.cache is not None)
        if budget is not None and budget.usd is not None:
            self.intake.read_options = partial(self._read_priced, self.intake.read_options)
        self.embedder: Embedder = Embedder(
            given,
            self.intake,
            lanes,
            EmbeddingCalls(given, sending, dispatcher.attribution, lanes, may_be_low=self.tokens.may_be_low_for),
            transport=transport,
            cache=self.cache,
            check_price=self._check_price,
        )
        self.engine: Engine = Engine(given, lanes, singles, chat)
        self.look_ups: LookUps | None = None
        if similar is not None and self.cache is not None:
            draw = random.Random("".join(key.draws(b"checks")(8)))  # noqa: S311 it chooses what is asked again
            checks = Checks(similar, self.cache, dispatcher, draw)
            checks.start(self.engine.start, self.engine.lease_slot, lambda: self.engine.closing)
            embed = self._embed_by(similar, sending, dispatcher.attribution)
            self.look_ups = LookUps(similar, self.cache, given, kinds, embed=embed, checks=checks)
            self.intake.look_up = self.look_ups.begin
            lanes.has_look_ups = True

    async def _keep(self, answered: Sequence[tuple[Ticket, Usage]]) -> None:
        """Store the answers of one reply; see `AnswerCache.keep`."""
        if self.cache is not None:
            await self.cache.keep(answered)
        if self.look_ups is not None:
            self.look_ups.keep(ticket for ticket, _ in answered)

    def _embed_by(self, similar: SemanticCache, sending: Sending, attribution: UsageAttribution) -> Embed:
        """Return what embeds look-ups. Raise `ConfigError` if there is nothing."""
        if similar.embed is not None:
            return by_function(similar.embed)
        try:
            self.embedder.check(similar.model)
        except ConfigError as error:
            raise ConfigError(f"{error}; or give SemanticCache(embed=) a function of your own") from error
        return EndpointEmbedder(
            self.given,
            sending,
            attribution,
            read_options=self.embedder.read_options,
            lease=self.engine.lease_slot,
            model=similar.model,
        )

    def _make_cache(self, cache: Cache) -> AnswerCache:
        return AnswerCache(
            cache,
            ledger=self.ledger,
            price=self.prices.pricing,
            listeners=self.given.listeners,
            endpoint=getattr(self.settings.transport, "base_url", ""),
            model=self.model,
            normalize=self.settings.normalize,
            alone=self.settings.policy.max_batch_size == 1,
        )

    def _price_of(self, model: str | None) -> Price | None:
        return self.prices.for_model(model or self.model)

    def _read_priced(self, read: Callable[..., Options], *args: Any, **options: Any) -> Options:
        """Return the options of a request. Raise `ConfigError` if its model has no price."""
        asked = read(*args, **options)
        self._check_price(asked.model)
        return asked

    def _check_price(self, model: str | None) -> None:
        """Raise `ConfigError` if calls to *model* cannot be paid for."""
        if self.spending is not None:
            self.spending.check([model])

    def stats(self) -> Stats:
        """Return the figures so far."""
        ledger = self.ledger
        ledger.retries = self.sender.repeats
        ledger.rate_limited = self.sender.rate_limited
        if self.cache is not None:
            ledger.cache_bypassed = self.cache.guard.bypassed
            ledger.cache_evictions = self.cache.guard.evictions
        spooled = None if self.spool is None else self.spool.look()
        return ledger.snapshot(
            retries_denied=ledger.retries_denied + self.sender.unpaid,
            queued=self.admission.occupied,
            audit=() if self.audits is None else tuple(self.audits.figures()),
            in_flight=self.scheduler.in_use,
            spool_depth=None if spooled is None else spooled.depth,
            spool_dead=None if spooled is None else spooled.dead,
            spool_oldest=None if spooled is None else spooled.oldest,
            budget=None if self.spending is None else self.spending.figures(),
            **({} if self.look_ups is None else self.look_ups.figures()),
        )


class Host:
    """Opens the parts, runs the engine and closes the parts, all in one task.

    The scope of a task group has to be entered and left by one task, while opening and closing a batcher may be done by two, as test
    fixtures do.
    """

    def __init__(self, parts: Assembly) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._parts = parts
        self._engine = parts.engine
        settings = parts.settings
        counters = None if settings.budget is None else settings.budget.shared
        permits = None if settings.rate_limit is None else settings.rate_limit.shared
        used = (settings.transport, parts.exact, settings.spool, counters, permits)
        self._resources: list[Resource] = [each for each in used if each is not None]
        self._task: asyncio.Task[None] | None = None
        self._undone: asyncio.Task[None] | None = None  # the task of an opening that failed

    async def open(self) -> None:
        """See `Microbatcher.open`."""
        if self._undone is not None and not self._undone.done():
            await asyncio.wait([self._undone])
        if self._task is not None:
            raise BatcherClosed("a Microbatcher is opened once; make a new one")
        try:
            self.loop = asyncio.get_running_loop()
        except RuntimeError:
            raise ConfigError("a Microbatcher needs an event loop of asyncio, and none is running here") from None
        ready: asyncio.Future[None] = self.loop.create_future()
        task = self._task = self.loop.create_task(self._run(ready), name="microbatch", context=contextvars.Context())
        task.add_done_callback(lambda _: _end(ready))
        try:
            await ready
            self._engine.admit()
        except BaseException:
            if not self._engine.closing:
                self.loop = self._task = None
                self._undone = task
            task.cancel()
            await asyncio.wait([task])
            _end(ready)
            raise

    async def close(self, grace: float | None) -> None:
        """Close, with *grace* seconds for what is under way; return when all is closed."""
        if self._task is None:
            return
        self.check_loop()
        if self._engine.accepting_loop is None and not self._engine.closing:
            self._task.cancel()  # it is still opening
        self._engine.close(grace)
        await asyncio.wait([self._task])

    def check_loop(self) -> None:
        """Check that the batcher belongs to the running event loop.

        Raises:
            BatcherClosed: It does not, or is not open yet.
        """
        if self.loop is None:
            raise BatcherClosed("the batcher is not open yet: use `async with`, or await open() first")
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is not self.loop:
            raise BatcherClosed("the batcher belongs to another event loop; make one for each loop")

    def check_open(self) -> None:
        """Check that requests are accepted in the running event loop.

        Raises:
            BatcherClosed: They are not.
        """
        self.check_loop()
        if self._engine.closing:
            raise BatcherClosed("the batcher is closed")
        if self._engine.accepting_loop is None:
            raise BatcherClosed("the batcher is not open yet: await open() first")

    async def _run(self, ready: asyncio.Future[None]) -> None:
        try:
            await self._parts.tokens.open()
            load_prices = self._parts.prices.load
            if load_prices is not None:
                await asyncio.to_thread(load_prices)
            if self._parts.spending is not None and self._parts.model is not None:
                self._parts.spending.check([None])
            await acquire(self._resources)
            try:
                await self._serve(ready)
            finally:
                self._parts.accounts.close()
                await release(self._resources)
        except Exception as error:
            if ready.done():
                logger.exception("a transport, cache or spool could not be opened or closed")
            else:
                ready.set_exception(error)

    async def _serve(self, ready: asyncio.Future[None]) -> None:
        def begin() -> None:
            for part in (self._parts.cache, self._parts.spool, self._parts.look_ups):
                for service in part.services if part is not None else ():
                    self._engine.start(service)
            if not ready.done():
                ready.set_result(None)

        if self._parts.cache is not None:
            await self._parts.cache.open()
        try:
            await self._engine.serve(begin)
        except Exception:
            # This task is not awaited. Its requests have ended with the error; the log has to show it as well.
            logger.exception("the batcher has ended because of a bug in microbatch")


def _loop_time() -> float:
    return asyncio.get_running_loop().time()


def _end(opening: asyncio.Future[None]) -> None:
    """See that *opening* ends, and that asyncio does not complain if its caller is cancelled before it learns of an error."""
    if not opening.done():
        opening.set_exception(BatcherClosed(CLOSED_EARLY))
    if not opening.cancelled():
        opening.exception()
