"""An answer in the endpoint's own shapes: as a chat completion, and as the events of a stream."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.errors import Filtered, MicrobatchError, Refused, StatusError, TruncatedReply
from microbatch.messages import Usage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from microbatch.messages import Reply

DONE: Final = b"data: [DONE]\n\n"
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


class Answer:
    """One answer, and the forms it can be sent in.

    Args:
        said: What the model said.
        model: The model that said it.
        usage: What it cost; None where that is not known.
    """

    def __init__(self, said: Said, model: str | None, usage: Usage | None) -> None:
        self._said = said
        self._usage = usage
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),  # noqa: TID251 the field is a date
            "model": model or "",
        }

    def whole(self) -> bytes:
        """Return the chat completion."""
        said = self._said
        message = {"role": "assistant", "content": said.content, "refusal": said.refusal}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": said.finish_reason}
        return _encode(
            {**self._head, "choices": [choice], "usage": None if self._usage is None else usage_object(self._usage)}
        )

    def events(self, *, include_usage: bool) -> bytes:
        """Return the events of a stream, but for the usage and the end mark."""
        return b"".join(map(_event, self._chunks(include_usage=include_usage)))

    def usage_event(self, usage: Usage | None) -> bytes:
        """Return the event that tells the usage."""
        told = usage_object(Usage(estimated=True) if usage is None else usage)
        return _event({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": told})

    def _chunks(self, *, include_usage: bool) -> Iterator[dict[str, Any]]:
        said = self._said
        # As OpenAI does: with include_usage, every chunk has the field, and only the last one has something in it.
        rest: dict[str, Any] = {"usage": None} if include_usage else {}
        deltas: list[tuple[dict[str, Any], str | None]] = [
            ({"role": "assistant", "content": "" if said.refusal is None else None, "refusal": None}, None)
        ]
        if said.content:
            deltas.append(({"content": said.content}, None))
        if said.refusal:
            deltas.append(({"refusal": said.refusal}, None))
        deltas.append(({}, said.finish_reason))
        for delta, reason in deltas:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            yield {**self._head, "object": "chat.completion.chunk", "choices": [choice], **rest}


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + _encode(chunk) + b"\n\n"
