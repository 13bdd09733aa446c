"""Output types as schemas, and the model's JSON as outputs."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import gc
import json
import subprocess
import sys
import time
import timeit
import uuid
import weakref
from collections.abc import Callable
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
import pytest
import typing_extensions
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET, Meta, Struct, UnsetType

from microbatch.batching import schema as room
from microbatch.batching.conform import WELL_FORMED, misfit
from microbatch.batching.schema import answer_type
from microbatch.errors import ConfigError

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


# --- schemas


@pytest.mark.parametrize("output_type", ALL_TYPES, ids=str)
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


@pytest.mark.parametrize("output_type", [str, *ALL_TYPES], ids=str)
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


@pytest.mark.parametrize("output_type", ALL_TYPES, ids=str)
def test_no_definition_is_left_that_nothing_refers_to(output_type) -> None:
    schema = answer_type(output_type).schema
    referred = {node["$ref"].removeprefix("#/$defs/") for node in nodes(schema) if "$ref" in node}
    assert set(schema.get("$defs", {})) == referred


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


def test_choices_keep_the_order_they_were_written_in() -> None:
    assert answer_type(Literal["b", "c", "a"]).schema == {"enum": ["b", "c", "a"], "type": "string"}
    assert answer_type(Literal["a", "b", "c"]).schema["enum"] == ["a", "b", "c"]
    assert answer_type(Colour).schema == {"enum": ["red", "blue", "amber"], "type": "string"}
    assert answer_type(Level).schema == {"enum": [3, 1], "type": "integer"}
    mixed = answer_type(Literal["b", None, 2]).schema  # noqa: PYI061
    assert mixed == {"enum": ["b", None, 2], "type": ["null", "integer", "string"]}
    assert answer_type(Product).schema["properties"]["colour"]["enum"] == ["red", "blue", "amber"]


def test_what_was_optional_is_required_and_words_beside_a_reference_survive() -> None:
    schema = answer_type(Product).schema
    assert list(schema["properties"]) == ["title", "unitPrice", "tags", "colour", "level", "maker", "default", "kind"]
    assert schema["properties"]["title"] == {"type": "string"}  # a field may bear the name of a keyword
    assert schema["properties"]["default"] == {"type": "integer"}
    assert schema["properties"]["kind"]["description"] == "the shelf"
    assert schema["properties"]["kind"]["type"] == "object"
    assert schema["description"] == "A product.\n\n    As in the catalogue."


def test_recursive_types_keep_their_references_and_are_objects_at_the_root() -> None:
    kind = answer_type(Node)
    assert not kind.wrapped
    assert kind.single_schema["properties"]["next"]["anyOf"] == [{"$ref": "#/$defs/Node"}, {"type": "null"}]
    assert list(kind.batch_schema["$defs"]) == ["Node"]
    assert "$defs" not in kind.batch_schema["properties"]["results"]["items"]["properties"]["answer"]


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
    inner: Endless | UnsetType = UNSET


class EndlessList(Struct):
    inner: Annotated[list[EndlessList], Meta(min_length=1)] = msgspec.field(default_factory=list)


class EndlessModel(pydantic.BaseModel):
    inner: tuple[int, EndlessModel] = None


class Fine(Struct):
    inner: list[Fine] = []


@pytest.mark.parametrize("output_type", [Endless, EndlessList, EndlessModel])
def test_a_type_whose_answer_could_never_end_is_refused(output_type) -> None:
    with pytest.raises(ConfigError, match="contains itself without end"):
        answer_type(output_type)


def test_a_choice_that_could_never_end_beside_one_that_can_is_accepted() -> None:
    assert answer_type(Endless | None).decode("null") == (None, "null")


def test_a_recursion_that_can_stop_is_accepted() -> None:
    assert answer_type(Fine).decode('{"inner":[{"inner":[]}]}')[0] == Fine([Fine([])])


# --- decoding


@pytest.mark.parametrize("output_type", MSGSPEC_TYPES, ids=str)
@given(data=st.data())
def test_whatever_the_schema_allows_decodes_and_encodes_back_into_it(output_type, data) -> None:
    kind = answer_type(output_type)
    value = data.draw(values(kind.schema, kind.schema))
    assert misfit(value, kind.schema) is None
    raw = json.dumps(value, ensure_ascii=False)
    output, text = kind.decode(raw)
    assert text == raw
    assert kind.decode(msgspec.json.encode(msgspec.to_builtins(output)).decode())[0] == output
    assert kind.decode_single(raw)[0] == output
    wrapped = json.dumps({"answer": value}, ensure_ascii=False)
    if kind.wrapped:
        assert misfit({"answer": value}, kind.single_schema) is None
        assert kind.decode_single(wrapped) == (output, raw)
    reply = {"results": [{"id": "1bcdfg", "answer": value}]}
    assert misfit(reply, kind.batch_schema) is None


@pytest.mark.parametrize("output_type", PYDANTIC_TYPES, ids=str)
@settings(max_examples=25)
@given(data=st.data())
def test_whatever_a_pydantic_schema_allows_decodes(output_type, data) -> None:
    kind = answer_type(output_type)
    value = data.draw(values(kind.schema, kind.schema))
    raw = json.dumps(value)
    output, text = kind.decode(raw)
    assert text == raw
    assert output == pydantic.TypeAdapter(output_type).validate_json(raw)
    assert misfit({"results": [{"id": "x", "answer": value}]}, kind.batch_schema) is None


@given(
    st.builds(
        Product,
        title=st.text(),
        unit_price=st.floats(0, 1e6),
        tags=st.lists(st.text()),
        colour=st.sampled_from(Colour),
        default=st.integers(),
    )
)
def test_instances_written_in_full_fit_the_schema_and_come_back_equal(product) -> None:
    kind = answer_type(Product)
    members = {info.encode_name: getattr(product, info.name) for info in msgspec.structs.fields(Product)}
    raw = msgspec.json.encode(members).decode()
    assert misfit(json.loads(raw), kind.schema) is None
    assert kind.decode(raw)[0] == product


@pytest.mark.parametrize(("output_type", "raw", "output"), FORMATTED_TYPES)
def test_types_with_a_format_round_trip(output_type, raw, output) -> None:
    assert answer_type(output_type).decode(raw) == (output, raw)


def test_text_is_the_string_itself_twice() -> None:
    kind = answer_type()
    assert kind.decode(r'"a \"quoted\"\nline \ud83d\ude00"') == ('a "quoted"\nline \N{GRINNING FACE}',) * 2
    assert kind.decode_single("  as it is\n") == ("  as it is\n", "  as it is\n")
    assert kind.decode_single('"quoted"') == ('"quoted"', '"quoted"')


@given(st.text())
def test_any_text_comes_back_or_is_blank(text) -> None:
    kind = answer_type()
    if text.strip():
        assert kind.decode(msgspec.json.encode(text).decode()) == (text, text)
        assert kind.decode_single(text) == (text, text)
    else:
        for attempt in (lambda: kind.decode(msgspec.json.encode(text).decode()), lambda: kind.decode_single(text)):
            with pytest.raises(ValueError, match="blank"):
                attempt()


@pytest.mark.parametrize("blank", ["", " ", "\n\t ", "\u2003"])
def test_blank_text_is_no_answer(blank) -> None:
    with pytest.raises(ValueError, match="blank"):
        answer_type().decode(json.dumps(blank))
    with pytest.raises(ValueError, match="blank"):
        answer_type().decode_single(blank)


@pytest.mark.parametrize("raw", ["", "null", "5", "[]", '{"a":1}', '"open', '"\\ud83d"', '"a"b', '"\ud83d"'])
def test_what_is_no_json_string_is_no_text(raw) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        answer_type().decode(raw)
    assert type(caught.value) is ValueError


@pytest.mark.skipif(sys.gettrace() is not None, reason="tracing costs more than decoding")
def test_decoding_text_and_choices_costs_well_under_a_microsecond() -> None:
    text, choice = answer_type().decode, answer_type(Literal["b", "a"]).decode
    assert choice('"b"') == ("b", '"b"')
    for attempt in (lambda: text('"a reply of ordinary length"'), lambda: choice('"b"')):
        assert min(timeit.repeat(attempt, number=10_000, repeat=5)) / 10_000 < 1e-6


# --- what is refused, and in which words


class Picky(Struct):
    word: str

    def __post_init__(self) -> None:
        if self.word == "SECRET":
            raise ValueError(self.word)
        if self.word == "PANIC":
            raise BaseException(self.word)  # noqa: TRY002
        if self.word == "KEY":
            raise KeyError(self.word)


class PickyModel(pydantic.BaseModel):
    word: str
    sizes: dict[str, int] = {}

    @pydantic.field_validator("word")
    @classmethod
    def not_secret(cls, word: str) -> str:
        if word == "SECRET":
            raise ValueError(word)
        if word == "KEY":
            raise KeyError(word)
        return word


@pytest.mark.parametrize(
    ("output_type", "raw", "words"),
    [
        (Literal["a"], '"SECRET"', "a value or field that the type does not have"),
        (
            list[Category],
            '[{"category":"SECRET"}]',
            "a value or field that the type does not have - at `$[0].category`",
        ),
        (Literal["a"], '"SECRET - at `$.x"', "a value or field that the type does not have"),
        (Closed, '{"a":1,"SECRET":2}', "a value or field that the type does not have"),
        (Cat | Dog, '{"type":"SECRET"}', "a value or field that the type does not have - at `$.type`"),
        (Literal[1], "77", "a value or field that the type does not have"),
        (list[Picky], '[{"word":"SECRET"}]', "refused by a validator of the type - at `$[0]`"),
        (dict[str, int], '{"SECRET":"x"}', "Expected `int`, got `str` - at `$[...]`"),
        (Category, '{"SECRET', "Input data was truncated"),
        (Colour, '"SECRET"', "a value or field that the type does not have"),
        (PickyModel, '{"word":"SECRET"}', "$.word: value_error"),
        (PickyModel, '{"word":"x","sizes":{"SECRET":"SECRET"}}', "$.sizes[...]: int_parsing"),
        (list[PickyModel], '[{"word":3}]', "$[0].word: string_type"),
        (PickyModel, '{"SECRET', "$: json_invalid"),
    ],
)
def test_an_answer_that_does_not_fit_is_a_value_error_without_the_answers_words(output_type, raw, words) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        answer_type(output_type).decode(raw)
    assert str(caught.value) == words
    assert type(caught.value) is ValueError
    assert caught.value.__suppress_context__
    with pytest.raises(ValueError, match=r".") as caught:
        answer_type(output_type).decode_single("Sure: " + raw)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(("output_type", "raw"), [(Picky, '{"word":"SECRET"}'), (PickyModel, '{"word":"SECRET"}')])
def test_a_validators_own_error_is_the_cause(output_type, raw) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        answer_type(output_type).decode(raw)
    assert type(caught.value.__cause__) is ValueError
    assert caught.value.__cause__.args == ("SECRET",)


@pytest.mark.parametrize(
    ("output_type", "word", "error"),
    [(Picky, "KEY", KeyError), (Picky, "PANIC", BaseException), (PickyModel, "KEY", KeyError)],
)
def test_other_exceptions_of_the_callers_type_pass_as_they_are(output_type, word, error) -> None:
    raw = json.dumps({"word": word})
    for attempt in (answer_type(output_type).decode, answer_type(output_type).decode_single):
        with pytest.raises(error) as caught:
            attempt(raw)
        assert type(caught.value) is error


@pytest.mark.parametrize("output_type", [Any, list, Model, Node])
def test_json_nested_beyond_the_stack_is_a_value_error(output_type) -> None:
    for raw in ("[" * 100_000, '{"next":' * 100_000, "[" * 100_000 + "]" * 100_000):
        with pytest.raises(ValueError, match=r"."):
            answer_type(output_type).decode(raw)
        with pytest.raises(ValueError, match=r"."):
            answer_type(output_type).decode_single("see: " + raw)


class Plain:
    pass


class Doubtful(Struct):
    plain: Plain


Twin = msgspec.defstruct("Twin", [("a", int)], module="m")
OtherTwin = msgspec.defstruct("Twin", [("a", str)], module="m")


@pytest.mark.parametrize(
    ("output_type", "words"),
    [
        (Plain, "Plain"),
        (object, "object"),
        (list[Plain], "list"),
        (Doubtful, "Doubtful.*Plain.*not supported"),
        (Category("home"), "must be a type, not an instance of Category"),
        (len, "must be a type, not an instance of builtin_function"),
        (None, "must be a type, not an instance of NoneType"),
        ("Category", "must be a type, not an instance of str"),
        (5, "must be a type, not an instance of int"),
        (Callable[[int], str], "Callable"),
        (Category | Cat, "tagged"),
        (list["Nowhere"], "Nowhere"),  # noqa: F821
        (Literal[Colour.RED], "Literal"),
        (complex, "complex"),
        (tuple[Twin, OtherTwin], "two types that are both named .*Twin"),
        (list[Literal[Colour.RED]], "Literal"),
    ],
)
def test_a_type_without_a_json_form_is_a_config_error_that_names_it(output_type, words) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        answer_type(output_type)
    assert "\n" not in str(caught.value)
    assert "home" not in str(caught.value)


def test_a_field_whose_type_cannot_be_found_is_a_config_error() -> None:
    class Lost(Struct):
        inner: Nowhere  # noqa: F821

    with pytest.raises(ConfigError, match=r"Lost.*Nowhere"):
        answer_type(Lost)


def test_a_pydantic_model_that_is_not_finished_is_a_config_error() -> None:
    class Unfinished(pydantic.BaseModel):
        inner: Nowhere  # noqa: F821

    with pytest.raises(ConfigError, match="Unfinished"):
        answer_type(Unfinished)


def test_a_panic_while_compiling_is_a_config_error_and_an_interrupt_is_not() -> None:
    def compile_raising(error: BaseException) -> None:
        class Raising(pydantic.BaseModel):
            @classmethod
            def __get_pydantic_json_schema__(cls, core_schema, handler):
                raise error

        answer_type(Raising)

    class PanicException(BaseException):
        pass

    with pytest.raises(ConfigError, match="Raising"):
        compile_raising(PanicException("the core panicked"))
    with pytest.raises(ConfigError, match="PanicException"):
        compile_raising(PanicException())
    with pytest.raises(KeyboardInterrupt):
        compile_raising(KeyboardInterrupt())


# --- pydantic: found, never imported


def test_pydantic_is_never_imported_and_is_found_once_the_caller_has_imported_it() -> None:
    script = """
