"""Refusals of fields and formats, in the words and shapes of many servers; what is tried where words say nothing."""

# ruff: noqa: E501 the sentences are quoted whole

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers import each

from microbatch.errors import ServerError
from microbatch.protocols import ChatCall
from microbatch.transports.capabilities import MAX_DOUBTS, Capabilities, Plan, Rung
from microbatch.transports.error_parsing import read_failure, to_error

ENDPOINT = ("http://x/v1", "m", b"")
ECHO = {"model": "m", "messages": [], "stream_options": {"include_usage": True}, "temperature": 0, "stream": True}
EXTRA = "Extra inputs are not permitted"
SILENT = {"error": {"message": "Bad Request"}}


def typed(**options: Any) -> ChatCall:
    return ChatCall(**{"messages": [{"role": "user", "content": "hi"}], "schema": {"type": "object"}, **options})


def plan(known: Capabilities, call: ChatCall, *, stream: bool = False) -> Plan:
    return known.plan(call, ENDPOINT, 0.0, stream=stream, may_stream=True)


def learn(known: Capabilities, attempt: Plan, body: Any, status: int = 400) -> bool:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    fault = read_failure(raw, status)
    return known.learn(attempt, fault, to_error(fault, where="h", headers={}), 0.0).again


STREAM_OPTIONS: dict[str, tuple[int, Any]] = {
    "in words": (400, {"error": {"message": "Unrecognized request argument supplied: stream_options", "param": None}}),
    "in a message that is an object": (422, {"object": "error", "message": {"detail": [{"loc": ["body", "stream_options"], "msg": EXTRA, "input": ECHO}]}}),
    "in lists": (422, {"detail": [{"loc": ["body", "stream_options"], "msg": EXTRA}], "message": [{"loc": ["body", "stream_options"], "msg": EXTRA}]}),
    "in Google's details": (400, [{"error": {"code": 400, "message": "Invalid argument", "details": [{"fieldViolations": [{"field": "stream_options", "description": "Cannot find field."}]}]}}]),
    "in Python's notation": (400, {"object": "error", "message": f"[{{'type': 'extra_forbidden', 'loc': ('body', 'stream_options'), 'msg': '{EXTRA}', 'input': {ECHO}}}]"}),
    "in JSON inside a text": (400, {"error": {"message": "Provider returned error", "metadata": {"raw": json.dumps({"message": "include_usage is unknown"})}}}),
    "in another library's error": (400, {"error": {"message": "litellm.BadRequestError: Error code: 400 - {'error': {'message': 'stream_options: no'}}"}}),
    "in plain words": (400, {"detail": "Stream options are not available"}),
    "in camel case": (400, {"message": "streamOptions: unknown field"}),
    "as text": (400, b'json: unknown field "stream_options"'),
    "as not implemented": (501, {"error": "stream_options is missing"}),
}  # fmt: skip


@each("name", STREAM_OPTIONS)
def test_a_field_is_found_wherever_it_is_named(name: str) -> None:
    """And the fields that the request itself has, which some servers echo, are not."""
    status, body = STREAM_OPTIONS[name]
    known, call = Capabilities(), typed(params={"temperature": 0})
    assert learn(known, plan(known, call, stream=True), body, status)
    assert plan(known, call, stream=True).sent == {"stream", "temperature"}


FORMATS: dict[str, tuple[int, Any]] = {
    "in plain words": (400, {"error": {"message": "JSON schemas are not available for this model"}}),
    "SiliconFlow": (400, {"code": 20024, "message": "Json mode is not supported for this model.", "data": None}),
    "Fireworks": (400, {"error": {"message": "Structured response generation is not supported"}}),
    "TGI": (422, b"Failed to deserialize the JSON body into the target type: response_format: unknown variant `json_schema`"),
    "OpenRouter": (404, {"error": {"message": "No endpoints found that can handle the requested parameters.", "code": 404}}),
    "SiliconFlow, of some field": (400, {"code": 20015, "message": "The parameter is invalid. Please check again.", "data": None}),
    "not implemented": (501, {"error": {"message": "Not implemented"}}),
}  # fmt: skip


@each("name", FORMATS)
def test_a_refusal_of_the_format_steps_down(name: str) -> None:
    status, body = FORMATS[name]
    known, call = Capabilities(), typed()
    assert learn(known, plan(known, call), body, status)
    lower = plan(known, call)
    assert lower.rung is Rung.JSON_OBJECT
    known.accepted(lower, 0.0)
    assert plan(known, typed()).rung is Rung.JSON_OBJECT


