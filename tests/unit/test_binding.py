"""`bind`: functions of one item."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import msgspec
import pydantic
import pytest
from helpers import batcher_for

import microbatch as mb
from microbatch.template import MissingField, Template
from microbatch.testing import SimulatedModel, SimulatedTransport


class Product(msgspec.Struct):
    name: str
    price: float


@dataclasses.dataclass
class Parcel:
    name: str
    price: float


class Model:
    """Looks like a model of pydantic."""

    def model_dump(self, mode):
        assert mode == "json"
        return {"name": "cup", "price": 2.5}


def echoing():
    return SimulatedTransport(SimulatedModel(answer=lambda text, schema: text.upper()))


async def test_the_function_returns_the_output_for_its_item():
    model = SimulatedModel()
    async with batcher_for(SimulatedTransport(model)) as batcher:
        side = batcher.bind("Say the side.", output_type=Literal["left", "right"], template="Where is {name}?")
        assert await side({"name": "the door"}) in {"left", "right"}
    async with batcher_for(echoing()) as batcher:
        shout = batcher.bind("Shout.")
        assert await shout("hello") == "HELLO"
        assert await shout(["a", 1]) == '["A",1]'
        assert await shout({"a": 1}) == '{"A":1}'
        assert await batcher.bind(None)("quiet") == "QUIET"


@pytest.mark.parametrize(
    "item",
    [{"name": "cup", "price": 2.5}, Product("cup", 2.5), Parcel("cup", 2.5), Model()],
    ids=lambda item: type(item).__name__,
)
async def test_records_have_fields_of_any_kind(item):
    async with batcher_for(echoing()) as batcher:
        assert await batcher.bind("Shout.", template="{{{name}}} costs {price}")(item) == "{CUP} COSTS 2.5"


async def test_a_map_gives_each_item_its_own_result_in_order():
    async def later(items):
        for item in items:
            yield item

    async with batcher_for(echoing()) as batcher:
        shout = batcher.bind("Shout.", template="{word}")
        items = [{"word": f"w{n}"} if n % 7 else {"other": n} for n in range(50)]
        for source in (items, later(items)):
            results = [result async for result in shout.map(source)]
            assert [result.index for result in results] == list(range(50))
            for n, result in enumerate(results):
                if n % 7:
                    assert result.unwrap().output == f"W{n}"
                else:
                    assert isinstance(result.error, mb.ConfigError)
                    assert '"word" is missing' in str(result.error)
        assert batcher.stats().batches > 0


async def test_what_is_wrong_is_said_when_the_function_is_made():
    async with batcher_for(echoing()) as batcher:
        for template in ("no field", "{name", "{name!r}", "{name:>9}", "{} and {name}", "{ }"):
            with pytest.raises(mb.ConfigError):
                batcher.bind("Shout.", template=template)
        with pytest.raises(mb.ConfigError, match="system"):
            batcher.bind(["Shout."])
        with pytest.raises(mb.ConfigError, match="max_tokens"):
            batcher.bind("Shout.", max_tokens=0)
        with pytest.raises(TypeError):
            batcher.bind("Shout.", unknown=1)


@pytest.mark.parametrize("item", [5, "text", None, [1], object()], ids=lambda item: type(item).__name__)
async def test_an_item_without_fields_is_refused_where_the_template_names_some(item):
    async with batcher_for(echoing()) as batcher:
        with pytest.raises(mb.ConfigError, match="mapping"):
            await batcher.bind("Shout.", template="{name}")(item)
        assert batcher.stats().upstream_calls == 0


async def test_an_item_that_is_no_json_is_refused():
    async with batcher_for(echoing()) as batcher:
        with pytest.raises(mb.ConfigError, match="JSON"):
            await batcher.bind("Shout.")(object())


async def test_a_record_that_cannot_be_written_is_an_error_of_its_own_item_only():
    class Record(pydantic.BaseModel):
        name: Any

    async with batcher_for(echoing()) as batcher:
        ask = batcher.bind("Shout.", template="{name}")
        results = [result async for result in ask.map([Record(name="a"), Record(name=object()), Record(name="b")])]
    assert [result.error is None for result in results] == [True, False, True]
    with pytest.raises(mb.ConfigError, match="JSON"):
        results[1].unwrap()


def test_a_template_reaches_into_nested_records():
    assert Template("{a.b} {a.c}").render({"a": {"b": 1}, "a.c": "own"}) == "1 own"
    with pytest.raises(MissingField, match=r"a\.d"):
        Template("{a.d}").render({"a": {"b": 1}})
