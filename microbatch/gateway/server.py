"""`Gateway`: the routes and the lifecycle of the server, and what holds for all requests: host, limit, and the form of errors."""

from __future__ import annotations

import asyncio
import logging
import secrets
import traceback
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec
from aiohttp import web
from aiohttp.http import SERVER_SOFTWARE

from microbatch.accounting.prices import PriceTable
from microbatch.checking import check_given, checks_arguments
from microbatch.client import Microbatcher
from microbatch.errors import BatcherClosed, ConfigError, MicrobatchError, Overloaded
from microbatch.gateway.access import Access, check_token
from microbatch.gateway.access_log import AccessLog
from microbatch.gateway.certificate import Certificate
from microbatch.gateway.chat import ChatRoute
from microbatch.gateway.connections import Connections
from microbatch.gateway.cors import Cors
from microbatch.gateway.crew import Lifecycle
from microbatch.gateway.dashboard import show_dashboard
from microbatch.gateway.embeddings import EmbeddingsRoute
from microbatch.gateway.errors import GatewayError, from_aiohttp, translate
from microbatch.gateway.observation import Observation
from microbatch.gateway.own_pages import OwnPages
from microbatch.gateway.place import Place
from microbatch.gateway.relay import Relay
from microbatch.gateway.secret import secret_of
from microbatch.gateway.served import begin, is_recorded, reason_of, served
from microbatch.gateway.settings import GatewaySettings
from microbatch.gateway.upstream import API, AZURE, Upstream
from microbatch.openai.embedding import HARMLESS_FIELDS
from microbatch.policy import FlushPolicy
from microbatch.prompt.parameters import HARMLESS
from microbatch.transports.addresses import CHAT_COMPLETIONS, EMBEDDINGS
from microbatch.transports.api_key import KeyFunction
from microbatch.transports.openai_chat import OpenAIChat

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from microbatch.accounting.prices import Price
    from microbatch.accounting.stats import Stats
    from microbatch.gateway.crew import Crew
    from microbatch.gateway.report import Report
    from microbatch.gateway.served import Served

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

logger: Final = logging.getLogger("microbatch")

_GATEWAY_FAILED: Final = 500


