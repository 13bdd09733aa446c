"""The model's JSON as outputs, and what is said of JSON that does not fit."""

from __future__ import annotations

import json
import sys
import timeit
from typing import Any, Literal

import msgspec
import pydantic
import pytest
from helpers import each
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct
from output_types import (
    FORMATTED_TYPES,
    MSGSPEC_TYPES,
    PYDANTIC_TYPES,
    Cat,
    Category,
    Closed,
    Colour,
    Dog,
    Model,
    Node,
    Product,
    values,
)

from microbatch.schema.answer_type import answer_type
from microbatch.schema.validate import misfit


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("output_type", PYDANTIC_TYPES, ids=str)
@settings(max_examples=15)
@given(data=st.data())
def test_whatever_a_pydantic_schema_allows_decodes(output_type, data) -> None:
    kind = answer_type(output_type)
    value = data.draw(values(kind.schema, kind.schema))
    raw = json.dumps(value)
    output, text = kind.decode(raw)
    assert text == raw
    adapter = pydantic.TypeAdapter(output_type)
    # A null that is no value of the field is not set.
    assert output == adapter.validate_json(adapter.dump_json(output, by_alias=True, exclude_unset=True))
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


@each(
    ("output_type", "raw", "words"),
    [
        (Literal["a"], '"SECRET"', "$: not in enum"),
        (list[Category], '[{"category":"SECRET"}]', "$[0].category: not in enum"),
        (Literal["a"], '"SECRET - at `$.x"', "$: not in enum"),
        (Closed, '{"a":1,"SECRET":2}', "$[...]: nothing is allowed here"),
        (Cat | Dog, '{"type":"SECRET"}', "$: fits none of anyOf"),
        (Literal[1], "77", "$: not in enum"),
        (list[Picky], '[{"word":"SECRET"}]', "the answer is refused by a validator of the type"),
        (dict[str, int], '{"SECRET":"x"}', "$[...]: wrong type"),
        (Category, '{"SECRET', "the answer is not JSON"),
        (Colour, '"SECRET"', "$: not in enum"),
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


@each("output_type", MSGSPEC_TYPES)
@each("raw", ['"SECRET"', '["SECRET"]', '{"SECRET":1}', '{"type":"SECRET"}', "SECRET", '"SECRET', "3"])
def test_no_word_of_a_library_reaches_the_message(output_type, raw, monkeypatch) -> None:
    def told():
        try:
            answer_type(output_type).decode(raw)
        except ValueError as error:
            return str(error)
        return None

    before = told()
    assert before is None or "SECRET" not in before
    for kind in (msgspec.ValidationError, msgspec.DecodeError, msgspec.MsgspecError):
        monkeypatch.setattr(kind, "__str__", lambda error: "Unexpected SECRET - at `$.SECRET`")
    assert told() == before


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
