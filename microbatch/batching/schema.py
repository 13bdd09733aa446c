"""From an output type to the JSON Schema the model is held to, and from the model's JSON back to the type.

Schemas made from types keep to the strict subset that providers enforce: every object is closed and all its properties are
required. What such a schema allows, the type decodes.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import json
import re
import sys
import typing
from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import msgspec

from microbatch.batching.conform import WELL_FORMED, misfit, resolve
from microbatch.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    Schema = dict[str, Any]
    Reader = Callable[[str], Any]
    Kind = Literal["text", "typed", "given"]

_MAX_REMEMBERED = 256
_MAX_TRIES = 16

_TEXT_WORDS = "Each answer is a JSON string holding the full reply to that request."
_TYPED_WORDS = "Each answer is JSON matching this JSON Schema: "
_HINT_WORDS = "Reply with JSON only, no prose and no code fence, matching this JSON Schema: "

_SHARED = ("$defs", "definitions")
_HOISTED = ("#/$defs/", "#/definitions/")
# Keywords that hold schemas: by name, and alone or in a list. Anything else is data and is left alone.
_NAMED = frozenset({*_SHARED, "properties", "patternProperties", "dependentSchemas", "dependencies"})
_NESTED = frozenset(
    {
        *("items", "prefixItems", "additionalItems", "unevaluatedItems", "contains"),
        *("additionalProperties", "unevaluatedProperties", "propertyNames"),
        *("anyOf", "oneOf", "allOf", "not", "if", "then", "else"),
    }
)
# What the strict subset refuses and decoding does without, and what would only lengthen the prompt.
_DROPPED = frozenset({"default", "title", "discriminator", "uniqueItems"})
# Keywords that may stand beside a reference without changing what fits.
_SILENT = frozenset({"$ref", "$schema", "$id", "$comment", "title", "description", "default", "examples", *_SHARED})
_JSON_NAMES: dict[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
    list: "array",
    dict: "object",
}

_QUOTING = ("Invalid value", "Invalid enum value", "Object contains unknown field")
_PLACE = re.compile(r" - at `\$[^`]*`\Z")
# No `\s*` before the lazy part: the two would share the blanks in quadratically many ways.
_FENCE = re.compile(r"```(?:json)?(.*?)```", re.DOTALL | re.IGNORECASE)
_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
_BRACKET = re.compile(r"[{\[]")
_QUOTE = re.compile('"')
_scan = json.JSONDecoder().raw_decode
_any = msgspec.json.Decoder().decode


class AnswerType:
    """What one answer must be, compiled once per output type. The dicts are shared: read, never change.

    Attributes:
        key: Equal for types whose requests may share a prompt; b"" for plain text.
        schema: JSON Schema of one answer.
        words: One line for a combined prompt that says what an answer is.
        hint: One line for a single call whose schema is not enforced; None for plain text.
        batch_schema: JSON Schema of a combined reply.
        single_schema: JSON Schema of a single reply, an object at its root; None for plain text.
        wrapped: Whether `single_schema` holds the answer as the member "answer" of an object.
        is_text: Whether the answer is plain text.
    """

    __slots__ = ("_read", "batch_schema", "hint", "is_text", "key", "schema", "single_schema", "words", "wrapped")

    def __init__(self, schema: Schema, read: Reader, kind: Kind) -> None:
        self.schema = schema
        self._read = read
        self.is_text = kind == "text"
        self.batch_schema = _batch_schema(schema)
        if kind == "text":
            self.key, self.words, self.hint = b"", _TEXT_WORDS, None
            self.single_schema: Schema | None = None
            self.wrapped = False
        else:
            self.key = kind.encode() + b":" + msgspec.json.encode(_canonical(schema))
            self.words = _TYPED_WORDS + _compact(schema)
            self.single_schema, self.wrapped = _single_schema(schema)
            self.hint = _HINT_WORDS + _compact(self.single_schema)

    def decode(self, raw: str) -> tuple[Any, str]:
        """Decode one answer of a combined reply.

        Args:
            raw: The answer's JSON as the model wrote it.

        Returns:
            The output, and its text: the string itself for plain text, else *raw*.

        Raises:
            ValueError: *raw* is not JSON, does not fit the type, or is blank text. The message holds no word of *raw*.
            Exception: Whatever else a validator of the caller's type raises.
        """
        try:
            output = self._read(raw)
        except msgspec.MsgspecError as error:
            # Validators that raise inside msgspec are its cause, and the caller's own; msgspec's own words quote the answer.
            raise ValueError(_without_quotes(error)) from error.__cause__
        except RecursionError:
            raise ValueError("the JSON is nested too deeply") from None
        except UnicodeError:
            raise ValueError("the answer is not valid Unicode") from None  # its repr holds the whole answer
        if not self.is_text:
            return output, raw
        if not output or output.isspace():
            raise ValueError("the answer is blank")
        return output, output

    def decode_single(self, text: str) -> tuple[Any, str]:
        """Decode the whole text of a single reply, past code fences and prose around the JSON.

        Returns:
            As `decode`; the text of a wrapped answer is that of the answer alone.

        Raises:
            ValueError: The text is blank, or nothing in it fits. The message holds no word of it.
            Exception: Whatever else a validator of the caller's type raises.
        """
        if self.is_text:
            if not text or text.isspace():
                raise ValueError("the answer is blank")
            return text, text
        problem: ValueError | None = None
        for raw in _candidates(text):
            for form in _unwrapped(raw) if self.wrapped else (raw,):
                try:
                    return self.decode(form)
                except ValueError as error:
                    # The first form is the one asked for, so its fault says most.
                    problem = error if problem is None else problem
        assert problem is not None  # noqa: S101 - the text itself is always tried
        raise problem

    def __repr__(self) -> str:
        """Tell the schema, which is the caller's code and no prompt."""
        return f"AnswerType({_compact(self.schema)})"


