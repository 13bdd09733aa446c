"""`microbatch.openai`'s embeddings beside the real SDK: the same requests to the same endpoint, and the same objects back."""

from __future__ import annotations

import asyncio
import base64
from array import array
from contextlib import asynccontextmanager

import openai
import pytest
from embedding_world import EMBEDDER, REFUSED, embedding_upstream, tokens_of, vector_of
from helpers import each, until
from openai._legacy_response import LegacyAPIResponse
from openai.types import CreateEmbeddingResponse as SDKResponse
from openai.types import Embedding as SDKEmbedding

import microbatch as mb
from microbatch.openai import AsyncOpenAI, CreateEmbeddingResponse

pytestmark = pytest.mark.slow

KEY = "sk-canary-0123456789"
TEXTS = ["a b", "c", "d e f"]


@asynccontextmanager
async def both(upstream, *, model=EMBEDDER, policy=None, **options):
    """Our client and the SDK's own."""
    transport = mb.OpenAIChat(base_url=upstream.base_url, api_key=KEY, embedding_model=model)
    policy = mb.FlushPolicy(**{"max_wait": 0.05, "idle": "wait", **(policy or {})})
    batcher = mb.Microbatcher(transport, policy=policy, tokens="bytes", retry=mb.RetryPolicy(max_attempts=1), **options)
    async with (
        AsyncOpenAI(batcher) as ours,
        openai.AsyncOpenAI(base_url=upstream.base_url, api_key=KEY, max_retries=0) as theirs,
    ):
        yield ours, theirs


@each(
    "options",
    [
        {},
        {"encoding_format": "float"},
        {"encoding_format": "base64"},
        {"dimensions": 2, "user": "u"},
        {"encoding_format": openai.omit, "dimensions": openai.NOT_GIVEN, "timeout": None},
        {"extra_body": {"dimensions": 3}, "extra_headers": {"X-A": "1"}},
    ],
)
@each("texts", ["a b", TEXTS, tuple(TEXTS)])
async def test_the_result_is_that_of_the_sdk(options, texts):
    async with embedding_upstream() as upstream, both(upstream) as (ours, theirs):
        given = list(texts) if isinstance(texts, tuple) else texts
        right = await theirs.embeddings.create(model=EMBEDDER, input=given, **options)
        found = await ours.embeddings.create(model=EMBEDDER, input=texts, **options)
    assert found.model_dump() == right.model_dump(warnings=False)
    assert isinstance(found, SDKResponse)
    assert isinstance(found, CreateEmbeddingResponse)
    assert isinstance(found.data[0], SDKEmbedding)
    assert found._request_id == "req_2"


async def test_concurrent_requests_share_a_call_and_its_cost():
    prices = {EMBEDDER: mb.Price(1_000.0, 0.0)}
    policy = {"max_wait": 60}
    async with embedding_upstream() as upstream, both(upstream, prices=prices, policy=policy) as (ours, _):
        asked = asyncio.gather(*(ours.embeddings.create(input=[f"t{n}", f"u {n}"]) for n in range(10)))
        await until(lambda: ours.batcher.stats().queued == 20)
        ours.batcher.flush()
        found = await asked
    assert len(upstream.calls) == 1
    for number, response in enumerate(found):
        vectors = [vector_of(f"t{number}").tolist(), vector_of(f"u {number}").tolist()]
        assert [element.embedding for element in response.data] == vectors
        reply = response.microbatch
        assert (reply.route, reply.batch_size, response.model) == ("batch", 20, EMBEDDER)
        assert reply.usage.prompt_tokens == response.usage.total_tokens
        assert reply.cost_usd == pytest.approx(response.usage.total_tokens / 1_000)
    assert sum(response.usage.prompt_tokens for response in found) == upstream.tokens


async def test_a_raw_response_holds_the_result():
    async with embedding_upstream() as upstream, both(upstream) as (ours, theirs):
        for client in (ours, theirs):
            response = await client.embeddings.with_raw_response.create(model=EMBEDDER, input="x")
            assert isinstance(response, LegacyAPIResponse)
            assert response.headers["x-request-id"].startswith("req_")
            assert response.parse().data[0].embedding == vector_of("x").tolist()


