"""Schemas of whole replies, from the schema of one answer: many answers with their ids, or one alone."""

from __future__ import annotations

import contextlib
from typing import Any

from microbatch.schema.traverse import SHARED, Schema, mapped, refs
from microbatch.schema.validate import resolve

CANARY_WORD: Schema = {"type": "string", "pattern": "^[bcdfghjkmnpqrstvwxz]{10}$"}
"""The schema of a canary's word (`prompt/compose.py`): it allows no words, so that no other item is answered with one."""

_HOISTED = tuple(f"#/{key}/" for key in SHARED)
# Keywords that may stand beside a reference without changing what fits.
_SILENT = frozenset({"$ref", "$schema", "$id", "$comment", "title", "description", "default", "examples", *SHARED})


def batch_schema(schema: Schema, *, canary: bool = False) -> Schema:
    """Return the schema of a combined reply: `{"results": [{"id": ..., "answer": ...}, ...]}`.

    Args:
        schema: The schema of one answer.
        canary: Whether one of the answers is the canary's word.
    """
    body, shared = _embedded(schema)
    if canary and body != {"type": "string"}:
        body = {"anyOf": [body, CANARY_WORD]}
    # The id comes first, so that an answer is written with its request named just before.
    element = _object({"id": {"type": "string"}, "answer": body})
    return {**_object({"results": {"type": "array", "items": element}}), **shared}


def single_schema(schema: Schema) -> tuple[Schema, bool]:
    """Return the schema of a reply that holds one answer, and whether the answer is wrapped in it."""
    root = schema
    if "$ref" in schema and schema.keys() <= _SILENT:
        # Another document's schema stays a reference; `true` is no dict.
        with contextlib.suppress(LookupError, TypeError):
            root = {**resolve(schema["$ref"], schema), **{key: schema[key] for key in SHARED if key in schema}}
    if root.get("type") == "object" and not root.keys() & {"$ref", "anyOf", "oneOf", "allOf"}:
        return root, False
    body, shared = _embedded(schema)
    return {**_object({"answer": body}), **shared}, True


def _object(properties: dict[str, Schema]) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _embedded(schema: Schema) -> tuple[Schema, Schema]:
    """Return *schema* as a part of a larger one, and the definitions that belong at the larger one's root."""
    shared = {key: schema[key] for key in SHARED if key in schema}
    # An `$id` in the middle would make every reference below it relative to itself.
    body = {key: value for key, value in schema.items() if key not in {*SHARED, "$schema", "$id"}}
    if not any(map(_points_inside, refs(schema))):
        return body, shared
    # The root itself is referred to, so it needs a name of its own in its new place.
    home = "answer"
    while home in schema.get("$defs", {}):
        home += "_"

    def moved(node: Schema) -> Schema:
        node = mapped(node, moved)
        if _points_inside(node.get("$ref")):
            node["$ref"] = f"#/$defs/{home}{node['$ref'][1:]}"
        return node

    shared = moved(shared)
    shared["$defs"] = {**shared.get("$defs", {}), home: moved(body)}
    return {"$ref": f"#/$defs/{home}"}, shared


def _points_inside(ref: Any) -> bool:
    return isinstance(ref, str) and (ref == "#" or (ref.startswith("#/") and not ref.startswith(_HOISTED)))
