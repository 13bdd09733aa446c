"""The protocols of transports and caches, and the messages between batcher and transport."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import msgspec

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Mapping, Sequence

    from microbatch.messages import Limits, Usage


class ChatCall(msgspec.Struct, eq=False, weakref=True, kw_only=True):
    """One chat completion to request; a retry sends the same object.

    Attributes:
        messages: OpenAI chat messages, as they are sent.
        model: Model name, or None for the transport's own.
        params: Further request fields (temperature, top_p, tools...), sent unchanged.
        headers: The caller's headers; with a credential among them the transport's own key is not sent. `:path`, the name that HTTP/2
            has for it, holds the path below `base_url`, and its query, of calls that do not go to the usual one.
        schema: JSON Schema of the whole reply, or None for free text; the transport adds a name.
        strict: Whether the endpoint has to enforce the schema; False only if the caller's own schema says so.
        hint: System message to insert before the last message if the schema cannot be enforced, or None. A transport may join it to
            another message instead.
        max_tokens: Most tokens to generate, or None for the endpoint's own limit.
        stream: Whether to stream the reply.
        timeout: Seconds this call may take, or None for the transport's own limit.
        bound: Most tokens to generate if `max_tokens` is None: the batcher's guard against runaway replies, or what callers allow
            together if that is more than any model surely does; or None. A transport that sends it uses the same field as for
            `max_tokens`, and sets `Completion.bound`. If the endpoint refuses it, the transport lowers this field, or sets it to None,
            and raises a `StatusError` with `again`. A transport may ignore it.
        json_object: Whether callers ask for any JSON object, so that `response_format` json_object says it all; a transport may ignore
            it and have the schema enforced.
        on_event: With `stream`, takes an empty value once the endpoint has accepted the call, and then the data of each event of the
            reply, unchanged, before `on_text` takes its text, which may be empty; or None. A transport may ignore it.
        unenforced: Whether an answer to the same request did not fit `schema`, so that the endpoint does not enforce it.
    """

    messages: Sequence[Mapping[str, Any]]
    model: str | None = None
    params: Mapping[str, Any] = {}
    headers: Mapping[str, str] = {}
    schema: Mapping[str, Any] | None = None
    strict: bool = True
    hint: str | None = None
    max_tokens: int | None = None
    stream: bool = False
    timeout: float | None = None
    bound: int | None = None
    json_object: bool = False
    on_event: Callable[[bytes], None] | None = None
    unenforced: bool = False

    def __repr__(self) -> str:
        """Return the fields without text and credentials."""
        return (
            f"ChatCall(model={self.model!r}, messages=<{len(self.messages)}>, params={sorted(self.params)}, "
            f"headers=<{len(self.headers)}>, schema={self.schema is not None}, max_tokens={self.max_tokens}, "
            f"stream={self.stream}, timeout={self.timeout}, bound={self.bound})"
        )


class Completion(msgspec.Struct):
    """The end of a call, whose text was passed to `on_text`.

    Attributes:
        finish_reason: "stop", "length", "content_filter" or "tool_calls"; None if the reply was cut off and has to be asked for again.
        usage: The endpoint's token counts, or None.
        model: The model that answered, or None.
        refusal: The model's text of a refusal, or None.
        request_id: The endpoint's id of the call, or None.
        body: The endpoint's JSON of a call that was not streamed, or of the same shape if tools were called in a stream, or None.
        limits: The endpoint's rate limits: `Limits`, or the headers to read them from; None if it sent none.
        thought: Whether the reply had a thought or reasoning in addition to its answer.
        damaged: Whether a part of the reply could not be read; a NUL replaces it in the text.
        bound: The limit that was sent because of `ChatCall.bound`, or None.
        service_tier: The service tier that the call was charged at, such as "flex", "priority" or "batch", in lower case; None for the
            usual one, whatever its name, and if the endpoint has not reported it.
    """

    finish_reason: str | None
    usage: Usage | None = None
    model: str | None = None
    refusal: str | None = None
    request_id: str | None = None
    body: dict[str, Any] | None = None
    limits: Limits | Mapping[str, str] | None = None
    thought: bool = False
    damaged: bool = False
    bound: int | None = None
    service_tier: str | None = None

    def __repr__(self) -> str:
        """Return the fields without text."""
        return f"Completion(finish_reason={self.finish_reason!r}, usage={self.usage!r}, model={self.model!r})"


class EmbeddingCall(msgspec.Struct, eq=False, weakref=True, kw_only=True):
    """One embeddings call to request; a retry sends the same object.

    Attributes:
        inputs: The texts, in order; at least one.
        model: Model name, or None for the transport's own embedding model.
        dimensions: Length of each vector, or None for the model's own.
        params: Further request fields, sent unchanged.
        headers: The caller's headers; with a credential among them the transport's own key is not sent.
        timeout: Seconds this call may take, or None for the transport's own limit.
    """

    inputs: Sequence[str]
    model: str | None = None
    dimensions: int | None = None
    params: Mapping[str, Any] = {}
    headers: Mapping[str, str] = {}
    timeout: float | None = None

    def __repr__(self) -> str:
        """Return the fields without text and credentials."""
        return (
            f"EmbeddingCall(model={self.model!r}, inputs=<{len(self.inputs)}>, dimensions={self.dimensions}, "
            f"params={sorted(self.params)}, headers=<{len(self.headers)}>, timeout={self.timeout})"
        )


class Embedded(Completion, kw_only=True):
    """The end of an embeddings call, as the endpoint sent it.

    Attributes:
        vectors: The vectors of the reply in its order, each with the index that the endpoint gives it, which nothing has checked; None
            in place of a vector that cannot be read.
    """

    vectors: Sequence[tuple[int | None, array[float] | None]]
    finish_reason: str | None = "stop"


@runtime_checkable
class Transport(Protocol):
    """Sends calls to a model. One `send` is one attempt; the batcher retries.

    A transport may also have the attributes `model` and `base_url`, which requests must have in common to be combined, `open()`,
    awaited when the first batcher that uses it opens, `forward` (see `Microbatcher.forward`), and `embedding_model` and
    `embed(call: EmbeddingCall) -> Embedded`, one attempt at an embeddings call, which raises what `send` does (see
    `Microbatcher.embed`).
    """

    async def send(self, call: ChatCall, on_text: Callable[[str], None]) -> Completion:
        """Make one attempt at *call*.

        Args:
            call: The call.
            on_text: Takes each piece of the assistant's text as it arrives; without streaming, the whole text once.

        Raises:
            TransportError: The attempt failed. Text passed to `on_text` before remains valid.
        """
        ...

    async def aclose(self) -> None:
        """Release connections. Called when the last batcher that uses the transport has closed."""
        ...


@runtime_checkable
class Cache(Protocol):
    """Stores answers for equal requests. Keys are digests and values are opaque; both are bytes.

    All look-ups of one iteration of the event loop, and all answers of one reply, are one call, or several of 128 keys each. A cache
    that fails or takes longer than 50 ms (2 s for stores and for bulk work, `map` and `warm`; delays of the event loop do not count)
    is bypassed for a while; callers neither wait nor fail.

    A cache may also have `open()`, awaited when the first batcher that uses it opens; `ttl`, the default lifetime of answers in
    seconds, None for unlimited; `evictions`, a count; and `secret()`, which returns the 32 random bytes that key the digests. A store
    shared between processes makes them once for all; without it each process has its own. It is called again from time to time, so
    that processes agree again after the store was emptied.

    Those that come with this package also have `delete(keys)` and `clear(tenant=None)`.
    """

    async def get_many(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        """Return the value of each key, None for keys without one."""
        ...

    async def set_many(self, entries: Sequence[tuple[bytes, bytes, float | None]]) -> None:
        """Store *entries*: key, value, and lifetime in seconds, None for unlimited."""
        ...

    async def aclose(self) -> None:
        """Close files and connections. Called when the last batcher that uses the cache has closed."""
        ...
