"""OpenAIChat over real sockets: what goes out, what comes back, and everything that endpoints do instead of answering."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gzip
import json
import pickle
import ssl
import subprocess
import traceback
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import web
from odd_endpoint import play

from microbatch import errors
from microbatch.messages import Usage
from microbatch.protocols import ChatCall, Completion, Transport
from microbatch.transports.error_parsing import read_fault
from microbatch.transports.http import Clock, connect_failed
from microbatch.transports.openai_chat import OpenAIChat
from microbatch.transports.response_headers import retry_after

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]

KEY = "canary-4f1b9c77-not-shaped-like-a-key"
SCHEMA = {"type": "object", "properties": {"results": {"type": "array"}}}
NO_FORMAT = {"error": {"message": "response_format json_schema is not supported", "type": "invalid_request_error"}}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


class Endpoint:
    """A real server that gives scripted answers in turn, the last one for ever, and keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.requests: list[web.Request] = []
        self.bodies: list[bytes] = []
        self.connections: set[Any] = set()
        self.url = ""

    @property
    def asked(self) -> list[dict[str, Any]]:
        return [json.loads(body) for body in self.bodies]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        self.bodies.append(await request.read())
        self.connections.add(request.transport)
        return await (self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])(request)


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    server = Endpoint()
    app = web.Application(client_max_size=2**26)
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    yield server
    await runner.cleanup()


@pytest.fixture
async def connect(endpoint: Endpoint) -> AsyncIterator[Callable[..., OpenAIChat]]:
    made: list[OpenAIChat] = []

    def chat(**options: Any) -> OpenAIChat:
        made.append(OpenAIChat("m", **{"api_key": KEY, "base_url": endpoint.url, **options}))
        return made[-1]

    yield chat
    for each in made:
        await each.aclose()


@contextlib.asynccontextmanager
async def raw_server(*pieces: bytes | float | str, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server that reads a request's head, then writes bytes, waits seconds or does "reset"; then it closes."""

    serving: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        try:
            await reader.readuntil(b"\r\n\r\n")
            await play(pieces, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving)


def call(**options: Any) -> ChatCall:
    return ChatCall(**{"messages": [{"role": "user", "content": "Say hi"}], **options})


async def ask(chat: OpenAIChat, each: ChatCall | None = None, **options: Any) -> tuple[str, Completion]:
    pieces: list[str] = []
    completion = await chat.send(each or call(**options), pieces.append)
    return "".join(pieces), completion


def whole(text: str | None = "hi", **more: Any) -> dict[str, Any]:
    return {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        **more,
    }


def chunk(text: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    data = {"model": "m-1", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}], **more}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
PATIENCE = 20.0
FOR_EVER = 60.0  # longer than a test waits
HI = [chunk("h"), chunk("i"), chunk(finish="stop"), DONE]


def answer(body: Any = None, status: int = 200, raw: bytes | None = None, **headers: str) -> Answer:
    data = json.dumps(body).encode() if raw is None else raw
    named = {name.replace("_", "-"): value for name, value in {"content_type": "application/json", **headers}.items()}

    async def respond(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=data, headers=named)

    return respond


