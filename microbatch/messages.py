"""Requests, replies and what they consist of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypeVar

import msgspec

if TYPE_CHECKING:
    from array import array
    from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence

    import typing_extensions as future

    Output_co = future.TypeVar("Output_co", covariant=True, default=str)
else:
    Output_co = TypeVar("Output_co", covariant=True)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Priority = Literal["high", "normal", "low"]  # by rank, the most urgent first
UseCache: TypeAlias = bool | Literal["refresh"]
Route = Literal["batch", "single", "fallback", "cache", "shared", "forward", "audit", "similar", "check", "look_up"]


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Billed tokens.

    Attributes:
        prompt_tokens: All tokens of the prompt, cached ones included.
        completion_tokens: All generated tokens, reasoning included.
        cached_tokens: The part of `prompt_tokens` read from the provider's prefix cache.
        estimated: True until the endpoint has reported its count; it may never do so.
        cache_write_tokens: The part of `prompt_tokens` written to the provider's prefix cache.
        reasoning_tokens: The part of `completion_tokens` spent on reasoning.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    estimated: bool = False
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Return the sum; it is an estimate if either summand is."""
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
            self.estimated or other.estimated,
            self.cache_write_tokens + other.cache_write_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
        )


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Rate limits that an endpoint reported; None for those it did not.

    Attributes:
        limit_requests: Requests allowed per minute.
        remaining_requests: Requests that may still be sent now.
        reset_requests: Seconds until `remaining_requests` is back at `limit_requests`.
        limit_tokens: Tokens allowed per minute.
        remaining_tokens: Tokens that may still be spent now.
        reset_tokens: Seconds until `remaining_tokens` is back at `limit_tokens`.
    """

    limit_requests: int | None = None
    remaining_requests: int | None = None
    reset_requests: float | None = None
    limit_tokens: int | None = None
    remaining_tokens: int | None = None
    reset_tokens: float | None = None


class TokenLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Token limits that an endpoint named when it refused `ChatCall.bound`; None for those it did not.

    Attributes:
        completion: Most tokens that the model generates.
        affordable: Most tokens of a reply that the account's credit pays for.
        context: The model's context window.
        prompt: Tokens of the refused prompt.
        per_minute: Tokens allowed per minute.
    """

    completion: int | None = None
    affordable: int | None = None
    context: int | None = None
    prompt: int | None = None
    per_minute: int | None = None


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """A chat message. Plain dicts may be used instead, with any further field that the endpoint knows.

    Attributes:
        role: "system", "developer", "user", "assistant" or "tool".
        content: The text, or a list of content parts. Only text can be part of a combined prompt.
        name: The participant's name, or None.
    """

    role: str
    content: str | list[dict[str, Any]]
    name: str | None = None

    def __repr__(self) -> str:
        """Return the role, without the content."""
        return f"Message(role={self.role!r})"


Messages: TypeAlias = "Sequence[Mapping[str, Any] | Message]"


def texts_of(content: object) -> Iterator[str]:
    """Yield the texts of a message's content: a text, or those of its parts that have one."""
    for part in content if isinstance(content, list) else [{"text": content}]:
        if isinstance(part, dict) and isinstance(text := part.get("text"), str):
            yield text


class Request(msgspec.Struct, Generic[Output_co]):
    """An item of `Microbatcher.map`: messages, and any options of `submit`. Its type argument is that of the answer.

    Attributes:
        messages: The chat messages; may be given by position.
        id: The caller's name for the item, returned in `Result.id`, or None.
        output_type: As in `submit`, like all that follow.
    """

    messages: Messages
    id: str | None = None
    output_type: future.TypeForm[Output_co] = str  # type: ignore[assignment]
    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    params: Mapping[str, Any] | None = None
    headers: Mapping[str, str] | None = None
    tenant: str | None = None
    priority: Priority = "normal"
    timeout: float | None = None
    use_cache: UseCache = True
    ttl: float | None = None

    def __repr__(self) -> str:
        """Return the id and the number of messages."""
        return f"Request(id={self.id!r}, messages=<{len(self.messages)}>)"


Source: TypeAlias = "Iterable[T] | AsyncIterable[T]"
Requests: TypeAlias = "Source[Request[Any] | Messages]"


class _Waiting:
    """Base of `Reply` with the function that waits for its call. It is no field, so that it is not encoded, copied or pickled."""

    __slots__ = ("_wait",)
    _wait: Callable[[], Awaitable[object]] | None


