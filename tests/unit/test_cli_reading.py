"""The input of `run`, line by line."""

from __future__ import annotations

import os
import random
import re
import tracemalloc
from pathlib import Path

import pytest
from helpers import each

from microbatch.cli.console import UsageError
from microbatch.cli.reading.input import BadLine, Input, InputChanged, id_digest
from microbatch.cli.reading.questions import BatchLines, Templated

QUESTIONS = Templated("{q}")
PATH = Path("in.jsonl")


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Return what writes lines to in.jsonl and opens it as an `Input`, in the folder of the test."""
    monkeypatch.chdir(tmp_path)

    def write(*lines, end="\n", **options):
        raw = [line if isinstance(line, bytes) else line.encode() for line in lines]
        PATH.write_bytes(end.encode().join(raw))
        return Input([str(PATH)], options.pop("questions", QUESTIONS), **options)

    return write


def asked(source, done=()):
    """Return the requests, and the lines that were rejected with the id they are reported under."""
    rows = list(source.requests(set(map(id_digest, done))))
    taken = [row[1] for row in rows if not isinstance(row, BadLine)]
    return taken, [(row, source.id_for(row)) for row in rows if isinstance(row, BadLine)]


def test_an_id_is_the_custom_id_else_the_id_else_the_line_number(given):
    source = given('{"custom_id":"a","id":"b","q":1}', '{"id":7,"q":1}', "", '{"q":1}')
    assert [(place.number, request.id) for place, request in source.rows()] == [(1, "a"), (2, "7"), (4, "4")]


def test_a_field_of_ones_own_can_hold_the_id(given):
    (_, request), bad = given('{"sku":"s","id":"b","q":1}', '{"id":"b","q":1}', id_field="sku").rows()
    assert request.id == "s"
    assert isinstance(bad, BadLine)
    assert (bad.field, bad.place.number) == ("sku", 2)


def test_the_field_of_an_id_may_be_within_another(given):
    ((_, request),) = given('{"meta":{"sku":7},"q":1}', id_field="meta.sku").rows()
    assert request.id == "7"


@pytest.mark.parametrize("value", ["null", "true", "1.5", "[1]", "{}", '""'])
def test_what_cannot_serve_as_an_id_is_said_to_be_so(given, value):
    line, _ = given(f'{{"id":{value},"q":1}}', '{"id":"a","q":1}').rows()
    assert isinstance(line, BadLine)
    assert line.field == "id"


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"nonsense", "not JSON"),
        (b'{"q":', "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"3", "not a JSON object"),
        (b'{"q":"\xff"}', "not UTF-8"),
        (b'{"q":' + b"[" * 100_000, "nested too deeply"),
        (b'{"q":' + b"9" * 5_000 + b"}", "a number that is too long"),
    ],
)
def test_a_broken_line_is_told_and_the_others_are_asked(given, raw, problem):
    taken, rejected = asked(given('{"id":"a","q":1}', raw, '{"id":"b","q":1}'))
    assert [request.id for request in taken] == ["a", "b"]
    ((bad, name),) = rejected
    assert problem in bad.problem
    assert (bad.place.number, name) == (2, "2")


def test_a_byte_order_mark_crlf_and_a_missing_last_line_break_do_no_harm(given):
    marked = b'\xef\xbb\xbf{"id":"a","q":1}'
    taken, rejected = asked(given(marked, marked.replace(b"a", b"b"), end="\r\n"))
    assert [request.id for request in taken] == ["a", "b"]
    assert rejected == []


def test_an_empty_file_asks_nothing(given):
    assert asked(given()) == ([], [])


def test_a_missing_field_keeps_the_lines_id(given):
    _, rejected = asked(given('{"id":"a","q":1}', '{"id":"b"}'))
    ((bad, name),) = rejected
    assert (name, bad.place.number, bad.field) == ("b", 2, "q")


def test_a_line_without_an_id_never_takes_that_of_another(given):
    _, rejected = asked(given('{"id":"2","q":1}', "broken", '{"id":"line 2","q":1}'))
    assert [name for _, name in rejected] == ["line line 2"]


@pytest.mark.parametrize(
    ("lines", "numbers"),
    [
        (['{"id":"a","q":1}', '{"id":"b","q":1}', "", '{"id":"a","q":1}'], "1 and 4"),
        (['{"id":1,"q":1}', '{"id":"1","q":1}'], "1 and 2"),
        (['{"id":"2","q":1}', '{"q":1}'], "1 and 2"),
    ],
)
def test_a_repeated_id_is_an_error_that_names_both_lines(given, lines, numbers):
    with pytest.raises(UsageError, match=rf"in\.jsonl: lines {numbers} have the same id .*--id-field"):
        given(*lines)


def test_a_field_that_no_line_has_is_a_mistake_in_the_question(given):
    with pytest.raises(UsageError, match=r'no line has the field "q" of --template; line 2 has id, name'):
        given("broken", '{"id":"a","name":"x"}')
    with pytest.raises(UsageError, match=r'no line has a "body".*--template'):
        given('{"id":"a"}', questions=BatchLines())


def test_what_has_been_answered_is_not_asked_again(given):
    taken, _ = asked(given('{"id":"a","q":1}', '{"id":"b","q":1}'), done=["a"])
    assert [request.id for request in taken] == ["b"]


def asking(source, act, after):
    """Return the ids that are asked about if *act* happens after so many of them, and what is told of the input."""
    names = []
    with pytest.raises(InputChanged) as told:
        for row in source.requests():
            if not isinstance(row, BadLine):
                names.append(row[1].id)
            if len(names) == after:
                act(PATH)
    return names, str(told.value)


def replace(path, text):
    (path.parent / "other").write_text(text)
    (path.parent / "other").rename(path)


LINES = [f'{{"id":"{number}","q":1}}' for number in range(5_000)]  # more than is read ahead
TEXT = "".join(f"{line}\n" for line in LINES)
CHANGES = {
    "cut": (lambda path: os.truncate(path, len(LINES[0]) + 1), "it has 1 line now, and had 5,000"),
    "emptied": (lambda path: path.write_text(""), "it has 0 lines now, and had 5,000"),
    "shorter": (
        lambda path: path.write_text(TEXT[: TEXT.index(LINES[3_000])]),
        "it has 3,000 lines now, and had 5,000",
    ),
    "edited": (lambda path: path.write_text(TEXT.replace('"4999","q":1', '"4999","q":2')), "was changed while"),
    "another": (lambda path: replace(path, '{"id":"x","q":1}\n'), "it has 1 line now, and had 5,000"),
    "deleted": (lambda path: path.unlink(), "was deleted while"),
    "grown": (lambda path: path.write_text(TEXT + '{"id":"new","q":1}\n'), "lines after 5,000 were not asked"),
}


@each("after", [1, 5_000])
@each("change", CHANGES)
def test_an_input_that_changes_while_it_is_asked_about_is_told(given, change, after):
    act, words = CHANGES[change]
    source = given(*LINES, "")
    names, told = asking(source, act, after)
    assert "in.jsonl" in told
    assert words in told
    assert names[:after] == [str(number) for number in range(after)]
    assert "new" not in names


@pytest.mark.parametrize("change", ["cut", "edited", "another", "deleted"])
def test_an_input_that_has_changed_before_the_first_question_is_not_asked_about(given, change):
    source = given(*LINES, "")
    act, words = CHANGES[change]
    act(PATH)
    with pytest.raises(InputChanged, match=re.escape(words)):
        next(source.requests())


def test_what_is_appended_after_the_check_of_the_ids_is_left_for_the_next_run(given):
    source = given('{"id":"a","q":1}\n')
    with PATH.open("a") as file:
        file.write('{"id":"a","q":2}\n')
    asked = source.requests()
    assert next(asked)[1].id == "a"
    with pytest.raises(InputChanged, match="has grown"):
        next(asked)


def test_a_last_line_that_goes_on_is_no_line_that_was_checked(given):
    source = given('{"id":"a","q":1}', '{"id":"b","q":2}')
    with PATH.open("a") as file:
        file.write("x\n")
    with pytest.raises(InputChanged):
        next(source.requests())


def test_an_input_that_is_only_touched_or_replaced_by_a_copy_has_not_changed(given):
    source = given(*LINES[:3], "")
    os.utime(PATH, (1, 1))
    replace(PATH, "".join(f"{line}\n" for line in LINES[:3]))
    assert len(list(source.requests())) == 3


def test_what_cannot_be_read_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        Input([str(tmp_path / "nowhere")], QUESTIONS)
    with pytest.raises(UsageError, match="cannot read"):
        Input([str(tmp_path)], QUESTIONS)


def test_memory_grows_with_the_ids_and_not_with_the_lines(tmp_path):
    path = tmp_path / "in.jsonl"
    lines, length = 5_000, 2_000
    with path.open("w") as file:
        for number in range(lines):
            file.write(f'{{"id":"{number}","q":"{random.Random(number).randbytes(length // 2).hex()}"}}\n')
    tracemalloc.start()
    try:
        count = sum(1 for _ in Input([str(path)], QUESTIONS).requests())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == lines
    assert peak < 1_500_000 < path.stat().st_size / 5


def test_the_id_in_an_error_is_quoted(given):
    with pytest.raises(UsageError, match=re.escape("'odd \\' id'") + "|" + re.escape('"odd \' id"')):
        given('{"id":"odd \' id","q":1}', '{"id":"odd \' id","q":1}')
