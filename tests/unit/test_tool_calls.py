"""Calls of tools in streams are joined to a completion, as the endpoint would have sent it whole."""

from __future__ import annotations

import json

import pytest

from microbatch.transports.reply_reader import ReplyReader


def read(*deltas, finish="tool_calls"):
    reader = ReplyReader()
    for delta in deltas:
        assert reader.event(json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode()) == ""
    reader.event(json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}).encode())
    return reader.completion(None).body


def piece(arguments, **more):
    return {"function": {"arguments": arguments}, **more}


def call(name, arguments, id_="call_1"):
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize("finish", ["tool_calls", "stop"])
def test_pieces_are_joined_by_their_place(finish):
    body = read(
        {"role": "assistant", "content": None, "tool_calls": [{**call("f", ""), "index": 0}]},
        {"tool_calls": [piece('{"a":', index=0)]},
        {"tool_calls": [{**call("g", "{", "call_2"), "index": 1}, piece("1}", index=0)]},
        {"tool_calls": [piece("}", index=1, id=None, type=None)]},
        finish=finish,
    )
    assert body == {
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [call("f", '{"a":1}'), call("g", "{}", "call_2")],
                },
                "finish_reason": finish,
            }
        ]
    }


@pytest.mark.parametrize("calls", [[call("f", "{}")], [{**call("f", "{}"), "index": None}]])
def test_calls_without_a_place_have_that_of_the_list(calls):
    assert read({"tool_calls": calls})["choices"][0]["message"]["tool_calls"] == [call("f", "{}")]


@pytest.mark.parametrize("delta", [{"content": None}, {"tool_calls": []}, {"tool_calls": None}, {"tool_calls": "odd"}])
def test_without_calls_there_is_no_body(delta):
    assert read(delta) is None


def test_a_whole_reply_keeps_its_own_body():
    whole = {
        "id": "x",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"tool_calls": [call("f", "{}")]}}],
    }
    reader = ReplyReader()
    reader.whole(json.dumps(whole).encode())
    assert reader.completion(None).body == whole
