"""The objects of `microbatch.openai`: the SDK's shape, whatever an endpoint says, and no word of it in a repr."""

from __future__ import annotations

import copy
import json
import pickle

import msgspec
import openai
import pydantic
import pytest
from helpers import ask, batcher_for
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion as SDKCompletion
from openai.types.chat import ChatCompletionChunk as SDKChunk
from openai.types.chat import ChatCompletionMessage as SDKMessage
from openai.types.completion_usage import CompletionUsage as SDKUsage

import microbatch as mb
from microbatch.openai import AsyncOpenAI, ChatCompletion, ChatCompletionChunk, Object
from microbatch.openai.chat_completion import completion_of, usage_share
from microbatch.testing import ScriptedTransport

BODY = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1_700_000_000,
    "model": "m-2025-01-01",
    "system_fingerprint": "fp_1",
    "service_tier": "default",
    "choices": [
        {
            "index": 0,
            "finish_reason": "tool_calls",
            "logprobs": {
                "content": [{"token": "a", "bytes": [97], "logprob": -0.5, "top_logprobs": []}],
                "refusal": None,
            },
            "message": {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "annotations": [],
                "reasoning_details": [{"text": "hm"}],
                "tool_calls": [
                    {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
                    {"id": "call_2", "type": "custom", "custom": {"name": "g", "input": "y"}},
                ],
            },
        }
    ],
    "usage": {
        "prompt_tokens": 9,
        "completion_tokens": 3,
        "total_tokens": 12,
        "completion_tokens_details": {"reasoning_tokens": 2},
    },
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def paths(value, path=()):
    """Every place in a JSON value, as the steps that lead to it."""
    yield path
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, part in steps:
        yield from paths(part, (*path, step))


def follow(thing, path):
    for step in path:
        thing = getattr(thing, step) if isinstance(step, str) else thing[step]
    return thing


def test_every_place_in_a_body_is_reached_by_attributes_as_in_the_sdk():
    ours, theirs = ChatCompletion(BODY), SDKCompletion.model_validate(BODY)
    for path in paths(BODY):
        if "reasoning_details" in path and path[-1] != "reasoning_details":
            continue  # the SDK does not know it and leaves dicts in it
        found = follow(ours, path)
        if not isinstance(found, dict | list):
            assert found == follow(theirs, path), path


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ChatCompletion(BODY), SDKCompletion),
        (ChatCompletion(BODY).choices[0].message, SDKMessage),
        (ChatCompletion(BODY).usage, SDKUsage),
        (ChatCompletionChunk({}), SDKChunk),
    ],
)
def test_what_the_sdk_declares_reads_as_none_where_the_endpoint_is_silent(ours, theirs):
    for name in theirs.model_fields:
        if name not in ours:
            assert getattr(ours, name) is None, name


def test_a_name_that_nobody_knows_is_an_attribute_error():
    with pytest.raises(AttributeError, match="ChatCompletionMessage has no 'contents'"):
        _ = ChatCompletion(BODY).choices[0].message.contents


def test_dumps_are_those_of_pydantic():
    ours, theirs = ChatCompletion(BODY), SDKCompletion.model_validate(BODY)
    assert ours.to_dict() == theirs.to_dict() == BODY
    assert ours.model_dump(exclude_none=True) == theirs.model_dump(exclude_none=True)
    assert json.loads(ours.to_json()) == json.loads(theirs.to_json()) == BODY
    assert json.loads(ours.model_dump_json(indent=2)).keys() >= BODY.keys()
    assert ours.model_dump()["moderation"] is None
    assert SDKCompletion.model_validate(ours.model_dump()).to_dict().items() >= {"id": "chatcmpl-1"}.items()


@given(st.dictionaries(st.text(), JSON))
def test_any_json_object_comes_out_as_it_went_in(members):
    made = Object(members)
    assert made == members
    assert msgspec.json.decode(msgspec.json.encode(made)) == made.to_dict() == json.loads(made.to_json())
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == members


def test_a_message_goes_back_into_the_conversation_as_it_came():
    message = ChatCompletion(BODY).choices[0].message
    message.parsed = object()
    assert json.loads(msgspec.json.encode([message])) == [BODY["choices"][0]["message"]]


def test_attributes_can_be_set_and_are_dumped():
    completion = ChatCompletion(BODY)
    completion.choices[0].message.content = "[redacted]"
    assert completion.to_dict()["choices"][0]["message"]["content"] == "[redacted]"
    assert BODY["choices"][0]["message"]["content"] is None


def test_no_word_of_an_answer_is_in_a_repr():
    completion = ChatCompletion({**BODY, "choices": [{"index": 0, "message": {"content": "canary"}}]})
    assert "canary" not in f"{completion!r} {completion} {completion.choices} {completion.choices[0].message}"


