"""`OpenAIChat`: chat completions of OpenAI-compatible endpoints over an aiohttp session."""

from __future__ import annotations

import asyncio
import io
import os
import ssl as tls
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn
from urllib.parse import unquote_plus
from weakref import WeakSet

import aiohttp
import msgspec

from microbatch.errors import ConfigError
from microbatch.policy import at_least, one_of, whole
from microbatch.transports.addresses import (
    CHAT_COMPLETIONS,
    DEFAULT_BASE_URL,
    checked_address,
    checked_path,
    host_and_port,
    secrets_in,
)
from microbatch.transports.attempt import Attempt
from microbatch.transports.capabilities import Capabilities
from microbatch.transports.chat_wire import can_stream, request_body
from microbatch.transports.credentials import credentials_digest, credentials_in, in_place_of
from microbatch.transports.http import FRAMING, Clock, checked, merged, timed, without
from microbatch.transports.relay import Forwarded

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Mapping

    from microbatch.protocols import ChatCall, Completion

Thoughts = Literal["strip", "keep"]
# aiohttp warns of longer bytes, which it writes in one piece; a BytesIO is written in several.
LARGE_BODY_BYTES: Final = 1024 * 1024
CONNECT_TIMEOUT: Final = 10.0
# Headers that aiohttp adds, and a relayed request must not gain.
_AUTOMATIC: Final = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")