def answer_type(output_type: Any = str, response_format: Mapping[str, Any] | None = None) -> AnswerType:
    """Return the compiled form of an output type or of an OpenAI `response_format`.

    Args:
        output_type: `str`, anything msgspec decodes, or anything with pydantic in it.
        response_format: `{"type": "json_schema", "json_schema": {"schema": ...}}` or None. The answer is then the JSON text,
            checked against that schema.

    Raises:
        ConfigError: The type has no JSON form, *response_format* is malformed, or both were given.
    """
    if response_format is not None:
        if output_type is not str:
            raise ConfigError(f"give output_type or response_format, not both (output_type is {_name(output_type)})")
        return _from_response_format(response_format)
    if output_type is str:
        return _TEXT
    try:
        key = _identity(output_type)
        found = _types.get(key)
    except TypeError:
        return _from_type(output_type)  # unhashable metadata: nothing to remember it by
    return found if found is not None else _types.put(key, output_type, _from_type(output_type))


class _Memory:
    """The last few compiled types. Old ones go, so classes made on the fly are not kept alive for ever."""

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
    """Return a key that is equal only for types that mean the same, written anew or not.

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


# --- from a type


def _from_type(output_type: Any) -> AnswerType:
    if not _is_type_like(output_type):
        raise ConfigError(f"output_type must be a type, not {_name(output_type)}")
    try:
        parts = list(_reached(output_type))
        # Who uses pydantic has imported it, so it is never imported here.
        if "pydantic" in sys.modules and any(map(_is_pydantic, parts)):
            schema, read = _with_pydantic(output_type)
            return AnswerType(_strict(schema, {}), read, "typed")
        schema, read = _with_msgspec(output_type)
        return AnswerType(_strict(schema, _orders(parts)), read, "typed")
    except (KeyboardInterrupt, SystemExit):
        raise
    except ConfigError as error:
        raise ConfigError(f"output_type {_name(output_type)} {error}") from None
    except BaseException as error:  # pydantic is Rust: its panics are no Exception
        # msgspec tells what is wrong in the last line; the ones before are about options that only it has.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[-1] if isinstance(error, TypeError) else lines[0]
        raise ConfigError(f"output_type {_name(output_type)} cannot be used: {reason}") from error


def _is_type_like(output_type: Any) -> bool:
    return (
        isinstance(output_type, type)
        or get_origin(output_type) is not None
        or type(output_type).__module__ in {"typing", "typing_extensions"}
    )


def _name(output_type: Any) -> str:
    """Name the type without the `repr` of an instance, which may hold anything."""
    if isinstance(output_type, type):
        return output_type.__qualname__
    return repr(output_type) if _is_type_like(output_type) else f"an instance of {type(output_type).__qualname__}"


def _with_msgspec(output_type: Any) -> tuple[Schema, Reader]:
    try:
        (schema,), shared = msgspec.json.schema_components((output_type,), ref_template="#/$defs/{name}")
    except KeyError as error:
        raise ConfigError(f"cannot be used: it holds two types that are both named {error}") from error
    return {**schema, "$defs": shared}, msgspec.json.Decoder(output_type).decode


def _with_pydantic(output_type: Any) -> tuple[Schema, Reader]:
    pydantic = sys.modules["pydantic"]
    adapter = pydantic.TypeAdapter(output_type)
    # Defaults are dropped, so one that is not JSON is nothing to warn of.
    ignored = {"ignored_warning_kinds": {"skipped-choice", "non-serializable-default"}}
    quiet = type("Quiet", (importlib.import_module("pydantic.json_schema").GenerateJsonSchema,), ignored)
    schema = adapter.json_schema(mode="validation", schema_generator=quiet)
    names: set[str] = {name for node in _nodes(schema) for name in node.get("properties", ())}

    def read(raw: str) -> Any:
        try:
            return adapter.validate_json(raw)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            # Places may be keys that the model made up, and messages may quote it; names from the schema and codes do not.
            path = "".join(
                f"[{at}]" if isinstance(at, int) else f".{at}" if at in names else "[...]" for at in first["loc"]
            )
            cause = first.get("ctx", {}).get("error")
            raise ValueError(f"${path}: {first['type']}") from cause if isinstance(cause, Exception) else None

    return schema, read


def _reached(output_type: Any) -> Iterator[Any]:
    """Yield the type and all that its arguments, metadata and fields are made of, each once."""
    seen: dict[int, Any] = {}  # holds the objects, so that no id is given out twice
    stack = [output_type]
    while stack:
        part = stack.pop()
        if id(part) in seen:
            continue
        seen[id(part)] = part
        yield part
        origin = get_origin(part)
        if origin is None:
            stack += [] if _is_pydantic(part) else _fields(part)
        elif origin is not Literal:
            stack += (origin, *get_args(part))


def _fields(part: Any) -> list[Any]:
    if isinstance(part, type):
        try:
            return list(typing.get_type_hints(part, include_extras=True).values())
        except Exception:  # noqa: BLE001 - an unresolvable name is reported by the library that needs it
            return []
    # NewType and the aliases of `type X = ...`
    return [getattr(part, name) for name in ("__supertype__", "__value__") if hasattr(part, name)]


def _is_pydantic(part: Any) -> bool:
    kind = part if isinstance(part, type) else type(part)
    home = str(kind.__module__).partition(".")[0]
    return home == "pydantic" or (
        kind is part and (hasattr(part, "__get_pydantic_core_schema__") or hasattr(part, "__pydantic_validator__"))
    )


Choice = tuple[type, Any]


def _orders(parts: list[Any]) -> dict[frozenset[Choice], list[Any]]:
    """Return the order in which choices were written; msgspec sorts them, and models lean towards the first."""
    orders: dict[frozenset[Choice], list[Any]] = {}
    for part in parts:
        if get_origin(part) is Literal:
            choices = list(get_args(part))
        elif isinstance(part, enum.EnumMeta):
            choices = list(part._value2member_map_)
        else:
            continue
        orders.setdefault(_choices(choices), choices)
    return orders


def _choices(values: list[Any]) -> frozenset[Choice]:
    try:
        return frozenset((type(value), value) for value in values)
    except TypeError:
        return frozenset()


# --- the strict subset


def _strict(schema: Schema, orders: dict[frozenset[Choice], list[Any]]) -> Schema:
    def cleaned(node: Schema) -> Schema:
        node = {("anyOf" if key == "oneOf" else key): value for key, value in node.items() if key not in _DROPPED}
        node = _mapped(node, cleaned)
        if len(node.get("allOf", ())) == 1:
            node = {**node.pop("allOf")[0], **node}  # how older pydantic puts words beside a reference
        if "enum" in node:
            choices: list[Any] = node["enum"]
            kinds = list(dict.fromkeys(_JSON_NAMES[type(value)] for value in choices))
            node["enum"] = orders.get(_choices(choices), choices)
            # The subset wants a type everywhere; msgspec leaves it to the choices.
            node.setdefault("type", kinds[0] if len(kinds) == 1 else kinds)
        if "properties" in node:
            node["required"] = list(node["properties"])
            node["additionalProperties"] = False
        return node

    body = cleaned(schema)
    defs: dict[str, Schema] = body.pop("$defs", {})

    def inlined(node: Schema, within: frozenset[str]) -> Schema:
        name = _definition(node)
        if name is not None and len(node) > 1:
            # The subset allows nothing beside a reference. Inside itself a type stays a reference and loses those words.
            if name in within:
                return {"$ref": node["$ref"]}
            beside = {key: value for key, value in node.items() if key != "$ref"}
            return inlined({**defs[name], **beside}, within | {name})
        return _mapped(node, lambda child: inlined(child, within))

    body = inlined(body, frozenset())
    defs = {name: inlined(node, frozenset({name})) for name, node in defs.items()}
    while (name := _definition(body)) is not None:
        body = dict(defs[name])
    _check_finite(body, defs)
    used = _used(body, defs)
    return {**body, "$defs": used} if used else body


def _definition(node: Schema) -> str | None:
    ref = node.get("$ref")
    return None if ref is None else str(ref).removeprefix("#/$defs/")


def _used(body: Schema, defs: dict[str, Schema]) -> dict[str, Schema]:
    used: set[str] = set()
    stack = [body]
    while stack:
        for node in _nodes(stack.pop()):
            if (name := _definition(node)) is not None and name not in used:
                used.add(name)
                stack.append(defs[name])
    return {name: node for name, node in defs.items() if name in used}


def _check_finite(body: Schema, defs: dict[str, Schema]) -> None:
    """Refuse a type whose answer can never end, now that what was optional in it is required.

    Raises:
        ConfigError: The type contains itself with no way out.
    """
    finite: set[str] = set()
    while grown := {name for name, node in defs.items() if name not in finite and _ends(node, finite)}:
        finite |= grown
    if not _ends(body, finite):
        raise ConfigError(
            "contains itself without end: the model fills in every field, so let the inner one be `| None`"
        )


def _ends(node: Schema, finite: set[str]) -> bool:
    name = _definition(node)
    first = node.get("prefixItems", [])[: node.get("minItems", 0)]
    rest = [node["items"]] if "items" in node and node.get("minItems", 0) > len(first) else []
    return (
        (name is None or name in finite)
        and ("anyOf" not in node or any(_ends(child, finite) for child in node["anyOf"]))
        and all(_ends(child, finite) for child in (*node.get("properties", {}).values(), *first, *rest))
    )


# --- from a schema that the caller gave


def _from_response_format(response_format: Any) -> AnswerType:
    given = _member(response_format, "response_format")
    if given.get("type") != "json_schema":
        raise ConfigError('response_format must have the type "json_schema" to become an answer schema')
    named = _member(given.get("json_schema"), "response_format.json_schema")
    if not isinstance(named.get("name", ""), str) or not isinstance(named.get("strict"), bool | None):
        raise ConfigError("response_format.json_schema: name must be a string and strict true or false")
    schema = dict(_member(named.get("schema"), "response_format.json_schema.schema"))
    try:
        encoded = msgspec.json.encode(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"response_format.json_schema.schema is not JSON: {error}") from error
    found = _formats.get(encoded)
    # Decoding makes a copy, since the caller may change its dicts later.
    return found if found is not None else _formats.put(encoded, None, _from_schema(_any(encoded), len(encoded)))


def _member(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a JSON object, got {type(value).__name__}")
    return value


def _from_schema(schema: Schema, size: int) -> AnswerType:
    reason = misfit(schema, WELL_FORMED, steps=_steps(size))
    if reason is not None:
        raise ConfigError(f"response_format.json_schema.schema is malformed at {reason}")
    for ref in _refs(schema):
        try:
            if ref == "#" or ref.startswith("#/"):
                resolve(ref, schema)
        except LookupError:
            raise ConfigError(f"response_format.json_schema.schema refers to {ref}, which is not in it") from None

    def read(raw: str) -> str:
        reason = misfit(_any(raw), schema, steps=_steps(len(raw)))
        if reason is not None:
            raise ValueError(reason)
        return raw

    return AnswerType(schema, read, "given")


def _steps(size: int) -> int:
    """Return the work allowed for *size* characters: linear, with room for a union or two at every value."""
    return 10_000 + 8 * size


# --- the schemas of whole replies


def _batch_schema(schema: Schema) -> Schema:
    body, shared = _embedded(schema)
    # The id comes first, so that an answer is written with its request named just before.
    element = _object({"id": {"type": "string"}, "answer": body})
    return {**_object({"results": {"type": "array", "items": element}}), **shared}


def _single_schema(schema: Schema) -> tuple[Schema, bool]:
    """Return the schema of a reply that holds one answer, and whether the answer is wrapped in it."""
    root = schema
    if "$ref" in schema and schema.keys() <= _SILENT:
        # Another document's schema stays a reference; `true` is no dict.
        with contextlib.suppress(LookupError, TypeError):
            root = {**resolve(schema["$ref"], schema), **{key: schema[key] for key in _SHARED if key in schema}}
    if root.get("type") == "object" and not root.keys() & {"$ref", "anyOf", "oneOf", "allOf"}:
        return root, False
    body, shared = _embedded(schema)
    return {**_object({"answer": body}), **shared}, True


def _object(properties: dict[str, Schema]) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _embedded(schema: Schema) -> tuple[Schema, Schema]:
    """Return *schema* as a part of a larger one, and the definitions that belong at the larger one's root."""
    shared = {key: schema[key] for key in _SHARED if key in schema}
    # An `$id` in the middle would make every reference below it relative to itself.
    body = {key: value for key, value in schema.items() if key not in {*_SHARED, "$schema", "$id"}}
    if not any(map(_points_inside, _refs(schema))):
        return body, shared
    # The root itself is referred to, so it needs a name of its own in its new place.
    home = "answer"
    while home in schema.get("$defs", {}):
        home += "_"

    def moved(node: Schema) -> Schema:
        node = _mapped(node, moved)
        if _points_inside(node.get("$ref")):
            node["$ref"] = f"#/$defs/{home}{node['$ref'][1:]}"
        return node

    shared = moved(shared)
    shared["$defs"] = {**shared.get("$defs", {}), home: moved(body)}
    return {"$ref": f"#/$defs/{home}"}, shared


