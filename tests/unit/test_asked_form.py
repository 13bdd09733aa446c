"""A tool that must be called, and json_object, are combined as the schemas that they are, and handed back as what was asked for."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from helpers import ask, batcher_for, submit_all

import microbatch as mb
from microbatch.protocols import Completion
from microbatch.schema.answer_type import asked_answer_type
from microbatch.testing import ScriptedTransport

PARAMETERS = {
    "type": "object",
    "properties": {"word": {"type": "string"}, "note": {"type": "string"}},
    "required": ["word"],
}
FUNCTION = {"name": "look", "description": 'Look\n"up".', "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
OTHER = {"type": "function", "function": {"name": "other", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "look"}}
FORCED = {"tools": [TOOL], "tool_choice": NAMED}
REQUIRED = {"tools": [TOOL], "tool_choice": "required"}
LEGACY = {"functions": [FUNCTION], "function_call": {"name": "look"}}
OBJECT = {"response_format": {"type": "json_object"}}
TEXTS = ["a", "b", "c"]


NODE = {
    "type": "object",
    "properties": {"word": {"type": "string"}, "next": {"$ref": "#/$defs/Node"}},
    "required": ["word"],
}


def word(text: str) -> dict[str, Any]:
    return {"word": text}


def tool_with(**members: Any) -> dict[str, Any]:
    return {"type": "function", "function": {**FUNCTION, **members}}


def called(arguments: str, **more: Any) -> dict[str, Any]:
    """Return the body of an endpoint's reply that calls the tool."""
    call = {"id": "call_theirs", "type": "function", "function": {"name": "look", "arguments": arguments}}
    message = {"role": "assistant", "content": None, "tool_calls": [call], **more}
    return {"id": "theirs", "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}


def says(body: dict[str, Any], text: str = "", finish_reason: str = "tool_calls") -> Any:
    return lambda _: (text, Completion(finish_reason, body=body))


def function_in(reply: mb.Reply[Any]) -> dict[str, Any]:
    assert reply.body is not None
    (choice,) = reply.body["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["id"]
    return call["function"]


@pytest.mark.parametrize(
    "params",
    [
        FORCED,
        REQUIRED,
        {"tools": [TOOL], "tool_choice": "any"},
        {**FORCED, "parallel_tool_calls": False},
        {**FORCED, "parallel_tool_calls": None, "functions": None},
        {"tools": [OTHER, TOOL], "tool_choice": NAMED},
        {"tools": [tool_with(parameters={"$ref": "#/$defs/A", "$defs": {"A": PARAMETERS}})], "tool_choice": NAMED},
        {"tools": [tool_with(parameters={"$defs": {"Node": NODE}, **NODE})], "tool_choice": "required"},
        {**FORCED, "top_p": 0.5},
        LEGACY,
        OBJECT,
        {**OBJECT, "tools": []},
        {"tool_choice": "required"},
    ],
    ids=str,
)
async def test_what_asks_for_one_form_is_combined(params: dict[str, Any]) -> None:
    form = asked_answer_type(params)
    transport = ScriptedTransport(answer=str.upper if form is None else word)
    async with batcher_for(transport) as batcher:
        replies = await submit_all(batcher, TEXTS, params=params)
    assert len(transport.calls) == 1
    assert {reply.route for reply in replies} == {"batch"}
    if form is not None:
        assert [json.loads(reply.output) for reply in replies] == [word(text) for text in TEXTS]
        assert transport.calls[0].call.params.keys() <= {"top_p"}


@pytest.mark.parametrize(
    "params",
    [
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": "auto"},
        {"tools": [TOOL], "tool_choice": "none"},
        {"tools": [TOOL, OTHER], "tool_choice": "required"},
        {"tools": [OTHER], "tool_choice": NAMED},
        {"tools": [TOOL, TOOL], "tool_choice": NAMED},
        {**FORCED, "parallel_tool_calls": True},
        {**FORCED, **LEGACY},
        {**FORCED, **OBJECT},
        {**FORCED, "n": 2},
        {"tools": [{**TOOL, "cache_control": {"type": "ephemeral"}}], "tool_choice": NAMED},
        {"tools": [{"type": "custom", "custom": {"name": "look"}}], "tool_choice": "required"},
        {"tools": [tool_with(parameters={"properties": {"a": {"type": 5}}, "type": "object"})], "tool_choice": NAMED},
        {"tools": [tool_with(parameters={})], "tool_choice": NAMED},
        {"tools": [tool_with(parameters=True)], "tool_choice": NAMED},
        {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "look"}},
        {
            "tools": [TOOL],
            "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}},
        },
        {"functions": [FUNCTION], "function_call": "auto"},
        {"response_format": {"type": "json_object", "schema": PARAMETERS}},
        {"tools": "look", "tool_choice": "required"},
    ],
    ids=str,
)
async def test_what_leaves_the_form_open_goes_alone_unchanged(params: dict[str, Any]) -> None:
    transport = ScriptedTransport()
    async with batcher_for(transport) as batcher:
        replies = await submit_all(batcher, TEXTS, params=params)
    assert [call.call.params for call in transport.calls] == [params] * 3
    assert {reply.route for reply in replies} == {"single"}


@pytest.mark.parametrize(
    "message", [{"role": "tool", "tool_call_id": "1", "content": "x"}, {"role": "assistant", "content": "x"}]
)
async def test_a_conversation_that_is_past_the_users_question_goes_alone(message: dict[str, Any]) -> None:
    transport = ScriptedTransport()
    asked = [*ask("x"), {"role": "assistant", "content": None, "tool_calls": [called("{}")["choices"][0]]}, message]
    async with batcher_for(transport) as batcher:
        await asyncio.gather(*(batcher.submit(asked, params=FORCED, use_cache=False) for _ in range(2)))
    assert [call.call.params for call in transport.calls] == [FORCED] * 2


async def test_a_combined_call_says_which_function_its_answers_call() -> None:
    transport = ScriptedTransport(answer=word)
    tool = tool_with(parameters={"$schema": "http://json-schema.org/draft-07/schema#", **PARAMETERS})
    async with batcher_for(transport) as batcher:
        await submit_all(batcher, TEXTS, params={"tools": [tool], "tool_choice": NAMED})
    (call,) = transport.calls
    words = 'Each answer holds the arguments of a call of the function "look" ("Look\\n\\"up\\"."), as JSON matching this JSON Schema: '
    text = call.call.messages[-1]["content"]
    assert json.loads(text.partition(words)[2].partition("\n")[0]) == PARAMETERS
    assert call.call.schema["properties"]["results"]["items"]["properties"]["answer"] == PARAMETERS


@pytest.mark.parametrize("strict", [None, False, True])
async def test_only_a_strict_tool_is_enforced_strictly(strict: bool | None) -> None:
    transport = ScriptedTransport(answer=word)
    closed = {**PARAMETERS, "required": ["word", "note"], "additionalProperties": False}
    tool = tool_with(strict=strict, parameters=closed)
    async with batcher_for(transport) as batcher:
        await submit_all(batcher, TEXTS, params={"tools": [tool], "tool_choice": NAMED})
    assert transport.calls[0].call.strict is (strict is True)


@pytest.mark.parametrize(("params", "reason"), [(FORCED, "stop"), (REQUIRED, "tool_calls")])
async def test_an_answer_of_a_combined_reply_is_handed_back_as_a_call_of_the_tool(params, reason) -> None:
    async with batcher_for(ScriptedTransport(answer=word)) as batcher:
        replies = await submit_all(batcher, TEXTS, params=params)
    for text, reply in zip(TEXTS, replies, strict=True):
        assert function_in(reply) == {"name": "look", "arguments": reply.text}
        assert json.loads(reply.text) == word(text)
        assert reply.body["choices"][0]["finish_reason"] == reason
        assert reply.body["choices"][0]["message"]["content"] is None
    ids = {reply.body["choices"][0]["message"]["tool_calls"][0]["id"] for reply in replies}
    assert len(ids) == len(TEXTS)
    assert all(len(each) == 9 and each.isalnum() for each in ids)  # Mistral takes no other id back


async def test_a_call_of_a_legacy_function_has_its_older_name() -> None:
    async with batcher_for(ScriptedTransport(answer=word)) as batcher:
        reply, *_ = await submit_all(batcher, TEXTS, params=LEGACY)
    assert reply.body["choices"][0]["message"]["function_call"] == {"name": "look", "arguments": '{"word":"a"}'}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (called('{"word":"x"}'), '{"word":"x"}'),
        (called('{"wrong":1}'), '{"wrong":1}'),
        (called("no JSON"), "no JSON"),
        ({"choices": [{"message": {"content": "No."}, "finish_reason": "stop"}]}, "No."),
    ],
    ids=["fits", "does not fit", "is no JSON", "calls nothing"],
)
async def test_a_request_alone_keeps_its_tools_and_gets_the_endpoints_own_reply(body, text) -> None:
    transport = ScriptedTransport(says(body, "" if "tool_calls" in str(body) else text))
    async with batcher_for(transport) as batcher:
        reply = await batcher.submit(ask("a"), params={**FORCED, "top_p": 1})
    (call,) = transport.calls
    assert call.call.params == {**FORCED, "top_p": 1}
    assert call.call.schema is None
    assert call.call.hint is None
    assert (reply.body, reply.text, reply.route) == (body, text, "single")


