"""Processor time of the client and time to the answer, over real sockets, for whole replies and streamed ones.

The endpoint is a process of its own and so is the client, in which the ways take turns. Callers come in a closed loop, as many as
keep the same number of calls under way whatever the way.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from contextlib import AbstractAsyncContextManager
from functools import cache
from operator import add
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import aiohttp
import msgspec
from openai import AsyncOpenAI

import microbatch as mb
from bench.apart import measured, simulated_endpoint
from bench.questions import Label
from bench.report import Table, met
from bench.throughput import scene
from bench.throughput.scene import Way, messages, questions, together
from bench.timing import Stopwatch, median, quantile, ratio
from microbatch.schema.answer_type import answer_type
from microbatch.testing.answers import simulated_answer

if TYPE_CHECKING:
    import argparse

    from bench.report import Run


KEY = "sk-bench"
FILL_S = 0.5
"""`max_wait`: so long that batches leave full, as they do in a job."""


class Counts(NamedTuple):
    """Calls made and tokens paid so far.

    Attributes:
        events: Pieces of text that came as an event each; 0 where they are not counted.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    events: int = 0

    def since(self, before: Counts) -> Counts:
        return Counts(*(late - early for late, early in zip(self, before, strict=True)))


class Classified(msgspec.Struct):
    answer: str


read_answer = msgspec.json.Decoder(Classified).decode


@cache
def _request(*, stream: bool) -> dict[str, Any]:
    """Return the request but for its messages; the schema is that of the batcher's own single calls."""
    schema = {"name": "answers", "strict": True, "schema": answer_type(Label).single_schema}
    body = {"model": scene.MODEL, "response_format": {"type": "json_schema", "json_schema": schema}}
    return body | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})


class OneCallEach(AbstractAsyncContextManager):
    """Base of the clients that make one call for each question, and of their counts."""

    def __init__(self, url: str, *, stream: bool) -> None:
        self.counts = Counts()
        self._url = url
        self._stream = stream

    async def ask_alone(self, question: str) -> None:
        await self.ask(question)

    def _count(self, usage: Any, pieces: int = 0) -> None:
        self.counts = Counts(*map(add, self.counts, (1, usage.prompt_tokens, usage.completion_tokens, pieces)))


class BySdk(OneCallEach):
    """The SDK as it comes, with its own retries and its own pool of connections."""

    def __init__(self, url: str, *, stream: bool) -> None:
        super().__init__(url, stream=stream)
        self._client = AsyncOpenAI(base_url=url, api_key=KEY)

    async def __aexit__(self, *raised: object) -> None:
        await self._client.close()

    async def ask(self, question: str) -> str:
        request = _request(stream=self._stream)
        completion = await self._client.chat.completions.create(messages=messages(question), **request)
        if not self._stream:
            self._count(completion.usage)
            return read_answer(completion.choices[0].message.content).answer
        text: list[str] = []
        async for chunk in completion:
            if chunk.usage is not None:
                self._count(chunk.usage)
            elif content := chunk.choices[0].delta.content:
                text.append(content)
        return read_answer("".join(text)).answer


class Text(msgspec.Struct):
    content: str | None = None


class Choice(msgspec.Struct):
    message: Text | None = None
    delta: Text | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class Body(msgspec.Struct):
    """A whole reply, or an event of a streamed one."""

    choices: list[Choice]
    usage: Usage | None = None


read_body = msgspec.json.Decoder(Body).decode


class ByAiohttp(OneCallEach):
    """A session and decoders alone: the least that one call each costs on this stack."""

    async def __aenter__(self) -> Self:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        self._session = aiohttp.ClientSession(headers=headers, raise_for_status=True)
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._session.close()

    async def ask(self, question: str) -> str:
        body = msgspec.json.encode(_request(stream=self._stream) | {"messages": messages(question)})
        async with self._session.post(f"{self._url}/chat/completions", data=body) as response:
            if not self._stream:
                whole = read_body(await response.read())
                self._count(whole.usage)
                return read_answer(whole.choices[0].message.content).answer
            text: list[str] = []
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = read_body(line[6:])
                    if event.usage is not None:
                        self._count(event.usage, len(text))
                    elif content := event.choices[0].delta.content:
                        text.append(content)
            return read_answer("".join(text)).answer


