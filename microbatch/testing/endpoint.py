"""The simulated model behind an OpenAI-compatible HTTP server, for tests, demonstrations and load."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import msgspec
from aiohttp import web

from microbatch.accounting.tokens import load_encoding
from microbatch.errors import ConfigError
from microbatch.listening import close_runner
from microbatch.testing.batch_api.batches import Batches, BatchModel
from microbatch.testing.batch_api.files import Files
from microbatch.testing.batch_api.routes import BatchRoutes
from microbatch.testing.counting import ENCODING
from microbatch.testing.pace import paced, sleep_until
from microbatch.testing.reading import EndpointError
from microbatch.testing.wire import (
    CREATED,
    Events,
    authorize,
    completion_object,
    error_response,
    json_object,
    own_headers,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
    from types import TracebackType

    from microbatch.testing.embeddings import EmbeddingReply
    from microbatch.testing.reply import Ending, SimulatedReply

MAX_REQUEST_BYTES = 64 * 2**20

# Handlers that wait for nothing but the clock are cut off this long after closing began.
CLOSING_SECONDS = 0.1


@dataclass(kw_only=True, eq=False, repr=False)
class SimulatedEndpoint(BatchModel):
    """An OpenAI-compatible endpoint with a simulated model behind it.

    ```python
    async with SimulatedEndpoint(latency=Latency(first_token=0.5, tokens_per_second=80)) as endpoint:
        transport = OpenAIChat("any-model", base_url=endpoint.base_url, api_key="any")
    ```
    Serves `POST /v1/chat/completions`, `POST /v1/embeddings`, `GET /v1/models`, and OpenAI's files and batches below `/v1/files` and
    `/v1/batches`. The other options and the counters are those of `SimulatedModel`. The key whose quota is charged, and to which files
    and batches belong, is the Authorization header. The lines of batches are no `calls` and use up no quota; as combined prompts,
    items and tokens they count like any others, and the same faults befall them.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        api_keys: Accepted keys; None accepts any.
        models: Names that `GET /v1/models` lists. Any name is served.
        batch_seconds: Seconds that a batch takes.
        batch_expires: Lines of a batch that expire unanswered: a whole number of lines, or a float from 0 to 1 for a share.
        batch_tokens: Most tokens that the batches of one key may hold while they are worked on, taking four bytes for a token;
            a batch beyond that fails with "token_limit_exceeded". None sets no limit.

    Attributes:
        batch_lines: Lines of batches that were answered so far, those that failed included.
        files: The files that are kept.
        batches: The batches.

    Raises:
        ConfigError: As `SimulatedModel`.
    """

    host: str = "127.0.0.1"
    port: int = 0
    api_keys: Collection[str] | None = None
    models: Sequence[str] = ("simulated",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.files: Files = Files()
        self.batches: Batches = Batches(self, self.files)
        self._runner: web.AppRunner | None = None
        self._closing = asyncio.Event()

    @property
    def base_url(self) -> str:
        """The base URL for clients; available once the server listens."""
        if not self.port:
            raise ConfigError("a SimulatedEndpoint has no base_url before it is opened")
        host = f"[{self.host}]" if ":" in self.host else self.host  # RFC 3986 wants IPv6 in brackets
        return f"http://{host}:{self.port}/v1"

    @property
    def batches_created(self) -> int:
        """Batches made so far."""
        return len(self.batches)

    async def open(self) -> None:
        """Listen, and go on with the batches that are not over.

        Raises:
            OSError: The port is taken.
        """
        await asyncio.to_thread(load_encoding, ENCODING)
        application = web.Application(client_max_size=MAX_REQUEST_BYTES)
        application.router.add_post("/v1/chat/completions", self._chat)
        application.router.add_post("/v1/embeddings", self._embed)
        application.router.add_get("/v1/models", self._list_models)
        BatchRoutes(self.files, self.batches, self.api_keys).add_to(application.router)
        application.router.add_route("*", "/{path:.*}", self._unknown)
        runner = web.AppRunner(
            application, handler_cancellation=True, access_log=None, shutdown_timeout=CLOSING_SECONDS
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, self.host, self.port).start()
        except BaseException:
            await runner.cleanup()
            raise
        self._runner = runner
        self._closing.clear()
        self.port = runner.addresses[0][1]
        self.batches.start()

    async def aclose(self) -> None:
        """Stop listening and abort open requests. Files and batches are kept."""
        self._closing.set()
        runner, self._runner = self._runner, None
        if runner is not None:
            await close_runner(runner)
        await self.batches.stop()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, self.respond, self._send_completion)

    async def _embed(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, self.embed, self._send_vectors)

    async def _serve(
        self,
        request: web.Request,
        make: Callable[..., Awaitable[Any]],
        send: Callable[..., Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        """Read *request*, *make* its reply, and *send* it."""
        start = asyncio.get_running_loop().time()
        number = self.calls + 1
        try:
            key = authorize(request, self.api_keys)
            raw = await request.read()
            body = json_object(raw)
            number = self.admit(body)
            reply = await make(body, key, len(raw))
        except EndpointError as error:
            return error_response(error, number)
        try:
            if reply.ending == "hang":
                await self._break(request, reply.ending)
                return web.Response()
            return await send(request, body, reply, start, number)
        except asyncio.CancelledError:
            self.disconnects += not self._closing.is_set()
            raise

    async def _send_completion(
        self, request: web.Request, body: dict[str, Any], reply: SimulatedReply, start: float, number: int
    ) -> web.StreamResponse:
        respond = self._stream if body.get("stream") else self._whole
        return await respond(request, body, reply, start, number)

    async def _stream(
        self, request: web.Request, body: dict[str, Any], reply: SimulatedReply, start: float, number: int
    ) -> web.StreamResponse:
        options = body.get("stream_options") or {}
        include_usage = bool(options.get("include_usage")) and self.stream_options == "ok"
        events = Events(reply, number, body["model"], include_usage=include_usage)
        headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        response = web.StreamResponse(headers=headers | own_headers(number, reply.limits))
        tail = events.tail() if reply.ending == "done" else b""
        # The head and the tail travel with the pieces next to them, so that a reply without delay is one write.
        held = events.head()
        try:
            await response.prepare(request)
            async for first, end in paced(reply.times, start):
                held += events.pieces(first, end) + (tail if end == len(reply.times) else b"")
                await response.write(held)
                held = b""
            if held:
                await sleep_until(start + reply.duration)
                await response.write(held + tail)
        except ConnectionError:
            self.disconnects += 1
            return response
        if include_usage and reply.ending == "done":
            self.report(reply.usage)
        await self._break(request, reply.ending)
        return response

    async def _whole(
        self, request: web.Request, body: dict[str, Any], reply: SimulatedReply, start: float, number: int
    ) -> web.StreamResponse:
        await sleep_until(start + reply.duration)
        content = msgspec.json.encode(completion_object(reply, number, body["model"]))
        headers = {"Content-Type": "application/json", **own_headers(number, reply.limits)}
        if reply.ending in ("done", "cut"):
            self.report(reply.usage)
            return web.Response(body=content, headers=headers)
        return await self._half(request, content, headers, reply.ending)

    async def _send_vectors(
        self, request: web.Request, _body: dict[str, Any], reply: EmbeddingReply, start: float, number: int
    ) -> web.StreamResponse:
        headers = {"Content-Type": "application/json", **own_headers(number, reply.limits)}
        await sleep_until(start + (self.latency.first_token or 0.0))
        if reply.ending == "done":
            self.report(reply.usage)
            return web.Response(body=reply.body, headers=headers)
        return await self._half(request, reply.body, headers, "reset")

    async def _half(
        self, request: web.Request, content: bytes, headers: Mapping[str, str], ending: Ending
    ) -> web.StreamResponse:
        """Send half of *content*, and break the connection."""
        response = web.StreamResponse(headers=headers)
        response.content_length = len(content)
        await response.prepare(request)
        await response.write(content[: len(content) // 2])
        await self._break(request, ending)
        return response

    async def _break(self, request: web.Request, ending: Ending) -> None:
        """Break the connection of a reply that ends so; of one that stops, when either side closes."""
        if ending in ("stall", "hang"):
            await self._closing.wait()
        if ending in ("reset", "stall", "hang") and request.transport is not None:
            request.transport.abort()

    async def _list_models(self, request: web.Request) -> web.StreamResponse:
        try:
            authorize(request, self.api_keys)
        except EndpointError as error:
            return error_response(error, self.calls)
        models = [{"id": name, "object": "model", "created": CREATED, "owned_by": "microbatch"} for name in self.models]
        return web.json_response({"object": "list", "data": models})

    async def _unknown(self, request: web.Request) -> web.StreamResponse:
        return error_response(EndpointError(404, f"Invalid URL ({request.method} {request.path})"), self.calls)
