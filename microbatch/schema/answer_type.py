"""The form of one answer: the schemas and instructions that ask for it, and its decoder; compiled once per type."""

from __future__ import annotations

import typing
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import msgspec

from microbatch.errors import ConfigError
from microbatch.schema.decode import candidates, decode_text, decoder, unwrapped
from microbatch.schema.envelope import batch_schema, single_schema
from microbatch.schema.expected import expected_tokens
from microbatch.schema.python_types import blaming, compile_type, type_name
from microbatch.schema.response_format import compile_given, given_schema
from microbatch.schema.traverse import Schema, canonical

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from microbatch.schema.decode import Decoder

    Kind = Literal["text", "typed", "given"]

_MAX_REMEMBERED = 256

_TEXT_WORDS = "Each answer is a JSON string holding the full reply to that request."
_TYPED_WORDS = "Each answer is JSON matching this JSON Schema: "
_HINT_WORDS = "Reply with JSON only, no prose and no code fence, matching this JSON Schema: "


class AnswerType:
    """The form of one answer, compiled once per output type. The schemas are shared and must not be changed.

    Attributes:
        key: Equal for types whose requests may share a prompt; b"" for plain text.
        schema: JSON Schema of one answer.
        strict: False for a given schema that came with `"strict": false`.
        words: One line of a combined prompt that describes an answer.
        hint: One line for a single call whose schema is not enforced; None for plain text.
        batch_schema: JSON Schema of a combined reply.
        watched_schema: The same with a canary among the answers.
        single_schema: JSON Schema of a single reply, an object at its root; None for plain text.
        wrapped: Whether `single_schema` holds the answer as the member "answer" of an object.
        is_text: Whether the answer is plain text.
        expected_tokens: Expected tokens of the longest answer by its schema; None if the schema does not bound it.
        decode: `Decoder` of an answer in a combined reply. An attribute, because it is called for every answer and a method costs more.
    """

    __slots__ = (
        "batch_schema",
        "decode",
        "expected_tokens",
        "hint",
        "is_text",
        "key",
        "schema",
        "single_schema",
        "strict",
        "watched_schema",
        "words",
        "wrapped",
    )

    def __init__(self, schema: Schema, decode: Decoder, kind: Kind, *, strict: bool = True) -> None:
        self.schema = schema
        self.strict = strict
        self.decode = decode
        self.is_text = kind == "text"
        self.expected_tokens = expected_tokens(schema)
        self.batch_schema = batch_schema(schema)
        self.watched_schema = batch_schema(schema, canary=True)
        if kind == "text":
            self.key, self.words, self.hint = b"", _TEXT_WORDS, None
            self.single_schema: Schema | None = None
            self.wrapped = False
        else:
            self.key = f"{kind}{'' if strict else ' loosely'}:".encode() + msgspec.json.encode(canonical(schema))
            self.words = _TYPED_WORDS + _compact(schema)
            self.single_schema, self.wrapped = single_schema(schema)
            self.hint = _HINT_WORDS + _compact(self.single_schema)

    def decode_single(self, text: str) -> tuple[Any, str]:
        """Decode the text of a single reply, skipping code fences and prose around the JSON.

        Returns:
            As from `decode`; the text of a wrapped answer is that of the answer alone.

        Raises:
            ValueError: The text is blank, or nothing in it fits. The message does not quote it.
            Exception: An error of a validator of the caller's type.
        """
        if self.is_text:
            if not text or text.isspace():
                raise ValueError("the answer is blank")
            return text, text
        problem: ValueError | None = None
        for raw in candidates(text):
            for form in unwrapped(raw) if self.wrapped else (raw,):
                try:
                    return self.decode(form)
                except ValueError as error:
                    # The first form is the one asked for, so its error is the most useful.
                    problem = error if problem is None else problem
        assert problem is not None  # noqa: S101 - the text itself is always tried
        raise problem

    def decode_again(self, text: str) -> tuple[Any, str]:
        """Decode the text of an accepted answer again, for another caller.

        Returns:
            As from `decode`.

        Raises:
            ValueError: It does not fit, because this type's validators require more than its schema. The message does not quote it.
            Exception: An error of a validator of the caller's type.
        """
        return (text, text) if self.is_text else self.decode(text)

    def __repr__(self) -> str:
        """Show the schema, which is code of the caller and no prompt."""
        return f"AnswerType({_compact(self.schema)})"


def answer_type(output_type: Any = str, response_format: Mapping[str, Any] | None = None) -> AnswerType:
    """Return the compiled form of an output type or of an OpenAI `response_format`.

    Args:
        output_type: `str`, anything msgspec decodes, or anything with pydantic in it.
        response_format: `{"type": "json_schema", "json_schema": {"schema": ...}}` or None. The answer is then the JSON text,
            checked against that schema.

    Raises:
        ConfigError: The type has no JSON form, *response_format* is malformed, or both are given.
    """
    if response_format is not None:
        if output_type is not str:
            raise ConfigError(
                f"give output_type or response_format, not both (output_type is {type_name(output_type)})"
            )
        return _from_response_format(response_format)
    if output_type is str:
        return _TEXT
    try:
        key = _identity(output_type)
        found = _types.get(key)
    except TypeError:
        return _from_type(output_type)  # unhashable metadata: nothing to remember it by
    return found if found is not None else _types.put(key, output_type, _from_type(output_type))


def _from_type(output_type: Any) -> AnswerType:
    with blaming(output_type):
        schema, read = compile_type(output_type)
        return AnswerType(schema, decoder(read, schema), "typed")


def _from_response_format(response_format: Any) -> AnswerType:
    key = encoded, strict = given_schema(response_format)
    found = _formats.get(key)
    if found is not None:
        return found
    schema, read = compile_given(encoded)
    return _formats.put(key, None, AnswerType(schema, decoder(read, schema), "given", strict=strict))


def _compact(schema: Schema) -> str:
    return msgspec.json.encode(schema).decode()


class _Memory:
    """The compiled types used last. Old ones are dropped, so that classes made at run time are not kept alive."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[Any, AnswerType]] = {}

    def get(self, key: Hashable) -> AnswerType | None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        self._entries[key] = entry  # now the youngest
        return entry[1]

    def put(self, key: Hashable, pinned: Any, compiled: AnswerType) -> AnswerType:
        """Keep *compiled*, and with it *pinned*: ids inside the key stay taken while their objects are held."""
        self._entries[key] = (pinned, compiled)
        while len(self._entries) > _MAX_REMEMBERED:
            self._entries.pop(next(iter(self._entries)), None)
        return compiled


_types = _Memory()
_formats = _Memory()


def _identity(output_type: Any) -> Hashable:
    """Return a key that is equal only for types with the same meaning.

    `==` will not do: `Literal["a", "b"]` equals `Literal["b", "a"]`, and the order of choices is part of the prompt. Identity
    will not do either: `list[int]` is a new object each time it is written.

    Raises:
        TypeError: Something in the type cannot be hashed (when the key is used).
    """
    if isinstance(output_type, type):
        return id(output_type)  # a metaclass may define `==`
    origin = get_origin(output_type)
    if origin is None:
        return typing.cast("Hashable", output_type)  # NewType, TypeVar and the like are their own keys
    if origin is Literal:
        return ("Literal", *((type(value), value) for value in get_args(output_type)))
    if origin is Annotated:
        return ("Annotated", _identity(output_type.__origin__), *((type(m), m) for m in output_type.__metadata__))
    return (id(origin), *map(_identity, get_args(output_type)))


_TEXT = AnswerType({"type": "string"}, decode_text, "text")
