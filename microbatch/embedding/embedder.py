"""Queues texts and returns their vectors: one for `Microbatcher.embed`, any number for `embed_many`."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.batching.single_flight import give_up_share
from microbatch.batching.ticket import SHARED, UNSHARED, CallerOptions, FlushReason
from microbatch.checking import as_seconds
from microbatch.embedding.request import EmbeddingOptions, read_options, read_text
from microbatch.errors import BatcherClosed, ConfigError, Overloaded, RequestFailed
from microbatch.messages import Embedding, Reply

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Protocol

    from microbatch.accounting.stats import Ledger
    from microbatch.batching.admission import AdmissionQueue
    from microbatch.batching.dependencies import Dependencies
    from microbatch.batching.intake import Intake
    from microbatch.batching.lane_table import LaneTable
    from microbatch.batching.single_flight import Settlement
    from microbatch.batching.ticket import Ticket, Waiter
    from microbatch.embedding.calls import EmbeddingCalls
    from microbatch.messages import Priority, UseCache

    class VectorCache(Protocol):
        """See `AnswerCache`."""

        def key(self, asked: bytes, options: EmbeddingOptions) -> bytes | None: ...  # noqa: D102

        def look_up(self, key: bytes, *, bulk: bool = False) -> asyncio.Future[bytes | None]: ...  # noqa: D102

        def read(  # noqa: D102
            self, key: bytes, value: bytes | None, options: EmbeddingOptions, created: float
        ) -> Reply[Any] | None: ...

        async def find(  # noqa: D102
            self, asked: bytes, options: EmbeddingOptions, caller: CallerOptions
        ) -> Reply[Any] | CallerOptions: ...


_WINDOW = 8_192
"""Most texts of one `embed_many` that are pending at a time."""

_SLICE = 256
"""Texts taken in before the event loop gets its turn; taking one in takes some 10 microseconds."""


class Embedder:
    """Queues texts, and returns their vectors.

    Args:
        given: The objects that the parts of a batcher share.
        intake: Queues requests.
        lanes: The open lanes.
        calls: Makes the calls of lanes of texts.
        transport: The transport; it must have `embed` for any text to be accepted.
        cache: Keeps vectors; None without a cache.
        check_open: Raises `BatcherClosed` unless requests are accepted in the running event loop; set by the host.
        check_price: Raises `ConfigError` if calls to a model cannot be paid for.
    """

    def __init__(
        self,
        given: Dependencies,
        intake: Intake,
        lanes: LaneTable,
        calls: EmbeddingCalls,
        *,
        transport: object,
        cache: VectorCache | None,
        check_price: Callable[[str], None],
    ) -> None:
        self.check_open: Callable[[], None]
        self.admission: AdmissionQueue = given.admission
        self.settlement: Settlement = given.settlement
        self.ledger: Ledger = given.ledger
        self.cache = cache
        self._intake = intake
        self._lanes = lanes
        self._calls = calls
        self._transport = transport
        self._check_price = check_price
        self.scratch = bytearray()

    def read_options(
        self,
        model: str | None = None,
        dimensions: int | None = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        tenant: str | None = None,
        priority: Priority = "normal",
    ) -> EmbeddingOptions:
        """Check the options of a text, and that the transport makes embeddings calls.

        Raises:
            ConfigError: It does not, or an option is wrong.
        """
        self._check_transport()
        named = getattr(self._transport, "embedding_model", None)
        options = read_options(model, dimensions, params, headers, tenant, priority, default_model=named)
        self._check_price(options.model)
        return options

    def check(self, model: str | None) -> None:
        """Check that the transport makes embeddings calls, to *model* or to one of its own.

        Raises:
            ConfigError: It does not.
        """
        self._check_transport()
        read_options(model, default_model=getattr(self._transport, "embedding_model", None))

    def _check_transport(self) -> None:
        if getattr(self._transport, "embed", None) is None:
            raise ConfigError(
                f"{type(self._transport).__name__} has no embed(): it makes no embeddings calls; use OpenAIChat, or give it "
                "`async embed(call: EmbeddingCall) -> Embedded`"
            )

    async def embed(
        self,
        text: str,
        options: EmbeddingOptions,
        *,
        timeout: float | None = None,
        use_cache: UseCache = True,
    ) -> Embedding:
        """Return the vector of *text*; see `Microbatcher.embed`."""
        line = read_text(text, scratch=self.scratch)
        caller = self._caller(timeout, use_cache)
        if self.cache is not None and use_cache:
            self.check_open()
            found = await self.cache.find(line, options, caller)
            if not isinstance(found, CallerOptions):
                return as_embedding(found)
            caller = found
        self.check_open()
        await self.admission.acquire(options.rank, options.tenant, caller)
        ticket, waiter = self.accept(line, options, caller)
        try:
            return as_embedding(await waiter.future)
        except asyncio.CancelledError:
            self.settlement.leave(ticket, waiter)
            raise

    async def embed_many(
        self,
        texts: Iterable[str],
        options: EmbeddingOptions,
        *,
        timeout: float | None = None,
        use_cache: UseCache = True,
    ) -> list[Embedding]:
        """Return the vectors of *texts*, in their order; see `Microbatcher.embed_many`."""
        if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
            raise ConfigError(f"texts must be an iterable of strings, got {type(texts).__name__}; embed() takes one")
        if isinstance(texts, Sequence):  # nothing is sent if one of them is wrong
            for index, text in enumerate(texts):
                read_text(text, f"texts[{index}]", self.scratch)
                if index % _SLICE == _SLICE - 1:
                    await asyncio.sleep(0)
        self.check_open()
        return await _Run(self, options, self._caller(timeout, use_cache), use_cache=use_cache).of(iter(texts))

    def _caller(self, timeout: float | None, use_cache: UseCache) -> CallerOptions:
        if use_cache is not True and use_cache is not False and use_cache != "refresh":
            raise ConfigError(f'use_cache must be True, False or "refresh", got {use_cache!r}')
        # A vector is exact, so that of an equal text under way always serves.
        caller = SHARED if use_cache is True else UNSHARED
        if timeout is None:
            return caller
        seconds = as_seconds("timeout", timeout)
        return msgspec.structs.replace(caller, timeout=seconds, since=asyncio.get_running_loop().time())

    def accept(
        self,
        line: bytes,
        options: EmbeddingOptions,
        caller: CallerOptions,
        on_taken: Callable[[Waiter], None] | None = None,
    ) -> tuple[Ticket, Waiter]:
        """Queue a text whose caller occupies a place; see `Intake.accept_line`."""
        try:
            lane = self._lanes.find(self._calls, options.key, options.spec)
        except BaseException:
            self.admission.release()
            raise
        return self._intake.accept_line(line, lane, caller, on_taken)


class _Run:
    """One `embed_many`. Its texts are bulk work: they wait for full lists, until nothing more can come."""

    def __init__(
        self, embedder: Embedder, options: EmbeddingOptions, caller: CallerOptions, *, use_cache: UseCache
    ) -> None:
        self._embedder = embedder
        self._options = options
        self._caller = caller
        self._cache = embedder.cache if use_cache else None
        self._found: list[Embedding] = []
        self._failure: ConfigError | RequestFailed | None = None  # of the earliest text that has failed
        # Those of `_found` whose usage is an estimate that holds exact shares of earlier calls.
        self._guessed: list[tuple[Ticket, Waiter]] = []
        self._pending: deque[tuple[Ticket, Waiter] | Embedding] = deque()  # of the texts after those, in order

    async def of(self, texts: Iterator[str]) -> list[Embedding]:
        """Return the vectors of *texts*."""
        taking: Exception | None = None
        try:
            while lines := self._read(texts):
                await self._take_in(lines)
                while self._failure is None and len(self._pending) > _WINDOW - _SLICE:
                    await self._hand_out()
                if self._failure is not None:
                    break
                await asyncio.sleep(0)
        except (ConfigError, RequestFailed, BatcherClosed, Overloaded) as error:
            taking = error
        except BaseException:
            self._leave()
            raise
        self._flush()
        try:
            while self._pending:
                await self._hand_out()
        except BaseException:
            self._leave()
            raise
        failure = self._failure or taking  # of texts before those that were being taken in
        if failure is not None:
            self._leave()
            raise failure
        return self._found

    def _read(self, texts: Iterator[str]) -> list[bytes]:
        """Return the next of *texts* as lines."""
        taken, scratch = len(self._found) + len(self._pending), self._embedder.scratch
        return [read_text(text, f"texts[{place}]", scratch) for place, text in enumerate(islice(texts, _SLICE), taken)]

    async def _take_in(self, lines: list[bytes]) -> None:
        callers: list[CallerOptions | Embedding] = [self._caller] * len(lines)
        if self._cache is not None:
            callers = await self._looked_up(self._cache, lines)
        embedder, options = self._embedder, self._options
        for line, caller in zip(lines, callers, strict=True):
            if isinstance(caller, Embedding):
                self._pending.append(caller)
                continue
            embedder.check_open()  # a text that is queued after the last flush would never be sent
            if embedder.admission.must_wait(options.rank):
                self._flush()  # the texts of this run may occupy all places, and would wait for full lists
            await embedder.admission.acquire(options.rank, options.tenant, caller, patient=True)
            self._pending.append(embedder.accept(line, options, caller, _ignore))

    async def _looked_up(self, cache: VectorCache, lines: list[bytes]) -> list[CallerOptions | Embedding]:
        """Return for each of *lines* the vector that the cache has, or the options with which it is to be asked for.

        Look-ups that outlast the caller's time are misses, whose texts then end at once.
        """
        options, caller, created = self._options, self._caller, asyncio.get_running_loop().time()
        deadline = caller.deadline(created)
        keys = [cache.key(line, options) for line in lines]
        looking = {key: cache.look_up(key, bulk=True) for key in keys if key is not None and caller.shared}
        if looking:
            left = None if deadline is None else max(0.0, deadline.at - created)
            await asyncio.wait(looking.values(), timeout=left)
        found: list[CallerOptions | Embedding] = []
        for key in keys:
            reply: Reply[Any] | None = None
            if key in looking:
                reply = cache.read(key, _value_of(looking[key]), options, created)
            found.append(msgspec.structs.replace(caller, key=key) if reply is None else as_embedding(reply))
        return found

    async def _hand_out(self) -> None:
        """Wait for the first text that is pending, and keep its vector, or its error unless an earlier text has failed."""
        first = self._pending[0]
        if not isinstance(first, Embedding) and not first[1].future.done():
            queue = first[0].queue
            if queue is not None and not queue.due:
                queue.flush(FlushReason.DRAIN)  # what could fill its list may wait for this text
            await asyncio.wait([first[1].future])
        first = self._pending.popleft()
        try:
            found = first if isinstance(first, Embedding) else as_embedding(first[1].future.result())
        except (ConfigError, RequestFailed) as error:
            self._failure = self._failure or error
            return
        self._found.append(found)
        if not isinstance(first, Embedding) and found.usage.estimated and first[0].past is not None:
            self._guessed.append(first)

    def _flush(self) -> None:
        """Send what waits: nothing more comes for now."""
        queues = {entry[0].queue: None for entry in self._pending if not isinstance(entry, Embedding)}
        for queue in queues:
            if queue is not None:
                queue.flush(FlushReason.DRAIN)

    def _leave(self) -> None:
        """Give up what is pending, and the shares of what was found: no caller gets it."""
        for found in self._found:
            if not found.usage.estimated:
                self._embedder.ledger.unclaimed += found.usage
        for ticket, waiter in self._guessed:
            give_up_share(ticket, waiter, self._embedder.ledger)
        for entry in self._pending:
            if not isinstance(entry, Embedding):
                ticket, waiter = entry
                waiter.future.cancel()  # in vain if it has just been answered
                self._embedder.settlement.leave(ticket, waiter)


def _value_of(looking: asyncio.Future[bytes | None]) -> bytes | None:
    """Return the value that was found; None if there is none yet, or the batcher is closing."""
    return looking.result() if looking.done() and looking.exception() is None else None


def _ignore(_waiter: Waiter) -> None:
    pass


def as_embedding(reply: Reply[Any]) -> Embedding:
    """Return the vector in *reply*, with its share of the cost."""
    return Embedding(
        reply.output,
        reply.model,
        reply.usage,
        reply.cost_usd,
        reply.batch_size,
        reply.route,
        reply.request_id,
        reply.waited,
    )
