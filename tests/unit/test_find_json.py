"""A whole single reply: the JSON past fences and prose."""

from __future__ import annotations

import json
import time
from typing import Annotated, Literal

import pytest
from helpers import each
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta, Struct
from output_types import Cat, Category, Dog, Inner

from microbatch.schema.answer_type import answer_type
from microbatch.schema.decode import MAX_TRIES, candidates


@each(
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
    for kind, text, told in (
        (Annotated[int, Meta(ge=5)], '{"answer":1}', r"^\$: minimum$"),
        (list[int], '{"answer":[1,null]}', r"^\$\[1\]: wrong type$"),
    ):
        with pytest.raises(ValueError, match=told):
            answer_type(kind).decode_single(text)


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
    assert len(list(candidates(text))) <= 1 + 2 * MAX_TRIES
    for output_type in (Category, int):
        kind = answer_type(output_type)
        started = time.process_time()
        with pytest.raises(ValueError, match=r"."):
            kind.decode_single(text)
        assert time.process_time() - started < 0.5
