"""Clients that are slow, huge, broken, gone or many: they harm nobody else, and none of them finds a bug."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from contextlib import AsyncExitStack, suppress

import aiohttp
import pytest
from aiohttp import web
from gateway_world import (
    MODEL,
    ONE_ATTEMPT,
    PATIENCE,
    Watched,
    connection,
    error_in,
    gateway,
    post,
    recorder,
    status,
    talk,
)
from helpers import ask, until
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from microbatch.gateway import GatewaySettings
from microbatch.testing import Latency

pytestmark = pytest.mark.slow


CHAT = json.dumps({"model": MODEL, "messages": ask("x")}).encode()
SEED = 20261125


async def well_served(served):
    """Check that somebody else is still answered."""
    async with asyncio.timeout(PATIENCE):
        # A loaded machine may itself be too slow a client for a short `client_timeout`.
        while status(answer := await talk(served.port, post(CHAT))) == 408:
            pass
    assert status(answer) == 200
    assert b"re: x" in answer


async def test_slow_clients_are_cut_off_and_harm_nobody():
    limits = GatewaySettings(client_timeout=3)  # a loaded machine needs some of it to be slow 60 times
    async with Watched() as upstream, gateway(upstream, settings=limits) as served, AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(connection(served.port)) for _ in range(60)]
        half = post(CHAT)
        for number, (_, writer) in enumerate(connections):
            writer.write([b"", half[:30], half[:-20]][number % 3])  # nothing, half a head, half a body
        await until(lambda: served._serving == 20)
        await well_served(served)
        answers = [await reader.readline() for reader, _ in connections[2::3]]
        assert set(answers) == {b"HTTP/1.1 408 Request Timeout\r\n"}
        await until(lambda: served._serving == 0)
        assert upstream.calls == 1


async def test_a_client_that_does_not_read_holds_no_slot_for_ever():
    async def flood(request):
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(2_000):
            await response.write(b"x" * 65_536)
        return response

    limits = GatewaySettings(client_timeout=2)
    one_slot = {"max_concurrent_batches": 1}
    async with (
        recorder() as upstream,
        gateway(upstream.url, settings=limits, policy=one_slot) as served,
        connection(served.port, limit=1024) as (reader, writer),
    ):
        upstream.answer = flood
        writer.write(post(b"{}", path="/v1/embeddings", Authorization="Bearer k"))
        await until(lambda: upstream.requests)
        upstream.answer = None
        assert status(await talk(served.port, post(b"{}", path="/v1/embeddings", Authorization="Bearer k"))) == 203
        # What it has got ends in a broken connection, so that nobody takes it for the whole.
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            while await reader.readexactly(1024):
                pass


async def test_a_body_beyond_the_limit_is_refused_before_it_is_read():
    limits = GatewaySettings(max_body_bytes=100_000)
    async with Watched() as upstream, gateway(upstream, settings=limits) as served:
        for path in ("/v1/chat/completions", "/v1/files"):
            sent = post(b"x" * 200_000, path=path, Authorization="Bearer k")
            answer = await talk(served.port, sent)
            assert status(answer) == 413
            assert error_in(answer)["code"] == "body_too_long"
        chunked = post(b"", Content_Length=None, Transfer_Encoding="chunked")
        assert status(await talk(served.port, chunked + b"20000\r\n" + b"x" * 0x20000 + b"\r\n0\r\n\r\n")) == 413
        await well_served(served)


async def test_an_exploding_body_is_not_unpacked():
    import zlib

    async with recorder() as upstream, gateway(upstream.url) as served:
        packed = zlib.compress(b"x" * 50_000_000)
        sent = post(packed, Content_Encoding="deflate", Authorization="Bearer k")
        assert status(await talk(served.port, sent)) == 203
    assert upstream.requests[0][3] == packed
    assert upstream.requests[0][2]["Content-Encoding"] == "deflate"


async def test_clients_that_leave_or_half_close_harm_nobody():
    slow = Latency(first_token=0.3, tokens_per_second=0)
    async with Watched(latency=slow) as upstream, gateway(upstream, policy={"max_wait": 0.2}) as served:
        staying = [asyncio.create_task(talk(served.port, post(CHAT))) for _ in range(4)]
        for number in range(12):
            async with connection(served.port) as (_, writer):
                writer.write(post(CHAT) if number % 2 else post(CHAT)[:-9])
                if number % 3 == 0:
                    writer.write_eof()
                    await asyncio.sleep(0.01)
                elif number % 3 == 1:
                    writer.transport.abort()
        answers = await asyncio.gather(*staying)
        assert [status(answer) for answer in answers] == [200] * 4
        assert all(b"re: x" in answer for answer in answers)
        await until(lambda: served._serving == 0)
        assert served.stats().in_flight == 0


async def test_requests_beyond_the_limit_are_refused_and_the_rest_is_answered():
    slow = Latency(first_token=0.3, tokens_per_second=0)
    limits = GatewaySettings(max_requests=5)
    async with Watched(latency=slow) as upstream, gateway(upstream, settings=limits) as served:
        answers = await asyncio.gather(*(talk(served.port, post(CHAT)) for _ in range(12)))
        counts = [sum(status(answer) == code for answer in answers) for code in (200, 503)]
        refused = next(answer for answer in answers if status(answer) == 503)
        assert counts == [5, 7]
        assert error_in(refused)["code"] == "overloaded"
        assert b"\r\nRetry-After: 1\r\n" in refused
        await well_served(served)


async def test_an_upstream_that_breaks_off_is_not_taken_for_the_whole():
    async def broken(request):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: half\n\n")
        request.transport.abort()
        return response

    async with recorder() as upstream, gateway(upstream.url) as served, aiohttp.ClientSession() as session:
        upstream.answer = broken
        headers = {"Authorization": "Bearer k"}
        with pytest.raises(aiohttp.ClientError):
            async with session.post(f"{served.base_url}/responses", json={}, headers=headers) as response:
                await response.read()


# --- fuzz: whatever comes, no 500 and nothing in the log

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "system", "assistant", "tool", ""]) | JSON,
        "content": st.text(max_size=8) | JSON,
        "name": JSON,
    },
)
FORMAT = st.fixed_dictionaries(
    {"type": st.sampled_from(["json_schema", "json_object", "text", "?"])},
    optional={
        "json_schema": JSON
        | st.fixed_dictionaries(
            {"schema": JSON | st.fixed_dictionaries({"type": st.sampled_from(["object", "string", "?"])})},
            optional={"name": JSON, "strict": JSON},
        )
    },
)
BODY = st.fixed_dictionaries(
    {},
    optional={
        "model": st.just("m") | JSON,
        "messages": st.lists(MESSAGE | JSON, max_size=3) | JSON,
        "stream": st.booleans() | JSON,
        "stream_options": JSON | st.fixed_dictionaries({"include_usage": JSON}),
        "max_tokens": JSON,
        "max_completion_tokens": JSON,
        "temperature": JSON,
        "n": JSON,
        "tools": JSON,
        "response_format": FORMAT | JSON,
        "metadata": JSON,
    },
)
TEXTS = st.text(max_size=8) | st.lists(st.text(max_size=8) | JSON, max_size=3) | JSON
EMBEDDINGS_BODY = st.fixed_dictionaries(
    {},
    optional={
        "model": st.just("m") | JSON,
        "input": TEXTS,
        "dimensions": st.integers(1, 4) | JSON,
        "encoding_format": st.sampled_from(["float", "base64"]) | JSON,
        "user": st.just("u") | JSON,
        "input_type": JSON,
    },
)
RAW = (
    BODY.map(lambda body: json.dumps(body).encode())
    | EMBEDDINGS_BODY.map(lambda body: json.dumps(body).encode())
    | JSON.map(lambda body: json.dumps(body).encode())
    | st.binary(max_size=60)
)
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "Authorization": st.sampled_from(["", "Bearer", "Bearer a", "Basic x", "Bearer microbatch", "\xe9", "a b c"]),
        "Content_Type": st.sampled_from(
            ["application/json", "application/json; charset=x", "text/plain", "", ";", "a"]
        ),
        "X_Microbatch_Priority": st.sampled_from(["high", "low", "LOW ", "", "\xe9"]),
        "X_Microbatch_Cache": st.sampled_from(["no", "yes", "1"]),
        "X_Microbatch_Batch": st.sampled_from(["no", "yes", ""]),
        "X_Microbatch_Tenant": st.text("abc\xe9\x7f", max_size=4),
        "Content_Encoding": st.sampled_from(
            ["identity", "?"]
        ),  # the simulated endpoint answers what is no gzip with a 500
        "Expect": st.sampled_from(["100-continue", "x"]),
        "Upgrade": st.just("websocket"),
        "OpenAI_Organization": st.text("ab\xe9", max_size=3),
    },
)
FRAMING = st.fixed_dictionaries(
    {},
    optional={
        "Content_Length": st.sampled_from(["0", "5", "-1", "x", None]),
        "Transfer_Encoding": st.sampled_from(["chunked", "gzip, chunked", "x"]),
    },
)
PATHS = st.sampled_from(
    [
        "/v1/chat/completions",
        "/v1/chat/completions?x=1&%zz",
        "/v1/embeddings",
        "/v1/embeddings?x=1&%zz",
        "/openai/deployments/d/embeddings?api-version=1",
        "/v1/models",
        "/v1/models/../files",
        "/v1/%2e%2e/x",
        "/%76%31/models",
        "/v1/",
        "/v1",
        "/",
        "//v1/models",
        "/v1//models",
        "/v1/files/\xe9",
        "/v1/a%00b",
        "/v1/a%0d%0ab",
        "/v1/a#b",
        "/stats",
        "/healthz",
        "http://localhost/v1/models",
        "http://evil.example/v1/models",
        "*",
        "/v1/" + "a" * 3000,
    ]
)
METHODS = st.sampled_from(
    ["POST", "POST", "POST", "GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "X"]
)
AIMED = st.tuples(
    st.just("POST"),
    st.sampled_from(["/v1/chat/completions", "/v1/embeddings"]),
    RAW,
    st.just({"Content_Type": "application/json"}),
)
ODD = st.tuples(METHODS, PATHS, RAW, st.tuples(HEADERS, FRAMING).map(lambda pair: pair[0] | pair[1]))
COMPLETIONS = "/v1/chat/completions"
ANSWERABLE = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}]}).encode()
JSON_TYPE = {"Content_Type": "application/json"}
EMBEDDABLE = json.dumps({"model": "m", "input": ["hello", "you"]}).encode()
REQUESTS = AIMED | st.tuples(METHODS, PATHS, RAW, HEADERS) | ODD


def spelled(request):
    method, path, body, headers = request
    sent = post(body, path=path, host="localhost", **headers).decode("latin-1")
    return (method + sent.removeprefix("POST")).encode("latin-1")


@pytest.mark.timeout(180)
def test_no_request_finds_a_500(caplog):
    """An upstream without faults of its own, and a gateway with a key, which everybody may use."""
    caplog.set_level(logging.WARNING)
    loop = asyncio.new_event_loop()
    found = set()

    async def start():
        upstream = await Watched().__aenter__()
        own = {"api_key": "sk-own", "settings": GatewaySettings(client_timeout=0.2), "policy": {"max_wait": 0}}
        return upstream, await gateway(upstream, retry=ONE_ATTEMPT, **own).open()

    upstream, served = loop.run_until_complete(start())

    async def send(sent):
        async with connection(served.port) as (reader, writer), asyncio.timeout(PATIENCE):
            writer.write(sent)
            while (line := await reader.readline()).startswith(b"HTTP/1.1 100"):
                await reader.readline()
            return line

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @example(("POST", COMPLETIONS, ANSWERABLE, JSON_TYPE))
    @example(("POST", "/v1/embeddings", EMBEDDABLE, JSON_TYPE))
    @example(("POST", COMPLETIONS, b"{", JSON_TYPE))
    @example(("GET", "/v1/files", b"", {}))
    @example(("GET", "/v2", b"", {}))
    @given(REQUESTS)
    def attack(request):
        try:
            line = loop.run_until_complete(send(spelled(request)))
        except ConnectionError:
            return
        code = int(line.split()[1]) if line else 0
        found.add(code)
        assert code not in (500, 502), (code, request)

    try:
        attack()
        loop.run_until_complete(well_served(served))
    finally:
        loop.run_until_complete(served.aclose(1))
        loop.run_until_complete(upstream.aclose())
        loop.close()
    assert {200, 400, 403, 404} <= found
    assert [record for record in caplog.records if record.name == "microbatch" and "bug" in record.message] == []


async def test_garbage_on_the_line_harms_nobody():
    draw = random.Random(SEED)
    async with Watched() as upstream, gateway(upstream, settings=GatewaySettings(client_timeout=0.2)) as served:

        async def garble():
            sent = bytearray(post(CHAT))
            for _ in range(draw.randint(1, 8)):
                sent[draw.randrange(len(sent))] = draw.randrange(256)
            async with connection(served.port) as (reader, writer), asyncio.timeout(PATIENCE):
                writer.write(bytes(sent[: draw.randint(1, len(sent))]))
                with suppress(ConnectionError):
                    writer.write_eof()
                    return await reader.readline()
            return b""

        lines = await asyncio.gather(*(garble() for _ in range(300)))
        assert not [line for line in lines if line.startswith(b"HTTP/1.1 5")]
        await well_served(served)
