"""Input files: JSON Lines, checked as a whole at first and then turned into requests one line at a time."""

from __future__ import annotations

import re
import stat
from hashlib import blake2b
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import msgspec

from microbatch.cli.console import UsageError, note, plural
from microbatch.errors import ConfigError
from microbatch.messages import Request
from microbatch.spool.payload import DIGEST_BYTES, Payload

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Sequence

_BOM: Final = b"\xef\xbb\xbf"
_ESCAPES: Final = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
_CHAT_URL: Final = "/v1/chat/completions"
# These have a field of `Request`, or decide how an answer is delivered; the other fields of a body are passed on.
_NOT_PARAMS: Final = frozenset(
    {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "stream", "stream_options"}
)


class LineError(Exception):
    """A line of the input cannot be asked about, because of *field* or, if that is None, as a whole."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class InputChanged(Exception):
    """The input is not the file that was checked at the start."""


# --- requests


class Templated:
    r"""Makes requests from a template, as `Product: {name}`, and instructions that all lines share.

    In the template, `\n`, `\t` and `\\` are a newline, a tab and a backslash; `{{` and `}}` are braces. A name with dots reaches into
    nested objects, unless a field has exactly that name. *options* are further fields of `Request`. Raise `UsageError` if the
    template is malformed or names no field.
    """

    def __init__(
        self,
        template: str,
        *,
        system: str | None = None,
        labels: Sequence[str] | None = None,
        schema: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.system = system
        self.labels = labels
        self.schema = schema
        self._parts = _parts(template)
        self.fields: tuple[str, ...] = tuple(dict.fromkeys(name for _, name in self._parts if name is not None))
        if not self.fields:
            raise UsageError(
                f"--template {template!r} names no field: every line would be the same question; write {{name}}"
            )
        self._shared = [] if system is None else [{"role": "system", "content": system}]
        self._options: dict[str, Any] = dict(options or {})
        if labels is not None:
            self._options["output_type"] = Literal[tuple(labels)]
        if schema is not None:
            self._options["params"] = {**self._options.get("params", {}), "response_format": schema}

    def request(self, record: dict[str, Any], name: str) -> Request:
        """Return the request about *record*, whose id is *name*. Raise `LineError` if a field is missing."""
        question = {"role": "user", "content": self.render(record)}
        return Request([*self._shared, question], id=name, **self._options)

    def render(self, record: dict[str, Any]) -> str:
        """Return the question about *record*, with values that are not strings as JSON. Raise `LineError` if a field is missing."""
        texts = []
        for literal, name in self._parts:
            texts.append(literal)
            if name is not None:
                value = _value(record, name)
                if value is msgspec.UNSET:
                    raise LineError(f'the field "{name}" is missing', name)
                texts.append(value if isinstance(value, str) else msgspec.json.encode(value).decode())
        return "".join(texts)


def _parts(template: str) -> list[tuple[str, str | None]]:
    """Return the texts of *template*, each with the field that follows it."""
    try:
        parsed = list(Formatter().parse(re.sub(r"\\[nt\\]", lambda found: _ESCAPES[found[0]], template)))
    except ValueError as error:
        raise UsageError(f"--template {template!r}: {error}; a brace itself is written {{{{ or }}}}") from None
    for _, name, form, conversion in parsed:
        if name is not None and (not name.strip() or form or conversion):
            raise UsageError(
                f"--template {template!r}: braces hold the name of a field and nothing else, as in {{name}}"
            )
    return [(literal, name) for literal, name, _, _ in parsed]


def _value(record: dict[str, Any], name: str) -> Any:
    """Return a field of *record*; UNSET if there is none."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        value = value.get(part, msgspec.UNSET) if isinstance(value, dict) else msgspec.UNSET
    return value


