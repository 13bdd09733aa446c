"""`Gateway`: the routes, and the life of the server."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from typing import TYPE_CHECKING, Any, Final, Self

from aiohttp import web

from microbatch.accounting.live import LiveFigures
from microbatch.accounting.prometheus import PrometheusHooks
from microbatch.client import Microbatcher
from microbatch.errors import BatcherClosed, ConfigError
from microbatch.gateway.access import Access
from microbatch.gateway.bodies import read_body
from microbatch.gateway.chat import PATH, Chat
from microbatch.gateway.dashboard import figures, show_dashboard
from microbatch.gateway.errors import Refusal
from microbatch.gateway.middleware import API, Edge, silent
from microbatch.gateway.relay import relay
from microbatch.gateway.settings import GatewaySettings
from microbatch.transports.openai_chat import OpenAIChat

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence
    from types import TracebackType

    from microbatch.accounting.stats import Stats

    Page = Callable[[web.Request], Awaitable[web.StreamResponse]]

logger = logging.getLogger("microbatch")

CLOSING_SECONDS: Final = 5.0
"""Seconds in which clients have to take their answers, once all are there and the gateway closes."""

KEEPALIVE: Final = 75.0
"""Seconds for which a connection may be idle, its first request not yet there included."""

SECRET_SECONDS: Final = 1.0
"""Seconds to wait for the secret of a shared cache."""


class Gateway:
    """An OpenAI-compatible server in front of another, that lets requests leave together.

    ```python
    async with Gateway("https://api.openai.com/v1", port=8080) as gateway:
        client = openai.AsyncOpenAI(base_url=gateway.base_url)  # with its own key, as ever
    ```
    Chat completions go through a `Microbatcher`; everything else under /v1 is relayed as it is. A caller's key goes with the caller's
    requests and with no others: callers with different keys share no prompt, no call and no cached answer.

    Args:
        upstream: Address of the API behind it, up to and without `/chat/completions`.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        model: The model for requests that name none; None refuses these.
        api_key: The key for callers who bring none. They get nothing but chat completions and the list of models. None has callers
            without a key go to the upstream without one.
        access_token: What callers have to present, as if it were their key, to use *api_key*, and, off loopback, to look at the
            gateway's own pages. None lets everybody on this machine.
        secret: Keys the digests that tell tenants apart; gateways that share a cache need the same. None takes the cache's own, else
            a random one.
        lane_headers: Names of further headers that go with combined requests, which then share a prompt only if these are equal.
        allowed_hosts: Further names under which clients address the gateway; "*" allows any.
        settings: Limits, and what is granted.
        pages: Further pages about the gateway itself, by path; they are guarded like /stats.
        batcher: Further arguments of `Microbatcher`: `policy`, `retry`, `cache`, `rate_limit`...

    Attributes:
        host: As given.
        port: The port it listens on.
        batcher: What it asks.

    Raises:
        ConfigError: A setting is wrong, or would let strangers use *api_key*.
    """

    def __init__(
        self,
        upstream: str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        model: str | None = None,
        api_key: str | None = None,
        access_token: str | None = None,
        secret: bytes | None = None,
        lane_headers: Sequence[str] = (),
        allowed_hosts: Collection[str] = (),
        settings: GatewaySettings | None = None,
        pages: dict[str, Page] | None = None,
        **batcher: Any,
    ) -> None:
        self.host = host
        self.port = port
        self._settings = settings if settings is not None else GatewaySettings()
        self._access = Access(
            host=host,
            api_key=api_key,
            access_token=access_token,
            lane_headers=lane_headers,
            allowed_hosts=allowed_hosts,
            trust_tenant_header=self._settings.trust_tenant_header,
        )
        # The transport has no key: which one a request goes with is decided here, for each.
        transport = OpenAIChat(
            model,
            base_url=upstream,
            api_key="",
            timeout=self._settings.upstream_timeout,
            idle_timeout=self._settings.idle_timeout,
            max_connections=_connections(batcher),
        )
        OpenAIChat(base_url=upstream, api_key=api_key or "")  # checks the key
        self._live = LiveFigures()
        self._metrics = _prometheus()
        listeners = [self._live] if self._metrics is None else [self._live, self._metrics]
        self.batcher = Microbatcher(transport, **{**batcher, "hooks": [*batcher.get("hooks", ()), *listeners]})
        if self._metrics is not None:
            self._metrics.watch(self.batcher)
        self._cache = batcher.get("cache")
        self._secret = secret
        self._pages = {
            "/stats": self._stats,
            "/metrics": self._show_metrics,
            "/dashboard": show_dashboard,
            **(pages or {}),
        }
        self._edge = Edge(self._access, self._settings.max_requests)
        self._chat = Chat(self.batcher, self._access, self._settings, model)
        self._runner: web.AppRunner | None = None

    def __repr__(self) -> str:
        """Tell the address and the state, never a key."""
        state = "closing" if self._edge.draining else "open" if self._runner is not None else "not listening"
        return f"Gateway({self.host}:{self.port}, {state}, serving={self._edge.serving})"

    @property
    def base_url(self) -> str:
        """What a client is given as its base URL; known once the gateway listens."""
        if not self.port:
            raise ConfigError("a Gateway has no base_url before it is opened")
        host = f"[{self.host}]" if ":" in self.host else self.host  # RFC 3986 wants IPv6 in brackets
        return f"http://{host}:{self.port}/v1"

    def stats(self) -> Stats:
        """Return the figures so far."""
        return self.batcher.stats()

    # --- life

    def make_application(self) -> web.Application:
        """Return the gateway as an aiohttp application, for a server of one's own.

        Starting it opens the batcher, and its clean-up closes it. Run it with `handler_cancellation=True`, so that the requests of
        clients that leave are not asked in vain, with `auto_decompress=False`, which relays compressed bodies as they are, and
        without an access log, or one that leaves out headers.
        """
        application = web.Application(client_max_size=self._settings.max_body_bytes)
        self._edge.add_to(application)
        router = application.router
        router.add_get("/healthz", self._health)
        router.add_get("/readyz", self._ready)
        for path, page in self._pages.items():
            router.add_get(path, self._guarded(page))
        router.add_post(f"{API.rstrip('/')}{PATH}", self._chat.serve)
        router.add_route("*", f"{API}{{path:.*}}", self._relay)
        application.on_startup.append(self._open_batcher)
        application.on_cleanup.append(self._close_batcher)
        return application

    async def open(self) -> Self:
        """Open the batcher and listen.

        Raises:
            OSError: The port is taken.
            BatcherClosed: It was opened before; a gateway is used once.
        """
        if self._runner is not None:
            raise BatcherClosed("a Gateway is opened once; make a new one")
        runner = web.AppRunner(
            self.make_application(),
            handler_cancellation=True,
            auto_decompress=False,
            access_log=None,
            logger=silent,
            keepalive_timeout=KEEPALIVE,
            shutdown_timeout=CLOSING_SECONDS,
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, self.host, self.port).start()
        except BaseException:
            await runner.cleanup()
            raise
        self._runner = runner
        self.port = runner.addresses[0][1]
        return self

    async def aclose(self, grace: float | None = 30.0) -> None:
        """Take no more requests, answer those under way, and stop listening.

        While it waits, /readyz and the API answer with status 503.

        Args:
            grace: Seconds to wait for answers; requests that have none by then are told so. None waits as long as deadlines allow.
        """
        self._edge.draining = True
        await self.batcher.aclose(grace)
        if self._runner is not None:
            await self._runner.cleanup()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose(30.0 if kind is None else 0.0)

    async def _open_batcher(self, _application: web.Application) -> None:
        await self.batcher.open()
        try:
            self._access.secret = self._secret or await self._shared_secret() or secrets.token_bytes(32)
        except BaseException:
            await self.batcher.aclose(0)  # a server whose start has failed does not clean up
            raise

    async def _close_batcher(self, _application: web.Application) -> None:
        self._edge.draining = True
        await self.batcher.aclose()

    async def _shared_secret(self) -> bytes | None:
        """Return a secret made of the cache's; None if it has none, or cannot be reached."""
        draw = getattr(self._cache, "secret", None)
        if draw is None:
            return None
        try:
            async with asyncio.timeout(SECRET_SECONDS):
                return hmac.digest(await draw(), b"microbatch gateway tenants", "sha256")
        except Exception as error:  # noqa: BLE001 whatever a store raises, answers matter more
            logger.warning(
                "the cache cannot be reached (%s), so this gateway finds no answers in it that others put there for their tenants, "
                "until it is started again; secret= or --secret-file makes them independent of it",
                type(error).__name__,
            )
            return None

    # --- routes

    async def _health(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, _request: web.Request) -> web.Response:
        if self._edge.draining:
            return web.json_response({"status": "draining"}, status=503)
        return web.json_response({"status": "ready"})

    def _guarded(self, page: Page) -> Page:
        async def guarded(request: web.Request) -> web.StreamResponse:
            self._access.check_page(request)
            return await page(request)

        return guarded

    async def _stats(self, _request: web.Request) -> web.Response:
        return web.Response(
            body=figures(self.batcher.stats(), self._live.snapshot()),
            content_type="application/json",
            headers={"Cache-Control": "no-store"},
        )

    async def _show_metrics(self, _request: web.Request) -> web.Response:
        if self._metrics is None:
            raise Refusal(
                501,
                "This needs the package prometheus-client: pip install 'microbatch[prometheus]'.",
                code="no_metrics",
            )
        return web.Response(body=self._metrics.render(), headers={"Content-Type": self._metrics.content_type})

    async def _relay(self, request: web.Request) -> web.StreamResponse:
        caller = self._access.caller(request)
        address = request.rel_url
        if not address.raw_path.startswith(API):
            raise Refusal(
                404, "Spell /v1/ without percent signs.", code="not_found"
            )  # what is checked must be what is sent
        path = address.raw_path.removeprefix(API.rstrip("/"))
        self._access.check_path(request.method, path, caller)
        self._access.check_content(request, caller)
        patience = self._settings.client_timeout
        body = await read_body(request, timeout=patience) if request.body_exists else None
        query = f"?{address.raw_query_string}" if address.raw_query_string else ""
        return await relay(self.batcher, request, path + query, body, caller, timeout=patience)


def _prometheus() -> PrometheusHooks | None:
    """Return what counts for Prometheus; None if its package is missing, and then /metrics says so."""
    try:
        return PrometheusHooks()
    except ConfigError:
        return None


def _connections(options: dict[str, Any]) -> int:
    """Return how many connections to the upstream may be needed at once."""
    policy = options.get("policy")
    return max(100, policy.max_concurrent_batches if policy is not None else 0)
