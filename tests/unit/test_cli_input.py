"""The records of an input that are asked about: of several files, within a limit, of a sample, and not of blank ones."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers import each

from microbatch.cli.console import UsageError
from microbatch.cli.reading.input import BadLine, Input, InputChanged, id_digest
from microbatch.cli.reading.questions import BatchLines, Templated
from microbatch.cli.writing.join import Join
from microbatch.cli.writing.output import OutputFile, answer_line, failure_line
from microbatch.messages import Reply, Usage

QUESTIONS = Templated("{q}")
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path, *records):
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    Path(path).write_text("".join(line + "\n" for line in lines))


def numbered(path, count, **more):
    write(path, *({"id": f"{path}{number}", "q": f"q{number}"} | more for number in range(count)))


def asked(source):
    return [row[1].id for row in source.requests() if not isinstance(row, BadLine)]


def rejected(source):
    return [row for row in source.requests() if isinstance(row, BadLine)]


def opened(*paths, questions=QUESTIONS, **options):
    return Input(paths, questions, **options)


# --- several files


def test_the_records_of_several_files_follow_each_other_and_keep_their_places():
    numbered("a.jsonl", 2)
    Path("b.csv").write_text('id,q\nx,1\n,2\ny,"3\n4"\n')
    source = opened("a.jsonl", "b.csv")
    assert asked(source) == ["a.jsonl0", "a.jsonl1", "x", "y"]
    (bad,) = rejected(source)
    assert bad.error()["message"].startswith('b.csv, row 2: the field "id" must be')
    assert (source.items, source.label, source.id_for(bad)) == (5, "a.jsonl, b.csv", "b.csv:2")


def test_records_without_an_id_are_told_apart_by_their_files():
    for path in ("a.jsonl", "b.jsonl"):
        write(path, {"q": 1}, {"q": 2})
    assert asked(opened("a.jsonl")) == ["1", "2"]
    assert asked(opened("a.jsonl", "b.jsonl")) == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:2"]


def test_an_id_that_is_repeated_in_another_file_is_an_error_that_names_both_places():
    write("a.jsonl", {"id": 1, "q": 1})
    Path("b.csv").write_text("id,q\n2,2\n1,3\n")
    with pytest.raises(UsageError, match=r"a\.jsonl, line 1 and b\.csv, row 2 have the same id '1'"):
        opened("a.jsonl", "b.csv")
    with pytest.raises(UsageError, match=r"'a\.jsonl' is given twice"):
        opened("a.jsonl", "a.jsonl")


@pytest.mark.parametrize("which", ["a.jsonl", "b.jsonl"])
def test_a_change_of_any_file_is_told(which):
    for path in ("a.jsonl", "b.jsonl"):
        numbered(path, 3)
    source = opened("a.jsonl", "b.jsonl")
    write(which, {"id": "x", "q": 1})
    with pytest.raises(
        InputChanged, match=rf"'{which}' was changed while it was asked about: it has 1 line now, and had 3"
    ):
        asked(source)


def test_a_file_that_cannot_be_read_any_more_has_changed():
    Path("in.csv.gz").write_bytes(gzip.compress(table(3).encode()))
    source = opened("in.csv.gz")
    Path("in.csv.gz").write_bytes(gzip.compress(table(9).encode())[:30])
    with pytest.raises(InputChanged, match=r"'in\.csv\.gz' was changed while it was asked about$"):
        asked(source)


def table(count):
    return "id,q\n" + "".join(f"{number},q{number}\n" for number in range(count))


GROWING = {
    "csv": (table(3), "9,late\n"),
    "json": ('[{"id":0,"q":1},{"id":1,"q":1},{"id":2,"q":1}]\n', "\n"),
    "tsv": (table(3).replace(",", "\t"), "9\tx\n"),
}


@each("form", GROWING)
def test_rows_that_are_added_are_left_for_the_next_run_where_lines_can_be_added(form):
    content, more = GROWING[form]
    Path(f"in.{form}").write_text(content)
    source = opened(f"in.{form}")
    with Path(f"in.{form}").open("a") as file:
        file.write(more)
    names = []
    with pytest.raises(InputChanged, match="was changed" if form == "json" else r"rows after 3 were not asked"):
        names.extend(row[1].id for row in source.requests())
    assert names == ([] if form == "json" else ["0", "1", "2"])


def test_rows_beyond_a_limit_may_change_and_those_within_it_may_not():
    Path("in.csv").write_text(table(40_000))  # more than is read ahead
    source = opened("in.csv", limit=2)
    Path("in.csv").write_text(table(39_000))
    assert asked(source) == ["0", "1"]
    Path("in.csv").write_text(table(40_000).replace("1,q1", "1,x1"))
    with pytest.raises(InputChanged):
        asked(source)


def test_rows_that_are_added_to_a_file_before_the_one_that_a_limit_cuts_are_told():
    for path in ("a.jsonl", "b.jsonl"):
        numbered(path, 3)
    source = opened("a.jsonl", "b.jsonl", limit=4)
    with Path("b.jsonl").open("a") as file:
        file.write('{"id":"late","q":1}\n')
    assert len(asked(source)) == 4
    with Path("a.jsonl").open("a") as file:
        file.write('{"id":"late","q":1}\n')
    with pytest.raises(InputChanged, match=r"'a\.jsonl' has grown"):
        asked(source)


# --- a limit and a sample


def test_a_limit_reads_no_more_than_it_asks_about():
    numbered("a.jsonl", 3)
    write("b.jsonl", {"id": "last", "q": 1}, "broken", {"id": "last", "q": 1})
    source = opened("a.jsonl", "b.jsonl", limit=4)
    assert asked(source) == ["a.jsonl0", "a.jsonl1", "a.jsonl2", "last"]
    assert (source.items, source.partial) == (4, True)
    assert asked(opened("a.jsonl", "b.jsonl", limit=2)) == ["a.jsonl0", "a.jsonl1"]
    assert id_digest("a.jsonl0") in source
    assert id_digest("x") not in source


def test_a_limit_above_the_number_of_records_changes_nothing():
    numbered("a.jsonl", 3)
    assert asked(opened("a.jsonl", limit=99)) == asked(opened("a.jsonl"))


def test_a_sample_is_drawn_from_all_records_and_can_be_drawn_again():
    numbered("a.jsonl", 50)
    numbered("b.jsonl", 50)
    source = opened("a.jsonl", "b.jsonl", sample=20, seed=1)
    names = asked(source)
    assert names == asked(source) == asked(opened("a.jsonl", "b.jsonl", sample=20, seed=1))
    assert names == sorted(names, key=asked(opened("a.jsonl", "b.jsonl")).index)  # in order
    assert len(set(names)) == source.items == 20
    assert names != asked(opened("a.jsonl", "b.jsonl", sample=20, seed=2))
    assert {name[0] for name in names} == {"a", "b"}
    every = asked(opened("a.jsonl", "b.jsonl"))
    assert {name for name in every if id_digest(name) in source} == set(names)
    assert asked(opened("a.jsonl", "b.jsonl", sample=200)) == every


def test_all_records_are_alike_likely_to_be_drawn():
    numbered("a.jsonl", 10)
    counts = Counter(name for seed in range(500) for name in asked(opened("a.jsonl", sample=3, seed=seed)))
    assert sum(counts.values()) == 1_500
    # The square distance from 150 each, over its expectation, has 9 degrees of freedom: it exceeds 28 once in 1,000 times.
    assert sum((counts[f"a.jsonl{number}"] - 150) ** 2 for number in range(10)) / 150 < 28


def test_a_sample_is_drawn_within_the_limit():
    numbered("a.jsonl", 100)
    assert set(asked(opened("a.jsonl", sample=5, limit=10))) <= {f"a.jsonl{number}" for number in range(10)}


# --- blank records

BLANK = [{"q": None}, {"q": ""}, {"q": " \t\n"}, {"q": []}, {"q": {}}, '{"q": NaN}']


def test_records_with_nothing_to_ask_about_are_skipped_and_counted():
    write("in.jsonl", {"q": "a"}, *BLANK, {"q": 0}, {"q": False})
    source = opened("in.jsonl")
    assert asked(source) == ["1", "8", "9"]
    assert (source.items, source.skipped) == (3, 6)
    assert id_digest("2") not in source
    assert [(record.name, record.skipped) for record in source.records()] == [
        (str(number), 2 <= number <= 7) for number in range(1, 10)
    ]


def test_blank_records_can_be_asked_about_or_fail():
    write("in.jsonl", {"q": "a"}, *BLANK)
    assert len(asked(opened("in.jsonl", on_empty="ask"))) == 7
    source = opened("in.jsonl", on_empty="fail")
    assert (asked(source), source.items, source.skipped) == (["1"], 7, 0)
    assert {(bad.problem, bad.name) for bad in rejected(source)} == {
        ("all fields of the template are blank", str(number)) for number in range(2, 8)
    }


def test_a_record_is_blank_only_if_all_fields_of_the_template_are():
    write("in.jsonl", {"a": "", "b": "x", "c": "x"}, {"a": "", "b": " ", "c": "x"}, {"a": "", "c": "x"})
    source = opened("in.jsonl", questions=Templated("{a}{b}"))
    assert asked(source) == ["1"]
    (bad,) = rejected(source)
    assert (bad.name, bad.field, source.skipped) == ("3", "b", 1)


def test_a_sample_holds_no_blank_records():
    write("in.jsonl", *({"id": str(number), "q": "x" if number % 2 else ""} for number in range(100)))
    source = opened("in.jsonl", sample=30)
    assert (len(asked(source)), source.items, source.skipped) == (30, 30, 50)


# --- nothing to ask about

CALL = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": MESSAGES}}
USELESS = {
    "csv": (["id,name", "1,Lamp"], QUESTIONS, {}, "no line can be read; line 1: it is not JSON.*looks like CSV"),
    "text": (["one", "two"], QUESTIONS, {}, "looks like plain text"),
    "array": (
        ["[", '{"q":1},', '{"q":2}]'],
        QUESTIONS,
        {"form": "jsonl"},
        "looks like a JSON array; if it is, give --input-format json",
    ),
    "id": (
        [{"q": 1, "sku": 2}],
        QUESTIONS,
        {"id_field": "isbn"},
        'has the field "isbn" of --id-field; line 1 has q, sku',
    ),
    "ids": ([{"id": None, "q": 1}], QUESTIONS, {}, 'no line can be asked about; line 1: the field "id" must be'),
    "field": ([{"name": 1}], QUESTIONS, {}, 'no line has the field "q" of --template; line 1 has name'),
    "a list": (
        [{"meta": [], "data": [{"q": 1}, {"q": 2}]}],
        QUESTIONS,
        {},
        'line 1 has meta, data .if the records are those in "data", give that list alone',
    ),
    "many fields": (
        [{"x" * 500: 1} | {f"f{number}": 1 for number in range(500)}],
        QUESTIONS,
        {},
        "line 1 has x{40}[.]{3}, f0, f1, f2, [f0-9, ]*, and 481 more fields$",
    ),
    "fields": ([{"a": 1}, {"b": 1}], Templated("{a}{b}"), {}, 'line 1: the field "b" is missing'),
    "responses": (
        [CALL | {"url": "/v1/responses"}] * 1,
        BatchLines(),
        {},
        'must be "/v1/chat/completions", not "/v1/responses"',
    ),
    "embeddings": ([CALL | {"url": "/v1/embeddings"}], BatchLines(), {}, 'not "/v1/embeddings"'),
    "get": ([CALL | {"method": "GET"}], BatchLines(), {}, '"method" must be "POST"'),
    "model": ([{"messages": MESSAGES}], BatchLines(needs_model=True), {}, '"model" is missing, and no --model'),
    "body": ([{"id": 1, "name": "x"}], BatchLines(), {}, 'has a "body" or "messages"; line 1 has id, name.*--template'),
    "blank": ([{"q": ""}], QUESTIONS, {"on_empty": "fail"}, "line 1: all fields of the template are blank"),
}


@each("case", USELESS)
def test_an_input_of_which_nothing_can_be_asked_is_a_usage_error(case):
    lines, questions, options, words = USELESS[case]
    write("in.jsonl", *lines)
    with pytest.raises(UsageError, match=rf"in\.jsonl: .*{words}"):
        opened("in.jsonl", questions=questions, **options)


def test_one_record_that_can_be_asked_about_is_enough():
    write("in.jsonl", CALL | {"url": "/v1/responses"}, CALL | {"custom_id": "2"})
    source = opened("in.jsonl", questions=BatchLines())
    assert (asked(source), [bad.field for bad in rejected(source)]) == (["2"], ["url"])


def test_a_body_alone_is_asked_as_it_is():
    body = {"model": "m", "messages": MESSAGES, "temperature": 0, "top_p": 0.5}
    write("in.jsonl", body, body | {"id": "a"}, body | {"custom_id": "b"}, {"custom_id": "c", "body": body})
    requests = [row[1] for row in opened("in.jsonl", questions=BatchLines()).requests()]
    assert [request.id for request in requests] == ["1", "a", "b", "c"]
    assert {(request.model, request.temperature, str(request.params)) for request in requests} == {
        ("m", 0, "{'top_p': 0.5}")
    }
    write("in.jsonl", body | {"row": 7})
    (row,) = opened("in.jsonl", questions=BatchLines(id_field="row"), id_field="row").requests()
    assert (row[1].id, row[1].params) == ("7", {"top_p": 0.5})


def test_a_join_takes_the_last_line_of_each_id_and_tells_what_has_none():
    write(
        "in.jsonl", {"id": "b", "q": 1}, {"id": "a", "q": 2, "error": "mine"}, {"id": "c", "q": 3}, {"id": "d", "q": ""}
    )
    error = {"type": "ServerError", "message": "no"}
    with OutputFile("journal.jsonl") as journal:
        for line in (
            failure_line("a", error),
            answer_line("b", "old", Reply("old", "old", "batch", Usage(3, 2))),
            answer_line("a", {"n": 1}, Reply("", "", "batch", Usage(3, 2))),
            failure_line("b", error),
        ):
            journal.write(line)
        rows = list(Join(opened("in.jsonl"), journal).rows())
    assert [(row["q"], row["output"], (row["error 2"] or {}).get("type")) for row in rows] == [
        (1, None, "ServerError"),
        (2, {"n": 1}, None),
        (3, None, "Unasked"),
        ("", None, "Skipped"),
    ]
    assert rows[1]["error"] == "mine"


def test_what_json_does_not_have_does_no_harm_in_a_field_that_is_not_used_and_is_written_plainly_in_one_that_is():
    write("in.jsonl", '{"q":"a","x":NaN}', '{"q":"b\\ud800","x":1e400}', '{"q":1e400}', '{"q":{"n":NaN}}')
    texts = [row[1].messages[0]["content"] for row in opened("in.jsonl").requests()]
    assert texts == ["a", "b\ufffd", "1e400", '{"n":null}']


def test_stdin_is_read_as_a_file_is(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(table(5).encode())))
    source = opened("-")
    assert asked(source) == asked(source) == ["0", "1", "2", "3", "4"]


def test_a_pipe_is_read_as_a_file_is(tmp_path):
    import os
    import threading

    os.mkfifo("pipe.csv")
    writer = threading.Thread(target=lambda: Path("pipe.csv").write_text(table(5)))
    writer.start()
    source = opened("pipe.csv")
    writer.join(10)
    assert asked(source) == asked(source) == ["0", "1", "2", "3", "4"]
