"""Requests whose callers set `max_tokens`: how many share a prompt, what is sent for their limits, and replies that reach it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from bounded import Item, Label, Recorded, batcher_for, by_map, in_waves, messages, simulated, text_of_700

import microbatch as mb
from microbatch.batching.bounds import Bounds
from microbatch.batching.lane_history import LaneHistory
from microbatch.batching.request import read_options
from microbatch.messages import Usage
from microbatch.prompt.compose import LARGEST_SUM, output_reserve
from microbatch.prompt.outcome import CallOutcome, CombinedReply
from microbatch.protocols import Completion
from microbatch.testing import Quota, ScriptedTransport

FORM: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {
        "name": "x",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"why": {"type": "string"}},
            "required": ["why"],
            "additionalProperties": False,
        },
    },
}


def sizes(transport: Recorded) -> list[int]:
    """Return the number of items of each combined call."""
    said = [body["messages"][-1]["content"] for body in transport.simulated.requests]
    return [text.count("\n[") for text in said if "separate requests" in text]


@pytest.mark.parametrize("params", [None, {"response_format": FORM}, {"response_format": {"type": "json_object"}}])
@pytest.mark.parametrize("max_tokens", [500, 1_000, 4_096, 30_000])
async def test_short_answers_share_prompts_whatever_their_callers_allow(max_tokens, params):
    model = simulated()
    transport = Recorded(model)
    async with batcher_for(transport) as batcher:
        outputs = await by_map(batcher, 400, str, max_tokens=max_tokens, params=params)
    assert len(outputs) == 400
    assert model.calls <= 400 / 16 + 2
    assert transport.troubled == []
    sent = [body["max_tokens"] for body in model.requests]
    assert sent == [size * output_reserve(max_tokens) for size in sizes(transport)], "as much as they allow together"


@pytest.mark.parametrize("max_tokens", [1_000, 4_096])
async def test_the_first_batches_are_small_where_nothing_tells_the_length(max_tokens):
    transport = Recorded(simulated())
    async with batcher_for(transport) as batcher:
        await in_waves(batcher, 64, str, max_tokens=max_tokens, each=32)
    first, *others = sizes(transport)
    assert 2 <= first < 8
    assert max(others) > 12


@pytest.mark.parametrize("kind", [Label, Item])
async def test_where_the_form_tells_the_length_they_are_full(kind):
    transport = Recorded(simulated())
    async with batcher_for(transport) as batcher:
        await by_map(batcher, 64, kind, max_tokens=4_096)
    assert sizes(transport) == [16] * 4


async def test_a_limit_that_promises_short_answers_counts_until_they_are_known():
    transport = ScriptedTransport()
    policy = mb.FlushPolicy(max_batch_size=50, max_output_tokens=300)
    async with mb.Microbatcher(transport, policy=policy) as batcher:
        for _ in range(2):
            await asyncio.gather(*(batcher.submit(messages(number), max_tokens=50) for number in range(12)))
    seen = [len(call.items) for call in transport.calls]
    assert seen[:4] == [3, 3, 3, 3]
    assert seen[4:] == [12], "short answers have been seen since"


async def test_pairs_go_first_where_not_even_two_answers_are_expected_to_fit():
    transport = Recorded(simulated())
    async with mb.Microbatcher(transport, policy=mb.FlushPolicy(max_output_tokens=250)) as batcher:
        await by_map(batcher, 32, str, max_tokens=4_096)
    assert sizes(transport)[0] == 2


async def test_long_answers_make_small_batches():
    transport = Recorded(simulated(answer=text_of_700))
    async with batcher_for(transport) as batcher:
        await by_map(batcher, 96, str, max_tokens=2_000)
        assert batcher.stats().fallback_calls == 0
    assert set(sizes(transport)[8:]) == {2}, "of 2,000 tokens that a reply should take, two take 1,400"


async def test_answers_as_long_as_a_reply_go_alone_and_the_figures_say_so():
    model = simulated(answer=lambda text, _: text + " gamma" * 2_500)
    transport = Recorded(model)
    async with batcher_for(transport) as batcher:
        await by_map(batcher, 64, str, max_tokens=4_096)
        stats = batcher.stats()
    assert stats.singles_by_reason["output"] >= 50
    assert stats.failed == 0


@pytest.mark.parametrize(
    "options",
    [
        {"max_output_tokens": 16_384},
        {"max_output_tokens": 4_096},
        {"max_output_tokens": 2_048},
        {"context_tokens": 8_192},
        {"max_tokens_name": "max_completion_tokens", "max_output_tokens": 4_096},
    ],
    ids=repr,
)
async def test_what_is_more_than_the_model_allows_is_lowered_and_nothing_fails(options):
    model = simulated(**options)
    transport = Recorded(model)
    async with batcher_for(transport) as batcher:
        outputs = await by_map(batcher, 320, str, max_tokens=1_000)
        stats = batcher.stats()
    assert outputs == [model.answer(messages(number)[-1]["content"], None) for number in range(320)]
    assert (stats.failed, stats.fallback_calls) == (0, 0)
    assert len(transport.troubled) <= 2
    assert model.calls <= 320 / 16 + 6


@pytest.mark.parametrize("tpm", [12_000, 40_000, 200_000])
async def test_no_call_is_charged_more_than_the_tokens_a_minute(tpm):
    model = simulated(quota=Quota(tpm=tpm))
    transport = Recorded(model)
    async with batcher_for(transport, rate_limit=mb.RateLimit(tpm=tpm)) as batcher:
        outputs = await by_map(batcher, 96, str, max_tokens=1_000)
        assert batcher.stats().failed == 0
    assert len(outputs) == 96
    assert 0 < max(transport.charged) <= tpm
    assert model.quota_refusals == 0


@pytest.mark.parametrize("max_tokens", [60, 600, 1_500])
async def test_an_answer_longer_than_its_limit_is_asked_for_alone_and_cut_there(max_tokens):
    """In a reply of their sum, the limit of each is enforced here; the long answer may take the room of the others."""

    def answer(text: str, _schema: Any) -> str:
        return "gamma " * 4_000 if "Product 5," in text else "short"

    model = simulated(answer=answer)
    async with batcher_for(Recorded(model)) as batcher:
        asked = (batcher.submit(messages(number), max_tokens=max_tokens) for number in range(24))
        replies = await asyncio.gather(*asked)
        stats = batcher.stats()
    assert [reply.output for number, reply in enumerate(replies) if number != 5] == ["short"] * 23
    assert replies[5].route == "fallback"
    assert replies[5].batch_size == 1
    assert replies[5].finish_reason == "length"
    assert replies[5].usage.completion_tokens >= max_tokens
    assert stats.failed == 0
    assert max(body["max_tokens"] for body in model.requests) <= 16 * output_reserve(max_tokens)


def test_a_reply_that_takes_all_that_its_callers_allow_is_no_runaway():
    settings = read_options(str, "m", 300, None, None, None, None, "normal")
    reply = CombinedReply(["1bcdfg", "2bcdfg"], [str, str], early=True)
    reply.feed('{"results":[{"id":"1bcdfg","answer":"a"},{"id":"2bcdfg","answer":"b')
    completion = Completion("length", usage=Usage(99, 3_000), bound=3_000)
    outcome = CallOutcome("length", 2, [1], reply, completion, bounded=True)
    history = LaneHistory()
    judged = Bounds().judge(settings, history, outcome, lambda: 3_000)
    assert (judged.again, judged.runaway, history.doubled) == (False, False, False)


async def test_a_transport_that_knows_no_bound_is_not_sent_a_sum_that_the_model_may_refuse():
    transport = ScriptedTransport()
    async with batcher_for(transport) as batcher:
        for _ in range(3):
            await asyncio.gather(*(batcher.submit(messages(number), max_tokens=1_000) for number in range(16)))
    sent = [call.call.max_tokens for call in transport.calls]
    assert all(limit is None or limit <= LARGEST_SUM for limit in sent)
    assert len(transport.calls[-1].items) == 16
