"""A MalformedAnswer says which field and rule of which type failed, and nothing of what the model or the caller wrote."""

from __future__ import annotations

import asyncio
import datetime as dt  # noqa: TC003 the libraries read the annotations
import decimal
import uuid  # noqa: TC003
from typing import Annotated, Any, Literal

import msgspec
import pydantic
import pytest
from helpers import each
from msgspec import Meta, Struct
from output_types import given_schema

import microbatch as mb
from microbatch.testing import ScriptedTransport


class Line(Struct):
    sku: Annotated[str, Meta(pattern="^[A-Z]+$", max_length=20)]
    count: Annotated[int, Meta(ge=1)] = 1


class Order(Struct, rename="camel"):
    lines: list[Line]
    placed_at: dt.datetime
    due: dt.date | None = None
    total: decimal.Decimal = decimal.Decimal(0)
    key: uuid.UUID | None = None
    by_name: dict[str, int] = {}


class Checked(Struct):
    word: str

    def __post_init__(self) -> None:
        if self.word == "SECRET":
            raise ValueError(f"{self.word} is not allowed")


class Model(pydantic.BaseModel):
    n: Annotated[int, pydantic.Field(ge=1)]
    when: dt.date | None = None
    sizes: dict[str, int] = {}

    @pydantic.field_validator("n")
    @classmethod
    def even(cls, n: int) -> int:
        if n % 2:
            raise ValueError(f"SECRET {n}")
        return n


class Raising(pydantic.BaseModel):
    word: str = pydantic.Field(default_factory=lambda: Raising.fail())  # noqa: PLW0108 it is not there yet

    @staticmethod
    def fail() -> str:
        raise ValueError("SECRET")


GOOD = {"lines": [{"sku": "A", "count": 1}], "placedAt": "2024-05-17T09:30:00Z"}
WANTED = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}, "required": ["a"]}

CASES: list[tuple[Any, Any, str]] = [
    (Order, {**GOOD, "lines": [{"sku": "A"}, {"sku": "SECRET", "count": 0}]}, "Order: $.lines[1].count: minimum"),
    (Order, {**GOOD, "lines": [{"sku": "secret"}]}, "Order: $.lines[0].sku: pattern"),
    (Order, {**GOOD, "lines": [{"sku": "SECRET" * 9}]}, "Order: $.lines[0].sku: maxLength"),
    (Order, {**GOOD, "lines": "SECRET"}, "Order: $.lines: wrong type"),
    (Order, {"lines": []}, "Order: $.placedAt: missing"),
    (Order, {**GOOD, "placedAt": "SECRET"}, "Order: $.placedAt: not of its type"),
    (Order, {**GOOD, "due": "SECRET"}, "Order: $.due: not a date"),
    (Order, {**GOOD, "total": "SECRET"}, "Order: $.total: not a decimal"),
    (Order, {**GOOD, "key": "SECRET"}, "Order: $.key: not a uuid"),
    (Order, {**GOOD, "byName": {"SECRET": "SECRET"}}, "Order: $.byName[...]: wrong type"),
    (list[Line], [{"sku": "A"}, {"count": 3}], "list[test_malformed_answer.Line]: $[1].sku: missing"),
    (Literal["a", "b"], "SECRET", "typing.Literal['a', 'b']: $: not in enum"),
    (int, "SECRET", "int: $: wrong type"),
    (Model, {"n": 0}, "Model: $.n: greater_than_equal"),
    (Model, {"n": 3}, "Model: $.n: value_error"),
    (Model, {}, "Model: $.n: missing"),
    (Model, {"n": 2, "when": "SECRET"}, "Model: $.when: date_from_datetime_parsing"),
    (Model, {"n": 2, "sizes": {"SECRET": "SECRET"}}, "Model: $.sizes[...]: int_parsing"),
    (given_schema(WANTED), {"a": "SECRET"}, "response_format: $.a: maxLength"),
    (given_schema(WANTED), {}, "response_format: $.a: missing"),
]


async def error_of(output_type: Any, value: Any, *, count: int) -> mb.MalformedAnswer:
    kind = (
        {"params": {"response_format": output_type}} if isinstance(output_type, dict) else {"output_type": output_type}
    )
    policy = mb.FlushPolicy(idle="wait", max_wait=0.01)
    transport = ScriptedTransport(answer=lambda text: value)
    async with mb.Microbatcher(transport, policy=policy, tokens="bytes") as batcher:
        asking = (batcher.submit([{"role": "user", "content": f"PRIVATE {n}"}], **kind) for n in range(count))
        error, *_ = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(error, mb.MalformedAnswer)
    return error


@pytest.mark.parametrize(("output_type", "value", "words"), CASES, ids=range(len(CASES)))
async def test_the_type_the_field_and_the_rule_are_named_and_nobodys_text_is(output_type, value, words):
    for count in (1, 2):
        error = await error_of(output_type, value, count=count)
        chain = [error]
        while isinstance(chain[-1].__cause__, mb.MalformedAnswer):
            chain.append(chain[-1].__cause__)
        for one in chain:
            assert f"the answer does not fit {words}" in str(one)
            for text in ("SECRET", "secret", "PRIVATE"):
                assert text not in f"{one!s} {one!r}"
        assert msgspec.json.encode(value).decode() in error.raw


@each(
    "output_type, value, words",
    [
        (Checked, "SECRET", "the answer does not fit Checked: $: wrong type"),
        (Checked, {"word": "SECRET"}, "the answer is refused by a validator of the type (Checked)"),
        (list[Checked], [{"word": "a"}, {"word": "SECRET"}], "Checked] at $[1])"),
        (Checked, "{", "the answer does not fit Checked: $: wrong type"),
    ],
)
async def test_a_validators_own_words_are_the_cause_only(output_type, value, words):
    error = await error_of(output_type, value, count=1)
    assert "SECRET" not in str(error)
    assert words in str(error)


async def test_what_is_no_json_is_told_with_the_types_name():
    transport = ScriptedTransport("SECRET", "SECRET")
    async with mb.Microbatcher(transport, tokens="bytes") as batcher:
        with pytest.raises(mb.MalformedAnswer) as caught:
            await batcher.submit([{"role": "user", "content": "hi"}], output_type=Order)
    assert str(caught.value) == "the answer is not JSON (Order)"


async def test_an_error_from_the_callers_code_is_not_quoted():
    error = await error_of(Raising, {"word": None}, count=1)
    assert "SECRET" not in str(error)


async def test_the_name_of_a_type_does_not_fill_the_message():
    error = await error_of(Literal[tuple(f"label {n}" for n in range(300))], "SECRET", count=1)
    assert len(str(error)) < 200