import sys, msgspec
from microbatch.batching.schema import answer_type
class Category(msgspec.Struct):
    a: int
assert answer_type(Category).decode('{"a":1}')[0].a == 1
assert "pydantic" not in sys.modules
import pydantic
class Model(pydantic.BaseModel):
    a: int
assert answer_type(list[Model]).decode('[{"a":1}]')[0] == [Model(a=1)]
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("output_type", [Checked, list[Checked], Annotated[int, pydantic.Field(gt=0)]])
def test_pydantic_constraints_hold_without_a_model(output_type) -> None:
    kind = answer_type(output_type)
    for raw in ("-1", '{"x":-1}', '[{"x":-1}]'):
        with pytest.raises(ValueError, match=r"greater_than|_type"):
            kind.decode(raw)


def test_a_default_that_is_not_json_is_nothing_to_warn_of() -> None:
    class Odd(pydantic.BaseModel):
        anything: Any = object()

    assert answer_type(Odd).decode('{"anything":[1]}')[0].anything == [1]


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
        "$defs": {"A": {"type": "object", "properties": {"x": {"type": "integer", "title": "X"}}}},
    }
    assert room._strict(schema, {})["properties"]["a"] == {
        "type": "object",
        "properties": {"x": {"type": "integer"}},
        "required": ["x"],
        "additionalProperties": False,
        "description": "d",
    }


