"""What callers hand in and what they get back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence


T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Priority = Literal["high", "normal", "low"]  # by rank, the most urgent first
Route = Literal["batch", "single", "fallback", "cache", "shared", "forward"]


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens that were paid for.

    Attributes:
        prompt_tokens: All tokens of the prompt, cached ones included.
        completion_tokens: All generated tokens, reasoning included.
        cached_tokens: The part of `prompt_tokens` that the provider read from its prefix cache.
        estimated: True until the endpoint has reported, and for ever if it never does.
        cache_write_tokens: The part of `prompt_tokens` that the provider wrote into its prefix cache.
        reasoning_tokens: The part of `completion_tokens` that the model spent on reasoning.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    estimated: bool = False
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Return the sum, which is an estimate if either part is."""
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
            self.estimated or other.estimated,
            self.cache_write_tokens + other.cache_write_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
        )


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What an endpoint says of its rate limits; None where it says nothing.

    Attributes:
        limit_requests: Requests allowed a minute.
        remaining_requests: Requests that may still be sent now.
        reset_requests: Seconds until `remaining_requests` is back at `limit_requests`.
        limit_tokens: Tokens allowed a minute.
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
    """What an endpoint says of tokens where it refuses our own bound on a reply; None where it says nothing.

    Attributes:
        completion: The most tokens that the model generates.
        affordable: The most tokens of a reply that the account's credit pays for.
        context: The model's context window.
        prompt: Tokens of the prompt that was refused.
        per_minute: Tokens allowed a minute.
    """

    completion: int | None = None
    affordable: int | None = None
    context: int | None = None
    prompt: int | None = None
    per_minute: int | None = None


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One chat message. Plain dicts do as well, and may hold any further field an endpoint knows.

    Attributes:
        role: "system", "developer", "user", "assistant" or "tool".
        content: The text, or a list of content parts. Only plain text can travel in a combined prompt.
        name: The participant's name, or None.
    """

    role: str
    content: str | list[dict[str, Any]]
    name: str | None = None

    def __repr__(self) -> str:
        """Tell the role, never the words."""
        return f"Message(role={self.role!r})"


Messages: TypeAlias = "Sequence[Mapping[str, Any] | Message]"


class Request(msgspec.Struct):
    """One item for `Microbatcher.map`: messages, and any of `submit`'s options.

    Attributes:
        messages: The chat messages; may be given by position.
        id: The caller's own name for the item, handed back in `Result.id`; None uses nothing.
        output_type: As in `submit`, and so for all that follow.
    """

    messages: Messages
    id: str | None = None
    output_type: Any = str
    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    params: Mapping[str, Any] | None = None
    headers: Mapping[str, str] | None = None
    tenant: str | None = None
    priority: Priority = "normal"
    timeout: float | None = None
    use_cache: bool = True
    ttl: float | None = None

    def __repr__(self) -> str:
        """Tell the id and the shape, never the words."""
        return f"Request(id={self.id!r}, messages=<{len(self.messages)}>)"


class Reply(msgspec.Struct, Generic[T_co], eq=False, gc=False):
    """The answer to one request, and what it cost.

    Attributes:
        output: The answer, decoded to `output_type`.
        text: The answer as the model wrote it: the text itself, or its JSON.
        route: How it came: "batch", "single", "fallback" (asked again after an earlier reply left it open), "cache", or "shared"
            (an equal request was under way).
        usage: This request's share of the tokens, over all calls that carried it; an estimate (`usage.estimated`) until
            the last of them has ended. Shares add up exactly to what the endpoint reported.
        cost_usd: The price of `usage` in US dollars, or None when the model's price is unknown.
        batch_size: Requests in the call that answered, 1 for a single call.
        waited: Seconds from submit until the call that answered was sent.
        latency: Seconds from submit until the answer was there.
        model: The model that answered, as the endpoint names it; the requested one until the call has ended. None if neither is known.
        finish_reason: Why the model stopped; None while the rest of a combined reply is still on its way.
        request_id: The endpoint's id of the call, or None.
        body: The endpoint's own JSON of a single call, else None.
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
    _wait: Callable[[], Awaitable[object]] | None = None

    async def settled(self) -> Reply[T_co]:
        """Wait until `usage` and `cost_usd` are final, and return this reply.

        They are final when the last call that carried the request has ended. A call that ended without reporting usage
        leaves the estimate, still marked.
        """
        if self._wait is not None:
            await self._wait()
        return self

    def __repr__(self) -> str:
        """Tell how the answer came and what it cost, never its words."""
        return (
            f"Reply(route={self.route!r}, batch_size={self.batch_size}, usage={self.usage!r}, cost_usd={self.cost_usd}, "
            f"latency={self.latency:.3f}, finish_reason={self.finish_reason!r})"
        )


class Result(msgspec.Struct, Generic[T], frozen=True):
    """How one item of `Microbatcher.map` ended: `reply` or `error`, never both.

    Attributes:
        index: Position in the source, from 0.
        id: The `Request.id`, or None.
        reply: The reply, or None if the item failed.
        error: What the submit would have raised, or None.
    """

    index: int
    id: str | None = None
    reply: Reply[T] | None = None
    error: Exception | None = None

    def unwrap(self) -> Reply[T]:
        """Return the reply.

        Raises:
            MicrobatchError: The item failed; this is its error.
        """
        if self.reply is None:
            raise self.error if self.error is not None else ValueError("a Result needs a reply or an error")
        return self.reply
