"""Schemas of types, in the strict subset that providers enforce."""

from __future__ import annotations

import enum
from typing import Annotated, Literal

import pydantic
import pytest
from helpers import each
from msgspec import UNSET, Meta, Struct, UnsetType
from output_types import ALL_TYPES, Colour, Level, Product, nodes

from microbatch.errors import ConfigError
from microbatch.schema.answer_type import answer_type
from microbatch.schema.optional import as_asked
from microbatch.schema.strict import to_strict
from microbatch.schema.validate import WELL_FORMED, misfit


@each("output_type", ALL_TYPES)
def test_every_schema_from_a_type_keeps_to_the_strict_subset(output_type) -> None:
    kind = answer_type(output_type)
    for whole in (kind.schema, kind.batch_schema, kind.single_schema):
        assert misfit(whole, WELL_FORMED) is None
        assert "properties" in whole or whole is kind.schema or not kind.wrapped
        for node in nodes(whole):
            assert not node.keys() & {"default", "title", "discriminator", "oneOf", "allOf", "uniqueItems"}
            if "properties" in node:
                assert node["type"] == "object"
                assert node["additionalProperties"] is False
                assert node["required"] == list(node["properties"])
            if "enum" in node or "const" in node:
                assert "type" in node
            if "$ref" in node:
                assert list(node) == ["$ref"]
                assert node["$ref"].removeprefix("#/$defs/") in whole["$defs"]
            assert node is whole or "$defs" not in node


@each("output_type", ALL_TYPES)
def test_no_definition_is_left_that_nothing_refers_to(output_type) -> None:
    schema = answer_type(output_type).schema
    referred = {node["$ref"].removeprefix("#/$defs/") for node in nodes(schema) if "$ref" in node}
    assert set(schema.get("$defs", {})) == referred


def test_choices_keep_the_order_they_were_written_in() -> None:
    assert answer_type(Literal["b", "c", "a"]).schema == {"enum": ["b", "c", "a"], "type": "string"}
    assert answer_type(Literal["a", "b", "c"]).schema["enum"] == ["a", "b", "c"]
    assert answer_type(Colour).schema == {"enum": ["red", "blue", "amber"], "type": "string"}
    assert answer_type(Level).schema == {"enum": [3, 1], "type": "integer"}
    mixed = answer_type(Literal["b", None, 2]).schema  # noqa: PYI061
    assert mixed == {"enum": ["b", None, 2], "type": ["null", "integer", "string"]}
    assert answer_type(Product).schema["properties"]["colour"]["anyOf"][0]["enum"] == ["red", "blue", "amber"]


def test_what_was_optional_may_be_null_and_words_beside_a_reference_survive() -> None:
    schema = answer_type(Product).schema
    assert list(schema["properties"]) == ["title", "unitPrice", "tags", "colour", "level", "maker", "default", "kind"]
    assert schema["properties"]["title"] == {"type": "string"}  # a field may bear the name of a keyword
    assert schema["properties"]["default"] == {"anyOf": [{"type": "integer"}, {"type": "null"}]}
    assert schema["required"] == list(schema["properties"])
    kind, null = schema["properties"]["kind"]["anyOf"]
    assert (kind["description"], kind["type"], null) == ("the shelf", "object", {"type": "null"})
    # From Python 3.13 on the compiler dedents docstrings.
    assert schema["description"].split() == ["A", "product.", "As", "in", "the", "catalogue."]


class Tree(Struct):
    children: list[Annotated[Tree, Meta(description="below")]]


class TreeModel(pydantic.BaseModel):
    children: list[Annotated[TreeModel, pydantic.Field(description="below")]]


@pytest.mark.parametrize("output_type", [Tree, TreeModel])
def test_a_described_recursive_field_stays_a_plain_reference(output_type) -> None:
    kind = answer_type(output_type)
    name = output_type.__name__
    assert kind.schema["$defs"][name]["properties"]["children"]["items"] == {"$ref": f"#/$defs/{name}"}
    assert kind.decode('{"children":[{"children":[]}]}')[0].children[0].children == []


class Endless(Struct):
    inner: Endless


class EndlessList(Struct):
    inner: Annotated[list[EndlessList], Meta(min_length=1)]


class EndlessModel(pydantic.BaseModel):
    inner: tuple[int, EndlessModel]


class Optional(Struct):
    inner: Optional | UnsetType = UNSET


class Fine(Struct):
    inner: list[Fine] = []


@pytest.mark.parametrize("output_type", [Endless, EndlessList, EndlessModel])
def test_a_type_whose_answer_could_never_end_is_refused(output_type) -> None:
    with pytest.raises(ConfigError, match="contains itself without end"):
        answer_type(output_type)


def test_a_choice_that_could_never_end_beside_one_that_can_is_accepted() -> None:
    assert answer_type(Endless | None).decode("null") == (None, "null")


def test_a_recursion_that_can_stop_is_accepted() -> None:
    assert answer_type(Optional).decode('{"inner":{"inner":null}}')[0] == Optional(Optional())
    assert answer_type(Fine).decode('{"inner":[{"inner":[]}]}')[0] == Fine([Fine([])])


def test_choices_that_are_no_scalars_get_their_type() -> None:
    class Corner(enum.Enum):
        LEFT = (0, 0)
        RIGHT = (1, 0)

    class Where(pydantic.BaseModel):
        corner: Corner

    assert answer_type(Where).schema["properties"]["corner"] == {"$ref": "#/$defs/Corner"}
    assert answer_type(Where).schema["$defs"]["Corner"] == {"enum": [[0, 0], [1, 0]], "type": "array"}


def test_old_pydantic_spells_a_described_reference_with_all_of() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"allOf": [{"$ref": "#/$defs/A"}], "description": "d", "default": None}},
        "$defs": {"A": {"type": "object", "properties": {"x": {"type": "integer", "title": "X"}}, "required": ["x"]}},
    }
    assert as_asked(to_strict(schema))["properties"]["a"]["anyOf"][0] == {
        "type": "object",
        "properties": {"x": {"type": "integer"}},
        "required": ["x"],
        "additionalProperties": False,
        "description": "d",
    }