# --- what is remembered


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
        room._types._entries.clear()
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

    assert room._identity(One) != room._identity(Two)
    assert room._identity(list[One]) != room._identity(list[Two])


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


@pytest.mark.parametrize("output_type", ALL_TYPES, ids=str)
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
    for number in range(room._MAX_REMEMBERED):
        answer_type(Category)  # what is asked for stays
        answer_type(list[make_category(f"c{number}")])
    kept = [pinned for pinned, _ in room._types._entries.values()]
    assert len(kept) == room._MAX_REMEMBERED
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


# --- a whole single reply


@pytest.mark.parametrize(
    "text",
    [
        '{"category":"home"}',
        '\n {"category": "home"} \n',
        '\ufeff{"category":"home"}',
        '```json\n{"category":"home"}\n```',
        '```\n{"category":"home"}```',
        '```JSON {"category":"home"}```',
        'Here you go:\n```json\n{"category":"home"}\n```\nAnything else?',
        '```python\nprint({})\n```\n```json\n{"category":"home"}\n```',
        'The answer is {"category":"home"}, I think.',
        'In {braces} and [brackets] it is {"category":"home"}.',
        'Not {"category":"toys"} but {"category":"home"}.',
        '```json\n{"category":"home"}',
        '<think>{"category":"beauty"}? No.</think>\n{"category":"home"}',
        '\ufeff```json\n{"category":"home"}\n```',
    ],
)
def test_fences_and_prose_around_the_json_are_tolerated(text) -> None:
    output, raw = answer_type(Category).decode_single(text)
    assert output == Category("home")
    assert json.loads(raw) == {"category": "home"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "home",
        "I cannot do that.",
        '{"category":"toys"}',
        '[{"category":"home"}]',
        '{"result":{"category":"home"}}',
        '"{\\"category\\":\\"home\\"}"',
        "``````",
        "{" * 100,
        '{"category":"home"',
    ],
)
def test_a_reply_without_the_answer_is_a_value_error(text) -> None:
    with pytest.raises(ValueError, match=r"."):
        answer_type(Category).decode_single(text)


