"""What an answer must be, compiled once per type and remembered."""

from __future__ import annotations

import gc
import json
import weakref
from typing import Annotated, Literal

import msgspec
import pytest
from helpers import each
from msgspec import Meta, Struct
from output_types import ALL_TYPES, Category, Plain

from microbatch.errors import ConfigError
from microbatch.schema import answer_type as admission
from microbatch.schema.answer_type import answer_type


def test_plain_text_has_one_constant_form() -> None:
    kind = answer_type()
    assert kind is answer_type(str) is answer_type(output_type=str, response_format=None)
    assert (kind.key, kind.schema, kind.is_text) == (b"", {"type": "string"}, True)
    assert (kind.single_schema, kind.hint, kind.wrapped) == (None, None, False)
    assert kind.words == "Each answer is a JSON string holding the full reply to that request."
    assert kind.batch_schema == {
        "type": "object",
        "properties": {
            "results": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"id": {"type": "string"}, "answer": {"type": "string"}},
                    "required": ["id", "answer"],
                    "additionalProperties": False,
                },
            }
        },
        "required": ["results"],
        "additionalProperties": False,
    }


def test_a_struct_is_told_in_full_in_the_words_and_the_hint() -> None:
    kind = answer_type(Category)
    schema = (
        '{"type":"object","properties":{"category":{"enum":["home","beauty","other"],"type":"string"}},'
        '"required":["category"],"additionalProperties":false}'
    )
    assert kind.words == "Each answer is JSON matching this JSON Schema: " + schema
    assert kind.hint == "Reply with JSON only, no prose and no code fence, matching this JSON Schema: " + schema
    assert kind.single_schema == kind.schema == json.loads(schema)
    assert not kind.wrapped
    assert repr(kind) == f"AnswerType({schema})"


def test_a_type_is_compiled_once_however_it_is_written() -> None:
    assert answer_type(Category) is answer_type(Category)
    assert answer_type(list[Category]) is answer_type(list[Category])
    assert answer_type(Literal["a", "b"]) is answer_type(Literal["a", "b"])
    assert answer_type(Annotated[int, Meta(ge=1)]) is answer_type(Annotated[int, Meta(ge=1)])
    assert answer_type(int | None) is answer_type(int | None)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Literal[1], Literal[True]),
        (list[Literal[1]], list[Literal[True]]),
        (list[Literal[0]] | None, list[Literal[False]] | None),
        (Literal["a", "b"], Literal["b", "a"]),
        (list[Literal["a", "b"]], list[Literal["b", "a"]]),
        (Annotated[list[Literal[1]], Meta(max_length=2)], Annotated[list[Literal[True]], Meta(max_length=2)]),
        (int | str, str | int),
    ],
)
def test_types_that_python_takes_for_equal_are_not_confused(one, other) -> None:
    for first, second in ((one, other), (other, one)):
        admission._types.clear()
        assert answer_type(first) is not answer_type(second)
        assert answer_type(first).key != answer_type(second).key


def test_ones_and_trues_decode_to_what_was_asked_for() -> None:
    assert answer_type(list[Literal[1]]).decode("[1]")[0] == [1]
    assert answer_type(list[Literal[True]]).decode("[true]")[0] == [True]
    for output_type, raw in ((list[Literal[1]], "[true]"), (list[Literal[True]], "[1]")):
        with pytest.raises(ValueError, match=r"."):
            answer_type(output_type).decode(raw)


def test_classes_that_claim_to_be_equal_are_told_apart() -> None:
    class Same(type):
        def __eq__(cls, other: object) -> bool:
            return True

        def __hash__(cls) -> int:
            return 1

    class One(metaclass=Same):
        pass

    class Two(metaclass=Same):
        pass

    assert admission._identity(One) != admission._identity(Two)
    assert admission._identity(list[One]) != admission._identity(list[Two])


def make_category(field: str = "category") -> type[Struct]:
    return msgspec.defstruct("Category", [(field, Literal["home", "beauty", "other"])])


def test_classes_made_anew_share_a_key_and_decode_to_themselves() -> None:
    one, two = make_category(), make_category()
    assert answer_type(one).key == answer_type(two).key == answer_type(Category).key
    assert answer_type(one).key != answer_type(make_category("group")).key
    for made in (one, two):
        assert type(answer_type(made).decode('{"category":"home"}')[0]) is made


def test_the_order_of_properties_is_part_of_the_key() -> None:
    one = msgspec.defstruct("A", [("reason", str), ("verdict", bool)])
    two = msgspec.defstruct("A", [("verdict", bool), ("reason", str)])
    assert answer_type(one).key != answer_type(two).key


@each("output_type", ALL_TYPES)
def test_keys_are_equal_only_for_equal_schemas(output_type) -> None:
    kind = answer_type(output_type)
    assert kind.key
    for other in ALL_TYPES:
        assert (answer_type(other).key == kind.key) == (
            json.dumps(answer_type(other).schema) == json.dumps(kind.schema)
        )


def test_only_the_last_few_types_are_kept_alive() -> None:
    made = make_category()
    gone = weakref.ref(made)
    answer_type(made)
    answer_type(Category)
    for number in range(admission._MAX_REMEMBERED):
        answer_type(Category)  # what is asked for stays
        answer_type(list[make_category(f"c{number}")])
    kept = [pinned for pinned, _ in admission._types._values.values()]
    assert len(kept) == admission._MAX_REMEMBERED
    assert Category in kept
    del made, kept
    gc.collect()
    assert gone() is None


def test_a_type_that_cannot_be_hashed_is_compiled_each_time() -> None:
    odd = Annotated[int, Meta(extra_json_schema={"description": "odd"}), ["unhashable"]]
    assert answer_type(odd) is not answer_type(odd)
    assert answer_type(odd).key == answer_type(odd).key
    assert answer_type(odd).decode("5") == (5, "5")


def test_a_refused_type_is_refused_again() -> None:
    for _ in range(2):
        with pytest.raises(ConfigError):
            answer_type(Plain)
