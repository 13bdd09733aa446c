"""`Microbatcher`: the one place that stacks the concrete parts.

From the outside in: lanes and scheduler (`batching.collector`) -> calls, fallback (`batching.call`, `batching.fallback`) -> attempts
(`transports.retry`) -> the transport.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from microbatch.accounting.prices import PriceBook
from microbatch.accounting.stats import Ledger, Stats
from microbatch.accounting.tokens import TokenCounter
from microbatch.batching.books import Books
from microbatch.batching.bulk import bulk
from microbatch.batching.call import Calls
from microbatch.batching.collector import Collector
from microbatch.batching.fallback import Fallback
from microbatch.batching.prompt import draw_endings
from microbatch.batching.request import PLAIN, read_options
from microbatch.batching.worth import UNKNOWN_RATIO
from microbatch.errors import BatcherClosed, ConfigError, Overloaded
from microbatch.policy import FallbackPolicy, FlushPolicy, RetryPolicy, at_least, whole
from microbatch.protocols import Transport
from microbatch.transports.accounts import Accounts
from microbatch.transports.relay import read_charge
from microbatch.transports.retry import Sender

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
    from types import TracebackType

    from typing_extensions import TypeForm

    from microbatch.accounting.prices import Price
    from microbatch.batching.request import Options
    from microbatch.batching.ticket import Ticket
    from microbatch.messages import Messages, Priority, Reply, Request, Result, T, Usage
    from microbatch.transports.rate_limit import RateLimit
    from microbatch.transports.relay import Forwarded

logger = logging.getLogger("microbatch")

_users: dict[int, tuple[object, int]] = {}
"""Shared parts and how many open batchers use each; the last one out closes it."""


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
        prices: USD per million tokens by model, a mapping or a function; what it does not know comes from a small built-in table.
        tokens: How tokens are counted: a function, "bytes" to count UTF-8 bytes and load no table, or None for the model's own
            encoding from the tables in this package.
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
        prices: Mapping[str, Price] | Callable[[str], Price | None] | None = None,
        tokens: Callable[[str], int] | Literal["bytes"] | None = None,
        draw_ids: Callable[[int], Sequence[str]] = draw_endings,
    ) -> None:
        if not isinstance(transport, Transport):
            raise ConfigError(f"transport must have send() and aclose(), got {type(transport).__name__}")
        self._transport = transport
        self._policy = policy if policy is not None else FlushPolicy()
        fallback = fallback if fallback is not None else FallbackPolicy()
        model = getattr(transport, "model", None)
        self._tokens = TokenCounter(tokens, model)
        self._ledger = Ledger()
        retry = retry if retry is not None else RetryPolicy()
        self._sender = Sender(transport, retry)
        self._accounts = Accounts(transport, retry, rate_limit)
        prices_by_model = PriceBook(prices)

        def price(name: str | None) -> Callable[[Usage], float] | None:
            found = prices_by_model.for_model(name)
            return None if found is None else found.cost

        def ratio(name: str | None) -> float:
            found = prices_by_model.for_model(name or model)
            return UNKNOWN_RATIO if found is None or not found.input else found.output / found.input

        self._collector = Collector(
            self._policy,
            self._ledger,
            self._accounts,
            count=self._tokens.count,
            upper=self._tokens.upper if callable(tokens) else None,
            ratio=ratio,
            canary=fallback.canary,
        )
        calls = Calls(
            send=self._sender.send,
            ledger=self._ledger,
            books=Books(self._ledger, self._collector.costs, self._tokens.count, self._tokens.exact_for, price),
            count=self._tokens.count,
            price=price,
            default_model=model,
            settled=self._collector.settled,
            draw=draw_ids,
            now=lambda: self._loop.time() if self._loop is not None else 0.0,
            early=fallback.early,
            canary=fallback.canary,
        )
        self._collector.wire(calls, Fallback(calls, self._collector.costs, fallback, self._collector.fail))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._host: asyncio.Task[None] | None = None
        self._closed: asyncio.Future[None] | None = None

    # --- life

    async def open(self) -> Self:
        """Start; loads the token table in a thread. Returns this batcher, so that it can stand in an expression.

        Raises:
            BatcherClosed: It was opened before; a batcher is used once.
        """
        if self._loop is not None:
            raise BatcherClosed("a Microbatcher is opened once; make a new one")
        self._loop = asyncio.get_running_loop()
        self._closed = self._loop.create_future()
        await self._tokens.open()
        await _lease(self._transport)
        ready = self._loop.create_future()
        # The group's scope has to be entered and left by one task, and opening and closing may be done by two: fixtures do that.
        self._host = self._loop.create_task(
            self._serve(lambda: ready.set_result(None)), name="microbatch", context=contextvars.Context()
        )
        await ready
        return self

    async def _serve(self, ready: Callable[[], None]) -> None:
        try:
            await self._collector.serve(ready)
        except Exception:
            # Nobody awaits this task; its requests have been told, and so must be whoever reads the log.
            logger.exception("the batcher has ended because of a bug in microbatch")
        finally:
            self._accounts.close()
            try:
                await _give_back(self._transport)
            finally:
                if self._closed is not None and not self._closed.done():
                    self._closed.set_result(None)

    async def aclose(self, grace: float | None = 30.0) -> None:
        """Shut the door, send what waits, wait for what is under way, and end the rest with `ShutDown`.

        Goes on in the background if this call is cancelled. Calling it again waits for the same end; a batcher that was never
        opened has nothing to close.

        Args:
            grace: Seconds to wait for answers. None waits as long as deadlines and timeouts allow.
        """
        at_least(0, grace=grace)
        if self._host is None or self._closed is None:
            return
        self._check_loop()
        self._collector.close(grace)
        await asyncio.shield(self._closed)

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
        if self._host is None:
            raise BatcherClosed("the batcher is not open yet: await open() first")
        if self._collector.closing:
            raise BatcherClosed("the batcher is closed")

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
            headers: This caller's headers, Authorization for one, in place of the transport's own key.
            tenant: Name of a trust domain; requests of different tenants never share a prompt.
            priority: "high" goes alone at once; "low" waits for full batches, up to `low_max_wait`.
            timeout: Seconds from now until this submit gives up; None waits as long as the transport does.

        Returns:
            The caller's own answer, and its share of the cost.

        Raises:
            ConfigError: An argument is wrong; nothing was sent.
            BatcherClosed: The batcher is not open, or belongs to another event loop.
            Overloaded: `max_queued` requests are pending and `when_full` does not wait.
            RequestFailed: What ended the request; see its subclasses.
        """
        collector = self._collector
        if asyncio.get_running_loop() is not collector.door:
            self._check_open()
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
            options = read_options(output_type, model, max_tokens, temperature, params, headers, tenant, priority)
        if timeout is not None:
            at_least(0, timeout=timeout)
        bypass = False
        room = collector.room
        if room.taken >= room.size or room.waiting:  # spelled out: `room.free` is a call
            place, timer = self._when_full(timeout)
            if place is None:
                bypass = True
            else:
                start = asyncio.get_running_loop().time()
                try:
                    await place
                except BaseException:
                    room.give_up(place)
                    raise
                finally:
                    if timer is not None:
                        timer.cancel()
                room.enter()
                if timeout is not None:
                    timeout = max(0.0, timeout - (asyncio.get_running_loop().time() - start))
                del place, timer, start  # or they live as long as the request
        try:
            ticket = collector.accept(messages, options, timeout, bypass=bypass)
        except ConfigError:
            collector.room.decline()  # which this request may have waited for
            raise
        # The caller's dicts and texts are of no more use, and many submits may wait.
        del messages
        try:
            reply: Reply[Any] = await ticket.future
        except asyncio.CancelledError:
            collector.leave(ticket)
            raise
        return reply

    def _when_full(self, timeout: float | None) -> tuple[asyncio.Future[None] | None, asyncio.TimerHandle | None]:
        """Return what the policy says when no request may be accepted: a place to wait for and its timer, or None to bypass.

        Raises:
            Overloaded: It says neither.
        """
        collector, when_full = self._collector, self._policy.when_full
        if when_full == "wait":
            return collector.room.place(timeout)
        if when_full == "bypass" and collector.scheduler.in_use < self._policy.max_concurrent_batches:
            return None, None
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
            self._collector,
            self._accept_bulk,
            requests,
            max_pending=max_pending or 2 * policy.max_batch_size * policy.max_concurrent_batches,
            ordered=ordered,
            patience=policy.low_max_wait,
        )

    def _accept_bulk(self, request: Request, on_taken: Callable[[Ticket], None]) -> Ticket:
        options: Options = read_options(
            request.output_type,
            request.model,
            request.max_tokens,
            request.temperature,
            request.params,
            request.headers,
            request.tenant,
            request.priority,
        )
        at_least(0, timeout=request.timeout)
        return self._collector.accept(request.messages, options, request.timeout, on_taken)

    def flush(self) -> asyncio.Future[None]:
        """Send what waits in all lanes now, as far as slots are free.

        Returns:
            A future that is done; awaiting it only gives the calls a chance to start.

        Raises:
            BatcherClosed: The batcher is not open, or this is another event loop.
        """
        self._check_open()
        self._collector.flush()
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
            headers: The request's headers; Authorization stands in place of the transport's own key.
            body: The request's body, or None.

        Yields:
            The response: `status`, `headers`, and its bytes by `async for` or `chunks()`.

        Raises:
            ConfigError: The transport cannot forward.
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
        if not self._collector.room.free:
            if self._policy.when_full == "wait":
                await self._collector.room.wait()
            else:
                self._when_full(None)
        model, cost = read_charge(body)
        async with self._collector.borrow_slot(model, headers, cost):
            self._ledger.upstream_calls += 1
            self._ledger.forwarded += 1
            async with relay(method, path, headers, body) as response:
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
        self._ledger.retries_denied = self._sender.unpaid
        self._ledger.rate_limited = self._sender.rate_limited
        return self._ledger.snapshot(queued=self._collector.room.taken, in_flight=self._collector.scheduler.in_use)

    def __repr__(self) -> str:
        """Tell the state and the load."""
        state = "new" if self._host is None else "closed" if self._collector.closing else "open"
        return (
            f"Microbatcher({state}, queued={self._collector.room.taken}, in_flight={self._collector.scheduler.in_use})"
        )


async def _lease(part: object) -> None:
    """Open *part* unless another batcher has it open."""
    _, users = _users.get(id(part), (part, 0))
    _users[id(part)] = (part, users + 1)
    opening = getattr(part, "open", None)
    if users or opening is None:
        return
    try:
        await opening()
    except BaseException:
        del _users[id(part)]
        raise


async def _give_back(part: Transport) -> None:
    """Close *part* unless another batcher still uses it."""
    _, users = _users.pop(id(part), (part, 1))
    if users > 1:
        _users[id(part)] = (part, users - 1)
    else:
        await part.aclose()
