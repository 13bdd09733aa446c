"""Tools that must be called, and json_object, through the gateway and through `AsyncOpenAI`, read by OpenAI's SDK."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from gateway_world import MODEL, QUICK
from helpers import ask

import microbatch as mb
from microbatch.gateway import Gateway
from microbatch.openai import AsyncOpenAI
from microbatch.testing import Latency, SimulatedEndpoint

PARAMETERS = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
TOOL = {"type": "function", "function": {"name": "look", "description": "Look up.", "parameters": PARAMETERS}}
NAMED = {"type": "function", "function": {"name": "look"}}
FORCED = {"tools": [TOOL], "tool_choice": NAMED}
REQUIRED = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
OBJECT = {"response_format": {"type": "json_object"}}
TEXTS = [f"json {number}" for number in range(8)]
TOGETHER = mb.FlushPolicy(idle="wait", max_wait=0.5, max_batch_size=len(TEXTS))


def endpoint(pace=QUICK, **options):
    return SimulatedEndpoint(answer=lambda text, _: {"word": text}, latency=pace, record=True, **options)


def gateway(upstream, **options):
    return Gateway(upstream.base_url, **{"policy": TOGETHER, "tokens": "bytes", **options})


def client(served):
    return openai.AsyncOpenAI(base_url=served.base_url, api_key="sk-x", max_retries=0)


async def create(asking, text, **options):
    return await asking.chat.completions.create(model=MODEL, messages=ask(text), **options)


def function_of(completion, reason):
    (choice,) = completion.choices
    assert choice.finish_reason == reason
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "look")
    assert call.id
    return json.loads(call.function.arguments)


@pytest.mark.parametrize(("params", "reason"), [(FORCED, "stop"), (REQUIRED, "tool_calls")])
@pytest.mark.parametrize("through", ["gateway", "client"])
async def test_callers_of_a_tool_share_one_call_and_get_their_own_arguments(params, reason, through):
    async with endpoint() as upstream:
        if through == "gateway":
            async with gateway(upstream) as served, client(served) as asking:
                done = await asyncio.gather(*(create(asking, text, **params) for text in TEXTS))
        else:
            transport = mb.OpenAIChat(MODEL, base_url=upstream.base_url, api_key="sk-x")
            async with AsyncOpenAI(mb.Microbatcher(transport, policy=TOGETHER, tokens="bytes")) as asking:
                done = await asyncio.gather(*(create(asking, text, **params) for text in TEXTS))
    assert [function_of(each, reason) for each in done] == [{"word": text} for text in TEXTS]
    assert len(upstream.requests) == 1
    assert not upstream.requests[0].keys() & {"tools", "tool_choice", "parallel_tool_calls"}
    for each in done:
        assert each.model == MODEL
        assert each.usage.total_tokens == each.usage.prompt_tokens + each.usage.completion_tokens > 0
    assert len({each.id for each in done}) == len(TEXTS)


@pytest.mark.parametrize(("params", "reason"), [(FORCED, "stop"), (REQUIRED, "tool_calls")])
@pytest.mark.parametrize("callers", [1, len(TEXTS)])
async def test_a_streamed_call_of_a_tool_reads_as_the_sdk_expects(params, reason, callers):
    async def read(asking, text):
        arguments, names, ids, reasons = "", [], [], []
        stream = await create(asking, text, stream=True, stream_options={"include_usage": True}, **params)
        chunks = [chunk async for chunk in stream]
        for chunk in chunks:
            for choice in chunk.choices:
                assert not choice.delta.content
                reasons += [choice.finish_reason] if choice.finish_reason else []
                for call in choice.delta.tool_calls or ():
                    assert call.index == 0
                    names += [call.function.name] if call.function.name else []
                    ids += [call.id] if call.id else []
                    arguments += call.function.arguments or ""
        assert chunks[-1].usage.total_tokens > 0
        return names, len(ids), reasons, json.loads(arguments)

    async with endpoint() as upstream, gateway(upstream, policy=mb.FlushPolicy()) as served, client(served) as asking:
        texts = TEXTS[:callers]
        done = await asyncio.gather(*(read(asking, text) for text in texts))
    assert done == [(["look"], 1, [reason], {"word": text}) for text in texts]


async def test_one_caller_alone_keeps_its_tools_and_gets_the_endpoints_own_call():
    async with endpoint() as upstream, gateway(upstream, policy=mb.FlushPolicy()) as served, client(served) as asking:
        done = await create(asking, "x", **REQUIRED)
    assert function_of(done, "tool_calls") == {"word": "x"}
    assert done.choices[0].message.tool_calls[0].id == "call_1"
    assert upstream.requests[0]["tools"] == [TOOL]
    assert upstream.requests[0]["tool_choice"] == "required"


async def test_the_turn_after_a_call_of_a_tool_goes_alone_unchanged():
    async with endpoint() as upstream, gateway(upstream) as served, client(served) as asking:
        first, *_ = await asyncio.gather(*(create(asking, text, **FORCED) for text in TEXTS))
        message = first.choices[0].message
        call = message.tool_calls[0]
        turn = [
            *ask("x"),
            message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "7"},
        ]
        await asking.chat.completions.create(model=MODEL, messages=turn, **FORCED)
    assert upstream.requests[-1]["messages"] == turn
    assert upstream.requests[-1]["tools"] == [TOOL]


@pytest.mark.parametrize("stream", [False, True])
async def test_json_object_is_combined_on_the_endpoints_json_rung(stream):
    async def read(asking, text):
        if not stream:
            return (await create(asking, text, **OBJECT)).choices[0].message.content
        chunks = [chunk async for chunk in await create(asking, text, stream=True, **OBJECT)]
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    async with endpoint() as upstream, gateway(upstream) as served, client(served) as asking:
        done = await asyncio.gather(*(read(asking, text) for text in TEXTS))
    assert [json.loads(each) for each in done] == [{"word": text} for text in TEXTS]
    assert [request["response_format"] for request in upstream.requests] == [{"type": "json_object"}]


async def test_json_object_is_combined_without_it_where_the_endpoint_refuses_it_and_schemas_stay_enforced():
    async with endpoint(json_object="400") as upstream:
        transport = mb.OpenAIChat(MODEL, base_url=upstream.base_url, api_key="sk-x")
        async with mb.Microbatcher(transport, policy=TOGETHER, tokens="bytes") as batcher:
            done = await asyncio.gather(*(batcher.submit(ask(text), params=OBJECT) for text in TEXTS))
            assert [json.loads(reply.text) for reply in done] == [{"word": text} for text in TEXTS]
            await asyncio.gather(*(batcher.submit(ask(text), params=FORCED) for text in TEXTS))
    kinds = [request.get("response_format", {}).get("type") for request in upstream.requests]
    assert kinds == ["json_object", None, "json_schema"]


async def test_a_call_of_a_tool_for_one_caller_alone_is_streamed_as_it_is_written():
    async with (
        endpoint(pace=Latency(first_token=0, tokens_per_second=50)) as upstream,
        gateway(upstream, policy=mb.FlushPolicy(), cache=mb.MemoryCache()) as served,
        client(served) as asking,
    ):
        text = "many words " * 20
        chunks = [chunk async for chunk in await create(asking, text, stream=True, temperature=0, **FORCED)]
        whole = await create(asking, text, temperature=0, **FORCED)
    pieces = [call.function.arguments for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert len(pieces) > 10
    assert json.loads("".join(pieces)) == {"word": text}
    assert upstream.requests[0]["tools"] == [TOOL]
    # What was streamed is also an answer for others.
    assert len(upstream.requests) == 1
    assert function_of(whole, "stop") == {"word": text}
