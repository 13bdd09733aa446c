"""The objects of chat completions and embeddings with the attributes of OpenAI's SDK, made from JSON without importing it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Literal, Self, cast

import msgspec

from microbatch.messages import T
from microbatch.openai.chat_completion import usage_share
from microbatch.transports.lenient import is_array

if TYPE_CHECKING:
    from collections.abc import Mapping

    from microbatch.messages import Reply


_SDK_MODEL: Final = ("openai", "BaseModel")


def sdk_class(module: str, name: str) -> type | None:
    """Return a class of OpenAI's SDK, or None if its *module* is not loaded.

    Objects that stand for the SDK's give it as their `__class__`, as mocks do, because frameworks check with `isinstance`.
    """
    return getattr(sys.modules.get(module), name, None)


class Object(dict[str, Any]):
    """A JSON object whose members can be read and set as attributes as well.

    As a dict it can be sent back unchanged: `messages.append(completion.choices[0].message)`. It holds all members that the endpoint
    sent. Members that the SDK declares and the endpoint left out read as None; any other name is an AttributeError.

    Args:
        members: The object; copied, and so are the objects and arrays in it.
    """

    # Members that the SDK declares, under pydantic's name; classes of the objects in members; attributes that are never sent.
    model_fields: ClassVar[Mapping[str, Any]] = {}
    _shapes: ClassVar[Mapping[str, type[Object]]] = {}
    _sdk: ClassVar[tuple[str, str]] = _SDK_MODEL  # module and name of the class that it passes for
    _attributes: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(
        cls, *, attribute: str | None = None, sdk: tuple[str, str] = _SDK_MODEL, **shapes: type[Object]
    ) -> None:
        super().__init_subclass__()
        cls._sdk = sdk
        cls._shapes = shapes
        cls.model_fields = {name: kind for name, kind in cls.__annotations__.items() if not name.startswith("_")}
        cls._attributes = frozenset() if attribute is None else frozenset({attribute})

    def __init__(self, members: Mapping[str, Any]) -> None:
        super().__init__({name: _shaped(value, self._shapes.get(name, Object)) for name, value in members.items()})

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return sdk_class(*self._sdk) or type(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            if name in self.model_fields:
                return None
            raise AttributeError(f"{type(self).__name__} has no {name!r}: the endpoint did not send it") from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._attributes:
            super().__setattr__(name, value)
        else:
            self[name] = value

    @property
    def model_extra(self) -> dict[str, Any]:
        """The members that the SDK does not declare."""
        return {name: value for name, value in self.items() if name not in self.model_fields}

    __pydantic_extra__ = model_extra

    def model_dump(
        self, *, mode: Literal["python", "json"] = "python", exclude_unset: bool = False, exclude_none: bool = False
    ) -> dict[str, Any]:
        """Return plain dicts and lists, as pydantic's method of this name does.

        Args:
            mode: "json" converts parsed values to JSON types.
            exclude_unset: Leave out members that the SDK declares and the endpoint did not send.
            exclude_none: Leave out members that are None.
        """
        members = self._dumped(mode)
        if not exclude_unset:
            members |= dict.fromkeys(sorted(self.model_fields.keys() - self._attributes - members.keys()))
        return {
            name: _plain(value, mode=mode, exclude_unset=exclude_unset, exclude_none=exclude_none)
            for name, value in members.items()
            if value is not None or not exclude_none
        }

    def _dumped(self, mode: Literal["python", "json"]) -> dict[str, Any]:  # noqa: ARG002 (for the override)
        return dict(self)

    def model_dump_json(
        self, *, indent: int | None = None, exclude_unset: bool = False, exclude_none: bool = False
    ) -> str:
        """Return JSON, as pydantic's method of this name does."""
        members = self.model_dump(mode="json", exclude_unset=exclude_unset, exclude_none=exclude_none)
        encoded = msgspec.json.encode(members)
        return (encoded if indent is None else msgspec.json.format(encoded, indent=indent)).decode()

    def to_dict(self) -> dict[str, Any]:
        """Return the members that the endpoint sent, as plain dicts and lists."""
        return self.model_dump(exclude_unset=True)

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return the members that the endpoint sent, as JSON."""
        return self.model_dump_json(indent=indent, exclude_unset=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (type(self),), self.__dict__, None, iter(self.items())

    def __repr__(self) -> str:
        """Return the names of the members, without their values."""
        return f"{type(self).__name__}({', '.join(self)})"

    __str__ = __repr__


def _empty(kind: type[Object]) -> Object:
    return kind.__new__(kind)


def _shaped(value: Any, kind: type[Object]) -> Any:
    if isinstance(value, dict):
        return kind(cast("dict[str, Any]", value))
    return [_shaped(each, kind) for each in value] if is_array(value) else value


def _plain(value: Any, **options: Any) -> Any:
    if isinstance(value, Object):
        return value.model_dump(**options)
    return [_plain(each, **options) for each in value] if is_array(value) else value


class FunctionCall(Object):
    """A function that the model wants called; `arguments` is JSON text."""

    name: str
    arguments: str
    parsed_arguments: Any


class ToolCall(Object, function=FunctionCall):
    """A tool that the model wants called; in a stream, a piece of one."""

    id: str
    type: str
    index: int | None
    function: FunctionCall
    custom: Object | None


class ChatCompletionMessage(Object, Generic[T], attribute="parsed", tool_calls=ToolCall, function_call=FunctionCall):
    """A message of the model.

    Attributes:
        parsed: With `parse`, the content decoded to the requested type; else None. Not a member of the JSON.
    """

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
        # Values that msgspec does not know are pydantic models.
        parsed = msgspec.to_builtins(self.parsed, enc_hook=lambda model: model.model_dump(mode=mode))
        return {**self, "parsed": parsed}


class Choice(Object, Generic[T], message=ChatCompletionMessage):
    """One answer to a request."""

    index: int
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter", "function_call"]
    message: ChatCompletionMessage[T]
    logprobs: Object | None


class CompletionUsage(Object):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Object | None
    completion_tokens_details: Object | None

    @property
    def microbatch_estimated(self) -> bool:
        """True while the counts are an estimate; see `ChatCompletion.settled`."""
        return bool(self.get("microbatch_estimated"))


class ChatCompletion(
    Object,
    Generic[T],
    attribute="microbatch",
    sdk=("openai.types.chat", "ChatCompletion"),
    choices=Choice,
    usage=CompletionUsage,
):
    """The answer to a request.

    Attributes:
        usage: This caller's share of the tokens as of the arrival of the answer; `settled` updates it.
        microbatch: The `Reply`: route, price, batch size, times. Not a member of the JSON.
    """

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
        """The endpoint's id of the call, or None, under the SDK's name."""
        return self.microbatch.request_id

    async def settled(self) -> Self:
        """Wait until `usage` and the price are final, and return this completion."""
        await self.microbatch.settled()
        self.usage = CompletionUsage(usage_share(self.microbatch))
        return self


class EmbeddingObject(Object, sdk=("openai.types", "Embedding")):
    """The vector of one text: numbers, or base64 of little-endian 32-bit floats."""

    embedding: list[float]
    index: int
    object: Literal["embedding"]

    def __init__(self, members: Mapping[str, Any]) -> None:
        dict.__init__(self, members)  # the numbers need no look at each of them


class EmbeddingUsage(Object, sdk=("openai.types.create_embedding_response", "Usage")):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int


class CreateEmbeddingResponse(
    Object,
    attribute="microbatch",
    sdk=("openai.types", "CreateEmbeddingResponse"),
    data=EmbeddingObject,
    usage=EmbeddingUsage,
):
    """The answer to a request for embeddings.

    Attributes:
        usage: This request's share of the tokens.
        microbatch: The `Reply`, with the `Embedding` of each text as its output: route, price, batch size. If the request was sent
            alone, its route is "forward", and it has no price. Not a member of the JSON.
    """

    data: list[EmbeddingObject]
    model: str
    object: Literal["list"]
    usage: EmbeddingUsage
    microbatch: Reply[Any]

    @property
    def _request_id(self) -> str | None:
        """The endpoint's id of the call, or None, under the SDK's name."""
        return self.microbatch.request_id


class ChoiceDelta(Object, tool_calls=ToolCall, function_call=FunctionCall):
    """The part of an answer in a chunk."""

    role: str | None
    content: str | None
    refusal: str | None
    tool_calls: list[ToolCall] | None
    function_call: FunctionCall | None
    audio: Object | None


class ChunkChoice(Object, delta=ChoiceDelta):
    """One answer's part of a chunk."""

    index: int
    delta: ChoiceDelta
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter", "function_call"] | None
    logprobs: Object | None


class ChatCompletionChunk(
    Object, sdk=("openai.types.chat", "ChatCompletionChunk"), choices=ChunkChoice, usage=CompletionUsage
):
    """One event of a streamed completion."""

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