SCHEMAS = {
    "vLLM": "The provided JSON schema contains features not supported by xgrammar.",
    "Gemini": "Unknown name \"additionalProperties\" at 'generation_config.response_schema': Cannot find field.",
}


@each("name", SCHEMAS)
def test_a_refusal_of_one_schema_leaves_the_others(name: str) -> None:
    known, call = Capabilities(), typed()
    assert learn(known, plan(known, call), {"error": {"message": SCHEMAS[name]}})
    assert plan(known, call).rung is Rung.JSON_OBJECT
    assert plan(known, typed(schema={"title": "other"})).rung is Rung.JSON_SCHEMA


TEMPERATURES = {
    "Anthropic": "`temperature` is deprecated for this model.",
    "Anthropic, thinking": "`temperature` may only be set to 1 when thinking is enabled.",
    "Moonshot": "invalid temperature: only 1 is allowed for this model",
}


@each("name", TEMPERATURES)
def test_a_temperature_that_openai_takes_is_left_out_where_it_is_refused(name: str) -> None:
    """One that OpenAI does not take either is the caller's mistake."""
    known, said = Capabilities(), {"error": {"message": TEMPERATURES[name]}}
    assert learn(known, plan(known, typed(params={"temperature": 0.0})), said)
    assert plan(known, typed(params={"temperature": 0.0})).sent == {"stream"}
    other = Capabilities()
    assert not learn(other, plan(other, typed(params={"temperature": 3})), said)


def test_a_bound_that_is_too_high_is_no_name_that_is_unknown() -> None:
    known, call = Capabilities(), typed(max_tokens=9_000)
    assert not learn(known, plan(known, call), {"error": {"message": "max_tokens 9000 > 4096 is not allowed"}})
    assert learn(known, plan(known, call), {"error": {"message": "max_tokens is not supported, use max_completion_tokens instead"}})  # fmt: skip
    assert "max_completion_tokens" in plan(known, call).sent


@pytest.mark.parametrize("stream", [True, False])
def test_a_refusal_of_streams_or_of_what_is_none(stream: bool) -> None:
    known, call = Capabilities(), typed()
    words = "Streaming is not available here" if stream else "Responses come as a stream here"
    assert learn(known, plan(known, call, stream=stream), {"error": {"message": words}})
    assert plan(known, call, stream=stream).stream is not stream


def test_what_a_refusal_quotes_of_the_prompt_is_no_lesson() -> None:
    """Users write about streams and temperatures, too."""
    prompt = "Is the temperature of a mountain stream_options a matter of response_format?"
    known = Capabilities()
    call = typed(messages=[{"role": "user", "content": prompt}], params={"temperature": 0})
    assert not learn(known, plan(known, call, stream=True), {"error": {"message": f"Refused: {prompt}"}})
    assert plan(known, call, stream=True).sent == {"stream", "stream_options", "temperature"}


@pytest.mark.parametrize(
    "said",
    [
        {"message": "Unknown parameter", "param": "tools"},
        {"message": "top_k is not taken"},
        {"message": "no such model"},
    ],
)
def test_a_refusal_of_something_else_changes_nothing(said: dict[str, Any]) -> None:
    known = Capabilities()
    batch = typed(params={"top_k": 3})
    assert not learn(known, plan(known, batch, stream=True), {"error": said})


def test_a_rejected_reply_is_asked_for_once_more_as_it_is() -> None:
    known, call = Capabilities(), typed()
    said = {"error": {"message": "Failed to generate JSON.", "code": "json_validate_failed", "failed_generation": "{"}}
    assert learn(known, plan(known, call), said)
    assert plan(known, call).rung is Rung.JSON_SCHEMA
    assert not learn(known, plan(known, call), said)


# Where words say nothing


def test_a_lone_typed_request_is_tried_in_barer_forms_and_what_is_answered_is_remembered() -> None:
    known, call = Capabilities(), typed(hint="JSON")
    forms = []
    for _ in range(2):
        attempt = plan(known, call)
        forms.append(attempt.rung)
        assert learn(known, attempt, SILENT)
    barest = plan(known, call)
    assert [*forms, barest.rung] == [*Rung]
    known.accepted(barest, 0.0)
    assert plan(known, typed()).rung is Rung.PLAIN


