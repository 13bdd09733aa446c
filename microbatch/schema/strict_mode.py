"""OpenAI's strict mode: what it takes of JSON Schema, and a schema written so that it does.

Source: the guide to structured outputs, "Supported schemas" and "Objects have limitations on nesting depth and size"; the words of
refusals are those that users have reported. Endpoints that follow OpenAI take no less.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.schema.traverse import SHARED, Schema, mapped
from microbatch.schema.validate import TYPES, WELL_FORMED, misfit, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

    Place = tuple[str, ...]

FORMATS: Final = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"},
)
KEYWORDS: Final = frozenset(
    {
        *("type", "properties", "required", "additionalProperties", "items", "anyOf", "enum", "const"),
        *("$ref", *SHARED, "$schema", "title", "description", "pattern", "format"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minItems", "maxItems"),
    }
)
MAX_LEVELS: Final = 10
MAX_PROPERTIES: Final = 5_000
MAX_CHARACTERS: Final = 120_000  # of the names of properties and definitions, and of choices
MAX_CHOICES: Final = 1_000
MANY_CHOICES: Final = 250
MAX_CHARACTERS_OF_MANY: Final = 15_000  # of one enum with more strings than that

# Rules that say more than an annotation and are no matter for `validate`: without them a schema would mean something else.
_ESSENTIAL: Final = frozenset(
    {
        *("allOf", "oneOf", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies"),
        *("prefixItems", "additionalItems", "unevaluatedItems", "contains", "minContains", "maxContains"),
        *("patternProperties", "propertyNames", "unevaluatedProperties", "$dynamicRef", "$recursiveRef"),
    }
)
# Rules that an answer is held to afterwards; the model is told of them in the description.
_CHECKED: Final = (
    *("minLength", "maxLength", "pattern", "format", "contentEncoding", "contentMediaType"),
    *("minProperties", "maxProperties", "uniqueItems", "not"),
)
# Left out beside a reference, which takes no company.
_BESIDE_REFERENCES: Final = frozenset({"$ref", *SHARED, "$schema", "title", "description"})
NOTE: Final = "Must also match "
"""Before the rules, as JSON, that end a description."""

_LOOKAROUND: Final = re.compile(r"(?<!\\)(?:\\\\)*\(\?<?[=!]")
_DEFINITION: Final = re.compile(r"#(?:/(\$defs|definitions)/([^/%~]+))?")
_NAME_OF: Final = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


def plain(node: Schema) -> Schema:
    """Return *node* with anyOf for oneOf, and without an allOf of one part: so older pydantic puts words beside a reference."""
    if "oneOf" in node and "anyOf" not in node:
        node = {("anyOf" if key == "oneOf" else key): value for key, value in node.items()}
    match node.get("allOf"):
        case [dict(part)] if part.keys() & node.keys() <= {"title", "description"}:
            return {**part, **{key: value for key, value in node.items() if key != "allOf"}}
    return node


def typed(node: Schema) -> Schema:
    """Return *node* with the type of its choices, if it has choices and no type."""
    choices = node.get("enum", [node["const"]] if "const" in node else None)
    if not isinstance(choices, list) or "type" in node:
        return node
    kinds = list(
        dict.fromkeys(_NAME_OF.get(type(one), "array" if isinstance(one, list) else "object") for one in choices)
    )
    return {**node, "type": kinds[0] if len(kinds) == 1 else kinds}


def for_strict_mode(schema: Schema) -> Schema:
    """Return *schema* as far as possible in the keywords of strict mode.

    Annotations that strict mode does not know are left out; so are rules that the answer is held to afterwards, which the
    description then names. Objects that do not say so are closed.
    """
    node = plain(schema)
    if "$ref" in node and node.keys() & (KEYWORDS | _ESSENTIAL) <= _BESIDE_REFERENCES:
        node = {key: node[key] for key in ("$ref", *SHARED) if key in node}
    node = typed(mapped(node, for_strict_mode))
    if node.get("properties") and "additionalProperties" not in node:
        node["additionalProperties"] = False
    rules = {key: node.pop(key) for key in _CHECKED if key in node and not _is_known(key, node[key])}
    if rules:
        note = NOTE + msgspec.json.encode(rules).decode()
        node["description"] = f"{node['description']} {note}" if node.get("description") else note
    return {key: value for key, value in node.items() if key in KEYWORDS or key in _ESSENTIAL}


def _is_known(keyword: str, value: Any) -> bool:
    if keyword == "pattern":
        return isinstance(value, str) and not _LOOKAROUND.search(value)
    return keyword == "format" and value in FORMATS


def without_closed_tuples(schema: Schema) -> Schema:
    """Return *schema* with the length of tuples in place of their `items: false`, which llama.cpp's server refuses."""
    node = mapped(schema, without_closed_tuples)
    if node.get("items") is False:
        length = len(node.get("prefixItems", ()))
        node["maxItems"] = min(length, node.get("maxItems", length))
        del node["items"]
    return node


