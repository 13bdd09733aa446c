"""The cost of the gateway: the same client asks the simulated endpoint directly, through a proxy on aiohttp that only relays bytes, and
through `microbatch serve`, each a process of its own on 127.0.0.1.

Load: workers in a closed loop, each question another, one system prompt. Low load: one request after the other, and what each way
adds to the direct one. The ways take turns, and the tables show medians over the rounds. The endpoint is SIMULATED.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from contextlib import AsyncExitStack, ExitStack
from hashlib import shake_128
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
import msgspec
import psutil

from bench.apart import server
from bench.benchmark import Option
from bench.report import Run, Table
from bench.timing import column, median, quantile, ratio

if TYPE_CHECKING:
    import argparse

QUESTION = "What does the gateway add to a request, beside asking directly and through a proxy that only relays?"
COMPARED = ["aiohttp"]
OPTIONS = {
    "requests": Option(int, 2_000, 300, "requests of a round under load"),
    "low": Option(int, 300, 80, "requests one by one, of a round"),
    "workers": Option(int, 64, 64, "requests at a time under load"),
    "rounds": Option(int, 5, 2, "alternating rounds"),
    "latency": Option(float, 0.0, 0.0, "seconds to the endpoint's first token"),
}

DIRECT, PASS_THROUGH, GATEWAY = "direct", "pass-through", "gateway"
MODEL = "gpt-4.1-mini"
SYSTEM = "Sort the products of a shop by their main use, and answer with one word."
WARM_UP = 20
"""Requests by every way before those that count, when they go one by one: connections are opened, and caches are warm."""

_numbers = itertools.count()


class Kind(NamedTuple):
    """Kind of a reply: whether it is streamed, and its letters and digits, of which some 2 are a token."""

    stream: bool
    characters: int


REPLIES = {"whole": Kind(False, 12), "streamed": Kind(True, 12), "streamed, long": Kind(True, 140)}


class Way(NamedTuple):
    """A way to the endpoint.

    Attributes:
        url: URL of its API.
        middle: The process between client and endpoint, None if there is none.
        endpoint: The process of the endpoint.
    """

    name: str
    url: str
    middle: psutil.Process | None
    endpoint: psutil.Process

    def spent(self) -> tuple[float, float]:
        """Return the processor seconds so far, in the middle and at the endpoint."""
        return tuple(sum(process.cpu_times()[:2]) if process else 0.0 for process in (self.middle, self.endpoint))


class Answer(NamedTuple):
    word: str
    raw: bytes
    seconds: float


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as stack:
        pace = ("--first-token", str(options.latency), "--tokens-per-second", "0")
        endpoint, url = stack.enter_context(server("-m", "microbatch", "simulate", "--port", "0", *pace))
        relay, relay_url = stack.enter_context(server("-m", "bench.pass_through", url))
        # With --idle flush a lone request is sent at once, as it would be at the endpoint itself.
        flags = ("--upstream", url, "--port", "0", "--max-batch-size", "16", "--idle", "flush")
        gateway, gateway_url = stack.enter_context(server("-m", "microbatch", "serve", *flags))
        at = psutil.Process(endpoint.pid)
        ways = [
            Way(DIRECT, url, None, at),
            Way(PASS_THROUGH, relay_url, psutil.Process(relay.pid), at),
            Way(GATEWAY, gateway_url, psutil.Process(gateway.pid), at),
        ]
        return asyncio.run(_measure(ways, options))


async def _measure(ways: list[Way], options: argparse.Namespace) -> dict[str, Any]:
    samples: dict[str, Any] = {"load": {}, "latency_ms": {}}
    for reply, kind in REPLIES.items():
        loaded = samples["load"][reply] = {way.name: [] for way in ways}
        for number in range(-1, options.rounds):  # the first round warms up
            for way in ways:
                gc.collect()
                sample = await closed_loop(way, options.requests, options.workers, kind)
                if number >= 0:
                    loaded[way.name].append(sample)
        low = samples["latency_ms"][reply] = {way.name: [] for way in ways}
        for _ in range(options.rounds):
            gc.collect()
            for name, taken in (await one_by_one(ways, options.low, kind)).items():
                low[name].append({"p50": quantile(taken, 0.5), "p99": quantile(taken, 0.99)})
    return samples


async def ask(session: aiohttp.ClientSession, way: Way, kind: Kind) -> Answer:
    """Ask for a word that no other request asks for."""
    word = shake_128(str(next(_numbers)).encode()).hexdigest(kind.characters)[: kind.characters]
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"Reply with exactly: {word}"}]
    request = {"model": MODEL, "messages": messages, "max_tokens": kind.characters, "stream": kind.stream}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-bench"}
    body, start = msgspec.json.encode(request), time.perf_counter()
    async with session.post(f"{way.url}/chat/completions", data=body, headers=headers) as response:
        raw = await response.read()
    return Answer(word, raw, time.perf_counter() - start)


def check(answers: list[Answer], kind: Kind) -> None:
    """Raise AssertionError unless every request got its own answer; called after the clock has stopped."""
    for answer in answers:
        if kind.stream:
            events = [line.removeprefix(b"data: ") for line in answer.raw.splitlines() if line.startswith(b"data: {")]
            choices = itertools.chain.from_iterable(msgspec.json.decode(event)["choices"] for event in events)
            text = "".join(choice["delta"].get("content") or "" for choice in choices)
        else:
            text = msgspec.json.decode(answer.raw)["choices"][0]["message"]["content"]
        assert text == answer.word, answer


async def closed_loop(way: Way, requests: int, workers: int, kind: Kind) -> dict[str, float]:
    """Have *workers* ask *requests* times in all, each as soon as it is answered."""
    answers: list[Answer] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        left = iter(range(requests))

        async def work() -> None:
            for _ in left:
                answers.append(await ask(session, way, kind))  # noqa: PERF401 the next one waits for it

        calls = await upstream_calls(session, way)
        before, start = way.spent(), time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(work())
        took, after = time.perf_counter() - start, way.spent()
        calls = (await upstream_calls(session, way) - calls) or requests
    check(answers, kind)
    middle, endpoint = ((late - early) / requests * 1000 for early, late in zip(before, after, strict=True))
    return {"rate": requests / took, "per_call": requests / calls, "middle_ms": middle, "endpoint_ms": endpoint}


async def upstream_calls(session: aiohttp.ClientSession, way: Way) -> int:
    """Return the calls the gateway has made so far; 0 for a way that combines nothing."""
    if way.name != GATEWAY:
        return 0
    async with session.get(way.url.removesuffix("/v1") + "/stats") as response:
        return (await response.json())["upstream_calls"]


async def one_by_one(ways: list[Way], requests: int, kind: Kind) -> dict[str, list[float]]:
    """Return the milliseconds of every request by each way, the ways in turn, so that other load affects all alike."""
    answers: dict[str, list[Answer]] = {way.name: [] for way in ways}
    async with AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(aiohttp.ClientSession()) for _ in ways]
        for _ in range(WARM_UP + requests):
            for way, session in zip(ways, sessions, strict=True):
                answers[way.name].append(await ask(session, way, kind))
    for given in answers.values():
        check(given, kind)
    return {name: [answer.seconds * 1000 for answer in given[WARM_UP:]] for name, given in answers.items()}


def tables(run: Run) -> dict[str, Table]:
    scene = f"SIMULATED endpoint, {run.options['latency']:g} s to answer; medians of {run.options['rounds']} rounds"
    load = Table(
        f"{run.options['workers']} requests at a time, {run.options['requests']:,} a round; {scene}",
        "reply | way | requests/s {:,.0f} | of direct {:.0%} | requests a call {:.1f}"
        " | CPU ms/request in the middle {:.2f} | CPU ms/request at the endpoint {:.2f}",
    )
    latency = Table(
        f"One request at a time, {run.options['low']:,} a round; {scene}",
        "reply | way | p50 ms {:.2f} | p99 ms {:.2f} | adds to direct, p50 ms {:+.2f} | adds to direct, p99 ms {:+.2f}",
    )
    for reply, ways in run.samples["load"].items():
        for name, rounds in ways.items():
            share = ratio(column(rounds, "rate"), column(ways[DIRECT], "rate"))
            keys = ("rate", "per_call", "middle_ms", "endpoint_ms")
            rate, per_call, middle, endpoint = (median(column(rounds, key)) for key in keys)
            load.add(reply, name, rate, share, per_call, None if name == DIRECT else middle, endpoint)
    for reply, ways in run.samples["latency_ms"].items():
        for name, rounds in ways.items():
            own = [median(column(rounds, key)) for key in ("p50", "p99")]
            pairs = list(zip(rounds, ways[DIRECT], strict=True))
            added = [median(mine[key] - base[key] for mine, base in pairs) for key in ("p50", "p99")]
            latency.add(reply, name, *own, *([None, None] if name == DIRECT else added))
    return {"load": load, "latency": latency}


def findings(run: Run, tables: dict[str, Table]) -> list[str]:
    del run
    load, latency, found = tables["load"].by("reply", "way"), tables["latency"].by("reply", "way"), []
    for reply in REPLIES:
        gateway, relay = load[reply, GATEWAY], load[reply, PASS_THROUGH]
        adds = [
            f"{latency[reply, way]['adds to direct, p50 ms']:.2f} ms at p50 and {latency[reply, way]['adds to direct, p99 ms']:.2f} ms at p99"
            for way in (GATEWAY, PASS_THROUGH)
        ]
        cpu = [way["CPU ms/request in the middle"] for way in (gateway, relay)]
        found.append(
            f"Replies {reply}: one at a time, the gateway adds {adds[0]}, the pass-through {adds[1]}; under load it takes {cpu[0]:.2f} ms of "
            f"processor time a request, {cpu[0] / cpu[1]:.1f} times that of the pass-through, for {gateway['requests/s'] / relay['requests/s']:.0%} "
            f"of its requests/s, with {gateway['requests a call']:.1f} requests a call."
        )
    shared = "Client, endpoint and what is between them share the machine, so requests/s are of them all together"
    return [*found, f"{shared}; loopback has no network in it, and a p99 of a few hundred requests is rough."]
