"""The form of one answer: the schemas and instructions that ask for it, and its decoder; compiled once per type."""

from __future__ import annotations

import typing
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import msgspec

from microbatch.containment import contained
from microbatch.errors import ConfigError
from microbatch.lru import LRU
from microbatch.schema.asked_form import asked_form, asking_fields
from microbatch.schema.decode import candidates, decode_text, decoder, follows, unwrapped
from microbatch.schema.envelope import batch_schema, single_schema
from microbatch.schema.expected import expected_tokens
from microbatch.schema.optional import as_asked
from microbatch.schema.python_types import compile_type, is_type_like, type_name, unusable
from microbatch.schema.response_format import compile_given, given_schema
from microbatch.schema.strict_mode import for_strict_mode, refusal, without_closed_tuples
from microbatch.schema.traverse import Schema, canonical

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from microbatch.schema.asked_form import AskedForm, ForcedTool
    from microbatch.schema.decode import Decoder

    Kind = Literal["text", "typed", "given"]

_MAX_REMEMBERED = 256
_MAX_NAME = 100  # characters in messages; a Literal's name is as long as its choices

_TEXT_WORDS = "Each answer is a JSON string holding the full reply to that request."
_TYPED_WORDS = "Each answer is JSON matching this JSON Schema: "
_HINT_WORDS = "Reply with JSON only, no prose and no code fence, matching this JSON Schema: "


class AnswerType:
    """The form of one answer, compiled once per output type. The schemas are shared and must not be changed.

    Attributes:
        key: Equal for types whose requests may share a prompt; b"" for plain text, and for a form, whose request fields tell.
        schema: JSON Schema of one answer, in full.
        form: The form that the request's own fields ask for, or None. Its single calls keep these fields and have no schema.
        tool: That of the form, or None.
        strict: Whether the three schemas that are sent keep to strict mode: False for a given one that came with `"strict": false`, and
            for one with an essential part that strict mode does not take, such as a dict with any keys or a tuple.
        words: One line of a combined prompt that describes an answer, with the schema in full.
        hint: One line for a single call whose schema is not enforced; None for plain text.
        batch_schema: JSON Schema of a combined reply, as it is sent; `watched_schema` with a canary among the answers.
        single_schema: JSON Schema of a single reply, as it is sent, an object at its root; None for plain text and for a form.
        charged_schema: The schema for which a single call may be charged: `single_schema`, or the parameters of the tool; else None.
        wrapped: Whether `single_schema` holds the answer as the member "answer" of an object.
        expected_tokens: Expected tokens of the longest answer by its schema; None if the schema does not bound it.
        decode: `Decoder` of an answer in a combined reply. An attribute, because it is called for every answer and a method costs more.
    """

    def __init__(
        self, compiled: Schema, decode: Decoder, kind: Kind, *, strict: bool = True, form: AskedForm | None = None
    ) -> None:
        schema = as_asked(compiled) if kind == "typed" else compiled
        self.schema: Schema = schema
        self.form: AskedForm | None = form
        self.tool: ForcedTool | None = None if form is None else form.tool
        self.decode = decode
        self.is_text: bool = kind == "text"
        self.expected_tokens: int | None = expected_tokens(schema)
        sent = for_strict_mode(schema) if strict else schema
        self.strict: bool = strict and refusal(batch_schema(sent, canary=True)) is None
        if not self.strict:
            sent = without_closed_tuples(schema)
        self.batch_schema: Schema = batch_schema(sent)
        self.watched_schema: Schema = batch_schema(sent, canary=True)
        self.key: bytes
        self.words: str
        self.hint: str | None
        if kind == "text" or form is not None:
            self.key, self.hint = b"", None
            self.words = _TEXT_WORDS if form is None else form.words + _compact(schema)
            self.single_schema: Schema | None = None
            self.charged_schema: Schema | None = None if self.tool is None else schema
            self.wrapped: bool = False
        else:
            self.key = f"{kind}{'' if strict else ' loosely'}:".encode() + msgspec.json.encode(canonical(schema))
            self.words = _TYPED_WORDS + _compact(schema)
            whole, wrapped = single_schema(schema)
            self.hint = _HINT_WORDS + _compact(whole)
            self.single_schema, self.wrapped = single_schema(sent)
            self.charged_schema = self.single_schema
            self.wrapped |= wrapped

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

    def follows_schema(self, text: str) -> bool:
        """Return whether there is JSON in the text of a single reply that fits the schema, if not the caller's type."""
        return follows(text, self.single_schema)

    def decode_again(self, text: str) -> tuple[Any, str]:
        """Decode the text of an accepted answer again, for another caller.

        Returns:
            As from `decode`.

        Raises:
            ValueError: It does not fit, because this type's validators require more than its schema. The message does not quote it.
            Exception: An error of a validator of the caller's type.
        """
        # A single reply to a form is an answer whatever it holds; one in a combined reply was checked.
        return (text, text) if self.is_text or self.form is not None else self.decode(text)

    def again(self, output: Any, text: str) -> tuple[Any, str]:  # noqa: ARG002 see `VectorAnswer`
        """Return an accepted answer, *output* and its *text*, anew for another caller; see `decode_again`."""
        return self.decode_again(text)

    def stored(self, text: str, body: bytes | None) -> tuple[Any, str]:  # noqa: ARG002 likewise
        """Return the answer that a cache holds as *text* and *body*; see `decode_again`."""
        return self.decode_again(text)

    def __repr__(self) -> str:
        """Show the schema, which is code of the caller and no prompt."""
        return f"AnswerType({_compact(self.schema)})"


