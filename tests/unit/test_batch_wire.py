"""Chat completions in a batch's file: written as live ones, and learned from like them."""

from __future__ import annotations

import json

import pytest

from microbatch.errors import (
    BadRequest,
    ConfigError,
    ContextTooLong,
    Filtered,
    RateLimited,
    ServerError,
    TransportError,
)
from microbatch.protocols import ChatCall
from microbatch.transports.chat_wire import BatchWire

SCHEMA = {"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"]}
COMPLETION = {
    "model": "m-1",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}},
}


def call(**fields):
    return ChatCall(**{"messages": [{"role": "user", "content": "Hi."}], "model": "m", **fields})


def wire(model=None):
    return BatchWire(model, where="host:1")


def refused(wire, sent, message="no", *, status=400, **error):
    body = json.dumps({"error": {"message": message, **error}}).encode()
    with pytest.raises((TransportError, BadRequest)) as caught:
        wire.read(status, body, request_id=None, sent=lambda: sent)
    return caught.value


async def test_a_line_has_the_body_of_a_live_call_that_is_not_streamed():
    body = wire().body(call(schema=SCHEMA, max_tokens=9, params={"temperature": 0.5, "top_p": 1}, stream=True))
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Hi."}],
        "temperature": 0.5,
        "top_p": 1,
        "max_tokens": 9,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answers", "strict": True, "schema": SCHEMA},
        },
    }


async def test_the_model_is_the_call_s_own_or_the_worker_s():
    assert wire("other").body(call())["model"] == "m"
    assert wire("other").body(call(model=None))["model"] == "other"
    with pytest.raises(ConfigError, match="no model"):
        wire().body(call(model=None))


async def test_a_reply_is_read_as_a_live_one():
    text, completion = wire().read(200, json.dumps(COMPLETION).encode(), request_id="req_1", sent=dict)
    assert text == "Yes."
    assert (completion.finish_reason, completion.model, completion.request_id) == ("stop", "m-1", "req_1")
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (9, 2, 4)
    assert completion.body == COMPLETION


@pytest.mark.parametrize("raw", [b"null", b"{}", b"[]", b'{"choices":[]}', b'{"choices":5}'])
async def test_what_is_no_completion_is_an_error(raw):
    with pytest.raises(TransportError):
        wire().read(200, raw, request_id=None, sent=dict)


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (400, {"code": "context_length_exceeded"}, ContextTooLong),
        (400, {"code": "content_filter"}, Filtered),
        (429, {}, RateLimited),
        (500, {}, ServerError),
        (200, {"code": 429}, RateLimited),
        (400, {"code": "invalid_value"}, BadRequest),
    ],
)
async def test_a_refusal_is_of_the_same_kind_as_a_live_one(status, error, kind):
    sent = wire().body(call())
    found = refused(wire(), sent, status=status, **error)
    assert type(found) is kind
    assert not found.again
    assert found.status == (429 if kind is RateLimited else status)


async def test_a_refused_name_of_max_tokens_is_changed_once_however_many_lines_were_refused():
    learning = wire()
    sent = learning.body(call(max_tokens=9))
    complaint = {"param": "max_tokens", "code": "unsupported_parameter"}
    assert [refused(learning, sent, **complaint).again for _ in range(3)] == [True] * 3
    assert learning.body(call(max_tokens=9))["max_completion_tokens"] == 9
    assert "max_tokens" not in learning.body(call(max_tokens=9))


async def test_a_refused_temperature_is_left_out():
    learning = wire()
    sent = learning.body(call(params={"temperature": 0.0}))
    assert refused(learning, sent, param="temperature", code="unsupported_value").again
    assert "temperature" not in learning.body(call(params={"temperature": 0.0}))
    assert not refused(learning, learning.body(call()), param="temperature", code="unsupported_value").again


async def test_a_refused_format_goes_one_step_down_however_many_lines_were_refused():
    learning = wire()
    asked = call(schema=SCHEMA, hint="Reply with JSON.")
    sent = learning.body(asked)
    for _ in range(3):
        assert refused(learning, sent, param="response_format", code="unsupported_value").again
    lower = learning.body(asked)
    assert lower["response_format"] == {"type": "json_object"}
    assert lower["messages"][0] == {"role": "system", "content": "Reply with JSON."}
    assert refused(learning, lower, param="response_format", code="unsupported_value").again
    assert "response_format" not in learning.body(asked)


async def test_a_refusal_of_one_schema_concerns_that_schema_only():
    learning = wire()
    other = call(schema={**SCHEMA, "description": "another"})
    sent = learning.body(call(schema=SCHEMA, hint="JSON"))
    assert refused(learning, sent, "Invalid schema for response_format 'answers'", param="response_format").again
    assert learning.body(call(schema=SCHEMA, hint="JSON"))["response_format"]["type"] == "json_object"
    assert learning.body(other)["response_format"]["type"] == "json_schema"


async def test_what_is_told_of_an_error_holds_no_words_of_a_prompt():
    sent = wire().body(call())
    assert "secret" not in repr(refused(wire(), sent, "Invalid prompt: secret"))
