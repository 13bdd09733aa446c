"""What the gateway costs: the same client asks the same questions of the simulated endpoint directly, through an aiohttp
pass-through of ours that only relays bytes, and through `microbatch serve`. All run as processes of their own.

Load: a number of workers in a closed loop, each question different, one system prompt; requests/s, and the CPU time that the
process in the middle and the endpoint spent on each request. Low load: one request after the other, `--idle flush`; what each way
adds to the latency of the direct one. The ways take turns, and medians over the rounds are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version

import aiohttp
from aiohttp import web

MODEL = "gpt-4.1-mini"
SYSTEM = "Sort the products of a shop by their main use, and answer with one word."
LOW_LOAD = ("--max-batch-size", "16", "--idle", "flush")
TICKS = os.sysconf("SC_CLK_TCK")


def body(text: str, stream: bool) -> bytes:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    return json.dumps({"model": MODEL, "messages": messages, "max_tokens": 8, "stream": stream}).encode()


def cpu(pid: int) -> float:
    """CPU seconds that a process has used so far."""
    with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123 no path of ours
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@asynccontextmanager
async def process(*words: str):
    """Run a server that says where it listens, and yield its process and address."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "MICROBATCH_"))}
    running = await asyncio.create_subprocess_exec(
        sys.executable, *words, env=clean, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield running.pid, (await running.stdout.readline()).decode().strip()
    finally:
        running.terminate()
        await running.wait()


async def pass_through(upstream: str) -> None:
    """Serve the least that a proxy on aiohttp does."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False) as session:

        async def relay(request: web.Request) -> web.StreamResponse:
            raw = await request.read()
            headers = {"Content-Type": request.content_type, "Authorization": request.headers["Authorization"]}
            async with session.request(
                request.method, upstream + request.path_qs.removeprefix("/v1"), data=raw, headers=headers
            ) as answer:
                response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
                response.content_length = answer.content_length
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                return response

        application = web.Application()
        application.router.add_route("*", "/{path:.*}", relay)
        runner = web.AppRunner(application, access_log=None, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        print(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", flush=True)
        await asyncio.Event().wait()


class Way:
    def __init__(self, name: str, url: str, pid: int | None, endpoint: int) -> None:
        self.name = name
        self.url = url
        self.pid = pid
        self.endpoint = endpoint

    def spent(self) -> tuple[float, float]:
        return cpu(self.pid) if self.pid else 0.0, cpu(self.endpoint)


async def ask(session: aiohttp.ClientSession, way: Way, text: str, stream: bool) -> float:
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-bench"}
    start = time.perf_counter()
    async with session.post(f"{way.url}/chat/completions", data=body(text, stream), headers=headers) as response:
        raw = await response.read()
    took = time.perf_counter() - start
    assert response.status == 200, raw
    return took


async def load(way: Way, requests: int, workers: int, stream: bool, mark: str) -> tuple[float, float, float]:
    """Return requests/s, and milliseconds of CPU for each request in the middle and at the endpoint."""
    numbers = iter(range(requests))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def work() -> None:
            for number in numbers:
                await ask(session, way, f"{mark} product {number}", stream)

        before, start = way.spent(), time.perf_counter()
        await asyncio.gather(*(work() for _ in range(workers)))
        took, after = time.perf_counter() - start, way.spent()
    middle, endpoint = ((late - early) / requests * 1000 for early, late in zip(before, after, strict=True))
    return requests / took, middle, endpoint


async def one_by_one(ways: list[Way], requests: int, stream: bool) -> dict[str, list[float]]:
    """Return the latencies of each way, one request at a time, the ways in turn so that the machine's moods hit all alike."""
    taken: dict[str, list[float]] = {way.name: [] for way in ways}
    async with AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(aiohttp.ClientSession()) for _ in ways]
        for number in range(-20, requests):
            for way, session in zip(ways, sessions, strict=True):
                took = await ask(session, way, f"low {number}", stream)
                if number >= 0:
                    taken[way.name].append(took)
    return taken


def quantile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))] * 1000


async def main(args: argparse.Namespace) -> None:
    print(f"microbatch {version('microbatch')}, aiohttp {version('aiohttp')}, Python {platform.python_version()}")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; {args.workers} workers, {args.requests} requests, {args.rounds} rounds"
    )
    async with AsyncExitStack() as stack:
        simulate = ("-m", "microbatch", "simulate", "--first-token", str(args.latency), "--tokens-per-second", "0")
        endpoint, url = await stack.enter_async_context(process(*simulate))
        through, through_url = await stack.enter_async_context(process(__file__, "--pass-through", url))
        serve = ("-m", "microbatch", "serve", "--upstream", url, "--port", "0", *LOW_LOAD)
        gateway, gateway_url = await stack.enter_async_context(process(*serve))
        ways = [
            Way("direct", url, None, endpoint),
            Way("pass-through", through_url, through, endpoint),
            Way("gateway", gateway_url, gateway, endpoint),
        ]
        for stream in (False, True):
            await measure(ways, args, stream)


async def measure(ways: list[Way], args: argparse.Namespace, stream: bool) -> None:
    figures: dict[str, list[tuple[float, float, float]]] = {way.name: [] for way in ways}
    for number in range(-1, args.rounds):  # the first round warms up
        for way in ways:
            found = await load(way, args.requests, args.workers, stream, f"round {number} {way.name} {stream}")
            if number >= 0:
                figures[way.name].append(found)
    print(f"\n{'streamed' if stream else 'whole'}        requests/s   CPU ms/request: in the middle   at the endpoint")
    for name, found in figures.items():
        rate, middle, endpoint = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"  {name:13s} {rate:9.0f} {middle:29.2f} {endpoint:17.2f}")
    added: dict[str, list[tuple[float, float]]] = {way.name: [] for way in ways[1:]}
    for _ in range(args.rounds):
        taken = await one_by_one(ways, args.low, stream)
        for name, rounds in added.items():
            rounds.append(tuple(quantile(taken[name], q) - quantile(taken["direct"], q) for q in (0.5, 0.99)))
    for name, rounds in added.items():
        p50, p99 = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"  {name:13s} adds {p50:5.2f} ms at p50, {p99:5.2f} ms at p99, one request at a time")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2_000)
    parser.add_argument("--low", type=int, default=300, help="requests one by one, each round")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds to the endpoint's first token")
    parser.add_argument("--pass-through", metavar="URL", help=argparse.SUPPRESS)
    given = parser.parse_args()
    asyncio.run(pass_through(given.pass_through) if given.pass_through else main(given))
