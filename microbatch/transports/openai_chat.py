"""`OpenAIChat`: chat completions and embeddings of OpenAI-compatible endpoints over an aiohttp session."""

from __future__ import annotations

import asyncio
import io
import os
import ssl as tls
from collections.abc import Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn
from urllib.parse import unquote_plus
from weakref import WeakSet

import msgspec

from microbatch.checking import Count, Positive, Seconds, checks_arguments
from microbatch.errors import AuthFailed, ConfigError, StatusError
from microbatch.transports.addresses import (
    CHAT_COMPLETIONS,
    DEFAULT_BASE_URL,
    EMBEDDINGS,
    checked_address,
    checked_path,
    is_openai,
    secrets_in,
)
from microbatch.transports.api_key import ApiKey, KeyFunction, environment_key
from microbatch.transports.attempt import Attempt
from microbatch.transports.capabilities import Capabilities, Structured
from microbatch.transports.chat_wire import can_stream, request_body
from microbatch.transports.connection import Connection
from microbatch.transports.credentials import (
    credentials_digest,
    credentials_in,
    in_place_of,
    is_credential,
    lasting_digest,
)
from microbatch.transports.embeddings import EmbeddingAttempt, Encodings
from microbatch.transports.embeddings import request_body as embeddings_body
from microbatch.transports.http import FRAMING, Clock, checked, end_with_connection, merged, requested, timed, without
from microbatch.transports.relay import Forwarded, asks_for_stream

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable

    import aiohttp

    from microbatch.protocols import ChatCall, Completion, Embedded, EmbeddingCall
    from microbatch.transports.capabilities import Plan
    from microbatch.transports.first_form import FirstForm

Thoughts = Literal["strip", "keep"]
# aiohttp warns of longer bytes, which it writes in one piece; a BytesIO is written in several.
LARGE_BODY_BYTES: Final = 1024 * 1024
UNAUTHORIZED: Final = 401
_LOCAL: Final = "http://localhost/v1"  # with a Unix socket, where the host is a name only
# Headers that aiohttp adds, and a relayed request must not gain.
_AUTOMATIC: Final = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")


