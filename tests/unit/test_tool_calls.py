"""Calls of tools are joined from the pieces of a stream, in every spelling of endpoints."""

from __future__ import annotations

from typing import Any

import pytest

from microbatch.transports.tool_calls import CallPieces


def piece(arguments: Any = None, **members: Any) -> dict[str, Any]:
    return {"function": {"arguments": arguments}, **members}


FIRST = {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}
WHOLE = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"n":1}'}}]


@pytest.mark.parametrize(
    "deltas",
    [
        [[FIRST], [piece('{"n"', index=0)], [piece(":1}", index=0)]],
        [[FIRST], [piece('{"n"')], [piece(":1}", index="0")]],
        [[{**FIRST, "function": {"name": "f", "arguments": '{"n":1}'}}]],
        [[FIRST], [{"index": 0, "id": "", "function": {"name": "f", "arguments": '{"n":1}'}}]],
        [[{**FIRST, "type": None}], [piece('{"n":1}', index=0)], [piece(index=0)]],
        [None, [], [FIRST], [piece('{"n":1}', index=0)], {}, [{"index": 0}]],
    ],
)
def test_pieces_of_a_call_are_joined(deltas: list[Any]) -> None:
    pieces = CallPieces()
    for delta in deltas:
        pieces.take(delta)
    assert pieces.joined() == WHOLE


def test_calls_are_kept_apart_by_their_index() -> None:
    pieces = CallPieces()
    pieces.take([FIRST, {**FIRST, "index": 1, "id": "b"}])
    pieces.take([piece("2", index=1)])
    pieces.take([piece("1", index=0)])
    assert [(call["id"], call["function"]["arguments"]) for call in pieces.joined()] == [("a", "1"), ("b", "2")]
    assert CallPieces().joined() == []
