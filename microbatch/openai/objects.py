"""The objects of chat completions, in the attribute shape of OpenAI's SDK, made from JSON without importing the SDK."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, cast

import msgspec

from microbatch.messages import T
from microbatch.transports.lenient import as_object, is_array

if TYPE_CHECKING:
    from collections.abc import Mapping

    from microbatch.messages import Reply


class Object(dict[str, Any]):
    """A JSON object whose members can be read and set as attributes as well.

    Being a dict, it can be sent back as it is: `messages.append(completion.choices[0].message)`. Whatever the endpoint said is in
    it. What the SDK declares and the endpoint left out reads as None; any other name is an AttributeError.

    Args:
        members: The object; copied, and so are the objects and arrays in it.
    """

    _shapes: ClassVar[Mapping[str, type[Object]]] = {}
    """What the objects in a member are, where they are of a kind of their own."""
    _names: ClassVar[frozenset[str]] = frozenset()
    """What the SDK declares; the annotations of subclasses."""
    _beside: ClassVar[frozenset[str]] = frozenset()
    """Attributes that are no members: they are ours, and must not be sent anywhere."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._names = cls._names | {name for name in cls.__annotations__ if not name.startswith("_")}

    def __init__(self, members: Mapping[str, Any]) -> None:
        super().__init__({name: _shaped(value, self._shapes.get(name, Object)) for name, value in members.items()})

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            if name in self._names:
                return None
            raise AttributeError(f"{type(self).__name__} has no {name!r}: the endpoint did not send it") from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._beside:
            super().__setattr__(name, value)
        else:
            self[name] = value

    def model_dump(
        self, *, mode: Literal["python", "json"] = "python", exclude_unset: bool = False, exclude_none: bool = False
    ) -> dict[str, Any]:
        """Return plain dicts and lists, as pydantic's method of this name does.

        Args:
            mode: "json" leaves nothing in what was parsed that JSON does not have.
            exclude_unset: Leave out what the SDK declares and the endpoint did not send.
            exclude_none: Leave out what is None.
        """
        members = self._dumped(mode)
        if not exclude_unset:
            members |= dict.fromkeys(sorted(self._names - self._beside - members.keys()))
        return {
            name: _plain(value, mode=mode, exclude_unset=exclude_unset, exclude_none=exclude_none)
            for name, value in members.items()
            if value is not None or not exclude_none
        }

    def _dumped(self, mode: Literal["python", "json"]) -> dict[str, Any]:  # noqa: ARG002 one that parses needs it
        return dict(self)

    def model_dump_json(
        self, *, indent: int | None = None, exclude_unset: bool = False, exclude_none: bool = False
    ) -> str:
        """Return JSON, as pydantic's method of this name does."""
        members = self.model_dump(mode="json", exclude_unset=exclude_unset, exclude_none=exclude_none)
        encoded = msgspec.json.encode(members)
        return (encoded if indent is None else msgspec.json.format(encoded, indent=indent)).decode()

    def to_dict(self) -> dict[str, Any]:
        """Return what the endpoint sent, as plain dicts and lists."""
        return self.model_dump(exclude_unset=True)

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return what the endpoint sent, as JSON."""
        return self.model_dump_json(indent=indent, exclude_unset=True)

    def __repr__(self) -> str:
        """Tell which members there are, never their words."""
        return f"{type(self).__name__}({', '.join(self)})"

    __str__ = __repr__


def _shaped(value: Any, kind: type[Object]) -> Any:
    if isinstance(value, dict):
        return kind(cast("dict[str, Any]", value))
    return [_shaped(each, kind) for each in value] if is_array(value) else value


def _plain(value: Any, **options: Any) -> Any:
    if isinstance(value, Object):
        return value.model_dump(**options)
    return [_plain(each, **options) for each in value] if is_array(value) else value


class FunctionCall(Object):
    """The name and the arguments, a JSON text, of a function that the model wants called."""

    name: str
    arguments: str
    parsed_arguments: Any


class ToolCall(Object):
    """A tool that the model wants called; in a stream, a piece of one."""

    _shapes = {"function": FunctionCall}  # noqa: RUF012 declared as a ClassVar once

    id: str
    type: str
    index: int | None
    function: FunctionCall
    custom: Object | None


class ChatCompletionMessage(Object, Generic[T]):
    """What the model said.

    Attributes:
        parsed: With `parse`, the content as the type that was asked for; else None. It is no member of the JSON.
    """

    _shapes = {"tool_calls": ToolCall, "function_call": FunctionCall}  # noqa: RUF012 see above
    _beside = frozenset({"parsed"})

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[ToolCall] | None
    function_call: FunctionCall | None
    annotations: list[Object] | None
    audio: Object | None
    parsed: T | None

    def _dumped(self, mode: Literal["python", "json"]) -> dict[str, Any]:
        if self.parsed is None:
            return dict(self)
        # What is not msgspec's is pydantic's.
        parsed = msgspec.to_builtins(self.parsed, enc_hook=lambda model: model.model_dump(mode=mode))
        return {**self, "parsed": parsed}


class Choice(Object, Generic[T]):
    """One of the answers to a request."""

    _shapes = {"message": ChatCompletionMessage}  # noqa: RUF012 see above

    index: int
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter", "function_call"]
    message: ChatCompletionMessage[T]
    logprobs: Object | None


class CompletionUsage(Object):
    """Tokens that were paid for.

    Attributes:
        microbatch_estimated: True while the figures are an estimate; see `ChatCompletion.settled`.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Object | None
    completion_tokens_details: Object | None

    @property
    def microbatch_estimated(self) -> bool:
        """Whether the endpoint has not reported yet."""
        return bool(self.get("microbatch_estimated"))


