"""Reads the input of the commands that ask: JSON Lines, first all of it to check the ids, then lazily to ask."""

from __future__ import annotations

import stat
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.cli.console import UsageError, plural
from microbatch.cli.questions import LineError, has_field

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator

    from microbatch.cli.questions import Questions
    from microbatch.messages import Request

_BOM = b"\xef\xbb\xbf"


def digest(name: str) -> int:
    """Return what stands for an id in memory: 128 bits, so that two ids never share one in practice."""
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest())


class InputChanged(Exception):
    """The input is not the file any more that was checked at the start: what is asked, and under which ids, is not known."""


class BadLine(msgspec.Struct):
    """A line that cannot be asked about.

    Attributes:
        number: Its number in the file, from 1.
        name: Its id, if one could be read.
        problem: What is wrong, in words that are the same for all lines of the kind.
        field: The field to blame, or None.
        detail: More about it, of this line only.
    """

    number: int
    name: str | None
    problem: str
    field: str | None = None
    detail: str = ""

    def error(self, path: str) -> dict[str, Any]:
        """Return what an output line says of it, as a line of the file *path*."""
        message = f"{path}, line {self.number}: {self.problem}" + (f" ({self.detail})" if self.detail else "")
        return {"type": "InputError", "message": message, "line": self.number, "field": self.field}


class Line(msgspec.Struct):
    """A line of the input that is a JSON object.

    Attributes:
        number: Its number in the file, from 1.
        name: Its id.
        record: What it says.
    """

    number: int
    name: str
    record: dict[str, Any]


class Survey(msgspec.Struct):
    """What the first pass found.

    Attributes:
        items: Lines that are not blank.
        last: Number of the last line; what is appended later has not been checked.
        names: Digests of the ids.
        size: Bytes in the file.
        content: Digest of them.
        ended: Whether its last line ends in a line break.
        version: What tells the file from another one under its name, and from itself before and after a change.
    """

    items: int
    last: int
    names: set[int]
    size: int = 0
    content: bytes = b""
    ended: bool = True
    version: tuple[int, ...] = ()


