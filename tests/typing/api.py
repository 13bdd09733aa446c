"""What type checkers must infer of the public API. Checked by mypy, never run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, assert_type

import msgspec
import pydantic

import microbatch as mb
from microbatch.openai import AsyncOpenAI, AsyncStream, ChatCompletion, CreateEmbeddingResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence


class Category(msgspec.Struct):
    category: Literal["electronics", "clothing"]


@dataclass
class Point:
    x: int


class Row(TypedDict):
    name: str


class Model(pydantic.BaseModel):
    name: str


async def outputs(batcher: mb.Microbatcher, messages: list[dict[str, str]]) -> None:
    assert_type(await batcher.submit(messages), mb.Reply[str])
    assert_type((await batcher.submit(messages)).output, str)
    assert_type(await batcher.submit(messages, output_type=str), mb.Reply[str])
    assert_type(await batcher.submit(messages, output_type=Category), mb.Reply[Category])
    assert_type(await batcher.submit(messages, output_type=Point), mb.Reply[Point])
    assert_type(await batcher.submit(messages, output_type=Row), mb.Reply[Row])
    assert_type(await batcher.submit(messages, output_type=Model), mb.Reply[Model])
    assert_type(await batcher.submit(messages, output_type=list[int]), mb.Reply[list[int]])
    assert_type(await batcher.submit(messages, output_type=Literal["a", "b"]), mb.Reply[Literal["a", "b"]])
    assert_type(await batcher.submit(messages, output_type=int | None), mb.Reply[int | None])
    assert_type(await (await batcher.submit(messages)).settled(), mb.Reply[str])
    assert_type((await batcher.submit(messages)).cost_usd, float | None)


async def options(batcher: mb.Microbatcher) -> None:
    reply = await batcher.submit(
        [mb.Message("system", "Be brief."), mb.Message("user", "Hello")],
        model="m",
        max_tokens=10,
        temperature=0.0,
        params={"top_p": 0.5},
        headers={"Authorization": "Bearer k"},
        tenant="t",
        priority="low",
        timeout=3.0,
    )
    assert_type(reply.usage, mb.Usage)
    await batcher.submit([], priority="urgent")  # type: ignore[arg-type]
    async for result in batcher.map([mb.Request([mb.Message("user", "Hello")], id="1")], ordered=True):
        assert_type(result.error, Exception | None)
    assert_type(batcher.stats(), mb.Stats)


async def calibrating(requests: list[mb.Request[str]]) -> None:
    found = await mb.calibrate(
        mb.OpenAIChat("m", api_key="k"), requests, sizes=(4, 8), same=lambda one, other: one == other
    )
    assert_type(found, mb.Calibration)
    assert_type(found.recommended, int | None)
    assert_type(found.sizes, tuple[mb.CalibratedSize, ...])
    await mb.calibrate(mb.OpenAIChat("m", api_key="k"), requests, sample="all")  # type: ignore[arg-type]


async def own_transport(call: mb.ChatCall) -> None:
    class Mine:
        async def send(self, call: mb.ChatCall, on_text: object) -> mb.Completion:
            return mb.Completion("stop", usage=mb.Usage(1, 1))

        async def aclose(self) -> None: ...

    async with mb.Microbatcher(Mine(), policy=mb.FlushPolicy(max_batch_size=4), prices={"m": mb.Price(1, 2)}):
        pass
    mb.Microbatcher(Mine(), prices=mb.genai_prices({"m": mb.Price(1, 2)}))


async def reliability() -> None:
    async with mb.Microbatcher(
        mb.OpenAIChat("m", api_key="k"),
        retry=mb.RetryPolicy(max_attempts=3, base=0.1, cap=5.0, budget=0.1, reserve=5),
        fallback=mb.FallbackPolicy(canary=True),
        rate_limit=mb.RateLimit(rpm=1_000, tpm=200_000, share=0.5, charge="used", adaptive=True),
        policy=mb.FlushPolicy(merge="when-cheaper"),
    ) as batcher:
        assert_type(batcher.stats().lanes_parted, int)
    mb.RateLimit(rpm=1, charge="spent")  # type: ignore[arg-type]
    mb.Completion("stop", limits=mb.Limits(remaining_requests=3))
    mb.RateLimited("slow down", status=429, retry_after=2.0, limits=mb.Limits(remaining_tokens=0))


async def reuse(messages: list[dict[str, str]]) -> None:
    class Own:
        async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
            return [None] * len(keys)

        async def set_many(self, entries: Sequence[tuple[bytes, bytes, float | None]]) -> None: ...

        async def aclose(self) -> None: ...

    caches: list[mb.Cache] = [
        Own(),
        mb.MemoryCache(max_bytes=1, ttl=None),
        mb.SQLiteCache("c.sqlite", ttl=60.0),
        mb.RedisCache("redis://localhost"),
        mb.TieredCache(mb.MemoryCache(), mb.RedisCache("redis://localhost")),
    ]
    spools: list[mb.Spool] = [mb.SQLiteSpool("s.sqlite", keep=60.0), mb.RedisSpool("redis://localhost", max_alone=5)]
    async with mb.Microbatcher(
        mb.OpenAIChat("m", api_key="k"),
        cache=caches[0],
        spool=spools[0],
        normalize=str.strip,
        policy=mb.FlushPolicy(share=True),
    ) as batcher:
        assert_type(await batcher.submit(messages, output_type=int, use_cache=False, ttl=3.0), mb.Reply[int])
        assert_type(await batcher.submit(messages, use_cache="refresh"), mb.Reply[str])
        assert_type(await batcher.warm([messages], ttl=3.0, progress=lambda warmed: None), mb.Warmed)
        assert_type(await batcher.enqueue(messages, id="a", output_type=Category, tenant="t"), str)
        assert_type(await batcher.result("a"), mb.Reply[str])
        assert_type(await batcher.result("a", output_type=Category, tenant="t", timeout=3.0), mb.Reply[Category])
        await batcher.enqueue(messages, headers={})  # type: ignore[call-arg]
        assert_type(batcher.stats().cache_hit_rate, float)
    mb.Request(messages, use_cache=False, ttl=1.0)
    mb.Request(messages, use_cache="refresh")
    for kind in (mb.MemoryCache(), mb.SQLiteCache("c.sqlite"), mb.RedisCache("redis://h"), mb.TieredCache(*caches)):
        assert_type(await kind.delete([b"key"]), int)
        assert_type(await kind.clear(tenant="t"), int)


async def like_the_sdk(batcher: mb.Microbatcher, messages: list[dict[str, str]], *, stream: bool) -> None:
    async with AsyncOpenAI(batcher) as client:
        completions = client.chat.completions
    completion = await completions.create(model="m", messages=messages, temperature=0.5, seed=1, tenant="t")
    assert_type(completion, ChatCompletion[None])
    assert_type(completion.choices[0].message.content, str | None)
    assert_type(completion.choices[0].message.parsed, None)
    assert_type(await completion.settled(), ChatCompletion[None])
    assert_type(completion.microbatch.cost_usd, float | None)
    if completion.usage is not None:
        assert_type(completion.usage.total_tokens, int)
    for call in completion.choices[0].message.tool_calls or ():
        assert_type(call.function.arguments, str)
    parsed = await completions.parse(messages=messages, response_format=Model)
    assert_type(parsed.choices[0].message.parsed, Model | None)
    assert_type(await completions.parse(messages=messages, response_format=Category), ChatCompletion[Category])
    assert_type(await completions.parse(messages=messages, response_format=list[int]), ChatCompletion[list[int]])
    chunks = await completions.create(model="m", messages=messages, stream=True)
    assert_type(chunks, AsyncStream)
    async with chunks:
        async for chunk in chunks:
            assert_type(chunk.choices[0].delta.content, str | None)
    assert_type(
        await completions.create(model="m", messages=messages, stream=stream), ChatCompletion[None] | AsyncStream
    )
    embedded = await client.embeddings.create(input=["a", "b"], model="m", encoding_format="float", priority="low")
    assert_type(embedded, CreateEmbeddingResponse)
    assert_type(embedded.data[0].embedding, list[float])
    assert_type(embedded.usage.prompt_tokens, int)
    await client.embeddings.create(input=[[1, 2], [3]], model="m", timeout=5)
    await client.embeddings.create(input="a", encoding_format="int8")  # type: ignore[arg-type]
    await completions.create(messages=messages, priority="urgent")  # type: ignore[call-overload]
    await completions.parse(messages=messages, response_format=3)  # type: ignore[arg-type]


async def many(
    batcher: mb.Microbatcher, messages: list[dict[str, str]], rows: AsyncIterator[mb.Request[Point]]
) -> None:
    assert_type(mb.Request(messages), mb.Request[str])
    assert_type(mb.Request(messages, output_type=Category), mb.Request[Category])
    async for plain in batcher.map([messages, messages]):
        assert_type(plain, mb.Result[str])
    async for text in batcher.map([mb.Request(messages, id="1")], ordered=True):
        assert_type(text.unwrap().output, str)
    async for typed in batcher.map(mb.Request(messages, output_type=Category) for _ in range(3)):
        assert_type(typed, mb.Result[Category])
        assert_type(typed.unwrap().output.category, Literal["electronics", "clothing"])
    async for row in batcher.map(rows, max_pending=4):
        assert_type(row, mb.Result[Point])
    numbers: list[mb.Request[int]] = [mb.Request(messages, output_type=int)]
    async for number in batcher.map(numbers):
        assert_type(number.unwrap().output, int)
    mixed: list[mb.Request[int] | list[dict[str, str]]] = [mb.Request(messages, output_type=int), messages]
    async for either in batcher.map(mixed):
        assert_type(either, mb.Result[Any])
    assert_type(await batcher.warm(mixed), mb.Warmed)


async def endpoints() -> None:
    async def key() -> str:
        return "k"

    mb.OpenAIChat("m", api_key=key, structured="json_object", first_timeout=3.0, trust_env=True, uds="/run/llm.sock")
    mb.OpenAIChat("m", api_key=lambda: "k", stream_options={"include_obfuscation": False})
    mb.OpenAIChat("m", structured="xml")  # type: ignore[arg-type]
