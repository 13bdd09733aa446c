"""Parsing of requests by the simulated model, and the refusals of a strict endpoint.

A combined prompt is recognized by its text alone, as by a real model; no code is shared with the composer. Every check raises
`EndpointError`.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.schema.strict_mode import refusal
from microbatch.testing.counting import content_text
from microbatch.testing.orders import exact_word

if TYPE_CHECKING:
    from collections.abc import Mapping

    from microbatch.messages import Limits

REPLY_SHAPE = '{"results":[{"id":"...","answer":...}]}'
SCHEMA_WORDS = "JSON Schema: "

# Tokens that a combined reply reserves for each answer beyond the limit of its caller.
_FRAME_TOKENS = 16
_ESCAPES = 1.2

_STRING = {"type": "string"}
_SYSTEM = ("system", "developer")
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_ITEM = re.compile(r'\[([0-9]+[bcdfghjkmnpqrstvwxz]{5})\] (".*")')


class EndpointError(Exception):
    """The endpoint answers with an error, in OpenAI's shape.

    Attributes:
        retry_after: Seconds to name in the retry-after header, or None for no header.
        limits: What is left of the quota, or None if there is none.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error: dict[str, str | None] = {"message": message, "type": kind, "param": param, "code": code}
        self.retry_after = retry_after
        self.limits = limits

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        return {"error": self.error}


class Prompt(msgspec.Struct):
    """A request as the model understands it.

    Attributes:
        items: Id and text of each item of a combined prompt; of a single call the one text, under the id "".
        schema: JSON Schema of one answer, or None for free text.
        as_text: The schema is in a caller's own words only, and the answer is text that holds JSON.
        bare: There is no schema, but the reply must be a JSON object all the same.
        tokens: Tokens of the prompt, the schema's included if the endpoint counts them.
        max_tokens: Most tokens to generate, or None.
        tool: The function that the request wants called, or None; its parameters are the schema.
        named: Whether the request names it.
    """

    body: dict[str, Any]
    items: list[tuple[str, str]]
    combined: bool
    schema: dict[str, Any] | None
    as_text: bool
    bare: bool
    tokens: int
    max_tokens: int | None
    tool: str | None = None
    named: bool = False

    @property
    def most_each(self) -> int | None:
        """The most tokens of one answer, if the limit on the reply is what its callers allow together, as the composer adds it up."""
        if self.max_tokens is None or not self.combined:
            return self.max_tokens
        return max(1, int((self.max_tokens / len(self.items) - _FRAME_TOKENS) / _ESCAPES))

    @property
    def typed(self) -> bool:
        """True if answers are JSON of a schema."""
        return self.schema is not None and not self.as_text


class ResponseFormat(msgspec.Struct, frozen=True):
    """A request's response_format; the schema is None unless *kind* is "json_schema"."""

    kind: str = "text"
    name: str = ""
    schema: dict[str, Any] | None = None
    strict: bool = False


