"""Calls of tools in streams are joined, as the endpoint would have sent them whole."""

from __future__ import annotations

import json

import pytest

from microbatch.transports.reply_reader import ReplyReader
from microbatch.transports.tool_calls import ToolCalls


def read(*deltas):
    reader = ReplyReader()
    for delta in deltas:
        assert reader.event(json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode()) == ""
    return reader.calls.joined()


def piece(arguments, **more):
    return {"function": {"arguments": arguments}, **more}


def call(name, arguments, id_="call_1"):
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_pieces_are_joined_by_their_place():
    calls = read(
        {"role": "assistant", "content": None, "tool_calls": [{**call("f", ""), "index": 0}]},
        {"tool_calls": [piece('{"a":', index=0)]},
        {"tool_calls": [{**call("g", "{", "call_2"), "index": 1}, piece("1}", index=0)]},
        {"tool_calls": [piece("}", index=1, id=None, type=None)]},
    )
    assert calls == [call("f", '{"a":1}'), call("g", "{}", "call_2")]


@pytest.mark.parametrize("calls", [[call("f", "{}")], [{**call("f", "{}"), "index": None}]])
def test_calls_without_a_place_have_that_of_the_list(calls):
    assert read({"tool_calls": calls}) == [call("f", "{}")]


@pytest.mark.parametrize("delta", [{"content": None}, {"tool_calls": []}, {"tool_calls": None}, {"tool_calls": "odd"}])
def test_without_calls_none_are_joined(delta):
    assert read(delta) == []


def test_a_whole_reply_keeps_its_own_body():
    whole = {
        "id": "x",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"tool_calls": [call("f", "{}")]}}],
    }
    reader = ReplyReader()
    reader.whole(json.dumps(whole).encode())
    assert reader.completion(None).body == whole


FIRST = {"index": 0, **call("f", "", "a")}


@pytest.mark.parametrize(
    "pieces",
    [
        [[FIRST], [piece('{"n"')], [piece(":1}", index="0")]],
        [[{**FIRST, "function": {"name": "f", "arguments": '{"n":1}'}}]],
        [[FIRST], [{"index": 0, "id": "", "function": {"name": "f", "arguments": '{"n":1}'}}]],
        [[{**FIRST, "type": None}], [piece('{"n":1}', index=0)], [piece(None, index=0)]],
        [None, [], [FIRST], [piece('{"n":1}', index=0)], {}, [{"index": 0}]],
    ],
)
def test_a_call_is_joined_in_every_spelling_of_endpoints(pieces):
    calls = ToolCalls()
    for each in pieces:
        calls.take(each)
    assert calls.joined() == [call("f", '{"n":1}', "a")]


def test_halves_of_a_character_in_two_pieces_are_joined_and_lone_ones_replaced():
    first = piece('{"a":"\ud83d', index=0, id="call_1")
    first["function"]["name"] = "f\ud83d"
    assert read({"tool_calls": [first]}, {"tool_calls": [piece('\ude00"}', index=0)]}) == [
        call("f\ufffd", '{"a":"\U0001f600"}')
    ]


@pytest.mark.parametrize("index", [{}, {"index": 0}, {"index": None}, {"index": "0"}])
@pytest.mark.parametrize("names", ["fg", "ff"])
def test_calls_of_one_index_with_ids_of_their_own_stay_apart(index, names):
    first, second = (
        {"id": f"call_{number}", "function": {"name": name, "arguments": f'{{"{number}"'}, **index}
        for number, name in enumerate(names)
    )
    deltas = [first, piece(":1}", **index), second, piece(":2}", **index)]
    assert read(*({"tool_calls": [each]} for each in deltas)) == [
        call(names[0], '{"0":1}', "call_0"),
        call(names[1], '{"1":2}', "call_1"),
    ]


def test_an_id_that_changes_with_each_piece_begins_no_call():
    begun = {"id": "call_0", "index": 0, "function": {"name": "f", "arguments": "{"}}
    joined = read({"tool_calls": [begun]}, {"tool_calls": [piece("}", index=0, id="call_1")]})
    assert [each["function"]["arguments"] for each in joined] == ["{}"]
