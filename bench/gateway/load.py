"""What the client does: many requests at once, or one after the other. Every question is another, and has one right answer."""

from __future__ import annotations

import asyncio
import itertools
import time
from contextlib import AsyncExitStack
from hashlib import shake_128
from typing import TYPE_CHECKING, NamedTuple

import aiohttp
import msgspec

from bench.gateway.ways import GATEWAY

if TYPE_CHECKING:
    from bench.gateway.ways import Way

MODEL = "gpt-4.1-mini"
SYSTEM = "Sort the products of a shop by their main use, and answer with one word."
WARM_UP = 20
"""Requests by every way before those that count, when they go one by one: connections are opened, and caches are warm."""

_numbers = itertools.count()


class Kind(NamedTuple):
    """What is asked for: whether the reply is streamed, and how many letters and digits the answer has."""

    stream: bool
    characters: int


class Answer(NamedTuple):
    word: str
    raw: bytes
    seconds: float


class Loaded(NamedTuple):
    """What a way bore.

    Attributes:
        rate: Requests a second.
        middle_ms: Processor milliseconds of a request in the middle.
        endpoint_ms: Those at the endpoint.
        per_call: Requests that went in one call to the endpoint, on average.
    """

    rate: float
    middle_ms: float
    endpoint_ms: float
    per_call: float


async def ask(session: aiohttp.ClientSession, way: Way, kind: Kind) -> Answer:
    """Ask what the simulated model knows only one answer to, a word."""
    word = draw_word(next(_numbers), kind.characters)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"Reply with exactly: {word}"}]
    body = msgspec.json.encode(
        {"model": MODEL, "messages": messages, "max_tokens": kind.characters, "stream": kind.stream}
    )
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-bench"}
    start = time.perf_counter()
    async with session.post(f"{way.url}/chat/completions", data=body, headers=headers) as response:
        raw = await response.read()
    return Answer(word, raw, time.perf_counter() - start)


def draw_word(number: int, characters: int) -> str:
    """Return a word that no other number has, and which is some 2 characters a token."""
    return shake_128(str(number).encode()).hexdigest(characters)[:characters]


def check(answers: list[Answer], kind: Kind) -> None:
    """Make sure, after the clock has stopped, that everybody got their own answer."""
    for answer in answers:
        said = (
            streamed(answer.raw) if kind.stream else msgspec.json.decode(answer.raw)["choices"][0]["message"]["content"]
        )
        assert said == answer.word, answer


def streamed(raw: bytes) -> str:
    """Put together the text of a streamed reply."""
    events = [line.removeprefix(b"data: ") for line in raw.splitlines() if line.startswith(b"data: {")]
    choices = itertools.chain.from_iterable(msgspec.json.decode(event)["choices"] for event in events)
    return "".join(choice["delta"].get("content") or "" for choice in choices)


async def closed_loop(way: Way, requests: int, workers: int, kind: Kind) -> Loaded:
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
    return Loaded(requests / took, middle, endpoint, requests / calls)


async def upstream_calls(session: aiohttp.ClientSession, way: Way) -> int:
    """Return how many calls the gateway has made so far; 0 of a way that combines nothing."""
    if way.name != GATEWAY:
        return 0
    async with session.get(way.url.removesuffix("/v1") + "/stats") as response:
        return (await response.json())["upstream_calls"]


async def one_by_one(ways: list[Way], requests: int, kind: Kind) -> dict[str, list[float]]:
    """Return the milliseconds of every request by each way, the ways in turn, so that a busy moment strikes all alike."""
    answers: dict[str, list[Answer]] = {way.name: [] for way in ways}
    async with AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(aiohttp.ClientSession()) for _ in ways]
        for _ in range(WARM_UP + requests):
            for way, session in zip(ways, sessions, strict=True):
                answers[way.name].append(await ask(session, way, kind))
    for given in answers.values():
        check(given, kind)
    return {name: [answer.seconds * 1000 for answer in given[WARM_UP:]] for name, given in answers.items()}
