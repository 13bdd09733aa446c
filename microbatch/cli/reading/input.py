"""The input of a command: files of records, checked as a whole at first and then turned into requests one record at a time.

Nothing but digests of ids is kept of a record: the files are read once to check them, and again for each pass over the requests.
"""

from __future__ import annotations

import random
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

import msgspec

from microbatch.cli.console import UsageError, plural
from microbatch.cli.digests import Digests
from microbatch.cli.reading.questions import LineError
from microbatch.cli.reading.records import Broken, Entry, Form, RecordFile
from microbatch.template import value_of

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Sequence

    from microbatch.cli.reading.questions import Questions
    from microbatch.messages import Request

OnEmpty: TypeAlias = Literal["ask", "skip", "fail"]
"""The treatment of a record whose fields in the template are all blank."""

ON_EMPTY: Final[tuple[OnEmpty, ...]] = get_args(OnEmpty)
BLANK: Final = "all fields of the template are blank"

_MAX_LABEL: Final = 3
_MAX_NAMES: Final = 20
_MAX_NAME: Final = 40


class InputChanged(Exception):
    """The input is not the file that was checked at the start."""


def id_digest(name: str) -> int:
    """Return 128 bits that stand for the id *name* in memory."""
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest())


class Place(msgspec.Struct, frozen=True):
    """The place of a record: the number of the line, row or item (the *noun*) of the *file*."""

    file: str
    noun: str
    number: int

    @property
    def prefix(self) -> str:
        """The words before the number."""
        return f"{self.file}, {self.noun} "

    def __str__(self) -> str:
        return f"{self.prefix}{self.number}"


class BadLine(msgspec.Struct):
    """A record that cannot be asked about, by its place and its id, None if it has none.

    The problem is told in the same words for all records of the kind; the detail is about this one. The record holds the fields that
    can be made out.
    """

    place: Place
    name: str | None
    problem: str
    field: str | None = None
    detail: str = ""
    record: dict[str, Any] = {}

    @property
    def told(self) -> str:
        """The problem with its detail."""
        return self.problem + (f" ({self.detail})" if self.detail else "")

    def error(self) -> dict[str, Any]:
        """Return the error of the output line for this record."""
        message = f"{self.place}: {self.told}"
        return {"type": "InputError", "message": message, "line": self.place.number, "field": self.field}


class Record(msgspec.Struct):
    """A record of the input, asked about or not.

    Attributes:
        name: Its id; of one that cannot be read, the id under which it is reported.
        fields: Its fields; of one that cannot be read, those that can be made out.
        skipped: Whether it is not asked about because its fields are blank.
    """

    name: str
    fields: dict[str, Any]
    skipped: bool = False


