"""What the batcher asks of the parts it is given: the transport and the words they exchange."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from microbatch.messages import Limits, Usage


class ChatCall(msgspec.Struct, eq=False, weakref=True, kw_only=True):
    """One chat completion to ask for; re-sent as the same object when an attempt failed.

    Attributes:
        messages: OpenAI chat messages, as they go on the wire.
        model: Model name, or None for the transport's own.
        params: Further request fields, sent as they are (temperature, top_p, tools...).
        headers: The caller's headers, in place of the transport's own key.
        schema: JSON Schema of the whole reply, or None for free text; the transport adds a name.
        strict: Whether the schema is to be enforced; False only where the caller's own schema said so.
        hint: System text to add before the last message when the schema cannot be enforced, or None.
        max_tokens: Most tokens to generate, or None for the endpoint's own limit.
        stream: Whether pieces are wanted as they arrive.
        timeout: Seconds this call may take, or None for the transport's own limit.
        bound: Most tokens to generate where no caller has set `max_tokens`: the batcher's own guard against replies that run on, or
            None. A transport that sends it does so under the same name as `max_tokens`, and says so in `Completion.bound`; where the
            endpoint refuses it, it lowers this field or sets it to None and raises a `StatusError` with `again`. A transport that
            does not know the field sends no limit, as before.
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

    def __repr__(self) -> str:
        """Tell the call's shape without its words or credentials."""
        return (
            f"ChatCall(model={self.model!r}, messages=<{len(self.messages)}>, params={sorted(self.params)}, "
            f"headers=<{len(self.headers)}>, schema={self.schema is not None}, max_tokens={self.max_tokens}, "
            f"stream={self.stream}, timeout={self.timeout}, bound={self.bound})"
        )


class Completion(msgspec.Struct):
    """How a call ended; its text went to `on_text`.

    Attributes:
        finish_reason: "stop", "length", "content_filter"..., or None if the endpoint never said: the reply was cut off.
        usage: What the endpoint counted, or None if it did not say.
        model: The model that answered, or None.
        refusal: The model's words for declining, or None.
        request_id: The endpoint's id of the call, or None.
        body: The endpoint's JSON of a call that was not streamed, or None.
        limits: What the endpoint said of its rate limits: `Limits`, or the answer's headers to read them from; None if nothing.
        thought: True if the reply carried a thought or text of reasoning beside its answer.
        bound: The tokens that were sent as the limit because of `ChatCall.bound`; None if none were.
    """

    finish_reason: str | None
    usage: Usage | None = None
    model: str | None = None
    refusal: str | None = None
    request_id: str | None = None
    body: dict[str, Any] | None = None
    limits: Limits | Mapping[str, str] | None = None
    thought: bool = False
    bound: int | None = None

    def __repr__(self) -> str:
        """Tell how the call ended without the model's words."""
        return f"Completion(finish_reason={self.finish_reason!r}, usage={self.usage!r}, model={self.model!r})"


@runtime_checkable
class Transport(Protocol):
    """The way to a model. One `send` is one attempt; retries are the batcher's.

    A transport may also have `model` and `base_url` attributes, which become part of what requests must share to travel
    together, `open()` (awaited when the first batcher that uses it opens), and `forward` (see `Microbatcher.forward`).
    """

    async def send(self, call: ChatCall, on_text: Callable[[str], None]) -> Completion:
        """Make one attempt at *call*.

        Args:
            call: What to ask.
            on_text: Takes each piece of the assistant's text as it arrives; called once, with all of it, when not
                streaming.

        Raises:
            TransportError: The attempt failed. Text handed to `on_text` before that stands.
        """
        ...

    async def aclose(self) -> None:
        """Release connections. Called when the last batcher that uses the transport has closed."""
        ...


@runtime_checkable
class Cache(Protocol):
    """Where answers are kept for those who ask the same again. Keys are digests, values opaque; both are bytes.

    What is asked for in one turn of the event loop comes as one call, and so do the answers of one reply. A cache that fails or
    takes longer than 50 ms (2 s for bulk work, `map` and `warm`) is left alone for a while; callers are not held up or failed.

    A cache may also have `open()` (awaited when the first batcher that uses it opens), `ttl` (seconds for which its answers are
    good unless the request says otherwise; None for ever), `evictions` (a count), and `secret()`, which returns the 32 random
    bytes that key the digests. They are made once by whatever is shared between processes; without it, each process has its own.
    """

    async def get_many(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        """Return the value of each key, None where there is none."""
        ...

    async def set_many(self, entries: Sequence[tuple[bytes, bytes, float | None]]) -> None:
        """Keep *entries*: key, value, and seconds after which it may be dropped, None for as long as there is room."""
        ...

    async def aclose(self) -> None:
        """Let go of files and connections. Called when the last batcher that uses the cache has closed."""
        ...
