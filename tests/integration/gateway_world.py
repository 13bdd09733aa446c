"""What the tests of the gateway have in common: an upstream that remembers, and clients that are no SDK."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import asynccontextmanager, suppress

import openai
from aiohttp import web

import microbatch as mb
from microbatch.gateway import Gateway
from microbatch.testing import Latency, SimulatedEndpoint

MODEL = "gpt-4.1-mini"
QUICK = Latency(first_token=0, tokens_per_second=0)
ONE_ATTEMPT = mb.RetryPolicy(max_attempts=1)
PATIENCE = 30


class Watched(SimulatedEndpoint):
    """A simulated endpoint that remembers with whose key each call came, and what was in it."""

    def __init__(self, **options):
        super().__init__(**{"latency": QUICK, "answer": lambda text, schema: f"re: {text}", **options})
        self.heard = []

    def charge(self, body, key, tokens=0):
        self.heard.append((key, json.dumps(body.get("messages"))))
        return super().charge(body, key, tokens)


class Recorder:
    """An upstream that turns bodies round and remembers the requests: method, path, headers, body."""

    def __init__(self):
        self.requests = []
        self.url = ""
        self.answer = None

    async def serve(self, request):
        body = await request.read()
        self.requests.append((request.method, request.raw_path, request.headers.copy(), body))
        if self.answer is not None:
            return await self.answer(request)
        headers = {"Set-Cookie": "a=b", "Access-Control-Allow-Origin": "*", "X-Kept": "yes"}
        return web.Response(status=203, body=body[::-1], headers=headers)


@asynccontextmanager
async def recorder():
    upstream = Recorder()
    application = web.Application(client_max_size=2**30)
    application.router.add_route("*", "/{path:.*}", upstream.serve)
    runner = web.AppRunner(application, shutdown_timeout=0.1, auto_decompress=False, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    upstream.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield upstream
    finally:
        await runner.cleanup()


def gateway(upstream, *, policy=None, **options):
    """A gateway that counts bytes, so that no test waits for a token table."""
    policy = mb.FlushPolicy(**{"idle": "wait", "max_wait": 0.05, **(policy or {})})
    return Gateway(
        upstream if isinstance(upstream, str) else upstream.base_url, policy=policy, tokens="bytes", **options
    )


def sdk(served, key="sk-someone-s-own-key", **options):
    return openai.AsyncOpenAI(base_url=served.base_url, api_key=key, **options)


@asynccontextmanager
async def connection(port, **options):
    """A plain connection, which is closed in the end, whatever became of it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, **options)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def talk(port, sent):
    """Send bytes as they are and return all that comes back until the other side closes."""
    async with connection(port) as (reader, writer), asyncio.timeout(PATIENCE):
        writer.write(sent)
        return await reader.read()


def post(body=b"{}", *, path="/v1/chat/completions", host="localhost", **headers):
    """The bytes of a POST on a connection that is closed afterwards."""
    lines = {"Host": host, "Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def status(answer):
    return int(answer.split(b" ", 2)[1])


def error_in(answer):
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


class Served:
    """`microbatch serve` in a process of its own."""

    def __init__(self, process, base_url):
        self.process = process
        self.base_url = base_url
        port = base_url.rpartition(":")[2].partition("/")[0]
        self.port = int(port) if port else None  # it has none on a Unix socket

    def stop(self):
        self.process.send_signal(signal.SIGTERM)

    async def ended(self):
        async with asyncio.timeout(PATIENCE):
            out, err = await self.process.communicate()
        return self.process.returncode, out.decode(), err.decode()


@asynccontextmanager
async def serve(*words, **environment):
    """Run the command until the block ends; it is killed if it has not ended by itself."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "MICROBATCH_"))}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-m", "microbatch", "serve", *words),
        env=clean | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(PATIENCE):
            line = (await process.stdout.readline()).decode().strip()
        assert line, (await process.communicate())[1].decode()
        yield Served(process, line)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
