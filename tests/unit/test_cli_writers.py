"""Files of rows in every format."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
from pathlib import Path

import pytest

from microbatch.cli.console import UsageError
from microbatch.cli.writing.output import NotWritten
from microbatch.cli.writing.writers import columns_of, encoder, format_of, head, is_plain_jsonl, write_rows, write_to

ODD = [
    'a "quoted" word, and a comma',
    "two\nlines",
    "two\r\nlines",
    "a lone\rcarriage return",
    "a\ttab",
    "=1+1",
    " spaces ",
    "žluťoučký 🐎",
    "null",
    "\x00",
    "\u2028",
]
ROWS = [
    *({"id": f"r{number}", "text": text, "count": number, "share": 0.1 + number} for number, text in enumerate(ODD)),
    {"id": "object", "text": {"a": [1, None, "é"]}, "count": None, "share": None, "flag": True},
    {"id": "list", "text": ["x"], "flag": False, "more": "left out"},
    {"id": "none"},
]
COLUMNS = {"id": str, "text": str, "count": int, "share": float, "flag": bool}

parquet = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow")


def text_of(value):
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def cells(row):
    """Return the cells of a row as a reader of CSV gets them, compact JSON apart."""
    return {name: text_of(row.get(name)).replace(", ", ",").replace(": ", ":") for name in COLUMNS}


def read_back(path, dialect):
    raw = Path(path).read_bytes()
    text = (gzip.decompress(raw) if path.lower().endswith(".gz") else raw).decode()
    rows = csv.DictReader(io.StringIO(text, newline=""), dialect=dialect, strict=True)
    return [{name: text.replace(", ", ",").replace(": ", ":") for name, text in row.items()} for row in rows]


@pytest.mark.parametrize(
    ("name", "dialect"),
    [("out.csv", "excel"), ("out.tsv", "excel-tab"), ("out.csv.gz", "excel"), ("OUT.TSV.GZ", "excel-tab")],
)
def test_csv_and_tsv_are_read_back_as_they_were(tmp_path, name, dialect):
    path = str(tmp_path / name)
    assert write_rows(path, format_of(path), ROWS, COLUMNS) == len(ROWS)
    assert read_back(path, dialect) == [cells(row) for row in ROWS]
    assert {each.name for each in tmp_path.iterdir()} == {Path(path).name}


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out"])
def test_json_lines_hold_each_row_as_it_is(tmp_path, name):
    path = str(tmp_path / name)
    write_rows(path, format_of(path), iter(ROWS), COLUMNS)
    raw = Path(path).read_bytes()
    assert [json.loads(line) for line in (gzip.decompress(raw) if name.endswith("gz") else raw).splitlines()] == ROWS


@parquet
def test_parquet_has_typed_columns_and_as_many_rows_as_there_are(tmp_path, monkeypatch):
    from pyarrow import parquet

    monkeypatch.setattr("microbatch.cli.writing.writers._ROWS_AT_ONCE", 5)
    path = str(tmp_path / "out.parquet")
    assert write_rows(path, "parquet", iter(ROWS), COLUMNS) == len(ROWS)
    table = parquet.read_table(path)
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("id", "string"),
        ("text", "string"),
        ("count", "int64"),
        ("share", "double"),
        ("flag", "bool"),
    ]
    expected = [
        {name: row.get(name) if kind is not str else text_of(row.get(name)) or None for name, kind in COLUMNS.items()}
        for row in ROWS
    ]
    compact = [{**row, "text": row["text"] and row["text"].replace(", ", ",").replace(": ", ":")} for row in expected]
    found = table.to_pylist()
    assert [
        {**row, "text": row["text"] and row["text"].replace(", ", ",").replace(": ", ":")} for row in found
    ] == compact
    assert parquet.ParquetFile(path).metadata.num_row_groups == 3


@parquet
def test_a_table_without_rows_has_its_columns(tmp_path):
    from pyarrow import parquet

    path = str(tmp_path / "out.parquet")
    assert write_rows(path, "parquet", [], COLUMNS) == 0
    assert parquet.read_table(path).column_names == list(COLUMNS)
    write_rows(str(tmp_path / "out.csv"), "csv", [], COLUMNS)
    assert (tmp_path / "out.csv").read_bytes() == b"id,text,count,share,flag\r\n"


def test_a_lone_surrogate_does_not_end_a_table():
    line = encoder("csv", {"a": str})({"a": "x\ud800y"})
    assert line == b"x?y\r\n"


def test_rows_can_be_encoded_one_by_one():
    file = io.BytesIO()
    write_to(file, "csv", ROWS, COLUMNS)
    encode = encoder("csv", COLUMNS)
    assert head("csv", COLUMNS) + b"".join(map(encode, ROWS)) == file.getvalue()
    assert head("jsonl", COLUMNS) == b""


def test_what_cannot_be_written_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "out.csv"
    path.write_text("before")

    def rows():
        yield {"id": "a"}
        raise OSError(28, "No space left on device")

    with pytest.raises(NotWritten, match=r"cannot write .*out\.csv': No space left"):
        write_rows(str(path), "csv", rows(), COLUMNS)
    with pytest.raises(NotWritten, match="cannot write"):
        write_rows(str(tmp_path / "nowhere" / "out.csv"), "csv", [], COLUMNS)
    assert path.read_text() == "before"
    assert {each.name for each in tmp_path.iterdir()} == {"out.csv"}


def test_columns_are_found_in_the_rows():
    assert columns_of([
        {"whole": 1, "mixed": 1, "number": 1, "flag": True, "empty": None, "odd": True},
        {"late": "x", "whole": None, "mixed": "a", "number": 0.5, "flag": False, "object": {"a": 1}, "odd": 1},
        {"large": 2**63},
    ]) == {
        "whole": int,
        "mixed": str,
        "number": float,
        "flag": bool,
        "empty": str,
        "odd": str,
        "late": str,
        "object": str,
        "large": str,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "named", "form"),
    [
        ("a.jsonl", None, "jsonl"),
        ("a.ndjson", None, "jsonl"),
        ("a.b/c", None, "jsonl"),
        ("a.CSV", None, "csv"),
        ("a.tsv.gz", None, "tsv"),
        ("a.out", "csv", "csv"),
        ("a.gz", "tsv", "tsv"),
        ("-", "csv", "csv"),
        ("a.csv", "csv", "csv"),
        ("a.jsonl", "openai-batch", "openai-batch"),
        ("a", "openai-batch", "openai-batch"),
    ],
)
def test_the_format_is_that_of_the_suffix_or_the_one_that_is_named(path, named, form):
    assert format_of(path, named) == form


@pytest.mark.parametrize(
    ("path", "named", "words"),
    [
        ("a.csv", "jsonl", "is the name of a csv file"),
        ("a.tsv.gz", "openai-batch", "is the name of a tsv file"),
        ("a.jsonl", "csv", "is the name of a jsonl file"),
        ("a.parquet.gz", None, "leave out .gz"),
        ("a.gz", "parquet", "leave out .gz"),
    ],
)
def test_a_format_that_is_not_that_of_the_name_is_refused(path, named, words):
    with pytest.raises(UsageError, match=words):
        format_of(path, named)


def test_without_pyarrow_parquet_is_refused_at_once(monkeypatch):
    monkeypatch.setattr("microbatch.cli.writing.writers.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'microbatch\[parquet\]'"):
        format_of("a.parquet")


def test_only_json_lines_without_compression_can_be_appended_to():
    assert [is_plain_jsonl(path, format_of(path)) for path in ("a.jsonl", "a", "a.jsonl.gz", "a.csv")] == [
        True,
        True,
        False,
        False,
    ]
    assert not is_plain_jsonl("a.jsonl", "openai-batch")
