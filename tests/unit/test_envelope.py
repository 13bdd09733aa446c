"""The schemas of whole replies around the schema of an answer."""

from __future__ import annotations

from helpers import each
from output_types import ALL_TYPES, Node, given_schema, nodes

from microbatch.schema.answer_type import answer_type
from microbatch.schema.validate import misfit


@each("output_type", [str, *ALL_TYPES])
def test_the_reply_schemas_are_objects_at_the_root_with_the_id_before_the_answer(output_type) -> None:
    kind = answer_type(output_type)
    assert kind.batch_schema["type"] == "object"
    assert kind.batch_schema["required"] == ["results"]
    results = kind.batch_schema["properties"]["results"]
    assert results.keys() == {"type", "items"}
    assert list(results["items"]["properties"]) == ["id", "answer"]
    assert results["items"]["properties"]["id"] == {"type": "string"}
    if kind.single_schema is not None:
        assert kind.single_schema["type"] == "object"
        assert not kind.single_schema.keys() & {"anyOf", "$ref"}
        assert kind.wrapped == (list(kind.single_schema.get("properties", {})) == ["answer"])
    assert "\n" not in kind.words + (kind.hint or "")


def test_recursive_types_keep_their_references_and_are_objects_at_the_root() -> None:
    kind = answer_type(Node)
    assert not kind.wrapped
    assert kind.single_schema["properties"]["next"]["anyOf"] == [{"$ref": "#/$defs/Node"}, {"type": "null"}]
    assert list(kind.batch_schema["$defs"]) == ["Node"]
    assert "$defs" not in kind.batch_schema["properties"]["results"]["items"]["properties"]["answer"]


def test_definitions_are_hoisted_to_the_root_of_the_reply() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.com/list",
        "type": "array",
        "items": {"anyOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/definitions/B"}]},
        "$defs": {"A": {"type": "integer"}},
        "definitions": {"B": {"type": "string"}},
    }
    kind = answer_type(response_format=given_schema(schema))
    for whole in (kind.batch_schema, kind.single_schema):
        assert whole["$defs"] == {"A": {"type": "integer"}}
        assert whole["definitions"] == {"B": {"type": "string"}}
        assert not {"$id", "$schema", "$defs"} & set().union(*(node for node in nodes(whole)[1:]))
    assert misfit({"results": [{"id": "x", "answer": [1, "a"]}]}, kind.batch_schema) is None
    assert misfit({"results": [{"id": "x", "answer": [1, None]}]}, kind.batch_schema) is not None
    assert misfit({"answer": [1, "a"]}, kind.single_schema) is None


def test_references_to_the_root_follow_it_to_its_new_place() -> None:
    schema = {
        "type": "object",
        "properties": {
            "value": {"type": "integer"},
            "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
            "same": {"$ref": "#/properties/value"},
            "$ref": {"type": "string", "enum": ["#"]},
        },
        "required": ["value", "next"],
        "additionalProperties": False,
        "$defs": {"answer": {"$ref": "#"}},
        "default": {"$ref": "#"},
    }
    kind = answer_type(response_format=given_schema(schema))
    good = {"value": 1, "same": 2, "$ref": "#", "next": {"value": 2, "next": None}}
    bad = {"value": 1, "next": {"value": "2", "next": None}}
    batch = kind.batch_schema
    assert kind.single_schema == schema
    assert batch["$defs"]["answer"] == {"$ref": "#/$defs/answer_"}
    assert batch["$defs"]["answer_"]["default"] == {"$ref": "#"}
    assert batch["$defs"]["answer_"]["properties"]["$ref"] == {"type": "string", "enum": ["#"]}
    assert misfit({"results": [{"id": "x", "answer": good}]}, batch) is None
    assert misfit({"results": [{"id": "x", "answer": bad}]}, batch) is not None
    assert misfit({"results": [{"id": "x", "answer": {**good, "same": "2"}}]}, batch) is not None


def test_a_root_that_is_only_a_reference_is_resolved_for_single_calls() -> None:
    schema = {
        "$ref": "#/$defs/A",
        "title": "A",
        "$defs": {"A": {"type": "object", "properties": {"a": {"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}]}}}},
    }
    kind = answer_type(response_format=given_schema(schema))
    assert kind.schema == schema
    assert not kind.wrapped
    assert kind.single_schema == {**schema["$defs"]["A"], "$defs": schema["$defs"]}
    for odd in (
        {"$ref": "https://example.com/a"},
        {"$ref": "#"},
        {"$ref": "#/$defs/A", "$defs": {"A": True}},
        {**schema, "required": []},
    ):
        assert answer_type(response_format=given_schema(odd)).wrapped