class BatchLines:
    """Makes requests from the lines of an OpenAI Batch file; *options* are fields of `Request` that a body may override."""

    fields: ClassVar[tuple[str, ...]] = ("body",)
    system = labels = schema = None

    def __init__(self, *, options: dict[str, Any] | None = None, needs_model: bool = False) -> None:
        self._options: dict[str, Any] = dict(options or {})
        self._needs_model = needs_model

    def request(self, record: dict[str, Any], name: str) -> Request:
        """Return the request of *record*, whose id is *name*. Raise `LineError` if a field is missing or wrong."""
        if str(record.get("method", "POST")).upper() != "POST":
            raise LineError('the field "method" must be "POST"', "method")
        if record.get("url", _CHAT_URL) != _CHAT_URL:
            raise LineError(f'the field "url" must be "{_CHAT_URL}"', "url")
        body = self._checked(record.get("body"))
        options = dict(self._options)
        for field in ("model", "max_tokens", "max_completion_tokens", "temperature"):
            if body.get(field) is not None:
                options["max_tokens" if field == "max_completion_tokens" else field] = body[field]
        params = {field: value for field, value in body.items() if field not in _NOT_PARAMS}
        options["params"] = {**(options.get("params") or {}), **params} or None
        return Request(body["messages"], id=name, **options)

    def _checked(self, body: Any) -> dict[str, Any]:
        if not isinstance(body, dict):
            raise LineError(f'the field "body" {"is missing" if body is None else "must be a JSON object"}', "body")
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise LineError('the field "body.messages" must be a list of chat messages', "body.messages")
        if self._needs_model and body.get("model") is None:
            raise LineError('the field "body.model" is missing, and no --model is given', "body.model")
        if body.get("stream"):
            raise LineError('the field "body.stream" must be false: an output line holds a whole answer', "body.stream")
        return body


Questions = Templated | BatchLines


def payload_of(request: Request, model: str | None) -> Payload:
    """Return the spool payload of *request*, for *model* if it names none. Raise `ConfigError` if an option is wrong."""
    return Payload.of(
        request.messages,
        output_type=request.output_type,
        model=request.model or model,
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        params=request.params,
    )


def question_digest(request: Request, model: str | None) -> str | None:
    """Return 32 hexadecimal digits that stand for all that decides the answer; None if an option of *request* is wrong."""
    try:
        return blake2b(payload_of(request, model).encode(), digest_size=DIGEST_BYTES).hexdigest()
    except (ConfigError, ValueError):
        return None


# --- the file


def id_digest(name: str) -> int:
    """Return 128 bits that stand for the id *name* in memory."""
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest())


class BadLine(msgspec.Struct):
    """A line that cannot be asked about, by its number (from 1) and its id, None if it has none.

    The problem is told in the same words for all lines of the kind; the detail is about this one.
    """

    number: int
    name: str | None
    problem: str
    field: str | None = None
    detail: str = ""

    def error(self, path: str) -> dict[str, Any]:
        """Return the error of the output line for this line of the file *path*."""
        message = f"{path}, line {self.number}: {self.problem}" + (f" ({self.detail})" if self.detail else "")
        return {"type": "InputError", "message": message, "line": self.number, "field": self.field}


