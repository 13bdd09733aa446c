"""The way to an OpenAI-compatible endpoint: chat completions over one aiohttp session."""

from __future__ import annotations

import asyncio
import io
import os
import re
import ssl as tls
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, get_args
from urllib.parse import quote, unquote, urlsplit
from weakref import WeakSet

import aiohttp

from microbatch.errors import ConfigError
from microbatch.policy import at_least, whole
from microbatch.transports.attempt import Attempt
from microbatch.transports.capabilities import Capabilities
from microbatch.transports.chat_wire import can_stream, compose, encode
from microbatch.transports.credentials import credentials_in, in_place_of, says_who
from microbatch.transports.http import FRAMING, Clock, checked, merged, timed, without
from microbatch.transports.relay import Forwarded

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Mapping

    from microbatch.protocols import ChatCall, Completion

Thoughts = Literal["strip", "keep"]
DEFAULT_BASE_URL: Final = "https://api.openai.com/v1"
# Beyond 1 MB aiohttp warns of plain bytes, which it writes at one go; a BytesIO is written piece by piece.
LARGE_BODY_BYTES: Final = 1024 * 1024
CONNECT_TIMEOUT: Final = 10.0
# aiohttp's own, which a relayed request must not gain.
_AUTOMATIC: Final = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
_KEY_IN_PATH: Final = 16
_KEY_IN_QUERY: Final = 8
_VERSION: Final = re.compile(r"\d{4}-\d{2}-\d{2}[\w-]*")  # Azure's `api-version`, which errors are about at times
_PLAIN_PATH: Final = re.compile(r"[\x21-\x7e]*")