def answer_type(output_type: Any = str, response_format: Mapping[str, Any] | None = None) -> AnswerType:
    """Return the compiled form of an output type or of an OpenAI `response_format`.

    Args:
        output_type: `str`, anything msgspec decodes, or anything with pydantic in it.
        response_format: `{"type": "json_schema", ...}` or None. The answer is then the JSON text, checked against that schema.

    Raises:
        ConfigError: The type has no JSON form, *response_format* is malformed, or both are given.
    """
    if response_format is not None:
        if output_type is not str:
            raise ConfigError(
                f"give output_type or response_format, not both (output_type is {type_name(output_type)})"
            )
        encoded, strict = given_schema(response_format)
        return _formats.get_or_make((encoded, strict), lambda: _from_response_format(encoded, strict=strict))
    if output_type is str:
        return _TEXT
    try:
        # The type is kept, too: ids inside the key stay taken while their objects are held.
        return _types.get_or_make(_identity(output_type), lambda: (output_type, _from_type(output_type)))[1]
    except TypeError:
        return _from_type(output_type)  # unhashable metadata: nothing to remember it by


def asked_answer_type(fields: Mapping[str, Any]) -> AnswerType | None:
    """Return the compiled form of an answer that request *fields* ask for, see `AskedForm`; None if they ask for none."""
    asking = asking_fields(fields)
    return _forms.get_or_make(asking, lambda: _from_form(asked_form(asking))) if asking else None


def _from_form(form: AskedForm | None) -> AnswerType | None:
    if form is None:
        return None
    try:
        schema, read = compile_given(msgspec.json.encode(form.schema))
    except ConfigError:
        return None  # the endpoint judges it
    return AnswerType(schema, _unquoting(decoder(read, schema)), "given", strict=form.strict, form=form)


def _unquoting(decode: Decoder) -> Decoder:
    """Return *decode* for objects that may be in a string, as models write what they were told is text where nothing is enforced."""

    def decode_either(raw: str) -> tuple[Any, str]:
        try:
            return decode(raw)
        except ValueError:
            if not raw.lstrip().startswith('"'):
                raise
        return decode(decode_text(raw)[0])

    return decode_either


def _from_type(output_type: Any) -> AnswerType:
    if not is_type_like(output_type):
        raise ConfigError(f"output_type must be a type, not {type_name(output_type)}")
    with contained() as compiling:
        compiled, read = compile_type(output_type)
        return AnswerType(compiled, decoder(read, compiled, type_name(output_type)[:_MAX_NAME]), "typed")
    error = compiling.error
    raise unusable(output_type, error) from (None if isinstance(error, ConfigError) else error)


def _from_response_format(encoded: bytes, *, strict: bool) -> AnswerType:
    schema, read = compile_given(encoded)
    return AnswerType(schema, decoder(read, schema, "response_format"), "given", strict=strict)


def _compact(schema: Schema) -> str:
    return msgspec.json.encode(schema).decode()


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


# Old types are dropped, so that classes made at run time are not kept alive.
_types: LRU[Hashable, tuple[Any, AnswerType]] = LRU(_MAX_REMEMBERED)
_formats: LRU[tuple[bytes, bool], AnswerType] = LRU(_MAX_REMEMBERED)
_forms: LRU[bytes, AnswerType | None] = LRU(_MAX_REMEMBERED)

_TEXT = AnswerType({"type": "string"}, decode_text, "text")
