"""The ways to ask over sockets: one call each by the openai SDK or by aiohttp alone, and a batcher. Each takes a question and returns its label."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from operator import add
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import aiohttp
import msgspec
from openai import AsyncOpenAI

import microbatch as mb
from bench.questions import Label
from bench.throughput.scene import AIOHTTP, BATCHER, MODEL, NEVER_BINDS, SDK, messages, response_format

if TYPE_CHECKING:
    from bench.throughput.scene import Way

KEY = "sk-bench"
FILL_S = 0.5
"""`max_wait`: so long that batches leave full, as they do in a job."""


class Told(NamedTuple):
    """What was asked for and paid so far.

    Attributes:
        events: Pieces of text that came as an event each; 0 where nobody counts them.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    events: int = 0

    def since(self, before: Told) -> Told:
        return Told(*(late - early for late, early in zip(self, before, strict=True)))


class Client(Protocol):
    """A way that is open."""

    @property
    def told(self) -> Told: ...

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


class OneCallEach(AbstractAsyncContextManager):
    """What keeps count of calls that carry one question each."""

    def __init__(self) -> None:
        self.told = Told()

    async def ask_alone(self, question: str) -> None:
        await self.ask(question)

    def _count(self, usage: Any, pieces: int = 0) -> None:
        self.told = Told(*map(add, self.told, (1, usage.prompt_tokens, usage.completion_tokens, pieces)))


class BySdk(OneCallEach):
    """One call each by the SDK as it comes: its own retries, its own pool of connections."""

    def __init__(self, url: str, way: Way, *, stream: bool) -> None:
        del way
        super().__init__()
        self._client = AsyncOpenAI(base_url=url, api_key=KEY)
        self._format: Any = response_format()
        self.ask = self._streamed if stream else self._whole

    async def __aexit__(self, *raised: object) -> None:
        await self._client.close()

    async def _whole(self, question: str) -> str:
        completion = await self._client.chat.completions.create(
            model=MODEL, messages=messages(question), response_format=self._format
        )
        self._count(completion.usage)
        return read_answer(completion.choices[0].message.content).answer

    async def _streamed(self, question: str) -> str:
        text: list[str] = []
        stream = await self._client.chat.completions.create(
            model=MODEL,
            messages=messages(question),
            response_format=self._format,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
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
    """One call each with nothing but a session and decoders: the least that asking one by one costs on this stack."""

    def __init__(self, url: str, way: Way, *, stream: bool) -> None:
        del way
        super().__init__()
        self._url = f"{url}/chat/completions"
        self._body: dict[str, Any] = {"model": MODEL, "response_format": response_format()}
        if stream:
            self._body |= {"stream": True, "stream_options": {"include_usage": True}}
        self._read = self._streamed if stream else self._whole
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        self._session = aiohttp.ClientSession(headers=headers, raise_for_status=True)
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._session.close()

    async def ask(self, question: str) -> str:
        body = msgspec.json.encode(self._body | {"messages": messages(question)})
        async with self._session.post(self._url, data=body) as response:
            return read_answer(await self._read(response)).answer

    async def _whole(self, response: aiohttp.ClientResponse) -> str:
        body = read_body(await response.read())
        self._count(body.usage)
        return body.choices[0].message.content

    async def _streamed(self, response: aiohttp.ClientResponse) -> str:
        text: list[str] = []
        async for line in response.content:
            if line.startswith(b"data: {"):
                body = read_body(line[6:])
                if body.usage is not None:
                    self._count(body.usage, len(text))
                elif content := body.choices[0].delta.content:
                    text.append(content)
        return "".join(text)


class ByBatcher(AbstractAsyncContextManager):
    """`submit`, each answer as soon as it is there (*stream*) or with the whole reply."""

    def __init__(self, url: str, way: Way, *, stream: bool) -> None:
        self._batcher = mb.Microbatcher(
            mb.OpenAIChat(MODEL, base_url=url, api_key=KEY),
            policy=mb.FlushPolicy(max_batch_size=way.size, max_wait=FILL_S, idle="wait", max_output_tokens=NEVER_BINDS),
            fallback=mb.FallbackPolicy(resolve="stream" if stream else "verified"),
            cache=mb.MemoryCache() if way.cached else None,
        )

    @property
    def told(self) -> Told:
        stats = self._batcher.stats()
        return Told(stats.upstream_calls, stats.prompt_tokens, stats.completion_tokens)

    async def __aenter__(self) -> Self:
        await self._batcher.__aenter__()
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._batcher.__aexit__(*raised)

    async def ask(self, question: str) -> str:
        return (await self._batcher.submit(messages(question), output_type=Label)).output

    async def ask_alone(self, question: str) -> None:
        await self._batcher.submit(messages(question), output_type=Label, priority="high")


CLIENTS: dict[str, type[Client]] = {SDK: BySdk, AIOHTTP: ByAiohttp, BATCHER: ByBatcher}


def client(url: str, way: Way, *, stream: bool) -> Client:
    """Return the client of *way*, not open yet."""
    return CLIENTS[way.by](url, way, stream=stream)
