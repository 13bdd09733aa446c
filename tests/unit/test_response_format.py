"""Schemas that callers give as a response_format."""

from __future__ import annotations

import json
from typing import Any

import pytest
from output_types import Category, given_schema

from microbatch.errors import ConfigError
from microbatch.schema.answer_type import answer_type


def test_a_given_schema_is_used_as_it_is_and_the_output_is_the_json_text() -> None:
    schema = {
        "type": "object",
        "title": "Kept",
        "properties": {"a": {"type": "integer", "default": 3}, "b": {"oneOf": [{"type": "string"}, {"type": "null"}]}},
        "required": ["a"],
    }
    kind = answer_type(response_format=given_schema(schema))
    assert kind.schema == kind.single_schema == schema
    assert kind.batch_schema["properties"]["results"]["items"]["properties"]["answer"] == schema
    assert not kind.is_text
    assert kind.decode('{"a": 1}') == ('{"a": 1}', '{"a": 1}')
    assert kind.decode_single('Sure: {"a": 1}!') == ('{"a": 1}', '{"a": 1}')
    assert json.loads(kind.words.removeprefix("Each answer is JSON matching this JSON Schema: ")) == schema
    with pytest.raises(ValueError, match=r"^\$\.a: wrong type$"):
        kind.decode('{"a":"SECRET"}')
    with pytest.raises(ValueError, match="JSON"):
        kind.decode("{a}")


def test_a_given_schema_that_is_no_object_is_wrapped() -> None:
    kind = answer_type(response_format=given_schema({"type": "array", "items": {"type": "integer"}}))
    assert kind.wrapped
    assert kind.single_schema["properties"]["answer"] == kind.schema
    assert kind.decode_single('{"answer":[1,2]}') == ("[1,2]", "[1,2]")
    assert kind.decode_single("[1,2]") == ("[1,2]", "[1,2]")


@pytest.mark.parametrize(
    ("response_format", "words"),
    [
        ([], "response_format must be a JSON object, got list"),
        ({}, "type"),
        ({"type": "json_object"}, "json_schema"),
        ({"type": "json_schema"}, "response_format.json_schema must be a JSON object, got NoneType"),
        ({"type": "json_schema", "json_schema": {}}, "json_schema.schema must be a JSON object"),
        ({"type": "json_schema", "json_schema": {"schema": True}}, "got bool"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "name": 5}}, "name"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "strict": "yes"}}, "strict"),
        (given_schema({"properties": {"a": {"type": 5}}}), r"malformed at \$.properties\[...\].type"),
        (given_schema({"enum": [object()]}), "not JSON"),
        (given_schema({"items": {"$ref": "#/$defs/None"}}), r"#/\$defs/None, which is not in it"),
    ],
)
def test_a_malformed_response_format_is_a_config_error(response_format, words) -> None:
    with pytest.raises(ConfigError, match=words):
        answer_type(response_format=response_format)


def test_a_response_format_that_holds_itself_is_a_config_error() -> None:
    schema: dict[str, Any] = {"type": "object"}
    schema["properties"] = {"a": schema}
    with pytest.raises(ConfigError, match="not JSON"):
        answer_type(response_format=given_schema(schema))


def test_an_output_type_beside_a_response_format_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="Category"):
        answer_type(Category, given_schema({}))


def test_equal_response_formats_are_compiled_once_and_changing_one_later_changes_nothing() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    one = answer_type(response_format=given_schema(schema))
    assert answer_type(response_format=given_schema(json.loads(json.dumps(schema)))) is one
    schema["properties"]["a"]["type"] = "string"
    assert answer_type(response_format=given_schema(schema)) is not one
    assert one.schema["properties"]["a"]["type"] == "integer"
    swapped = {"properties": {"a": {"type": "integer"}}, "type": "object"}
    assert answer_type(response_format=given_schema(swapped)).key == one.key


def test_a_given_schema_shares_no_key_with_a_type_of_the_same_schema() -> None:
    kind = answer_type(Category)
    assert answer_type(response_format=given_schema(kind.schema)).key != kind.key


CLOSED = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}


@pytest.mark.parametrize(
    ("word", "strict"), [({}, True), ({"strict": None}, True), ({"strict": True}, True), ({"strict": False}, False)]
)
def test_only_a_false_strict_forbids_to_enforce_a_given_schema(word, strict) -> None:
    named = {"name": "answer", "schema": CLOSED, **word}
    assert answer_type(response_format={"type": "json_schema", "json_schema": named}).strict is strict


def test_what_must_not_be_enforced_shares_no_prompt_with_what_may() -> None:
    strict = given_schema(CLOSED)
    loose = {"type": "json_schema", "json_schema": {**strict["json_schema"], "strict": False}}
    for _ in range(2):
        one, other = answer_type(response_format=strict), answer_type(response_format=loose)
        assert (one.strict, other.strict) == (True, False)
        assert one.key != other.key
        assert one.schema == other.schema
    assert answer_type().strict
    assert answer_type(Category).strict


def test_keywords_of_other_drafts_pass_through() -> None:
    schema = {
        "type": "object",
        "dependencies": {"a": ["b"]},
        "if": {"$ref": 5},
        "dependentSchemas": 5,
        "items": [{"type": "integer"}],
    }
    kind = answer_type(response_format=given_schema(schema))
    assert kind.schema == schema
    assert kind.decode("{}") == ("{}", "{}")


def test_a_long_answer_to_a_given_schema_is_checked_to_its_end() -> None:
    kind = answer_type(
        response_format=given_schema({"type": "array", "items": {"anyOf": [{"type": "null"}, {"type": "integer"}]}})
    )
    assert kind.decode(json.dumps([1] * 50_000))
    with pytest.raises(ValueError, match=r"\[49999\]"):
        kind.decode(json.dumps([1] * 49_999 + ["x"]))
