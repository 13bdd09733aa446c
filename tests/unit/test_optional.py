"""Fields that a type can do without: null in an answer stands for their absence, unless it is a value of theirs."""

from __future__ import annotations

import decimal
import json
from typing import Literal, NotRequired

import msgspec
import pydantic
import pytest
from helpers import each
from msgspec import UNSET, Struct, UnsetType
from typing_extensions import TypedDict

from microbatch.schema.answer_type import answer_type

NULL = {"type": "null"}


class Priced(Struct):
    price: decimal.Decimal
    name: str = "x"
    nothing: None = None
    maybe: str | None = "y"


class Link(Struct):
    next: Link | UnsetType = UNSET
    label: str = "l"


class Kind(pydantic.BaseModel):
    kind: Literal["a"] = "a"
    other: Literal["b"] = pydantic.Field(default_factory=lambda: "b")
    size: int = 1


class Info(TypedDict):
    note: NotRequired[Literal["n"]]


def test_a_field_with_a_default_may_be_null_and_every_field_stays_required() -> None:
    schema = answer_type(Priced).schema
    assert schema["required"] == ["price", "name", "nothing", "maybe"]
    assert schema["properties"]["name"] == {"anyOf": [{"type": "string"}, NULL]}
    assert schema["properties"]["nothing"] == NULL
    assert schema["properties"]["maybe"] == {"anyOf": [{"type": "string"}, NULL]}
    assert "x-optional" not in json.dumps(schema)


def test_a_field_that_can_have_only_its_default_is_asked_for_as_it_is() -> None:
    """The constants that tell the members of a union apart must not be left out."""
    schema = answer_type(Kind).schema
    assert schema["properties"]["kind"] == {"const": "a", "type": "string"}
    assert schema["properties"]["other"]["anyOf"][1] == NULL
    assert answer_type(Info).schema["properties"]["note"]["anyOf"][1] == NULL
    assert answer_type(Info).decode('{"note":null}')[0] == {}
    assert answer_type(Kind).decode('{"kind":"a","other":null,"size":null}')[0] == Kind()


@each(
    "raw, output",
    [
        (
            '{"price": 12.10, "name": null, "nothing": null, "maybe": null}',
            Priced(decimal.Decimal("12.10"), maybe=None),
        ),
        (
            '{"price": "1.0", "name": "null", "nothing": null, "maybe": "null"}',
            Priced(decimal.Decimal("1.0"), "null", None, "null"),
        ),
        ('\n {"name" : null , "maybe":"\\u00e9\\n", "price":1e2}\n', Priced(decimal.Decimal("1e2"), maybe="\u00e9\n")),
        ('{"price":1,"name":"first","name":null,"maybe":null}', Priced(decimal.Decimal(1), maybe=None)),
    ],
)
def test_what_is_not_left_out_is_read_as_it_was_written(raw, output) -> None:
    kind = answer_type(Priced)
    assert kind.decode(raw) == (output, raw)
    assert str(kind.decode(raw)[0].price) == str(output.price)


def test_nulls_of_the_fitting_member_of_a_union_are_left_out() -> None:
    class A(pydantic.BaseModel):
        kind: Literal["a"]
        x: int = 1

    class B(pydantic.BaseModel):
        kind: Literal["b"]
        x: int | None

    kind = answer_type(A | B)
    assert kind.decode('{"kind":"a","x":null}')[0] == A(kind="a")
    assert kind.decode('{"kind":"b","x":null}')[0] == B(kind="b", x=None)


def test_nulls_where_the_type_wants_a_value_are_still_refused() -> None:
    with pytest.raises(ValueError, match=r"^\$\.price: wrong type$"):
        answer_type(Priced).decode('{"price":null,"name":null}')
    with pytest.raises(ValueError, match=r"^\$\.price: missing$"):
        answer_type(Priced).decode('{"name":null}')


def test_what_the_model_leaves_out_instead_is_fine_as_well() -> None:
    assert answer_type(Priced).decode('{"price":1}')[0] == Priced(decimal.Decimal(1))


@each("raw", ['{"next":null', "null", '{"label":null}x', '{"label":"\ud83d","next":null}', "[" * 100_000 + "null"])
def test_what_is_no_answer_is_a_value_error(raw) -> None:
    with pytest.raises(ValueError, match=r"."):
        answer_type(Link).decode(raw)


def test_a_deep_answer_is_read_to_its_end() -> None:
    raw = '{"label":null,"next":' * 150 + '{"label":"end","next":null}' + "}" * 150
    output = answer_type(Link).decode(raw)[0]
    for _ in range(150):
        assert output.label == "l"
        output = output.next
    assert output == Link(label="end")


def test_answers_without_a_null_are_not_looked_into() -> None:
    raw = msgspec.json.encode([Priced(decimal.Decimal(1), maybe="z")] * 1_000).decode().replace('"nothing":null,', "")
    kind, plain = answer_type(list[Priced]), msgspec.json.Decoder(list[Priced])
    assert kind.decode(raw)[0] == plain.decode(raw)