class Gateway:
    """An OpenAI-compatible server in front of another one, which combines requests.

    ```python
    async with Gateway("https://api.openai.com/v1", port=8080) as gateway:
        client = openai.AsyncOpenAI(base_url=gateway.base_url)  # with its own key
    ```
    Chat completions and embeddings are submitted to a `Microbatcher`; all else under /v1 is relayed unchanged. A caller's key is
    sent with that caller's requests only: callers with different keys share no prompt, no call and no cached answer.

    Args:
        upstream: Address of the upstream API, up to and without `/chat/completions`. Azure OpenAI: that of the resource, or of one
            deployment.
        host: Address to listen on.
        port: Port to listen on; 0 for a free one.
        uds: Path of a Unix socket to listen on, in place of host and port. One that a process has left behind is replaced.
        uds_mode: Permissions of that socket.
        tls_cert: File with a TLS certificate in PEM, and those that lead to its issuer; None for no encryption.
        tls_key: File with its key in PEM, not encrypted; None if the key is in *tls_cert*.
        cors_origins: Origins whose web pages may use the API, as "https://app.example".
        model: Model for chat completions that name none; None refuses those.
        query: Query parameters of every call to the upstream, such as Azure's `api-version`; those of a client take precedence.
        api_key: Key for callers without one, who may use chat completions, embeddings and the list of models only; or a function that
            returns it, see `OpenAIChat`. With None their requests are sent without a key.
        access_token: Token that callers send in place of a key to use *api_key* and, off loopback, to see the gateway's own pages.
            With None every caller on this machine may.
        secret: Key of the digests that distinguish tenants; gateways that share a cache need the same. None uses the cache's own, or
            a random one.
        lane_headers: Further headers to send with combined requests, which share a prompt only if these are equal.
        allowed_hosts: Further names under which clients address the gateway; "*" allows any.
        access_log: File to which a line of JSON is added for each request, without texts and keys; "-" for standard output. None
            writes none.
        settings: Limits for clients.
        connection: Further arguments of `OpenAIChat`: `structured`, `stream_options`, `first_timeout`, `connect_timeout`,
            `max_header_bytes`, `trust_env`, `uds`...
        pages: Further pages by path, protected like /stats.
        batcher: Further arguments of `Microbatcher`: `policy`, `retry`, `cache`, `rate_limit`, `audit`...

    Attributes:
        host: As given.
        batcher: The batcher.
        connections: The connections of clients.

    Raises:
        ConfigError: A setting is wrong, or would let other machines use *api_key*.
    """

    @checks_arguments
    def __init__(
        self,
        upstream: str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        uds: str | None = None,
        uds_mode: int = 0o600,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        cors_origins: Collection[str] = (),
        model: str | None = None,
        query: Mapping[str, str] | None = None,
        api_key: str | KeyFunction | None = None,
        access_token: str | None = None,
        secret: bytes | None = None,
        lane_headers: Sequence[str] = (),
        allowed_hosts: Collection[str] = (),
        access_log: str | None = None,
        settings: GatewaySettings | None = None,
        connection: Mapping[str, Any] | None = None,
        pages: dict[str, Handler] | None = None,
        **batcher: Any,
    ) -> None:
        check_given(Microbatcher.__init__, batcher)
        self.host = host
        self._life = Lifecycle()
        self._certificate = _certificate(tls_cert, tls_key)
        place = Place(host=host, port=port, uds=uds, uds_mode=uds_mode)
        self.connections: Connections = Connections(place, self._certificate, self._refuse_unreadable)
        self._cors = Cors(cors_origins)
        self._settings = settings if settings is not None else GatewaySettings()
        self._access = Access(
            host=host if uds is None else "localhost",
            api_key=api_key,
            access_token=access_token,
            lane_headers=lane_headers,
            allowed_hosts=allowed_hosts,
            trust_tenant_header=self._settings.trust_tenant_header,
        )
        self._upstream = Upstream(upstream, query)
        self._transport = self._make_transport(model, api_key, query, batcher.get("policy"), connection or {})
        prices = batcher.pop("prices", None) or {}
        self._prices = prices if callable(prices) else PriceTable(prices)
        self._observed = Observation(None if access_log is None else AccessLog(access_log))
        self.batcher: Microbatcher = self._make_batcher(batcher)
        self._cache = batcher.get("cache")
        self._secret = secret
        self._open_pages: dict[str, Handler] = {}
        self._pages: dict[str, Handler] = {}
        self._add_pages(pages or {})
        self._relay = Relay(self.batcher, self._settings.client_timeout)
        policy = batcher.get("policy") or FlushPolicy()
        shared = (self.batcher, self._access, self._relay, self._settings)
        embedding_model = (connection or {}).get("embedding_model")
        self._chat = ChatRoute(*shared, model, HARMLESS.union(policy.combine_params))
        harmless = HARMLESS_FIELDS.union(policy.combine_params)
        self._embeddings = EmbeddingsRoute(*shared, embedding_model, harmless)
        self._routes = {CHAT_COMPLETIONS: self._chat.serve, EMBEDDINGS: self._embeddings.serve}
        self._serving = 0  # requests of the API

    def _make_batcher(self, options: dict[str, Any]) -> Microbatcher:
        hooks = [*options.pop("hooks", ()), *self._observed.hooks]
        batcher = Microbatcher(self._transport, prices=self._prices, hooks=hooks, **options)
        self._observed.watch(batcher)
        if batcher.audits is not None:
            batcher.audits.callers_pay = self._access.callers_pay
        if batcher.look_ups is not None:
            batcher.look_ups.checks.callers_pay = self._access.callers_pay
        return batcher

    def _add_pages(self, pages: Mapping[str, Handler]) -> None:
        own = OwnPages(self._life, self.report, self._observed.metrics)
        self._open_pages = {"/healthz": own.health, "/readyz": own.ready}
        self._pages = {"/stats": own.stats, "/metrics": own.metrics, "/dashboard": show_dashboard, **pages}

    def _make_transport(
        self,
        model: str | None,
        api_key: str | KeyFunction | None,
        query: Mapping[str, str] | None,
        policy: Any,
        connection: Mapping[str, Any],
    ) -> OpenAIChat:
        OpenAIChat(base_url=self._upstream.base_url, api_key=api_key or "")  # validates the key
        return OpenAIChat(
            model,
            base_url=self._upstream.base_url,
            query=query,
            # `Access` chooses the key of each request. It leaves one that a function returns to the transport, whose key is sent only
            # with requests that have none.
            api_key=api_key if callable(api_key) else "",
            timeout=self._settings.upstream_timeout,
            idle_timeout=self._settings.idle_timeout,
            max_connections=max(100, policy.max_concurrent_batches if policy is not None else 0),
            **connection,
        )

    def __repr__(self) -> str:
        """Return the address and the state, without keys."""
        state = "closing" if self._life.draining else "open" if self.connections.open else "not listening"
        place = self.connections.place.uds or f"{self.host}:{self.port}"
        return f"Gateway({place}, {state}, serving={self._serving})"

    @property
    def base_url(self) -> str:
        """The base URL for clients.

        Raises:
            ConfigError: The gateway has no port before it is opened.
        """
        if not self.connections.origin:
            raise ConfigError("a Gateway has no base_url before it is opened")
        return f"{self.connections.origin}/v1"

    @property
    def port(self) -> int:
        """The port in use; before the gateway is opened, as given."""
        return self.connections.port

    def stats(self) -> Stats:
        """Return the batcher's figures so far."""
        return self.batcher.stats()

    def report(self) -> Report:
        """Return what this process has counted."""
        return msgspec.structs.replace(self._observed.report(self.batcher.stats()), texts=self._embeddings.texts)

    # --- lifecycle

    def make_application(self) -> web.Application:
        """Return the gateway as an aiohttp application, for a server of the caller's.

        Its startup opens the batcher and its cleanup closes it. Run it with `handler_cancellation=True`, so that requests of clients
        that leave are cancelled, with `auto_decompress=False`, so that compressed bodies are relayed unchanged, and with no access
        log that contains headers.
        """
        application = web.Application(client_max_size=self._settings.max_body_bytes)
        application.middlewares.append(self._handle)
        application.on_response_prepare.append(self._prepare)
        router = application.router
        for path, page in self._open_pages.items():
            router.add_get(path, page)
        for path, page in self._pages.items():
            router.add_get(path, self._guarded(page))
        for api in (API, AZURE):
            router.add_route("*", f"{api}{{path:.*}}", self._serve_api)
        application.on_startup.append(self._open_batcher)
        application.on_cleanup.append(self._close_batcher)
        return application

    async def open(self) -> Self:
        """Open the batcher and listen.

        Raises:
            OSError: The port or the Unix socket is taken.
            BatcherClosed: It was opened before; a gateway is used once.
        """
        await self.start()
        try:
            await self.connections.listen()
        except BaseException:
            await self.connections.close()
            raise
        return self

    async def start(self, crew: Crew | None = None, began: float | None = None) -> None:
        """Open the batcher without listening: another process accepts connections, and they are added to `connections`.

        Args:
            crew: The workers of which this gateway is one; None if it is alone.
            began: Monotonic time at which the first of them began.
        """
        self._life.crew = crew
        if began is not None:
            self._observed.begin_at(began)
        if self.connections.open:
            raise BatcherClosed("a Gateway is opened once; make a new one")
        await self.connections.start(self.make_application())

    async def aclose(self, grace: float | None = 30.0) -> None:
        """Take no more requests, answer those under way, and stop listening.

        Meanwhile /readyz and the API answer with status 503.

        Args:
            grace: Seconds to wait for answers, after which the remaining requests fail. None waits as long as their deadlines allow.
        """
        await self.drain(grace)
        await self.connections.close()

    async def drain(self, grace: float | None) -> None:
        """Take no more requests and answer those under way, as `aclose` does, but go on refusing what comes."""
        self._life.draining = True
        await self.batcher.aclose(grace)

    async def retire(self, patience: float) -> None:
        """Serve what comes on the connections there are, and close each after an answer; no further ones may be added.

        Return when there are none left. Idle ones are closed after *patience* seconds.
        """
        self._life.retiring = True
        await self.connections.all_closed(patience)

    def reload(self, *, prices: Mapping[str, Price] | None = None, access_token: str | None = None) -> None:
        """Take settings that have changed, without disturbing any request.

        The files of the TLS certificate are read again, and a function that returns the key is called again.

        Args:
            prices: In place of those given before, unless these are a function; None keeps them.
            access_token: Likewise.

        Raises:
            ConfigError: One of them, or a file, is wrong; nothing has changed.
        """
        if access_token is not None:
            check_token(access_token)
        if self._certificate is not None:
            self._certificate.reload()
        if prices is not None and isinstance(self._prices, PriceTable):
            self._prices.replace(prices)
        if access_token is not None:
            self._access.replace_token(access_token)
        self._transport.renew_key()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, kind: type[BaseException] | None, *_raised: object) -> None:
        await self.aclose(30.0 if kind is None else 0.0)

    async def _open_batcher(self, _application: web.Application) -> None:
        await self.batcher.open()
        try:
            self._access.secret = self._secret or await secret_of(self._cache) or secrets.token_bytes(32)
        except BaseException:
            await self.batcher.aclose(0)  # aiohttp does not clean up after a failed startup
            raise

    async def _close_batcher(self, _application: web.Application) -> None:
        self._life.draining = True
        await self.batcher.aclose()
        await self._observed.aclose()

    # --- all requests

    @web.middleware
    async def _handle(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        record = self._begin(request)
        try:
            response = await self._answer(request, handler)
            record.end(response.status)
        except (ConnectionError, asyncio.CancelledError):
            record.disconnect()
            raise
        finally:
            record.seconds = asyncio.get_running_loop().time() - record.began
            self._observed.add(record)
        if self._life.draining:
            # A stream that began before has sent its headers. While the gateway retires, the next request on its connection is served.
            response.force_close()
        return response

    def _begin(self, request: web.Request) -> Served:
        return begin(request, page=request.path in self._pages or request.path in self._open_pages)

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self._access.check_host(request)
            if (
                request.path.startswith((API, AZURE))
                and (preflight := self._cors.answer_preflight(request)) is not None
            ):
                return preflight
            return await (self._admit(request, handler) if request.path.startswith((API, AZURE)) else handler(request))
        except GatewayError as error:
            served(request).fail(reason_of(error, error.error["code"]))
            return error.response()
        except MicrobatchError as error:
            served(request).fail(error)
            return translate(error).response()
        except web.HTTPException as error:
            refusal = from_aiohttp(error, request)
            served(request).fail(reason_of(refusal, refusal.error["code"]))
            return refusal.response()
        except (ConnectionError, asyncio.CancelledError):
            raise  # the client is gone
        except Exception as error:  # noqa: BLE001 aiohttp would answer a bug in its own words
            # Without the exception's text, which may quote the request.
            logger.error(  # noqa: TRY400 see above
                "a bug in the gateway: %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__))
            )
            served(request).fail("gateway_error")
            return GatewayError(500, "The gateway failed; its log says where.", code="gateway_error").response()

    async def _admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer a request of the API, unless the gateway is closing or full."""
        if self._life.draining:
            raise BatcherClosed
        if self._serving >= self._settings.max_requests:
            raise Overloaded
        self._serving += 1
        try:
            return await handler(request)
        finally:
            self._serving -= 1

    async def _prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        if not is_recorded(request):
            # aiohttp has refused it before any middleware ran, as it does for an unknown Expect.
            self._record_refusal(request, response.status)
        served(request).identify(response)
        if request.path.startswith((API, AZURE)):
            self._cors.mark(request, response)
        # Versions are not disclosed; an upstream's own Server header is relayed.
        if response.headers.get("Server") == SERVER_SOFTWARE:
            del response.headers["Server"]
        if self._life.leaving:
            # force_close alone closes without announcing it, and the client may be sending its next request already.
            response.headers["Connection"] = "close"
            response.force_close()

    def _record_refusal(self, request: web.BaseRequest, status: int, reason: str | None = None) -> None:
        record = begin(request, page=False)
        if reason is not None:
            record.fail(reason)
        record.end(status)
        self._observed.add(record)

    def _refuse_unreadable(self, request: web.BaseRequest, status: int) -> web.Response:
        """Return the answer to a request that aiohttp cannot read, and record it."""
        message, code = "The request is no HTTP that can be read, or a part of it is too long.", "unreadable_request"
        if status >= _GATEWAY_FAILED:
            message, code = "The gateway failed; its log says where.", "gateway_error"
        response = GatewayError(status, message, code=code).response()
        if not is_recorded(request):
            self._record_refusal(request, status, code)
        served(request).identify(response)
        return response

    # --- routes

    def _guarded(self, page: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            self._access.check_page(request)
            return await page(request)

        return guarded

    async def _serve_api(self, request: web.Request) -> web.StreamResponse:
        place = self._upstream.place(request)
        serve = self._routes.get(place.api_path) if request.method == "POST" else None
        if serve is not None:
            return await serve(request, place)
        caller = self._access.caller(request)
        served(request).tenant = caller.tenant
        self._access.check_relayed(request, place.api_path, caller)
        body = await self._relay.read_body(request) if request.body_exists else None
        return await self._relay.serve(request, place.path, body, caller)


def _certificate(certificate: str | None, key: str | None) -> Certificate | None:
    if certificate is None and key is not None:
        raise ConfigError("tls_key= needs tls_cert=")
    return None if certificate is None else Certificate(certificate, key)
