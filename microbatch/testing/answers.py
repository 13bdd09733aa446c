"""The default answers of the simulated model: values that depend on the text and the schema alone.

An item therefore gets the same answer in every batch and alone.
"""

from __future__ import annotations

import json
import random
import re
from hashlib import blake2b
from typing import Any, TypeAlias, cast

from microbatch.schema.strict_mode import NOTE
from microbatch.testing.counting import compact, text_tokens

_JSON_TYPES = {
    type(None): "null",
    bool: "boolean",
    int: "number",
    float: "number",
    str: "string",
    list: "array",
    tuple: "array",
}

Schema: TypeAlias = "dict[str, Any]"

# Recursive schemas end here: optional parts are left out and lists stay empty.
MAX_DEPTH = 6

_FORMATS = {
    "date": "2024-05-17",
    "time": "09:30:00Z",
    "date-time": "2024-05-17T09:30:00Z",
    "duration": "PT15M",
    "email": "someone@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.7",
    "ipv6": "2001:db8::7",
    "uri": "https://example.com/",
    "uuid": "7f3b2c1e-5a4d-4e6f-8a9b-0c1d2e3f4a5b",
    "decimal": "12.50",
    "base64": "bWljcm8=",
}


_MOST_WORDS = 60
_FEWER_WORDS = (40, 25, 15, 10, 7, 5, 3, 2, 1)
"""Most words of a string, at first and where the answer would be too long."""


def simulated_answer(text: str, schema: Schema | None, *, max_tokens: int | None = None) -> Any:
    """Return the answer to *text*: some sentences when *schema* is None, else a value that conforms to it.

    `pattern`, `not` and `if` are not looked at. Strings are shorter where the answer, as text or JSON, would take more than
    *max_tokens*, as far as that helps: a model is mostly asked for short answers where they are limited to few tokens.
    """
    answer = _written(text, schema, _MOST_WORDS)
    if max_tokens is not None:
        for words in _FEWER_WORDS:
            if text_tokens(answer if isinstance(answer, str) else compact(answer)) <= max_tokens:
                break
            answer = _written(text, schema, words)
    return answer


def _written(text: str, schema: Schema | None, most_words: int) -> Any:
    return _Writer(text, schema or {}, most_words).value(schema or {"type": "string"}, "", 0)


def resolve(schema: Schema, root: Schema) -> Schema:
    """Return *schema* with its outermost `$ref` (into *root*) followed and its `allOf` merged."""
    for _ in range(MAX_DEPTH):
        rest = dict(schema)
        if "$ref" in schema:
            schema = {**_target(rest.pop("$ref"), root), **rest}
        elif "allOf" in schema:
            merged: Schema = {}
            for part in rest.pop("allOf"):
                merged |= resolve(part, root)
            schema = merged | rest
        else:
            break
    return schema


def _target(ref: str, root: Schema) -> Schema:
    target: Any = root
    for key in filter(None, ref.removeprefix("#").split("/")):
        name = key.replace("~1", "/").replace("~0", "~")
        target = target[int(name)] if isinstance(target, list) else target[name]
    return cast("Schema", target)


def _noted(schema: Schema) -> Schema:
    """Return *schema* with the rules that its description names in place of keywords that strict mode does not take."""
    _, note, rules = str(schema.get("description", "")).rpartition(NOTE)
    try:
        return {**schema, **json.loads(rules)} if note else schema
    except (ValueError, TypeError):
        return schema  # words of the caller's own


def unwrap(schema: Schema) -> Schema | None:
    """Return what a schema of the form `{"answer": S}` wraps, with the definitions it refers to; None for any other.

    A reply's schema must be an object, so a client wraps the schemas that are none.
    """
    outer = resolve(schema, schema)
    properties = outer.get("properties")
    if not isinstance(properties, dict) or list(properties) != ["answer"]:
        return None
    return {**properties["answer"], **{key: schema[key] for key in ("$defs", "definitions") if key in schema}}


def json_types(schema: Schema, root: Schema) -> set[str]:
    """Return the names of the JSON types that *schema* admits; all of them if it does not say."""
    schema = resolve(schema, root)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return {name for branch in schema[key] for name in json_types(branch, root)}
    if "type" in schema:
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        return {"number" if name == "integer" else name for name in names}
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is not None:
        return {json_type(value) for value in values}
    return {"null", "boolean", "number", "string", "array", "object"}


def json_type(value: Any) -> str:
    """Return the name of the JSON type of *value*."""
    return _JSON_TYPES.get(type(value), "object")