class OpenAIChat:
    """A transport to an endpoint with OpenAI's chat completions API.

    It has one connection pool, in the event loop that opened it. Several batchers may share it, and it may be opened again after it
    was closed. Features that an endpoint lacks (enforced schemas, streams, `temperature`, a name of `max_tokens`, the highest bound
    of a reply) are learned from its refusals.

    Args:
        model: Model for calls that name none.
        api_key: The key, or a function, async or not, that returns one (the latter runs in a thread). It is called at first use, and
            again when the endpoint has answered a key with status 401; the call is then repeated once. Calls share what it returns,
            and it may take 30 s. Caches, lanes and limits do not depend on the key it returns. None takes the environment variable
            OPENAI_API_KEY, which is sent only to OpenAI and to the address in OPENAI_BASE_URL; without it, and with another base_url,
            requests have no Authorization header. "" sends none.
        base_url: Address of the API, up to and without `/chat/completions`. None takes OPENAI_BASE_URL, else OpenAI's.
        headers: Headers of every request; a call's own headers of the same name take precedence. With a credential in any header of
            a call, this transport's key, organization and project are not sent.
        query: Query parameters of every request, such as Azure's `api-version`.
        timeout: Longest time one attempt may take, in seconds.
        idle_timeout: Longest silence of a stream that has begun to answer, in seconds; keep-alive comments count as silence. Before
            the first words only `timeout` counts, since models that reason may be silent for minutes.
        first_timeout: Longest time until the first event of a streamed reply, in seconds; keep-alive comments are no events. With
            None only `timeout` counts.
        connect_timeout: Longest time to open a connection, TLS included, in seconds.
        max_connections: Most open connections; further calls wait for one within their own `timeout`.
        max_header_bytes: Longest status line and longest header of a response, in bytes; a longer one fails the call.
        proxy: Address of an HTTP proxy, or None.
        trust_env: Whether the environment names the proxy (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY) if `proxy` does not.
            Nothing else is taken from there; `.netrc` is never read.
        uds: Path of a Unix socket to connect to, or None. The base_url, which begins with http:// and is http://localhost/v1 by
            default, is then a name only, by which caches and limits tell endpoints apart.
        ssl: An `ssl.SSLContext`, False to trust any certificate, or None for the system's trust store.
        stream: True or False overrides the calls' own setting. Calls whose reply is more than one text (tools, `n`, log probabilities,
            audio) are never streamed.
        stream_interval: Longest time between two reads of a stream that has begun to answer or to reason, relayed streams included,
            in seconds. Events that arrive in between are read together, which saves most of a stream's processor time. Words are seen
            later by at most this time, and by at most a quarter of the time since the first ones; the first words, and the end after
            a finish reason, are not delayed. 0 reads each event when it arrives.
        stream_options: Fields of `stream_options` beside `include_usage`, such as `{"include_obfuscation": False}`; False never sends
            it. It is left out once the endpoint has refused it.
        structured: How a reply's form is asked for: "json_schema", "json_object", or "none" for words in the prompt alone. An endpoint
            that refuses the one named fails the request. None starts with a schema and learns from refusals.
        embedding_model: Model for embeddings calls that name none.
        thoughts: "strip" removes the thought before a single text, "keep" leaves it; `Reply.body` has it in any case. Thoughts before
            JSON, in combined and typed replies, are always removed.

    Attributes:
        base_url: The address in use.
        takes_prompt_cache_key: Whether it is OpenAI's own, which takes a name of the messages that calls begin with; other endpoints
            refuse or ignore the field `prompt_cache_key`.

    Raises:
        ConfigError: There is neither a key nor a base_url, or a setting is out of range.
    """

    @checks_arguments
    def __init__(
        self,
        model: str | None = None,
        *,
        api_key: str | KeyFunction | None = None,
        base_url: str | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
        timeout: Positive = 600.0,
        idle_timeout: Positive = 60.0,
        max_connections: Count = 100,
        proxy: str | None = None,
        ssl: tls.SSLContext | bool | None = None,
        stream: bool | None = None,
        stream_interval: Seconds = 0.05,
        thoughts: Thoughts = "strip",
        structured: Structured | None = None,
        stream_options: Mapping[str, Any] | bool | None = None,
        first_timeout: Positive | None = None,
        connect_timeout: Positive = 10.0,
        max_header_bytes: Count = 65_536,
        trust_env: bool = False,
        uds: str | os.PathLike[str] | None = None,
        embedding_model: str | None = None,
    ) -> None:
        self.base_url: str
        self.base_url, self._key = _endpoint(base_url, api_key, local=uds is not None)
        self.takes_prompt_cache_key: bool = is_openai(self.base_url)
        self.model = model
        self.embedding_model = embedding_model
        self._connection = Connection(
            self.base_url,
            proxy=proxy,
            trust_env=trust_env,
            ssl=ssl,
            uds=uds,
            max_connections=max_connections,
            connect_timeout=connect_timeout,
            max_header_bytes=max_header_bytes,
        )
        self._where = self._connection.where
        self._headers = checked(headers or {})
        self._query = dict(query or {})
        self._address_secrets = secrets_in(self.base_url, self._query)
        self._timeout = timeout
        self._first_timeout = first_timeout
        self._idle_timeout = idle_timeout
        self.thoughts = thoughts
        self._stream = stream
        self._stream_interval = stream_interval
        self._stream_options = _stream_fields(stream_options)
        self._capabilities = Capabilities(structured)
        self._encodings = Encodings()
        self._repeated: WeakSet[ChatCall | EmbeddingCall] = WeakSet()
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

    @property
    def account_digest(self) -> bytes:
        """A digest of the credentials, in every process the same; a key from a function is not part of it."""
        return lasting_digest([("authorization", self._key.fixed), *self._headers.items(), *self._query.items()])

    async def open(self) -> None:
        """Make the connection pool; `send` and `forward` do so themselves if necessary.

        Raises:
            ConfigError: It is open in another event loop.
        """
        self._pool()

    def renew_key(self) -> None:
        """Call the function that returns the key again before the next call; a fixed key stays."""
        self._key.renew()

    async def aclose(self) -> None:
        """Close the connections; calls under way end with `ConnectFailed`. It can be opened again."""
        self._key.close()
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
        session, path, own = self._pool(), *_destination(call, CHAT_COMPLETIONS)
        key, headers, total = await self._authorized(call, own)
        plan, first, total = await self._planned(call, model, own, total)
        body = request_body(call, model, plan)
        if body.pop("stream_options", None) and self._stream_options:
            body["stream_options"] = self._stream_options
        patience = self._first_timeout if plan.stream else None
        clock = Clock(total, self._idle_timeout, self._stream_interval, patience)
        attempt = Attempt(
            clock=clock,
            where=self._where,
            headers=headers,
            address_secrets=self._address_secrets,
            plan=plan,
            capabilities=self._capabilities,
            on_text=on_text,
            on_event=call.on_event,
        )
        again = False
        try:
            return await attempt.run(
                self._request(session, "POST", path, headers=headers, who=own, body=_encoded(body))
            )
        except StatusError as error:
            self._note_refusal(call, key, error)
            again = error.again
            raise
        finally:
            if first is not None and not again:
                first.end(call)

    async def embed(self, call: EmbeddingCall) -> Embedded:
        """Make one attempt at *call*.

        Vectors are asked for in base64, unless `params` name an `encoding_format` or the endpoint has refused or ignored it.

        Raises:
            ConfigError: There is no embedding model, or the call cannot be written as an HTTP request.
            ConnectFailed: The endpoint could not be reached, or the connection broke.
            TransportTimeout: `timeout` passed.
            StatusError: The endpoint refused; see `send`. A `ServerError` of status 200 is an answer without a vector.
            TransportError: The answer is too long.
        """
        model = call.model or self.embedding_model
        if not model:
            raise ConfigError("no embedding model: name one in OpenAIChat(embedding_model=...) or in the call")
        session, path, own = self._pool(), *_destination(call, EMBEDDINGS)
        key, headers, total = await self._authorized(call, own)
        form = self._encodings.form(call, (self.base_url, model, credentials_digest(own.items())))
        attempt = EmbeddingAttempt(
            clock=Clock(total, None),
            where=self._where,
            headers=headers,
            address_secrets=self._address_secrets,
            form=form,
            encodings=self._encodings,
        )
        body = _encoded(embeddings_body(form, model))
        try:
            return await attempt.run(self._request(session, "POST", path, headers=headers, who=own, body=body))
        except StatusError as error:
            self._note_refusal(call, key, error)
            raise

    async def _authorized(
        self, call: ChatCall | EmbeddingCall, own: Mapping[str, str]
    ) -> tuple[Mapping[str, str], dict[str, str], float]:
        """Return the header with the transport's key, all headers of *call*, whose *own* they include, and the seconds it may take."""
        total = self._timeout if call.timeout is None else min(call.timeout, self._timeout)
        key, total = await self._authorization(own, total)
        headers = merged({"User-Agent": "microbatch"}, self._signed(key, own), {"Content-Type": "application/json"})
        return key, headers, total

    def _note_refusal(self, call: ChatCall | EmbeddingCall, key: Mapping[str, str], error: StatusError) -> None:
        """Have *call* made again, once, if the endpoint refused the *key* and there may be a newer one."""
        if isinstance(error, AuthFailed) and error.status == UNAUTHORIZED and self._key.refused(key):
            error.again = call not in self._repeated
            self._repeated.add(call)

    async def _planned(
        self, call: ChatCall, model: str, own: Mapping[str, str], total: float
    ) -> tuple[Plan, FirstForm | None, float]:
        """Return how to make the next attempt at *call*, the first call that it waits for, if any, and what is left of *total*."""
        wants_stream = call.stream if self._stream is None else self._stream
        make = partial(
            self._capabilities.plan,
            call,
            (self.base_url, model, credentials_digest(own.items())),
            stream=bool(wants_stream) and (can_stream(call) or call.on_event is not None),
            may_stream=self._stream is None and can_stream(call),
        )
        now = asyncio.get_running_loop().time
        plan = make(begun := now())
        first = self._capabilities.untried(plan)
        if first is None:
            return plan, None, total
        await first.wait(call)
        return make(now()), first, max(0.0, total - (now() - begun))

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
            TransportTimeout: No answer began within `timeout`, or within `first_timeout` where *body* asks for a stream.
        """
        session = self._pool()
        path = checked_path(path)
        relayed = checked(dict(without(headers.items(), FRAMING)))
        who = {**relayed, **credentials_in(path)}
        left, repeated = self._timeout, False
        first = self._first_timeout if self._first_timeout is not None and asks_for_stream(body) else None
        while True:
            key, left = await self._authorization(who, left)
            clock = Clock(left, None, first=first)
            sending = self._request(
                session, method, path, headers=self._signed(key, relayed, who), who=who, body=body, relay=True
            )
            response = await timed(clock, sending, self._where)
            if repeated or response.status != UNAUTHORIZED or not self._key.refused(key):
                break
            repeated = True
            response.close()
            left = max(0.0, clock.end - asyncio.get_running_loop().time())
        try:
            streams = response.content_type == "text/event-stream"
            idle = self._idle_timeout if streams else None
            limit = (first, clock.since) if first is not None and streams else None
            yield Forwarded(response, self._where, clock.end, idle, self._stream_interval, limit)
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
        self._session = self._connection.session()
        return self._session

    async def _authorization(self, who: Iterable[str], total: float) -> tuple[dict[str, str], float]:
        """Return the header with the transport's key, {} if the caller brings a credential, and what is left of *total* seconds."""
        if any(map(is_credential, who)):
            return {}, max(0.0, total)
        now = asyncio.get_running_loop().time
        begun = now()
        header = await self._key.headers(max(0.0, total))
        return header, max(0.0, round(total - (now() - begun), 3))

    def _signed(self, key: Mapping[str, str], headers: Mapping[str, str], who: Iterable[str] = ()) -> dict[str, str]:
        """Return *headers* of a caller, with the transport's own and its *key* as far as they are sent beside them and *who*."""
        return merged(in_place_of(merged(key, self._headers), who or headers), headers)

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
        request = session.request if relay else partial(requested, session)
        response = await request(
            method,
            self.base_url + path,
            data=io.BytesIO(body) if body is not None and len(body) > LARGE_BODY_BYTES else body,
            headers=headers,
            params=_beside(path, in_place_of(self._query, who)),
            proxy=self._connection.proxy,
            allow_redirects=False,
            auto_decompress=not relay,
            skip_auto_headers=_AUTOMATIC if relay else (),
        )
        self._responses.add(response)
        end_with_connection(response)
        return response


def _destination(call: ChatCall | EmbeddingCall, usual: str) -> tuple[str, dict[str, str]]:
    """Return the path of *call*, by default the *usual* one, and its headers."""
    named = dict(call.headers)
    return checked_path(named.pop(":path", usual)), checked(named)


def _endpoint(base_url: str | None, api_key: str | KeyFunction | None, *, local: bool) -> tuple[str, ApiKey]:
    """Return the address and the key, as far as they are not given from the environment."""
    address = base_url or (_LOCAL if local else os.environ.get("OPENAI_BASE_URL"))
    url = checked_address("base_url", address or DEFAULT_BASE_URL).rstrip("/")
    key = ApiKey(environment_key(url) if api_key is None else api_key)
    if not key and not address:
        raise ConfigError(
            "no API key: set the environment variable OPENAI_API_KEY or pass api_key=; "
            "for an endpoint that needs none, pass base_url="
        )
    return url, key


def _stream_fields(given: object) -> dict[str, Any] | None:
    """Return the `stream_options` to send, None for none."""
    if not isinstance(given, Mapping | bool | None):
        raise ConfigError("stream_options must be a mapping of its fields, a bool or None")
    return None if given is False else {"include_usage": True, **(given if isinstance(given, Mapping) else {})}


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