def refusal(schema: Schema, name: str = "answers") -> str | None:
    """Return how OpenAI refuses *schema* in strict mode, as the schema of the response format *name*; None if it does not."""
    prefix = f"Invalid schema for response_format '{name}': "
    if (reason := misfit(schema, WELL_FORMED)) is not None:
        return f"{prefix}it is malformed at {reason}."
    if schema.get("type") != "object" or schema.keys() & {"anyOf", "enum"}:
        return f"{prefix}schema must be a JSON Schema of 'type: \"object\"'."
    for place, node in _nodes(schema, ()):
        if (reason := _complaint(node, schema)) is not None:
            return f"{prefix}In context={place}, {reason}"
        if isinstance(pattern := node.get("pattern"), str) and _LOOKAROUND.search(pattern):
            found = ".".join(("$", *place, "pattern"))
            return f"Invalid JSON schema: regex lookaround is not supported. Found at {found}."
    reason = _too_large(schema)
    return None if reason is None else prefix + reason


def _nodes(node: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    """Yield *node* and every schema inside it, each after its place."""
    yield place, node
    if not isinstance(node, dict):
        return
    for key in ("properties", *SHARED):
        for name, part in node.get(key, {}).items():
            yield from _nodes(part, (*place, key, name))
    for index, part in enumerate(node.get("anyOf", ())):
        yield from _nodes(part, (*place, "anyOf", str(index)))
    if isinstance(node.get("items"), dict):
        yield from _nodes(node["items"], (*place, "items"))


def _complaint(node: Any, root: Schema) -> str | None:
    """Return what is wrong with one schema, its parts left aside; None if nothing is."""
    unknown = [key for key in node if key not in KEYWORDS] if isinstance(node, dict) else []
    if unknown:
        return f"'{unknown[0]}' is not permitted."
    if not isinstance(node, dict) or not node.keys() & {"type", "anyOf", "$ref", "enum"}:
        return "schema must have a 'type' key."
    if "$ref" in node:
        beside = set(node) - {"$ref"}
        return f"$ref cannot have keywords {beside}." if beside else _astray(node["$ref"], root)
    if "format" in node and node["format"] not in FORMATS:
        return f"'{node['format']}' is not a valid format."
    kinds = node.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    for kind in kinds:
        if kind not in TYPES:
            return f"'{kind}' is not valid under any of the given schemas."
    if "array" in kinds and not isinstance(node.get("items"), dict):
        return "array schema missing items."
    return _open(node) if "object" in kinds or "properties" in node else None


def _astray(ref: str, root: Schema) -> str | None:
    found = _DEFINITION.fullmatch(ref)
    if found is not None and (found[1] is None or isinstance(root.get(found[1], {}).get(found[2]), dict)):
        return None
    return "reference can only point to definitions defined at the top level of the schema."


def _open(node: Schema) -> str | None:
    if node.get("additionalProperties") is not False:
        return "'additionalProperties' is required to be supplied and to be false."
    required, names = node.get("required", ()), node.get("properties", {})
    supplied = "'required' is required to be supplied and to be an array including every key in properties."
    for name in names:
        if name not in required:
            return f"{supplied} Missing '{name}'."
    for name in required:
        if name not in names:
            return f"{supplied} Extra required key '{name}' supplied."
    return None


def _too_large(schema: Schema) -> str | None:
    levels = _levels(schema, schema, {})
    if levels > MAX_LEVELS:
        return f"{levels} levels of nesting exceeds limit of {MAX_LEVELS}."
    counts: Counter[str] = Counter()
    for _, node in _nodes(schema, ()):
        names, choices = [*node.get("properties", ())], [*node.get("enum", ())]
        texts = [one for one in (*choices, node.get("const")) if isinstance(one, str)]
        counts["properties"] += len(names)
        counts["choices"] += len(choices)
        counts["characters"] += sum(map(len, (*names, *texts, *(name for key in SHARED for name in node.get(key, ())))))
        if len(choices) > MANY_CHOICES and (characters := sum(map(len, texts))) > MAX_CHARACTERS_OF_MANY:
            return (
                f"Expected at most {MAX_CHARACTERS_OF_MANY} characters in total for an enum with more than {MANY_CHOICES} "
                f"values; received {characters}."
            )
    received = "a schema when using structured outputs; received"
    if counts["properties"] > MAX_PROPERTIES:
        return f"{counts['properties']} parameters exceeds limit of {MAX_PROPERTIES}."
    if counts["choices"] > MAX_CHOICES:
        return f"Expected at most {MAX_CHOICES} enum values in total within {received} {counts['choices']}."
    if counts["characters"] > MAX_CHARACTERS:
        what = "characters in total for all of the names, enum values and const values"
        return f"Expected at most {MAX_CHARACTERS} {what} in {received} {counts['characters']}."
    return None


def _levels(node: Schema, root: Schema, seen: dict[str, int]) -> int:
    """Return how deep the objects and arrays of *node* are nested, once through whatever refers to itself."""
    ref = node.get("$ref")
    if ref is not None:
        if ref not in seen:
            seen[ref] = 0  # while it is at work
            seen[ref] = _levels(resolve(ref, root), root, seen)
        return seen[ref]
    inner = [*node.get("properties", {}).values(), *filter(None, (node.get("items"),))]
    within = [_levels(part, root, seen) for part in inner]
    beside = [_levels(part, root, seen) for part in node.get("anyOf", ())]
    kinds = node.get("type", [])
    own = not {"object", "array"}.isdisjoint([kinds] if isinstance(kinds, str) else kinds)
    return max(own + max(within, default=0), *beside, 0)
