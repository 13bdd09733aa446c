"""How many tokens an answer takes, where its schema says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.schema.validate import resolve

if TYPE_CHECKING:
    from collections.abc import Iterable

    from microbatch.schema.traverse import Schema

_NUMBER: Final = 8
_WORD: Final = 2
"""Of `true`, `false` and `null`, and of what surrounds a member or an element."""

_FORMATTED: Final = 32
"""Of a string whose format bounds it; a UUID takes 26."""

_FORMATS: Final = frozenset({"date", "date-time", "time", "duration", "uuid", "ipv4", "ipv6", "decimal"})

# JSON takes about a token for two bytes: words fewer, hexadecimal digits about as many. What an endpoint's tokenizer needs beyond
# that (two tokens for a Chinese character, line breaks and indents) is within the factor that is put on the result.
_BYTES_A_TOKEN: Final = 2

_MOST: Final = 4_096
"""An answer that may be longer by its schema is mostly much shorter, so the schema does not tell how long it is."""

_STEPS: Final = 2_000
"""Schemas looked at. References can make few lines stand for any number of them, without end as well."""


def expected_tokens(schema: Schema) -> int | None:
    """Return about how many tokens the longest answer takes that fits *schema*; None if the schema does not tell.

    It does for choices, numbers, booleans, strings with a `maxLength` or a format of limited length, arrays with a `maxItems`, and
    objects with fixed properties, as far as their parts are of these kinds.
    """
    try:
        tokens = _Reading(schema).longest(schema)
    except (_Unbounded, RecursionError):
        return None
    return tokens if tokens <= _MOST else None


class _Unbounded(Exception):
    """A part of the schema does not say how long it may be."""


class _Reading:
    """One walk through a schema."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._left = _STEPS

    def longest(self, node: Any) -> int:
        """Return the tokens of the longest value of *node*.

        Raises:
            _Unbounded: There is no longest one, or it is not to be told.
        """
        self._left -= 1
        if not isinstance(node, dict) or self._left < 0:
            raise _Unbounded
        if "$ref" in node:
            return self.longest(self._named(node["$ref"]))
        if "const" in node:
            return _written(node["const"])
        for choices in (node.get("anyOf"), node.get("oneOf")):
            if isinstance(choices, list) and choices:
                return max(map(self.longest, choices))
        if isinstance(node.get("enum"), list) and node["enum"]:
            return max(map(_written, node["enum"]))
        kinds = node.get("type")
        if isinstance(kinds, list) and kinds:
            return max(self._of_kind(kind, node) for kind in kinds)
        return self._of_kind(kinds, node)

    def _named(self, ref: Any) -> Any:
        try:
            return resolve(ref, self._root)
        except (LookupError, TypeError) as error:
            raise _Unbounded from error

    def _of_kind(self, kind: Any, node: Schema) -> int:
        match kind:
            case "boolean" | "null":
                return _WORD
            case "integer" | "number":
                return _NUMBER
            case "string" if isinstance(node.get("maxLength"), int):
                return int(node["maxLength"]) // _BYTES_A_TOKEN + _WORD
            case "string" if node.get("format") in _FORMATS:
                return _FORMATTED
            case "array":
                return self._of_array(node)
            case "object":
                return self._of_object(node)
            case _:
                raise _Unbounded

    def _of_array(self, node: Schema) -> int:
        first, rest, most = node.get("prefixItems", []), node.get("items"), node.get("maxItems")
        if most is None and first and not rest:
            most = len(first)
        if not isinstance(most, int) or not isinstance(first, list):
            raise _Unbounded
        more = most - len(first)
        tokens = _framed(map(self.longest, first[:most]))
        return tokens if more <= 0 else tokens + more * (self.longest(rest) + _WORD)

    def _of_object(self, node: Schema) -> int:
        properties = node.get("properties")
        if not isinstance(properties, dict) or node.get("additionalProperties") or node.get("patternProperties"):
            raise _Unbounded
        return _framed(_written(name) + self.longest(value) for name, value in properties.items())


def _framed(sizes: Iterable[int]) -> int:
    """Return the tokens of an array or an object whose parts take *sizes*."""
    return _WORD + sum(size + _WORD for size in sizes)


def _written(value: Any) -> int:
    """Return the tokens of a value that is known."""
    return len(msgspec.json.encode(value)) // _BYTES_A_TOKEN + 1
