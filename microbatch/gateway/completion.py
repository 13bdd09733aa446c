"""An answer in the endpoint's own shapes: as a chat completion, and as the events of a stream."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.errors import Filtered, MicrobatchError, Refused, StatusError, TruncatedReply
from microbatch.messages import Usage
from microbatch.transports.lenient import as_object, is_array

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from microbatch.messages import Reply

DONE: Final = b"data: [DONE]\n\n"

_OF_A_DELTA: Final = ("role", "content", "refusal")
_encode = msgspec.json.Encoder().encode


class Said(msgspec.Struct, frozen=True):
    """What the model said to one request.

    Attributes:
        content: Its answer, or None.
        finish_reason: Why it stopped.
        refusal: Its words for declining, or None.
    """

    content: str | None
    finish_reason: str = "stop"
    refusal: str | None = None

    def __repr__(self) -> str:
        """Tell how it ended, never the words."""
        return f"Said(finish_reason={self.finish_reason!r})"


def said_in(reply: Reply[str]) -> Said:
    """Return what *reply* says. One from a combined prompt may be there before its call has ended, but is complete."""
    return Said(reply.text, reply.finish_reason or "stop")


def said_despite(error: MicrobatchError) -> Said | None:
    """Return what an endpoint would have answered where microbatch has an error, or None where that is one to a client, too.

    A refusal, a filtered and a cut-off answer come with status 200, and clients tell them by their fields.
    """
    match error:
        case Refused():
            return Said(None, refusal=error.raw or str(error))
        case TruncatedReply():
            return Said(error.raw, "length")
        case Filtered() if not _is_an_error(error):
            return Said(None, "content_filter")
        case _:
            return None


def _is_an_error(error: StatusError) -> bool:
    return error.status >= 400  # noqa: PLR2004 (the first class of HTTP's errors)


def usage_object(usage: Usage) -> dict[str, Any]:
    """Return OpenAI's `usage`, with a mark on estimates."""
    told: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    if usage.reasoning_tokens:
        told["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    if usage.estimated:
        told["microbatch_estimated"] = True
    return told


def made(said: Said, model: str | None, usage: Usage | None) -> dict[str, Any]:
    """Return a chat completion that holds what was said, for an answer that was part of a combined one or was kept.

    Args:
        said: What the model said.
        model: The model that said it.
        usage: What it cost; None where that is not known.
    """
    message = {"role": "assistant", "content": said.content, "refusal": said.refusal}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),  # noqa: TID251 the field is a date
        "model": model or "",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": said.finish_reason}],
        "usage": None if usage is None else usage_object(usage),
    }


def as_it_came(body: Mapping[str, Any], *, content: str | None = None, usage: Usage | None = None) -> dict[str, Any]:
    """Return the endpoint's own answer to a request that went alone.

    Args:
        body: The endpoint's JSON, which is not changed.
        content: What stands in place of the content of its first choice: the JSON that was asked for, where the endpoint had a fence
            or an object around it. None leaves the content.
        usage: What the request cost, where several calls carried it; the details that the endpoint gives of this one are kept. None,
            or an estimate, leaves the endpoint's figures.
    """
    whole = dict(body)
    if content is not None and (first := _first_choice(body)):
        whole["choices"] = [{**first, "message": {**first_message(body), "content": content}}, *body["choices"][1:]]
    reported = as_object(whole.get("usage"))
    # Every call has a prompt; endpoints differ in what they count as completion and total.
    if (
        usage is not None
        and not usage.estimated
        and reported.get("prompt_tokens", usage.prompt_tokens) != usage.prompt_tokens
    ):
        whole["usage"] = {**reported, **_beside(reported, usage_object(usage))}
    return whole


def first_message(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message of a completion's first choice; empty if there is none."""
    return as_object(_first_choice(body).get("message"))


def _first_choice(body: Mapping[str, Any]) -> dict[str, Any]:
    choices = body.get("choices")
    return as_object(choices[0]) if is_array(choices) and choices else {}


def _beside(reported: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures that are *told*, each with the details that were *reported* and it lacks."""
    return {
        name: {**as_object(reported.get(name)), **value} if isinstance(value, dict) else value
        for name, value in told.items()
    }


class Answer:
    """One answer, and the forms it can be sent in.

    Args:
        completion: The chat completion.
    """

    def __init__(self, completion: dict[str, Any]) -> None:
        self._completion = completion
        self._head = {name: value for name, value in completion.items() if name not in ("choices", "usage")}
        self._head["object"] = "chat.completion.chunk"

    def whole(self) -> bytes:
        """Return the chat completion."""
        return _encode(self._completion)

    def events(self, *, include_usage: bool) -> bytes:
        """Return the events of a stream, but for the usage and the end mark."""
        return b"".join(map(_event, self._chunks(include_usage=include_usage)))

    def usage_event(self, usage: Usage | None = None) -> bytes:
        """Return the event that tells the usage: *usage* if it has become known since, else that of the completion."""
        told = self._completion.get("usage") if usage is None else usage_object(usage)
        return _event({**self._head, "choices": [], "usage": told or usage_object(Usage(estimated=True))})

    def _chunks(self, *, include_usage: bool) -> Iterator[dict[str, Any]]:
        message = first_message(self._completion)
        content, refusal = message.get("content"), message.get("refusal")
        # As OpenAI does: with include_usage, every chunk has the field, and only the last one has something in it.
        rest: dict[str, Any] = {"usage": None} if include_usage else {}
        deltas: list[tuple[dict[str, Any], str | None]] = [
            ({"role": "assistant", "content": "" if refusal is None else None, "refusal": None}, None)
        ]
        # What endpoints have beside it: a model's thoughts, its sources.
        beside = {name: value for name, value in message.items() if name not in _OF_A_DELTA and value}
        deltas += [(part, None) for part in (beside, {"content": content}, {"refusal": refusal}) if any(part.values())]
        deltas.append(({}, _first_choice(self._completion).get("finish_reason")))
        for delta, reason in deltas:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            yield {**self._head, "choices": [choice], **rest}


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + _encode(chunk) + b"\n\n"
