"""What could have been combined and went alone is answered as the endpoint answered it."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest
from aiohttp import web
from gateway_world import MODEL, gateway, recorder
from helpers import ask

import microbatch as mb
from microbatch.gateway import GatewaySettings
from microbatch.openai import AsyncOpenAI

pytestmark = pytest.mark.slow

USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 50,
    "total_tokens": 60,  # of an endpoint that counts thoughts beside the completion
    "prompt_tokens_details": {"cached_tokens": 2, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 48, "accepted_prediction_tokens": 1},
    "queue_time": 0.25,
}
LABELS = {"type": "array", "items": {"type": "string"}}
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


def body(content, *, finish="stop", usage=USAGE, **message):
    beside = {"reasoning_content": "because", "annotations": [{"type": "url_citation", "url": "https://x"}]}
    said = {"role": "assistant", "content": content, "refusal": None, **beside, **message}
    return {
        "id": "chatcmpl-REAL",
        "object": "chat.completion",
        "created": 1,
        "model": "m-2026-01-01",
        "service_tier": "default",
        "system_fingerprint": "fp_1",
        "citations": ["https://x"],
        "choices": [{"index": 0, "finish_reason": finish, "message": said, "content_filter_results": {"hate": "safe"}}],
        "usage": usage,
    }


def typed(schema):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}}


async def answered(*bodies, settings=None, times=1, **more):
    """What the gateway answers when the endpoint answers with *bodies*, the last one for ever: the latest of *times* answers."""
    left = list(bodies)

    async def answer(_request):
        return web.json_response(left.pop(0) if len(left) > 1 else left[0], headers={"x-request-id": "req-1"})

    options = {"settings": settings, "cache": mb.MemoryCache() if times > 1 else None}
    async with recorder() as upstream, gateway(upstream.url, **options) as served, aiohttp.ClientSession() as session:
        upstream.answer = answer
        for _ in range(times):
            asked = {"model": MODEL, "messages": ask("x"), **more}
            async with session.post(f"{served.base_url}/chat/completions", json=asked) as response:
                assert response.status == 200
                told = await response.text()
                headers = response.headers
    return headers, told


def chunks(told):
    *events, last = [event.removeprefix("data: ") for event in told.strip().split("\n\n")]
    assert last == "[DONE]"
    return [json.loads(event) for event in events]


def joined(told, name):
    deltas = [choice["delta"] for chunk in chunks(told) for choice in chunk["choices"]]
    return [delta[name] for delta in deltas if delta.get(name)]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "said",
    [
        body("42"),
        body("<think>Six by seven.</think>42"),
        body([{"type": "thinking", "thinking": []}, {"type": "text", "text": "42"}]),
        body("4", finish="length"),
        body("", refusal="I will not."),
        body("so far", finish="content_filter"),
        body("42", finish="eos"),
        body("42", usage={"total_tokens": 3, "x": 1}),
        {name: value for name, value in body("42").items() if name != "usage"},
    ],
    ids=["plain", "thought", "parts", "length", "refusal", "filter", "eos", "odd-usage", "no-usage"],
)
async def test_a_text_is_handed_back_as_it_came(said, exact):
    headers, told = await answered(said, settings=GatewaySettings(exact_usage=exact))
    assert json.loads(told) == said
    if said["choices"][0]["message"]["refusal"] is None and said["choices"][0]["finish_reason"] == "stop":
        assert (headers["X-Microbatch-Route"], headers["x-request-id"]) == ("single", "req-1")


@pytest.mark.parametrize(
    ("schema", "content", "right"),
    [
        (POINT, '{"x": 1}', {"x": 1}),
        (POINT, 'Here it is:\n```json\n{"x": 1}\n```', {"x": 1}),
        (LABELS, '{"answer":["a","b"]}', ["a", "b"]),
        (LABELS, '```\n{"answer":["a","b"]}\n```', ["a", "b"]),
        (LABELS, '["a","b"]', ["a", "b"]),
        ({"type": "integer"}, '{"answer":7}', 7),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_of_a_typed_one_the_content_alone_is_what_was_asked_for(schema, content, right, streamed):
    _, told = await answered(body(content), stream=streamed, **typed(schema))
    if streamed:
        assert json.loads("".join(joined(told, "content"))) == right
        assert {chunk["id"] for chunk in chunks(told)} == {"chatcmpl-REAL"}
        return
    found = json.loads(told)
    message = found["choices"][0]["message"]
    assert json.loads(message["content"]) == right
    message["content"] = content
    assert found == body(content)


@pytest.mark.parametrize(("content", "finish", "refusal"), [('{"x": ', "length", None), (None, "stop", "I will not.")])
async def test_a_typed_one_without_a_whole_answer_comes_as_it_is(content, finish, refusal):
    said = body(content, finish=finish, refusal=refusal)
    _, told = await answered(said, **typed(POINT))
    assert json.loads(told) == said
    _, told = await answered(said, stream=True, stream_options={"include_usage": True}, **typed(POINT))
    assert joined(told, "content") == ([content] if content else [])
    assert joined(told, "refusal") == ([refusal] if refusal else [])
    assert chunks(told)[-2]["choices"][0]["finish_reason"] == finish
    assert chunks(told)[-1]["usage"] == USAGE


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("content", ["42", [{"type": "text", "text": "42"}]])
async def test_a_stream_keeps_what_its_events_have_a_place_for(content, exact):
    said = body(content, finish="eos")
    options = {"stream": True, "stream_options": {"include_usage": True}}
    _, told = await answered(said, settings=GatewaySettings(exact_usage=exact), **options)
    *events, last = chunks(told)
    for chunk in [*events, last]:
        for name in ("id", "created", "model", "service_tier", "system_fingerprint", "citations"):
            assert chunk[name] == said[name]
        assert chunk["object"] == "chat.completion.chunk"
    assert (last["choices"], last["usage"]) == ([], USAGE)
    assert events[-1]["choices"][0]["finish_reason"] == "eos"
    assert joined(told, "content") == ["42"]
    assert joined(told, "reasoning_content") == ["because"]
    assert joined(told, "annotations") == [said["choices"][0]["message"]["annotations"]]


@pytest.mark.parametrize("form", [{}, typed(POINT), typed(LABELS)], ids=["text", "object", "array"])
@pytest.mark.parametrize(
    "content", ["", " ", "I cannot answer in JSON.", "{}", '{"x": "1"}', '{"x": 1, "y": 2}', '["a", 1]', None]
)
async def test_an_answer_that_is_empty_or_does_not_fit_is_the_clients_to_judge(content, form):
    said = body(content)
    asked = []

    async def answer(request):
        asked.append(request)
        return web.json_response(said)

    async with recorder() as upstream, gateway(upstream.url) as served, aiohttp.ClientSession() as session:
        upstream.answer = answer
        asking = {"model": MODEL, "messages": ask("x"), **form}
        async with session.post(f"{served.base_url}/chat/completions", json=asking) as response:
            assert (response.status, await response.json()) == (200, said)
    assert len(asked) == 1


async def test_what_a_combined_call_left_out_costs_both_calls_and_keeps_the_details():
    async def answer(request):
        combined = b"results" in await request.read()
        return web.json_response(body('{"results":[]}' if combined else '{"x": 1}'))

    policy = {"max_batch_size": 2, "max_wait": 30}
    async with (
        recorder() as upstream,
        gateway(upstream.url, policy=policy) as served,
        aiohttp.ClientSession() as session,
    ):
        upstream.answer = answer
        asking = [
            session.post(
                f"{served.base_url}/chat/completions", json={"model": MODEL, "messages": ask(text), **typed(POINT)}
            )
            for text in "ab"
        ]
        told = [await response.json() for response in await asyncio.gather(*asking)]
        calls = served.stats().upstream_calls
    assert sum(found["usage"]["prompt_tokens"] for found in told) == 5 * calls
    assert sum(found["usage"]["completion_tokens"] for found in told) == 50 * calls
    for found in told:
        assert found["id"] == "chatcmpl-REAL"
        assert found["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == 1
        assert found["usage"]["queue_time"] == 0.25


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_kept_answer_is_nobodys_call(streamed):
    headers, told = await answered(body("42"), times=2, stream=streamed)
    assert headers["X-Microbatch-Route"] == "cache"
    assert "chatcmpl-REAL" not in told
    if not streamed:
        found = json.loads(told)
        assert found["choices"][0]["message"] == {"role": "assistant", "content": "42", "refusal": None}
        assert found["usage"]["total_tokens"] == 0


async def test_the_adapters_completions_have_it_too():
    async def answer(_request):
        return web.json_response(body("42"))

    async with recorder() as upstream:
        upstream.answer = answer
        transport = mb.OpenAIChat(MODEL, base_url=upstream.url, api_key="k")
        async with mb.Microbatcher(transport, tokens="bytes") as batcher:
            create = AsyncOpenAI(batcher).chat.completions.create
            completion = await create(model=MODEL, messages=ask("x"))
    assert completion.model_dump(exclude_unset=True) == body("42")


def test_an_error_with_the_endpoints_answer_tells_nothing_of_it():
    error = mb.TruncatedReply("cut")
    error.completion = body("secret words")
    assert "secret" not in f"{error!r} {error} {error.__reduce__()!r}"
    assert error.replica().completion == error.completion


async def test_what_keeps_requests_alone_is_counted_relayed_ones_too():
    async def answer(_request):
        return web.json_response(body("x"))

    async with recorder() as upstream, gateway(upstream.url, policy={"combine_params": ["seed"]}) as served:
        upstream.answer = answer
        async with aiohttp.ClientSession(served.base_url + "/") as client:
            for more in (
                {"stop": "x"},
                {"stop": "x", "stream": True},
                {"seed": 7},
                {"extra_body": {"google": {"n": 2}}},
            ):
                sent = {"model": MODEL, "messages": ask("x"), **more}
                async with client.post(
                    "chat/completions", json=sent, headers={"Authorization": "Bearer sk-own"}
                ) as response:
                    assert response.status == 200
        assert served.stats().alone_by_field == {"stop": 2, "n": 1}
    assert json.loads(upstream.requests[-1][3])["extra_body"] == {"google": {"n": 2}}