class Reply(_Waiting, msgspec.Struct, Generic[T_co], eq=False, gc=False):
    """The answer to one request, and its cost.

    Attributes:
        output: The answer, decoded to `output_type`.
        text: The answer as the model wrote it: text, or JSON; the arguments, if the request asks for the call of a tool.
        route: The way of the answer: "batch", "single", "fallback" (asked again after an earlier reply lacked it), "cache",
            "shared" (an equal request was under way), or "similar" (the answer to a similar question, see `SemanticCache`).
        usage: This request's share of the tokens of all calls that carried it. An estimate (`usage.estimated`) until the last of them
            has ended; then all shares add up to the endpoint's counts.
        cost_usd: The price of `usage` in US dollars, or None if the model's price is unknown.
        batch_size: Requests in the call that answered, of an answer from the cache in the call that once gave it; 1 for a single call.
        waited: Seconds from submit until that call was sent.
        latency: Seconds from submit until the answer had arrived.
        model: The model as the endpoint names it; the requested one until the call has ended; None if both are unknown.
        finish_reason: "stop", "length", "content_filter" or "tool_calls", or None while the rest of a combined reply is arriving.
        request_id: The endpoint's id of the call, or None.
        body: The endpoint's JSON of a single call. Of an answer in a combined call the same shape, without usage, if the request asks
            for the call of a tool; else None.
        lane_kind: Names the kind of the lane in which the request waited, as `AuditedSize.kind` does; of an answer from the cache, the
            request that was asked. None for requests that go alone by their form.
        score: The similarity, at most 1.0, of the question that was answered, if the route is "similar"; else None.
    """

    output: T_co
    text: str
    route: Route
    usage: Usage
    cost_usd: float | None = None
    batch_size: int = 1
    waited: float = 0.0
    latency: float = 0.0
    model: str | None = None
    finish_reason: str | None = None
    request_id: str | None = None
    body: dict[str, Any] | None = None
    lane_kind: str | None = None
    score: float | None = None

    async def settled(self) -> Reply[T_co]:
        """Wait until `usage` and `cost_usd` are final, and return this reply.

        They are final when the last call that carried the request has ended. If one ended without reporting its usage, they remain an
        estimate.
        """
        wait = getattr(self, "_wait", None)
        if wait is not None:
            await wait()
        return self

    def __repr__(self) -> str:
        """Return the route and the cost, without the answer."""
        return (
            f"Reply(route={self.route!r}, batch_size={self.batch_size}, usage={self.usage!r}, cost_usd={self.cost_usd}, "
            f"latency={self.latency:.3f}, finish_reason={self.finish_reason!r})"
        )


class Embedding(msgspec.Struct, frozen=True, eq=False):
    """The vector of one text, and its cost.

    Attributes:
        vector: 32-bit floats, `array("f")`; the caller's own.
        model: The model as the endpoint names it, or the requested one; None if both are unknown.
        usage: This text's share of the tokens of the call that carried it; no tokens if the vector came from the cache.
        cost_usd: The price of `usage` in US dollars; None if the model's price is unknown.
        batch_size: Texts in that call; of a vector from the cache, in the call that once gave it.
        route: The way of the vector, as in `Reply.route`: "batch", "single", "fallback", "cache" or "shared".
        request_id: The endpoint's id of the call, or None.
        waited: Seconds until that call was sent.
    """

    vector: array[float]
    model: str | None = None
    usage: Usage = Usage()
    cost_usd: float | None = None
    batch_size: int = 1
    route: Route = "batch"
    request_id: str | None = None
    waited: float = 0.0

    def __repr__(self) -> str:
        """Return the fields without the vector's numbers."""
        return f"Embedding(vector=<{len(self.vector)}>, model={self.model!r}, usage={self.usage!r})"


class Result(msgspec.Struct, Generic[T], frozen=True):
    """The outcome of one item of `Microbatcher.map`: either `reply` or `error`.

    Attributes:
        index: Position in the source, from 0.
        id: The `Request.id`, or None.
        reply: The reply, or None if the item failed.
        error: The exception that `submit` would have raised, or None.
    """

    index: int
    id: str | None = None
    reply: Reply[T] | None = None
    error: Exception | None = None

    def unwrap(self) -> Reply[T]:
        """Return the reply.

        Raises:
            MicrobatchError: The item failed.
        """
        if self.reply is None:
            raise self.error if self.error is not None else ValueError("a Result needs a reply or an error")
        return self.reply
