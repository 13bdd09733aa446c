"""Validation of JSON values against JSON Schemas that came as JSON; types are validated by msgspec or pydantic.

Unknown keywords are ignored, as the specification requires; `format` is one of them, unless it is asked for.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MAX_DEPTH = 200
"""Nesting of schemas, references and unions included, beyond which a value counts as too deep to check."""

_SCHEMA = {"$ref": "#"}
_SCHEMAS = {"type": "array", "items": _SCHEMA}
_NAMED = {"type": "object", "additionalProperties": _SCHEMA}
_COUNT = {"type": "integer", "minimum": 0}
_NUMBER = {"type": "number"}
_LIMIT = {"type": ["number", "boolean"]}  # in draft 4 a boolean beside the limit it makes exclusive
_WORDS = {"type": "array", "items": {"type": "string"}}

WELL_FORMED: dict[str, Any] = {
    "type": ["object", "boolean"],
    "properties": {
        "$ref": {"type": "string"},
        "type": {"anyOf": [{"type": "string"}, _WORDS]},
        "enum": {"type": "array"},
        "required": _WORDS,
        "pattern": {"type": "string"},
        "items": {"anyOf": [_SCHEMA, _SCHEMAS]},
        **dict.fromkeys(("additionalProperties", "additionalItems", "not"), _SCHEMA),
        **dict.fromkeys(("prefixItems", "anyOf", "oneOf", "allOf"), _SCHEMAS),
        **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions"), _NAMED),
        **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), _COUNT),
        **dict.fromkeys(("minimum", "maximum", "multipleOf"), _NUMBER),
        **dict.fromkeys(("exclusiveMinimum", "exclusiveMaximum"), _LIMIT),
    },
}
"""The schema of schemas that `misfit` accepts."""

TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "number": (int, float),
    "integer": int,
}

_decode = msgspec.json.Decoder().decode

_NULL = {"type": "null"}

_COMBINING = frozenset({"$ref", "allOf", "anyOf", "oneOf", "not"})


def misfit(
    value: Any, schema: Any, *, root: Any = None, steps: int = 100_000, formats: Mapping[str, Any] | None = None
) -> str | None:
    """Return where and why *value* does not fit *schema*, or None if it does.

    Args:
        value: A decoded JSON value.
        schema: The schema, itself well-formed (see `WELL_FORMED`).
        root: What its references lead into; None for the schema itself.
        formats: The types that strings of a format are read as; other formats are ignored.
        steps: Most applications of a schema, beyond which the value counts as a misfit: nested unions otherwise take time exponential
            in the value's depth.

    Returns:
        A path and a rule, with names from the schema only; neither strings nor keys of the value.
    """
    reason = _Check(schema if root is None else root, steps, formats or {}).at(value, schema, 0)
    return None if reason is None else "$" + reason


def misfit_in(
    raw: str | bytes, schema: Any, *, root: Any = None, formats: Mapping[str, Any] | None = None
) -> str | None:
    """Return where and why the value of the JSON *raw* does not fit *schema*, or None; see `misfit`."""
    # Steps linear in the length, with room for a union or two at every value.
    return misfit(_decode(raw), schema, root=root, steps=10_000 + 8 * len(raw), formats=formats)


def resolve(pointer: str, root: Any) -> Any:
    """Return what the local reference *pointer* ("#", "#/$defs/Item") names in *root*.

    Raises:
        LookupError: Nothing is there, or it is not a reference into this document.
    """
    if not re.match(r"#(?:/|$)", pointer):
        raise LookupError(pointer)
    found = root
    for part in pointer.split("/")[1:]:
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict):
            found = found[name]
        elif isinstance(found, list) and re.fullmatch("[0-9]{1,6}", name):
            found = found[int(name)]
        else:
            raise LookupError(pointer)
    return found


class _Check:
    """One run of `misfit`."""

    def __init__(self, root: Any, steps: int, formats: Mapping[str, Any]) -> None:
        self.root = root
        self.left = steps
        self.formats = formats

    def at(self, value: Any, schema: Any, depth: int) -> str | None:
        if not isinstance(schema, dict):
            return ": nothing is allowed here" if schema is False else None
        self.left = self.left - 1 if depth <= MAX_DEPTH else -1
        if self.left < 0:
            return ": too deep to check"
        if (reason := _wrong_kind(value, schema) or _wrong_value(value, schema)) is not None:
            return reason
        if self.formats and isinstance(value, str):
            kind = schema.get("format", schema.get("contentEncoding"))
            if isinstance(kind, str) and kind in self.formats:
                return self.formatted(value, kind)
        if isinstance(value, dict | list):
            for place, part, rule in _parts(value, schema):
                if rule is not True and (reason := self.at(part, rule, depth + 1)) is not None:
                    return place + reason
        reason = None if _COMBINING.isdisjoint(schema) else self.combined(value, schema, depth)
        # A branch that was given up failed for no fault of the value, which `not` and oneOf would take for success.
        return ": too deep to check" if reason is None and self.left < 0 else reason

    def formatted(self, value: str, kind: str) -> str | None:
        try:
            msgspec.convert(value, self.formats[kind])
        except msgspec.ValidationError:
            return f": not a {kind}"
        return None

    def combined(self, value: Any, schema: dict[str, Any], depth: int) -> str | None:
        def fits(rule: Any) -> bool:
            return self.at(value, rule, depth + 1) is None

        referred = self.referred(schema["$ref"]) if "$ref" in schema else ()
        for rule in (*referred, *schema.get("allOf", ())):
            if (reason := self.at(value, rule, depth + 1)) is not None:
                return reason
        if "anyOf" in schema and (reason := self.union(value, schema["anyOf"], depth)) is not None:
            return reason
        if "oneOf" in schema and (fitting := sum(map(fits, schema["oneOf"]))) != 1:
            return f": fits {fitting} of oneOf"
        if "not" in schema and fits(schema["not"]):
            return ": fits what it must not"
        return None

    def union(self, value: Any, choices: list[Any], depth: int) -> str | None:
        reasons = [self.at(value, rule, depth + 1) for rule in choices if value is None or rule != _NULL]
        if None in reasons:
            return None
        return reasons[0] if len(reasons) == 1 else ": fits none of anyOf"

    def referred(self, pointer: str) -> list[Any]:
        try:
            return [resolve(pointer, self.root)]
        except LookupError:
            return []  # another document's schema cannot be read here


def _parts(value: Any, schema: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield each member or element of *value*, after its place, with each schema that applies to it."""
    if isinstance(value, dict):
        properties, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        others = schema.get("additionalProperties", True)
        for name, member in value.items():
            rules = [rule for pattern, rule in patterns.items() if _found(pattern, name)]
            if name in properties:
                yield f".{name}", member, properties[name]
            elif not rules:
                yield "[...]", member, others
            for rule in rules:
                yield "[...]", member, rule
    elif isinstance(value, list):
        first, rest = schema.get("prefixItems", []), schema.get("items", True)
        if isinstance(rest, list):  # the spelling of draft 7 and before
            first, rest = rest, schema.get("additionalItems", True)
        for index, element in enumerate(value):
            yield f"[{index}]", element, first[index] if index < len(first) else rest


