"""Traversal of the schemas inside a JSON Schema. Members that hold data are left unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Schema = dict[str, Any]

SHARED = ("$defs", "definitions")
"""Keywords of definitions, in newer and older drafts."""

# Keywords that hold schemas: by name, and alone or in a list.
_NAMED = frozenset({*SHARED, "properties", "patternProperties", "dependentSchemas", "dependencies"})
_NESTED = frozenset(
    {
        *("items", "prefixItems", "additionalItems", "unevaluatedItems", "contains"),
        *("additionalProperties", "unevaluatedProperties", "propertyNames"),
        *("anyOf", "oneOf", "allOf", "not", "if", "then", "else"),
    }
)


def mapped(node: Schema, change: Callable[[Schema], Schema]) -> Schema:
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


def nodes(schema: Schema) -> Iterator[Schema]:
    """Yield *schema* and every schema inside it."""
    stack = [schema]

    def noted(node: Schema) -> Schema:
        stack.append(node)
        return node

    while stack:
        node = stack.pop()
        yield node
        mapped(node, noted)


def refs(schema: Schema) -> list[str]:
    """Return the references in *schema*, repeated ones included."""
    return [node["$ref"] for node in nodes(schema) if isinstance(node.get("$ref"), str)]


def canonical(schema: Schema) -> Schema:
    """Return *schema* with its keywords sorted. Properties stay: models write them in order, so order is meaning."""
    return dict(sorted(mapped(schema, canonical).items()))
