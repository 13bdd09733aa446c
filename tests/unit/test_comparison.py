"""Comparison of the answer from a batch with the answer alone."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import pytest
from helpers import each

from microbatch.audit.comparison import LONGEST, agree, can_compare, score
from microbatch.schema.answer_type import answer_type

TEXT = answer_type(str)


class Item(msgspec.Struct):
    name: str
    tags: set[str]
    size: float


@dataclass(eq=False)
class ByIdentity:
    name: str
    tags: list[str]


@dataclass
class Vector:
    """Its `==` compares arrays, and the truth of the result is ambiguous."""

    of: list[float]

    def __eq__(self, other):
        raise ValueError("the truth value of an array is ambiguous")

    __hash__ = None


@dataclass
class Same:
    """Compares by the first letter, or fails."""

    outputs: Any = None

    def __call__(self, batched, alone):
        self.outputs = (batched, alone)
        return batched[0] == alone[0]


@each(
    "one, other, same",
    [
        ("Paris", "  paris\n", True),
        ("Paris  is it", "paris is\tit", True),
        ("STRASSE", "straße", True),
        ("Paris", "Rome", False),
        ("x" * LONGEST, "x" * LONGEST, True),
        ("x" * (LONGEST + 1), "x" * (LONGEST + 1), None),
        ("x", "x" * (LONGEST + 1), None),
    ],
)
def test_texts_are_compared_but_for_case_and_white_space_if_they_are_short(one, other, same):
    assert agree(TEXT, one, other) is same


@each(
    "kind, one, other, same",
    [
        (Literal["a", "b"], '"a"', '"a"', True),
        (Literal["a", "b"], '"a"', '"b"', False),
        (set[str], '["x","y"]', '["y","x"]', True),
        (list[str], '["x","y"]', '["y","x"]', False),
        (float, "1", "1.0", True),
        (Item, '{"name":"a","tags":["x","y"],"size":1}', '{"size":1.0,"tags":["y","x"],"name":"a"}', True),
        (Item, '{"name":"a","tags":[],"size":1}', '{"name":"A","tags":[],"size":1}', False),
        (Annotated[str, msgspec.Meta(max_length=200)], f'"{"x" * 90}"', f'"{"x" * 90}"', True),
        (dict[str, int], '{"a":1,"b":2}', '{"b":2,"a":1}', True),
        (str | None, "null", "null", True),
        (ByIdentity, '{"name":"a","tags":["x"]}', '{"tags": ["x"], "name": "a"}', True),
        (ByIdentity, '{"name":"a","tags":["x"]}', '{"name":"a","tags":["y"]}', False),
        (list[ByIdentity], '[{"name":"a","tags":[]}]', '[ {"name":"a","tags":[]} ]', True),
        (Vector, '{"of":[1,2]}', '{"of": [1.0, 2.0]}', True),
        (list[Vector], '[{"of":[1]}]', '[ {"of":[1]} ]', True),
        (Vector, '{"of":[1]}', '{"of":[2]}', False),
    ],
)
def test_typed_answers_are_compared_by_their_values(kind, one, other, same):
    assert agree(answer_type(kind), one, other) is same


@each(
    "one, other, same",
    [
        ('{"a": 1, "b": [1]}', '{"b":[1],"a":1.0}', True),
        ('{"a":1,"b":[1]}', '{"a":2,"b":[1]}', False),
        ("{", "{", None),
    ],
)
def test_json_that_was_asked_for_as_such_is_compared_by_its_values(one, other, same):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "number"}, "b": {"type": "array", "items": {"type": "integer"}}},
    }
    given = {"type": "json_schema", "json_schema": {"name": "x", "strict": False, "schema": schema}}
    assert agree(answer_type(str, given), one, other) is same


def test_a_function_replaces_the_comparison_and_takes_outputs():
    same = Same()
    assert agree(TEXT, "very long " * 20, "vast", same) is True
    assert same.outputs == ("very long " * 20, "vast")
    assert agree(answer_type(list[int]), "[1,2]", "[1,3]", same) is True
    assert same.outputs == ([1, 2], [1, 3])
    assert agree(answer_type(list[int]), "[]", "[1]", same) is None  # it has raised


def test_only_long_texts_without_a_function_are_known_in_advance_not_to_be_comparable():
    assert can_compare(TEXT, "x" * LONGEST, None)
    assert not can_compare(TEXT, "x" * (LONGEST + 1), None)
    assert can_compare(TEXT, "x" * 1000, Same())
    assert can_compare(answer_type(list[str]), f'["{"x" * 1000}"]', None)


def test_values_that_cannot_be_compared():
    class Odd:
        def __eq__(self, other):
            raise RuntimeError

        __hash__ = None

    assert agree(TEXT, "a", "a", lambda *_: Odd() == 1) is None


@each(
    "first, batched, expected",
    [(True, False, 1), (False, True, -1), (False, False, 0), (None, False, None), (True, None, None)],
)
def test_the_score_of_an_item(first, batched, expected):
    assert score(first=first, batched=batched) == pytest.approx(expected) if expected is not None else True
    assert (score(first=first, batched=batched) is None) == (expected is None)
