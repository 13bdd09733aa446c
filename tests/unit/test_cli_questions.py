"""What is asked about a line of the input."""

from __future__ import annotations

import json
from typing import Literal

import msgspec
import pytest

from microbatch.cli.console import UsageError
from microbatch.cli.plan import read_labels, read_schema, read_text
from microbatch.cli.reading.questions import BatchLines, LineError, Templated

MESSAGES = [{"role": "user", "content": "hello"}]


def test_a_template_puts_fields_in_place_of_their_names():
    assert Templated("Product: {name}, {price}").render({"name": "Lamp", "price": "9"}) == "Product: Lamp, 9"


def test_backslash_n_and_t_are_newline_and_tab_and_two_backslashes_are_one():
    assert Templated(r"{a}\n\t\\n\d").render({"a": "x"}) == "x\n\t\\n\\d"


def test_a_backslash_in_a_field_stays_as_it_is():
    assert Templated("{a}").render({"a": r"C:\new"}) == r"C:\new"


def test_double_braces_are_braces():
    assert Templated("{{{a}}}").render({"a": "x"}) == "{x}"


def test_what_is_no_text_is_written_as_json():
    template = Templated("{a} {b} {c} {d}")
    assert template.render({"a": 1.5, "b": None, "c": True, "d": {"é": [1]}}) == '1.5 null true {"é":[1]}'


def test_dots_reach_into_objects_unless_a_field_has_just_that_name():
    assert Templated("{a.b}").render({"a": {"b": "inner"}}) == "inner"
    assert Templated("{a.b}").render({"a": {"b": "inner"}, "a.b": "outer"}) == "outer"


def test_a_template_cannot_reach_attributes():
    with pytest.raises(LineError, match="__class__"):
        Templated("{a.__class__}").render({"a": "x"})


@pytest.mark.parametrize("record", [{}, {"a": "text"}, {"a": [1]}, {"a": {"c": 1}}])
def test_a_missing_field_is_named(record):
    with pytest.raises(LineError, match=r'the field "a.b" is missing') as caught:
        Templated("{a.b}").render(record)
    assert caught.value.field == "a.b"


@pytest.mark.parametrize("text", ["{a", "a}", "{}", "{a:>3}", "{a!r}", "no field", ""])
def test_a_template_that_means_nothing_is_a_usage_error(text):
    with pytest.raises(UsageError, match="--template"):
        Templated(text)


def test_labels_become_a_literal_and_a_system_text_comes_first():
    questions = Templated("{a}", system="Sort.", labels=["x", "y"], options={"max_tokens": 5})
    request = questions.request({"a": "q"}, "17")
    assert request.messages == [{"role": "system", "content": "Sort."}, {"role": "user", "content": "q"}]
    assert (request.id, request.output_type, request.max_tokens) == ("17", Literal["x", "y"], 5)


def test_a_schema_becomes_a_response_format():
    schema = {"type": "json_schema", "json_schema": {"schema": {}}}
    assert Templated("{a}", schema=schema).request({"a": "q"}, "1").params == {"response_format": schema}


def test_a_batch_line_asks_what_its_body_says():
    body = {"model": "m", "messages": MESSAGES, "max_tokens": 3, "temperature": 0, "top_p": 0.5, "stream": False}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    request = BatchLines(options={"temperature": 1.0}, needs_model=True).request(line, "1")
    assert (request.model, request.max_tokens, request.temperature) == ("m", 3, 0)
    assert request.messages == MESSAGES
    assert request.params == {"top_p": 0.5}


def test_max_completion_tokens_is_the_newer_name_of_max_tokens():
    request = BatchLines().request({"body": {"messages": MESSAGES, "max_completion_tokens": 9}}, "1")
    assert (request.max_tokens, request.params) == (9, None)


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ({}, "body"),
        ({"body": []}, "body"),
        ({"body": {"model": "m"}}, "body.messages"),
        ({"body": {"model": "m", "messages": "hi"}}, "body.messages"),
        ({"body": {"messages": MESSAGES}}, "body.model"),
        ({"body": {"model": "m", "messages": MESSAGES, "stream": True}}, "body.stream"),
        ({"method": "GET", "body": {"model": "m", "messages": MESSAGES}}, "method"),
        ({"url": "/v1/embeddings", "body": {"model": "m", "messages": MESSAGES}}, "url"),
    ],
)
def test_a_wrong_batch_line_names_the_field(line, field):
    with pytest.raises(LineError) as caught:
        BatchLines(needs_model=True).request(line, "1")
    assert caught.value.field == field
    assert f'"{field}"' in str(caught.value)


def test_a_text_can_come_from_a_file_without_its_last_line_break(tmp_path):
    (tmp_path / "system.txt").write_text("Sort.\nWell.\n")
    assert read_text(f"@{tmp_path}/system.txt", "--system") == "Sort.\nWell."
    assert read_text("Sort.", "--system") == "Sort."
    assert read_text("@@home", "--system") == "@home"


def test_a_file_that_cannot_be_read_is_named_with_its_flag(tmp_path):
    with pytest.raises(UsageError, match=r"--system: cannot read .*nowhere"):
        read_text("@nowhere", "--system")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="UTF-8"):
        read_text(f"@{tmp_path}/latin", "--system")


def test_labels_come_from_the_flag_or_from_a_file(tmp_path):
    assert read_labels("a, b c,d") == ["a", "b c", "d"]
    (tmp_path / "lines").write_text("a\n\nb, c\n")
    assert read_labels(f"@{tmp_path}/lines") == ["a", "b, c"]
    (tmp_path / "list.json").write_text('["a", "b"]')
    assert read_labels(f"@{tmp_path}/list.json") == ["a", "b"]


@pytest.mark.parametrize("value", ["", "a,,b", "a,", "a,b,a"])
def test_empty_and_repeated_labels_are_usage_errors(value):
    with pytest.raises(UsageError, match="--labels"):
        read_labels(value)


def test_a_schema_file_holds_a_schema_or_a_whole_response_format(tmp_path):
    schema = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema))
    wrapped = read_schema(str(path))
    assert wrapped["json_schema"]["schema"] == schema
    path.write_bytes(msgspec.json.encode(wrapped))
    assert read_schema(str(path)) == wrapped


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_schema_file_that_holds_no_object_is_a_usage_error(tmp_path, content):
    (tmp_path / "schema.json").write_bytes(content)
    with pytest.raises(UsageError, match="--schema"):
        read_schema(str(tmp_path / "schema.json"))
    with pytest.raises(UsageError, match="cannot read"):
        read_schema(str(tmp_path / "nowhere"))
