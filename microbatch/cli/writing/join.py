"""The output of `run --join`: each record of the input with its answer, in the order of the input.

A record that is left out, or has no answer yet, is there too, and its error says why. The columns of the answer are called "output"
and "error"; if a record of the input has a field of that name, "output 2" and so on. Answers are looked up in the journal by their
offsets, so that only these are held in memory.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, Final

from microbatch.cli.reading.input import BLANK, id_digest

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from microbatch.cli.reading.input import Input, Record
    from microbatch.cli.writing.output import OutputFile

_NONE: Final = -1
_SKIPPED: Final = {"type": "Skipped", "message": BLANK}
_UNASKED: Final = {"type": "Unasked", "message": "the run ended before it was asked"}


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
        """Yield each record with the output and the error, one of which is None.

        Raise `InputChanged` in the end if the records are not those that were asked about.
        """
        for record in self._source.records():
            output, error = self._answer(record)
            yield {**record.fields, self._output: output, self._error: error}
        self._source.check(appended=True)

    def _answer(self, record: Record) -> tuple[Any, Any]:
        if record.skipped:
            return None, _SKIPPED
        start = self._start(id_digest(record.name))
        if start == _NONE:
            return None, _UNASKED
        line = self._journal.row_at(start, record.name)
        return line["output"], line["error"]


def _free_name(name: str, taken: Collection[str]) -> str:
    names = (name, *(f"{name} {number}" for number in range(2, len(taken) + 3)))
    return next(each for each in names if each not in taken)