class OpenAIChat:
    """A transport to any endpoint that speaks OpenAI's chat completions.

    One object keeps one pool of connections in the event loop that opened it; it may be shared by several batchers and
    opened again after it was closed. What an endpoint turns out not to support (enforced schemas, streams, `temperature`,
    the name of `max_tokens`, how high the bound of a combined call may be) is learned from its refusals.

    Args:
        model: The model to ask when a call names none.
        api_key: The key. None takes it from the environment variable OPENAI_API_KEY. Without either, and with a base_url,
            requests go without Authorization.
        base_url: Address of the API, up to and without `/chat/completions`. None takes OPENAI_BASE_URL, else OpenAI's.
        headers: Headers of every request; a call's own headers of the same name come first. A call with a credential of its own, in
            any header, goes without this transport's: no key, organization or project of another goes with it.
        query: Query parameters of every request, such as Azure's `api-version`.
        timeout: Longest one attempt may take, in seconds.
        idle_timeout: Longest a stream may be silent once it has begun to answer, in seconds; keep-alive comments count as
            silence. Before the first words only `timeout` counts, since models that reason say nothing for minutes.
        max_connections: Most connections open at once; further calls wait for one, on their own `timeout`.
        proxy: Address of an HTTP proxy, or None for none; the environment is not consulted.
        ssl: An `ssl.SSLContext`, False to trust any certificate, None for the system's trust.
        stream: True or False overrides what calls ask for. Calls whose reply is more than one text (tools, `n`, log
            probabilities, audio) are never streamed.
        thoughts: "strip" takes the thought before a lone text away, "keep" leaves it there; `Reply.body` has it in any case.
            Thoughts before JSON, in combined and in typed replies, are never answers.

    Attributes:
        model: As given.
        base_url: The address in use.
        thoughts: As given.

    Raises:
        ConfigError: There is no key and no base_url, or a setting is out of range.
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
        thoughts: Thoughts = "strip",
    ) -> None:
        at_least(0.001, timeout=timeout, idle_timeout=idle_timeout)
        whole(1, max_connections=max_connections)
        if thoughts not in get_args(Thoughts):
            raise ConfigError(f'thoughts must be "strip" or "keep", got {thoughts!r}')
        _check_given(timeout=timeout, idle_timeout=idle_timeout, max_connections=max_connections)
        key = os.environ.get("OPENAI_API_KEY") if api_key is None else api_key
        address = base_url or os.environ.get("OPENAI_BASE_URL")
        if not key and not address:
            raise ConfigError(
                "no API key: set the environment variable OPENAI_API_KEY or pass api_key=; "
                "for an endpoint that needs none, pass base_url="
            )
        self.model = model
        self.base_url = _checked_address("base_url", address or DEFAULT_BASE_URL).rstrip("/")
        self._where = _host_of(self.base_url)
        self._key_headers = {"Authorization": f"Bearer {_checked_key(key)}"} if key else {}
        self._headers = checked(headers or {})
        self._query = dict(query or {})
        self._address_secrets = _secrets_in(self.base_url, self._query)
        self._timeout = timeout
        self._idle_timeout = idle_timeout
        self._max_connections = max_connections
        self._proxy = None if proxy is None else _checked_address("proxy", proxy, credentials=True)
        self._ssl = _checked_ssl(ssl)
        self.thoughts = thoughts
        self._stream = stream
        self._capabilities = Capabilities()
        self._session: aiohttp.ClientSession | None = None
        self._responses: WeakSet[aiohttp.ClientResponse] = WeakSet()
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        """Tell the model and the address, never a key or a header."""
        address = self.base_url
        for secret in self._address_secrets:
            address = address.replace(secret, "***")
        return f"{type(self).__name__}(model={self.model!r}, base_url={address!r})"

    def __reduce__(self) -> NoReturn:
        """Refuse: a pickle would carry the key, and could not carry the connections."""
        raise TypeError(
            "an OpenAIChat cannot be pickled or copied: it holds a key and connections; make one where it is used"
        )

    async def open(self) -> None:
        """Make the pool of connections; `send` and `forward` do so themselves if need be.

        Raises:
            ConfigError: It is open in another event loop.
        """
        self._pool()

    async def aclose(self) -> None:
        """Close the connections; calls under way end with `ConnectFailed`. It can be opened again afterwards."""
        session, self._session = self._session, None
        # aiohttp leaves whoever waits for the rest of a body waiting when its session closes; closing the answer wakes it.
        for response in list(self._responses):
            response.close()
        if session is not None:
            await session.close()

    async def send(self, call: ChatCall, on_text: Callable[[str], None]) -> Completion:
        """Make one attempt at *call*.

        Args:
            call: What to ask.
            on_text: Takes each piece of the answer's text.

        Returns:
            How it ended. `finish_reason` is None for a stream that ended without saying why: the answer is cut off.

        Raises:
            ConfigError: No model is named anywhere, or the call cannot be put into an HTTP request.
            ConnectFailed: The endpoint could not be reached, or the connection broke.
            TransportTimeout: `timeout` or `idle_timeout` passed.
            StatusError: The endpoint refused. With `again`, sending the same call object once more goes out differently. A
                `ServerError` of status 200 is an answer that is none.
            TransportError: The answer is too long.
        """
        model = call.model or self.model
        if not model:
            raise ConfigError("no model: name one in OpenAIChat(model=...) or in the call")
        session = self._pool()
        loop = asyncio.get_running_loop()
        own = checked(call.headers)
        headers = self._request_headers(own, own)
        wants_stream = call.stream if self._stream is None else self._stream
        plan = self._capabilities.plan(
            call,
            base_url=self.base_url,
            model=model,
            credentials=[pair for pair in headers.items() if says_who(pair[0])],
            stream=bool(wants_stream) and can_stream(call),
            may_stream=self._stream is None and can_stream(call),
            now=loop.time(),
        )
        request = merged({"User-Agent": "microbatch"}, headers, {"Content-Type": "application/json"})
        body = _encoded(compose(call, model, plan))
        total = self._timeout if call.timeout is None else min(call.timeout, self._timeout)
        clock = Clock(max(0.0, total), self._idle_timeout)
        attempt = Attempt(
            plan, self._capabilities, clock, on_text, where=self._where, headers=request, secrets=self._address_secrets
        )
        return await attempt.run(
            self._request(session, "POST", "/chat/completions", headers=request, who=own, body=body)
        )

    @asynccontextmanager
    async def forward(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> AsyncGenerator[Forwarded]:
        """Relay a request as it is and yield the answer, whatever its status.

        Bodies are not touched in either direction, nor decompressed. Headers that concern one connection only are left
        out; the transport's key is added unless *headers* bring a credential of their own.

        Args:
            method: The HTTP method.
            path: The path below `base_url`, with a query if there is one.
            headers: The request's headers.
            body: The request's body, or None.

        Raises:
            ConfigError: The path leads out of `base_url`, or a header cannot be sent.
            ConnectFailed: The endpoint could not be reached, or closed without an answer.
            TransportTimeout: No answer began within `timeout`.
        """
        session = self._pool()
        path = _checked_path(path)
        relayed = checked(dict(without(headers.items(), FRAMING)), reserved=frozenset())
        clock = Clock(self._timeout, None)
        end = asyncio.get_running_loop().time() + self._timeout
        who = {**relayed, **credentials_in(path)}
        sent = self._request_headers(relayed, who)
        sending = self._request(session, method, path, headers=sent, who=who, body=body, relay=True)
        response = await timed(clock, sending, self._where)
        try:
            idle = self._idle_timeout if response.content_type == "text/event-stream" else None
            yield Forwarded(response, self._where, end, idle)
        finally:
            response.close()  # no effect on the connection of an answer read to its end

    def _pool(self) -> aiohttp.ClientSession:
        """Return the session of the running loop, made at first need."""
        loop = asyncio.get_running_loop()
        if self._session is not None and not self._session.closed:
            if self._loop is loop:
                return self._session
            if self._loop is not None and not self._loop.is_closed():
                raise ConfigError("this OpenAIChat is open in another event loop; use one for each loop")
            self._session.detach()  # its loop is gone, and its connections with it
        self._loop = loop
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._max_connections, ssl=self._ssl),
            cookie_jar=aiohttp.DummyCookieJar(),  # a cookie set for one tenant is none of the others' business
            # No sock_read: it poisoned pooled connections (aio-libs/aiohttp#12953). `Clock` measures silence.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT),
            trust_env=False,
        )
        return self._session

    def _request_headers(self, own: Mapping[str, str], who: Iterable[str]) -> dict[str, str]:
        """Return all headers of a request whose caller gave *own*, and said *who* it is under these names, there or in the query."""
        return merged(in_place_of(merged(self._key_headers, self._headers), who), own)

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
            params=in_place_of(self._query, who),
            proxy=self._proxy,
            allow_redirects=False,
            auto_decompress=not relay,
            skip_auto_headers=_AUTOMATIC if relay else (),
        )
        self._responses.add(response)
        return response


def _encoded(body: dict[str, Any]) -> bytes:
    try:
        return encode(body)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        # The original is not attached: some of these errors hold the text they tripped over.
        raise ConfigError(f"a message or a parameter cannot be written as JSON ({type(error).__name__})") from None


def _check_given(**limits: object) -> None:
    for name, value in limits.items():
        if value is None:
            raise ConfigError(f"{name} must be a number; there is always a limit")


def _checked_ssl(ssl: object) -> tls.SSLContext | bool:
    if ssl is None:
        return True
    if not isinstance(ssl, bool | tls.SSLContext):
        raise ConfigError("ssl must be an ssl.SSLContext, a bool or None")
    return ssl


def _checked_key(key: object) -> str:
    if not isinstance(key, str) or not key.isprintable() or not key.isascii() or key != key.strip():
        raise ConfigError("api_key must be one line of printable ASCII; a key read from a file may end in a line break")
    return key


def _checked_address(name: str, address: object, *, credentials: bool = False) -> str:
    """Return an http address. It is not quoted in errors, since people put keys into addresses."""
    example = f"{name} must be an address such as {DEFAULT_BASE_URL}"
    if not isinstance(address, str) or not _PLAIN_PATH.fullmatch(address):
        raise ConfigError(example)
    try:
        parts = urlsplit(address)
        host, _port = parts.hostname, parts.port
    except ValueError:
        raise ConfigError(example) from None
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(f"{example}, beginning with http:// or https://")
    if parts.query or parts.fragment:
        raise ConfigError(f"{name} must not have a query or a fragment; parameters go into query=")
    if parts.username is not None and not credentials:
        raise ConfigError(f"{name} must not hold a user name or a password; use headers= for credentials")
    return address


def _secrets_in(base_url: str, query: Mapping[str, str]) -> list[str]:
    """Return the parts of the address that may be keys, as they are and as they are quoted: people put them there."""
    parts = [part for part in urlsplit(base_url).path.split("/") if len(part) >= _KEY_IN_PATH]
    parts += [value for value in query.values() if len(value) >= _KEY_IN_QUERY and not _VERSION.fullmatch(value)]
    return sorted({form for part in parts for form in (part, unquote(part), quote(part, safe=""))})


def _host_of(address: str) -> str:
    parts = urlsplit(address)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{host}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


def _checked_path(path: str) -> str:
    """Return *path* with one leading slash, if it stays below the base address."""
    steps = re.split(r"[/\\]", unquote(path.partition("?")[0]))
    if not _PLAIN_PATH.fullmatch(path) or "#" in path or any(step in (".", "..") for step in steps):
        raise ConfigError("the path to forward must be a plain path below base_url")
    return "/" + path.lstrip("/")
