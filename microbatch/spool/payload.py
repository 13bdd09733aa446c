"""The content of a spooled request and of its answer, as bytes that are the same in every process.

A request is stored as `submit` takes it, but without headers, and of an output type only with its JSON Schema. Equal requests have
equal bytes: keys are sorted, except inside schemas, as models write properties in the order given there.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import msgspec

from microbatch.batching.request import check_messages, read_options
from microbatch.containment import contained
from microbatch.errors import MalformedAnswer, StorageError
from microbatch.messages import Reply, Request, Route, Usage
from microbatch.prompt.message_forms import copy_of, plainly
from microbatch.prompt.parameters import HARMLESS
from microbatch.schema.answer_type import answer_type
from microbatch.schema.decode import misfit_message
from microbatch.spool.records import Item

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from microbatch.batching.request import Options
    from microbatch.messages import Messages
    from microbatch.spool.records import Name

T = TypeVar("T")

DIGEST_BYTES: Final = 16

_encode_sorted = msgspec.json.Encoder(order="sorted").encode

_HOLD_SCHEMAS: Final = ("functions", "response_format", "tools")
_OF_REPLY: Final = ("text", "route", "batch_size", "model", "finish_reason", "request_id", "usage", "cost_usd", "body")


def _decoded(raw: bytes, kind: type[T], what: str) -> T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StorageError(f"a spooled {what} is damaged ({type(error).__name__})") from None


class Payload(msgspec.Struct, frozen=True, omit_defaults=True):
    """The content of a request; `params` are further request fields, with the schema of a typed answer in `response_format`."""

    messages: list[dict[str, Any]]
    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    params: dict[str, Any] = {}

    @classmethod
    def of(
        cls,
        messages: Messages,
        *,
        output_type: Any = str,
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Self:
        """Return the content of a request; the arguments are those of `submit`, and `ConfigError` is raised as there."""
        check_messages(messages)
        options = read_options(output_type, model, max_tokens, temperature, params, None, None, "low")
        fields: dict[str, Any] = plainly(dict(params or {}), "params")
        if output_type is not str:
            schema = {"name": "answer", "schema": options.answer.schema, "strict": True}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return cls(copy_of(messages), options.model, options.max_tokens, options.params.get("temperature"), fields)

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Return the payload encoded in *raw*; raise `StorageError` if it is damaged."""
        return _decoded(raw, cls, "request")

    def encode(self) -> bytes:
        """Return the bytes to store; equal requests have equal ones."""
        fields = {
            name: msgspec.Raw(msgspec.json.encode(value)) if name in _HOLD_SCHEMAS else value
            for name, value in self.params.items()
        }
        return _encode_sorted(msgspec.structs.replace(self, params=fields))

    @property
    def is_typed(self) -> bool:
        """True if the answer is JSON under a schema, rather than text."""
        asked = self.params.get("response_format")
        return isinstance(asked, dict) and asked.get("type") == "json_schema"

    def item(self, name: Name) -> Item:
        """Return the item to put into a spool under *name*."""
        raw = self.encode()
        return Item(name, blake2b(raw, digest_size=DIGEST_BYTES).digest(), raw)

    def request(self, name: Name) -> Request:
        """Return the request for `Microbatcher.map`; its id is the key of *name*."""
        return Request(
            self.messages,
            id=name.key,
            model=self.model,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            params=self.params or None,
            tenant=name.tenant,
            priority="low",
        )

    def options(self, tenant: str | None, harmless: Collection[str] = HARMLESS) -> Options:
        """Return the request's options, as of a low-priority submit of *tenant*; raise `ConfigError` if they are invalid.

        Parameters other than the *harmless* keep it alone.
        """
        params = self.params or None
        return read_options(str, self.model, self.max_tokens, self.temperature, params, None, tenant, "low", harmless)

    def __repr__(self) -> str:
        # Without content.
        return f"Payload(messages=<{len(self.messages)}>, model={self.model!r}, params={sorted(self.params)})"


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer to a spooled request; its encoded form is passed to `Spool.finish`.

    Attributes:
        is_json: Whether `text` is JSON.
        answered_at: Seconds since 1970.

    The other fields are those of `Reply`.
    """

    text: str
    answered_at: float
    is_json: bool = False
    route: Route = "batch"
    batch_size: int = 1
    model: str | None = None
    finish_reason: str | None = None
    request_id: str | None = None
    usage: Usage = Usage()
    cost_usd: float | None = None
    body: dict[str, Any] | None = None

    @classmethod
    def of(cls, reply: Reply[Any], answered_at: float, *, is_json: bool) -> Self:
        """Return the answer in *reply*, which should be settled."""
        return cls(answered_at=answered_at, is_json=is_json, **{name: getattr(reply, name) for name in _OF_REPLY})

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Return the answer encoded in *raw*; raise `StorageError` if it is damaged."""
        return _decoded(raw, cls, "answer")

    def encode(self) -> bytes:
        """Return the bytes to store."""
        return msgspec.json.encode(self)

    @property
    def value(self) -> Any:
        """The text, or the value of its JSON."""
        return msgspec.json.decode(self.text) if self.is_json else self.text

    def reply(self, output_type: Any = str) -> Reply[Any]:
        """Return the answer as `submit` would, decoded to *output_type*, which need not be that of the request.

        Raises:
            ConfigError: The type cannot be used.
            MalformedAnswer: The text does not fit it.
        """
        output: Any = self.text
        if output_type is not str:
            kind = answer_type(output_type)
            with contained() as decoding:
                output, _ = kind.decode(self.text)
            if decoding.error is not None:
                raise MalformedAnswer(misfit_message(decoding.error), raw=self.text) from decoding.error
        return Reply(output, **{name: getattr(self, name) for name in _OF_REPLY})

    def __repr__(self) -> str:
        # Without content.
        return f"Answer(route={self.route!r}, batch_size={self.batch_size}, usage={self.usage!r}, cost_usd={self.cost_usd})"
