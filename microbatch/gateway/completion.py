"""Answers of the gateway: chat completions, and the events of a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.errors import Filtered, MicrobatchError, Refused, RequestFailed, TruncatedReply
from microbatch.messages import Usage
from microbatch.openai.chat_completion import (
    completion_object,
    completion_of,
    first_choice,
    first_message,
    usage_object,
)
from microbatch.transports.lenient import as_object

if TYPE_CHECKING:
    from collections.abc import Iterator

    from microbatch.gateway.chat_request import ChatRequest
    from microbatch.messages import Reply

DONE: Final = b"data: [DONE]\n\n"
_OF_A_DELTA: Final = ("role", "content", "refusal")
_ALREADY_PAID: Final = frozenset({"cache", "shared"})
"""Routes of answers whose calls another request has paid for."""

encode: Final = msgspec.json.Encoder().encode


def completion_for(request: ChatRequest, reply: Reply[str]) -> dict[str, Any]:
    """Return the completion to send: the endpoint's own if the request was sent alone, else one of the same shape.

    The endpoint's content is replaced by the reply's text where it may have a code fence or an object around the requested JSON, and
    where it is a list of parts but events need text. Its usage is replaced where several calls carried the request.
    """
    body = reply.body
    if body is None:
        return completion_of(reply, request.model)
    completion = dict(body)
    in_parts = request.stream and not isinstance(first_message(body).get("content"), str)
    if (request.typed or in_parts) and (first := first_choice(body)):
        message = {**first_message(body), "content": reply.text}
        completion["choices"] = [{**first, "message": message}, *body["choices"][1:]]
    usage, reported = reply.usage, as_object(body.get("usage"))
    if reply.route in _ALREADY_PAID:
        completion["usage"] = usage_object(usage)
    elif not usage.estimated and reported.get("prompt_tokens", usage.prompt_tokens) != usage.prompt_tokens:
        # Only prompts are compared: endpoints differ in what they count as completion and total.
        completion["usage"] = {**reported, **_with_details(usage_object(usage), reported)}
    return completion


def completion_despite(error: MicrobatchError, model: str | None) -> dict[str, Any] | None:
    """Return the completion that an endpoint would have sent where microbatch has an error, or None if clients get an error, too.

    Refusals, filtered and truncated answers have status 200; clients tell them by their fields.
    """
    match error:
        case Refused():
            made = completion_object(None, model=model, refusal=error.raw or str(error))
        case TruncatedReply():
            made = completion_object(error.raw, model=model, finish_reason="length")
        case Filtered() if error.status < 400:  # noqa: PLR2004 (the first class of HTTP's errors)
            made = completion_object(None, model=model, finish_reason="content_filter")
        case _:
            return None
    own = error.completion if isinstance(error, RequestFailed) else None
    return made if own is None else dict(own)


def encode_events(completion: dict[str, Any], *, include_usage: bool) -> bytes:
    """Return a completion as the events of a stream, without the usage and the end mark."""
    return b"".join(map(_event, _chunks(completion, include_usage=include_usage)))


def encode_usage_event(completion: dict[str, Any], usage: Usage | None = None) -> bytes:
    """Return the event that holds the usage: *usage* if it became known later, else the completion's."""
    known = completion.get("usage") if usage is None else usage_object(usage)
    return _event({**_head(completion), "choices": [], "usage": known or usage_object(Usage(estimated=True))})


def _chunks(completion: dict[str, Any], *, include_usage: bool) -> Iterator[dict[str, Any]]:
    message = first_message(completion)
    content, refusal = message.get("content"), message.get("refusal")
    # As OpenAI does: with include_usage, every chunk has the field, and it is null in all but the last one.
    rest: dict[str, Any] = {"usage": None} if include_usage else {}
    deltas: list[tuple[dict[str, Any], str | None]] = [
        ({"role": "assistant", "content": "" if refusal is None else None, "refusal": None}, None)
    ]
    # Further members that endpoints send: reasoning, citations.
    further = {name: value for name, value in message.items() if name not in _OF_A_DELTA and value}
    deltas += [(part, None) for part in (further, {"content": content}, {"refusal": refusal}) if any(part.values())]
    deltas.append(({}, first_choice(completion).get("finish_reason")))
    for delta, reason in deltas:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        yield {**_head(completion), "choices": [choice], **rest}


def _head(completion: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in completion.items() if name not in ("choices", "usage")}
    return {**kept, "object": "chat.completion.chunk"}


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + encode(chunk) + b"\n\n"


def _with_details(usage: dict[str, Any], reported: dict[str, Any]) -> dict[str, Any]:
    """Return *usage* with the details that only *reported* has."""
    return {
        name: {**as_object(reported.get(name)), **value} if isinstance(value, dict) else value
        for name, value in usage.items()
    }
