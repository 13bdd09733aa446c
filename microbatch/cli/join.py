"""The output of `run --join`: each record of the input with its answer, in the order of the input.

A record that is left out, or has no answer yet, is there too, and its error says why. The columns of the answer are called "output"
and "error"; if a record of the input has a field of that name, "output 2" and so on. Answers are looked up in the journal by their
offsets, so that only these are held in memory.
"""

from __future__ import annotations

import csv
import io
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.cli.console import UsageError
from microbatch.cli.input import BLANK, id_digest
from microbatch.cli.output import replacing

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from microbatch.cli.input import Input, Record
    from microbatch.cli.output import OutputFile

_NONE: Final = -1
_SKIPPED: Final = {"type": "Skipped", "message": BLANK}
_UNASKED: Final = {"type": "Unasked", "message": "the run ended before it was asked"}
_DIALECTS: Final = {".csv": "excel", ".tsv": "excel-tab"}


def check_join(path: str) -> None:
    """Raise `UsageError` if rows cannot be written to *path* in the format of its name."""
    if Path(path).suffix.lower() not in (".jsonl", *_DIALECTS):
        raise UsageError(f"--join writes .jsonl, .csv and .tsv, not {path!r}")


def journal_path(output: str) -> str:
    """Return the path of the journal of *output*, which holds rows of the input."""
    return output + ".journal.jsonl"


class Join:
    """The records of *source* with their answers in *journal*.

    Attributes:
        columns: The names of the fields of all records, and those of the answer, in the order in which they first appear.
    """

    def __init__(self, source: Input, journal: OutputFile) -> None:
        self._source = source
        self._journal = journal
        self._last = array("q")  # by the number of the record: the offset of the last line with its id
        self._nameless: dict[
            int, int
        ] = {}  # of records without an id of their own, by the digest of the one they are given
        fields: dict[str, None] = {}
        for record in source.records():
            fields |= dict.fromkeys(record.fields)
            name = id_digest(record.name)
            if source.number(name) is None:
                self._nameless[name] = _NONE
        for name, start in journal.starts():
            self._note(name, start)
        self._output = _free_name("output", fields)
        self._error = _free_name("error", fields)
        self.columns: tuple[str, ...] = (*fields, self._output, self._error)

    def _note(self, name: int, start: int) -> None:
        number = self._source.number(name)
        if number is not None:
            self._last.extend([_NONE] * (number + 1 - len(self._last)))
            self._last[number] = start
        elif name in self._nameless:
            self._nameless[name] = start

    def _start(self, name: int) -> int:
        number = self._source.number(name)
        if number is None:
            return self._nameless[name]
        return self._last[number] if number < len(self._last) else _NONE

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield each record with the output and the error, one of which is None."""
        for record in self._source.records():
            output, error = self._answer(record)
            yield {**record.fields, self._output: output, self._error: error}

    def _answer(self, record: Record) -> tuple[Any, Any]:
        if record.skipped:
            return None, _SKIPPED
        start = self._start(id_digest(record.name))
        if start == _NONE:
            return None, _UNASKED
        line = self._journal.row_at(start, record.name)
        return line["output"], line["error"]

    def write(self, path: str) -> None:
        """Write the rows to the file *path* in the format of its suffix, whole or not at all.

        In CSV and TSV what is not a string is JSON, and None an empty cell. Raise `InputChanged` if the records are not those that were
        asked about, and `OSError` if the file cannot be written.
        """
        dialect = _DIALECTS.get(Path(path).suffix.lower())
        with replacing(Path(path)) as file:
            if dialect is None:
                file.writelines(msgspec.json.encode(row) + b"\n" for row in self.rows())
            else:
                _write_table(file, dialect, self.columns, self.rows())
            self._source.check(appended=True)


def _free_name(name: str, taken: Collection[str]) -> str:
    names = (name, *(f"{name} {number}" for number in range(2, len(taken) + 3)))
    return next(each for each in names if each not in taken)


def _write_table(file: Any, dialect: str, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    text = io.TextIOWrapper(file, "utf-8", "replace", newline="")
    writer = csv.writer(text, dialect=dialect)
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(name)) for name in columns])
    text.flush()
    text.detach()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
