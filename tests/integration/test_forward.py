"""Requests that are relayed as they are."""

import asyncio
import contextlib

import pytest
from aiohttp import web

import microbatch as mb
from microbatch.testing import ScriptedTransport

pytestmark = pytest.mark.slow


@pytest.fixture
async def upstream():
    """An endpoint that answers with the bytes it was sent, turned round, when it is told to."""
    go = asyncio.Event()
    go.set()

    async def turn(request):
        body = await request.read()
        await go.wait()
        return web.Response(
            status=201, body=body[::-1], headers={"X-Path": request.path_qs, "X-Key": request.headers["Authorization"]}
        )

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", turn)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/v1", go
    await runner.cleanup()


async def test_forward_relays_bytes_with_the_callers_key(upstream):
    url, _ = upstream
    async with mb.Microbatcher(mb.OpenAIChat(base_url=url, api_key="ours"), tokens="bytes") as batcher:
        async with batcher.forward(
            "POST", "embeddings?x=1", {"Authorization": "Bearer theirs"}, b"\x00abc"
        ) as response:
            body = b"".join([chunk async for chunk in response])
            assert batcher.stats().in_flight == 1
        assert (response.status, body) == (201, b"cba\x00")
        assert response.headers["X-Path"] == "/v1/embeddings?x=1"
        assert response.headers["X-Key"] == "Bearer theirs"
        async with asyncio.timeout(20):
            while (stats := batcher.stats()).in_flight:  # noqa: ASYNC110 the task that held the slot has its turn
                await asyncio.sleep(0.001)
    assert (stats.forwarded, stats.upstream_calls, stats.items, stats.in_flight, stats.queued) == (1, 1, 0, 0, 0)


async def test_forward_waits_for_a_slot_and_closing_waits_for_it(upstream):
    url, go = upstream
    go.clear()
    policy = mb.FlushPolicy(max_concurrent_batches=1)
    batcher = await mb.Microbatcher(mb.OpenAIChat(base_url=url, api_key="k"), policy=policy, tokens="bytes").open()
    order = []

    async def relay(name):
        async with batcher.forward("POST", "x", {}, name.encode()) as response:
            order.append(b"".join([chunk async for chunk in response]))

    tasks = [asyncio.ensure_future(relay(name)) for name in ("ab", "cd", "ef")]
    await asyncio.sleep(0)
    tasks[1].cancel()
    closing = asyncio.ensure_future(batcher.aclose())
    go.set()
    await closing
    assert order == [b"ba", b"fe"]
    assert tasks[1].cancelled()
    with pytest.raises(mb.BatcherClosed):
        async with batcher.forward("GET", "x", {}):
            pass


async def test_a_transport_that_cannot_forward_is_named():
    async with mb.Microbatcher(ScriptedTransport(), tokens="bytes") as batcher:
        with pytest.raises(mb.ConfigError, match="ScriptedTransport has no forward"):
            async with batcher.forward("GET", "models", {}):
                pass


# --- silence

SAID = b'data: {"choices":[{"index":0,"delta":{"content":"Hel'
SILENT = 0.6
PATIENCE = 20


@contextlib.asynccontextmanager
async def relayed(*pieces, kind="text/event-stream", **limits):
    """Forward to an endpoint that sends *pieces*: bytes, and seconds of silence."""

    async def answer(request):
        response = web.StreamResponse(headers={"Content-Type": kind})
        await response.prepare(request)
        for piece in pieces:
            if isinstance(piece, bytes):
                await response.write(piece)
            else:
                await asyncio.sleep(piece)
        return response

    app = web.Application()
    app.router.add_post("/v1/x", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    transport = mb.OpenAIChat(base_url=f"http://127.0.0.1:{runner.addresses[0][1]}/v1", api_key="k", **limits)
    try:
        async with transport.forward("POST", "x", {}) as response, asyncio.timeout(PATIENCE):
            yield response
    finally:
        await transport.aclose()
        await runner.cleanup()


@pytest.mark.parametrize(
    "before",
    [
        (),
        (b": OPENROUTER PROCESSING\n\n",),
        (b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n',),
        (
            b'event: response.created\ndata: {"type":"response.created","response":{"text":{"format":{}}}}\n\n',
            b": ping\n\n",
        ),
        (b'event: message_start\ndata: {"type":"message_start","message":{"content":[]}}\n\n',),
    ],
    ids=["nothing", "keep-alive", "role", "responses", "messages"],
)
async def test_a_stream_may_be_silent_for_long_before_its_first_words(before):
    after = (b'data: {"delta":"hi"}\n\n', b"data: [DONE]\n\n")
    async with relayed(*before, SILENT, *after, idle_timeout=SILENT / 4) as response:
        assert b"".join([chunk async for chunk in response]) == b"".join(before + after)


@pytest.mark.parametrize(
    "said",
    [
        (SAID,),
        (b": ping\n\n", SAID),
        (b'data: {"choices":[{"delta":{"reasoning_con', b'tent": "We"}}]}\n\n'),
        (b'data: {"type":"response.output_text.delta","delta":"H"}\n\n',),
        (b'data: {"type":"content_block_delta","delta":{"type":"thinking_delta","thinking":"W"}}\n\n',),
        (b'data: {"choices":[{"delta":{"tool_calls":[{"function":{"arguments":"{"}}]}}]}\n\n',),
        (b"\x1f\x8bcompressed",),
    ],
)
async def test_a_stream_that_falls_silent_within_its_answer_is_cut(said):
    paced = [
        step for piece in said for step in (piece, 0.1)
    ]  # so that each comes by itself; no silence before the words counts
    async with relayed(*paced, PATIENCE, idle_timeout=0.2) as response:
        got = b""
        with pytest.raises(mb.TransportTimeout, match="idle_timeout"):
            async for chunk in response:
                got += chunk
    assert got == b"".join(said)


@pytest.mark.parametrize("kind", ["text/event-stream", "application/json"])
async def test_before_the_first_words_the_whole_time_counts(kind):
    async with relayed(b": ping\n\n", PATIENCE, kind=kind, idle_timeout=0.01, timeout=0.5) as response:
        with pytest.raises(mb.TransportTimeout, match="did not finish"):
            _ = [chunk async for chunk in response]