async def test_options_of_the_client_and_of_embed_are_respected():
    async with embedding_upstream() as upstream, both(upstream, cache=mb.MemoryCache()) as (ours, _):
        mine = ours.with_options(api_key="another", default_headers={"X-A": "1"})
        await mine.embeddings.create(input="x", extra_headers={"X-B": "2"}, tenant="t", priority="high")
        await ours.embeddings.create(input="x")
        cached = await ours.embeddings.create(input="x")
        await ours.embeddings.create(input="x", use_cache=False)
        sent = [{name: headers.get(name) for name in ("Authorization", "X-A", "X-B")} for headers in upstream.headers]
        assert sent[0] == {"Authorization": "Bearer another", "X-A": "1", "X-B": "2"}
        assert sent[1] == {"Authorization": f"Bearer {KEY}", "X-A": None, "X-B": None}
        assert len(sent) == 3
        assert (cached.microbatch.route, cached.usage.prompt_tokens) == ("cache", 0)
        upstream.go.clear()
        with pytest.raises(mb.DeadlineExceeded):
            await ours.embeddings.create(input="y", timeout=openai.Timeout(5, read=0.05))
        with pytest.raises(mb.DeadlineExceeded):
            await ours.embeddings.create(input=[1], model=EMBEDDER, timeout=0.05)


@each(
    "asked",
    [
        {"input": [1, 2, 3]},
        {"input": [[1, 2], [3]]},
        {"input": "a", "extra_body": {"late_chunking": True}},
        {"input": "a", "extra_body": {"dimensions": 0}},
    ],
)
async def test_what_cannot_be_combined_is_sent_alone_unchanged(asked):
    async with embedding_upstream() as upstream, both(upstream) as (ours, theirs):
        upstream.fault = lambda _body: None
        upstream.inputs = lambda _body: ["a", "b c"]
        right = await theirs.embeddings.create(model=EMBEDDER, encoding_format="float", **asked)
        found = await ours.embeddings.create(model=EMBEDDER, encoding_format="float", **asked)
        stats = ours.batcher.stats()
        with pytest.raises(mb.ConfigError, match="name its model"):
            await ours.embeddings.create(**asked)
    assert upstream.calls[0] == upstream.calls[1]
    assert found.model_dump() == right.model_dump()
    reply = found.microbatch
    assert (reply.route, reply.usage.prompt_tokens, reply.cost_usd) == (
        "forward",
        tokens_of("a") + tokens_of("b c"),
        None,
    )
    assert found._request_id == "req_2"
    assert stats.forwarded == sum(stats.alone_by_field.values()) == 1


async def test_errors_are_those_of_the_batcher():
    async with embedding_upstream() as upstream, both(upstream) as (ours, _):
        for texts, more in ((["good", REFUSED], {}), ([], {}), ([""], {}), (["x"] * 2_049, {})):
            with pytest.raises(mb.BadRequest):
                await ours.embeddings.create(model=EMBEDDER, input=texts, **more)
        with pytest.raises(mb.ConfigError, match="extra_query"):
            await ours.embeddings.create(input="x", extra_query={"a": "b"})
        with pytest.raises(mb.ConfigError, match="JSON"):
            await ours.embeddings.create(model=EMBEDDER, input=[object()])
        for wrong in (b"bytes", bytearray(b"bytes"), 5, {"a text": 1}):
            with pytest.raises(mb.ConfigError, match="input must be"):
                await ours.embeddings.create(model=EMBEDDER, input=wrong)
        upstream.refusal = 401, {"message": f"no such key {KEY}"}, {}
        with pytest.raises(mb.AuthFailed) as caught:
            await ours.embeddings.create(model=EMBEDDER, input=[1])
        assert KEY not in f"{caught.value!r}{caught.value.body}"
    async with embedding_upstream() as upstream, both(upstream, model=None) as (ours, _):
        with pytest.raises(mb.ConfigError, match="model"):
            await ours.embeddings.create(input="x")


async def test_base64_is_that_of_the_api():
    async with embedding_upstream() as upstream, both(upstream) as (ours, _):
        found = await ours.embeddings.create(input="x", encoding_format="base64")
    assert array("f", base64.b64decode(found.data[0].embedding)) == vector_of("x")