class Input:
    """A JSON Lines file, which is read and checked as a whole at first, and again while its requests are taken.

    Args:
        path: The file.
        questions: Makes requests from its lines.
        id_field: The field that holds a line's id; None takes `custom_id`, else `id`, else the line number.

    Attributes:
        items: Number of lines that are not blank.

    Raises:
        UsageError: The file cannot be read twice, an id occurs twice, or no line has one of the fields asked about.
    """

    def __init__(self, path: str, questions: Questions, *, id_field: str | None = None) -> None:
        self.path = path
        self.questions = questions
        self.items: int = 0
        self._id_field = id_field
        try:
            mode = Path(path).stat().st_mode
            Path(path).open("rb").close()
        except OSError as error:
            raise UsageError(f"cannot read {path!r}: {error.strerror}") from None
        if not stat.S_ISREG(mode):
            raise UsageError(f"{path!r} must be a file: it is read twice, first to check the ids and then to ask")
        self._version = self._stat()
        self._last = 0  # number of the last line that was checked
        self._names: set[int] = set()  # digests of the ids
        self._size = 0
        self._ends_with_newline = True
        self._content = self._survey()

    def __contains__(self, item: object) -> bool:
        """Return whether *item*, the digest of an id, is that of a line."""
        return item in self._names

    def _survey(self) -> bytes:
        """Check all lines and return the digest of the file."""
        missing = set(self.questions.fields)
        first: tuple[int, dict[str, Any]] | None = None
        content = blake2b(digest_size=16)
        for number, raw in self._raw_lines():
            content.update(raw)
            self._size += len(raw)
            self._ends_with_newline = raw.endswith(b"\n")
            line = self._parse(number, raw)
            if line is None:
                continue
            self.items += 1
            self._last = number
            if isinstance(line, tuple):
                name, record = line
                first = first or (number, record)
                self._add_id(name, number)
                missing -= {field for field in missing if _value(record, field) is not msgspec.UNSET}
        if first is None and self.items:
            note(f"{self.path}: no line is a JSON object with an id; the input must be JSON Lines, one object per line")
        if first is not None and missing:
            field = next(field for field in self.questions.fields if field in missing)
            raise UsageError(self._no_such_field(field, *first))
        return content.digest()

    def _add_id(self, name: str, number: int) -> None:
        if id_digest(name) in self._names:
            lines = ((earlier, self._parse(earlier, raw)) for earlier, raw in self._raw_lines())
            first = next(earlier for earlier, line in lines if isinstance(line, tuple) and line[0] == name)
            raise UsageError(
                f"{self.path}: lines {first} and {number} have the same id {name!r}; "
                "ids must differ, or answers could not be told apart"
            )
        self._names.add(id_digest(name))

    def _no_such_field(self, field: str, number: int, record: dict[str, Any]) -> str:
        fields = ", ".join(record) or "none"
        if field == "body":
            return (
                f'{self.path}: no line has a "body" (line {number} has the fields {fields}). '
                "For lines that are not OpenAI Batch requests give --template, as in --template 'Product: {name}'"
            )
        return f'{self.path}: no line has the field "{field}" of --template; line {number} has {fields}'

    def requests(self, skip: Container[int] = ()) -> Iterator[tuple[int, Request] | BadLine]:
        """Yield what `rows` does, and `check` before and after that the file has not changed."""
        self.check(appended=True)
        yield from self.rows(skip)
        self.check()

    def rows(self, skip: Container[int] = ()) -> Iterator[tuple[int, Request] | BadLine]:
        """Yield the number and the request of every line that was checked, or what is wrong with it; *skip* has digests of ids."""
        for number, raw in self._raw_lines():
            if number > self._last:
                return
            line = self._parse(number, raw)
            if isinstance(line, BadLine):
                yield line
            elif line is not None and id_digest(line[0]) not in skip:
                name, record = line
                try:
                    yield number, self.questions.request(record, name)
                except LineError as error:
                    yield BadLine(number, name, str(error), error.field)

    def check(self, *, appended: bool = False) -> None:
        """Raise `InputChanged` if the content is not that of the start; with *appended* further lines are accepted."""
        content, items, read = blake2b(digest_size=16), 0, 0
        try:
            version = self._stat()
            if version == self._version:
                return
            for _, raw in self._raw_lines():
                content.update(raw[: max(0, self._size - read)])
                items, read = items + (not raw.isspace()), read + len(raw)
        except FileNotFoundError:
            raise InputChanged(f"{self.path!r} was deleted while it was asked about") from None
        if content.digest() != self._content or (read > self._size and not self._ends_with_newline):
            was = "" if items == self.items else f": it has {plural(items, 'line')} now, and had {self.items:,}"
            raise InputChanged(f"{self.path!r} was changed while it was asked about{was}")
        if read == self._size:
            self._version = version
        elif not appended:
            raise InputChanged(
                f"{self.path!r} has grown while it was asked about: lines after {self._last:,} were not asked"
            )

    def id_for(self, line: BadLine) -> str:
        """Return the id under which *line* is reported: its own, else one that no other line has."""
        if line.name is not None:
            return line.name
        name = str(line.number)
        while id_digest(name) in self._names:
            name = f"line {name}"
        return name

    def _stat(self) -> tuple[int, ...]:
        """Return a value that changes when the file is replaced or written to."""
        found = Path(self.path).stat()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def _raw_lines(self) -> Iterator[tuple[int, bytes]]:
        with Path(self.path).open("rb") as file:
            yield from enumerate(file, start=1)

    def _parse(self, number: int, raw: bytes) -> tuple[str, dict[str, Any]] | BadLine | None:
        """Return the id and the object of a line; None if it is blank."""
        text = raw.removeprefix(_BOM) if number == 1 else raw
        if not text or text.isspace():
            return None
        try:
            record = msgspec.json.decode(text.decode(), type=dict[str, Any])
            return self._name(record, number), record
        except LineError as error:
            return BadLine(number, None, str(error), error.field)
        except UnicodeDecodeError:
            return BadLine(number, None, "it is not UTF-8")
        except RecursionError:
            return BadLine(number, None, "the JSON is nested too deeply")
        except msgspec.ValidationError:
            return BadLine(number, None, "it is not a JSON object")
        except ValueError as error:
            return BadLine(number, None, "it is not JSON", detail=str(error))

    def _name(self, record: dict[str, Any], number: int) -> str:
        field = self._id_field or next((field for field in ("custom_id", "id") if field in record), None)
        if field is None:
            return str(number)
        if field not in record:
            raise LineError(f'the field "{field}" (--id-field) is missing', field)
        name = record[field]
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            raise LineError(
                f'the field "{field}" must be a non-empty string or a whole number, to serve as an id', field
            )
        return str(name)
