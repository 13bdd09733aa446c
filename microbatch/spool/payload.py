"""What a spool keeps of a request and of its answer: bytes that say the same in every process.

A request is kept as `submit` takes it, but for what is a caller's own: no headers, and of an output type its JSON Schema, which is
all that a worker has to know of it. Equal requests have equal bytes: keys are sorted, except inside schemas, where the order of
properties is meaning, because models write them in order.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec

from microbatch.batching.request import check_messages, copy_of, read_options
from microbatch.errors import ConfigError, MalformedAnswer, StorageError
from microbatch.messages import Reply, Request, Route, Usage
from microbatch.schema.answer_type import answer_type
from microbatch.spool.records import Item

if TYPE_CHECKING:
    from collections.abc import Mapping

    from microbatch.batching.request import Options
    from microbatch.messages import Messages
    from microbatch.spool.records import Name

DIGEST_BYTES: Final = 16

_encode_sorted = msgspec.json.Encoder(order="sorted").encode

# Request fields with schemas inside.
_ORDER_IS_MEANING: Final = ("functions", "response_format", "tools")


class Payload(msgspec.Struct, frozen=True, omit_defaults=True):
    """A request without its caller.

    Attributes:
        messages: The chat messages.
        model: The model to ask; None for that of the worker's transport.
        max_tokens: Most tokens of the answer, or None.
        temperature: As given, or None.
        params: Further request fields. The schema of a typed answer is in `response_format`.
    """

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
        """Return what to keep of a request; the arguments are those of `submit`.

        Raises:
            ConfigError: `submit` would raise it for these arguments.
        """
        check_messages(messages)
        options = read_options(output_type, model, max_tokens, temperature, params, None, None, "low")
        fields = dict(params or {})
        if output_type is not str:
            schema = {"name": "answer", "schema": options.answer.schema, "strict": options.answer.strict}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return cls(copy_of(messages), model, max_tokens, temperature, fields)

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Return what `encode` was told.

        Raises:
            StorageError: The bytes are damaged.
        """
        try:
            return msgspec.json.decode(raw, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise StorageError(f"a spooled request is damaged ({type(error).__name__})") from None

    def encode(self) -> bytes:
        """Return the bytes to keep; equal requests have equal ones."""
        kept = {
            name: msgspec.Raw(msgspec.json.encode(value)) if name in _ORDER_IS_MEANING else value
            for name, value in self.params.items()
        }
        return _encode_sorted(msgspec.structs.replace(self, params=kept))

    @property
    def is_typed(self) -> bool:
        """Whether its answer is JSON that a schema asks for, and no plain text."""
        asked = self.params.get("response_format")
        return isinstance(asked, dict) and asked.get("type") == "json_schema"

    def item(self, name: Name) -> Item:
        """Return this request, under *name*, as a spool takes it."""
        raw = self.encode()
        return Item(name, blake2b(raw, digest_size=DIGEST_BYTES).digest(), raw)

    def request(self, name: Name) -> Request:
        """Return this request, spooled under *name*, as `Microbatcher.map` takes it; its id is the name's key."""
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

    def options(self, tenant: str | None) -> Options:
        """Return this request's options, read as those of a low-priority submit of *tenant*.

        Raises:
            ConfigError: They were written by somebody else.
        """
        params = self.params or None
        return read_options(str, self.model, self.max_tokens, self.temperature, params, None, tenant, "low")

    def __repr__(self) -> str:
        """Tell the shape, never the words."""
        return f"Payload(messages=<{len(self.messages)}>, model={self.model!r}, params={sorted(self.params)})"


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer to a spooled request. Encoded it is what `finish` stores.

    Attributes:
        text: What `Reply.text` is: the text itself, or its JSON.
        is_json: Which of the two.
        answered_at: When the answer came, in seconds since 1970.
        route: How it came.
        batch_size: Requests in the call that answered.
        model: The model that answered, or None.
        finish_reason: Why the model stopped, or None.
        request_id: The endpoint's id of the call, or None.
        usage: This request's share of the tokens.
        cost_usd: The price of that in US dollars; None if no price is known.
        body: The endpoint's JSON of a single call, or None.
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
        """Return what to keep of *reply*, which should be settled."""
        return cls(
            text=reply.text,
            answered_at=answered_at,
            is_json=is_json,
            route=reply.route,
            batch_size=reply.batch_size,
            model=reply.model,
            finish_reason=reply.finish_reason,
            request_id=reply.request_id,
            usage=reply.usage,
            cost_usd=reply.cost_usd,
            body=reply.body,
        )

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Return what `encode` was told.

        Raises:
            StorageError: The bytes are damaged.
        """
        try:
            return msgspec.json.decode(raw, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise StorageError(f"a spooled answer is damaged ({type(error).__name__})") from None

    def encode(self) -> bytes:
        """Return the bytes to keep."""
        return msgspec.json.encode(self)

    @property
    def value(self) -> Any:
        """The text, or what its JSON says."""
        return msgspec.json.decode(self.text) if self.is_json else self.text

    def reply(self, output_type: Any = str) -> Reply[Any]:
        """Return the answer as `submit` would.

        Args:
            output_type: What the text is decoded to; str leaves it as it is. The type that the request was spooled with, or
                another one that its JSON fits.

        Raises:
            ConfigError: The type cannot be used.
            MalformedAnswer: The text does not fit it.
        """
        output: Any = self.text
        if output_type is not str:
            try:
                output, _ = answer_type(output_type).decode(self.text)
            except (KeyboardInterrupt, SystemExit, ConfigError):
                raise
            except BaseException as reason:  # a user's validator may raise anything; a Rust panic is no Exception
                raise MalformedAnswer("the spooled answer does not fit output_type", raw=self.text) from reason
        return Reply(
            output,
            self.text,
            self.route,
            self.usage,
            cost_usd=self.cost_usd,
            batch_size=self.batch_size,
            model=self.model,
            finish_reason=self.finish_reason,
            request_id=self.request_id,
            body=self.body,
        )

    def __repr__(self) -> str:
        """Tell how it came, never its words."""
        return f"Answer(route={self.route!r}, batch_size={self.batch_size}, usage={self.usage!r}, cost_usd={self.cost_usd})"
