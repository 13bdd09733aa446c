"""Options of the SDK's calls: those that are given, and the request body that they make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from microbatch.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

OF_SUBMIT: Final = ("timeout", "tenant", "priority", "use_cache", "ttl")
_OF_SDK: Final = ("extra_headers", "extra_body", "extra_query")


def is_given(value: object) -> bool:
    """Return whether *value* is given: it is neither None nor one of the SDK's own "not given" values, which is not imported."""
    kind = type(value)
    return value is not None and not (
        kind.__name__ in ("NotGiven", "Omit") and kind.__module__.partition(".")[0] == "openai"
    )


def given_options(defaults: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are given, by the caller or as *defaults*."""
    given = {**defaults, **{name: value for name, value in options.items() if is_given(value)}}
    headers = {**defaults.get("extra_headers", {}), **given.get("extra_headers", {})}
    given["extra_headers"] = {name: value for name, value in headers.items() if is_given(value)} or None
    timeout = given.get("timeout")
    given["timeout"] = getattr(timeout, "read", timeout)  # of an `httpx.Timeout`
    return given


def request_body(options: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """Return the request body: *fields* and the fields among *options*, overridden by `extra_body`, as in the SDK.

    Raises:
        ConfigError: There is an `extra_query`.
    """
    if is_given(options.get("extra_query")):
        raise ConfigError("extra_query belongs to the endpoint: pass OpenAIChat(query=...)")
    fields |= {name: value for name, value in options.items() if name not in (*OF_SUBMIT, *_OF_SDK)}
    return {name: value for name, value in fields.items() if is_given(value)} | dict(options.get("extra_body") or {})
