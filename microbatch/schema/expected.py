"""The number of tokens of an answer, where its schema bounds it."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.schema.validate import resolve

if TYPE_CHECKING:
    from collections.abc import Iterable

    from microbatch.schema.traverse import Schema

_NUMBER: Final = 8
_WORD: Final = 2  # `true`, `false`, `null`, and what surrounds a member or an element
_FORMATTED: Final = 32  # a string whose format bounds it; a UUID takes 26
_FORMATS: Final = frozenset({"date", "date-time", "time", "duration", "uuid", "ipv4", "ipv6", "decimal"})

# JSON takes about a token for two bytes: words fewer, hexadecimal digits about as many. What tokenizers need beyond that (two tokens
# for a Chinese character, line breaks and indents) is within the factor put on the result.
_BYTES_A_TOKEN: Final = 2

_MOST: Final = 4_096
"""Answers that may be longer by their schema are mostly much shorter, so that the schema says nothing of their length."""

_STEPS: Final = 2_000
"""Schemas visited at most. By references a short schema can stand for any number of them, without end as well."""


def expected_tokens(schema: Schema) -> int | None:
    """Return about how many tokens the longest answer takes that fits *schema*; None if the schema does not bound it.

    It does for choices, numbers, booleans, strings with a `maxLength` or a format of limited length, arrays with a `maxItems`, and
    objects with fixed properties, as far as their parts are of these kinds.
    """
    try:
        tokens = _Walk(schema).longest(schema)
    except RecursionError:
        return None
    return int(tokens) if tokens <= _MOST else None


class _Walk:
    def __init__(self, root: Schema) -> None:
        self._root = root
        self._left = _STEPS

    def longest(self, node: Any) -> float:
        """Return the tokens of the longest value of *node*, infinity if there is none."""
        self._left -= 1
        if not isinstance(node, dict) or self._left < 0:
            return inf
        if "$ref" in node:
            try:
                return self.longest(resolve(node["$ref"], self._root))
            except (LookupError, TypeError):
                return inf
        if "const" in node:
            return _written(node["const"])
        for choices in (node.get("anyOf"), node.get("oneOf")):
            if isinstance(choices, list) and choices:
                return max(map(self.longest, choices))
        if isinstance(node.get("enum"), list) and node["enum"]:
            return max(map(_written, node["enum"]))
        kinds = node.get("type")
        return max(self._of_kind(kind, node) for kind in (kinds if isinstance(kinds, list) and kinds else [kinds]))

    def _of_kind(self, kind: Any, node: Schema) -> float:
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
                return inf

    def _of_array(self, node: Schema) -> float:
        first, rest, most = node.get("prefixItems", []), node.get("items"), node.get("maxItems")
        if most is None and first and not rest:
            most = len(first)
        if not isinstance(most, int) or not isinstance(first, list):
            return inf
        more = most - len(first)
        tokens = _framed(map(self.longest, first[:most]))
        return tokens if more <= 0 else tokens + more * (self.longest(rest) + _WORD)

    def _of_object(self, node: Schema) -> float:
        properties = node.get("properties")
        if not isinstance(properties, dict) or node.get("additionalProperties") or node.get("patternProperties"):
            return inf
        return _framed(_written(name) + self.longest(value) for name, value in properties.items())


def _framed(sizes: Iterable[float]) -> float:
    return _WORD + sum(size + _WORD for size in sizes)


def _written(value: Any) -> int:
    return len(msgspec.json.encode(value)) // _BYTES_A_TOKEN + 1