def _wrong_kind(value: Any, schema: dict[str, Any]) -> str | None:
    if "type" in schema:
        names = schema["type"]
        if not (_is(value, names) if isinstance(names, str) else any(_is(value, name) for name in names)):
            return ": wrong type"
    if "enum" in schema and not any(_same(value, allowed) for allowed in schema["enum"]):
        return ": not in enum"
    if "const" in schema and not _same(value, schema["const"]):
        return ": not the const"
    return None


def _is(value: Any, name: str) -> bool:
    if name == "integer":
        # The specification: 1.0 is an integer, true is not.
        return (isinstance(value, int) and not isinstance(value, bool)) or (
            isinstance(value, float) and value.is_integer()
        )
    if name == "number" and isinstance(value, bool):
        return False
    kind = TYPES.get(name)
    return kind is None or isinstance(value, kind)


def _same(one: Any, other: Any) -> bool:
    """Compare as JSON does: 1 equals 1.0, and true equals neither."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(member, other[name]) for name, member in one.items())
    return bool(one == other)


def _wrong_value(value: Any, schema: dict[str, Any]) -> str | None:
    """Return the rule of *schema* that *value* as a whole breaks, or None."""
    if isinstance(value, dict):
        for name in schema.get("required", ()):
            if name not in value:
                return f".{name}: missing"
        return _wrong_count(len(value), schema, "minProperties", "maxProperties")
    if isinstance(value, list):
        return _wrong_count(len(value), schema, "minItems", "maxItems")
    if isinstance(value, str):
        if "pattern" in schema and not _found(schema["pattern"], value, broken=True):
            return ": pattern"
        return _wrong_count(len(value), schema, "minLength", "maxLength")
    return _wrong_number(value, schema) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _wrong_count(count: int, schema: dict[str, Any], least: str, most: str) -> str | None:
    if count < schema.get(least, 0):
        return f": {least}"
    return f": {most}" if most in schema and count > schema[most] else None


def _found(pattern: str, text: str, *, broken: bool = False) -> bool:
    """Search *text*; a pattern that Python cannot read gives *broken*."""
    try:
        return re.search(pattern, text) is not None
    except (re.error, RecursionError, OverflowError):
        return broken


def _wrong_number(value: float, schema: dict[str, Any]) -> str | None:
    low, high = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if "minimum" in schema and (value < schema["minimum"] or (low is True and value == schema["minimum"])):
        return ": minimum"
    if "maximum" in schema and (value > schema["maximum"] or (high is True and value == schema["maximum"])):
        return ": maximum"
    if low is not None and not isinstance(low, bool) and value <= low:
        return ": exclusiveMinimum"
    if high is not None and not isinstance(high, bool) and value >= high:
        return ": exclusiveMaximum"
    return ": multipleOf" if not _divides(schema.get("multipleOf", 0), value) else None


def _divides(step: float, value: float) -> bool:
    if step <= 0:
        return True
    if isinstance(step, int) and isinstance(value, int):
        return value % step == 0
    try:
        quotient = value / step
    except OverflowError:
        return True
    # 0.3 is no exact multiple of 0.1 in binary; what is meant is decimal.
    return math.isfinite(quotient) and math.isclose(quotient, round(quotient), rel_tol=1e-9, abs_tol=1e-9)