class _Writer:
    """Writes one answer. Every choice is drawn from the text and the place of the choice in the answer.

    The place, not the schema's own wording, so that a schema says the same with its references written out. Strings have at most
    *most_words*, unless the schema wants longer ones.
    """

    def __init__(self, text: str, root: Schema, most_words: int) -> None:
        self.root = root
        self.most_words = most_words
        self.key = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        self.words = re.findall(r"[^\W_]+", text[:8_000])[:400] or ["nothing", "to", "say"]

    def draw(self, path: str) -> random.Random:
        digest = blake2b(path.encode("utf-8", "surrogatepass"), key=self.key, digest_size=8).digest()
        return random.Random(int.from_bytes(digest))  # noqa: S311 - plausible, not secret

    def value(self, schema: Any, path: str, depth: int) -> Any:
        if not isinstance(schema, dict):  # `true` admits anything
            schema = {}
        schema = _noted(resolve(schema, self.root))
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self.draw(path).choice(schema["enum"])
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self.value(self.branch(schema[key], path, depth), path, depth + 1)
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = ("null" if "null" in kind else kind[0]) if depth > MAX_DEPTH else self.draw(path).choice(kind)
        match kind:
            case "object":
                return self.object(schema, path, depth)
            case "array":
                return self.array(schema, path, depth)
            case "integer" | "number":
                return self.number(schema, path, whole=kind == "integer")
            case "boolean":
                return self.draw(path).random() < 0.5  # noqa: PLR2004 - a coin
            case "null":
                return None
            case _ if "properties" in schema:
                return self.object(schema, path, depth)
            case _:
                return self.string(schema, path)

    def branch(self, branches: list[Any], path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            # A branch without parts ends the recursion, if there is one.
            return min(branches, key=lambda each: bool(json_types(each, self.root) & {"object", "array"}))
        return self.draw(path).choice(branches)

    def object(self, schema: Schema, path: str, depth: int) -> dict[str, Any]:
        required = schema.get("required", ())
        named = {
            name: self.value(part, f"{path}/{name}", depth + 1)
            for name, part in schema.get("properties", {}).items()
            if name in required or depth <= MAX_DEPTH
        }
        extra = schema.get("additionalProperties")
        if not named and isinstance(extra, dict) and depth <= MAX_DEPTH:
            names = dict.fromkeys(self.draw(path).choices(self.words, k=2))
            return {name: self.value(extra, f"{path}/{name}", depth + 1) for name in names}
        if not named and not path and extra in (None, True):
            return {"answer": self.string({}, path)}  # "some JSON object": what is said of the text must be somewhere
        return named

    def array(self, schema: Schema, path: str, depth: int) -> list[Any]:
        first = [self.value(part, f"{path}/{i}", depth + 1) for i, part in enumerate(schema.get("prefixItems", ()))]
        items = schema.get("items", not first)
        least = schema.get("minItems", 0)
        length = least
        if items is not False and depth <= MAX_DEPTH:
            most = schema.get("maxItems", max(least, len(first)) + 3)
            length = self.draw(path).randint(least, max(least, most if most < least + 4 else least + 3))
        rest = [self.value(items, f"{path}/{i}", depth + 1) for i in range(len(first), length)]
        if schema.get("uniqueItems"):
            rest = [value for i, value in enumerate(rest) if value not in rest[:i]]
        return first + rest

    def number(self, schema: Schema, path: str, *, whole: bool) -> float:
        step = schema.get("multipleOf", 1 if whole else 0.01)
        low = schema.get("minimum", schema.get("exclusiveMinimum"))
        high = schema.get("maximum", schema.get("exclusiveMaximum"))
        if low is None:
            low = 0 if high is None or high > 0 else high - 100
        if high is None:
            high = low + 100
        # Counted in whole steps, from the first inside the bounds to the last.
        first = -int(-low // step) + (schema.get("exclusiveMinimum") == -int(-low // step) * step)
        last = int(high // step) - (schema.get("exclusiveMaximum") == int(high // step) * step)
        if last < first:  # no step between the bounds: the only number left that is surely inside is their middle
            return (low + high) / 2
        steps = self.draw(path).randint(first, last)
        return int(steps * step) if whole else min(max(round(steps * step, 10), low), high)

    def string(self, schema: Schema, path: str) -> str:
        form = schema.get("format", schema.get("contentEncoding"))
        if form in _FORMATS:
            return _FORMATS[form]
        draw = self.draw(path)
        words = draw.choices(self.words, k=draw.randint(10, _MOST_WORDS))[: self.most_words]
        sentences = []
        while words:
            length = draw.randint(6, 14)
            sentence, words = words[:length], words[length:]
            sentences.append(" ".join(sentence).capitalize() + ".")
        text = " ".join(sentences)
        least, most = schema.get("minLength", 0), schema.get("maxLength", len(text))
        return (text if len(text) >= least else text.ljust(least, "."))[: max(least, most)]
