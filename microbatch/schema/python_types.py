"""Python types: their strict schema and their reader, from msgspec, or from pydantic for types that contain pydantic's."""

from __future__ import annotations

import enum
import importlib
import sys
import typing
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import msgspec

from microbatch.errors import ConfigError
from microbatch.schema.decode import Unfit
from microbatch.schema.strict import to_strict
from microbatch.schema.traverse import Schema, nodes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from microbatch.schema.decode import Reader


def type_name(output_type: Any) -> str:
    """Name the type without the `repr` of an instance, which may hold anything."""
    if isinstance(output_type, type):
        return output_type.__qualname__
    return repr(output_type) if is_type_like(output_type) else f"an instance of {type(output_type).__qualname__}"


def is_type_like(output_type: Any) -> bool:
    """Return whether *output_type* is a class or a form of `typing`."""
    return (
        isinstance(output_type, type)
        or get_origin(output_type) is not None
        or type(output_type).__module__ in {"typing", "typing_extensions"}
    )


def unusable(output_type: Any, error: BaseException | None) -> ConfigError:
    """Return *error*, raised while *output_type* was compiled, as a `ConfigError` that names the type."""
    if isinstance(error, ConfigError):
        return ConfigError(f"output_type {type_name(output_type)} {error}")
    # msgspec states the problem in the last line; the lines before describe options of its own.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = lines[-1] if isinstance(error, TypeError) else lines[0]
    return ConfigError(f"output_type {type_name(output_type)} cannot be used: {reason}")


def compile_type(output_type: Any) -> tuple[Schema, Reader]:
    """Return the schema of *output_type*, as from `to_strict`, and a reader of its JSON.

    Raises:
        ConfigError: The type cannot be expressed in the strict subset.
        BaseException: An error of the type's library, for a type that has no JSON form.
    """
    parts = list(_reached(output_type))
    # A caller that uses pydantic has imported it, so it is never imported here.
    if "pydantic" in sys.modules and any(map(_is_pydantic, parts)):
        schema, read = _with_pydantic(output_type)
        return to_strict(schema), read
    schema, read = _with_msgspec(output_type)
    return to_strict(schema, _choices(parts)), read


def _with_msgspec(output_type: Any) -> tuple[Schema, Reader]:
    try:
        (schema,), shared = msgspec.json.schema_components((output_type,), ref_template="#/$defs/{name}")
    except KeyError as error:
        raise ConfigError(f"cannot be used: it holds two types that are both named {error}") from error
    return {**schema, "$defs": shared}, msgspec.json.Decoder(output_type).decode


def _with_pydantic(output_type: Any) -> tuple[Schema, Reader]:
    pydantic = sys.modules["pydantic"]
    adapter = pydantic.TypeAdapter(output_type)
    # Defaults are dropped, so one that is not JSON is nothing to warn of.
    ignored = {"ignored_warning_kinds": {"skipped-choice", "non-serializable-default"}}
    quiet = type("Quiet", (importlib.import_module("pydantic.json_schema").GenerateJsonSchema,), ignored)
    schema = adapter.json_schema(mode="validation", schema_generator=quiet)
    names: set[str] = {name for node in nodes(schema) for name in node.get("properties", ())}

    def read(raw: str) -> Any:
        try:
            return adapter.validate_json(raw)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            # A location may hold keys that the model invented, and messages may quote the answer.
            path = "".join(
                f"[{at}]" if isinstance(at, int) else f".{at}" if at in names else "[...]" for at in first["loc"]
            )
            cause = first.get("ctx", {}).get("error")
            raise Unfit(f"${path}: {first['type']}") from cause if isinstance(cause, Exception) else None

    return schema, read


def _reached(output_type: Any) -> Iterator[Any]:
    """Yield the type and, recursively, the types of its arguments, metadata and fields, each once."""
    seen: dict[int, Any] = {}  # holds the objects, so that no id is given out twice
    stack = [output_type]
    while stack:
        part = stack.pop()
        if id(part) in seen:
            continue
        seen[id(part)] = part
        yield part
        origin = get_origin(part)
        if origin is None:
            stack += [] if _is_pydantic(part) else _fields(part)
        elif origin is not Literal:
            stack += (origin, *get_args(part))


def _fields(part: Any) -> list[Any]:
    if isinstance(part, type):
        try:
            return list(typing.get_type_hints(part, include_extras=True).values())
        except Exception:  # noqa: BLE001 - an unresolvable name is reported by the library that needs it
            return []
    # NewType and the aliases of `type X = ...`
    return [getattr(part, name) for name in ("__supertype__", "__value__") if hasattr(part, name)]


def _is_pydantic(part: Any) -> bool:
    kind = part if isinstance(part, type) else type(part)
    home = str(kind.__module__).partition(".")[0]
    return home == "pydantic" or (
        kind is part and (hasattr(part, "__get_pydantic_core_schema__") or hasattr(part, "__pydantic_validator__"))
    )


def _choices(parts: list[Any]) -> Iterator[list[Any]]:
    """Yield the choices in *parts* in the order in which they were written; msgspec sorts them."""
    for part in parts:
        if get_origin(part) is Literal:
            yield list(get_args(part))
        elif isinstance(part, enum.EnumMeta):
            yield list(part._value2member_map_)