@pytest.mark.parametrize(
    ("output_type", "text", "output", "raw"),
    [
        (int, '{"answer":5}', 5, "5"),
        (int, '{"answer": 5, "note": "x"}', 5, "5"),
        (int, "5", 5, "5"),
        (int, "\ufeff5", 5, "5"),
        (int, "```\n5\n```", 5, "5"),
        (list[int], 'So: {"answer":[1, 2]}', [1, 2], "[1, 2]"),
        (list[int], "So: [1, 2].", [1, 2], "[1, 2]"),
        (Literal["home"], '"home"', "home", '"home"'),
        (Literal["home"], 'It is "a" and "home" here.', "home", '"home"'),
        (Literal["home"], '```json\n{"answer": "home"}\n```', "home", '"home"'),
        (Cat | Dog, '{"answer":{"type":"Cat","name":"Tom"}}', Cat("Tom"), '{"type":"Cat","name":"Tom"}'),
        (Cat | Dog, '{"type":"Cat","name":"Tom"}', Cat("Tom"), '{"type":"Cat","name":"Tom"}'),
        (int | None, '{"answer":null}', None, "null"),
    ],
)
def test_a_wrapped_answer_is_unwrapped_and_a_bare_one_accepted(output_type, text, output, raw) -> None:
    assert answer_type(output_type).wrapped
    assert answer_type(output_type).decode_single(text) == (output, raw)