class Input:
    """Files of records, which are read and checked as a whole at first, and again while their requests are taken.

    Args:
        paths: The files, `-` for stdin; their records follow each other.
        questions: Makes requests from records.
        id_field: The field that holds a record's id; None takes `custom_id`, else `id`, else its number, after the file's name if there
            are several files.
        form: The format of the files; None for the one that each has by its name or content.
        encoding: The encoding of texts; None for UTF-8, or UTF-16 or UTF-32 where the first bytes tell.
        limit: Only the first so many records are read; None for all.
        sample: Only so many of these, drawn at random, all alike likely, are asked about; None for all.
        seed: Decides which.
        on_empty: What is done about records with nothing in the fields that the template names.

    Attributes:
        items: Number of records to ask about, those that cannot be asked included.
        skipped: Number of records left out because of *on_empty*.

    Raises:
        UsageError: A file cannot be read, an id occurs twice, no record has one of the fields that are needed, or none can be asked.
    """

    def __init__(
        self,
        paths: Sequence[str],
        questions: Questions,
        *,
        id_field: str | None = None,
        form: Form | None = None,
        encoding: str | None = None,
        limit: int | None = None,
        sample: int | None = None,
        seed: int = 0,
        on_empty: OnEmpty = "skip",
    ) -> None:
        self.questions = questions
        self.items: int = 0
        self.skipped: int = 0
        self._id_field = id_field
        self._limit = limit
        self._on_empty = on_empty
        if len(set(paths)) < len(paths):
            raise UsageError(f"{next(path for path in paths if paths.count(path) > 1)!r} is given twice")
        self._files = [RecordFile(path, form=form, encoding=encoding) for path in paths]
        self._read: list[_Read] = []  # of each file that was checked
        self._cut = False  # by the limit
        self._names = Digests()  # of the ids
        self._skipped = Digests()
        self._drawn: dict[int, int | None] | None = None  # the sample: digests of ids by the position of the record
        self._drawn_names: set[int] = set()
        self._survey(None if sample is None else _Sample(sample, seed))

    @property
    def label(self) -> str:
        """The names of the files, for messages."""
        names = [file.name for file in self._files]
        more = len(names) - _MAX_LABEL
        return ", ".join(names[:_MAX_LABEL]) + (f" and {plural(more, 'more file')}" if more > 0 else "")

    @property
    def partial(self) -> bool:
        """True if records may have been left out by a limit or a sample."""
        return self._limit is not None or self._drawn is not None

    def is_one_of(self, path: str) -> bool:
        """Return whether the file *path*, which may be missing, is one of the input."""
        return any(file.source.is_same(path) for file in self._files)

    def __contains__(self, item: object) -> bool:
        """Return whether *item*, the digest of an id, is that of a record that is asked about."""
        if self._drawn is not None:
            return item in self._drawn_names
        return item in self._names and item not in self._skipped

    def number(self, item: int) -> int | None:
        """Return the number of the record whose id has the digest *item*, among those with an id, from 0; None if there is none."""
        return self._names.number(item)

    # --- the check at the start

    def _survey(self, sample: _Sample | None) -> None:
        found = _Overview(self.questions.fields, self._id_field)
        for position, (place, entry) in enumerate(self._entries(first=True)):
            if not isinstance(entry, Broken):
                found.see(place, entry)
            line: object = self._named(place, entry)
            digest = None
            if isinstance(line, tuple):
                name, record = line
                digest = id_digest(name)
                self._add_id(name, digest, place)
                if self._is_skipped(record):
                    found.askable = True
                    self.skipped += 1
                    self._skipped.add(digest)
                    continue
                if not found.askable:
                    line = self._question(place, name, record)
            self.items += 1
            found.judge(line)
            if sample is not None:
                sample.add(position, digest)
        if (problem := found.problem(self.questions)) is not None:
            raise UsageError(f"{self.label}: {problem}{self._files[0].doubt}")
        if sample is not None:
            self._drawn, self.items = sample.drawn, len(sample.drawn)
            self._drawn_names = {digest for digest in sample.drawn.values() if digest is not None}

    def _add_id(self, name: str, digest: int, place: Place) -> None:
        known = len(self._names)
        self._names.add(digest)
        if len(self._names) > known:
            return
        lines = ((earlier, self._named(earlier, entry)) for earlier, entry in self._entries())
        first = next(earlier for earlier, line in lines if isinstance(line, tuple) and line[0] == name)
        places = f"{first} and {place} have"
        if first.file == place.file:
            places = f"{place.file}: {place.noun}s {first.number} and {place.number} have"
        raise UsageError(f"{places} the same id {name!r}; ids must differ; --id-field names another field")

    # --- reading

    def _entries(self, *, first: bool = False) -> Iterator[tuple[Place, Entry]]:
        """Yield the place and the content of each record within the limit, of those that were checked unless it is the *first* time."""
        left = self._limit
        for index, file in enumerate(self._files):
            if first:
                self._read.append(_Read())
            read = self._read[index]
            for number, entry in file.records(first=first):
                if first:
                    read.last, read.count = number, read.count + 1
                elif number > read.last:
                    break
                yield Place(file.name, file.noun, number), entry
                left = None if left is None else left - 1
                if left == 0:
                    self._cut = True
                    return

    def _named(self, place: Place, entry: Entry) -> tuple[str, dict[str, Any]] | BadLine:
        """Return the id and the fields of a record."""
        if isinstance(entry, Broken):
            return BadLine(place, None, entry.problem, None, entry.detail, entry.fields)
        try:
            return self._name(entry, place), entry
        except LineError as error:
            return BadLine(place, None, str(error), error.field, record=entry)

    def _name(self, record: dict[str, Any], place: Place) -> str:
        field = self._id_field or next((field for field in ("custom_id", "id") if field in record), None)
        if field is None:
            return self._number(place)
        name = value_of(record, field)
        if name is msgspec.UNSET:
            raise LineError(f'the field "{field}" (--id-field) is missing', field)
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            raise LineError(
                f'the field "{field}" must be a non-empty string or a whole number, to serve as an id', field
            )
        return str(name)

    def _number(self, place: Place) -> str:
        """Return the id of a record that has none of its own."""
        return f"{place.file}:{place.number}" if len(self._files) > 1 else str(place.number)

    def id_for(self, line: BadLine) -> str:
        """Return the id under which *line* is reported: its own, else one that no other record has."""
        if line.name is not None:
            return line.name
        name = self._number(line.place)
        while id_digest(name) in self._names:
            name = f"line {name}"
        return name

    # --- requests

    def requests(self, skip: Container[int] = ()) -> Iterator[tuple[Place, Request] | BadLine]:
        """Yield what `rows` does, and `check` before and after that the files have not changed."""
        self.check(appended=True)
        yield from self.rows(skip)
        self.check()

    def rows(self, skip: Container[int] = ()) -> Iterator[tuple[Place, Request] | BadLine]:
        """Yield the place and the request of every record that was checked, or what is wrong with it; *skip* has digests of ids."""
        for place, line in self._chosen():
            if isinstance(line, BadLine):
                yield line
            elif id_digest(line[0]) not in skip and not self._is_skipped(line[1]):
                question = self._question(place, *line)
                yield question if isinstance(question, BadLine) else (place, question)

    def _is_skipped(self, record: dict[str, Any]) -> bool:
        return self._on_empty == "skip" and self.questions.is_empty(record)

    def _question(self, place: Place, name: str, record: dict[str, Any]) -> Request | BadLine:
        try:
            if self._on_empty == "fail" and self.questions.is_empty(record):
                return BadLine(place, name, BLANK)
            return self.questions.request(record, name)
        except LineError as error:
            return BadLine(place, name, str(error), error.field)

    def _chosen(self) -> Iterator[tuple[Place, tuple[str, dict[str, Any]] | BadLine]]:
        """Yield the place, the id and the fields of each record within the limit and the sample."""
        for position, (place, entry) in enumerate(self._entries()):
            if self._drawn is None or position in self._drawn:
                yield place, self._named(place, entry)

    def records(self) -> Iterator[Record]:
        """Yield each record within the limit and the sample, in order, those that are skipped or cannot be read included."""
        for _, line in self._chosen():
            if isinstance(line, BadLine):
                yield Record(self.id_for(line), line.record)
            else:
                name, record = line
                yield Record(name, record, self._is_skipped(record))

    # --- changes

    def check(self, *, appended: bool = False) -> None:
        """Raise `InputChanged` if the content is not that of the start; with *appended* further lines are accepted."""
        for file, read in zip(self._files, self._read, strict=False):
            change = file.change()
            if change == "grown" and appended:
                continue
            if change == "grown":
                rest = f"{file.noun}s after {read.last:,} were not asked"
                raise InputChanged(f"{file.name!r} has grown while it was asked about: {rest}")
            if change is not None:
                count = self._count(file) if change == "changed" and not self._cut else read.count
                was = (
                    f": it has {plural(count or 0, file.noun)} now, and had {read.count:,}"
                    if count not in (None, read.count)
                    else ""
                )
                raise InputChanged(f"{file.name!r} was {change} while it was asked about{was}")

    def _count(self, file: RecordFile) -> int | None:
        """Return the number of records in a file that has changed; None if it cannot be read."""
        try:
            return sum(1 for _ in file.records())
        except UsageError:
            return None


