"""The checker of JSON values against schemas that callers give."""

from __future__ import annotations

import time

import pytest
from helpers import each
from hypothesis import given
from hypothesis import strategies as st

from microbatch.schema.validate import MAX_DEPTH, WELL_FORMED, misfit, resolve

NODE = {
    "$ref": "#/$defs/Node",
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
}

FITS = [
    (1, {}),
    (1, True),
    ({"a": [None]}, {}),
    # type
    (1, {"type": "integer"}),
    (1.0, {"type": "integer"}),
    (-1.5, {"type": "number"}),
    (True, {"type": "boolean"}),
    (None, {"type": ["string", "null"]}),
    ("x", {"type": ["string", "null"]}),
    (object, {"type": "no such type"}),
    # enum, const
    (1.0, {"enum": [1]}),
    ({"a": [1, {"b": None}]}, {"const": {"a": [1, {"b": None}]}}),
    (False, {"enum": [0, False]}),
    # objects
    ({}, {"properties": {"a": {"type": "string"}}}),
    ({"a": "x", "b": 1}, {"properties": {"a": {"type": "string"}}}),
    ({"a": 1, "b": 2}, {"additionalProperties": {"type": "integer"}}),
    ({"x-a": 1}, {"patternProperties": {"^x-": {"type": "integer"}}, "additionalProperties": False}),
    ({"b": 1}, {"patternProperties": {"^x-": {"type": "string"}}}),
    ({"a": 1}, {"minProperties": 1, "maxProperties": 1}),
    ("no object", {"required": ["a"], "properties": {"a": False}, "minProperties": 9}),
    # arrays
    ([1, 2], {"items": {"type": "integer"}, "minItems": 2, "maxItems": 2}),
    ([1, "x", None], {"prefixItems": [{"type": "integer"}, {"type": "string"}]}),
    ([1], {"prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False}),
    ([1, "x"], {"items": [{"type": "integer"}], "additionalItems": {"type": "string"}}),
    # unions and the rest
    ("x", {"anyOf": [{"type": "integer"}, {"type": "string"}]}),
    (3, {"oneOf": [{"type": "integer"}, {"type": "string"}]}),
    (3, {"allOf": [{"type": "integer"}, {"minimum": 3}]}),
    (3, {"not": {"type": "string"}}),
    # references
    ({"value": 1, "next": {"value": 2, "next": None}}, NODE),
    ([[], [[]]], {"type": "array", "items": {"$ref": "#"}}),
    ({"a": 1, "b": 2}, {"properties": {"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}}}),
    (1, {"$ref": "#/definitions/a~1b%20c", "definitions": {"a/b c": {"type": "integer"}}}),
    (1, {"$ref": "#/anyOf/1", "anyOf": [{"type": "string"}, {"type": "integer"}]}),
    (1, {"$ref": "https://example.com/elsewhere"}),
    # texts
    ("abc", {"minLength": 3, "maxLength": 3, "pattern": "b"}),
    ("\N{GRINNING FACE}", {"maxLength": 1}),
    ("x", {"pattern": "(unclosed"}),
    ("x", {"format": "date-time", "contentEncoding": "base64"}),
    # numbers
    (3, {"minimum": 3, "maximum": 3, "exclusiveMinimum": 2, "exclusiveMaximum": 4}),
    (9, {"multipleOf": 3}),
    (0.3, {"multipleOf": 0.1}),
    (10**400, {"multipleOf": 0.5}),
    (1, {"multipleOf": 0}),
    (4, {"minimum": 3, "exclusiveMinimum": True, "maximum": 4, "exclusiveMaximum": False}),
    (True, {"minimum": 5}),
]

BREAKS = [
    (1, False, "$: nothing is allowed here"),
    (True, {"type": "integer"}, "$: wrong type"),
    (True, {"type": "number"}, "$: wrong type"),
    (1.5, {"type": "integer"}, "$: wrong type"),
    (1, {"type": ["string", "null"]}, "$: wrong type"),
    ("green", {"enum": ["red"]}, "$: not in enum"),
    (True, {"enum": [1]}, "$: not in enum"),
    ([1, 2], {"const": [1]}, "$: not the const"),
    ({"a": 1}, {"const": {"a": True}}, "$: not the const"),
    ({}, {"required": ["name"]}, "$.name: missing"),
    (
        {"a": {"b": [0, "x"]}},
        {"properties": {"a": {"properties": {"b": {"items": {"type": "integer"}}}}}},
        "$.a.b[1]: wrong type",
    ),
    ({"secret": 1}, {"additionalProperties": False}, "$[...]: nothing is allowed here"),
    ({"secret": 1}, {"additionalProperties": {"type": "string"}}, "$[...]: wrong type"),
    ({"x-secret": "y"}, {"patternProperties": {"^x-": {"type": "integer"}}}, "$[...]: wrong type"),
    ({}, {"minProperties": 1}, "$: minProperties"),
    ({"a": 1, "b": 2}, {"maxProperties": 1}, "$: maxProperties"),
    ([], {"minItems": 1}, "$: minItems"),
    ([1, 2], {"maxItems": 1}, "$: maxItems"),
    ([1, 2], {"prefixItems": [{"type": "integer"}], "items": False}, "$[1]: nothing is allowed here"),
    ([1, 2], {"items": [{"type": "integer"}], "additionalItems": {"type": "string"}}, "$[1]: wrong type"),
    (1.5, {"anyOf": [{"type": "integer"}, {"type": "string"}]}, "$: fits none of anyOf"),
    (1, {"oneOf": [{"type": "integer"}, {"minimum": 0}]}, "$: fits 2 of oneOf"),
    (None, {"oneOf": [{"type": "integer"}]}, "$: fits 0 of oneOf"),
    (1, {"allOf": [{"type": "integer"}, {"minimum": 3}]}, "$: minimum"),
    ("x", {"not": {"type": "string"}}, "$: fits what it must not"),
    ({"value": 1, "next": {"value": "2", "next": None}}, NODE, "$.next.value: wrong type"),
    (1, {"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}}, "$: wrong type"),
    (1, {"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}, "minimum": 2}, "$: minimum"),
    ("ab", {"minLength": 3}, "$: minLength"),
    ("abcd", {"maxLength": 3}, "$: maxLength"),
    ("abc", {"pattern": "^b"}, "$: pattern"),
    (2, {"minimum": 3}, "$: minimum"),
    (4, {"maximum": 3}, "$: maximum"),
    (3, {"exclusiveMinimum": 3}, "$: exclusiveMinimum"),
    (3, {"exclusiveMaximum": 3}, "$: exclusiveMaximum"),
    (3, {"minimum": 3, "exclusiveMinimum": True}, "$: minimum"),
    (3, {"maximum": 3, "exclusiveMaximum": True}, "$: maximum"),
    (10, {"multipleOf": 3}, "$: multipleOf"),
    (0.35, {"multipleOf": 0.1}, "$: multipleOf"),
]


@each(("value", "schema"), FITS)
def test_a_value_that_fits_has_no_reason(value, schema) -> None:
    assert misfit(value, schema) is None


@each(("value", "schema", "reason"), BREAKS)
def test_a_value_that_does_not_fit_is_told_by_place_and_rule(value, schema, reason) -> None:
    assert misfit(value, schema) == reason


@each(("value", "schema", "reason"), BREAKS)
def test_what_does_not_fit_fits_the_opposite(value, schema, reason) -> None:
    shared = schema.get("$defs", {}) if schema else {}
    assert misfit(value, {"not": schema, "$defs": shared}) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(json_values)
def test_every_value_equals_itself_and_is_no_other(value) -> None:
    assert misfit(value, {"const": value}) is None
    assert misfit([value], {"const": value}) is not None


@given(json_values, json_values)
def test_any_well_formed_schema_gives_an_answer_and_never_an_exception(value, schema) -> None:
    if misfit(schema, WELL_FORMED) is None:
        misfit(value, schema)


keywords = st.sampled_from([*WELL_FORMED["properties"], "nonsense"])
schemas = st.recursive(
    st.booleans() | st.dictionaries(keywords, json_values, max_size=3),
    lambda inner: st.dictionaries(
        keywords,
        inner | st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
        max_size=3,
    ),
    max_leaves=6,
)


@given(json_values, schemas)
def test_any_schema_of_real_keywords_is_malformed_or_gives_an_answer(value, schema) -> None:
    if misfit(schema, WELL_FORMED) is None:
        misfit(value, schema)


def test_the_schema_of_schemas_fits_itself() -> None:
    assert misfit(WELL_FORMED, WELL_FORMED) is None


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": 5}, "$.type"),
        ({"properties": []}, "$.properties"),
        ({"required": True}, "$.required"),
        ({"items": {"anyOf": {"type": "string"}}}, "$.items"),
        ({"properties": {"a": {"minimum": "3"}}}, "$.properties[...].minimum"),
        ([], "$"),
    ],
)
def test_a_malformed_schema_is_told_by_place(schema, place) -> None:
    assert str(misfit(schema, WELL_FORMED)).startswith(place + ":")


@pytest.mark.parametrize("schema", [{"$ref": "#"}, {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}, {"not": {"$ref": "#"}}])
def test_a_schema_that_only_refers_to_itself_is_given_up(schema) -> None:
    assert "too deep" in str(misfit(1, schema)) or "anyOf" in str(misfit(1, schema))


def test_a_value_nested_too_deeply_does_not_fit_and_does_not_overflow_the_stack() -> None:
    value: list[object] = []
    for _ in range(MAX_DEPTH + 1):
        value = [value]
    assert str(misfit(value, {"items": {"$ref": "#"}})).endswith("too deep to check")
    assert misfit(value[0], {"items": {"items": {}}}) is None


def test_unions_that_multiply_are_given_up_in_bounded_time() -> None:
    value: list[object] = []
    for _ in range(60):
        value = [value]
    # Each level tries both branches before it fails at the innermost list: 2**60 ways.
    branch = {"items": {"$ref": "#"}, "minItems": 1}
    started = time.process_time()
    assert misfit(value, {"anyOf": [branch, branch]}) is not None
    assert time.process_time() - started < 2


def test_running_out_of_steps_is_never_a_fit() -> None:
    assert misfit(list(range(50)), {"items": {"type": "integer"}}, steps=10) is not None
    assert misfit(list(range(50)), {"not": {"items": {"type": "integer"}}}, steps=10) is not None
    assert misfit(list(range(50)), {"items": {"type": "integer"}}, steps=51) is None


@pytest.mark.parametrize("pointer", ["#/a~1b%20c", "#/a%2Fb%20c"])
def test_a_reference_may_escape_its_names(pointer) -> None:
    assert resolve(pointer, {"a/b c": 1, "a": {"b c": 2}}) == 1
    assert resolve("#/~01/0", {"~1": [3]}) == 3


@pytest.mark.parametrize(
    "pointer", ["#/$defs/none", "#/a/7", "#/a/x", "#/a/0/b", "#anchor", "other.json", "#/a/99999999999"]
)
def test_a_reference_to_nothing_is_a_lookup_error(pointer) -> None:
    with pytest.raises(LookupError):
        resolve(pointer, {"a": [1]})
