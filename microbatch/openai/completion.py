"""From a `Reply` to a completion of the SDK's shape."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.errors import Filtered, MalformedAnswer, TruncatedReply
from microbatch.openai.objects import ChatCompletion, CompletionUsage, usage_members
from microbatch.schema.answer_type import answer_type

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from microbatch.messages import Reply
    from microbatch.openai.objects import Choice, ToolCall


def completion_of(reply: Reply[Any], model: str | None) -> ChatCompletion[Any]:
    """Return *reply* as a completion: the endpoint's own JSON if the request went alone, else JSON of the same shape.

    Args:
        reply: The reply.
        model: The model that was asked for, for replies that name none.
    """
    completion: ChatCompletion[Any] = ChatCompletion(reply.body if reply.body is not None else _made(reply, model))
    completion.microbatch = reply
    completion.usage = CompletionUsage(usage_members(reply))
    return completion


def _made(reply: Reply[Any], model: str | None) -> dict[str, Any]:
    # An answer within a combined reply was complete, however the rest of that reply ends.
    finish_reason = reply.finish_reason if reply.batch_size == 1 else None
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),  # noqa: TID251 a date, by definition
        "model": reply.model or model or "",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": reply.text, "refusal": None},
                "logprobs": None,
                "finish_reason": finish_reason or "stop",
            }
        ],
    }


def with_answer(completion: ChatCompletion[Any], reply: Reply[Any], *, parsed: bool) -> None:
    """Put the answer into a completion of which it is all that matters.

    The content becomes the JSON of the answer itself: without fences, and without the object that is put around what is none.
    """
    message = completion.choices[0].message
    message.content = reply.text
    if parsed:
        message.parsed = reply.output


def parse_all(completion: ChatCompletion[Any], output_type: Any, tools: Iterable[Mapping[str, Any]]) -> None:
    """Parse what there is to parse in a completion that may hold several answers, or calls of tools.

    Args:
        completion: The completion; the contents and arguments in it are replaced.
        output_type: What contents are decoded to.
        tools: The tools that were offered.

    Raises:
        TruncatedReply: An answer was cut off by the token limit.
        Filtered: An answer was stopped by the endpoint's content filter.
        MalformedAnswer: One does not fit.
    """
    strict = {tool["function"].get("name") for tool in tools if tool.get("function", {}).get("strict") is True}
    for choice in completion.choices:
        _check_ending(choice)
        message = choice.message
        for call in message.tool_calls or ():
            _parse_arguments(call, strict)
        if message.content:
            try:
                message.parsed, message.content = answer_type(output_type).decode_single(message.content)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as reason:  # a user's validator may raise anything; a Rust panic is no Exception
                raise MalformedAnswer("the answer does not fit response_format", raw=message.content) from reason


def _check_ending(choice: Choice[Any]) -> None:
    if choice.finish_reason == "length":
        raise TruncatedReply("the answer was cut off by the token limit", raw=choice.message.content or "")
    if choice.finish_reason == "content_filter":
        raise Filtered("the endpoint's content filter stopped the answer", status=200)


def _parse_arguments(call: ToolCall, strict: set[Any]) -> None:
    function = call.function
    if not function or function.name not in strict:
        return
    try:
        function.parsed_arguments = msgspec.json.decode(function.arguments)
    except (msgspec.DecodeError, TypeError) as reason:
        raise MalformedAnswer("the arguments of a tool call are not JSON", raw=str(function.arguments)) from reason
