"""OpenAI's `response_format`: its schema, and a reader that checks answers against it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.errors import ConfigError
from microbatch.schema.decode import Unfit
from microbatch.schema.traverse import Schema, refs
from microbatch.schema.validate import WELL_FORMED, misfit_in, resolve

if TYPE_CHECKING:
    from microbatch.schema.decode import Reader


def given_schema(response_format: Any) -> tuple[bytes, bool]:
    """Return the schema in *response_format* as JSON, and whether it may be enforced strictly.

    Only `"strict": false` forbids that. For OpenAI a missing `strict` means false too, but enforcing costs nothing: an endpoint that
    refuses a schema is asked again without it.

    Raises:
        ConfigError: *response_format* holds no schema, or one that is not JSON.
    """
    given = _member(response_format, "response_format")
    if given.get("type") != "json_schema":
        raise ConfigError('response_format must have the type "json_schema" to become an answer schema')
    named = _member(given.get("json_schema"), "response_format.json_schema")
    strict = named.get("strict")
    if not isinstance(named.get("name", ""), str) or not isinstance(strict, bool | None):
        raise ConfigError("response_format.json_schema: name must be a string and strict true or false")
    schema = dict(_member(named.get("schema"), "response_format.json_schema.schema"))
    try:
        return msgspec.json.encode(schema), strict is not False
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"response_format.json_schema.schema is not JSON: {error}") from error


def _member(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a JSON object, got {type(value).__name__}")
    return value


def compile_given(encoded: bytes) -> tuple[Schema, Reader]:
    """Return the schema in *encoded*, and a reader that returns JSON unchanged if it fits the schema.

    Raises:
        ConfigError: The schema is malformed, or has a reference that leads nowhere.
    """
    schema: Schema = msgspec.json.decode(encoded)  # a copy, since the caller may change its dicts later
    reason = misfit_in(encoded, WELL_FORMED)
    if reason is not None:
        raise ConfigError(f"response_format.json_schema.schema is malformed at {reason}")
    for ref in refs(schema):
        try:
            if ref == "#" or ref.startswith("#/"):
                resolve(ref, schema)
        except LookupError:
            raise ConfigError(f"response_format.json_schema.schema refers to {ref}, which is not in it") from None

    def read(raw: str) -> str:
        if (reason := misfit_in(raw, schema)) is not None:
            raise Unfit(reason)
        return raw

    return schema, read