def _points_inside(ref: Any) -> bool:
    return isinstance(ref, str) and (ref == "#" or (ref.startswith("#/") and not ref.startswith(_HOISTED)))


# --- walking schemas


def _mapped(node: Schema, change: Callable[[Schema], Schema]) -> Schema:
    """Return a copy of *node* with *change* made to each schema directly inside it."""

    def applied(value: Any) -> Any:
        if isinstance(value, dict):
            return change(value)
        return [applied(one) for one in value] if isinstance(value, list) else value

    def member(key: str, value: Any) -> Any:
        if key in _NAMED and isinstance(value, dict):
            return {name: applied(one) for name, one in value.items()}
        return applied(value) if key in _NESTED else value

    return {key: member(key, value) for key, value in node.items()}


def _nodes(schema: Schema) -> Iterator[Schema]:
    """Yield *schema* and every schema inside it."""
    stack = [schema]

    def noted(node: Schema) -> Schema:
        stack.append(node)
        return node

    while stack:
        node = stack.pop()
        yield node
        _mapped(node, noted)


def _refs(schema: Schema) -> list[str]:
    return [node["$ref"] for node in _nodes(schema) if isinstance(node.get("$ref"), str)]


def _canonical(schema: Schema) -> Schema:
    """Return *schema* with its keywords sorted. Properties stay: models write them in order, so order is meaning."""
    return dict(sorted(_mapped(schema, _canonical).items()))


