"""Files of records: JSON Lines, JSON arrays, CSV, TSV and Parquet, plain or compressed by gzip, read as streams.

A record is a dict, and has a number, from 1: of its line in JSON Lines, else its position. Blank lines are no records. The head of CSV
and TSV names the fields of their rows, whose values are strings. What cannot be read is `Broken` if the records after it can be.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Final, Literal, TypeAlias, get_args

import msgspec

from microbatch.cli.console import UsageError
from microbatch.cli.reading.json_text import NOT_UTF8, decode_object, elements
from microbatch.cli.reading.source_file import Reopened, SourceFile, kept

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

Form: TypeAlias = Literal["jsonl", "json", "csv", "tsv", "parquet"]
"""The formats of `--input-format`; json is an array."""

FORMS: Final[tuple[Form, ...]] = get_args(Form)

_BY_SUFFIX: Final[dict[str, Form]] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_NOUNS: Final[dict[Form, str]] = {"jsonl": "line", "json": "item", "csv": "row", "tsv": "row", "parquet": "row"}
_NAMES: Final[dict[Form, str]] = {
    "jsonl": "JSON Lines",
    "json": "a JSON array",
    "csv": "CSV",
    "tsv": "TSV",
    "parquet": "Parquet",
}
_GZIP: Final = b"\x1f\x8b"
_PARQUET: Final = b"PAR1"
_OTHERS: Final = {
    b"PK\x03\x04": "a Zip archive or an Excel workbook",
    b"\xd0\xcf\x11\xe0": "an Excel workbook",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ\x00": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard",
    b"SQLite format 3\x00": "an SQLite database",
    b"%PDF": "a PDF",
    b"ORC": "ORC",
    b"Obj\x01": "Avro",
    b"ARROW1": "Arrow",
}
"""The beginnings of files that cannot be read."""

_OBJECT: Final = "one JSON object over several lines"
_UNREADABLE: Final = frozenset((*_OTHERS.values(), _OBJECT))
_REMEDIES: Final = {
    **dict.fromkeys(_OTHERS.values(), "save it as CSV, TSV, JSON Lines, a JSON array or Parquet"),
    _OBJECT: "write its records as a JSON array, or each in a line of its own",
}

_OBJECT_LINE: Final = re.compile(r"(?:\{[ \t\r]*\n(?!\s*\{)|[^\n]+(?:[{\[]|(?<!\}),)[ \t\r]*\n)")
"""The first line of an object that goes on in the next one; a lone brace before further objects is a damaged line."""

_HEAD: Final = 1 << 16
_CHUNK: Final = 1 << 17
_BATCH: Final = 1_000
_DELIMITERS: Final = ",;\t"
_DELIMITER_LINE: Final = re.compile(r'"?sep=(.)"?', re.IGNORECASE)
"""The first line of some files of spreadsheets."""
_MAX_FIELD: Final = 1 << 27
"""Most characters of a field of CSV: a quote that is never closed makes one of the rest of the file."""


class Broken(msgspec.Struct, frozen=True):
    """A record that cannot be read: the *problem*, in the same words for all of a kind, and a *detail* about this one.

    The *fields* are what can be made out of it, for an output that shows it.
    """

    problem: str
    detail: str = ""
    fields: dict[str, Any] = {}


Entry: TypeAlias = "dict[str, Any] | Broken"


class RecordFile:
    """A file of records, which can be read several times.

    Args:
        path: The file; `-` for stdin.
        form: Its format; None takes it from the suffix and, where that is silent, from the content.
        encoding: The encoding of a text; None for UTF-8, UTF-16 or UTF-32, whichever its first bytes tell.

    Attributes:
        name: What messages call the file.
        form: Its format.
        noun: What its records are called.

    Raises:
        UsageError: It cannot be read, or its format is unknown or not among `FORMS`.
    """

    def __init__(self, path: str, *, form: Form | None = None, encoding: str | None = None) -> None:
        self.source = SourceFile(path)
        self.name: str = self.source.name
        self._unpacked: IO[bytes] | None = None
        self._packed = False
        self._packed = self._head(len(_GZIP)) == _GZIP
        head = self._head()
        self._encoding = _checked(encoding or json.detect_encoding(head))
        self.form: Form = form or self._form_of(path, head)
        self.noun: str = _NOUNS[self.form]
        if self.form == "parquet" and self._packed:
            with self._reporting(), self._open() as file:
                self._unpacked = kept(file, self)

    # --- the format

    def _form_of(self, path: str, head: bytes) -> Form:
        name = path.lower().removesuffix(".gz")
        by_suffix = _BY_SUFFIX.get(Path(name).suffix)
        found, looks_like = self._looks(head)
        certain = found == "parquet" or looks_like in _UNREADABLE or (by_suffix, found) == ("jsonl", "json")
        if by_suffix is None or certain:
            by_suffix = found
        if by_suffix is None:
            remedy = _REMEDIES.get(looks_like, f"--input-format takes {', '.join(FORMS)}")
            raise UsageError(f"{self.name} looks like {looks_like}; {remedy}")
        return by_suffix

    def _looks(self, head: bytes) -> tuple[Form | None, str]:
        """Return the format that the content seems to have, if it is one that can be read, and its name."""
        if head.startswith(_PARQUET):
            return "parquet", _NAMES["parquet"]
        for magic, name in _OTHERS.items():
            if head.startswith(magic):
                return None, name
        text = head.decode(self._encoding, "replace").lstrip("\ufeff \t\r\n")
        if text.startswith("{") and _OBJECT_LINE.match(text):
            return None, _OBJECT
        if not text or text[0] == "{":
            return "jsonl", _NAMES["jsonl"]
        if text[0] == "[":
            return "json", _NAMES["json"]
        first = text.splitlines()[0]
        form: Form | None = "tsv" if "\t" in first else "csv" if "," in first or ";" in first else None
        return form, "plain text" if form is None else _NAMES[form]

    @property
    def doubt(self) -> str:
        """Return the likely format of the content, and the remedy, as a part of an error message; "" if it is its format."""
        form, name = self._looks(self._head())
        if form == self.form and name == _NAMES[form]:
            return ""
        remedy = "" if form in (None, self.form) else f"; if it is, give --input-format {form}"
        return f" (this looks like {name}{remedy})"

    def change(self) -> Literal["deleted", "changed", "grown"] | None:
        """Return what has happened to the file since its first reading; "grown" means that lines were added."""
        change = self.source.change(by_content=self.form != "parquet")
        return "changed" if change == "grown" and (self._packed or self.form not in ("jsonl", "csv", "tsv")) else change

    # --- reading

    def records(self, *, first: bool = False) -> Iterator[tuple[int, Entry]]:
        """Yield the number and the record of each that is not blank.

        With *first*, `SourceFile.change` compares with what has been read now. Raise `UsageError` if the rest cannot be read.
        """
        with self._reporting():
            if self.form == "parquet":
                yield from self._parquet()
                return
            with self._open(first=first) as file:
                if self.form in ("csv", "tsv"):
                    yield from self._table(file)
                else:
                    yield from self._json(file)

    @contextmanager
    def _open(self, *, first: bool = False) -> Generator[BinaryIO]:
        """Open the content, decompressed."""
        with self.source.open(first=first) as raw:
            if self._packed:
                with gzip.GzipFile(fileobj=raw) as unpacking, io.BufferedReader(unpacking, _CHUNK) as file:
                    yield file
            else:
                yield raw

    def _head(self, size: int = _HEAD) -> bytes:
        with self._reporting(), self._open() as file:
            return file.read(size)

    @contextmanager
    def _reporting(self) -> Generator[None]:
        """Raise errors of the content and of the file as `UsageError`."""
        try:
            yield
        except UnicodeError as error:
            raise UsageError(
                f"{self.name} is not {self._encoding}: {error}; give its encoding with --encoding"
            ) from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UsageError(f"{self.name} is damaged: {error}") from None
        except OSError as error:
            raise UsageError(f"cannot read {self.name!r}: {error.strerror or error}") from None

    def _text(self, file: BinaryIO, *, newline: str, errors: str = "strict") -> io.TextIOWrapper:
        return io.TextIOWrapper(file, self._encoding, errors, newline)

    @property
    def _is_utf8(self) -> bool:
        return self._encoding == "utf-8-sig"

    def _json(self, file: BinaryIO) -> Iterator[tuple[int, Entry]]:
        takes_commas = (
            self.form == "jsonl" and self._looks(self._head())[0] == "jsonl"
        )  # after objects, but not those of arrays
        for number, raw in enumerate(self._texts(file), start=1):
            text = raw.removeprefix(codecs.BOM_UTF8)  # files that begin with one may have been put together
            if takes_commas and text.rstrip().endswith(b"},"):
                text = text.rstrip()[:-1]
            if text and not text.isspace():
                try:
                    yield number, decode_object(text)
                except ValueError as error:
                    yield number, Broken(*error.args)

    def _texts(self, file: BinaryIO) -> Iterator[bytes]:
        """Yield the lines of JSON Lines, or the elements of an array, in UTF-8."""
        if self._is_utf8:
            yield from file if self.form == "jsonl" else self._elements(iter(lambda: file.read(_CHUNK), b""))
            return
        with self._text(file, newline="\n") as text:
            lines = (line.encode("utf-8", "surrogatepass") for line in text)
            yield from lines if self.form == "jsonl" else self._elements(lines)

    def _elements(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        try:
            yield from elements(chunks)
        except UnicodeError:
            raise  # from reading the chunks
        except ValueError as error:
            raise UsageError(f"{self.name}: {error}{self.doubt}") from None

    def _table(self, file: BinaryIO) -> Iterator[tuple[int, Entry]]:
        csv.field_size_limit(_MAX_FIELD)
        # A byte that is not UTF-8 breaks its row only.
        with self._text(file, newline="", errors="surrogateescape" if self._is_utf8 else "strict") as text:
            yield from self._records_in(text)

    def _records_in(self, text: io.TextIOWrapper) -> Iterator[tuple[int, Entry]]:
        lines = _Lines(text)
        reader = csv.reader(lines, delimiter="\t" if self.form == "tsv" else self._delimiter())
        fields: list[str] = []
        number = 0
        for row in self._rows(reader):
            entry = row if isinstance(row, Broken) else self._entry(row, fields, lines, reader.line_num)
            if fields:
                number += 1
                yield number, entry
            elif isinstance(entry, Broken):
                raise UsageError(f"{self.name}: the first line must name the fields; {entry.problem} ({entry.detail})")
            elif isinstance(row, list) and not _names_delimiter(row):
                fields = self._fields(row)

    def _rows(self, reader: Any) -> Iterator[list[str] | Broken]:
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield Broken("it is not CSV", f"line {reader.line_num}: {error}")
                continue
            if row is None:
                return
            if row:
                yield row

    def _entry(self, row: list[str], fields: list[str], lines: _Lines, line: int) -> Entry:
        """Return the record of a *row* that ends in the *line*; empty cells that no field is for are left out."""
        while fields and len(row) > len(fields) and not row[-1]:
            row.pop()
        problem = self._problem(row, fields, lines, line)
        if problem is None:
            return dict(zip(fields, row, strict=False))
        names = [*fields, *map(_unnamed, range(len(fields) + 1, len(row) + 1))]
        cells = [cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for cell in row]
        return Broken(*problem, dict(zip(names, cells, strict=False)))

    def _problem(self, row: list[str], fields: list[str], lines: _Lines, line: int) -> tuple[str, str] | None:
        if lines.ended:
            return "a quote is not closed", f"the row ends with the file, in line {line}"
        if self._is_utf8:
            try:
                "".join(row).encode()
            except UnicodeEncodeError as error:
                byte = ord(error.object[error.start]) & 0xFF
                return NOT_UTF8, f"byte 0x{byte:02x}, line {line}"
        if fields and len(row) > len(fields):
            return "it has more fields than the first line names", f"{len(row)} and {len(fields)}, line {line}"
        return None

    def _delimiter(self) -> str:
        """Return the delimiter that the first line names, else the one that makes the most fields of it; a comma, if several do."""
        first = self._head().decode(self._encoding, "replace").lstrip("\r\n").splitlines()[:1]
        if first and (named := _DELIMITER_LINE.fullmatch(first[0])):
            return named[1]
        return max(_DELIMITERS, key=lambda delimiter: max(map(len, csv.reader(first, delimiter=delimiter)), default=0))

    def _fields(self, row: list[str]) -> list[str]:
        fields = [name.strip() or _unnamed(place) for place, name in enumerate(row, start=1)]
        for place, name in enumerate(fields):
            if name in fields[:place]:
                raise UsageError(f"{self.name}: two columns have the name {name!r}; give one of them another name")
        return fields

    def _parquet(self) -> Iterator[tuple[int, Entry]]:
        try:
            parquet: Any = import_module("pyarrow.parquet")
        except ImportError:
            raise UsageError(f"{self.name}: Parquet needs pyarrow: pip install 'microbatch[parquet]'") from None
        with self.source.open() if self._unpacked is None else Reopened(self._unpacked) as file:
            try:
                batches = parquet.ParquetFile(file).iter_batches(batch_size=_BATCH, use_threads=False)
                records = (record for batch in batches for record in batch.to_pylist())
                for number, record in enumerate(records, start=1):
                    yield number, msgspec.to_builtins(record)
            except (ValueError, TypeError, NotImplementedError, OSError) as error:
                raise UsageError(f"{self.name} cannot be read as Parquet: {error}{self.doubt}") from None


def _checked(encoding: str) -> str:
    """Return the name of *encoding* that the codecs use. Raise `UsageError` if there is none for texts."""
    try:
        "".encode(encoding)
        name = codecs.lookup(encoding).name
    except LookupError:
        raise UsageError(
            f"--encoding {encoding!r} is unknown; examples are utf-8, utf-16, cp1252 and latin-1"
        ) from None
    return "utf-8-sig" if name == "utf-8" else name  # with or without a byte order mark


def _unnamed(place: int) -> str:
    """Return the name of a column that has none."""
    return f"column {place}"


def _names_delimiter(row: list[str]) -> bool:
    """Return whether the first *row* of a table only says what its delimiter is."""
    return len(row) == 2 and row[0].lower() == "sep=" and not row[1]  # noqa: PLR2004


class _Lines:
    """The lines of *text*; `ended` once there are no more."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.ended = False
        self._text = text

    def __iter__(self) -> Iterator[str]:
        yield from self._text
        self.ended = True
