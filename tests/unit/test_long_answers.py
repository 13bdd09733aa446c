"""Answers as long as their callers allow, or longer, where earlier ones were short: cut, and asked for again."""

import asyncio
import random

import pytest
from helpers import ask, batcher_for

import microbatch as mb
from microbatch.testing import Latency, SimulatedTransport
from microbatch.testing.model import SimulatedModel

COUNT = 32

PROFILES = {
    "one in ten is too long": lambda n, most, rng: most * 3 // 2 if n % 10 == 7 else 20,
    "all are just short enough": lambda n, most, rng: most - 20,
    "all are too long": lambda n, most, rng: most + 200,
    "long after short ones": lambda n, most, rng: 20 if n < COUNT // 2 else most - 30,
    "short after long ones": lambda n, most, rng: most - 30 if n < COUNT // 2 else 20,
    "any": lambda n, most, rng: rng.choice([20, most // 2, most - 10, most + 10, 2 * most]),
}
"""The tokens of the answers, by number, limit and a source of random numbers."""


def text_of(number, tokens):
    return f"a{number} " + "word " * (tokens - 3) + "end"


@pytest.mark.parametrize(
    ("max_tokens", "limits"),
    [
        (500, {}),
        (500, {"context_tokens": 4_096}),
        (1_000, {"max_output_tokens": 4_096}),
        (4_096, {"context_tokens": 8_192}),
    ],
)
@pytest.mark.parametrize("profile", PROFILES)
async def test_every_answer_that_a_limit_cuts_is_asked_for_again_and_no_call_is_made_without_end(
    profile, max_tokens, limits
):
    rng = random.Random(1)
    lengths = [PROFILES[profile](number, max_tokens, rng) for number in range(COUNT)]

    def answer(text, _):
        number = int(text.split()[0])
        return text_of(number, lengths[number])

    model = SimulatedModel(answer=answer, latency=Latency(first_token=0.1, tokens_per_second=1_000), **limits)
    async with batcher_for(
        SimulatedTransport(model), max_batch_size=16, max_wait=0.05, fallback=mb.FallbackPolicy()
    ) as batcher:

        async def asked(number):
            await asyncio.sleep(60 * (number // (COUNT // 2)))  # the second half meets what is known of the first
            return await batcher.submit(ask(f"{number} text"), max_tokens=max_tokens)

        replies = await asyncio.gather(*map(asked, range(COUNT)))
    for number, (reply, tokens) in enumerate(zip(replies, lengths, strict=True)):
        whole = text_of(number, tokens)
        if tokens <= max_tokens - 10:
            assert reply.text == whole
            assert reply.batch_size > 1 or reply.finish_reason == "stop"
        elif reply.text != whole:  # as the endpoint gives it to one who asks alone
            assert (reply.finish_reason, reply.batch_size) == ("length", 1)
            assert whole.startswith(reply.text)
            assert reply.usage.completion_tokens >= max_tokens
    assert model.calls <= 2 * COUNT
