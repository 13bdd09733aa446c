"""Requests that are relayed as they are."""

import asyncio

import pytest
from aiohttp import web

import microbatch as mb
from microbatch.testing import ScriptedTransport


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