def test_what_is_wrong_with_the_form_that_was_asked_for_is_what_is_told() -> None:
    with pytest.raises(ValueError, match=r"^Expected `int`, got `str`$"):
        answer_type(int).decode_single('{"answer":"x"}')
    with pytest.raises(ValueError, match=r"^Expected `int`, got `null`$"):
        answer_type(int).decode_single('{"answer":null}')


class Answered(Struct, tag=True):
    answer: int


def test_a_bare_answer_that_looks_wrapped_is_still_found() -> None:
    kind = answer_type(Answered | Cat)
    assert kind.decode_single('{"type":"Answered","answer":3}')[0] == Answered(3)


@pytest.mark.parametrize("text", ["I rate it 4 of 5.", "4 or 5", 'Not {"answer": "x"} but 5.', "true"])
def test_a_bare_number_in_prose_is_no_answer(text) -> None:
    with pytest.raises(ValueError, match=r"."):
        answer_type(int).decode_single(text)


def test_a_string_inside_a_broken_object_is_no_answer() -> None:
    with pytest.raises(ValueError, match=r"."):
        answer_type(Literal["home", "toys"]).decode_single('{"excluded": "toys", category: home}')


@given(st.text(alphabet='{}[]":,`n1 \n\\') | st.text())
def test_any_text_gives_an_answer_that_fits_or_a_value_error(text) -> None:
    for output_type in (Category, int, Literal["n1"], dict[str, int], Inner):
        try:
            output, raw = answer_type(output_type).decode_single(text)
        except ValueError:
            continue
        assert answer_type(output_type).decode(raw) == (output, raw)