def check_messages(body: Mapping[str, Any]) -> None:
    """Check the fields without which there is no call."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise EndpointError(
            400, "Missing required parameter: 'messages'.", param="messages", code="missing_required_parameter"
        )
    if not body.get("model"):
        raise EndpointError(400, "you must provide a model parameter")


def asked_max_tokens(body: Mapping[str, Any]) -> int | None:
    """Return the limit that a request sets on its reply, under either name, or None."""
    limits = [body[name] for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None]
    for limit in limits:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise EndpointError(
                400, f"Invalid max_tokens: expected an integer >= 1, but got {limit!r}.", param="max_tokens"
            )
    return min(limits, default=None)


def check_length(tokens: int, max_tokens: int | None, *, context: int | None, output: int | None) -> None:
    """Check a prompt of *tokens* and the limit *max_tokens* that it sets on its reply.

    *context* is the most that both together may have, *output* the most that a reply may; None stands for any number.
    """
    if output is not None and max_tokens is not None and max_tokens > output:
        message = (
            f"max_tokens is too large: {max_tokens}. This model supports at most {output} completion tokens, whereas you "
            f"provided {max_tokens}."
        )
        raise EndpointError(400, message, param="max_tokens", code="invalid_value")
    if context is None or tokens + (max_tokens or 0) <= context:
        return
    asked = (
        f"your messages resulted in {tokens} tokens"
        if max_tokens is None
        else f"you requested {tokens + max_tokens} tokens ({tokens} in the messages, {max_tokens} in the completion)"
    )
    message = (
        f"This model's maximum context length is {context} tokens. However, {asked}. "
        "Please reduce the length of the messages or completion."
    )
    raise EndpointError(400, message, param="messages", code="context_length_exceeded")


def response_format(body: Mapping[str, Any]) -> ResponseFormat:
    """Return the parsed response_format."""
    form = body.get("response_format")
    if form is None:
        return ResponseFormat()
    kind = form.get("type") if isinstance(form, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise EndpointError(400, "Invalid value for 'response_format'.", param="response_format", code="invalid_value")
    if kind != "json_schema":
        return ResponseFormat(kind)
    named = form.get("json_schema")
    if not isinstance(named, dict) or not _NAME.fullmatch(str(named.get("name", ""))):
        message = "Missing required parameter: 'response_format.json_schema.name'."
        raise EndpointError(400, message, param="response_format.json_schema", code="missing_required_parameter")
    schema = named.get("schema")
    if not isinstance(schema, dict) or schema.get("type") != "object":
        message = (
            f"Invalid schema for response_format '{named['name']}': schema must be a JSON Schema of 'type: \"object\"'."
        )
        raise EndpointError(400, message, param="response_format")
    return ResponseFormat(kind, named["name"], schema, bool(named.get("strict")))


def check_strict(form: ResponseFormat) -> None:
    """Check that a strict schema keeps to the subset of JSON Schema that OpenAI enforces."""
    message = refusal(form.schema, form.name) if form.strict and form.schema is not None else None
    if message is not None:
        raise EndpointError(400, message, param="response_format")


def understand(body: dict[str, Any], *, tokens: int, max_tokens: int | None) -> Prompt:
    """Return the parsed prompt, combined or single. *body* has passed the checks above."""
    messages = body["messages"]
    form = response_format(body)
    last = content_text(messages[-1].get("content"))
    instruction, items = read_combined(last) if messages[-1].get("role") == "user" else ("", [])
    schema = _in_words(instruction) if items else None
    if schema is None and form.schema is not None:
        schema = _of_one_answer(form.schema, items) if items else form.schema
    tool, named = (None, False) if items else forced_tool(body)
    if tool is not None:
        schema = tool.get("parameters") or {"type": "object"}
    # The words just before the question: a client's hint, or a caller's own prompt.
    before = messages[-2] if len(messages) > 1 else {}
    own_words = (
        _in_words(content_text(before.get("content"))) if schema is None and before.get("role") in _SYSTEM else None
    )
    return Prompt(
        body=body,
        items=items or [("", last)],
        combined=bool(items),
        schema=own_words if schema is None else schema,
        # A caller's own words ask for JSON, but what a batch takes from the model is still a string.
        as_text=bool(items) and own_words is not None,
        bare=form.kind == "json_object" and not items and schema is None and own_words is None,
        tokens=tokens,
        max_tokens=max_tokens,
        tool=None if tool is None else tool["name"],
        named=named,
    )


def forced_tool(body: Mapping[str, Any]) -> tuple[dict[str, Any] | None, bool]:
    """Return the function that a request wants called, the first of its tools if any will do, and whether the request names it."""
    choice = body.get("tool_choice")
    tools = [tool.get("function") for tool in body.get("tools") or () if isinstance(tool, dict)]
    functions = [function for function in tools if isinstance(function, dict) and isinstance(function.get("name"), str)]
    if not isinstance(choice, dict):
        return (functions[0] if functions and choice in ("required", "any") else None), False
    for function in functions:
        if choice.get("function") == {"name": function["name"]}:
            return function, True
    raise EndpointError(400, "Tool choice 'function' not found in 'tools' parameter.", param="tool_choice")


def read_combined(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the instruction and the items of a combined prompt; no items for any other text."""
    if REPLY_SHAPE not in text:
        return "", []
    lines = text.removesuffix("\n").split("\n")
    items: list[tuple[str, str]] = []
    # The items are the last lines; whatever looks like one further up is an example.
    for line in reversed(lines):
        item = _item(line)
        if item is None:
            break
        items.append(item)
    instruction = "\n".join(lines[: len(lines) - len(items)])
    return (instruction, items[::-1]) if REPLY_SHAPE in instruction else ("", [])


def _item(line: str) -> tuple[str, str] | None:
    found = _ITEM.fullmatch(line)
    if found is None:
        return None
    try:
        text = json.loads(found.group(2))
    except ValueError:
        return None
    return (found.group(1), text) if isinstance(text, str) else None


def _in_words(text: str) -> dict[str, Any] | None:
    """Return the first JSON Schema that a text spells out, or None."""
    for words in re.finditer(SCHEMA_WORDS, text):
        try:
            schema, _ = json.JSONDecoder().raw_decode(text, words.end())
        except ValueError:
            continue
        if isinstance(schema, dict):
            return schema
    return None


def _of_one_answer(reply: dict[str, Any], items: list[tuple[str, str]]) -> dict[str, Any] | None:
    """Return the schema of one answer out of that of a combined reply; None if answers are strings."""
    try:
        schema = reply["properties"]["results"]["items"]["properties"]["answer"]
    except (KeyError, TypeError):
        return None
    match schema:
        # Room for an item that wants one word exactly is no choice that the other items have.
        case {"anyOf": [dict(one), {"type": "string", **rule}], **beside} if (
            not beside and rule.keys() <= {"pattern"} and any(exact_word(text) for _, text in items)
        ):
            schema = one
    if schema == _STRING:
        return None
    return {**schema, **{key: reply[key] for key in ("$defs", "definitions") if key in reply}}
