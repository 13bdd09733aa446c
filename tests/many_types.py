"""Output types as users write them, each with what a model answers and what the caller gets."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import ipaddress  # noqa: TC003 pydantic reads the annotation
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Generic, Literal, NamedTuple, NewType, NotRequired, Optional, TypeVar

import attrs
import msgspec
import pydantic
import typing_extensions as te
from msgspec import UNSET, Meta, Struct, UnsetType
from pydantic import BaseModel, ConfigDict, Field, RootModel
from pydantic.alias_generators import to_camel

T = TypeVar("T")
UTC = dt.UTC
WHEN, DAY, TIME, SPAN = "2024-05-17T09:30:00Z", "2024-05-17", "09:30:00", "PT15M"
WHEN_READ, DAY_READ, TIME_READ = dt.datetime(2024, 5, 17, 9, 30, tzinfo=UTC), dt.date(2024, 5, 17), dt.time(9, 30)
SPAN_READ = dt.timedelta(minutes=15)
ID = "7f3b2c1e-5a4d-4e6f-8a9b-0c1d2e3f4a5b"
ID_READ = uuid.UUID(ID)


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Mixed(enum.Enum):
    A = "a"
    B = 2


class Word(enum.StrEnum):
    YES = "yes"
    NO = "no"


Score = NewType("Score", int)


# --- msgspec


class Plain(Struct):
    a: int


class WithNone(Struct):
    a: int
    b: str | None = None


class NoneFirst(Struct):
    b: str | None = "x"


class Defaults(Struct):
    a: int
    b: str = "x"
    c: list[int] = []
    d: Colour = Colour.RED
    e: Plain | UnsetType = UNSET


class Unset(Struct):
    a: int | UnsetType = UNSET
    b: int | UnsetType | None = UNSET


class Omitting(Struct, omit_defaults=True):
    phone: str = ""


class Strictest(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    a: int
    b: int = 2


class Camel(Struct, rename="camel"):
    user_name: str
    home_town: str = "?"


class Renamed(Struct):
    a: int = msgspec.field(name="the a", default=1)


class TagA(Struct, tag="a"):
    x: int
    note: str = "-"


class TagB(Struct, tag="b"):
    x: str
    note: str | None = None


class Tagged(Struct):
    one: TagA | TagB
    other: TagA | TagB | None = None
    many: list[TagA | TagB] = []


class Limits(Struct):
    n: Annotated[int, Meta(ge=1, le=5, description="one to five")]
    s: Annotated[str, Meta(min_length=1, max_length=5, pattern="^[a-z]+$")]
    xs: Annotated[list[int], Meta(min_length=1, max_length=2)]
    f: Annotated[float, Meta(gt=0, lt=1, multiple_of=0.25)]
    o: Annotated[int, Meta(ge=3)] = 4


class Ahead(Struct):
    code: Annotated[str, Meta(pattern="^(?!0)[0-9]+$")]


class RowLike(Struct, array_like=True):
    a: int
    b: str = "z"


class Tree(Struct):
    v: int
    kids: list[Tree] = []


class Chain(Struct):
    v: int
    next: Chain | None = None


class Optionally(Struct):
    v: int
    next: Optionally | UnsetType = UNSET


class Times(Struct):
    when: dt.datetime
    day: dt.date
    time: dt.time
    span: dt.timedelta
    aware: Annotated[dt.datetime, Meta(tz=True)] | None = None


class Rare(Struct):
    price: decimal.Decimal
    id: uuid.UUID
    blob: bytes
    more: decimal.Decimal = decimal.Decimal(1)


class Maps(Struct):
    m: dict[str, int]
    by: dict[Literal["x", "y"], int] = {}


class Anything(Struct):
    x: Any
    y: Any = None


class Generic1(Struct, Generic[T]):
    item: T
    note: str = "n"


class Described(Struct):
    """A described struct."""

    a: Annotated[str, Meta(description="what a is", examples=["q"], title="A")]


class Deep(Struct):
    inside: list[dict[str, list[Plain]]]


class Holding(Struct):
    inner: Defaults
    inners: list[Defaults] = []
    by_name: dict[str, Defaults] = {}
    pair: tuple[int, Defaults] | None = None


class Nothing(Struct):
    pass


class Sets(Struct):
    tags: set[str]
    some: frozenset[int] = frozenset()


class Several(Struct):
    x: int | str | None
    y: list[int] | str = "none"


# --- dataclasses, TypedDict, NamedTuple, attrs


@dataclasses.dataclass
class Data:
    a: int
    b: str = "x"
    c: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FrozenData:
    a: int
    inner: Data | None = None


class Typed(te.TypedDict):
    a: int
    b: NotRequired[str]


class Partial(te.TypedDict, total=False):
    phone: str
    fax: str | None


class WithRequired(te.TypedDict, total=False):
    a: te.Required[int]
    b: Annotated[int, Meta(ge=0)]


class Nested(te.TypedDict):
    one: Typed
    many: NotRequired[list[Typed]]


class Row(NamedTuple):
    a: int
    b: str = "z"


@attrs.define
class Attrs:
    a: int
    b: str = "x"


# --- pydantic


class Simple(BaseModel):
    name: str
    n: int = 3


class Optionals(BaseModel):
    a: str | None
    b: int | None = None
    c: list[str] = Field(default_factory=list)
    d: Optional[Simple] = Simple(name="d")  # noqa: UP045 both spellings are in use


class Inside(BaseModel):
    inner: Simple
    many: list[Simple]
    by: dict[str, Simple] = {}


class TwoDescribed(BaseModel):
    inner: Simple = Field(description="the inner one")
    other: Simple = Field(Simple(name="o"), description="the other one")


class Recursive(BaseModel):
    value: int
    child: Recursive | None = None


class TreeModel(BaseModel):
    value: int
    children: list[TreeModel] = []


class Dates(BaseModel):
    when: dt.datetime
    day: dt.date
    t: dt.time = dt.time(0)
    delta: dt.timedelta = dt.timedelta(0)


class Price(BaseModel):
    price: decimal.Decimal


class Bounded(BaseModel):
    price: Annotated[decimal.Decimal, Field(ge=0, max_digits=8, decimal_places=2)]


class Identified(BaseModel):
    id: uuid.UUID
    parent: uuid.UUID = uuid.UUID(int=0)


class Constrained(BaseModel):
    code: Annotated[str, Field(pattern=r"^[A-Z]{3}$", min_length=3, max_length=3)]
    n: Annotated[int, Field(ge=1, le=5)] = 5
    xs: Annotated[list[int], Field(min_length=1, max_length=3)]


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = 9


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    bark: bool


class Bird(BaseModel):
    kind: Literal["bird", "hen"] = "bird"
    flies: bool


class Owner(BaseModel):
    pet: Annotated[Cat | Dog | Bird, Field(discriminator="kind")]
    second: Annotated[Cat | Dog | Bird, Field(discriminator="kind")] | None = None


class Untagged(BaseModel):
    pet: Cat | Dog


class Either(BaseModel):
    x: Simple | Price | None = None
    y: int | list[Simple] = 1


class AnyField(BaseModel):
    x: Any
    y: Any = 5


class Tuples(BaseModel):
    p: tuple[int, str]
    q: tuple[int, ...] = ()


class SetFields(BaseModel):
    tags: set[str]
    f: frozenset[int] = frozenset()


class Templated(BaseModel, Generic[T]):
    item: T
    note: str = "n"


class Aliased(BaseModel):
    user_name: str = Field(alias="userName")
    town: str = Field("?", alias="homeTown")


class Generated(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)

    user_name: str
    home_town: str = "?"


class Chosen(BaseModel):
    user_name: str = Field(validation_alias=pydantic.AliasChoices("user", "userName"))


class Explained(BaseModel):
    """A described model."""

    a: str = Field(description="what A is", examples=["x"])
    b: int = Field(1, description="what B is", ge=0, title="Bee")


class Computed(BaseModel):
    w: int
    h: int = 2

    @pydantic.computed_field
    @property
    def area(self) -> int:
        return self.w * self.h


class Validated(BaseModel):
    n: int = 2

    @pydantic.field_validator("n")
    @classmethod
    def even(cls, n: int) -> int:
        if n % 2:
            raise ValueError("odd")
        return n


class Numbers(RootModel[list[int]]):
    pass


class Counts(RootModel[dict[str, int]]):
    pass


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")

    a: int


class Forbidding(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    a: int
    when: dt.datetime
    b: str = "x"


class Enums(BaseModel):
    c: Colour
    level: Level = Level.HIGH
    w: Word | None = None


class DescribedEnum(BaseModel):
    c: Colour = Field(description="the colour")
    d: Colour = Field(Colour.RED, description="another")


class Floats(BaseModel):
    x: float
    y: float | None = Field(None, ge=0, lt=1)
    z: Annotated[float, Field(multiple_of=0.5)] = 1.5


class MixedEnum(BaseModel):
    m: Mixed
    n: Mixed = Mixed.A


class Blob(BaseModel):
    b: bytes


class Link(BaseModel):
    u: pydantic.HttpUrl


class Links(BaseModel):
    u: pydantic.AnyUrl
    more: list[pydantic.HttpUrl] = []


class Address(BaseModel):
    ip: ipaddress.IPv4Address
    six: ipaddress.IPv6Address | None = None


class Secret(BaseModel):
    s: pydantic.SecretStr


class EmptyModel(BaseModel):
    pass


class AllDefault(BaseModel):
    a: int = 1
    b: str = "b"
    c: Simple = Simple(name="c")
    d: bool = False


class Located(BaseModel):
    path: Path


class Lenient(BaseModel):
    n: pydantic.StrictInt | pydantic.StrictStr
    b: pydantic.StrictBool = True


class Positive(BaseModel):
    n: pydantic.PositiveInt
    m: pydantic.NonNegativeFloat = 0.0


class Marked(BaseModel):
    model_config = ConfigDict(json_schema_extra={"examples": [{"a": 1}], "x-mine": "y"})

    a: int = Field(json_schema_extra={"x-field": 1})


class Ahead2(BaseModel):
    model_config = ConfigDict(regex_engine="python-re")

    code: str = Field(pattern="^(?!0)[0-9]+$")


class Old(BaseModel):
    b: pydantic.Base64Bytes


@pydantic.dataclasses.dataclass
class CheckedData:
    a: int
    b: str = "x"


class ModelDict(te.TypedDict):
    inner: Simple
    extra: NotRequired[Simple]


@dataclasses.dataclass
class DataOfModels:
    inner: Simple
    more: list[Simple] = dataclasses.field(default_factory=list)


def same(*values: Any) -> list[tuple[Any, Any]]:
    """Values that come back as they are."""
    return [(value, value) for value in values]


_SIMPLE, _SIMPLE_READ = {"name": "x", "n": 4}, Simple(name="x", n=4)
_NULLED, _NULLED_READ = {"name": "x", "n": None}, Simple(name="x")
_DEFAULTS = {"a": 1, "b": None, "c": None, "d": None, "e": None}

PYTHON: list[tuple[Any, list[tuple[Any, Any]]]] = [
    (str, same("x")),
    (int, same(5)),
    (float, [(2.5, 2.5), (2, 2.0)]),
    (bool, same(True)),
    (type(None), same(None)),
    (list[str], same(["a"], [])),
    (list, same([1, "a"])),
    (dict, same({"a": 1})),
    (dict[str, int], same({"a": 1})),
    (dict[str, Any], same({"a": [1, None]})),
    (dict[int, str], [({"1": "a"}, {1: "a"})]),
    (dict[str, list[int]], same({"a": [1]})),
    (Any, same({"a": None}, 1)),
    (tuple[int, str], [([1, "a"], (1, "a"))]),
    (tuple[int, ...], [([1, 2], (1, 2))]),
    (tuple[int, int, int, int], [([1, 2, 3, 4], (1, 2, 3, 4))]),
    (set[str], [(["a", "b", "a"], {"a", "b"})]),
    (frozenset[int], [([1], frozenset({1}))]),
    (Sequence[int], same([1])),
    (Mapping[str, int], same({"a": 1})),
    (Literal["a", "b"], same("a")),
    (Literal[1, 2, 3], same(2)),
    (Literal["a", 1, None], same(None, "a", 1)),  # noqa: PYI061
    (Literal["a"] | None, same(None, "a")),
    (Optional[int], same(None, 3)),  # noqa: UP045
    (int | str, same("x", 1)),
    (int | None | str, same(None, "x", 1)),
    (int | list[int] | dict[str, int], same(1, [1], {"a": 1})),
    (Colour, [("red", Colour.RED)]),
    (Level, [(2, Level.HIGH)]),
    (Word, [("yes", Word.YES)]),
    (Colour | None, [(None, None), ("green", Colour.GREEN)]),
    (list[Colour], [(["red"], [Colour.RED])]),
    (list[Literal["x", "y"]], same(["x"])),
    (list[list[int]], same([[1], []])),
    (list[list[list[list[list[list[list[int]]]]]]], same([[[[[[[1]]]]]]])),
    (list[list[list[list[list[list[int]]]]]], same([[[[[[1]]]]]])),
    (list[int | None], same([1, None])),
    (dt.datetime, [(WHEN, WHEN_READ)]),
    (dt.date, [(DAY, DAY_READ)]),
    (dt.time, [(TIME, TIME_READ)]),
    (dt.timedelta, [(SPAN, SPAN_READ)]),
    (decimal.Decimal, [("12.50", decimal.Decimal("12.50")), (12.5, decimal.Decimal("12.5"))]),
    (uuid.UUID, [(ID, ID_READ)]),
    (bytes, [("aGk=", b"hi")]),
    (bytearray, [("aGk=", bytearray(b"hi"))]),
    (Score, same(3)),
    (Final[int], same(1)),
    (Annotated[int, Meta(ge=1, le=5)], same(3)),
    (Annotated[str, Meta(pattern="^a", max_length=5)], same("abc")),
    (Annotated[str, Meta(description="a colour word")], same("red")),
    (Annotated[str, Meta(min_length=1, max_length=20)] | None, same("red", None)),
    (Annotated[list[int], Meta(max_length=3)], same([1])),
    (Annotated[dict[str, int], Meta(min_length=1)], same({"a": 1})),
    (Annotated[dt.datetime, Meta(tz=True)], [(WHEN, WHEN_READ)]),
    (Annotated[float, Meta(gt=0, lt=1)], same(0.5)),
]

MSGSPEC: list[tuple[Any, list[tuple[Any, Any]]]] = [
    (Plain, [({"a": 1}, Plain(1))]),
    (list[Plain], [([{"a": 1}], [Plain(1)])]),
    (dict[str, Plain], [({"k": {"a": 1}}, {"k": Plain(1)})]),
    (Plain | None, [(None, None), ({"a": 1}, Plain(1))]),
    (WithNone, [({"a": 1, "b": None}, WithNone(1)), ({"a": 1, "b": "x"}, WithNone(1, "x"))]),
    (NoneFirst, [({"b": None}, NoneFirst(None)), ({"b": "y"}, NoneFirst("y"))]),
    (
        Defaults,
        [(_DEFAULTS, Defaults(1)), ({**_DEFAULTS, "c": [2], "e": {"a": 2}}, Defaults(1, c=[2], e=Plain(2)))],
    ),
    (list[Defaults], [([_DEFAULTS, {**_DEFAULTS, "b": "y"}], [Defaults(1), Defaults(1, "y")])]),
    (dict[str, Defaults], [({"k": _DEFAULTS}, {"k": Defaults(1)})]),
    (tuple[int, Defaults], [([1, _DEFAULTS], (1, Defaults(1)))]),
    (Defaults | None, [(_DEFAULTS, Defaults(1)), (None, None)]),
    (Defaults | list[Defaults], [([_DEFAULTS], [Defaults(1)]), (_DEFAULTS, Defaults(1))]),
    (Unset, [({"a": None, "b": None}, Unset(b=None)), ({"a": 1, "b": 2}, Unset(1, 2))]),
    (Omitting, [({"phone": None}, Omitting()), ({"phone": "1"}, Omitting("1"))]),
    (Strictest, [({"a": 1, "b": None}, Strictest(a=1)), ({"a": 1, "b": 3}, Strictest(a=1, b=3))]),
    (Camel, [({"userName": "u", "homeTown": None}, Camel("u")), ({"userName": "u", "homeTown": "h"}, Camel("u", "h"))]),
    (Renamed, [({"the a": None}, Renamed(1)), ({"the a": 2}, Renamed(2))]),
    (TagA | TagB, [({"type": "b", "x": "y", "note": None}, TagB("y")), ({"type": "a", "x": 1, "note": None}, TagA(1))]),
    (
        Tagged,
        [
            (
                {
                    "one": {"type": "a", "x": 1, "note": None},
                    "other": None,
                    "many": [{"type": "b", "x": "s", "note": "n"}],
                },
                Tagged(TagA(1), None, [TagB("s", "n")]),
            )
        ],
    ),
    (Limits, [({"n": 3, "s": "abc", "xs": [1], "f": 0.5, "o": None}, Limits(3, "abc", [1], 0.5))]),
    (Ahead, [({"code": "12"}, Ahead("12"))]),
    (RowLike, [([1, "b"], RowLike(1, "b"))]),
    (Tree, [({"v": 1, "kids": [{"v": 2, "kids": None}]}, Tree(1, [Tree(2)]))]),
    (Chain, [({"v": 1, "next": {"v": 2, "next": None}}, Chain(1, Chain(2)))]),
    (Optionally, [({"v": 1, "next": {"v": 2, "next": None}}, Optionally(1, Optionally(2)))]),
    (
        Times,
        [
            (
                {"when": WHEN, "day": DAY, "time": TIME, "span": SPAN, "aware": None},
                Times(WHEN_READ, DAY_READ, TIME_READ, SPAN_READ),
            )
        ],
    ),
    (
        Rare,
        [({"price": "1.50", "id": ID, "blob": "aGk=", "more": None}, Rare(decimal.Decimal("1.50"), ID_READ, b"hi"))],
    ),
    (Maps, [({"m": {"a": 1}, "by": {"x": 1}}, Maps({"a": 1}, {"x": 1})), ({"m": {}, "by": None}, Maps({}))]),
    (Anything, [({"x": None, "y": [None]}, Anything(None, [None]))]),
    (Generic1[int], [({"item": 1, "note": None}, Generic1(1))]),
    (Generic1[Plain], [({"item": {"a": 1}, "note": "m"}, Generic1(Plain(1), "m"))]),
    (Generic1[Defaults], [({"item": _DEFAULTS, "note": None}, Generic1(Defaults(1)))]),
    (Generic1[int | None], [({"item": None, "note": None}, Generic1(None))]),
    (Described, [({"a": "x"}, Described("x"))]),
    (Deep, [({"inside": [{"k": [{"a": 1}]}]}, Deep([{"k": [Plain(1)]}]))]),
    (
        Holding,
        [
            ({"inner": _DEFAULTS, "inners": None, "by_name": None, "pair": None}, Holding(Defaults(1))),
            (
                {"inner": _DEFAULTS, "inners": [_DEFAULTS], "by_name": {"k": _DEFAULTS}, "pair": [1, _DEFAULTS]},
                Holding(Defaults(1), [Defaults(1)], {"k": Defaults(1)}, (1, Defaults(1))),
            ),
        ],
    ),
    (Nothing, [({}, Nothing())]),
    (Sets, [({"tags": ["a"], "some": None}, Sets({"a"}))]),
    (Several, [({"x": None, "y": None}, Several(None)), ({"x": "s", "y": [1]}, Several("s", [1]))]),
    (Data, [({"a": 1, "b": "q", "c": []}, Data(1, "q")), ({"a": 1, "b": None, "c": None}, Data(1))]),
    (FrozenData, [({"a": 1, "inner": {"a": 2, "b": None, "c": ["z"]}}, FrozenData(a=1, inner=Data(2, c=["z"])))]),
    (list[Data], [([{"a": 1, "b": None, "c": None}], [Data(1)])]),
    (Typed, [({"a": 1, "b": "x"}, {"a": 1, "b": "x"}), ({"a": 1, "b": None}, {"a": 1})]),
    (
        Partial,
        [({"phone": None, "fax": None}, {"fax": None}), ({"phone": "1", "fax": "2"}, {"phone": "1", "fax": "2"})],
    ),
    (WithRequired, [({"a": 1, "b": None}, {"a": 1}), ({"a": 1, "b": 2}, {"a": 1, "b": 2})]),
    (
        Nested,
        [({"one": {"a": 1, "b": None}, "many": [{"a": 2, "b": "x"}]}, {"one": {"a": 1}, "many": [{"a": 2, "b": "x"}]})],
    ),
    (te.TypedDict("Functional", {"a": int}), same({"a": 1})),
    (Row, [([1, "b"], Row(1, "b")), ([1], Row(1))]),
    (list[Row], [([[1, "b"]], [Row(1, "b")])]),
    (Attrs, [({"a": 1, "b": "q"}, Attrs(1, "q")), ({"a": 1, "b": None}, Attrs(1))]),
]

PYDANTIC: list[tuple[Any, list[tuple[Any, Any]]]] = [
    (Simple, [(_SIMPLE, _SIMPLE_READ), (_NULLED, _NULLED_READ)]),
    (Simple | None, [(None, None), (_NULLED, _NULLED_READ)]),
    (list[Simple], [([_SIMPLE, _NULLED], [_SIMPLE_READ, _NULLED_READ])]),
    (dict[str, Simple], [({"k": _NULLED}, {"k": _NULLED_READ})]),
    (dict[Annotated[str, Field(pattern="^k")], Simple], [({"k": _NULLED}, {"k": _NULLED_READ})]),
    (tuple[int, Simple], [([1, _NULLED], (1, _NULLED_READ))]),
    (Simple | Recursive, [(_NULLED, _NULLED_READ), ({"value": 1, "child": None}, Recursive(value=1))]),
    (
        Optionals,
        [
            ({"a": None, "b": None, "c": None, "d": None}, Optionals(a=None, d=None)),
            ({"a": "x", "b": 1, "c": ["y"], "d": _NULLED}, Optionals(a="x", b=1, c=["y"], d=_NULLED_READ)),
        ],
    ),
    (
        Inside,
        [
            ({"inner": _NULLED, "many": [_NULLED], "by": None}, Inside(inner=_NULLED_READ, many=[_NULLED_READ])),
            (
                {"inner": _SIMPLE, "many": [], "by": {"k": _NULLED}},
                Inside(inner=_SIMPLE_READ, many=[], by={"k": _NULLED_READ}),
            ),
        ],
    ),
    (TwoDescribed, [({"inner": _SIMPLE, "other": None}, TwoDescribed(inner=_SIMPLE_READ))]),
    (
        Recursive,
        [({"value": 1, "child": {"value": 2, "child": None}}, Recursive(value=1, child=Recursive(value=2)))],
    ),
    (
        TreeModel,
        [
            (
                {"value": 1, "children": [{"value": 2, "children": None}]},
                TreeModel(value=1, children=[TreeModel(value=2)]),
            )
        ],
    ),
    (
        Dates,
        [({"when": WHEN, "day": DAY, "t": None, "delta": SPAN}, Dates(when=WHEN_READ, day=DAY_READ, delta=SPAN_READ))],
    ),
    (
        Price,
        [({"price": "12.5"}, Price(price=decimal.Decimal("12.5"))), ({"price": 3}, Price(price=decimal.Decimal(3)))],
    ),
    (Bounded, [({"price": "12.5"}, Bounded(price=decimal.Decimal("12.5")))]),
    (Identified, [({"id": ID, "parent": None}, Identified(id=ID_READ))]),
    (Constrained, [({"code": "ABC", "n": None, "xs": [1]}, Constrained(code="ABC", xs=[1]))]),
    (Annotated[Cat | Dog, Field(discriminator="kind")], [({"kind": "dog", "bark": True}, Dog(bark=True))]),
    (
        Owner,
        [
            ({"pet": {"kind": "cat", "lives": None}, "second": None}, Owner(pet=Cat(kind="cat"))),
            (
                {"pet": {"kind": "dog", "bark": True}, "second": {"kind": "hen", "flies": False}},
                Owner(pet=Dog(bark=True), second=Bird(kind="hen", flies=False)),
            ),
        ],
    ),
    (Untagged, [({"pet": {"kind": "dog", "bark": True}}, Untagged(pet=Dog(bark=True)))]),
    (Cat | Dog, [({"kind": "cat", "lives": None}, Cat(kind="cat"))]),
    (
        Either,
        [({"x": _NULLED, "y": None}, Either(x=_NULLED_READ)), ({"x": None, "y": [_NULLED]}, Either(y=[_NULLED_READ]))],
    ),
    (AnyField, [({"x": None, "y": None}, AnyField(x=None, y=None))]),
    (
        Tuples,
        [({"p": [1, "a"], "q": None}, Tuples(p=(1, "a"))), ({"p": [1, "a"], "q": [2]}, Tuples(p=(1, "a"), q=(2,)))],
    ),
    (SetFields, [({"tags": ["a"], "f": None}, SetFields(tags={"a"}))]),
    (Templated[int], [({"item": 1, "note": None}, Templated[int](item=1))]),
    (Templated[Simple], [({"item": _NULLED, "note": "m"}, Templated[Simple](item=_NULLED_READ, note="m"))]),
    (Templated[list[int] | None], [({"item": None, "note": None}, Templated[list[int] | None](item=None))]),
    (Aliased, [({"userName": "u", "homeTown": None}, Aliased(userName="u"))]),
    (Generated, [({"userName": "u", "homeTown": None}, Generated(user_name="u"))]),
    (Chosen, [({"user": "u"}, Chosen(user="u"))]),
    (Explained, [({"a": "x", "b": None}, Explained(a="x"))]),
    (Computed, [({"w": 2, "h": None}, Computed(w=2))]),
    (Validated, [({"n": 4}, Validated(n=4)), ({"n": None}, Validated())]),
    (Numbers, [([1, 2], Numbers([1, 2]))]),
    (Counts, [({"a": 1}, Counts({"a": 1}))]),
    (Open, [({"a": 1}, Open(a=1))]),
    (Forbidding, [({"a": 1, "when": WHEN, "b": None}, Forbidding(a=1, when=WHEN_READ))]),
    (
        Enums,
        [
            ({"c": "red", "level": None, "w": None}, Enums(c=Colour.RED)),
            ({"c": "red", "level": 1, "w": "no"}, Enums(c=Colour.RED, level=Level.LOW, w=Word.NO)),
        ],
    ),
    (DescribedEnum, [({"c": "green", "d": None}, DescribedEnum(c=Colour.GREEN))]),
    (Floats, [({"x": 1, "y": 0.5, "z": None}, Floats(x=1, y=0.5))]),
    (MixedEnum, [({"m": 2, "n": None}, MixedEnum(m=Mixed.B)), ({"m": "a", "n": 2}, MixedEnum(m=Mixed.A, n=Mixed.B))]),
    (Blob, [({"b": "hi"}, Blob(b=b"hi"))]),
    (Link, [({"u": "https://example.com/"}, Link(u="https://example.com/"))]),
    (
        Links,
        [
            (
                {"u": "ftp://example.com/", "more": ["https://example.com/"]},
                Links(u="ftp://example.com/", more=["https://example.com/"]),
            )
        ],
    ),
    (Address, [({"ip": "192.0.2.7", "six": "2001:db8::7"}, Address(ip="192.0.2.7", six="2001:db8::7"))]),
    (Secret, [({"s": "x"}, Secret(s="x"))]),
    (EmptyModel, [({}, EmptyModel())]),
    (
        AllDefault,
        [
            ({"a": None, "b": None, "c": None, "d": None}, AllDefault()),
            ({"a": 2, "b": None, "c": _NULLED, "d": True}, AllDefault(a=2, c=_NULLED_READ, d=True)),
        ],
    ),
    (Located, [({"path": "/x"}, Located(path=Path("/x")))]),
    (Lenient, [({"n": "1", "b": None}, Lenient(n="1"))]),
    (Positive, [({"n": 1, "m": None}, Positive(n=1))]),
    (Marked, [({"a": 1}, Marked(a=1))]),
    (Ahead2, [({"code": "12"}, Ahead2(code="12"))]),
    (Old, [({"b": "aGk="}, Old(b=b"aGk="))]),
    (CheckedData, [({"a": 1, "b": None}, CheckedData(1))]),
    (ModelDict, [({"inner": _NULLED, "extra": None}, {"inner": _NULLED_READ})]),
    (DataOfModels, [({"inner": _NULLED, "more": None}, DataOfModels(_NULLED_READ))]),
    (Annotated[int, Field(ge=1, le=5)], same(3)),
    (Annotated[str, Field(description="a colour word", max_length=9)], same("red")),
    (list[Annotated[str, Field(max_length=3)]], same(["a"])),
    (pydantic.HttpUrl, [("https://example.com/", pydantic.HttpUrl("https://example.com/"))]),
]

CASES = [*PYTHON, *MSGSPEC, *PYDANTIC]