@pytest.mark.parametrize(
    "piece", ["{", "[", "```", "```\n", "``` ", '"', "\\", '{"a":', " ", "<think>", '{"category":"toys"} ']
)
def test_a_long_hopeless_reply_is_given_up_quickly(piece) -> None:
    text = "x " + piece * (500_000 // len(piece))
    assert len(list(room._candidates(text))) <= 1 + 2 * room._MAX_TRIES
    for output_type in (Category, int):
        kind = answer_type(output_type)
        started = time.perf_counter()
        with pytest.raises(ValueError, match=r"."):
            kind.decode_single(text)
        assert time.perf_counter() - started < 0.5


# --- schemas that callers give


def test_a_given_schema_is_used_as_it_is_and_the_output_is_the_json_text() -> None:
    schema = {
        "type": "object",
        "title": "Kept",
        "properties": {"a": {"type": "integer", "default": 3}, "b": {"oneOf": [{"type": "string"}, {"type": "null"}]}},
        "required": ["a"],
    }
    kind = answer_type(response_format=given_schema(schema))
    assert kind.schema == kind.single_schema == schema
    assert kind.batch_schema["properties"]["results"]["items"]["properties"]["answer"] == schema
    assert not kind.is_text
    assert kind.decode('{"a": 1}') == ('{"a": 1}', '{"a": 1}')
    assert kind.decode_single('Sure: {"a": 1}!') == ('{"a": 1}', '{"a": 1}')
    assert json.loads(kind.words.removeprefix("Each answer is JSON matching this JSON Schema: ")) == schema
    with pytest.raises(ValueError, match=r"^\$\.a: wrong type$"):
        kind.decode('{"a":"SECRET"}')
    with pytest.raises(ValueError, match="JSON"):
        kind.decode("{a}")


def test_a_given_schema_that_is_no_object_is_wrapped() -> None:
    kind = answer_type(response_format=given_schema({"type": "array", "items": {"type": "integer"}}))
    assert kind.wrapped
    assert kind.single_schema["properties"]["answer"] == kind.schema
    assert kind.decode_single('{"answer":[1,2]}') == ("[1,2]", "[1,2]")
    assert kind.decode_single("[1,2]") == ("[1,2]", "[1,2]")


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


@pytest.mark.parametrize(
    ("response_format", "words"),
    [
        ([], "response_format must be a JSON object, got list"),
        ({}, "type"),
        ({"type": "json_object"}, "json_schema"),
        ({"type": "json_schema"}, "response_format.json_schema must be a JSON object, got NoneType"),
        ({"type": "json_schema", "json_schema": {}}, "json_schema.schema must be a JSON object"),
        ({"type": "json_schema", "json_schema": {"schema": True}}, "got bool"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "name": 5}}, "name"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "strict": "yes"}}, "strict"),
        (given_schema({"properties": {"a": {"type": 5}}}), r"malformed at \$.properties\[...\].type"),
        (given_schema({"enum": [object()]}), "not JSON"),
        (given_schema({"items": {"$ref": "#/$defs/None"}}), r"#/\$defs/None, which is not in it"),
    ],
)
def test_a_malformed_response_format_is_a_config_error(response_format, words) -> None:
    with pytest.raises(ConfigError, match=words):
        answer_type(response_format=response_format)


def test_a_response_format_that_holds_itself_is_a_config_error() -> None:
    schema: dict[str, Any] = {"type": "object"}
    schema["properties"] = {"a": schema}
    with pytest.raises(ConfigError, match="not JSON"):
        answer_type(response_format=given_schema(schema))


def test_an_output_type_beside_a_response_format_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="Category"):
        answer_type(Category, given_schema({}))


def test_equal_response_formats_are_compiled_once_and_changing_one_later_changes_nothing() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    one = answer_type(response_format=given_schema(schema))
    assert answer_type(response_format=given_schema(json.loads(json.dumps(schema)))) is one
    schema["properties"]["a"]["type"] = "string"
    assert answer_type(response_format=given_schema(schema)) is not one
    assert one.schema["properties"]["a"]["type"] == "integer"
    swapped = {"properties": {"a": {"type": "integer"}}, "type": "object"}
    assert answer_type(response_format=given_schema(swapped)).key == one.key


def test_a_given_schema_shares_no_key_with_a_type_of_the_same_schema() -> None:
    kind = answer_type(Category)
    assert answer_type(response_format=given_schema(kind.schema)).key != kind.key


def test_keywords_of_other_drafts_pass_through() -> None:
    schema = {
        "type": "object",
        "dependencies": {"a": ["b"]},
        "if": {"$ref": 5},
        "dependentSchemas": 5,
        "items": [{"type": "integer"}],
    }
    kind = answer_type(response_format=given_schema(schema))
    assert kind.schema == schema
    assert kind.decode("{}") == ("{}", "{}")


def test_a_long_answer_to_a_given_schema_is_checked_to_its_end() -> None:
    kind = answer_type(
        response_format=given_schema({"type": "array", "items": {"anyOf": [{"type": "null"}, {"type": "integer"}]}})
    )
    assert kind.decode(json.dumps([1] * 50_000))
    with pytest.raises(ValueError, match=r"\[49999\]"):
        kind.decode(json.dumps([1] * 49_999 + ["x"]))