def _compact(schema: Schema) -> str:
    return msgspec.json.encode(schema).decode()


# --- finding the JSON in a reply


class _Wrapper(msgspec.Struct):
    answer: msgspec.Raw


_wrapper = msgspec.json.Decoder(_Wrapper).decode


def _unwrapped(raw: str) -> Iterator[str]:
    """Yield the member "answer" of *raw*, if it has one, and *raw* itself."""
    with contextlib.suppress(ValueError, RecursionError):
        yield bytes(_wrapper(raw).answer).decode()
    yield raw


def _candidates(text: str) -> Iterator[str]:
    """Yield what may be the JSON: the whole text, each fenced block, each value that starts with a bracket."""
    text = _THOUGHT.sub("", text, count=1) if text.lstrip().startswith("<think>") else text
    text = text.strip().removeprefix("\ufeff")
    yield text
    for block in islice(_FENCE.finditer(text), _MAX_TRIES):
        yield block[1].strip()
    # A string in prose is an answer only where there is no object that it could be a part of; a bare number never is.
    opening = _BRACKET if _BRACKET.search(text) else _QUOTE
    at = 0
    for _ in range(_MAX_TRIES):  # each may read to the end of the text
        start = opening.search(text, at)
        if start is None:
            return
        try:
            _, at = _scan(text, start.start())
        except (ValueError, RecursionError):
            at = start.end()
        else:
            if at - start.start() < len(text):
                yield text[start.start() : at]


def _without_quotes(error: msgspec.MsgspecError) -> str:
    """Return what *error* says without what it quotes: answers are no matter for logs."""
    said = str(error)
    if error.__cause__ is not None:
        kind = "refused by a validator of the type"
    elif said.startswith(_QUOTING):
        kind = "a value or field that the type does not have"
    else:
        return said
    place = _PLACE.search(said)
    return kind + (place[0] if place is not None else "")


_TEXT = AnswerType({"type": "string"}, msgspec.json.Decoder(str).decode, "text")