def stream(*pieces: bytes | float, content_type: str = "text/event-stream", **headers: str) -> Answer:
    async def respond(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": content_type, **headers})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                if isinstance(piece, bytes):
                    await response.write(piece)
                else:
                    await asyncio.sleep(piece)
        return response

    return respond


async def fails(chat: OpenAIChat, each: ChatCall | None = None, **options: Any) -> Any:
    """Return the error that the call ends with, once it is clear that it tells no secret."""
    with pytest.raises(errors.MicrobatchError) as caught:
        await ask(chat, each, **options)
    error = caught.value
    shown = [str(error), repr(error), repr(pickle.loads(pickle.dumps(error))), str(vars(error)), repr(chat)]
    shown += [repr(each) for each in (error.__cause__, error.__context__)]
    assert KEY not in "".join(shown)
    assert KEY not in "".join(traceback.format_exception(error))
    return error


# What goes out


async def test_a_plain_call_is_sent_as_it_is(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [answer(whole(), x_request_id="r-1")]
    messages = [{"role": "system", "content": "Be brief", "name": "s"}, {"role": "user", "content": "Säy \U0001f600"}]
    await ask(connect(), messages=messages, params={"top_p": 0.5}, max_tokens=7)
    assert endpoint.asked == [{"model": "m", "messages": messages, "top_p": 0.5, "max_tokens": 7, "stream": False}]
    request = endpoint.requests[0]
    assert (request.method, request.path) == ("POST", "/v1/chat/completions")
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    assert request.headers["Content-Type"] == "application/json"


async def test_the_calls_model_comes_before_the_transports(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [answer(whole())]
    await ask(connect(), model="other")
    assert endpoint.asked[0]["model"] == "other"


async def test_the_schema_goes_out_named_and_strict_and_the_hint_stays_home(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [answer(whole())]
    await ask(connect(), schema=SCHEMA, hint="As JSON")
    sent = endpoint.asked[0]
    assert sent["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answers", "strict": True, "schema": SCHEMA},
    }
    assert len(sent["messages"]) == 1


async def test_a_callers_authorization_replaces_the_transports_and_nothing_else(
    endpoint: Endpoint, connect: Any
) -> None:
    endpoint.answers = [answer(whole())]
    chat = connect(headers={"X-Team": "a", "X-Gateway": "g"}, query={"api-version": "2"})
    await ask(chat, headers={"authorization": "Bearer theirs", "x-team": "b"})
    headers = endpoint.requests[0].headers
    assert headers.getall("Authorization") == ["Bearer theirs"]
    assert (headers.getall("X-Team"), headers["X-Gateway"]) == (["b"], "g")
    assert endpoint.requests[0].query_string == "api-version=2"


async def test_a_body_beyond_a_megabyte_is_sent_without_a_warning(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [answer(whole())]
    await ask(connect(), messages=[{"role": "user", "content": "x" * 3_000_000}])
    assert len(endpoint.asked[0]["messages"][0]["content"]) == 3_000_000


async def test_cookies_are_not_carried_from_one_caller_to_the_next(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [answer(whole(), Set_Cookie="who=first")]
    chat = connect()
    await ask(chat)
    await ask(chat)
    assert "Cookie" not in endpoint.requests[1].headers


# Settings


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": "ftp://x/v1"},
        {"base_url": "localhost:8000"},
        {"base_url": "http://user:CANARY@x/v1"},
        {"base_url": "http://x/v1?key=CANARY"},
        {"base_url": "http://x:port/v1"},
        {"base_url": "http://x/\nv1"},
        {"api_key": "CANARY\n"},
        {"headers": {"X-A": "CANARY\r\nX-B: 1"}},
        {"headers": {"X A": "CANARY"}},
        {"headers": {"Content-Length": "5"}},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"idle_timeout": "CANARY"[:0] or None},
        {"max_connections": 0},
        {"max_connections": 1.5},
        {"proxy": "nowhere"},
        {"ssl": "yes"},
    ],
)
def test_a_wrong_setting_is_refused_without_quoting_it(options: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        OpenAIChat("m", **{"api_key": "k", "base_url": "http://x/v1", **options})
    assert "CANARY" not in str(caught.value)


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.ConfigError, match=r"OPENAI_API_KEY.*api_key="):
        OpenAIChat("m")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://x/v1/")
    assert OpenAIChat("m").base_url == "http://x/v1"
    assert OpenAIChat("m", base_url="http://y").base_url == "http://y"
    monkeypatch.delenv("OPENAI_BASE_URL")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert OpenAIChat("m").base_url == "https://api.openai.com/v1"


def test_it_is_a_transport_that_tells_no_key_and_is_not_pickled() -> None:
    chat = OpenAIChat("m", api_key=KEY, base_url="http://x/v1", headers={"X-Api-Key": KEY})
    assert isinstance(chat, Transport)
    assert repr(chat) == "OpenAIChat(model='m', base_url='http://x/v1')"
    for attempt in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError, match="holds a key"):
            attempt(chat)


async def test_a_call_needs_a_model() -> None:
    with pytest.raises(errors.ConfigError, match="model"):
        await ask(OpenAIChat(base_url="http://127.0.0.1:9/v1"))


async def test_a_call_that_is_no_http_request_is_refused_before_anything_is_sent(
    endpoint: Endpoint, connect: Any
) -> None:
    for options in (
        {"headers": {"X-A": "a\nX-B: b"}},
        {"headers": {"Transfer-Encoding": "chunked"}},
        {"params": {"top_p": object()}},
        {"messages": [{"role": "user", "content": "canary \ud800"}]},
    ):
        with pytest.raises(errors.ConfigError) as caught:
            await ask(connect(), **options)
        assert "canary" not in "".join(traceback.format_exception(caught.value))
    assert endpoint.requests == []


# A whole reply


async def test_a_whole_reply_is_read(endpoint: Endpoint, connect: Any) -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
    body = whole("hello", model="m-1", usage=usage, id="c-1")
    endpoint.answers = [answer(body, x_request_id="r-1")]
    text, completion = await ask(connect())
    assert text == "hello"
    assert completion == Completion("stop", Usage(10, 3, 4), "m-1", None, "r-1", body)


async def test_odd_but_whole_replies_are_read(endpoint: Endpoint, connect: Any) -> None:
    chat = connect()
    parts = [{"type": "thinking", "text": "hm"}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    refusal = {"choices": [{"message": {"content": None, "refusal": "No."}, "finish_reason": "stop"}]}
    for body, text, seen in (
        (whole(None), "", (None, None)),
        (whole(parts), "ab", (None, None)),
        (refusal, "", ("No.", None)),
        ({"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": "?"}, "model": ""}, "x", (None, None)),
        (whole("y", error=None), "y", (None, None)),
        (whole("z", error=7), "z", (None, None)),
    ):
        endpoint.answers = [answer(body)]
        got, completion = await ask(chat)
        assert (got, (completion.refusal, completion.usage)) == (text, seen)
    endpoint.answers = [answer({"choices": [{"message": {"content": "x"}}]})]
    assert (await ask(chat))[1].finish_reason == "stop"  # it is all there
    endpoint.answers = [answer({"choices": [{"message": {"content": ""}}]})]
    assert (await ask(chat))[1].finish_reason is None


async def test_blank_lines_before_the_reply_are_no_harm(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [stream(b"\n\n", 0.02, b"\n" + json.dumps(whole()).encode(), content_type="application/json")]
    assert (await ask(connect()))[0] == "hi"


async def test_a_compressed_reply_is_read(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [answer(raw=gzip.compress(json.dumps(whole()).encode()), Content_Encoding="gzip")]
    assert (await ask(connect()))[0] == "hi"


@pytest.mark.parametrize("raw", [b"<html>login</html>", b"", b"[]", b'"x"', b"{}", b'{"choices":[]}', b'{"choices":7}'])
async def test_a_200_that_is_no_chat_completion_is_an_error(endpoint: Endpoint, connect: Any, raw: bytes) -> None:
    endpoint.answers = [answer(raw=raw, content_type="text/html")]
    error = await fails(connect())
    assert (type(error), error.status) == (errors.ServerError, 200)
    assert "base_url" in str(error)


# A stream


@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_a_stream_is_read_in_any_pieces(endpoint: Endpoint, connect: Any, size: int) -> None:
    whole_stream = b"".join([chunk(""), *HI[:-1], b'data: {"choices":[],"usage":{"prompt_tokens":5}}\n\n', DONE])
    endpoint.answers = [stream(*(whole_stream[at : at + size] for at in range(0, len(whole_stream), size)))]
    pieces: list[str] = []
    completion = await connect().send(call(stream=True), pieces.append)
    assert "".join(pieces) == "hi"
    assert completion == Completion("stop", Usage(5), "m-1")
    assert endpoint.asked[0]["stream"] is True
    assert endpoint.asked[0]["stream_options"] == {"include_usage": True}


async def test_usage_may_come_with_the_last_choice(endpoint: Endpoint, connect: Any) -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    endpoint.answers = [stream(chunk("hi"), chunk(finish="length", usage=usage), DONE)]
    _, completion = await ask(connect(), stream=True)
    assert (completion.finish_reason, completion.usage) == ("length", Usage(5, 2))


async def test_pieces_are_handed_on_as_they_arrive(endpoint: Endpoint, connect: Any) -> None:
    first = asyncio.Event()

    async def respond(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(chunk("a"))
        await asyncio.wait_for(first.wait(), PATIENCE)  # the rest only after the first piece was seen
        for piece in HI:
            await response.write(piece)
        return response

    endpoint.answers = [respond]
    pieces: list[str] = []
    await connect().send(call(stream=True), lambda text: (pieces.append(text), first.set())[0])
    assert (pieces[0], "".join(pieces)) == ("a", "ahi")


async def test_a_refusal_and_further_choices_are_no_text(endpoint: Endpoint, connect: Any) -> None:
    refused = b'data: {"choices":[{"delta":{"refusal":"N"}},{"index":1,"delta":{"content":"other"}}]}\n\n'
    endpoint.answers = [stream(refused, refused, chunk(finish="stop"), DONE)]
    text, completion = await ask(connect(), stream=True)
    assert (text, completion.refusal) == ("", "NN")


async def test_the_transports_stream_setting_comes_before_the_calls(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [answer(whole())]
    await ask(connect(stream=False), stream=True)
    await ask(connect(stream=True), stream=False)
    await ask(connect(stream=True), params={"n": 2})  # only the JSON of a reply that is not streamed holds both
    assert [body["stream"] for body in endpoint.asked] == [False, True, False]


async def test_an_endpoint_that_ignores_stream_is_read_all_the_same(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [answer(whole("hi"))]
    text, completion = await ask(connect(), stream=True)
    assert (text, completion.finish_reason) == ("hi", "stop")


async def test_a_stream_without_its_own_content_type_is_read_and_anything_else_is_an_error(
    endpoint: Endpoint, connect: Any
) -> None:
    endpoint.answers = [stream(*HI, content_type="text/plain"), answer(raw=b"<html>", content_type="text/html")]
    chat = connect()
    assert (await ask(chat, stream=True))[0] == "hi"
    error = await fails(chat, stream=True)
    assert type(error) is errors.ServerError
    assert "text/html" in str(error)


async def test_a_stream_nobody_asked_for_is_read(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [stream(*HI)]
    assert (await ask(connect()))[0] == "hi"


async def test_a_stream_that_just_ends_has_no_finish_reason(endpoint: Endpoint, connect: Any) -> None:
    chat = connect()
    for pieces in ([chunk("h")], [chunk("h"), b'data: {"choices":[{"del']):
        endpoint.answers = [stream(*pieces)]
        text, completion = await ask(chat, stream=True)
        assert (text, completion.finish_reason) == ("h", None)


async def test_a_last_event_without_its_blank_line_counts(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [stream(chunk("h"), chunk(finish="stop").rstrip())]
    assert (await ask(connect(), stream=True))[1].finish_reason == "stop"


async def test_garbage_after_the_finish_is_no_harm(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [stream(*HI[:-1], b"data: {oops\n\n", DONE, b"data: more\n\n")]
    assert (await ask(connect(), stream=True))[1].finish_reason == "stop"


async def test_an_error_in_mid_stream_is_raised_and_the_text_before_it_stands(endpoint: Endpoint, connect: Any) -> None:
    for said, kind, status in (
        ({"code": 429, "message": "slow"}, errors.RateLimited, 429),
        ({"code": "502", "message": "bad gateway"}, errors.ServerError, 502),
        ({"type": "server_error", "message": "The server had an error"}, errors.ServerError, 200),
        ({"type": "invalid_request_error", "message": "no"}, errors.BadRequest, 200),
    ):
        endpoint.answers = [stream(chunk("part"), b"data: " + json.dumps({"error": said}).encode() + b"\n\n", *HI)]
        pieces: list[str] = []
        with pytest.raises(kind) as caught:
            await connect().send(call(stream=True), pieces.append)
        assert (pieces, caught.value.status, caught.value.again) == (["part"], status, False)


async def test_an_error_as_last_event_without_its_blank_line_counts(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [stream(chunk("part"), b'data: {"error":{"code":503,"message":"x"}}')]
    assert type(await fails(connect(), stream=True)) is errors.ServerError


async def test_a_connection_is_used_again_after_a_stream(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [stream(*HI)]
    chat = connect()
    for _ in range(3):
        await ask(chat, stream=True)
    assert len(endpoint.connections) == 1


async def test_an_endpoint_that_does_not_close_after_the_end_is_not_waited_for(
    endpoint: Endpoint, connect: Any
) -> None:
    endpoint.answers = [stream(*HI, FOR_EVER)]
    async with asyncio.timeout(PATIENCE):
        assert (await ask(connect(), stream=True))[1].finish_reason == "stop"


# Time


async def test_comments_and_empty_events_do_not_feed_the_idle_timer(endpoint: Endpoint, connect: Any) -> None:
    keep_alive = [b": keep-alive\n\n", 0.05, b"data:\n\n", 0.05] * int(FOR_EVER / 0.1)
    endpoint.answers = [stream(chunk("h"), *keep_alive)]
    async with asyncio.timeout(PATIENCE):
        error = await fails(connect(idle_timeout=0.2), stream=True)
    assert type(error) is errors.TransportTimeout
    assert "idle_timeout" in str(error)


@pytest.mark.slow
async def test_events_feed_the_idle_timer(endpoint: Endpoint, connect: Any) -> None:
    # Each comes much sooner than the timer runs out, for a loaded machine's sake, and all together take longer.
    endpoint.answers = [stream(*[piece for _ in range(10) for piece in (chunk("x"), 0.25)], *HI)]
    assert (await ask(connect(idle_timeout=2.0), stream=True))[0] == "xxxxxxxxxxhi"


@pytest.mark.parametrize("streamed", [True, False])
async def test_silence_before_the_answer_does_not_count(streamed: bool) -> None:
    body = json.dumps(whole()).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with raw_server(0.3, head + body) as url:
        chat = OpenAIChat("m", base_url=url, idle_timeout=0.15)
        assert (await ask(chat, stream=streamed))[0] == "hi"
        await chat.aclose()


@pytest.mark.slow
async def test_waiting_for_a_free_connection_is_not_the_endpoints_silence(endpoint: Endpoint, connect: Any) -> None:
    # The second waits for the first, which is longer than an endpoint may be silent.
    endpoint.answers = [stream(*[piece for _ in range(10) for piece in (chunk("x"), 0.25)], *HI), stream(*HI)]
    chat = connect(idle_timeout=2.0, max_connections=1)
    texts = await asyncio.gather(*(ask(chat, stream=True) for _ in range(2)))
    assert [text for text, _ in texts] == ["xxxxxxxxxxhi", "hi"]


@pytest.mark.parametrize("options", [{"timeout": 0.15}, {}])
async def test_the_shorter_timeout_ends_the_attempt_events_or_not(
    endpoint: Endpoint, connect: Any, options: dict[str, float]
) -> None:
    endpoint.answers = [stream(*[piece for _ in range(40) for piece in (chunk("x"), 0.02)])]
    error = await fails(connect(**options), stream=True, timeout=None if options else 0.15)
    assert type(error) is errors.TransportTimeout
    assert "0.15 s (timeout)" in str(error)
    assert isinstance(error, TimeoutError)


async def test_a_timeout_error_of_the_callers_own_is_not_ours(endpoint: Endpoint, connect: Any) -> None:
    def on_text(text: str) -> None:
        raise TimeoutError("mine")

    endpoint.answers = [stream(*HI), answer(whole())]
    for streamed in (True, False):
        with pytest.raises(TimeoutError, match="mine"):
            await connect().send(call(stream=streamed), on_text)


# Broken connections


async def test_an_unreachable_endpoint_is_named_with_the_reason() -> None:
    async with raw_server() as url:
        pass
    chat = OpenAIChat("m", api_key=KEY, base_url=url)
    error = await fails(chat)
    assert type(error) is errors.ConnectFailed
    assert url.split("/")[2] in str(error)
    assert "refused" in str(error)
    await chat.aclose()


async def test_a_port_without_tls_is_named(endpoint: Endpoint, connect: Any) -> None:
    error = await fails(connect(base_url=endpoint.url.replace("http:", "https:")))
    assert "could not connect to 127.0.0.1" in str(error)


@pytest.fixture
def self_signed(tmp_path: Path) -> tuple[Path, Path]:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1", "-subj", "/CN=x"]
    try:
        subprocess.run(["openssl", "req", *kind, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the openssl command to make a certificate")
    return certificate, key


async def test_a_certificate_that_nobody_vouches_for_is_named(self_signed: tuple[Path, Path]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*self_signed)
    body = json.dumps(whole()).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with raw_server(head + body, context=context) as url:
        chat = OpenAIChat("m", api_key=KEY, base_url=url.replace("http:", "https:"))
        assert "certificate that is not trusted" in str(await fails(chat))
        await chat.aclose()
        trusting = OpenAIChat("m", base_url=url.replace("http:", "https:"), ssl=False)
        assert (await ask(trusting))[0] == "hi"
        await trusting.aclose()


SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@pytest.mark.parametrize(
    "pieces",
    [
        (),
        ("reset",),
        (b"HTTP/1.1 200 OK\r\n",),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n",),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{",),
        (SSE_HEAD + chunked(chunk("h")),),
        (SSE_HEAD + chunked(chunk("h")), 0.02, "reset"),
        (SSE_HEAD + b"zz\r\n",),
    ],
)
async def test_a_broken_connection_is_an_error(pieces: tuple[Any, ...]) -> None:
    async with raw_server(*pieces) as url:
        for each in (call(), call(stream=True)):
            chat = OpenAIChat("m", api_key=KEY, base_url=url, query={"key": KEY})
            error = await fails(chat, each)
            assert type(error) is errors.ConnectFailed
            assert "127.0.0.1:" in str(error)
            await chat.aclose()


async def test_text_before_the_cut_stands() -> None:
    async with raw_server(SSE_HEAD + chunked(chunk("part"))) as url:
        chat = OpenAIChat("m", base_url=url)
        pieces: list[str] = []
        with pytest.raises(errors.ConnectFailed, match="in the middle"):
            await chat.send(call(stream=True), pieces.append)
        assert pieces == ["part"]
        await chat.aclose()


async def test_a_cut_after_the_finish_is_no_harm() -> None:
    async with raw_server(SSE_HEAD + chunked(b"".join(HI[:-1])), 0.02, "reset") as url:
        chat = OpenAIChat("m", base_url=url)
        assert (await ask(chat, stream=True))[1].finish_reason == "stop"
        await chat.aclose()


async def test_a_proxy_that_cannot_be_reached_or_refuses_is_named() -> None:
    async with raw_server(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n") as url:
        for base_url, text in (("http://model.test/v1", "status 407"), ("https://model.test/v1", "proxy")):
            proxy = url.replace("http://", f"http://user:{KEY}@").removesuffix("/v1")
            chat = OpenAIChat("m", api_key=KEY, base_url=base_url, proxy=proxy)
            assert text in str(await fails(chat))
            await chat.aclose()

    for base_url in ("http://model.test/v1", "https://model.test/v1"):
        chat = OpenAIChat("m", api_key=KEY, base_url=base_url, proxy=proxy)
        assert "could not reach the proxy to model.test" in str(await fails(chat))
        await chat.aclose()


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (aiohttp.ClientError("Bearer k"), "the connection to h:1 broke: ClientError"),
        (aiohttp.ClientOSError(104, "reset by peer"), "the connection to h:1 broke: Connection reset by peer"),
        (ConnectionResetError(), "the connection to h:1 broke: ConnectionResetError"),
        (aiohttp.ConnectionTimeoutError(), "could not connect to h:1: no answer in time"),
        (
            aiohttp.ClientConnectorDNSError(None, OSError(-2, "Name or service not known")),
            "could not resolve the host name of h:1: Name or service not known",
        ),
    ],
)
def test_failures_that_a_test_server_cannot_cause_are_named_too(failure: Exception, text: str) -> None:
    assert str(connect_failed(failure, "h:1")) == text


async def test_a_sign_of_life_after_the_time_is_up_changes_nothing() -> None:
    clock = Clock(0.0, 1.0)
    with pytest.raises(TimeoutError):
        async with clock.scope:
            await asyncio.sleep(1)
    clock.feed()
    assert clock.scope.expired()


# Cancelling, closing


async def test_a_cancelled_stream_leaves_nothing_for_the_next_call(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [stream(chunk("secret of the first"), 0.2, chunk("rest"), *HI), stream(*HI)]
    chat = connect(max_connections=1)
    seen = asyncio.Event()
    task = asyncio.create_task(chat.send(call(stream=True), lambda text: seen.set()))
    await seen.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert (await ask(chat, stream=True))[0] == "hi"
    assert len(endpoint.connections) == 2  # the half-read connection was not used again


async def test_every_call_gets_its_own_answer_in_a_storm_of_cancels(endpoint: Endpoint, connect: Any) -> None:
    async def echo(request: web.Request) -> web.StreamResponse:
        text = json.loads(endpoint.bodies[-1])["messages"][0]["content"]
        return await stream(chunk(text), 0.002, chunk(finish="stop"), DONE)(request)

    endpoint.answers = [echo]
    chat = connect(max_connections=10)

    async def one(number: int) -> bool:
        try:
            async with asyncio.timeout(None if number % 3 else 0.001 * (number % 17)):
                text, _ = await ask(chat, messages=[{"role": "user", "content": f"n{number}"}], stream=True)
        except TimeoutError:
            return False
        assert text == f"n{number}"
        return True

    results = await asyncio.gather(*(one(number) for number in range(300)))
    assert sum(results) >= 200


async def test_cancelling_at_any_moment_passes_through(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [stream(*[piece for _ in range(3) for piece in (chunk("x"), 0.005)], *HI)]
    chat = connect(max_connections=1)
    for number in range(12):
        task = asyncio.create_task(ask(chat, stream=True))
        await asyncio.sleep(0.002 * number)
        if task.cancel():
            with pytest.raises(asyncio.CancelledError):
                await task
    assert (await ask(chat, stream=True))[0] == "xxxhi"


async def test_it_can_be_opened_again_after_closing(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [answer(whole())]
    chat = connect()
    await chat.aclose()
    await chat.open()
    await chat.open()
    await ask(chat)
    await chat.aclose()
    await chat.aclose()
    assert (await ask(chat))[0] == "hi"


async def test_closing_ends_calls_under_way(endpoint: Endpoint, connect: Any) -> None:
    asked, seen = asyncio.Event(), asyncio.Event()

    async def silent(request: web.Request) -> web.StreamResponse:
        asked.set()
        await asyncio.sleep(FOR_EVER)
        return web.Response()

    endpoint.answers = [stream(chunk("a"), FOR_EVER), silent]
    chat = connect(max_connections=2)
    reading = asyncio.create_task(chat.send(call(stream=True), lambda text: seen.set()))
    await seen.wait()
    waiting = asyncio.create_task(ask(chat))
    await asked.wait()
    queued = asyncio.create_task(ask(chat))
    await asyncio.sleep(0.01)
    await chat.aclose()
    for task in (reading, waiting, queued):
        with pytest.raises(errors.ConnectFailed):
            await asyncio.wait_for(task, PATIENCE)


def test_a_second_event_loop_gets_its_own_connections() -> None:
    async def once(chat: OpenAIChat, *, close: bool) -> str:
        async with raw_server(
            b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n" + json.dumps(whole()).encode()
        ) as url:
            chat.base_url = url
            text, _ = await ask(chat)
            if close:
                await chat.aclose()
            return text

    chat = OpenAIChat("m", base_url="http://x/v1")
    assert [asyncio.run(once(chat, close=close)) for close in (False, True)] == ["hi", "hi"]


async def test_use_from_a_second_loop_at_the_same_time_is_refused(endpoint: Endpoint, connect: Any) -> None:
    chat = connect()
    await chat.open()
    with pytest.raises(errors.ConfigError, match="another event loop"):
        await asyncio.to_thread(asyncio.run, chat.open())


# Errors

SHAPES: list[tuple[int, Any, type[errors.StatusError], int, str | None]] = [
    # status, body, expected type, expected status, expected code
    (
        400,
        {"error": {"message": "m", "code": "context_length_exceeded"}},
        errors.ContextTooLong,
        400,
        "context_length_exceeded",
    ),
    (
        400,
        {"error": {"code": 400, "message": "exceeds", "type": "exceed_context_size_error", "n_ctx": 512}},
        errors.ContextTooLong,
        400,
        "exceed_context_size_error",
    ),
    (
        400,
        {
            "object": "error",
            "message": "This model's maximum context length is 512",
            "type": "BadRequestError",
            "code": 400,
        },
        errors.ContextTooLong,
        400,
        "BadRequestError",
    ),
    (
        400,
        {"error": {"message": "litellm.ContextWindowExceededError: ...", "type": None, "param": None, "code": "400"}},
        errors.ContextTooLong,
        400,
        None,
    ),
    (
        400,
        {
            "error": {
                "message": "The response was filtered",
                "type": None,
                "param": "prompt",
                "code": "content_filter",
                "status": 400,
            }
        },
        errors.Filtered,
        400,
        "content_filter",
    ),
    (
        400,
        {"error": {"message": "m", "code": "x", "innererror": {"code": "ResponsibleAIPolicyViolation"}}},
        errors.Filtered,
        400,
        "x",
    ),
    (400, {"error": {"message": "litellm.ContentPolicyViolationError: x", "code": "400"}}, errors.Filtered, 400, None),
    (
        403,
        {"error": {"message": "flagged", "code": 403, "metadata": {"flagged_input": "..."}}},
        errors.Filtered,
        403,
        None,
    ),
    (
        400,
        {"error": {"message": "m", "code": None, "type": "invalid_request_error"}},
        errors.BadRequest,
        400,
        "invalid_request_error",
    ),
    (
        401,
        {"error": {"message": f"Incorrect API key: {KEY}", "code": "invalid_api_key"}},
        errors.AuthFailed,
        401,
        "invalid_api_key",
    ),
    (403, {"error": "forbidden"}, errors.AuthFailed, 403, None),
    (402, {"error": {"message": "credits", "code": 402}}, errors.QuotaExhausted, 402, None),
    (404, {"error": {"message": "no model", "code": "model_not_found"}}, errors.BadRequest, 404, "model_not_found"),
    (405, b"", errors.BadRequest, 405, None),
    (408, b"timeout", errors.ServerError, 408, None),
    (409, {"error": {"message": "lock"}}, errors.ServerError, 409, None),
    (413, b"<html>Request Entity Too Large</html>", errors.BadRequest, 413, None),
    (
        422,
        {"detail": [{"type": "missing", "loc": ["body", "model"], "msg": "Field required"}]},
        errors.BadRequest,
        422,
        "missing",
    ),
    (422, {"detail": "nope"}, errors.BadRequest, 422, None),
    (429, {"error": {"message": "m", "code": "rate_limit_exceeded"}}, errors.RateLimited, 429, "rate_limit_exceeded"),
    (429, {"error": {"message": "limit for long context length"}}, errors.RateLimited, 429, None),
    (429, {"error": {"message": "m", "type": "insufficient_quota"}}, errors.QuotaExhausted, 429, "insufficient_quota"),
    (
        429,
        {"error": {"code": "project_spend_limit_exceeded"}},
        errors.QuotaExhausted,
        429,
        "project_spend_limit_exceeded",
    ),
    (429, {"error": {"message": "OpenAI: insufficient_quota", "code": "429"}}, errors.QuotaExhausted, 429, None),
    (429, [{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED"}}], errors.RateLimited, 429, "RESOURCE_EXHAUSTED"),
    (500, b"not json", errors.ServerError, 500, None),
    (502, b"", errors.ServerError, 502, None),
    (503, {"error": {"code": "server_is_overloaded"}}, errors.ServerError, 503, "server_is_overloaded"),
    (529, {"type": "error", "error": {"type": "overloaded_error"}}, errors.ServerError, 529, "overloaded_error"),
    (302, b"", errors.StatusError, 302, None),
    (200, {"error": {"code": 429, "message": "slow"}}, errors.RateLimited, 429, None),
    (200, [{"error": {"code": 503, "status": "UNAVAILABLE"}}], errors.ServerError, 503, "UNAVAILABLE"),
    (200, {"error": {"message": "maximum context length"}}, errors.ContextTooLong, 200, None),
    (200, {"error": "broken"}, errors.ServerError, 200, None),
    (
        200,
        {"choices": [{"error": {"code": 502, "message": "x"}, "finish_reason": "error"}]},
        errors.ServerError,
        502,
        None,
    ),
    (200, {"object": "error", "message": "bad", "type": "BadRequestError"}, errors.BadRequest, 200, "BadRequestError"),
]


@pytest.mark.parametrize(("status", "body", "kind", "named", "code"), SHAPES)
async def test_every_shape_of_error_finds_its_branch(
    endpoint: Endpoint,
    connect: Any,
    status: int,
    body: Any,
    kind: type[errors.StatusError],
    named: int,
    code: str | None,
) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    endpoint.answers = [answer(raw=raw, status=status, x_request_id="r-9", Location="/elsewhere")]
    for each in (call(), call(stream=True)):
        error = await fails(connect(), each)
        assert (type(error), error.status, error.code, error.request_id) == (kind, named, code, "r-9")
        assert "127.0.0.1:" in str(error)
        assert str(named) in str(error)
        assert error.body == raw.decode().replace(KEY, "***")
    assert len(endpoint.requests) == 2  # a redirect was not followed


def test_a_fault_tells_no_words() -> None:
    assert (
        repr(read_fault(b'{"error":{"message":"CANARY","code":"x"}}', 400)) == "Fault(status=400, code='x', param=None)"
    )


async def test_an_error_has_the_endpoints_words_without_keys_and_what_they_quote(
    endpoint: Endpoint, connect: Any
) -> None:
    message = f"the text 'customer 4217' and its first words, customer 4217 complains, are refused for {KEY}"
    said = {"message": message, "code": f"the key {KEY}", "param": KEY, "type": "sk-abcdefgh12345678"}
    endpoint.answers = [answer({"error": said}, 400)]
    prompt = [{"role": "user", "content": "A customer 4217 complains about\nhis bill."}]
    error = await fails(connect(), call(messages=prompt))
    assert (error.code, error.param) == (None, None)
    assert "it says: the text \u2026 and its first words, \u2026, are refused for ***" in str(error)
    assert "customer 4217" in error.body
    assert "sk-abc" not in error.body + str(error)


async def test_a_refusal_for_want_of_a_key_says_that_none_was_sent(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [answer({}, 401)]
    assert "no key was sent" in str(await fails(connect(api_key="")))
    assert "Authorization" not in endpoint.requests[0].headers
    assert "no key was sent" not in str(await fails(connect()))
    assert "no key was sent" not in str(await fails(connect(api_key="", headers={"api-key": "k"})))


async def test_advice_is_given_where_there_is_some(endpoint: Endpoint, connect: Any) -> None:
    for status, words in ((404, "base_url"), (413, "max_batch_tokens"), (402, "out of credit"), (302, "final address")):
        endpoint.answers = [answer({}, status)]
        assert words in str(await fails(connect()))
    endpoint.answers = [answer({}, 429, retry_after="3")]
    error = await fails(connect())
    assert error.retry_after == 3.0
    assert "3 s" in str(error)


async def test_an_error_whose_body_never_ends_is_still_an_error(
    endpoint: Endpoint, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("microbatch.transports.exchange.ERROR_GRACE", 0.1)
    async with raw_server(b"HTTP/1.1 429 Slow\r\nContent-Length: 500\r\n\r\n{", 1.0) as url:
        chat = OpenAIChat("m", base_url=url)
        assert type(await fails(chat)) is errors.RateLimited
        await chat.aclose()
    async with raw_server(b"HTTP/1.1 503 Gone\r\nContent-Length: 500\r\n\r\n{", "reset") as url:
        chat = OpenAIChat("m", base_url=url)
        assert type(await fails(chat)) is errors.ServerError
        await chat.aclose()


async def test_a_reply_beyond_the_limit_is_not_read_on(
    endpoint: Endpoint, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("microbatch.transports.attempt.MAX_REPLY_BYTES", 1000)
    endpoint.answers = [answer(whole("x" * 2000))]
    assert "more than 1000 bytes" in str(await fails(connect()))


DATE = "Wed, 21 Oct 2026 07:28:00 GMT"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "20"}, 20.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "1500", "retry-after": "20"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "20"}, 20.0),
        ({"llm_provider-retry-after": "7"}, 7.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT", "date": DATE}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:27:00 GMT", "date": DATE}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 -0000", "date": DATE}, 30.0),
        ({"retry-after": "Wed, 21 Oct 1026 07:28:30 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "1e999"}, None),
        ({"retry-after": "Wed, 99 Oct 2026 07:28:30 GMT"}, None),
    ],
)
def test_retry_after_is_read_in_all_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


# Learning


async def again(chat: OpenAIChat, each: ChatCall) -> tuple[str, Completion, int]:
    """Send as the batcher does: at once, as long as the transport says that it learned something."""
    for attempt in range(1, 10):
        try:
            return *await ask(chat, each), attempt
        except errors.StatusError as error:
            if not error.again:
                raise
    raise AssertionError("no end")


def formats(endpoint: Endpoint) -> list[str | None]:
    return [body.get("response_format", {}).get("type") for body in endpoint.asked]


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_refused_format_steps_down_once_and_is_remembered(
    endpoint: Endpoint, connect: Any, streamed: bool
) -> None:
    endpoint.answers = [answer(NO_FORMAT, 400), answer(NO_FORMAT, 422), answer(whole())]
    chat = connect()
    hinted = {"schema": SCHEMA, "hint": "Reply with JSON", "stream": streamed}
    assert (await again(chat, call(**hinted)))[2] == 3
    assert (await again(chat, call(**hinted)))[2] == 1
    assert formats(endpoint) == ["json_schema", "json_object", None, None]
    roles = [[message["role"] for message in body["messages"]] for body in endpoint.asked]
    assert roles == [["user"], ["system", "user"], ["system", "user"], ["system", "user"]]
    assert endpoint.asked[2]["messages"][0]["content"] == "Reply with JSON"


async def test_the_hint_stands_before_the_last_message(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [answer(NO_FORMAT, 400), answer(whole())]
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    each = call(messages=messages, schema=SCHEMA, hint="As JSON")
    await again(connect(), each)
    assert [message["content"] for message in endpoint.asked[1]["messages"]] == ["a", "As JSON", "b"]
    assert len(each.messages) == 2


async def test_json_object_is_asked_for_only_where_the_word_json_occurs(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [answer(NO_FORMAT, 400), answer(whole())]
    await again(connect(), call(schema=SCHEMA))
    assert formats(endpoint) == ["json_schema", None]


async def test_a_500_is_tried_one_rung_lower_and_remembered_when_that_works(endpoint: Endpoint, connect: Any) -> None:
    """llama-cpp-python's server answers an unsupported json_schema with a plain 500."""
    endpoint.answers = [answer({"error": {"message": "KeyError"}}, 500), answer(whole())]
    chat = connect()
    options = {"schema": SCHEMA, "hint": "JSON"}
    each = call(**options)
    assert not (await fails(chat, each)).again  # with a delay and out of the retry budget, as any 500
    await chat.send(each, lambda _: None)
    await ask(chat, **options)
    assert formats(endpoint) == ["json_schema", "json_object", "json_object"]


async def test_a_500_on_both_rungs_is_an_ordinary_one(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [answer({}, 500)]
    chat, each = connect(), call(schema=SCHEMA, hint="JSON")
    for _ in range(3):
        assert not (await fails(chat, each)).again
    assert formats(endpoint) == ["json_schema", "json_object", "json_schema"]
    await fails(connect(), call())  # nothing to try without a schema


async def test_a_refused_schema_is_remembered_for_that_schema(endpoint: Endpoint, connect: Any) -> None:
    refusal = {"error": {"message": "Invalid schema for response_format 'answers': no", "param": "response_format"}}
    endpoint.answers = [answer(refusal, 400), answer(whole())]
    chat = connect()
    for schema in (SCHEMA, SCHEMA, {"type": "object"}):
        await again(chat, call(schema=schema, hint="JSON"))
    assert formats(endpoint) == ["json_schema", "json_object", "json_object", "json_schema"]


async def test_one_callers_experience_is_not_anothers(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [answer(NO_FORMAT, 400), answer(whole())]
    chat = connect()
    await again(chat, call(schema=SCHEMA, hint="JSON"))
    await again(chat, call(schema=SCHEMA, hint="JSON", headers={"Authorization": "Bearer theirs"}))
    assert formats(endpoint) == ["json_schema", "json_object", "json_schema"]


def unsupported(param: str) -> Answer:
    said = {"message": f"Unsupported parameter: '{param}'", "type": "invalid_request_error", "param": param}
    return answer({"error": {**said, "code": "unsupported_parameter"}}, 400)


async def test_the_name_of_max_tokens_is_learned(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [unsupported("max_tokens"), answer(whole())]
    chat = connect()
    await again(chat, call(max_tokens=9))
    await again(chat, call(max_tokens=9))
    fields = [{name for name in body if name.startswith("max")} for body in endpoint.asked]
    assert fields == [{"max_tokens"}, {"max_completion_tokens"}, {"max_completion_tokens"}]


@pytest.mark.parametrize("name", ["temperature", "stream", "stream_options"])
async def test_refused_fields_are_left_out(endpoint: Endpoint, connect: Any, name: str) -> None:
    endpoint.answers = [unsupported(name), stream(*HI) if name != "stream" else answer(whole())]
    chat = connect()
    for _ in range(2):
        assert (await again(chat, call(params={"temperature": 0}, stream=True)))[0] == "hi"
    assert [name in body for body in endpoint.asked] == [True, False, False]


async def test_an_extra_field_refused_by_a_validator_is_left_out(endpoint: Endpoint, connect: Any) -> None:
    detail = [{"type": "extra_forbidden", "loc": ["body", "stream_options"], "msg": "Extra inputs are not permitted"}]
    endpoint.answers = [answer({"detail": detail}, 422), stream(*HI)]
    assert (await again(connect(), call(stream=True)))[2] == 2


async def test_nothing_is_sent_again_once_text_was_handed_on(endpoint: Endpoint, connect: Any) -> None:
    said = {"error": {"code": 400, "message": "response_format is not supported"}}
    endpoint.answers = [stream(chunk("part"), b"data: " + json.dumps(said).encode() + b"\n\n")]
    assert not (await fails(connect(), schema=SCHEMA, stream=True)).again


# Relaying


async def test_what_is_forwarded_arrives_byte_for_byte(endpoint: Endpoint, connect: Any) -> None:
    packed = gzip.compress(bytes(range(256)) * 100)
    endpoint.answers = [
        answer(
            raw=packed,
            status=418,
            content_type="x/y",
            Content_Encoding="gzip",
            X_A="1",
            Keep_Alive="timeout=5",
            Connection="x-a",
        )
    ]
    body = b'{"model" : "m",\n "odd\\u0020spacing":1.0}\x00\xff'
    headers = {
        "Content-Type": "application/json; charset=x",
        "Authorization": "Bearer theirs",
        "Connection": "X-Drop",
        "X-Drop": "1",
        "Host": "evil.test",
        "Content-Length": "3",
        "Accept-Encoding": "gzip",
    }
    async with connect(query={"v": "1"}).forward("PUT", "/files/a%2Fb?limit=2", headers, body) as relayed:
        assert relayed.status == 418
        got = b"".join([piece async for piece in relayed.chunks()])
    assert got == packed
    assert relayed.headers["content-encoding"] == "gzip"
    assert {"connection", "keep-alive", "x-a"}.isdisjoint(name.lower() for name in relayed.headers)
    request = endpoint.requests[0]
    assert endpoint.bodies == [body]
    assert (request.method, request.path_qs) == ("PUT", "/v1/files/a%2Fb?limit=2&v=1")
    assert request.headers["Authorization"] == "Bearer theirs"
    assert request.headers["Content-Type"] == "application/json; charset=x"
    assert request.host.startswith("127.0.0.1")
    assert {"X-Drop", "User-Agent", "Accept"}.isdisjoint(request.headers)


async def test_a_forwarded_stream_is_relayed_as_it_arrives_with_the_transports_key(
    endpoint: Endpoint, connect: Any
) -> None:
    endpoint.answers = [stream(b": odd \xff\n\n", 0.05, b"data: x\r\n\r\n")]
    async with connect().forward("GET", "models", {}) as relayed:
        assert [piece async for piece in relayed] == [b": odd \xff\n\n", b"data: x\r\n\r\n"]
    assert endpoint.requests[0].headers["Authorization"] == f"Bearer {KEY}"
    assert repr(relayed) == "Forwarded(status=200)"


async def test_a_redirect_is_relayed_and_not_followed(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [answer({}, 307, Location="http://127.0.0.1:9/")]
    async with connect().forward("GET", "/models", {}) as relayed:
        assert (relayed.status, relayed.headers["Location"]) == (307, "http://127.0.0.1:9/")


async def test_leaving_a_forward_early_leaves_nothing_for_the_next_call(endpoint: Endpoint, connect: Any) -> None:
    endpoint.answers = [stream(b"first", 0.3, b"rest"), answer(whole())]
    chat = connect(max_connections=1)
    async with chat.forward("GET", "/models", {}) as relayed:
        async for piece in relayed:
            assert piece == b"first"
            break
    assert (await ask(chat))[0] == "hi"
    assert len(endpoint.connections) == 2


@pytest.mark.parametrize("path", ["/../admin", "/a/%2e%2e/%2E./b", "/a b", "/a\nb", "/a#b", "\\..\\x"])
async def test_a_forward_stays_below_base_url(endpoint: Endpoint, connect: Any, path: str) -> None:
    with pytest.raises(errors.ConfigError, match="below base_url"):
        async with connect().forward("GET", path, {}):
            pass
    assert endpoint.requests == []


@pytest.mark.slow
async def test_a_forward_that_breaks_or_stalls_is_an_error(endpoint: Endpoint, connect: Any) -> None:
    async with (
        raw_server(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{") as url,
        connect(base_url=url).forward("GET", "/m", {}) as relayed,
    ):
        with pytest.raises(errors.ConnectFailed):
            _ = [piece async for piece in relayed]
    endpoint.answers = [stream(b"x", FOR_EVER)]
    async with connect(idle_timeout=1.5).forward("GET", "/m", {}) as relayed:
        with pytest.raises(errors.TransportTimeout, match="idle_timeout"):
            _ = [piece async for piece in relayed]
    async with raw_server(FOR_EVER) as url:
        with pytest.raises(errors.TransportTimeout, match="timeout"):
            async with connect(base_url=url, timeout=0.1).forward("GET", "/m", {}):
                pass


def test_aiohttp_is_new_enough_not_to_mix_up_connections() -> None:
    """Older releases gave one request's answer to another after a cancel (aio-libs/aiohttp#7864, #12795, #12953)."""
    assert tuple(int(part) for part in aiohttp.__version__.split(".")[:3]) >= (3, 14, 3)