async def test_arguments_that_do_not_fit_are_asked_for_again_alone_and_then_relayed() -> None:
    own = called('{"still": "wrong"}')
    transport = ScriptedTransport(
        lambda call: call.reply([(name, {"wrong": 1} if text == "b" else word(text)) for name, text in call.items]),
        says(own),
    )
    async with batcher_for(transport) as batcher:
        replies = await submit_all(batcher, TEXTS, params=FORCED)
    assert [reply.route for reply in replies] == ["batch", "fallback", "batch"]
    assert replies[1].body == own
    assert transport.calls[1].call.params == FORCED
    assert len(transport.calls) == 2


async def test_any_object_is_an_answer_to_json_object_and_nothing_else_is() -> None:
    values = {"a": {}, "b": [1], "c": {"deep": {"er": None}}}
    transport = ScriptedTransport(
        lambda call: call.reply([(name, values[text]) for name, text in call.items]),
        says({"choices": []}, "no object", "stop"),
    )
    async with batcher_for(transport) as batcher:
        replies = await submit_all(batcher, TEXTS, params=OBJECT)
    assert [reply.text for reply in replies] == ["{}", "no object", '{"deep":{"er":null}}']
    assert transport.calls[0].call.json_object
    assert transport.calls[0].call.params == {}
    assert transport.calls[1].call.params == OBJECT