class Model(pydantic.BaseModel):
    x: int


@pytest.mark.parametrize(
    ("parsed", "dumped"), [(Model(x=1), {"x": 1}), ([Model(x=1)], [{"x": 1}]), (mb.Usage(1), None), ("word", "word")]
)
def test_what_was_parsed_is_dumped_as_json_has_it(parsed, dumped):
    message = ChatCompletion(BODY).choices[0].message
    message.parsed = parsed
    assert message.model_dump(mode="json")["parsed"] == (msgspec.to_builtins(parsed) if dumped is None else dumped)


@pytest.mark.parametrize("reported", [(9, 3), (8, 3), (9, 4)])
def test_details_of_usage_stay_only_where_all_of_it_is_the_callers(reported):
    share = mb.Usage(*reported, cached_tokens=4)
    usage = usage_share(mb.Reply("", "", "single", share, body=BODY))
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (*reported, sum(reported))
    assert ("completion_tokens_details" in usage) == (reported == (9, 3))
    assert usage.get("prompt_tokens_details") == (None if reported == (9, 3) else {"cached_tokens": 4})


@pytest.mark.parametrize(
    ("batch_size", "ended", "told"),
    [(1, "length", "length"), (1, None, "stop"), (4, "length", "stop"), (4, None, "stop")],
)
def test_an_answer_within_a_combined_reply_was_complete_however_that_reply_ended(batch_size, ended, told):
    reply = mb.Reply("a", "a", "batch", mb.Usage(), batch_size=batch_size, finish_reason=ended)
    assert completion_of(reply, "m")["choices"][0]["finish_reason"] == told


# --- what is asked


def shout(call):
    return call.messages[-1]["content"].upper()


async def sent(**arguments):
    """The call that reaches the transport."""
    transport = ScriptedTransport()
    async with AsyncOpenAI(batcher_for(transport)) as client:
        await client.chat.completions.create(messages=ask("a"), **arguments)
    return transport.calls[0].call


async def test_nothing_given_is_nothing_sent_whatever_the_word_for_it():
    for word in (None, openai.omit, openai.NOT_GIVEN):
        call = await sent(model=word, temperature=word, max_tokens=word, tools=word, seed=word, stream=False)
        assert (call.model, call.params, call.max_tokens) == (None, {}, None)


async def test_arguments_reach_the_transport_under_their_names():
    call = await sent(
        model="m",
        temperature=0.5,
        max_completion_tokens=7,
        user="u",
        extra_body={"user": "v"},
        extra_headers={"A": "b"},
    )
    assert (call.model, call.max_tokens, call.params) == ("m", 7, {"temperature": 0.5, "user": "v"})
    assert call.headers == {"a": "b"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 1, "max_completion_tokens": 1}, "not both"),
        ({"extra_query": {"a": "b"}}, "OpenAIChat"),
        ({"response_format": Model}, r"parse\(\) takes the type Model"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"n": 2, "response_format": {"type": object()}}, "response_format must be JSON"),
        ({"stream": True}, "name its model"),
        ({"stream": True, "model": "m", "user": object()}, "cannot be written as JSON"),
        ({"stream": True, "model": "m", "timeout": -1}, "timeout"),
        ({"stream": True, "model": "m"}, "has no forward"),
    ],
)
async def test_misuse_is_named_and_nothing_is_sent(arguments, message):
    transport = ScriptedTransport()
    async with AsyncOpenAI(batcher_for(transport)) as client:
        with pytest.raises(mb.ConfigError, match=message):
            await client.chat.completions.create(messages=ask("a"), **arguments)
        with pytest.raises(mb.ConfigError, match=r"create\(stream=True\)"):
            await client.chat.completions.parse(messages=ask("a"), response_format=Model, stream=True)
    assert not transport.calls


async def test_a_transport_without_bodies_gives_completions_all_the_same():
    async with AsyncOpenAI(batcher_for(ScriptedTransport())) as client:
        completion = await client.chat.completions.create(messages=ask("a"), model="m")
    assert completion.microbatch.body is None
    assert SDKCompletion.model_validate(completion.to_dict())
    assert completion.choices[0].finish_reason == "stop"
    assert completion.id != (await _another()).id


async def _another():
    async with AsyncOpenAI(batcher_for(ScriptedTransport())) as client:
        return await client.chat.completions.create(messages=ask("a"), model="m")


async def test_a_batcher_that_is_open_stays_open():
    async with batcher_for(ScriptedTransport()) as batcher:
        client = AsyncOpenAI(batcher)
        await client.chat.completions.create(messages=ask("a"))
        assert "open" in repr(client)
        await client.close()
        assert "closed" in repr(client)
