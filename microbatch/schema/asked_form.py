"""Forms of answers that fields of the request itself ask for: a tool that must be called, or any JSON object.

A single call keeps these fields, and whatever the endpoint replies is the caller's answer. A combined call leaves them out: there the
form is a schema like any other, and a tool's arguments are handed back as a call of that tool.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from microbatch.schema.traverse import Schema

_OBJECT_WORDS: Final = "Each answer is a JSON object as the messages above describe it, matching this JSON Schema: "
_TOOL_WORDS: Final = "Each answer holds the arguments of a call of the function "
FIELDS: Final = ("function_call", "functions", "parallel_tool_calls", "response_format", "tool_choice", "tools")
"""Names of the fields that may ask for a form. Where they do, all of them are left out of combined calls."""


# Mistral takes ids of nine letters and digits only; others take any.
_ID_LENGTH: Final = 9


class _Function(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    parameters: dict[str, Any] = {}
    description: str | None = None
    strict: bool | None = None


class _Tool(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: _Function


class _Name(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class _Choice(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: _Name


class _ToolRequest(msgspec.Struct, forbid_unknown_fields=True):
    tools: list[_Tool]
    tool_choice: _Choice | Literal["required", "any"]  # OpenAI's word for any of them, and Mistral's
    parallel_tool_calls: bool = False


class _FunctionRequest(msgspec.Struct, forbid_unknown_fields=True):
    functions: list[_Function]
    function_call: _Name


class _ObjectFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["json_object"]


class _ObjectRequest(msgspec.Struct, forbid_unknown_fields=True):
    response_format: _ObjectFormat


_REQUESTS: Final[tuple[type[_ObjectRequest | _ToolRequest | _FunctionRequest], ...]] = (
    _ObjectRequest,
    _ToolRequest,
    _FunctionRequest,
)


class ForcedTool(msgspec.Struct, frozen=True):
    """A tool that must be called.

    Attributes:
        finish_reason: OpenAI's reason at the end of a reply that calls it: "stop" if the request names it.
        legacy: Whether it is one of `functions`, the older name of tools.
    """

    name: str
    finish_reason: str
    legacy: bool = False

    def call(self, arguments: str) -> dict[str, Any]:
        """Return the members of a message that calls it with *arguments*, JSON text, under an id of its own."""
        function = {"name": self.name, "arguments": arguments}
        if self.legacy:
            return {"function_call": function}
        return {"tool_calls": [{"id": uuid.uuid4().hex[:_ID_LENGTH], "type": "function", "function": function}]}

    def arguments_in(self, body: Mapping[str, Any] | None) -> str | None:
        """Return the arguments with which the endpoint's reply *body* calls it first; None if it does not."""
        match body:
            case {"choices": [{"message": {"function_call": {"arguments": str(arguments)}}}, *_]} if self.legacy:
                return arguments
            case {"choices": [{"message": {"tool_calls": [{"function": {"arguments": str(arguments)}}, *_]}}, *_]}:
                return arguments
        return None


class AskedForm(msgspec.Struct, frozen=True, kw_only=True):
    """The form of an answer that request fields ask for.

    Attributes:
        schema: The schema of an answer.
        strict: Whether the endpoint has to enforce it.
        words: See `AnswerType.words`.
        tool: The tool whose arguments an answer is; None for a JSON object.
    """

    schema: Schema
    strict: bool
    words: str
    tool: ForcedTool | None


def asking_fields(fields: Mapping[str, Any]) -> bytes:
    """Return those of *fields* that may ask for a form, as JSON; b"" if there are none, or they are no JSON."""
    asking = {name: fields[name] for name in FIELDS if fields.get(name) not in (None, [])}
    if not asking:
        return b""
    try:
        return msgspec.json.encode(asking)
    except (TypeError, ValueError, RecursionError):
        return b""


def asked_form(asking: bytes) -> AskedForm | None:
    """Return the form that *asking*, from `asking_fields`, stands for; None if a request with these fields has to go alone."""
    for kind in _REQUESTS:
        try:
            asked = msgspec.json.decode(asking, type=kind)
        except msgspec.ValidationError:
            continue
        if isinstance(asked, _ObjectRequest):
            return AskedForm(schema={"type": "object"}, strict=False, words=_OBJECT_WORDS, tool=None)
        return _of_function(asked)
    return None


def _of_function(asked: _ToolRequest | _FunctionRequest) -> AskedForm | None:
    named: str | None
    if isinstance(asked, _FunctionRequest):
        chosen, named, legacy = asked.functions, asked.function_call.name, True
    else:
        if asked.parallel_tool_calls:
            return None
        chosen, legacy = [tool.function for tool in asked.tools], False
        named = asked.tool_choice.function.name if isinstance(asked.tool_choice, _Choice) else None
    if named is not None:
        chosen = [each for each in chosen if each.name == named]
    if len(chosen) != 1:
        return None
    function = chosen[0]
    schema = {keyword: value for keyword, value in function.parameters.items() if keyword != "$schema"}
    if schema.get("type") != "object" and "$ref" not in schema:
        return None
    what = msgspec.json.encode(function.name).decode()
    if function.description:
        what += f" ({msgspec.json.encode(function.description).decode()})"
    return AskedForm(
        schema=schema,
        strict=function.strict is True,
        words=f"{_TOOL_WORDS}{what}, as JSON matching this JSON Schema: ",
        tool=ForcedTool(function.name, "tool_calls" if named is None else "stop", legacy),
    )