class _Read(msgspec.Struct):
    """The number of the last record of a file that was checked, and how many there were."""

    last: int = 0
    count: int = 0


class _Sample:
    """A sample of *size* records, all alike likely (Vitter's algorithm R). `drawn` has their digests by position."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._draw = random.Random(seed)  # noqa: S311 repeatable, no secret
        self._positions: list[int] = []
        self._count = 0
        self.drawn: dict[int, int | None] = {}

    def add(self, position: int, digest: int | None) -> None:
        """Draw for the record at *position*, whose id has the *digest*."""
        self._count += 1
        place = self._draw.randrange(self._count)
        if len(self._positions) < self._size:
            self._positions.append(position)
        elif place < self._size:
            del self.drawn[self._positions[place]]
            self._positions[place] = position
        else:
            return
        self.drawn[position] = digest


class _Overview:
    """The facts about all records together: which of the *fields* and the *id_field* are in none, and what is wrong.

    Attributes:
        askable: True if one can be asked about, or is skipped.
    """

    def __init__(self, fields: Sequence[str], id_field: str | None) -> None:
        self.askable: bool = False
        self._missing = dict.fromkeys(fields, "--template") | ({} if id_field is None else {id_field: "--id-field"})
        self._first: tuple[Place, dict[str, Any]] | None = None
        self._bad: BadLine | None = None

    def see(self, place: Place, record: dict[str, Any]) -> None:
        """Take a record that can be read."""
        self._first = self._first or (place, record)
        if self._missing:
            for field in [name for name in self._missing if value_of(record, name) is not msgspec.UNSET]:
                del self._missing[field]

    def judge(self, line: object) -> None:
        """Take what has become of a record."""
        if not isinstance(line, BadLine):
            self.askable = True
        elif self._bad is None:
            self._bad = line

    def problem(self, questions: Questions) -> str | None:
        """Return why none of the records can be asked about, or which field none has; None if there is nothing of that kind."""
        if self._first is None:
            return None if self._bad is None else f"no {self._bad.place.noun} can be read; {self._told(self._bad)}"
        place, record = self._first
        noun, fields = place.noun, _names_in(record) + _list_in(record)
        for field, flag in self._missing.items():
            return f'no {noun} has the field "{field}" of {flag}; {noun} {place.number} has {fields}'
        if self.askable or self._bad is None:
            return None
        if questions.template is None and self._bad.field == "body" and "body" not in record:
            return (
                f'no {noun} has a "body" or "messages"; {noun} {place.number} has {fields}. '
                f"For {noun}s that are not OpenAI Batch requests give --template, as in --template 'Product: {{name}}'"
            )
        return f"no {noun} can be asked about; {self._told(self._bad)}"

    def _told(self, line: BadLine) -> str:
        return f"{line.place.noun} {line.place.number}: {line.told}"


def _names_in(record: dict[str, Any]) -> str:
    """Return the names of the fields of *record*, as many as a line of a message has room for."""
    names = [name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}..." for name in islice(record, _MAX_NAMES)]
    if len(record) > len(names):
        names.append(f"and {plural(len(record) - len(names), 'more field')}")
    return ", ".join(names) or "no fields"


def _list_in(record: dict[str, Any]) -> str:
    """Return a hint, if *record* has a list of objects, which may be what was meant as the records."""
    found = (name for name, value in record.items() if isinstance(value, list) and value and isinstance(value[0], dict))
    name = next(found, None)
    return "" if name is None else f' (if the records are those in "{name}", give that list alone, as a JSON array)'
