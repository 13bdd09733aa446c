"""Reads chat completion requests: the headers that control them, and the body."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, get_args

import msgspec

from microbatch.batching.request import check_messages, read_messages, read_options
from microbatch.gateway.errors import GatewayError
from microbatch.messages import Priority
from microbatch.openai.chat_completion import submit_arguments
from microbatch.prompt.parameters import HARMLESS
from microbatch.transports.lenient import as_object

if TYPE_CHECKING:
    from collections.abc import Collection

    from aiohttp import web

_CONTROLS: Final = {
    "X-Microbatch-Priority": ("normal", get_args(Priority)),
    "X-Microbatch-Cache": ("yes", ("yes", "no")),
    "X-Microbatch-Batch": ("yes", ("yes", "no")),
}
"""Headers, their defaults, and the words that they may have."""


class ChatRequest(msgspec.Struct, frozen=True):
    """A client's request for a chat completion.

    Attributes:
        arguments: What the body says as arguments of `submit`.
        model: The model to ask: that of the body, else the gateway's.
        stream: Whether the answer is sent as events.
        include_usage: Whether the last event holds the usage.
        typed: Whether it has a schema for its answer.
        relayed: Whether only the endpoint's own bytes can answer: events that hold more than text, or tool calls in place of JSON.
        alone: What keeps it out of combined prompts, as in `Stats.alone_by_field`.
    """

    arguments: dict[str, Any]
    model: str
    stream: bool
    include_usage: bool
    typed: bool
    relayed: bool
    alone: tuple[str, ...]

    def __repr__(self) -> str:
        """Return the shape, without text."""
        return f"ChatRequest(stream={self.stream}, relayed={self.relayed})"


def read_control_headers(request: web.Request) -> tuple[dict[str, Any], bool]:
    """Return the arguments of `submit` that the headers of *request* stand for, and whether it may be combined; if not, it is relayed.

    Raises:
        GatewayError: A header has an unknown value.
    """
    words: list[str] = []
    for name, (default, known) in _CONTROLS.items():
        word = request.headers.get(name, default).strip().lower()
        if word not in known:
            raise GatewayError(400, f"The header {name} must be one of {', '.join(known)}.", code="invalid_header")
        words.append(word)
    priority, cache, batch = words
    return {"priority": priority, "use_cache": cache == "yes"}, batch == "yes"


def read_chat_request(raw: bytes, *, model: str | None, harmless: Collection[str] = HARMLESS) -> ChatRequest:
    """Return the request in the body *raw*; *model* is the one for requests that name none, *harmless* parameters are combined.

    Raises:
        GatewayError: The body is no JSON object, or there is no model.
        ConfigError: A field is wrong.
    """
    body = _json_object(raw)
    stream = _flag(body.pop("stream", None), "stream")
    options = body.pop("stream_options", None)
    if options is not None and not isinstance(options, dict):
        raise GatewayError(400, "stream_options must be an object.", code="invalid_type", param="stream_options")
    asked = body.get("model") or model
    if not asked:
        raise GatewayError(400, "you must provide a model parameter", code="missing_model", param="model")
    arguments = submit_arguments(body)
    messages = arguments["messages"]
    check_messages(messages)
    limit, temperature, params = arguments["max_tokens"], arguments["temperature"], arguments["params"]
    read = read_options(str, arguments["model"], limit, temperature, params, None, None, "normal", harmless)
    typed = not read.answer.is_text
    alone = read.alone
    if not alone and isinstance(found := read_messages(messages, read), str):
        alone = (found,)
    include_usage = stream and _flag(as_object(options).get("include_usage"), "stream_options.include_usage")
    return ChatRequest(arguments, asked, stream, include_usage, typed, bool(alone) and (stream or typed), alone)


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise GatewayError(400, "The body must be a JSON object.", code="invalid_json")
    return as_object(body)


def _flag(value: object, name: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise GatewayError(400, f"{name} must be true or false.", code="invalid_type", param=name)
    return bool(value)
