"""`embed` over sockets, against the simulated endpoint: OpenAI's limits, its words, and what goes wrong."""

import asyncio
import random
from typing import get_args

import pytest
from helpers import batcher_for, each

import microbatch as mb
from microbatch.testing import EmbeddingFaults, SimulatedEmbeddings, SimulatedEndpoint, embedded
from microbatch.testing.embedding_faults import EmbeddingFault

MODEL = "small"
KINDS = get_args(EmbeddingFault)


def endpoint_with(**options):
    return SimulatedEndpoint(embeddings=SimulatedEmbeddings(**{"dimensions": 32, **options}))


def transport_to(endpoint, **options):
    return mb.OpenAIChat(base_url=endpoint.base_url, api_key="k", embedding_model=MODEL, **options)


def texts(count):
    return [f"question {number} about the order" for number in range(count)]


@each("wanted", [texts(1), texts(1_000)])
async def test_each_text_gets_its_vector_over_sockets(wanted):
    async with endpoint_with() as endpoint, batcher_for(transport_to(endpoint)) as batcher:
        found = await asyncio.gather(*(batcher.embed(text) for text in wanted))
        vectors = SimulatedEmbeddings(dimensions=32)
        assert all(one.vector == vectors.vector(text, MODEL) for one, text in zip(found, wanted, strict=True))
        assert endpoint.embedding_calls <= 8
        stats = batcher.stats()
        assert sum(one.usage.prompt_tokens for one in found) == stats.prompt_tokens > 0


async def test_openais_limits_on_a_list_are_kept():
    async with SimulatedEndpoint() as endpoint:
        transport = mb.OpenAIChat(base_url=endpoint.base_url, api_key="k", embedding_model="text-embedding-3-small")
        async with mb.Microbatcher(transport) as batcher:
            wanted = [f"{number} " + "word and another " * 130 for number in range(1_500)]  # 590,000 tokens
            found = await batcher.embed_many(wanted, dimensions=8)
            assert [one.vector for one in found[::500]] == [
                embedded(text, "text-embedding-3-small", 8) for text in wanted[::500]
            ]
            stats = batcher.stats()
            assert stats.upstream_calls == endpoint.embedding_calls  # none was refused
            assert stats.upstream_calls <= 4


async def test_one_text_that_is_too_long_costs_the_others_nothing_but_a_search():
    async with endpoint_with(max_input_tokens=50) as endpoint, batcher_for(transport_to(endpoint)) as batcher:
        wanted = [*texts(40), "long " * 100, *texts(80)[40:]]
        found = await asyncio.gather(*(batcher.embed(text) for text in wanted), return_exceptions=True)
        assert [place for place, one in enumerate(found) if not isinstance(one, mb.Embedding)] == [40]
        assert isinstance(found[40], mb.BadRequest | mb.ContextTooLong)
        assert batcher.stats().upstream_calls <= 1 + 2 * 7


async def test_a_server_that_takes_short_lists_only_is_learned_from():
    async with endpoint_with(max_inputs=32) as endpoint, batcher_for(transport_to(endpoint)) as batcher:
        await batcher.embed_many(texts(256))
        before = batcher.upstream_calls
        await batcher.embed_many([f"more {text}" for text in texts(256)])
        assert batcher.upstream_calls - before == 8


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("hang", "http_400")])
async def test_no_fault_of_a_reply_hands_out_a_wrong_vector_or_loses_a_text(kind):
    faults = EmbeddingFaults(kind, rate=0.3, seed=3, retry_after=0.05)
    retry = mb.RetryPolicy(base=0.01, max_attempts=10, budget=10.0)
    async with endpoint_with(faults=faults) as endpoint, batcher_for(transport_to(endpoint), retry=retry) as batcher:
        wanted = texts(600)
        tasks = []
        for start in range(0, 600, 50):
            tasks += [asyncio.ensure_future(batcher.embed(text)) for text in wanted[start : start + 50]]
            await asyncio.sleep(0.01)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        vectors = SimulatedEmbeddings(dimensions=32)
        for one, text in zip(found, wanted, strict=True):
            if isinstance(one, mb.Embedding):
                assert one.vector == vectors.vector(text, MODEL)
            else:
                assert isinstance(one, mb.RequestFailed), repr(one)
        assert sum(isinstance(one, mb.Embedding) for one in found) > 500
        stats = batcher.stats()
        assert stats.queued == stats.in_flight == 0
        shares = sum(one.usage.prompt_tokens for one in found if isinstance(one, mb.Embedding))
        assert shares + stats.unclaimed.prompt_tokens == stats.prompt_tokens


async def test_callers_that_leave_connections_that_break_and_a_close_in_the_middle_leave_nothing_behind():
    draw = random.Random(5)
    faults = EmbeddingFaults([*KINDS], rate=0.4, seed=5, retry_after=0.01)
    retry = mb.RetryPolicy(base=0.01, budget=10.0)
    async with endpoint_with(faults=faults) as endpoint:
        batcher = await batcher_for(transport_to(endpoint, timeout=2.0), retry=retry, max_wait=0.01).open()

        async def call(text):
            await asyncio.sleep(draw.random())
            return await batcher.embed(text)

        wanted = texts(500)
        tasks = [asyncio.ensure_future(call(text)) for text in wanted]
        for task in draw.sample(tasks, 50):
            asyncio.get_running_loop().call_later(draw.random(), task.cancel)
        await asyncio.sleep(1.5)
        await batcher.aclose(grace=0.5)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        vectors = SimulatedEmbeddings(dimensions=32)
        for one, text in zip(found, wanted, strict=True):
            if isinstance(one, mb.Embedding):
                assert one.vector == vectors.vector(text, MODEL)
            else:
                assert isinstance(one, mb.RequestFailed | mb.BatcherClosed | asyncio.CancelledError), repr(one)
        stats = batcher.stats()
        assert stats.queued == 0
        assert stats.items == stats.answered + stats.failed + stats.cancelled