class ByBatcher(AbstractAsyncContextManager):
    """`submit`, each answer as soon as it is there (*stream*) or with the whole reply."""

    def __init__(self, url: str, size: int, *, stream: bool) -> None:
        self._batcher = mb.Microbatcher(
            mb.OpenAIChat(scene.MODEL, base_url=url, api_key=KEY),
            policy=mb.FlushPolicy(max_batch_size=size, max_wait=FILL_S, idle="wait", max_output_tokens=scene.NO_LIMIT),
            fallback=mb.FallbackPolicy(resolve="stream" if stream else "verified"),
        )

    @property
    def counts(self) -> Counts:
        stats = self._batcher.stats()
        return Counts(stats.upstream_calls, stats.prompt_tokens, stats.completion_tokens)

    async def __aenter__(self) -> Self:
        await self._batcher.__aenter__()
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._batcher.__aexit__(*raised)

    async def ask(self, question: str) -> str:
        return (await self._batcher.submit(messages(question), output_type=Label)).output

    async def ask_alone(self, question: str) -> None:
        await self._batcher.submit(messages(question), output_type=Label, priority="high")


Client = OneCallEach | ByBatcher


def client(url: str, way: Way, *, stream: bool) -> Client:
    """Return the client of *way*, not open yet."""
    if way.name == scene.SDK:
        return BySdk(url, stream=stream)
    return ByAiohttp(url, stream=stream) if way.name == scene.AIOHTTP else ByBatcher(url, way.size, stream=stream)


WAYS = (Way(scene.SDK), Way(scene.AIOHTTP), *map(together, scene.SIZES))
QUICK_WAYS = (Way(scene.SDK), Way(scene.AIOHTTP), together(4), together(scene.SIZE))
QUANTILES = (0.5, 0.99)
TARGETS = {"whole": 30.0, "streamed": 5.0}
"""So many times less processor time than the SDK."""

QUICK_PACE = 8.0
"""In the short form the endpoint is so many times as fast, with as many times fewer calls at once: the load on the client is the same."""

CATALOGUE = 2_400
"""Questions to go through, over and over."""


def pace(quick: bool) -> float:
    return QUICK_PACE if quick else 1.0


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[Any]]]:
    faster = pace(options.quick)
    settings = {name: getattr(options, name) for name in ("quick", "seconds", "rounds", "seed")}
    with simulated_endpoint(scene.LATENCY.first_token / faster, scene.LATENCY.tokens_per_second * faster) as url:
        return measured(play, url=url, path=options.input, at_once=max(1, round(scene.AT_ONCE / faster)), **settings)


async def play(
    *,
    url: str,
    path: str,
    quick: bool,
    at_once: int,
    seconds: float,
    rounds: int,
    seed: int,
) -> dict[str, dict[str, list[Any]]]:
    """Let the ways take turns; return the samples of each kind of reply and way."""
    asked = questions(path, CATALOGUE, seed)
    right = {text: simulated_answer(text, answer_type(Label).schema) for text in set(asked)}
    samples: dict[str, dict[str, list[Any]]] = {kind: {} for kind in TARGETS}
    gc.collect()
    gc.freeze()  # what is imported, the SDK most of all, is not scanned again and again
    for _ in range(rounds):
        for kind in TARGETS:
            for way in QUICK_WAYS if quick else WAYS:
                gc.collect()
                async with client(url, way, stream=kind == "streamed") as asking:
                    await warm_up(asking, at_once, way.size)
                    sample = await loaded(asking, at_once * way.size, asked, right, seconds)
                samples[kind].setdefault(way.name, []).append(sample)
    return samples


