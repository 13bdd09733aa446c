"""The question about a record of the input: made from a template, or the request that the record is."""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import msgspec

from microbatch.cli.console import UsageError
from microbatch.errors import ConfigError
from microbatch.messages import Request
from microbatch.spool.payload import DIGEST_BYTES, Payload
from microbatch.template import MissingField, Template, value_of

if TYPE_CHECKING:
    from collections.abc import Sequence

_ESCAPES: Final = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
_CHAT_URL: Final = "/v1/chat/completions"
_MAX_SHOWN: Final = 50
# These have a field of `Request`, or decide how an answer is delivered; the other fields of a body are passed on.
_NOT_PARAMS: Final = frozenset(
    {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "stream", "stream_options"}
)


class LineError(Exception):
    """A line of the input cannot be asked about, because of *field* or, if that is None, as a whole."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class Templated:
    r"""Makes requests from a template, as `Product: {name}`, and instructions that all records share.

    In the template, `{{` and `}}` are braces, and with *escapes* `\n`, `\t` and `\\` are a newline, a tab and a backslash. A name with
    dots reaches into nested objects, unless a field has exactly that name.

    Args:
        template: The template.
        system: The instructions, or None.
        labels: The only answers allowed, or None.
        schema: The `response_format` of the answers, or None.
        options: Further fields of `Request`.
        escapes: Whether a backslash in the template may begin an escape.

    Attributes:
        examples: Messages between the instructions and the question.
        fields: The fields that the template names.

    Raises:
        UsageError: The template is malformed or names no field.
    """

    def __init__(
        self,
        template: str,
        *,
        system: str | None = None,
        labels: Sequence[str] | None = None,
        schema: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        escapes: bool = True,
    ) -> None:
        self.template = template
        self.system = system
        self.examples: Sequence[dict[str, Any]] = ()
        self.labels = labels
        self.schema = schema
        text = re.sub(r"\\[nt\\]", lambda found: _ESCAPES[found[0]], template) if escapes else template
        try:
            self._template = Template(text)
        except ConfigError as error:
            raise UsageError(f"--template {error}") from None
        if "" in self._template.fields:
            raise UsageError(f"--template {text!r}: braces hold the name of a field, as in {{name}}")
        self.fields: tuple[str, ...] = self._template.fields
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._options: dict[str, Any] = dict(options or {})
        if labels is not None:
            self._options["output_type"] = Literal[tuple(labels)]
        if schema is not None:
            self._options["params"] = {**self._options.get("params", {}), "response_format": schema}

    def request(self, record: dict[str, Any], name: str) -> Request:
        """Return the request about *record*, whose id is *name*. Raise `LineError` if a field is missing."""
        question = {"role": "user", "content": self.render(record)}
        return Request([*self._system, *self.examples, question], id=name, **self._options)

    def is_empty(self, record: dict[str, Any]) -> bool:
        """Return whether all fields of *record* in the template are blank: white space, null, NaN, an empty list or object."""
        return all(_is_blank(value_of(record, name)) for name in self.fields)

    def render(self, record: dict[str, Any]) -> str:
        """Return the question about *record*, with values that are not strings as JSON. Raise `LineError` if a field is missing."""
        try:
            return self._template.render(record)
        except MissingField as error:
            raise LineError(str(error), error.name) from None


def _is_blank(value: Any) -> bool:
    return value is None or value in ([], {}) or value != value or (isinstance(value, str) and not value.strip())  # noqa: PLR0124 NaN


class BatchLines:
    """Makes requests from the lines of an OpenAI Batch file, and from bodies alone (`{"model", "messages"}`).

    Args:
        options: Fields of `Request` that a body may override.
        needs_model: Whether a body has to name its model.
        id_field: The field of a body alone that holds its id beside `custom_id` and `id`, or None.
    """

    fields: ClassVar[tuple[str, ...]] = ()
    examples: ClassVar[tuple[dict[str, Any], ...]] = ()
    template = system = labels = schema = None

    def __init__(
        self, *, options: dict[str, Any] | None = None, needs_model: bool = False, id_field: str | None = None
    ) -> None:
        self._options: dict[str, Any] = dict(options or {})
        self._needs_model = needs_model
        self._ids = {"custom_id", "id", id_field}

    def request(self, record: dict[str, Any], name: str) -> Request:
        """Return the request of *record*, whose id is *name*. Raise `LineError` if a field is missing or wrong."""
        alone = "body" not in record and "messages" in record
        if not alone:
            self._check_call(record)
        body = self._checked(record if alone else record.get("body"), "" if alone else "body.")
        options = dict(self._options)
        for field in ("model", "max_tokens", "max_completion_tokens", "temperature"):
            if body.get(field) is not None:
                options["max_tokens" if field == "max_completion_tokens" else field] = body[field]
        others = self._ids | _NOT_PARAMS if alone else _NOT_PARAMS
        params = {field: value for field, value in body.items() if field not in others}
        options["params"] = {**(options.get("params") or {}), **params} or None
        return Request(body["messages"], id=name, **options)

    def is_empty(self, _record: dict[str, Any]) -> bool:
        """Return False: what a body asks is not judged."""
        return False

    def _check_call(self, record: dict[str, Any]) -> None:
        if str(record.get("method", "POST")).upper() != "POST":
            raise LineError('the field "method" must be "POST"', "method")
        url = record.get("url", _CHAT_URL)
        if url != _CHAT_URL:
            raise LineError(f'the field "url" must be "{_CHAT_URL}", not {_shown(url)}', "url")

    def _checked(self, body: Any, place: str) -> dict[str, Any]:
        if not isinstance(body, dict):
            raise LineError(f'the field "body" {"is missing" if body is None else "must be a JSON object"}', "body")

        def wrong(field: str, problem: str) -> LineError:
            return LineError(f'the field "{place}{field}" {problem}', place + field)

        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise wrong("messages", "must be a list of chat messages")
        if self._needs_model and body.get("model") is None:
            raise wrong("model", "is missing, and no --model is given")
        if body.get("stream"):
            raise wrong("stream", "must be false: an output line holds a whole answer")
        return body


def _shown(value: Any) -> str:
    """Return *value* as JSON, of at most 50 characters."""
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


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
