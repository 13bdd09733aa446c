"""The request body of a chat completion; `reply_reader` reads the replies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from microbatch.transports.capabilities import Rung
from microbatch.transports.lenient import as_object, is_array

if TYPE_CHECKING:
    from collections.abc import Mapping

    from microbatch.protocols import ChatCall
    from microbatch.transports.capabilities import Plan

# Fields whose replies hold more than one text; only the JSON body of a reply that is not streamed carries it all.
_MORE_THAN_TEXT: Final = ("tools", "functions", "logprobs", "top_logprobs", "modalities", "audio")


def can_stream(call: ChatCall) -> bool:
    """Return whether the reply to *call* can hold nothing but one text."""
    params = call.params
    return params.get("n") in (None, 1) and not any(params.get(name) for name in _MORE_THAN_TEXT)


def compose(call: ChatCall, model: str, plan: Plan) -> dict[str, Any]:
    """Return the request body of one attempt, without what the endpoint does not support according to *plan*."""
    messages: list[Mapping[str, Any]] = list(call.messages)
    body: dict[str, Any] = {"model": model, "messages": messages, **call.params}
    if "temperature" not in plan.sent:
        body.pop("temperature", None)
    for name in ("max_tokens", "max_completion_tokens"):
        if name in plan.sent:
            body[name] = call.max_tokens if plan.bound is None else plan.bound
    if plan.rung is Rung.JSON_SCHEMA:
        named = {"name": "answers", "strict": call.strict, "schema": call.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    elif plan.rung is not None:
        if call.hint is not None:
            messages.insert(max(0, len(messages) - 1), {"role": "system", "content": call.hint})
        if plan.rung is Rung.JSON_OBJECT and _mentions_json(messages):
            body["response_format"] = {"type": "json_object"}
    if "stream" in plan.sent:
        body["stream"] = plan.stream
    if "stream_options" in plan.sent:
        body["stream_options"] = {"include_usage": True}
    return body


def _joined(content: Any) -> str:
    """Return content that may come in parts as one text, without parts that are no text."""
    if not is_array(content):
        return content if isinstance(content, str) else ""
    parts = [as_object(part) for part in content]
    texts = [part.get("text") for part in parts if part.get("type", "text") == "text"]
    return "".join(text for text in texts if isinstance(text, str))


def _mentions_json(messages: list[Mapping[str, Any]]) -> bool:
    # OpenAI and DeepSeek answer json_object with a 400 unless the word is somewhere in the messages.
    return any("json" in _joined(message.get("content")).lower() for message in messages)
