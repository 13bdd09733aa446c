"""What users set for their endpoint: keys that expire, forms, time limits, sockets and proxies, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

import microbatch as mb
from microbatch import errors
from microbatch.cli.main import main, make_parser
from microbatch.cli.plan import read_plan
from microbatch.cli.serve import make_gateway
from microbatch.protocols import ChatCall
from microbatch.transports import api_key
from microbatch.transports.openai_chat import OpenAIChat

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

SCHEMA = {"type": "object", "properties": {"answer": {"type": "string"}}}
QUESTION = [{"role": "user", "content": "Answer as JSON"}]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


class Endpoint:
    """An endpoint that takes the keys in `valid`, all if it is None, and answers "ok" after `step`."""

    def __init__(self) -> None:
        self.valid: set[str] | None = None
        self.keys: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.step: Callable[[web.Request], Any] | None = None
        self.url = ""

    async def serve(self, request: web.Request) -> web.StreamResponse:
        key = request.headers.get("Authorization", "").removeprefix("Bearer ")
        self.keys.append(key)
        raw = await request.read()
        self.bodies.append(json.loads(raw) if raw else {})
        if self.valid is not None and key not in self.valid:
            return web.json_response({"error": {"message": "token expired", "code": "invalid_api_key"}}, status=401)
        answer = None if self.step is None else await self.step(request)
        return answer if answer is not None else reply()


def reply(**headers: str) -> web.Response:
    choice = {"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}
    return web.json_response({"model": "m", "choices": [choice]}, headers=headers)


@contextlib.asynccontextmanager
async def serving(path: Path | None = None) -> AsyncIterator[Endpoint]:
    endpoint = Endpoint()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", endpoint.serve)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await (web.TCPSite(runner, "127.0.0.1", 0) if path is None else web.UnixSite(runner, str(path))).start()
    if path is None:
        endpoint.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield endpoint
    finally:
        await runner.cleanup()


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    async with serving() as endpoint:
        yield endpoint


@contextlib.asynccontextmanager
async def chat(endpoint: Endpoint, **options: Any) -> AsyncIterator[OpenAIChat]:
    transport = OpenAIChat("m", **{"base_url": endpoint.url, **options})
    try:
        yield transport
    finally:
        await transport.aclose()


async def ask(transport: OpenAIChat, **call: Any) -> str:
    texts: list[str] = []
    await transport.send(ChatCall(**{"messages": QUESTION, **call}), texts.append)
    return "".join(texts)


class Keys:
    """A function that returns k1, k2...; *wait* is awaited before."""

    def __init__(self, wait: Callable[[], Any] | None = None) -> None:
        self.calls = 0
        self._wait = wait

    async def __call__(self) -> str:
        self.calls += 1
        number = self.calls
        if self._wait is not None:
            await self._wait()
        return f"k{number}"


# --- keys


@pytest.mark.parametrize("kind", ["async", "sync", "sync that returns a coroutine"])
async def test_calls_share_one_call_of_the_function_until_its_key_is_refused(endpoint: Endpoint, kind: str) -> None:
    keys, threads = Keys(), set()

    def sync() -> str:
        threads.add(threading.current_thread())
        keys.calls += 1
        return f"k{keys.calls}"

    function: Any = {"async": keys, "sync": sync, "sync that returns a coroutine": functools.partial(keys)}[kind]
    async with chat(endpoint, api_key=function) as transport:
        assert await asyncio.gather(*(ask(transport) for _ in range(16))) == ["ok"] * 16
        assert await ask(transport) == "ok"
    assert endpoint.keys == ["k1"] * 17
    assert keys.calls == 1
    assert threading.current_thread() not in threads


async def test_a_key_that_expires_is_replaced_and_nobody_notices(endpoint: Endpoint) -> None:
    """Cache, lanes, limits and the breaker follow the function: what they know is kept when the key changes."""
    keys = Keys()
    endpoint.valid = {"k1"}
    cache = mb.MemoryCache()
    async with mb.Microbatcher(
        OpenAIChat("m", base_url=endpoint.url, api_key=keys),
        cache=cache,
        rate_limit=mb.RateLimit(rpm=1000),
        policy=mb.FlushPolicy(max_batch_size=1),
        retry=mb.RetryPolicy(max_attempts=1),
    ) as batcher:
        assert (await batcher.submit(QUESTION)).output == "ok"
        endpoint.valid = {"k2"}
        others = [[{"role": "user", "content": str(number)}] for number in range(8)]
        assert [each.output for each in await asyncio.gather(*map(batcher.submit, others))] == ["ok"] * 8
        assert keys.calls == 2
        assert set(endpoint.keys[-8:]) == {"k2"}
        assert (await batcher.submit(QUESTION)).route == "cache"
        assert batcher.stats().failed == 0


async def test_what_was_learned_of_the_endpoint_outlives_a_key(endpoint: Endpoint) -> None:
    async def no_schemas(_request: web.Request) -> web.Response | None:
        if "response_format" in endpoint.bodies[-1]:
            message = "response_format is not supported"
            return web.json_response({"error": {"message": message}}, status=400)
        return None

    endpoint.step = no_schemas
    async with chat(endpoint, api_key=Keys()) as transport:
        call = ChatCall(messages=QUESTION, schema=SCHEMA)
        for _ in range(3):
            with contextlib.suppress(errors.BadRequest):
                await transport.send(call, lambda _text: None)
        endpoint.valid = {"k2"}
        refused = len(endpoint.bodies)
        with pytest.raises(errors.AuthFailed) as caught:
            await ask(transport, schema=SCHEMA)
        assert caught.value.again
        assert await ask(transport, schema=SCHEMA) == "ok"
    assert not any("response_format" in body for body in endpoint.bodies[refused:])


async def test_a_refused_key_is_replaced_once_for_each_call(endpoint: Endpoint) -> None:
    endpoint.valid = set()
    keys = Keys()
    async with mb.Microbatcher(OpenAIChat("m", base_url=endpoint.url, api_key=keys)) as batcher:
        with pytest.raises(errors.AuthFailed):
            await batcher.submit(QUESTION)
    assert endpoint.keys == ["k1", "k2"]


async def test_a_fixed_key_is_not_tried_twice(endpoint: Endpoint) -> None:
    endpoint.valid = set()
    async with chat(endpoint, api_key="fixed") as transport:
        with pytest.raises(errors.AuthFailed) as caught:
            await ask(transport)
    assert not caught.value.again
    assert endpoint.keys == ["fixed"]


async def test_a_relayed_request_gets_a_new_key_as_well(endpoint: Endpoint) -> None:
    endpoint.valid = {"k2"}
    async with chat(endpoint, api_key=Keys()) as transport:
        async with transport.forward("GET", "/models", {}) as response:
            assert response.status == 200
        async with transport.forward("GET", "/models", {"Authorization": "Bearer mine"}) as response:
            assert response.status == 401
    assert endpoint.keys == ["k1", "k2", "mine"]


async def test_the_function_is_not_called_for_a_caller_with_a_key_of_its_own(endpoint: Endpoint) -> None:
    keys = Keys()
    async with chat(endpoint, api_key=keys) as transport:
        await ask(transport, headers={"x-api-key": "mine"})
    assert (keys.calls, endpoint.keys) == (0, [""])


async def test_a_failing_function_fails_the_attempt_and_is_called_again(endpoint: Endpoint) -> None:
    fail = True

    def key() -> str:
        if fail:
            raise LookupError("sk-secret")
        return "k"

    async with chat(endpoint, api_key=key) as transport:
        with pytest.raises(errors.ConnectFailed, match=r"api_key\(\) raised LookupError") as caught:
            await ask(transport)
        assert "secret" not in str(caught.value)
        fail = False
        assert await ask(transport) == "ok"


async def test_a_function_that_hangs_is_given_up(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    never = asyncio.Event()
    async with chat(endpoint, api_key=Keys(never.wait)) as transport:
        with pytest.raises(errors.ConnectFailed, match="time was up"):
            await ask(transport, timeout=0.01)
        await transport.aclose()  # nobody waits for the function any more
        monkeypatch.setattr(api_key, "KEY_TIMEOUT", 0.01)
        with pytest.raises(errors.ConnectFailed, match=r"took longer than 0\.01 s"):
            await ask(transport)
    assert endpoint.keys == []


async def test_a_cancelled_caller_takes_nothing_from_those_who_wait_for_the_same_key(endpoint: Endpoint) -> None:
    asked, go = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        asked.set()
        await go.wait()

    keys = Keys(wait)
    async with chat(endpoint, api_key=keys) as transport:
        first, second = (asyncio.create_task(ask(transport)) for _ in range(2))
        await asked.wait()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        go.set()
        assert await second == "ok"
    assert keys.calls == 1


@pytest.mark.parametrize("key", [None, b"k", "two\nlines"])
async def test_what_is_no_key_is_a_mistake_of_the_settings(endpoint: Endpoint, key: Any) -> None:
    async with chat(endpoint, api_key=lambda: key) as transport:
        with pytest.raises(errors.ConfigError, match="api_key"):
            await ask(transport)


@pytest.mark.parametrize(
    ("base_url", "beside", "sent"),
    [
        ("https://api.openai.com/v1", None, True),
        ("https://EU.api.openai.com:443/v1", None, True),
        ("https://evilapi.openai.com/v1", None, False),
        ("https://api.groq.com/openai/v1", None, False),
        ("https://api.openai.com.evil.example/v1", None, False),
        ("http://api.openai.com/v1", None, False),
        (None, "https://gateway.example/v1", True),
        ("https://gateway.example/other", "https://gateway.example/v1", True),
        ("https://api.groq.com/openai/v1", "https://gateway.example/v1", False),
    ],
)
def test_the_key_of_the_environment_goes_to_its_own_address_only(
    monkeypatch: pytest.MonkeyPatch, base_url: str | None, beside: str | None, sent: bool
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    if beside is not None:
        monkeypatch.setenv("OPENAI_BASE_URL", beside)
    assert bool(OpenAIChat("m", base_url=base_url)._key) is sent


async def test_a_missing_key_is_explained(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    endpoint.valid = {"k"}
    async with chat(endpoint) as transport:
        with pytest.raises(errors.AuthFailed, match=r"OPENAI_API_KEY is sent only to"):
            await ask(transport)
    assert endpoint.keys == [""]


# --- forms


@pytest.mark.parametrize(
    ("structured", "form"), [("json_schema", "json_schema"), ("json_object", "json_object"), ("none", None)]
)
async def test_a_named_form_is_sent_from_the_first_call_on_and_nothing_else(
    endpoint: Endpoint, structured: Any, form: str | None
) -> None:
    async def refuse(_request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "response_format is not supported"}}, status=400)

    async with chat(endpoint, structured=structured) as transport:
        await ask(transport, schema=SCHEMA, hint="Answer as JSON")
        endpoint.step = refuse
        for _ in range(2):
            with pytest.raises(errors.BadRequest) as caught:
                await ask(transport, schema=SCHEMA, hint="Answer as JSON")
            assert not caught.value.again
    assert [body.get("response_format", {}).get("type") for body in endpoint.bodies] == [form] * 3


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (None, {"include_usage": True}),
        (True, {"include_usage": True}),
        (False, None),
        ({"include_obfuscation": False}, {"include_usage": True, "include_obfuscation": False}),
        ({"include_usage": False}, {"include_usage": False}),
    ],
)
async def test_stream_options_are_sent_as_asked(endpoint: Endpoint, given: Any, sent: Any) -> None:
    async with chat(endpoint, stream_options=given) as transport:
        await ask(transport, stream=True)
        await ask(transport)
    assert [body.get("stream_options") for body in endpoint.bodies] == [sent, None]


# --- time


async def stream(request: web.Request, *pieces: str | asyncio.Event) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for piece in pieces:
        if isinstance(piece, str):
            await response.write(piece.encode())
        else:
            await piece.wait()
    return response


ROLE = 'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}\n\n'
TEXT = 'data: {"choices": [{"index": 0, "delta": {"content": "ok"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


async def test_a_stream_whose_first_event_does_not_come_is_given_up(endpoint: Endpoint) -> None:
    async def silent(request: web.Request) -> web.StreamResponse:
        return await stream(request, ": waiting\n\n", asyncio.Event())

    endpoint.step = silent
    async with chat(endpoint, first_timeout=0.05) as transport:
        with pytest.raises(errors.TransportTimeout, match=r"within 0\.05 s \(first_timeout\)"):
            await ask(transport, stream=True)
        with pytest.raises(errors.TransportTimeout, match=r"within 0\.06 s \(timeout\)"):
            await ask(transport, timeout=0.06)  # not streamed


async def test_a_relayed_stream_is_given_up_as_well(endpoint: Endpoint) -> None:
    hold = asyncio.Event()

    async def silent(request: web.Request) -> web.StreamResponse | None:
        return await stream(request, ": waiting\n\n", hold)

    async def begun(request: web.Request) -> web.StreamResponse | None:
        asyncio.get_running_loop().call_later(0.3, hold.set)
        return await stream(request, ROLE, hold, TEXT)

    body = json.dumps({"model": "m", "messages": QUESTION, "stream": True}).encode()
    async with chat(endpoint, first_timeout=0.1) as transport:
        endpoint.step = silent
        with pytest.raises(errors.TransportTimeout, match=r"within 0\.1 s \(first_timeout\)"):
            async with transport.forward("POST", "/chat/completions", {}, body) as response:
                async for _chunk in response.chunks():
                    pass
        endpoint.step = begun
        async with transport.forward("POST", "/chat/completions", {}, body) as response:
            assert b"ok" in b"".join([chunk async for chunk in response.chunks()])


@pytest.mark.slow
async def test_after_the_first_event_a_model_may_think(endpoint: Endpoint) -> None:
    think = asyncio.Event()

    async def thinking(request: web.Request) -> web.StreamResponse:
        asyncio.get_running_loop().call_later(0.5, think.set)
        return await stream(request, ROLE, think, TEXT)

    endpoint.step = thinking
    async with chat(endpoint, first_timeout=0.25) as transport:
        assert await ask(transport, stream=True) == "ok"


async def test_a_connection_that_is_not_made_is_given_up_after_its_own_time() -> None:
    # A listener whose queue is full: the system leaves further connections unanswered.
    with contextlib.ExitStack() as sockets:
        listener, *clients = (sockets.enter_context(socket.socket()) for _ in range(4))
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for client in clients:
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        async with chat(Endpoint(), base_url=url, connect_timeout=0.1) as transport:
            with pytest.raises(errors.ConnectFailed, match="no answer in time"):
                await ask(transport)


# --- the connection


async def test_long_headers_are_read_up_to_the_limit(endpoint: Endpoint) -> None:
    async def long(_request: web.Request) -> web.Response:
        return reply(**{"X-Long": "x" * 20_000})

    endpoint.step = long
    async with chat(endpoint) as transport:
        assert await ask(transport) == "ok"
    async with chat(endpoint, max_header_bytes=10_000) as transport:
        with pytest.raises(errors.ConnectFailed):
            await ask(transport)


async def test_a_unix_socket_is_an_endpoint_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "llm.sock"
    async with serving(path) as endpoint:
        transport = OpenAIChat("m", uds=path, structured="none")
        async with mb.Microbatcher(transport) as batcher:
            assert (await batcher.submit(QUESTION)).output == "ok"
    assert transport.base_url == "http://localhost/v1"
    assert (await paced_over(tmp_path / "stream.sock")) < 60
    async with chat(Endpoint(), base_url="http://llm/v1", uds=str(path)) as transport:
        with pytest.raises(errors.ConnectFailed, match=r"llm\.sock"):
            await ask(transport)
    assert len(endpoint.bodies) == 1


async def paced_over(path: Path) -> int:
    """Return how often the text of a stream of 100 words, 5 ms apart, is handed over."""

    async def words(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(100):
            await response.write(b'data: {"choices": [{"index": 0, "delta": {"content": "x"}}]}\n\n')
            await asyncio.sleep(0.005)
        await response.write(TEXT.encode())
        return response

    texts: list[str] = []
    async with serving(path) as endpoint, chat(endpoint, base_url=None, uds=path, stream_interval=0.1) as transport:
        endpoint.step = words
        await transport.send(ChatCall(messages=QUESTION, stream=True), texts.append)
    assert "".join(texts) == "x" * 100 + "ok"
    return len(texts)


async def test_the_environment_names_the_proxy_if_it_is_trusted(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login me password stolen\n")
    monkeypatch.setenv("NETRC", str(netrc))
    proxy, _, _ = endpoint.url.rpartition("/")
    monkeypatch.setenv("HTTP_PROXY", proxy)
    elsewhere = "http://llm.example/v1"
    async with chat(endpoint, base_url=elsewhere, trust_env=True, api_key="k") as transport:
        assert await ask(transport) == "ok"
    assert endpoint.keys == ["k"]
    monkeypatch.setenv("NO_PROXY", "llm.example")
    for options in ({"trust_env": True}, {}):
        assert OpenAIChat("m", base_url=elsewhere, **options)._connection.proxy is None
    monkeypatch.setenv("NO_PROXY", "")
    given = OpenAIChat("m", base_url=elsewhere, trust_env=True, proxy="http://other:1")
    assert given._connection.proxy == "http://other:1"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"structured": "xml"}, "structured"),
        ({"stream_options": "include_usage"}, "stream_options"),
        ({"first_timeout": 0}, "first_timeout"),
        ({"connect_timeout": None}, "connect_timeout"),
        ({"max_header_bytes": 0}, "max_header_bytes"),
        ({"trust_env": "yes"}, "trust_env"),
        ({"uds": ""}, "uds"),
        ({"uds": 3}, "uds"),
        ({"uds": "/x", "base_url": "https://x/v1"}, "uds"),
        ({"uds": "/x", "proxy": "http://p"}, "uds"),
        ({"api_key": 3}, "api_key"),
    ],
)
def test_a_wrong_setting_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(errors.ConfigError, match=f"^{named}"):
        OpenAIChat("m", **{"base_url": "http://x/v1", **options})


def test_a_proxy_of_the_environment_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "socks5://p:1")
    with pytest.raises(errors.ConfigError, match="trust_env"):
        OpenAIChat("m", base_url="http://x/v1", trust_env=True)


# --- the command line

WORDS = ["--structured", "none", "--first-timeout", "3", "--api-key-env", "LLM_KEY", "--max-header-bytes", "9000"]
WORDS += ["--stream-options", '{"include_obfuscation": false}', "--embedding-model", "text-embedding-3-small"]


@pytest.mark.parametrize(
    "command", ["run in.jsonl --output out", "warm in.jsonl --cache c.sqlite", "worker s.sqlite", "serve"]
)
async def test_commands_have_the_same_options(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLM_KEY", "secret")
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    monkeypatch.chdir(tmp_path)
    uds = "--upstream-uds" if command == "serve" else "--uds"
    words = [*command.split(), "--model", "m", uds, "llm.sock", *WORDS]
    async with serving(Path("llm.sock")) as endpoint, contextlib.AsyncExitStack() as stack:
        if command == "serve":
            gateway = make_gateway(make_parser().parse_args([*words, "--port", "0", "--upstream", "http://llm/v1"]))
            made: Any = gateway.batcher._parts.settings.transport
            await gateway.open()
            stack.push_async_callback(gateway.aclose)
            transport = await stack.enter_async_context(chat(endpoint, base_url=gateway.base_url))
        else:
            made = read_plan(make_parser().parse_args(words)).transport
            assert isinstance(made, OpenAIChat)
            stack.push_async_callback(made.aclose)
            assert made._stream_options == {"include_usage": True, "include_obfuscation": False}
            assert made._first_timeout == 3.0
            transport = made
        assert made.embedding_model == "text-embedding-3-small"
        await ask(transport, schema=None if command == "serve" else SCHEMA)
    assert endpoint.keys == ["secret"]
    assert "response_format" not in endpoint.bodies[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--api-key-env", "NOT_SET"], "NOT_SET is not set"),
        (["--base-url", "https://x/v1", "--uds", "x"], "--uds needs"),
        (["--base-url", "http://x/v1", "--stream-options", "3"], "--stream-options must be"),
    ],
)
def test_a_wrong_flag_is_named(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "in.jsonl", "-o", "out.jsonl", "--model", "m", "--template", "{x}", *words]) == 2
    assert told in capsys.readouterr().err
