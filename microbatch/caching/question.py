"""The parts of a request that cannot change its answer, which keys of cached answers leave out, and the one form of its numbers.

A name is listed here only if every endpoint that knows it answers alike whatever its value. Who may see an answer is not decided here:
tenants and credentials are always part of a key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from microbatch.schema.asked_form import FIELDS

if TYPE_CHECKING:
    from collections.abc import Mapping

IGNORED_FIELDS: Final = frozenset({
    # who asks, and what is recorded
    "user", "safety_identifier", "metadata", "session_id", "store",
    # how the endpoint keeps prompts, and when it answers, at what price
    "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "service_tier", "keep_alive",
})  # fmt: skip
"""Request fields that say who asks, or how the call is handled and recorded."""

IGNORED_HEADERS: Final = frozenset({
    *("traceparent", "tracestate", "b3", "sentry-trace", "uber-trace-id", "elastic-apm-traceparent", "newrelic"),
    *("x-trace-id", "x-span-id", "x-amzn-trace-id", "x-cloud-trace-context", "grpc-trace-bin"),
    *("request-id", "x-request-id", "x-client-request-id", "x-ms-client-request-id"),
    *("correlation-id", "x-correlation-id", "idempotency-key", "x-idempotency-key"),
    "user-agent",
})  # fmt: skip
"""Headers, in lower case, that name a call or the program that makes it."""

IGNORED_PREFIXES: Final = ("x-b3-", "x-datadog-", "x-stainless-")
"""Beginnings of further such headers."""

_EXACT: Final = 2**53
"""Up to here every whole number is a float as well."""


def asked_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the request's *fields* that can change its answer, with equal numbers in one form.

    The schemas of tools stay as they are written: a model reads them as text.
    """
    asked = {
        name: value if name in FIELDS else _with_plain_numbers(value)
        for name, value in fields.items()
        if name not in IGNORED_FIELDS
    }
    temperature = asked.get("temperature")
    if isinstance(temperature, int) and abs(temperature) <= _EXACT:
        asked["temperature"] = float(
            temperature
        )  # the form that most earlier entries have: the command line reads a float
    return asked


def asked_headers(headers: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Return those of the *headers*, names in lower case and values, that can change an answer or say who may see it."""
    return tuple(
        (name, value)
        for name, value in headers
        if name not in IGNORED_HEADERS and not name.startswith(IGNORED_PREFIXES)
    )


def _with_plain_numbers(value: Any) -> Any:
    """Return a copy of *value*, in which a float that is a whole number, like 0.0 or -0.0, is an int."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) <= _EXACT else value
    if isinstance(value, dict):
        return {name: _with_plain_numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_plain_numbers(each) for each in value]
    return value
