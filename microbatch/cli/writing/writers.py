"""Files of rows: JSON Lines, CSV, TSV and Parquet, plain or compressed by gzip.

A row is a dict. JSON Lines hold it as it is. In the other formats it has the columns that it was declared with: a value that is not a
string stands in a column of strings as JSON, None is an empty cell (Parquet: null), and what has no column is left out. CSV and TSV are
UTF-8 in the dialects `excel` and `excel-tab` of the module `csv`: lines end with CR LF, and a cell with a delimiter, a quote or a line
break is quoted.
"""

from __future__ import annotations

import csv
import gzip
import io
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Literal, TypeAlias, cast, get_args

import msgspec

from microbatch.cli.console import UsageError
from microbatch.cli.writing.output import NotWritten, replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping

Format: TypeAlias = Literal["jsonl", "csv", "tsv", "parquet", "openai-batch"]
"""The formats of `--output-format`. The rows of openai-batch are lines of OpenAI's batch output files, written as JSON Lines."""

FORMATS: Final[tuple[Format, ...]] = get_args(Format)

Columns: TypeAlias = "Mapping[str, type]"
"""The columns of a table, in order, each with the type of its values: `str`, `int`, `float` or `bool`."""

_BY_SUFFIX: Final[dict[str, Format]] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_DIALECTS: Final = {"csv": "excel", "tsv": "excel-tab"}
_ROWS_AT_ONCE: Final = 10_000
"""Rows that are in memory at a time, and make a row group of a Parquet file."""
_INT64: Final = range(-(2**63), 2**63)


# --- formats


def format_of(path: str, named: Format | None = None) -> Format:
    """Return the format of the file *path*: that of its suffix, *named* if the suffix is silent, else JSON Lines.

    The suffix `.jsonl` stands for openai-batch too. Raise `UsageError` if the suffix and *named* disagree, or pyarrow is missing.
    """
    suffix = Path(path[:-3] if _is_compressed(path) else path).suffix.lower()
    found = _BY_SUFFIX.get(suffix)
    if named == "openai-batch" and found == "jsonl":
        found = named
    if found is not None and named is not None and found != named:
        raise UsageError(f"{path!r} is the name of a {found} file, but --output-format says {named}; leave one out")
    form = found or named or "jsonl"
    if form == "parquet" and _is_compressed(path):
        raise UsageError(f"{path!r}: a Parquet file is compressed inside; leave out .gz")
    if form == "parquet" and find_spec("pyarrow") is None:
        raise UsageError("Parquet files need pyarrow: pip install 'microbatch[parquet]'")
    return form


def _is_compressed(path: str) -> bool:
    return path.lower().endswith(".gz")


def is_plain_jsonl(path: str, form: Format) -> bool:
    """Return whether the file *path* of the format *form* is JSON Lines without compression, to which a line can be appended."""
    return form == "jsonl" and not _is_compressed(path)


def columns_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, type]:
    """Return the columns that hold all *rows*, in the order in which they first appear.

    A column is of the type of its values, `float` for whole and other numbers together, and `str` for any other mixture.
    """
    found: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            kinds = found.setdefault(name, set())
            if value is not None:
                kinds.add(str if isinstance(value, int) and value not in _INT64 else type(cast("object", value)))
    return {name: _kind(kinds) for name, kinds in found.items()}


def _kind(kinds: set[type]) -> type:
    if len(kinds) == 1 and kinds < {int, float, bool}:
        return next(iter(kinds))
    return float if kinds == {int, float} else str


# --- writing


def write_rows(path: str, form: Format, rows: Iterable[Mapping[str, Any]], columns: Columns) -> int:
    """Write *rows* to the file *path*, which is replaced as a whole once all are on the disk, and return their number.

    *columns* are without effect on JSON Lines. Raise `NotWritten` if that fails; then the file is as it was.
    """
    try:
        with replacing(Path(path)) as draft, _compressed(draft, path) as file:
            return write_to(file, form, rows, columns)
    except OSError as error:
        raise NotWritten(f"cannot write {path!r}: {error.strerror or error}") from error


@contextmanager
def _compressed(file: IO[bytes], path: str) -> Generator[IO[bytes]]:
    if not _is_compressed(path):
        yield file
        return
    with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=file, mtime=0) as packed:
        yield packed  # type: ignore[misc]


def write_to(file: IO[bytes], form: Format, rows: Iterable[Mapping[str, Any]], columns: Columns) -> int:
    """Write *rows* to an open file, and return their number."""
    if form == "parquet":
        return _write_parquet(file, rows, columns)
    encode, written = encoder(form, columns), 0
    file.write(head(form, columns))
    for row in rows:
        file.write(encode(row))
        written += 1
    return written


def head(form: Format, columns: Columns) -> bytes:
    """Return the line before the first row: of CSV and TSV the names of the columns, else none."""
    return encoder(form, columns)(dict(zip(columns, columns, strict=True))) if form in _DIALECTS else b""


def encoder(form: Format, columns: Columns) -> Callable[[Mapping[str, Any]], bytes]:
    """Return a function that returns a row as the bytes of its line, in a format that is not Parquet."""
    if form not in _DIALECTS:
        return lambda row: msgspec.json.encode(row) + b"\n"
    names = tuple(columns)
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, dialect=_DIALECTS[form])

    def encode(row: Mapping[str, Any]) -> bytes:
        buffer.seek(0)
        buffer.truncate()
        writer.writerow(["" if (value := row.get(name)) is None else _text(value) for name in names])
        return buffer.getvalue().encode("utf-8", "replace")

    return encode


def _text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _write_parquet(file: IO[bytes], rows: Iterable[Mapping[str, Any]], columns: Columns) -> int:
    pa: Any = import_module("pyarrow")
    parquet: Any = import_module("pyarrow.parquet")
    kinds = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    schema = pa.schema([(name, kinds[kind]) for name, kind in columns.items()])
    written = 0
    with parquet.ParquetWriter(file, schema) as writer:
        for some in _in_parts(rows):
            values = [[_cell(row.get(name), kind) for row in some] for name, kind in columns.items()]
            arrays = [pa.array(column, field.type) for column, field in zip(values, schema, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            written += len(some)
    return written


def _cell(value: Any, kind: type) -> Any:
    if value is None:
        return None
    return _text(value).encode("utf-8", "replace").decode() if kind is str else kind(value)


def _in_parts(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    rest = iter(rows)
    while some := list(islice(rest, _ROWS_AT_ONCE)):
        yield some