class OpenAIChat:
    """A transport to an endpoint with OpenAI's chat completions API.

    It has one connection pool, in the event loop that opened it. Several batchers may share it, and it may be opened again after it
    was closed. Features that an endpoint lacks (enforced schemas, streams, `temperature`, a name of `max_tokens`, the highest bound
    of a reply) are learned from its refusals.

    Args:
        model: Model for calls that name none.
        api_key: The key. None takes the environment variable OPENAI_API_KEY; without that, and with a base_url, requests have no
            Authorization header.
        base_url: Address of the API, up to and without `/chat/completions`. None takes OPENAI_BASE_URL, else OpenAI's.
        headers: Headers of every request; a call's own headers of the same name take precedence. With a credential in any header of
            a call, this transport's key, organization and project are not sent.
        query: Query parameters of every request, such as Azure's `api-version`.
        timeout: Longest time one attempt may take, in seconds.
        idle_timeout: Longest silence of a stream that has begun to answer, in seconds; keep-alive comments count as silence. Before
            the first words only `timeout` counts, since models that reason may be silent for minutes.
        max_connections: Most open connections; further calls wait for one within their own `timeout`.
        proxy: Address of an HTTP proxy, or None. The environment is not consulted.
        ssl: An `ssl.SSLContext`, False to trust any certificate, or None for the system's trust store.
        stream: True or False overrides the calls' own setting. Calls whose reply is more than one text (tools, `n`, log probabilities,
            audio) are never streamed.
        stream_interval: Longest time between two reads of a stream that has begun to answer or to reason, relayed streams included,
            in seconds. Events that arrive in between are read together, which saves most of a stream's processor time. Words are seen
            later by at most this time, and by at most a quarter of the time since the first ones; the first words, and the end after
            a finish reason, are not delayed. 0 reads each event when it arrives.
        thoughts: "strip" removes the thought before a single text, "keep" leaves it; `Reply.body` has it in any case. Thoughts before
            JSON, in combined and typed replies, are always removed.

    Attributes:
        base_url: The address in use.

    Raises:
        ConfigError: There is neither a key nor a base_url, or a setting is out of range.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
        timeout: float = 600.0,
        idle_timeout: float = 60.0,
        max_connections: int = 100,
        proxy: str | None = None,
        ssl: tls.SSLContext | bool | None = None,
        stream: bool | None = None,
        stream_interval: float = 0.05,
        thoughts: Thoughts = "strip",
    ) -> None:
        at_least(0.001, optional=False, timeout=timeout, idle_timeout=idle_timeout)
        at_least(0, optional=False, stream_interval=stream_interval)
        whole(1, optional=False, max_connections=max_connections)
        one_of(Thoughts, thoughts=str(thoughts))
        key = os.environ.get("OPENAI_API_KEY") if api_key is None else api_key
        address = base_url or os.environ.get("OPENAI_BASE_URL")
        if not key and not address:
            raise ConfigError(
                "no API key: set the environment variable OPENAI_API_KEY or pass api_key=; "
                "for an endpoint that needs none, pass base_url="
            )
        self.model = model
        self.base_url = checked_address("base_url", address or DEFAULT_BASE_URL).rstrip("/")
        self._where = host_and_port(self.base_url)
        authorization = {"Authorization": f"Bearer {_checked_key(key)}"} if key else {}
        self._headers = merged(authorization, checked(headers or {}))
        self._query = dict(query or {})
        self._address_secrets = secrets_in(self.base_url, self._query)
        self._timeout = timeout
        self._idle_timeout = idle_timeout
        self._max_connections = max_connections
        self._proxy = None if proxy is None else checked_address("proxy", proxy, credentials=True)
        if not isinstance(ssl, bool | tls.SSLContext | None):
            raise ConfigError("ssl must be an ssl.SSLContext, a bool or None")
        self._ssl = True if ssl is None else ssl
        self.thoughts = thoughts
        self._stream = stream
        self._stream_interval = stream_interval
        self._capabilities = Capabilities()
        self._session: aiohttp.ClientSession | None = None
        self._responses: WeakSet[aiohttp.ClientResponse] = WeakSet()
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        address = self.base_url
        for secret in self._address_secrets:
            address = address.replace(secret, "***")
        return f"{type(self).__name__}(model={self.model!r}, base_url={address!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an OpenAIChat cannot be pickled or copied: it holds a key and connections; make one where it is used"
        )

    async def open(self) -> None:
        """Make the connection pool; `send` and `forward` do so themselves if necessary.

        Raises:
            ConfigError: It is open in another event loop.
        """
        self._pool()

    async def aclose(self) -> None:
        """Close the connections; calls under way end with `ConnectFailed`. It can be opened again."""
        session, self._session = self._session, None
        # Closing the session does not wake the reader of a body; closing the response does.
        for response in list(self._responses):
            response.close()
        if session is not None:
            await session.close()

    async def send(self, call: ChatCall, on_text: Callable[[str], None]) -> Completion:
        """Make one attempt at *call*; *on_text* takes each piece of the answer's text.

        Returns:
            How it ended. `finish_reason` is None for a stream that ended without one: the answer is cut off.

        Raises:
            ConfigError: There is no model, or the call cannot be written as an HTTP request.
            ConnectFailed: The endpoint could not be reached, or the connection broke.
            TransportTimeout: `timeout` or `idle_timeout` passed.
            StatusError: The endpoint refused. With `again`, the same call object will be sent differently the next time. A
                `ServerError` of status 200 is an answer that is no chat completion.
            TransportError: The answer is too long.
        """
        model = call.model or self.model
        if not model:
            raise ConfigError("no model: name one in OpenAIChat(model=...) or in the call")
        session = self._pool()
        named = dict(call.headers)
        path = checked_path(named.pop(":path", CHAT_COMPLETIONS))
        own = checked(named)
        headers = merged(in_place_of(self._headers, own), own)
        wants_stream = call.stream if self._stream is None else self._stream
        plan = self._capabilities.plan(
            call,
            (self.base_url, model, credentials_digest(headers.items())),
            asyncio.get_running_loop().time(),
            stream=bool(wants_stream) and (can_stream(call) or call.on_event is not None),
            may_stream=self._stream is None and can_stream(call),
        )
        request = merged({"User-Agent": "microbatch"}, headers, {"Content-Type": "application/json"})
        body = _encoded(request_body(call, model, plan))
        total = self._timeout if call.timeout is None else min(call.timeout, self._timeout)
        clock = Clock(max(0.0, total), self._idle_timeout, self._stream_interval)
        attempt = Attempt(
            plan, self._capabilities, clock, on_text, self._where, request, self._address_secrets, call.on_event
        )
        return await attempt.run(self._request(session, "POST", path, headers=request, who=own, body=body))

    @asynccontextmanager
    async def forward(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> AsyncGenerator[Forwarded]:
        """Relay a request to *path*, which is below `base_url` and may have a query, and yield the answer, whatever its status.

        Bodies are neither changed nor decompressed. Hop-by-hop headers are left out; the transport's key is added unless *headers*
        have a credential.

        Raises:
            ConfigError: The path leads out of `base_url`, or a header cannot be sent.
            ConnectFailed: The endpoint could not be reached, or closed the connection without an answer.
            TransportTimeout: No answer began within `timeout`.
        """
        session = self._pool()
        path = checked_path(path)
        relayed = checked(dict(without(headers.items(), FRAMING)))
        clock = Clock(self._timeout, None)
        who = {**relayed, **credentials_in(path)}
        sent = merged(in_place_of(self._headers, who), relayed)
        sending = self._request(session, method, path, headers=sent, who=who, body=body, relay=True)
        response = await timed(clock, sending, self._where)
        try:
            idle = self._idle_timeout if response.content_type == "text/event-stream" else None
            yield Forwarded(response, self._where, clock.end, idle, self._stream_interval)
        finally:
            response.close()  # no effect on the connection of an answer read to its end

    def _pool(self) -> aiohttp.ClientSession:
        """Return the session of the running loop, made at first use."""
        loop = asyncio.get_running_loop()
        if self._session is not None and not self._session.closed:
            if self._loop is loop:
                return self._session
            if self._loop is not None and not self._loop.is_closed():
                raise ConfigError("this OpenAIChat is open in another event loop; use one for each loop")
            self._session.detach()  # its loop and its connections are gone
        self._loop = loop
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._max_connections, ssl=self._ssl),
            cookie_jar=aiohttp.DummyCookieJar(),  # a cookie set for one tenant must not reach another
            # No sock_read: it poisoned pooled connections (aio-libs/aiohttp#12953). `Clock` measures silence.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT),
            trust_env=False,
        )
        return self._session

    async def _request(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str],
        who: Iterable[str],
        body: bytes | None,
        relay: bool = False,
    ) -> aiohttp.ClientResponse:
        response = await session.request(
            method,
            self.base_url + path,
            data=io.BytesIO(body) if body is not None and len(body) > LARGE_BODY_BYTES else body,
            headers=headers,
            params=_beside(path, in_place_of(self._query, who)),
            proxy=self._proxy,
            allow_redirects=False,
            auto_decompress=not relay,
            skip_auto_headers=_AUTOMATIC if relay else (),
        )
        self._responses.add(response)
        return response


def _beside(path: str, query: Mapping[str, str]) -> dict[str, str]:
    """Return those parameters of *query* that *path* does not give itself."""
    given = {unquote_plus(pair.partition("=")[0]) for pair in path.partition("?")[2].split("&")}
    return {name: value for name, value in query.items() if name not in given}


def _encoded(body: dict[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(body)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        # The original is not attached: some of these errors quote the text.
        raise ConfigError(f"a message or a parameter cannot be written as JSON ({type(error).__name__})") from None


def _checked_key(key: object) -> str:
    if not isinstance(key, str) or not key.isprintable() or not key.isascii() or key != key.strip():
        raise ConfigError("api_key must be one line of printable ASCII; a key read from a file may end in a line break")
    return key
