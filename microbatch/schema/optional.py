"""Properties that a type can do without: they are asked for as "this or null", and a null is left out before the type reads the answer.

A property whose own type allows null is no such property: its null is a value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.schema.traverse import mapped, nodes
from microbatch.schema.validate import misfit_in, resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from microbatch.schema.traverse import Schema

OPTIONAL: Final = "x-optional"
"""A keyword of schemas that are not sent: the names of an object's properties for which null stands for absence."""

_NULL = b"null"
_KINDS = {b"{": "object", b"[": "array"}
_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_elements = msgspec.json.Decoder(list[msgspec.Raw]).decode


def as_asked(schema: Schema) -> Schema:
    """Return *schema* as models are told it: without `OPTIONAL`, and with every property required."""
    node = mapped({key: value for key, value in schema.items() if key != OPTIONAL}, as_asked)
    return {**node, "required": list(node["properties"])} if "properties" in node else node


def null_remover(schema: Schema) -> Callable[[str], str] | None:
    """Return what leaves the nulls that stand for absence out of the JSON of an answer; None if there are none in *schema*."""
    if not any(OPTIONAL in node for node in nodes(schema)):
        return None

    def without_nulls(raw: str) -> str:
        try:
            return _without_nulls(raw.strip().encode(), schema, schema).decode()
        except (msgspec.DecodeError, RecursionError, UnicodeError):
            return raw  # refused in the reader's words

    return without_nulls


def _without_nulls(raw: bytes, node: Any, root: Schema) -> bytes:
    """Return the JSON *raw* of a value of *node*; JSON from which nothing is left out stays as it was written."""
    kind = _KINDS.get(raw[:1])
    if kind is None or _NULL not in raw:
        return raw
    choices = [one for one in _choices(node, root) if one.get("type", kind) == kind or kind in one["type"]]
    if len(choices) > 1:
        choices = [one for one in choices if misfit_in(raw, one, root=root) is None]
    if not choices:
        return raw
    node = choices[0]
    if kind == "array":
        first, rest = node.get("prefixItems", ()), node.get("items")
        elements = _elements(raw)
        rules = [first[index] if index < len(first) else rest for index in range(len(elements))]
        kept = [_without_nulls(bytes(one), rule, root) for one, rule in zip(elements, rules, strict=True)]
        return raw if kept == list(map(bytes, elements)) else b"[" + b",".join(kept) + b"]"
    properties = node.get("properties", {})
    others = next(iter(node.get("patternProperties", {}).values()), node.get("additionalProperties"))
    members = {name: bytes(one) for name, one in _members(raw).items()}
    left = {
        name: _without_nulls(one, properties.get(name, others), root)
        for name, one in members.items()
        if one != _NULL or name not in node.get(OPTIONAL, ())
    }
    return raw if left == members else msgspec.json.encode({name: msgspec.Raw(one) for name, one in left.items()})


def _choices(node: Any, root: Schema) -> Iterator[Schema]:
    """Yield the schemas that *node* stands for: what it refers to, or the branches of a union."""
    if not isinstance(node, dict):
        return
    if "$ref" in node:
        yield from _choices(resolve(node["$ref"], root), root)
    elif "anyOf" in node:
        for one in node["anyOf"]:
            yield from _choices(one, root)
    else:
        yield node