class ChatCompletion(Object, Generic[T]):
    """The answer to a request.

    Attributes:
        usage: This caller's share of the tokens, as it stood when the answer came; `settled` brings it up to date.
        microbatch: The `Reply` with what else is known: route, price, batch size, times. It is no member of the JSON.
    """

    _shapes = {"choices": Choice, "usage": CompletionUsage}  # noqa: RUF012 see above
    _beside = frozenset({"microbatch"})

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice[T]]
    usage: CompletionUsage | None
    system_fingerprint: str | None
    service_tier: str | None
    metadata: Object | None
    moderation: Object | None
    microbatch: Reply[Any]

    @property
    def _request_id(self) -> str | None:
        """The endpoint's id of the call that answered, or None; the SDK has it under this name."""
        return self.microbatch.request_id

    async def settled(self) -> Self:
        """Wait until `usage` and the price are final, and return this completion."""
        await self.microbatch.settled()
        self.usage = CompletionUsage(usage_members(self.microbatch))
        return self


class ChoiceDelta(Object):
    """What a chunk adds to an answer."""

    _shapes = {"tool_calls": ToolCall, "function_call": FunctionCall}  # noqa: RUF012 see above

    role: str | None
    content: str | None
    refusal: str | None
    tool_calls: list[ToolCall] | None
    function_call: FunctionCall | None
    audio: Object | None


class ChunkChoice(Object):
    """What a chunk says of one of the answers."""

    _shapes = {"delta": ChoiceDelta}  # noqa: RUF012 see above

    index: int
    delta: ChoiceDelta
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter", "function_call"] | None
    logprobs: Object | None


class ChatCompletionChunk(Object):
    """One event of a streamed completion."""

    _shapes = {"choices": ChunkChoice, "usage": CompletionUsage}  # noqa: RUF012 see above

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: CompletionUsage | None
    system_fingerprint: str | None
    service_tier: str | None
    moderation: Object | None
    obfuscation: str | None


def usage_members(reply: Reply[Any]) -> dict[str, Any]:
    """Return a reply's share of the tokens as the wire has it, with the endpoint's own details where it all is this caller's."""
    usage = reply.usage
    share: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    reported = as_object(as_object(reply.body).get("usage"))
    if all(
        reported.get(name) == share[name] for name in ("prompt_tokens", "completion_tokens")
    ):  # endpoints differ in the total
        return dict(reported)
    share["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    if usage.reasoning_tokens:
        share["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return {**share, "microbatch_estimated": True} if usage.estimated else share
