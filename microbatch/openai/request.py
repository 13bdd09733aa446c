"""From the arguments of `chat.completions.create` to those of `submit`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.errors import ConfigError
from microbatch.protocols import ChatCall
from microbatch.schema.answer_type import answer_type
from microbatch.transports.chat_wire import can_stream
from microbatch.transports.lenient import as_object

if TYPE_CHECKING:
    from collections.abc import Mapping


def body_of(given: Mapping[str, Any], extra_body: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the request's body: what was given, and over it *extra_body*, as the SDK has it.

    Raises:
        ConfigError: `extra_query` was given, which belongs to the transport.
    """
    if _is_given(given.get("extra_query")):
        raise ConfigError("extra_query belongs to the endpoint: pass OpenAIChat(query=...)")
    return {name: value for name, value in given.items() if _is_given(value)} | dict(extra_body or {})


def _is_given(value: object) -> bool:
    # The SDK's own words for "not given", recognised without importing it.
    return value is not None and not (
        type(value).__name__ in ("NotGiven", "Omit") and type(value).__module__.partition(".")[0] == "openai"
    )


def check_create(response_format: object) -> None:
    """Refuse what only `parse` takes.

    Raises:
        ConfigError: *response_format* is a type.
    """
    if isinstance(response_format, type):
        raise ConfigError(
            f"create() takes a response_format as JSON; parse() takes the type {response_format.__name__}"
        )


def is_text(response_format: object) -> bool:
    """Whether an answer is whatever text the model writes, not JSON of a schema that is checked."""
    return as_object(response_format).get("type") != "json_schema"


class Submission(msgspec.Struct):
    """A request for `submit`.

    Attributes:
        messages: The messages.
        arguments: Further arguments of `submit`.
        whole: The reply may hold more than one text, so all of it matters: it comes back as the endpoint wrote it.
    """

    messages: Any
    arguments: dict[str, Any]
    whole: bool


def submission(body: dict[str, Any], output_type: Any = str) -> Submission:
    """Return what to submit for *body*, which is used up.

    Args:
        body: The request's body.
        output_type: What the answer is decoded to; str where the body says all.

    Raises:
        ConfigError: Something is given twice, or *output_type* has no JSON form.
    """
    messages = body.pop("messages")
    if {"max_tokens", "max_completion_tokens"} <= body.keys():
        raise ConfigError("give max_tokens or max_completion_tokens, not both")
    arguments: dict[str, Any] = {}
    for name in ("model", "temperature", "max_tokens", "max_completion_tokens"):
        if name in body:
            arguments[name.replace("max_completion_tokens", "max_tokens")] = body.pop(name)
    whole = not can_stream(ChatCall(messages=(), params=body))
    if whole:
        if output_type is not str:
            body["response_format"] = _format_of(output_type)
        if "response_format" in body:
            # As JSON it is sent as it is; `submit` would take the schema as that of the only text that it looks at.
            body["response_format"] = msgspec.Raw(_encoded(body["response_format"]))
    elif output_type is not str:
        arguments["output_type"] = output_type
    if body:
        arguments["params"] = body
    return Submission(messages, arguments, whole)


def _format_of(output_type: Any) -> dict[str, Any]:
    answer = answer_type(output_type)
    return {"type": "json_schema", "json_schema": {"name": "answers", "strict": True, "schema": answer.single_schema}}


def _encoded(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"response_format must be JSON: {error}") from error
