"""A batcher whose endpoint is a gateway: its combined prompts pass through, alone and as they stream."""

from __future__ import annotations

import asyncio
from typing import Literal

import pytest
from gateway_world import MODEL, Watched, gateway
from helpers import ask

import microbatch as mb
from microbatch.testing import Faults, Latency, simulated_answer

Size = Literal["small", "large"]
INSTRUCTION = "Below are separate requests, one a line"
TEXTS = [f"thing {number}" for number in range(24)]


async def through(upstream, *, output_type=str, served=None, **options):
    """Ask through a batcher that asks through a gateway; return the replies, how they stood when they came, and the figures of both."""
    policy = {"max_batch_size": 4, "idle": "wait", "max_wait": 30}
    async with gateway(upstream, policy={"max_batch_size": 8, "max_wait": 0.2, **(served or {})}) as between:
        transport = mb.OpenAIChat(MODEL, base_url=between.base_url, api_key="sk-theirs")
        async with mb.Microbatcher(transport, policy=mb.FlushPolicy(**policy), tokens="bytes", **options) as batcher:

            async def answer(text):
                reply = await batcher.submit(ask(text), output_type=output_type)
                return reply, reply.finish_reason

            replies, endings = zip(*await asyncio.gather(*map(answer, TEXTS)), strict=True)
        await transport.aclose()
        return replies, endings, batcher.stats(), between.stats()


@pytest.mark.parametrize("canary", [False, True])
@pytest.mark.parametrize("output_type", [str, Size])
async def test_a_prompt_that_was_combined_is_not_combined_again(output_type, canary):
    async with Watched(answer=simulated_answer) as upstream:
        fallback = mb.FallbackPolicy(canary=canary)
        replies, _, ours, theirs = await through(upstream, output_type=output_type, fallback=fallback)
    assert all(isinstance(reply.output, str) for reply in replies)
    assert {reply.route for reply in replies} == {"batch"}
    assert [told.count(INSTRUCTION) for _, told in upstream.heard] == [1] * 6
    assert (ours.upstream_calls, ours.fallback_calls, theirs.batches, theirs.forwarded) == (6, 0, 0, 6)


async def test_nor_is_one_that_asks_again():
    faults = Faults("next_id", rate=1, limit=3)  # two of four answers are open, so they are asked for again together
    async with Watched(faults=faults) as upstream:
        replies, _, ours, theirs = await through(upstream)
    assert [reply.output for reply in replies] == [f"re: {text}" for text in TEXTS]
    counts = [told.count(INSTRUCTION) for _, told in upstream.heard]
    assert max(counts) == 1
    assert sum(counts) > 6
    # Requests that a damaged reply to a pair leaves open are asked for alone, and the gateway may combine them.
    assert (ours.fallback_calls > 0, theirs.forwarded + theirs.batches) == (True, sum(counts))


async def test_its_answers_still_arrive_while_the_reply_streams():
    async with Watched(latency=Latency(first_token=0, tokens_per_second=0, element=0.2)) as upstream:
        _, endings, *_ = await through(upstream)
    assert endings.count(None) >= len(TEXTS) // 2  # the rest of the reply was still on its way
