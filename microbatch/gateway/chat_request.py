"""Reads the body of a chat completion: what goes to `submit`, and whether it may."""

from __future__ import annotations

from typing import Any

import msgspec

from microbatch.batching.request import OURS, check_messages, read_messages, read_options
from microbatch.gateway.errors import Refusal
from microbatch.transports.lenient import as_object


class Asked(msgspec.Struct, frozen=True):
    """A chat completion that a client asks for.

    Attributes:
        messages: The chat messages.
        model: The model it names, or None.
        max_tokens: Under either name.
        temperature: As given.
        params: All other fields.
        stream: Whether the answer is wanted as events.
        include_usage: Whether the last event is to tell the usage.
        combinable: Whether it may share a prompt; if not, its answer may be more than a text.
        typed: Whether it brings a schema for its answer.
    """

    messages: list[dict[str, Any]]
    model: str | None
    max_tokens: int | None
    temperature: float | None
    params: dict[str, Any]
    stream: bool
    include_usage: bool
    combinable: bool
    typed: bool

    @property
    def relayed(self) -> bool:
        """Whether only the endpoint's own bytes will do: events that carry more than text, or tool calls in place of JSON."""
        return not self.combinable and (self.stream or self.typed)

    def __repr__(self) -> str:
        """Tell the shape, never the words."""
        return f"Asked(messages=<{len(self.messages)}>, stream={self.stream}, combinable={self.combinable})"


def read_asked(raw: bytes, *, model: str | None) -> Asked:
    """Return what *raw* asks for.

    Args:
        raw: The body of the request.
        model: The model for those who name none, or None.

    Raises:
        Refusal: It is no JSON object, or names no model.
        ConfigError: A field is wrong.
    """
    body = _json_object(raw)
    stream = _flag(body.get("stream"), "stream")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise Refusal(400, "stream_options must be an object.", code="invalid_type", param="stream_options")
    if not (body.get("model") or model):
        raise Refusal(400, "you must provide a model parameter", code="missing_model", param="model")
    messages: Any = body.get("messages")
    check_messages(messages)
    limit = body.get("max_completion_tokens")
    limit = body.get("max_tokens") if limit is None else limit
    params = {name: value for name, value in body.items() if name not in OURS}
    temperature = body.get("temperature")
    read = read_options(str, body.get("model"), limit, temperature, params, None, None, "normal")
    return Asked(
        messages,
        body.get("model"),
        limit,
        temperature,
        params,
        stream,
        stream and _flag(as_object(options).get("include_usage"), "stream_options.include_usage"),
        combinable=read.combinable and read_messages(messages, read) is not None,
        typed=not read.answer.is_text,
    )


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise Refusal(400, "The body must be a JSON object.", code="invalid_json")
    return as_object(body)


def _flag(value: object, name: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise Refusal(400, f"{name} must be true or false.", code="invalid_type", param=name)
    return bool(value)