def test_where_no_form_is_answered_none_is_to_blame() -> None:
    known, call = Capabilities(), typed(hint="JSON")
    assert [learn(known, plan(known, call), SILENT) for _ in range(3)] == [True, True, False]
    assert plan(known, typed(hint="JSON")).rung is Rung.JSON_SCHEMA
    assert [learn(known, plan(known, typed(hint="JSON")), SILENT) for _ in range(2)] == [True, True]


def test_a_form_that_was_answered_is_not_doubted() -> None:
    known, call = Capabilities(), typed(hint="JSON")
    known.accepted(plan(known, call), 0.0)
    assert not learn(known, plan(known, typed(hint="JSON")), SILENT)


def test_batches_that_are_refused_while_their_requests_are_answered_alone_blame_their_form() -> None:
    known = Capabilities()
    for _ in range(MAX_DOUBTS):
        assert not learn(known, plan(known, typed(), stream=True), SILENT)
    assert not learn(
        known, plan(known, typed(), stream=True), SILENT
    )  # nobody is answered: it may be the model or the key
    known.accepted(plan(known, ChatCall(messages=[])), 0.0)
    batch = typed()
    assert learn(known, plan(known, batch, stream=True), SILENT)
    lower = plan(known, batch, stream=True)
    known.accepted(lower, 0.0)
    assert (lower.rung, plan(known, typed()).rung) == (Rung.JSON_OBJECT, Rung.JSON_OBJECT)


def test_batches_that_are_refused_in_every_form_are_tried_less_and_less() -> None:
    """Their requests may be refused themselves, as poison is; an answer in between does not start it all again."""
    known, tried = Capabilities(), 0
    for _ in range(4 * MAX_DOUBTS):
        batch = typed()
        while learn(known, plan(known, batch), SILENT):
            tried += 1
        known.accepted(plan(known, ChatCall(messages=[])), 0.0)
    assert 1 <= tried <= 3


def test_the_place_of_the_hint_is_learned_from_either_status_of_a_template_error() -> None:
    for status in (400, 500):
        known, call = Capabilities(), typed(hint="JSON")
        learn(known, plan(known, call), {"error": {"message": "response_format is not supported"}})
        assert plan(known, call).hint == "system"
        assert learn(known, plan(known, call), {"error": {"message": "Roles must alternate user/assistant"}}, status)
        assert plan(known, typed(hint="JSON")).hint == "joined"


@pytest.mark.parametrize("rungs", [1, 2])
def test_the_place_of_the_hint_is_found_out_where_a_500_says_nothing(rungs: int) -> None:
    """Servers whose chat template raises an exception answer so."""
    known, call = Capabilities(), typed(hint="JSON")
    for _ in range(rungs):
        learn(known, plan(known, call), {"error": {"message": "response_format is not supported"}})
    assert plan(known, call).hint == "system"
    assert not learn(known, plan(known, call), b"Internal Server Error", 500)
    known.accepted(plan(known, call), 0.0)
    assert (plan(known, typed(hint="JSON")).hint, plan(known, typed(hint="JSON")).rung) == ("joined", Rung.PLAIN)


def test_an_answer_that_ignores_the_schema_lowers_the_rung_of_that_schema() -> None:
    known = Capabilities()
    known.accepted(plan(known, typed(hint="JSON")), 0.0)
    again = plan(known, typed(hint="JSON", unenforced=True))
    assert (again.rung, again.hint) == (Rung.JSON_OBJECT, "system")
    known.accepted(again, 0.0)
    assert plan(known, typed(hint="JSON")).rung is Rung.JSON_OBJECT
    assert plan(known, typed(schema={"title": "other"})).rung is Rung.JSON_SCHEMA


def test_an_outage_is_not_taken_for_a_refusal_of_the_form() -> None:
    known, call = Capabilities(), typed(hint="JSON")
    fault = read_failure(b"", 503)
    error = known.learn(plan(known, call), fault, to_error(fault, where="h", headers={}), 0.0)
    assert (type(error), error.again) == (ServerError, False)


def test_a_validation_error_is_shown_with_its_place() -> None:
    raw = json.dumps({"detail": [{"loc": ["body", "top_k"], "msg": EXTRA, "input": ECHO}]}).encode()
    assert str(to_error(read_failure(raw, 422), where="h", headers={}, asked=[])).endswith(f"it says: {EXTRA}")
    nested = json.dumps({"message": {"detail": [{"loc": ["body", "top_k"], "msg": EXTRA}]}}).encode()
    assert str(to_error(read_failure(nested, 422), where="h", headers={}, asked=[])).endswith(f"body.top_k {EXTRA}")
