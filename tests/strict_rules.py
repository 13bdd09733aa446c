"""What OpenAI documents of strict mode, written down from its guide to structured outputs ("Supported schemas") and nothing else.

The code and the simulated endpoint are held against this list; it shares nothing with them.
"""

from __future__ import annotations

from typing import Any

TYPES = {"string", "number", "boolean", "integer", "object", "array", "null"}
STRING_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"}
BY_TYPE = {
    "string": {"pattern", "format"},
    "number": {"multipleOf", "maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum"},
    "array": {"minItems", "maxItems", "items"},
    "object": {"properties", "required", "additionalProperties"},
}
EVERYWHERE = {"type", "enum", "const", "anyOf", "$ref", "$defs", "definitions", "title", "description", "$schema"}
LEVELS, PROPERTIES, CHARACTERS, CHOICES = 10, 5_000, 120_000, 1_000
LONG_ENUM, LONG_ENUM_CHARACTERS = 250, 15_000


def violations(schema: Any) -> list[str]:
    """Return the rules that *schema*, the root of a strict response format, breaks."""
    found = []
    if schema.get("type") != "object" or "anyOf" in schema:
        found.append("the root must be an object and not anyOf")
    every = list(_each(schema))
    for one in every:
        found += _broken(one)
        if isinstance(one, dict) and "$ref" in one and not _is_definition(one["$ref"], schema):
            found.append("a reference to no definition")
    if found:
        return found
    names = [name for one in every for name in one.get("properties", {})]
    definitions = [name for one in every for key in ("$defs", "definitions") for name in one.get(key, {})]
    choices = [choice for one in every for choice in one.get("enum", [])]
    constants = [one["const"] for one in every if "const" in one]
    texts = [text for text in (*choices, *constants) if isinstance(text, str)]
    if _depth(schema, schema, ()) > LEVELS:
        found.append("too many levels")
    if len(names) > PROPERTIES:
        found.append("too many properties")
    if len(choices) > CHOICES:
        found.append("too many choices")
    if len("".join([*names, *definitions, *texts])) > CHARACTERS:
        found.append("too many characters")
    for one in every:
        if len(one.get("enum", [])) > LONG_ENUM and len("".join(map(str, one["enum"]))) > LONG_ENUM_CHARACTERS:
            found.append("a long enum has too many characters")
    return found


def _is_definition(ref: str, schema: dict[str, Any]) -> bool:
    return ref == "#" or ref in {f"#/{key}/{name}" for key in ("$defs", "definitions") for name in schema.get(key, {})}


def _broken(one: Any) -> list[str]:
    if not isinstance(one, dict):
        return ["a schema is no object"]
    found = [f"keyword {key}" for key in one if key not in EVERYWHERE.union(*BY_TYPE.values())]
    if "$ref" in one and len(one) > 1:
        found.append("a reference has company")
    kinds = one.get("type", [])
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    if not kinds and not one.keys() & {"anyOf", "$ref", "enum"}:
        found.append("no type")
    if not kinds <= TYPES:
        found.append("an unknown type")
    if one.get("format", "date") not in STRING_FORMATS:
        found.append("format")
    if any(mark in one.get("pattern", "").replace("\\(", "") for mark in ("(?=", "(?!", "(?<=", "(?<!")):
        found.append("lookaround")
    if "array" in kinds and not isinstance(one.get("items"), dict):
        found.append("an array without items")
    if "object" in kinds or "properties" in one:
        if one.get("additionalProperties") is not False:
            found.append("an open object")
        if sorted(one.get("required", [])) != sorted(one.get("properties", {})):
            found.append("required is not all properties")
    return found


def _each(one: Any) -> Any:
    yield one
    if isinstance(one, dict):
        parts = [part for key in ("properties", "$defs", "definitions") for part in one.get(key, {}).values()]
        parts += one.get("anyOf", [])
        parts += [one["items"]] if isinstance(one.get("items"), dict) else []
        for part in parts:
            yield from _each(part)


def _depth(one: dict[str, Any], root: dict[str, Any], within: tuple[str, ...]) -> int:
    if "$ref" in one:
        name = one["$ref"]
        if name in within:
            return 0
        target = root
        for part in name.split("/")[1:]:
            target = target[part]
        return _depth(target, root, (*within, name))
    inside = [*one.get("properties", {}).values(), *([one["items"]] if "items" in one else [])]
    kinds = one.get("type", [])
    own = 1 if {"object", "array"} & ({kinds} if isinstance(kinds, str) else set(kinds)) else 0
    deepest = own + max((_depth(part, root, within) for part in inside), default=0)
    return max(deepest, *(_depth(part, root, within) for part in one.get("anyOf", [])), 0)
