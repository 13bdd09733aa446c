"""Rows of an output, made from the lines of its journal."""

from __future__ import annotations

import pytest

from microbatch.cli.writing.output import answer_line, error_object, failure_line
from microbatch.cli.writing.target import Target
from microbatch.errors import BadRequest, MissingAnswer, RateLimited, ServerError
from microbatch.messages import Reply, Usage

BATCH = Target("out", "openai-batch", "m")
TABLE = Target("out.csv", "csv", "m")


def row_of(reply, target=BATCH, name="a"):
    return target.row(target.line(answer_line(name, reply.output, reply), reply))


def body_of(reply):
    row = row_of(reply)
    assert (row["error"], row["response"]["status_code"]) == (None, 200)
    return row["response"]["body"]


def test_a_completion_of_a_combined_answer_has_its_share_of_the_tokens():
    reply = Reply(
        "x", "x", "batch", Usage(30, 4, 10), batch_size=8, model="m-1", finish_reason="length", request_id="r1"
    )
    body = body_of(reply)
    assert row_of(reply)["response"]["request_id"] == "r1"
    assert body["model"] == "m-1"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert [body["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")] == [30, 4, 34]
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 10


def test_an_endpoints_own_completion_stays_but_for_tokens_of_others():
    own = {"id": "c1", "choices": [{"message": {"content": None, "tool_calls": [{"id": "t"}]}}]}
    told = own | {"usage": {"prompt_tokens": 9, "completion_tokens": 2, "extra": 1}}
    assert body_of(Reply("", "", "single", Usage(9, 2), body=told)) == told
    asked_twice = body_of(Reply("", "", "fallback", Usage(20, 5), body=told))
    assert asked_twice | {"usage": None} == told | {"usage": None}
    assert asked_twice["usage"]["prompt_tokens"] == 20
    assert body_of(Reply("", "", "batch", Usage(3, 1), body=own))["usage"]["total_tokens"] == 4


@pytest.mark.parametrize(
    "error", [BadRequest("no", status=400, code="odd", request_id="r"), RateLimited("no", status=429)]
)
def test_a_refusal_of_the_endpoint_is_a_response(error):
    row = BATCH.row(failure_line("a", error_object(error)))
    assert row["error"] is None
    assert (row["response"]["status_code"], row["response"]["request_id"]) == (error.status, error.request_id)
    assert row["response"]["body"] == {
        "error": {"message": "no", "type": type(error).__name__, "code": error.code, "param": None}
    }


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (error_object(MissingAnswer("no")), "MissingAnswer"),
        (error_object(ServerError("no", status=200)), "ServerError"),
        (error_object(BadRequest("no", code="odd")), "odd"),
        ({"type": "InputError", "message": "no", "line": 3, "field": None}, "InputError"),
    ],
)
def test_any_other_failure_is_an_error_without_a_response(error, code):
    row = BATCH.row(failure_line("a", error))
    assert (row["response"], row["error"]) == (None, {"code": code, "message": "no"})


def test_a_line_without_a_completion_gets_one():
    line = answer_line("a", {"x": 1}, Reply({"x": 1}, "", "batch", Usage(3, 2)))
    body = BATCH.row(line)["response"]["body"]
    assert (body["model"], body["choices"][0]["message"]["content"], body["usage"]["total_tokens"]) == (
        "m",
        '{"x":1}',
        5,
    )


def test_a_row_of_a_table_has_the_usage_in_columns_of_its_own():
    row = row_of(Reply("x", "x", "batch", Usage(3, 2, 1), 0.5), TABLE)
    assert {name: row.get(name) for name in TABLE.columns} == {
        "custom_id": "a",
        "output": "x",
        "error": None,
        "route": "batch",
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "cached_tokens": 1,
        "estimated": False,
        "cache_write_tokens": 0,
        "reasoning_tokens": 0,
        "cost_usd": 0.5,
    }
    failed = TABLE.row(failure_line("a", {"type": "X"}))
    assert [failed.get(name) for name in ("output", "prompt_tokens", "cost_usd")] == [None] * 3


@pytest.mark.parametrize(
    ("path", "form", "journal"),
    [
        ("a.jsonl", "jsonl", "a.jsonl"),
        ("a", "jsonl", "a"),
        ("a.jsonl", "openai-batch", "a.jsonl.journal.jsonl"),
        ("a.jsonl.gz", "jsonl", "a.jsonl.gz.journal.jsonl"),
        ("a.csv", "csv", "a.csv.journal.jsonl"),
    ],
)
def test_json_lines_are_their_own_journal(path, form, journal):
    target = Target(path, form)
    assert (target.journal, target.is_written_at_end) == (journal, journal != path)
