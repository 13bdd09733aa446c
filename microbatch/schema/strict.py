"""From a schema that a library made of a type to the strict subset that providers enforce.

In the subset every object is closed and all its properties are required, a reference stands alone, and every choice has a type.
What such a schema allows, the type decodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from microbatch.errors import ConfigError
from microbatch.schema.traverse import Schema, mapped, nodes

if TYPE_CHECKING:
    from collections.abc import Iterable

    Orders = dict[frozenset[tuple[type, Any]], list[Any]]

# What the strict subset refuses and decoding does without, and what would only lengthen the prompt.
_DROPPED = frozenset({"default", "title", "discriminator", "uniqueItems"})
_JSON_NAMES: dict[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
    list: "array",
    dict: "object",
}


def to_strict(schema: Schema, written: Iterable[list[Any]] = ()) -> Schema:
    """Return *schema* in the strict subset.

    Args:
        schema: As msgspec or pydantic makes it, its definitions under "$defs".
        written: Choices in the order in which they were written, for those that *schema* may have sorted: models lean
            towards the first.

    Raises:
        ConfigError: An answer could never end.
    """
    orders: Orders = {}
    for choices in written:
        orders.setdefault(_members(choices), choices)
    body = _cleaned(schema, orders)
    defs: dict[str, Schema] = body.pop("$defs", {})
    body, defs = _inlined(body, defs)
    while (name := _definition(body)) is not None:
        body = dict(defs[name])
    _check_finite(body, defs)
    used = _used(body, defs)
    return {**body, "$defs": used} if used else body


def _cleaned(node: Schema, orders: Orders) -> Schema:
    node = {("anyOf" if key == "oneOf" else key): value for key, value in node.items() if key not in _DROPPED}
    node = mapped(node, lambda child: _cleaned(child, orders))
    if len(node.get("allOf", ())) == 1:
        node = {**node.pop("allOf")[0], **node}  # how older pydantic puts words beside a reference
    if "enum" in node:
        choices: list[Any] = node["enum"]
        kinds = list(dict.fromkeys(_JSON_NAMES[type(value)] for value in choices))
        node["enum"] = orders.get(_members(choices), choices)
        # The subset wants a type everywhere; msgspec leaves it to the choices.
        node.setdefault("type", kinds[0] if len(kinds) == 1 else kinds)
    if "properties" in node:
        node["required"] = list(node["properties"])
        node["additionalProperties"] = False
    return node


def _members(choices: list[Any]) -> frozenset[tuple[type, Any]]:
    try:
        return frozenset((type(value), value) for value in choices)
    except TypeError:
        return frozenset()


def _inlined(body: Schema, defs: dict[str, Schema]) -> tuple[Schema, dict[str, Schema]]:
    """Put definitions in the place of references with something beside them, which the subset does not allow."""

    def inlined(node: Schema, within: frozenset[str]) -> Schema:
        name = _definition(node)
        if name is not None and len(node) > 1:
            # Inside itself a type stays a reference and loses the words beside it.
            if name in within:
                return {"$ref": node["$ref"]}
            beside = {key: value for key, value in node.items() if key != "$ref"}
            return inlined({**defs[name], **beside}, within | {name})
        return mapped(node, lambda child: inlined(child, within))

    return inlined(body, frozenset()), {name: inlined(node, frozenset({name})) for name, node in defs.items()}


def _definition(node: Schema) -> str | None:
    ref = node.get("$ref")
    return None if ref is None else str(ref).removeprefix("#/$defs/")


def _used(body: Schema, defs: dict[str, Schema]) -> dict[str, Schema]:
    used: set[str] = set()
    stack = [body]
    while stack:
        for node in nodes(stack.pop()):
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