async def loaded(
    asking: Client, callers: int, asked: list[str], right: dict[str, str], seconds: float
) -> dict[str, Any]:
    """Run *callers* for *seconds* and wait for their last answers; check every answer after the measurement."""
    answers: list[tuple[str, str, float]] = []
    source = itertools.cycle(asked)
    ends = time.perf_counter() + seconds

    async def call() -> None:
        for question in source:
            start = time.perf_counter()
            label = await asking.ask(question)
            now = time.perf_counter()
            answers.append((question, label, now - start))
            if now > ends:
                break

    before = asking.counts
    with Stopwatch() as watch:
        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(call())
    counts = asking.counts.since(before)
    assert all(label == right[question] for question, label, _ in answers), "a wrong answer"
    assert counts.events in (0, counts.completion_tokens), "the endpoint has not sent one token an event"
    waits = [wait for _, _, wait in answers]
    return {
        "items": len(answers),
        "wall": watch.wall,
        "cpu": watch.cpu,
        **counts._asdict(),
        "waits": [quantile(waits, share) for share in QUANTILES],
    }


async def warm_up(asking: Client, at_once: int, size: int) -> None:
    """Open the connections, by as many calls as there will be at once, and have one batch answered."""
    numbers = itertools.count()
    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(asking.ask_alone(f"Product: sample {next(numbers)}"))
        for _ in range(size):
            group.create_task(asking.ask(f"Product: sample {next(numbers)}"))


def cpu_ms(sample: dict[str, Any]) -> float:
    """Return the processor milliseconds of an item."""
    return sample["cpu"] / sample["items"] * 1000


def table(run: Run) -> Table:
    faster = pace(run.quick)
    table = Table(
        f"Processor time of the client, SIMULATED endpoint over real sockets: {scene.LATENCY.first_token / faster:g} s to the first token, "
        f"{scene.LATENCY.tokens_per_second * faster:g} tokens/s, {scene.TOKENS} tokens of instructions, {scene.AT_ONCE / faster:g} calls at once, medians of "
        f"{run.options['rounds']} rounds",
        "reply | way | items {:,} | items/s {:,.0f} | CPU s for 1,000 items {:.3f} | less than the SDK, times {:.1f}"
        " | calls for 1,000 items {:,.1f} | tokens an item {:,.0f} | dollars for 1,000 items {:.3f} | p50 s {:.2f}"
        " | p99 s {:.2f}",
        "Streamed replies come at one token an event, which is checked. Batches: as many callers as fill all calls, each of whom asks "
        "again when answered; times are from asking to the answer. Connections are open before the clock starts, and the loop of "
        "callers itself is in all figures.",
    )
    for kind, samples in run.samples["client"].items():
        base = list(map(cpu_ms, samples[scene.SDK]))
        for name, several in samples.items():
            mine = list(map(cpu_ms, several))
            table.add(
                kind,
                name,
                round(median(one["items"] for one in several)),
                median(one["items"] / one["wall"] for one in several),
                median(mine),
                None if name == scene.SDK else ratio(base, mine),
                median(one["calls"] / one["items"] * 1000 for one in several),
                median((one["prompt_tokens"] + one["completion_tokens"]) / one["items"] for one in several),
                median(map(dollars, several)),
                *(median(column) for column in zip(*(one["waits"] for one in several), strict=True)),
            )
    return table


def dollars(sample: dict[str, Any]) -> float:
    """Return the price of 1,000 items."""
    return scene.PRICE.cost(mb.Usage(sample["prompt_tokens"], sample["completion_tokens"])) / sample["items"] * 1000


def findings(table: Table) -> list[str]:
    rows, found = table.by("reply", "way"), []
    for kind, target in TARGETS.items():
        ours, sdk, raw = (rows[kind, name] for name in (together(scene.SIZE).name, scene.SDK, scene.AIOHTTP))
        less = ours["less than the SDK, times"]
        mine, theirs, bare = (row["CPU s for 1,000 items"] for row in (ours, sdk, raw))
        found.append(
            f"Client CPU, {kind} replies, batches of {scene.SIZE}: {mine:.3f} ms an item, {less:.1f} times less than the openai SDK one call each "
            f"({theirs:.3f} ms); target {target:g} times less {met(less >= target)}. "
            + (
                f"Raw aiohttp takes {bare:.3f} ms, one call each."
                if mine < bare
                else f"Raw aiohttp takes LESS, {bare:.3f} ms, one call each: every token is an event to be read, and an item has twice as "
                "many tokens in a combined reply."
            )
        )
    return found
