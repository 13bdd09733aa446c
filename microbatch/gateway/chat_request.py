"""Reads chat completion requests: the headers that control them, and the body."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, get_args

import msgspec

from microbatch.batching.request import check_messages, read_messages, read_options
from microbatch.errors import ConfigError
from microbatch.gateway.errors import GatewayError
from microbatch.gateway.json_faults import json_fault
from microbatch.messages import Priority, UseCache
from microbatch.openai.chat_completion import submit_arguments
from microbatch.prompt.parameters import HARMLESS
from microbatch.transports.lenient import as_object, decode

if TYPE_CHECKING:
    from collections.abc import Collection

    from aiohttp import web

_CONTROLS: Final = {
    "X-Microbatch-Priority": ("normal", get_args(Priority)),
    "X-Microbatch-Cache": ("yes", ("yes", "no", "refresh")),
    "X-Microbatch-Batch": ("yes", ("yes", "no")),
}
"""Headers, their defaults, and the words that they may have."""

_USE_CACHE: Final[dict[str, UseCache]] = {"yes": True, "no": False, "refresh": "refresh"}


class ChatRequest(msgspec.Struct, frozen=True):
    """A client's request for a chat completion.

    Attributes:
        body: What is sent if it is relayed.
        model: The model to ask: that of the body, else the gateway's; "" if the body has something else than a string.
        arguments: The body's fields as arguments of `submit`; None for a request that is relayed, because it cannot be combined, or
            because only the endpoint can judge a field of it.
        stream: Whether the answer is sent as events.
        include_usage: Whether the last event holds the usage.
        typed: Whether it has a schema for its answer, and no tool for it.
        alone: Names of the fields that keep it out of combined prompts, as in `Stats.alone_by_field`.
    """

    body: bytes
    model: str
    arguments: dict[str, Any] | None = None
    stream: bool = False
    include_usage: bool = False
    typed: bool = False
    alone: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Return the shape, without text."""
        return f"ChatRequest(stream={self.stream}, relayed={self.arguments is None})"


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
    return {"priority": priority, "use_cache": _USE_CACHE[cache]}, batch == "yes"


def read_chat_request(raw: bytes, *, model: str | None, harmless: Collection[str] = HARMLESS) -> ChatRequest:
    """Return the request in the body *raw*; *model* is the one for requests that name none, *harmless* parameters are combined.

    Raises:
        GatewayError: The body is no JSON object, or there is no model.
    """
    body, readable = _json_object(raw)
    asked = body.get("model") or model
    if not asked:
        raise GatewayError(400, "you must provide a model parameter", code="missing_model", param="model")
    named = asked if isinstance(asked, str) else ""
    relayed = ChatRequest(raw if body.get("model") else msgspec.json.encode({**body, "model": asked}), named)
    stream, options = body.pop("stream", None), body.pop("stream_options", None)
    include_usage = as_object(options).get("include_usage")
    if not (readable and _is_flag(stream) and _is_flag(include_usage) and isinstance(options, dict | None)):
        return relayed
    arguments = submit_arguments(body)
    messages = arguments["messages"]
    limit, temperature, params = arguments["max_tokens"], arguments["temperature"], arguments["params"]
    try:
        check_messages(messages)
        read = read_options(str, arguments["model"], limit, temperature, params, None, None, "normal", harmless)
        alone = read.alone
        if not alone and isinstance(found := read_messages(messages, read), str):
            alone = (found,)
        if alone:
            return msgspec.structs.replace(relayed, alone=alone)
    except ConfigError:
        return relayed  # the endpoint says what is wrong with it, or takes it
    streamed, typed = bool(stream), not read.answer.is_text and read.answer.form is None
    return ChatRequest(raw, named, arguments, streamed, streamed and bool(include_usage), typed)


def _json_object(raw: bytes) -> tuple[dict[str, Any], bool]:
    """Return the object in *raw*, and whether all of its values can be kept."""
    readable = True
    try:
        try:
            body = msgspec.json.decode(raw)
        except msgspec.ValidationError:
            # A number beyond the range of floats, which only the endpoint can judge.
            body, readable = decode(raw, number=float), False
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise GatewayError(400, f"The body is no JSON: {json_fault(raw)}.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise GatewayError(
            400, f"The body must be a JSON object, and is of type {type(body).__name__}.", code="invalid_json"
        )
    return as_object(body), readable


def _is_flag(value: object) -> bool:
    return value is None or isinstance(value, bool)
