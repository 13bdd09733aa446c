"""The bytes and objects of OpenAI's chat completions, made from a simulated reply."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.testing.quota import go_duration, milliseconds

if TYPE_CHECKING:
    from microbatch.messages import Limits, Usage
    from microbatch.testing.reading import EndpointError
    from microbatch.testing.reply import SimulatedReply

# Constant, so that two runs give the same bytes.
CREATED = 1_700_000_000

DONE = b"data: [DONE]\n\n"


def request_id(number: int) -> str:
    """Return the endpoint's id of its request *number*."""
    return f"req_{number:08d}"


def usage_object(usage: Usage) -> dict[str, Any]:
    """Return *usage* as the wire has it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def completion_object(reply: SimulatedReply, number: int, model: str) -> dict[str, Any]:
    """Return the body of a call that is not streamed."""
    text = reply.pieces.text
    message = {
        "role": "assistant",
        "content": None if reply.refusal else text,
        "refusal": text if reply.refusal else None,
    }
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": CREATED,
        "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": reply.finish_reason}],
        "usage": usage_object(reply.usage),
    }


def error_object(error: EndpointError) -> dict[str, Any]:
    """Return the body of an error response."""
    return {"error": error.error}


def limit_headers(limits: Limits | None) -> dict[str, str]:
    """Return the x-ratelimit headers that say *limits*; none for a dimension without a limit."""
    headers: dict[str, str] = {}
    if limits is None:
        return headers
    for kind in ("requests", "tokens"):
        if getattr(limits, f"limit_{kind}") is not None:
            headers[f"x-ratelimit-limit-{kind}"] = str(getattr(limits, f"limit_{kind}"))
            headers[f"x-ratelimit-remaining-{kind}"] = str(getattr(limits, f"remaining_{kind}"))
            headers[f"x-ratelimit-reset-{kind}"] = go_duration(getattr(limits, f"reset_{kind}"))
    return headers


def wait_headers(error: EndpointError) -> dict[str, str]:
    """Return the headers that say when to try again, if *error* does."""
    wait = error.retry_after
    if wait is None:
        return {}
    if not math.isfinite(wait):  # a fault may say anything
        return {"retry-after": str(wait)}
    return {"retry-after": f"{milliseconds(wait) / 1_000:g}", "retry-after-ms": str(milliseconds(wait))}


class Events:
    """The server-sent events of one streamed reply.

    Args:
        reply: What is streamed.
        number: The request's number.
        model: The name the client asked for.
        include_usage: Whether usage is reported at the end.
    """

    def __init__(self, reply: SimulatedReply, number: int, model: str, *, include_usage: bool) -> None:
        self._reply = reply
        self._include_usage = include_usage
        named = msgspec.json.encode(
            {"id": f"chatcmpl-{number}", "object": "chat.completion.chunk", "created": CREATED, "model": model}
        )
        self._start = b"data: " + named[:-1] + b',"choices":['
        # With include_usage every chunk has the field, null but for the last.
        self._end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def head(self) -> bytes:
        """Return the first event, which names the role."""
        content = None if self._reply.refusal else ""
        return self._choice({"role": "assistant", "content": content, "refusal": None}, None)

    def pieces(self, start: int, end: int) -> bytes:
        """Return the events of some of the reply's pieces, one each."""
        # Thousands of these a second: all but the piece is made once.
        before = self._start + b'{"index":0,"delta":{"' + (b"refusal" if self._reply.refusal else b"content") + b'":'
        after = b'},"finish_reason":null}' + self._end
        return b"".join([before + msgspec.json.encode(text) + after for text in self._reply.pieces.texts[start:end]])

    def tail(self) -> bytes:
        """Return the last events: why the model stopped, the usage, and the mark of the end."""
        events = self._choice({}, self._reply.finish_reason)
        if self._include_usage:
            usage = msgspec.json.encode(usage_object(self._reply.usage))
            events += self._start + b'],"usage":' + usage + b"}\n\n"
        return events + DONE

    def _choice(self, delta: dict[str, Any], finish_reason: str | None) -> bytes:
        choice = msgspec.json.encode({"index": 0, "delta": delta, "finish_reason": finish_reason})
        return self._start + choice + self._end
