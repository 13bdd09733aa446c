"""Clients over sockets: one call each by the openai SDK or by aiohttp alone, and a batcher. Each takes a question and returns its label."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from functools import cache
from operator import add
from typing import Any, NamedTuple, Protocol, Self

import aiohttp
import msgspec
from openai import AsyncOpenAI

import microbatch as mb
from bench.questions import Label
from bench.throughput.scene import AIOHTTP, MODEL, NO_LIMIT, SDK, Way, messages
from microbatch.schema.answer_type import answer_type

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


class Client(Protocol):
    @property
    def counts(self) -> Counts: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *raised: object) -> None: ...

    async def ask(self, question: str) -> str:
        """Return the label of *question*."""
        ...

    async def ask_alone(self, question: str) -> None:
        """Ask in a call of its own."""
        ...


class Classified(msgspec.Struct):
    answer: str


read_answer = msgspec.json.Decoder(Classified).decode


@cache
def _request(*, stream: bool) -> dict[str, Any]:
    """Return the request but for its messages; the schema is that of the batcher's own single calls."""
    schema = {"name": "answers", "strict": True, "schema": answer_type(Label).single_schema}
    body = {"model": MODEL, "response_format": {"type": "json_schema", "json_schema": schema}}
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
            mb.OpenAIChat(MODEL, base_url=url, api_key=KEY),
            policy=mb.FlushPolicy(max_batch_size=size, max_wait=FILL_S, idle="wait", max_output_tokens=NO_LIMIT),
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


def client(url: str, way: Way, *, stream: bool) -> Client:
    """Return the client of *way*, not open yet."""
    if way.name == SDK:
        return BySdk(url, stream=stream)
    return ByAiohttp(url, stream=stream) if way.name == AIOHTTP else ByBatcher(url, way.size, stream=stream)
