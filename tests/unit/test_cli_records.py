"""Files of records: the same records in every format, and what is said of a file that is none of them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import sys
import tracemalloc

import pytest
from helpers import each

from microbatch.cli.console import UsageError
from microbatch.cli.reading.json_text import decode_object, elements
from microbatch.cli.reading.records import Broken, RecordFile

RECORDS = [
    {"id": str(number), "text": text, "note": "x" * number}
    for number, text in enumerate(
        [
            "plain",
            'a "quote", a comma; a semicolon',
            "two\nlines\r\nand\ttab",
            "",
            " blank ",
            "é 日本 \U0001f600",
            "\\n",
            "[{",
            "1",
        ]
    )
]


def as_jsonl(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def as_table(records, **options):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, records[0], **options)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


FORMS = {
    "jsonl": as_jsonl,
    "json": lambda records: json.dumps(records, indent=1),
    "csv": as_table,
    "tsv": lambda records: as_table(records, dialect="excel-tab"),
}


@pytest.fixture
def file(tmp_path):
    """Return what writes a file and opens it."""

    def write(name, content, **options):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return RecordFile(str(tmp_path / name), **options)

    return write


def sound(file):
    return [record for _, record in file.records()]


@each("form", FORMS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_format_holds_the_same_records(file, form, encoding, packed):
    content = FORMS[form](RECORDS).encode(encoding)
    content, suffix = (gzip.compress(content), ".gz") if packed else (content, "")
    for name in (f"x.{form}{suffix}", f"x.{form.upper()}{suffix.upper()}", "x", "x.txt"):
        opened = file(name, content)
        assert (opened.form, sound(opened)) == (form, RECORDS)
        assert sound(opened) == RECORDS  # once more
        assert opened.doubt == ""


@each("form", FORMS)
def test_a_file_in_another_encoding_is_read_in_the_one_that_is_named(file, form):
    records = [{"id": "1", "text": "café 5 €"}]
    assert (
        sound(
            file(
                f"x.{form}",
                FORMS[form](records).replace("\\u00e9", "é").encode("cp1252", "backslashreplace"),
                encoding="CP1252",
            )
        )
        == records
    )


def test_an_encoding_that_does_not_exist_or_is_none_of_texts_is_a_usage_error(file):
    for name in ("klingon", "base64"):
        with pytest.raises(UsageError, match="--encoding"):
            file("x.csv", "a,b\n", encoding=name)


def test_the_named_format_wins_over_the_suffix(file):
    assert sound(file("x.dat", "a;b\n1;2\n", form="csv")) == [{"a": "1", "b": "2"}]
    assert sound(file("x.csv", as_jsonl(RECORDS), form="jsonl")) == RECORDS


def test_an_array_in_a_file_for_json_lines_is_taken(file):
    assert sound(file("x.jsonl", FORMS["json"](RECORDS))) == RECORDS


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_may_have_another_delimiter(file, delimiter):
    assert sound(file("x.csv", as_table(RECORDS, delimiter=delimiter))) == RECORDS


def test_numbers_are_those_of_lines_in_json_lines_and_of_records_elsewhere(file):
    assert [number for number, _ in file("x.jsonl", '{"a":1}\n\n{"a":2}\n').records()] == [1, 3]
    assert [number for number, _ in file("x.csv", 'a,b\n"1\n2",3\n\n4,5\n').records()] == [1, 2]
    assert [number for number, _ in file("x.json", '[{"a":1},\n\n{"a":2}]').records()] == [1, 2]


def test_a_short_row_lacks_fields_and_a_long_one_is_broken(file):
    short, long, last = sound(file("x.csv", "a,b\n1\n1,2,3\n4,5\n"))
    assert (short, last) == ({"a": "1"}, {"a": "4", "b": "5"})
    assert "more fields" in long.problem


def test_cells_that_no_field_is_for_may_be_empty(file):
    assert sound(file("x.csv", "a,b\n1,2,\n3,4,,\n5,6\n")) == [{"a": a, "b": b} for a, b in ("12", "34", "56")]


@each("form", ["csv", "tsv"])
@each("delimiter", [",", ";", "\t", "|"])
def test_the_first_line_may_only_say_what_the_delimiter_is(file, form, delimiter):
    if (form, delimiter) in {("tsv", ","), ("tsv", ";"), ("tsv", "|")}:
        return
    table = as_table(RECORDS, delimiter=delimiter)
    for first in (f"sep={delimiter}\r\n", f"\r\nSEP={delimiter}\n"):
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            opened = file(f"x.{form}", (first + table).encode(encoding))
            assert [*opened.records()] == [*enumerate(RECORDS, start=1)]


def test_what_can_be_made_out_of_a_broken_row_is_kept(file):
    rows = sound(file("x.csv", b'a,b\n1,2,3,4\n5,caf\xe9\n6,"7\n8,9\n'))
    assert [row.fields for row in rows] == [
        {"a": "1", "b": "2", "column 3": "3", "column 4": "4"},
        {"a": "5", "b": "caf\ufffd"},
        {"a": "6", "b": "7\n8,9\n"},
    ]


def test_a_column_without_a_name_gets_one_and_two_of_one_name_are_a_usage_error(file):
    assert sound(file("x.csv", ",a, b \n1,2,3\n")) == [{"column 1": "1", "a": "2", "b": "3"}]
    with pytest.raises(UsageError, match="two columns have the name 'a'; give"):
        sound(file("x.csv", "a,b,a\n1,2,3\n"))
    with pytest.raises(UsageError, match="two columns have the name 'column 2'"):
        sound(file("x.csv", "column 2,\n1,2\n"))


@pytest.mark.parametrize("indent", [1, 2, 4, "\t"])
@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x", "x.csv"])
@pytest.mark.parametrize("value", [{"data": [{"id": 1}, {"id": 2}]}, {"id": 1, "name": "x"}, {"a": {"b": 1}, "c": []}])
def test_an_object_over_several_lines_is_none_of_the_formats(file, name, value, indent):
    with pytest.raises(UsageError, match="looks like one JSON object over several lines; write its records as"):
        file(name, json.dumps(value, indent=indent) + "\n")


@pytest.mark.parametrize("first", ['{"id":1,"name":', '{"id":1', '{"id":1}', '{"id":1},', '{"id":1,"n":"x', "{}"])
def test_one_broken_line_does_not_make_an_object_of_json_lines(file, first):
    assert sound(file("x.jsonl", first + '\n{"id":2}\n'))[-1] == {"id": 2}


def test_objects_in_lines_may_be_followed_by_commas(file):
    lines = '{"a":1},\n{"a":"x,"} , \r\n{"a":{"b":3}},\n{"a":4}\n'
    assert sound(file("x.jsonl", lines))[::2] == [{"a": 1}, {"a": {"b": 3}}]
    assert sound(file("x.jsonl", lines.encode("utf-16")))[-1] == {"a": 4}
    array = '[\n{"a":1},\n{"a":2},\n{"a":3}]\n'
    assert all(isinstance(record, Broken) for record in sound(file("x.jsonl", array, form="jsonl")))


def test_a_quote_that_is_never_closed_is_told_and_takes_nothing_for_a_record(file):
    first, last = sound(file("x.csv", 'a,b\n1,2\n3,"4\n5,6\n7,8\n'))
    assert first == {"a": "1", "b": "2"}
    assert "quote" in last.problem
    assert isinstance(last, Broken)


@pytest.mark.parametrize(
    ("form", "line"), [("jsonl", '{"a":"caf%s"}\n'), ("csv", "caf%s\n"), ("json", '{"a":"caf%s"},')]
)
def test_what_is_not_utf_8_breaks_its_record_only_and_the_remedy_is_named(file, form, line):
    head, tail = {"jsonl": ("", ""), "csv": ("a\n", ""), "json": ("[", '{"a":"last"}]')}[form]
    content = (head + line % "e" + line % "é" + line % "e" + tail).encode("latin-1")
    good, bad, *_ = sound(file(f"x.{form}", content))
    assert good == {"a": "cafe"}
    assert "--encoding" in bad.problem
    assert "0xe9" in bad.detail


def test_a_head_that_is_not_utf_8_is_a_usage_error_that_names_the_remedy(file):
    with pytest.raises(UsageError, match="--encoding"):
        sound(file("x.csv", "prénom,b\n1,2\n".encode("latin-1")))


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("NaN", None),
        ("Infinity", "Infinity"),
        ("-Infinity", "-Infinity"),
        ("1e400", "1e400"),
        ("-1.5e999", "-1.5e999"),
        ('"a\\ud800b"', "a\ufffdb"),
        ('["\\udc00", {"x": NaN}]', ["\ufffd", {"x": None}]),
        ('"\\ud83d\\ude00 \\ud800"', "\U0001f600 \ufffd"),
        (str(10**30), 10**30),
    ],
)
def test_what_json_does_not_have_is_taken(raw, value):
    record = decode_object(b'{"q":1.5,"x":' + raw.encode() + b"}")
    assert record == {"q": 1.5, "x": value}
    json.dumps(record, allow_nan=False).encode()


@each("size", [1, 2, 3, 7, 64, 10_000])
def test_the_elements_of_an_array_do_not_depend_on_how_it_arrives(size):
    raw = json.dumps(RECORDS, indent=2).encode()
    parts = [raw[at : at + size] for at in range(0, len(raw), size)]
    assert [json.loads(element) for element in elements(parts)] == RECORDS


def test_elements_keep_what_is_wrong_with_them_to_themselves(file):
    records = sound(file("x.json", '[{"a":1}, 5, [6,{"b":7}], {"a":2} {"a":3}, , {"a":"]"}]'))
    assert (records[0], records[-1]) == ({"a": 1}, {"a": "]"})
    assert [record.problem for record in records[1:-1]] == [
        "it is not a JSON object",
        "it is not a JSON object",
        "it is not JSON",
    ]


@pytest.mark.parametrize(
    "raw", ["[", '[{"a":1}', '[{"a":1},', '[{"a":"x]', '[{"a":1}] [{"a":2}]', '[{"a":1}] x', '{"a":[1]}', ""]
)
def test_what_is_not_one_array_is_a_usage_error(file, raw):
    with pytest.raises(UsageError, match="array"):
        sound(file("x", raw, form="json"))


def test_what_is_larger_than_any_question_is_an_error_before_it_fills_the_memory(file, monkeypatch):
    monkeypatch.setattr("microbatch.cli.reading.json_text._MAX_ELEMENT", 1_000)
    with pytest.raises(UsageError, match="longer than"):
        sound(file("x.json", '[{"a":"' + "x" * 2_000))
    monkeypatch.setattr("microbatch.cli.reading.records._MAX_FIELD", 1_000)
    limit = csv.field_size_limit()
    try:
        first, last = sound(file("x.csv", f"a\n{'x' * 2_000}\nsmall\n"))
    finally:
        csv.field_size_limit(limit)  # of the process
    assert (first.problem, last) == ("it is not CSV", {"a": "small"})


def test_an_empty_array_and_empty_files_hold_nothing(file):
    for name, content in (("x.json", " [ ] "), ("x.json", ""), ("x.jsonl", "\n\n"), ("x.csv", ""), ("x.csv", "a,b\n")):
        assert sound(file(name, content)) == []


def test_an_array_and_a_table_are_read_as_streams(file, tmp_path):
    records = [{"id": number, "text": random.Random(number).randbytes(1_000).hex()} for number in range(2_000)]
    for form, write in FORMS.items():
        opened = file(f"x.{form}", write(records))
        tracemalloc.start()
        try:
            assert sum(1 for _ in opened.records()) == len(records)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 1_200_000 < (tmp_path / f"x.{form}").stat().st_size / 3


@pytest.mark.parametrize("magic", [b"PK\x03\x04rest", b"BZh91", b"\xfd7zXZ\x00", b"SQLite format 3\x00", b"%PDF-1.7"])
@pytest.mark.parametrize("name", ["x", "x.csv", "x.jsonl"])
def test_a_file_that_cannot_be_read_is_called_what_it_is(file, magic, name):
    with pytest.raises(UsageError, match=r"looks like (a|an|compressed).*; save it as CSV"):
        file(name, magic)


def test_a_plain_text_needs_a_format(file):
    with pytest.raises(UsageError, match=r"looks like plain text; --input-format takes jsonl, json, csv, tsv, parquet"):
        file("x", "first line\nsecond line\n")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", "id,name\n1,a\n", "looks like CSV; if it is, give --input-format csv"),
        ("x.jsonl", "id\tname\n1\ta\n", "looks like TSV; if it is, give --input-format tsv"),
        ("x.csv", '{"id":1}\n', "looks like JSON Lines; if it is, give --input-format jsonl"),
    ],
)
def test_a_name_that_does_not_fit_the_content_is_doubted(file, name, content, words):
    assert words in file(name, content).doubt


def test_a_damaged_gz_file_is_a_usage_error(file):
    whole = gzip.compress(as_jsonl(RECORDS * 100).encode())
    for raw in (whole[:-20], whole[:40] + b"\x00\x00\x00\x00" + whole[44:], whole[:-8] + bytes(8)):
        with pytest.raises(UsageError, match="is damaged"):
            sound(file("x.jsonl.gz", raw))


@each("form", FORMS)
def test_a_text_that_is_not_in_its_encoding_is_a_usage_error_that_names_the_remedy(file, form):
    with pytest.raises(UsageError, match=r"is not utf-16.*--encoding"):
        sound(file(f"x.{form}", FORMS[form](RECORDS).encode("utf-16") + b"\x00\xd8\x00"))


@each("form", FORMS)
def test_stdin_is_kept_and_read_again(monkeypatch, form):
    records = RECORDS * 500  # more than is read ahead
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(FORMS[form](records).encode())))
    opened = RecordFile("-")
    first, second = opened.records(), opened.records()  # at the same time
    both = [record for pair in zip(first, second, strict=True) for _, record in pair]
    assert both == [record for record in records for _ in range(2)]
    assert opened.name == "stdin"


def test_a_stdin_that_is_closed_is_a_usage_error(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="cannot read stdin"):
        RecordFile("-")


def test_a_file_that_is_gone_is_a_usage_error(file, tmp_path):
    opened = file("x.jsonl", FORMS["jsonl"](RECORDS))
    (tmp_path / "x.jsonl").unlink()
    with pytest.raises(UsageError, match="cannot read"):
        sound(opened)


# --- Parquet


@pytest.fixture
def parquet(tmp_path):
    """Return what writes a Parquet file and opens it."""
    pa = pytest.importorskip("pyarrow")
    tables = pytest.importorskip("pyarrow.parquet")

    def write(records, name="x.parquet"):
        path = tmp_path / name
        tables.write_table(pa.Table.from_pylist(records), path.with_suffix("") if name.endswith(".gz") else path)
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))
        return RecordFile(str(path))

    return write


@pytest.mark.parametrize("name", ["x.parquet", "x", "x.csv", "x.parquet.gz"])
def test_parquet_holds_the_same_records(parquet, name):
    opened = parquet(RECORDS, name)
    assert sound(opened) == sound(opened) == RECORDS
    assert [number for number, _ in opened.records()] == [*range(1, len(RECORDS) + 1)]


def test_parquet_can_come_from_stdin(parquet, tmp_path, monkeypatch):
    parquet(RECORDS)
    with (tmp_path / "x.parquet").open("rb") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        opened = RecordFile("-")
    assert sound(opened) == sound(opened) == RECORDS


def test_values_of_parquet_become_those_of_json(parquet):
    datetime = pytest.importorskip("datetime")
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5)
    (record,) = sound(
        parquet([{"n": 1, "x": 1.5, "t": moment, "l": [1, 2], "o": {"a": "b"}, "b": b"xy", "none": None}])
    )
    assert record == {
        "n": 1,
        "x": 1.5,
        "t": "2026-01-02T03:04:05",
        "l": [1, 2],
        "o": {"a": "b"},
        "b": "eHk=",
        "none": None,
    }


def test_what_is_not_parquet_is_told(parquet, file):
    assert parquet  # pyarrow is there
    with pytest.raises(UsageError, match=r"cannot be read as Parquet.*looks like CSV"):
        sound(file("x.parquet", "a,b\n1,2\n"))


def test_a_damaged_parquet_file_is_a_usage_error(parquet, tmp_path):
    path = tmp_path / "x.parquet"
    parquet(RECORDS * 1_000)
    raw = bytearray(path.read_bytes())
    raw[100:400] = bytes(300)
    path.write_bytes(raw)
    with pytest.raises(UsageError, match="cannot be read as Parquet"):
        sound(RecordFile(str(path)))


def test_without_pyarrow_the_extra_is_named(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match=r"pip install 'microbatch\[parquet\]'"):
        sound(file("x.parquet", b"PAR1"))