class Input:
    """The input file.

    Args:
        path: A JSON Lines file; it is read more than once.
        id_field: The field that holds a line's id; None takes `custom_id`, else `id`, else the line number.

    Raises:
        UsageError: It is no file that can be read twice.
    """

    def __init__(self, path: str, *, id_field: str | None = None) -> None:
        self.path = path
        self._id_field = id_field
        try:
            mode = Path(path).stat().st_mode
            Path(path).open("rb").close()
        except OSError as error:
            raise UsageError(f"cannot read {path!r}: {error.strerror}") from None
        if not stat.S_ISREG(mode):
            raise UsageError(f"{path!r} must be a file: it is read twice, first to check the ids and then to ask")

    def survey(self, fields: tuple[str, ...]) -> Survey:
        """Read all lines once.

        Args:
            fields: What is asked about; one that no line has is a mistake in the question, not in the lines.

        Raises:
            UsageError: An id comes twice, or no line has one of the fields.
        """
        survey = Survey(0, 0, set(), version=self._version())
        missing = set(fields)
        first: Line | None = None
        content = blake2b(digest_size=16)

        def see(raw: bytes) -> None:
            content.update(raw)
            survey.size += len(raw)
            survey.ended = raw.endswith(b"\n")

        for line in self._lines(see):
            survey.items += 1
            survey.last = line.number
            if isinstance(line, BadLine):
                continue
            first = first or line
            name = digest(line.name)
            if name in survey.names:
                raise UsageError(
                    f"{self.path}: lines {self._first(line.name)} and {line.number} have the same id {line.name!r}; "
                    "ids must differ, or answers could not be told apart"
                )
            survey.names.add(name)
            missing -= {field for field in missing if has_field(line.record, field)}
        if first is not None and missing:
            raise UsageError(self._nowhere(next(field for field in fields if field in missing), first))
        survey.content = content.digest()
        return survey

    def check(self, survey: Survey, *, appended: bool = False) -> None:
        """Check that the file still is what *survey* was made of; one that was only touched is.

        Args:
            survey: The first pass.
            appended: Whether lines after those that were checked are accepted.

        Raises:
            InputChanged: It is another one; the message says in what it differs.
            OSError: It cannot be read.
        """
        content, items, read = blake2b(digest_size=16), 0, 0
        try:
            version = self._version()
            if version == survey.version:
                return
            with Path(self.path).open("rb") as file:
                for raw in file:
                    content.update(raw[: max(0, survey.size - read)])
                    items, read = items + (not raw.isspace()), read + len(raw)
        except FileNotFoundError:
            raise InputChanged(f"{self.path!r} was deleted while it was asked about") from None
        if content.digest() != survey.content or (read > survey.size and not survey.ended):
            was = "" if items == survey.items else f": it has {plural(items, 'line')} now, and had {survey.items:,}"
            raise InputChanged(f"{self.path!r} was changed while it was asked about{was}")
        if read == survey.size:
            survey.version = version
        elif not appended:
            raise InputChanged(
                f"{self.path!r} has grown while it was asked about: lines after {survey.last:,} were not asked"
            )

    def _version(self) -> tuple[int, ...]:
        found = Path(self.path).stat()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def _first(self, name: str) -> int:
        return next(line.number for line in self if isinstance(line, Line) and line.name == name)

    def _nowhere(self, field: str, first: Line) -> str:
        fields = ", ".join(first.record) or "none"
        if field == "body":
            return (
                f'{self.path}: no line has a "body" (line {first.number} has the fields {fields}). '
                "For lines that are no OpenAI Batch requests give --template, as in --template 'Product: {name}'"
            )
        return f'{self.path}: no line has the field "{field}" of --template; line {first.number} has {fields}'

    def __iter__(self) -> Iterator[Line | BadLine]:
        """Yield every line that is not blank."""
        return self._lines()

    def _lines(self, see: Callable[[bytes], object] = lambda _: None) -> Iterator[Line | BadLine]:
        """Yield every line that is not blank; *see* takes the bytes of all of them."""
        with Path(self.path).open("rb") as file:
            for number, raw in enumerate(file, start=1):
                see(raw)
                text = raw.removeprefix(_BOM) if number == 1 else raw
                if not text.isspace() and text:
                    yield self._line(number, text)

    def _line(self, number: int, raw: bytes) -> Line | BadLine:
        try:
            record = msgspec.json.decode(raw, type=dict[str, Any])
        except RecursionError:
            return BadLine(number, None, "the JSON is nested too deeply")
        except msgspec.ValidationError:
            return BadLine(number, None, "it is not a JSON object")
        except ValueError as error:
            if not _is_utf8(raw):
                return BadLine(number, None, "it is not UTF-8")
            return BadLine(number, None, "it is not JSON", detail=str(error))
        try:
            return Line(number, self._name(record, number), record)
        except LineError as error:
            return BadLine(number, None, str(error), error.field)

    def _name(self, record: dict[str, Any], number: int) -> str:
        field = self._id_field or next((field for field in ("custom_id", "id") if field in record), None)
        if field is None:
            return str(number)
        if field not in record:
            raise LineError(f'the field "{field}" (--id-field) is missing', field)
        name = record[field]
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            raise LineError(f'the field "{field}" must be a text or a whole number, to serve as an id', field)
        return str(name)


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def requests(
    source: Input,
    survey: Survey,
    questions: Questions,
    done: Container[int],
    reject: Callable[[BadLine, str], None],
) -> Iterator[Request]:
    """Yield what is to be asked, reading on as it is taken; the arguments are those of `numbered`."""
    return (request for _, request in numbered(source, survey, questions, done, reject))


def numbered(
    source: Input,
    survey: Survey,
    questions: Questions,
    done: Container[int],
    reject: Callable[[BadLine, str], None],
) -> Iterator[tuple[int, Request]]:
    """Yield what is to be asked, with the numbers of its lines, reading on as it is taken.

    Args:
        source: The input.
        survey: Its first pass.
        questions: What is asked about each line.
        done: Digests of the ids that are not to be asked about.
        reject: Takes each line that cannot be asked about, and the id to report it under.

    Raises:
        InputChanged: The file is another one than when it was checked, or becomes so while it is read.
        OSError: It cannot be read.
    """
    source.check(survey, appended=True)
    for line in source:
        if line.number > survey.last:
            break
        if isinstance(line, BadLine):
            reject(line, _substitute(line.number, survey.names))
            continue
        if digest(line.name) in done:
            continue
        try:
            request = questions.request(line.record, line.name)
        except LineError as error:
            reject(BadLine(line.number, line.name, str(error), error.field), line.name)
        else:
            yield line.number, request
    source.check(survey)


def _substitute(number: int, names: Container[int]) -> str:
    """Return an id for a line that has none, which no other line has."""
    name = str(number)
    while digest(name) in names:
        name = f"line {name}"
    return name
