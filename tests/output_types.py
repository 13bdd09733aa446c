"""Output types of every kind, and what tests of their schemas need: values a schema allows, and the schemas inside it."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import uuid
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    NotRequired,
    Optional,
    TypedDict,
    TypeVar,
    Union,
)

import attrs
import msgspec
import pydantic
import pydantic.dataclasses
import typing_extensions
from hypothesis import strategies as st
from msgspec import UNSET, Meta, Struct, UnsetType

T = TypeVar("T")


Score = NewType("Score", int)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"
    AMBER = "amber"


class Level(enum.IntEnum):
    HIGH = 3
    LOW = 1


class Category(Struct):
    category: Literal["home", "beauty", "other"]


class Cat(Struct, tag=True):
    name: str


class Dog(Struct, tag=True, rename="camel"):
    bark_count: int = 3


class Node(Struct):
    """A linked list."""

    value: int
    next: Annotated[Node | None, Meta(description="what follows")] = None


class Product(Struct, rename="camel", omit_defaults=True):
    """A product.

    As in the catalogue.
    """

    title: str
    unit_price: Annotated[float, Meta(ge=0)] = 0.0
    tags: list[str] = []
    colour: Annotated[Colour, Meta(description="the main one", title="Colour!")] = Colour.BLUE
    level: Level = Level.LOW
    maker: Annotated[Category | None, Meta(description="who made it")] = None
    default: int | UnsetType = UNSET
    kind: Annotated[Category, Meta(description="the shelf")] = msgspec.field(default_factory=lambda: Category("home"))


class Row(Struct, array_like=True):
    a: int
    b: str = "x"


class Closed(Struct, forbid_unknown_fields=True):
    a: int


class Box(Struct, Generic[T]):
    inside: T


class Empty(Struct):
    pass


class Pair(NamedTuple):
    a: int
    b: str = "x"


class Movie(TypedDict, total=False):
    title: str
    year: NotRequired[int]


@dataclasses.dataclass
class Point:
    x: int
    y: Annotated[int, Meta(ge=0, lt=10)] = 0
    colour: Colour = Colour.RED


@attrs.define
class Size:
    width: int
    height: int = 1


class Inner(pydantic.BaseModel):
    """An inner one."""

    colour: Colour = pydantic.Field(Colour.RED, description="which")


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")

    kind: Literal["model"] = "model"
    title: str | None = None
    inner: Inner = pydantic.Field(description="inside")
    children: list[Model] = []
    counts: dict[str, int] = {}
    count: Annotated[int, pydantic.Field(gt=0, alias="theCount")] = 1


class Other(pydantic.BaseModel):
    kind: Literal["other"]


@pydantic.dataclasses.dataclass
class Checked:
    x: Annotated[int, pydantic.Field(gt=0)]


@dataclasses.dataclass
class Holder:
    inner: Inner
    also: list[Other] | None = None


class Event(typing_extensions.TypedDict):  # pydantic takes no other before Python 3.12
    inner: Inner


MSGSPEC_TYPES = [
    Annotated[str, Meta(min_length=1, max_length=20)],
    int,
    float,
    bool,
    Score,
    Literal["b", "a"],
    Literal[3, 1],
    Literal["b", None, 2],  # noqa: PYI061
    Colour,
    Level,
    Category,
    Cat | Dog,
    Cat | None,
    int | str | None,
    Union[int, list[Category]],  # noqa: UP007 - both spellings are in use
    Optional[Colour],  # noqa: UP045
    Node,
    list[Node],
    Product,
    Row,
    Closed,
    Box[int],
    Box[Category],
    Empty,
    Pair,
    Movie,
    Point,
    Size,
    list[str],
    set[int],
    frozenset[str],
    tuple[int, str],
    tuple[int, ...],
    dict[str, int],
    dict[str, Category],
    Annotated[list[int], Meta(min_length=1, max_length=3)],
    Annotated[int, Meta(gt=0, multiple_of=5)],
    Any,
    dict,
    list,
]


FORMATTED_TYPES = [
    (dt.datetime, '"2026-01-02T03:04:05Z"', dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)),
    (dt.date, '"2026-01-02"', dt.date(2026, 1, 2)),
    (dt.timedelta, '"P1D"', dt.timedelta(days=1)),
    (uuid.UUID, f'"{uuid.UUID(int=7)}"', uuid.UUID(int=7)),
    (decimal.Decimal, '"1.50"', decimal.Decimal("1.50")),
    (bytes, '"aGk="', b"hi"),
    (dict[int, str], '{"1":"a"}', {1: "a"}),
]


PYDANTIC_TYPES = [
    Model,
    Inner,
    list[Model],
    Model | None,
    dict[str, Inner],
    tuple[int, Inner],
    Annotated[Model | Other, pydantic.Field(discriminator="kind")],
    Checked,
    Holder,
    Event,
    Annotated[int, pydantic.Field(gt=3)],
    list[Annotated[Inner, "a note"]],
]


ALL_TYPES = [*MSGSPEC_TYPES, *PYDANTIC_TYPES, *(one for one, _, _ in FORMATTED_TYPES)]


OBJECT_ROOTS = {"Category", "Node", "Product", "Closed", "Box", "Empty", "Movie", "Point", "Size", "Model", "Inner"}


def given_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def values(schema: Any, root: Any, depth: int = 0) -> st.SearchStrategy[Any]:
    """JSON values that *schema* allows, drawn from nothing but the schema."""
    if schema is False:
        return st.nothing()
    if schema is True or not schema.keys() - {"description"}:
        return st.none() | st.integers(-5, 5) | st.text(max_size=3)
    if "$ref" in schema:
        assert list(schema) == ["$ref"]
        return values(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, depth + 1)
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        options = [one for one in schema["anyOf"] if depth < 3 or "$ref" not in one]
        return st.one_of(*(values(one, root, depth) for one in options or schema["anyOf"]))
    match schema["type"]:
        case "object" if "properties" in schema:
            return st.fixed_dictionaries({name: values(one, root, depth) for name, one in schema["properties"].items()})
        case "object":
            return st.dictionaries(
                st.text(max_size=3), values(schema.get("additionalProperties", True), root, depth), max_size=3
            )
        case "array":
            first = [values(one, root, depth) for one in schema.get("prefixItems", [])]
            if first or (depth > 2 and "minItems" not in schema):
                return st.tuples(*first).map(list)
            return st.lists(
                values(schema.get("items", True), root, depth),
                min_size=schema.get("minItems", 0),
                max_size=schema.get("maxItems", 2),
            )
        case "integer":
            step = schema.get("multipleOf", 1)
            low = max(schema.get("minimum", -100), schema.get("exclusiveMinimum", -101) + 1)
            high = min(schema.get("maximum", 100), schema.get("exclusiveMaximum", 101) - 1)
            return st.integers(-(-low // step), high // step).map(lambda whole: whole * step)
        case "number":
            return st.floats(schema.get("minimum"), schema.get("maximum"), allow_nan=False, allow_infinity=False)
        case "string":
            return st.text(
                st.characters(codec="utf-8"), min_size=schema.get("minLength", 0), max_size=schema.get("maxLength", 9)
            )
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case other:
            raise AssertionError(other)


def nodes(schema: Any) -> list[dict[str, Any]]:
    """Every schema in *schema*, found without the room's own walker."""
    if not isinstance(schema, dict):
        return []
    inner = [one for key in ("properties", "$defs", "definitions") for one in schema.get(key, {}).values()]
    inner += [schema[key] for key in ("items", "additionalProperties", "not") if key in schema]
    inner += [one for key in ("anyOf", "oneOf", "allOf", "prefixItems") for one in schema.get(key, [])]
    return [schema, *(found for one in inner for found in nodes(one))]


class Plain:
    pass
