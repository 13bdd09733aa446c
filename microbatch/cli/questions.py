"""What is asked about each line of the input: the messages, the shape of the answer, the other options."""

from __future__ import annotations

import re
from hashlib import blake2b
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from microbatch.cli.console import UsageError
from microbatch.errors import ConfigError
from microbatch.messages import Request
from microbatch.spool.payload import DIGEST_BYTES, Payload

if TYPE_CHECKING:
    from collections.abc import Sequence

_ESCAPE = re.compile(r"\\([nt\\])")
_ESCAPED = {"n": "\n", "t": "\t", "\\": "\\"}
_CHAT_URL = "/v1/chat/completions"
# How an answer is delivered is ours to decide; the rest of a body is the caller's.
_NOT_PARAMS = frozenset(
    {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "stream", "stream_options"}
)


class LineError(Exception):
    """A line of the input cannot be asked about; the others can.

    Attributes:
        field: The field to blame, or None if the line as a whole is.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class Template:
    r"""The text of a question with the names of fields in it, as in `Product: {name}`.

    `\n`, `\t` and `\\` are a newline, a tab and a backslash; `{{` and `}}` are braces. A name with dots reaches into nested
    objects, unless a field has just that name.

    Raises:
        UsageError: The template is malformed or names no field.
    """

    def __init__(self, text: str) -> None:
        unescaped = _ESCAPE.sub(lambda found: _ESCAPED[found[1]], text)
        self._parts: list[tuple[str, str | None]] = []
        try:
            parsed = list(Formatter().parse(unescaped))
        except ValueError as error:
            raise UsageError(f"--template {text!r}: {error}; a brace itself is written {{{{ or }}}}") from None
        for literal, name, form, conversion in parsed:
            if name is not None and (not name.strip() or form or conversion):
                raise UsageError(
                    f"--template {text!r}: braces hold the name of a field and nothing else, as in {{name}}"
                )
            self._parts.append((literal, name))
        self.fields = tuple(dict.fromkeys(name for _, name in self._parts if name is not None))
        if not self.fields:
            raise UsageError(
                f"--template {text!r} names no field: every line would be the same question; write {{name}}"
            )

    def render(self, record: dict[str, Any]) -> str:
        """Return the question about *record*. What is no text is written as JSON.

        Raises:
            LineError: A field is missing.
        """
        return "".join(literal if name is None else literal + _text(record, name) for literal, name in self._parts)


def has_field(record: dict[str, Any], name: str) -> bool:
    """Tell whether a template finds the field *name* in *record*."""
    try:
        _value(record, name)
    except LookupError:
        return False
    return True


def _text(record: dict[str, Any], name: str) -> str:
    try:
        value = _value(record, name)
    except LookupError:
        raise LineError(f'the field "{name}" is missing', name) from None
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _value(record: dict[str, Any], name: str) -> Any:
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        value = (value if isinstance(value, dict) else {})[part]
    return value


class Templated:
    """Asks the same about every line: a template, below instructions that all lines share.

    Args:
        template: The question.
        system: The instructions, or None.
        labels: The only answers allowed, or None.
        schema: A `response_format` that the answer keeps to, or None.
        options: Further fields of `Request`.
    """

    def __init__(
        self,
        template: Template,
        *,
        system: str | None = None,
        labels: Sequence[str] | None = None,
        schema: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self._template = template
        self._shared = [] if system is None else [{"role": "system", "content": system}]
        self._options: dict[str, Any] = dict(options or {})
        if labels is not None:
            self._options["output_type"] = Literal[tuple(labels)]
        self._parses = schema is not None
        if schema is not None:
            self._options["params"] = {"response_format": schema}
        self.fields = template.fields

    def request(self, record: dict[str, Any], name: str) -> Request:
        """Return what is asked about *record*, whose id is *name*.

        Raises:
            LineError: A field is missing.
        """
        question = {"role": "user", "content": self._template.render(record)}
        return Request([*self._shared, question], id=name, **self._options)

    def output(self, answer: Any) -> Any:
        """Return an answer as it stands in the output."""
        return msgspec.json.decode(answer) if self._parses else answer


class BatchLines:
    """Asks what each line says: the lines of an OpenAI Batch file, with `custom_id` and `body`.

    Args:
        options: Fields of `Request` for lines whose body does not set them.
        needs_model: Whether nothing but a line's body names a model.
    """

    fields = ("body",)

    def __init__(self, *, options: dict[str, Any] | None = None, needs_model: bool = False) -> None:
        self._options: dict[str, Any] = dict(options or {})
        self._needs_model = needs_model

    def request(self, record: dict[str, Any], name: str) -> Request:
        """Return what *record*, whose id is *name*, asks.

        Raises:
            LineError: A field is missing or wrong.
        """
        if str(record.get("method", "POST")).upper() != "POST":
            raise LineError('the field "method" must be "POST"', "method")
        if record.get("url", _CHAT_URL) != _CHAT_URL:
            raise LineError(f'the field "url" must be "{_CHAT_URL}"', "url")
        body = _body(record)
        _check_body(body, needs_model=self._needs_model)
        options = dict(self._options)
        for field in ("model", "max_tokens", "temperature"):
            if body.get(field) is not None:
                options[field] = body[field]
        if body.get("max_completion_tokens") is not None:
            options["max_tokens"] = body["max_completion_tokens"]
        params = {field: value for field, value in body.items() if field not in _NOT_PARAMS}
        return Request(body["messages"], id=name, params=params or None, **options)

    @staticmethod
    def output(answer: Any) -> Any:
        """Return an answer as it stands in the output: the text that the endpoint would have sent."""
        return answer


def _body(record: dict[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] | None = record.get("body")
    if not isinstance(body, dict):
        raise LineError(f'the field "body" {"is missing" if body is None else "must be a JSON object"}', "body")
    return body


def _check_body(body: dict[str, Any], *, needs_model: bool) -> None:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise LineError('the field "body.messages" must be a list of chat messages', "body.messages")
    if needs_model and body.get("model") is None:
        raise LineError('the field "body.model" is missing, and no --model is given', "body.model")
    if body.get("stream"):
        raise LineError('the field "body.stream" must be false: an output line holds a whole answer', "body.stream")


Questions = Templated | BatchLines


def payload_of(request: Request, model: str | None) -> Payload:
    """Return what is kept of *request*, which goes to *model* if it names none.

    Raises:
        ConfigError: It cannot be asked.
    """
    return Payload.of(
        request.messages,
        output_type=request.output_type,
        model=request.model or model,
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        params=request.params,
    )


def question_digest(request: Request, model: str | None) -> str | None:
    """Return what is equal for equal questions: a digest of all that decides the answer, the id left out.

    Args:
        request: The question.
        model: The model to ask if the request names none.

    Returns:
        32 hexadecimal digits; None if the question cannot be asked.
    """
    try:
        return blake2b(payload_of(request, model).encode(), digest_size=DIGEST_BYTES).hexdigest()
    except (ConfigError, ValueError):
        return None


# --- what the flags say


def read_text(value: str, name: str) -> str:
    """Return the text of a flag: *value* itself, or the content of the file that `@FILE` names; `@@` begins with an @.

    Raises:
        UsageError: The file cannot be read.
    """
    if not value.startswith("@"):
        return value
    if value.startswith("@@"):
        return value[1:]
    try:
        return Path(value[1:]).read_text(encoding="utf-8-sig").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        hint = f" (a text that begins with @ is written {name} '@@...')"
        raise UsageError(f"{name}: cannot read {value[1:]!r}: {reason}{hint}") from None


def read_labels(value: str) -> list[str]:
    """Return the labels of `--labels a,b,c` or `--labels @FILE` (one a line, or a JSON list).

    Raises:
        UsageError: There are none, or one comes twice.
    """
    text = read_text(value, "--labels")
    listed = _json_labels(text) if value.startswith("@") else None
    if listed is None:
        listed = text.splitlines() if value.startswith("@") else text.split(",")
    labels = [label.strip() for label in listed]
    if value.startswith("@"):
        labels = [label for label in labels if label]
    if not all(labels) or not labels:
        raise UsageError(f"--labels {value!r}: a label is empty; write --labels electronics,clothing,other")
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"--labels: {label!r} comes twice")
    return labels


def _json_labels(text: str) -> list[str] | None:
    try:
        return msgspec.json.decode(text.encode(), type=list[str])
    except (msgspec.MsgspecError, ValueError):
        return None


def read_schema(path: str) -> dict[str, Any]:
    """Return the `response_format` that the file of `--schema` asks for: a bare JSON Schema, or a whole response_format.

    Raises:
        UsageError: The file cannot be read or holds neither.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"--schema: cannot read {path!r}: {error.strerror}") from None
    try:
        value = msgspec.json.decode(text, type=dict[str, Any])
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--schema: {path!r} must hold a JSON Schema, an object: {error}") from None
    if value.get("type") == "json_schema":
        return value
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": value}}