@pytest.mark.parametrize("params", [OBJECT, FORCED], ids=["object", "tool"])
async def test_an_object_in_a_string_is_the_object(params: dict[str, Any]) -> None:
    transport = ScriptedTransport(answer=lambda text: json.dumps(word(text)))
    async with batcher_for(transport) as batcher:
        replies = await submit_all(batcher, TEXTS, params=params)
    assert [json.loads(reply.text) for reply in replies] == [word(text) for text in TEXTS]
    assert len(transport.calls) == 1


async def test_the_cache_hands_a_tools_answer_back_as_a_call_and_to_no_other_request() -> None:
    transport = ScriptedTransport(answer=word)
    schema = {"type": "json_schema", "json_schema": {"name": "look", "schema": PARAMETERS, "strict": False}}
    async with batcher_for(transport, mb.MemoryCache()) as batcher:
        await submit_all(batcher, TEXTS, params=FORCED)
        hit = await batcher.submit(ask("a"), params=FORCED)
        assert hit.route == "cache"
        assert function_in(hit) == {"name": "look", "arguments": '{"word":"a"}'}
        for params in (
            REQUIRED,
            OBJECT,
            {"response_format": schema},
            {"tools": [tool_with(name="see")], "tool_choice": "required"},
        ):
            other = await batcher.submit(ask("a"), params=params)
            assert other.route == "single"


async def test_the_cache_keeps_the_endpoints_own_reply_to_a_request_alone() -> None:
    body = called('{"wrong":1}')
    async with batcher_for(ScriptedTransport(says(body, "", "stop")), mb.MemoryCache()) as batcher:
        first = await batcher.submit(ask("a"), params=FORCED)
        second = await batcher.submit(ask("a"), params=FORCED)
    assert (first.route, second.route) == ("single", "cache")
    assert first.body == second.body == body


async def test_equal_requests_under_way_share_a_call_of_the_tool() -> None:
    transport = ScriptedTransport(answer=word)
    async with batcher_for(transport, share=True) as batcher:
        replies = await submit_all(batcher, ["a", "a", "b"], params=FORCED)
    assert len(transport.calls[0].items) == 2
    assert [json.loads(function_in(reply)["arguments"]) for reply in replies] == [word(text) for text in "aab"]
    assert replies[0].body is not replies[1].body


async def test_what_the_caller_changes_later_changes_nothing() -> None:
    parameters = json.loads(json.dumps(PARAMETERS))
    transport = ScriptedTransport(answer=word)
    async with batcher_for(transport) as batcher:
        params = {"tools": [tool_with(parameters=parameters)], "tool_choice": NAMED}
        asked = asyncio.gather(*(batcher.submit(ask(text), params=params) for text in TEXTS))
        await asyncio.sleep(0)
        parameters["properties"]["word"]["type"] = "integer"
        assert [json.loads(reply.text) for reply in await asked] == [word(text) for text in TEXTS]
