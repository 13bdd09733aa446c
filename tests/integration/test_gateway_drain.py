"""A gateway that closes says so on every connection, so that no client sends its next request into it."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web
from gateway_world import MODEL, PATIENCE, connection, gateway, recorder, serve, status
from helpers import ask, until

PLAIN = {"model": MODEL, "messages": ask("x")}
COMPLETION = {
    "id": "c",
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
}
WAYS = {
    "combinable": PLAIN,
    "streamed": {**PLAIN, "stream": True},
    "not combinable": {**PLAIN, "n": 2},
    "relayed": {**PLAIN, "n": 2, "stream": True},
}


def request(body=None, path="/v1/chat/completions", version="1.1", **headers):
    """The bytes of a request on a connection that the client means to keep."""
    content = b"" if body is None else json.dumps(body).encode()
    lines = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{'GET' if body is None else 'POST'} {path} HTTP/{version}\r\n{head}\r\n".encode() + content


def says_close(answer):
    head = answer.partition(b"\r\n\r\n")[0].lower().split(b"\r\n")
    return [line.partition(b":")[2].strip() for line in head if line.startswith(b"connection:")] == [b"close"]


class Slow:
    """An upstream's answers, which wait to be let go; those of streams may begin before."""

    def __init__(self, upstream, *, begun=False):
        self.go = asyncio.Event()
        self.begun = begun
        upstream.answer = self.answer

    async def answer(self, request):
        if not self.begun:
            await self.go.wait()
        if not json.loads(await request.read()).get("stream"):
            await self.go.wait()
            return web.json_response(COMPLETION)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        go = self.go
        await response.write(b"data: {}\n\n")
        await go.wait()
        await response.write(b"data: [DONE]\n\n")
        return response


async def draining(served):
    """Begin to close *served*; return the task that does."""
    closing = asyncio.create_task(served.aclose())
    await until(lambda: "closing" in repr(served))
    return closing


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("way", WAYS)
async def test_an_answer_that_was_under_way_ends_its_connection(way, version):
    keep = {"Connection": "keep-alive"} if version == "1.0" else {}
    async with recorder() as upstream, gateway(upstream.url) as served:
        slow = Slow(upstream)
        async with connection(served.port) as (reader, writer), asyncio.timeout(PATIENCE):
            writer.write(request(WAYS[way], version=version, **keep))
            await until(lambda: upstream.requests)
            closing = await draining(served)
            slow.go.set()
            answer = await reader.read()
            await closing
    assert status(answer) == 200
    assert says_close(answer)


async def test_a_stream_that_had_begun_ends_its_connection_too():
    async with recorder() as upstream, gateway(upstream.url) as served:
        slow = Slow(upstream, begun=True)
        async with (
            connection(served.port) as (held, holding),
            connection(served.port) as (reader, writer),
            asyncio.timeout(PATIENCE),
        ):
            writer.write(request(WAYS["relayed"]))
            answer = await reader.readuntil(b"data: {}\n\n")
            kept, slow.go = slow.go, asyncio.Event()
            holding.write(request(PLAIN))  # so that closing goes on meanwhile
            await until(lambda: len(upstream.requests) == 2)
            closing = await draining(served)
            kept.set()
            answer += await reader.read()
            assert not closing.done()
            slow.go.set()
            assert status(await held.read()) == 200
            await closing
    assert b"data: [DONE]" in answer


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/readyz", "/healthz", "/stats", "/nowhere"])
async def test_whatever_is_asked_while_it_closes_is_the_last_on_its_connection(path):
    async with recorder() as upstream, gateway(upstream.url) as served:
        slow = Slow(upstream)
        async with (
            connection(served.port) as (held, holding),
            connection(served.port) as (kept, keeping),
            asyncio.timeout(PATIENCE),
        ):
            holding.write(request(PLAIN))
            keeping.write(request(path="/healthz"))  # this connection is known, and kept
            await kept.readuntil(b"}")
            await until(lambda: upstream.requests)
            closing = await draining(served)
            body = PLAIN | {"text": "x" * 100_000} if path.endswith("completions") else None
            # One behind the other, as pipelining clients send them; a long one would be reset, unread, and the answer with it.
            keeping.write(request(body, path) + request(path="/healthz"))
            answer = await kept.read()
            async with connection(served.port) as (late, asking):  # and a new one
                asking.write(request(body, path))
                assert says_close(await late.read())
            slow.go.set()
            assert status(await held.read()) == 200
            await closing
    assert says_close(answer)
    assert answer.count(b"HTTP/1.1") == 1
    assert status(answer) == {"/healthz": 200, "/stats": 200, "/nowhere": 404}.get(path, 503)


async def test_until_then_connections_are_kept():
    async with recorder() as upstream, gateway(upstream.url) as served:
        Slow(upstream).go.set()
        async with connection(served.port) as (reader, writer), asyncio.timeout(PATIENCE):
            for body in WAYS.values():
                writer.write(request(body) + request(path="/healthz"))
                answer = await reader.readuntil(b'{"status": "ok"}')
                assert b"connection: close" not in answer.lower()


@pytest.mark.slow
async def test_a_signal_to_the_command_is_said_on_every_connection():
    async with recorder() as upstream:
        slow = Slow(upstream)
        async with serve("--upstream", upstream.url, "--port", "0") as served, asyncio.timeout(PATIENCE):
            async with connection(served.port) as (reader, writer), connection(served.port) as (late, asking):
                writer.write(request(PLAIN))
                await until(lambda: upstream.requests)
                served.stop()
                answer = b""
                while b" 503 " not in answer:
                    asking.write(request(path="/readyz"))
                    answer = await late.readuntil(b"}")
                assert says_close(answer)
                assert await late.read() == b""
                slow.go.set()
                answer = await reader.read()
            assert (await served.ended())[0] == 0
    assert status(answer) == 200
    assert says_close(answer)
