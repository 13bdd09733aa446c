"""Streamed completions. Each is a call of its own, relayed as its events arrive."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Self

from microbatch.checking import at_least
from microbatch.errors import ConfigError, TransportError
from microbatch.openai.objects import ChatCompletionChunk
from microbatch.openai.relayed import WHERE, begin_of, encoded_body, limited, secrets_of, sent_headers
from microbatch.transports.addresses import CHAT_COMPLETIONS
from microbatch.transports.error_parsing import has_failed, read_fault, to_error
from microbatch.transports.lenient import as_object, decode_body, is_array, is_json
from microbatch.transports.reply_reader import is_keep_alive
from microbatch.transports.sse import SSEDecoder

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from microbatch.client import Microbatcher
    from microbatch.transports.relay import Forwarded


class AsyncStream:
    """The chunks of a completion as they arrive: `async for chunk in stream`.

    The connection and the slot in the batcher are released at the end of the stream, by `close`, at the end of an `async with`
    block, and when the last reference to the stream is dropped. `response` has the endpoint's status and headers.
    """

    def __init__(self, response: Forwarded, held: AsyncExitStack, secrets: list[str]) -> None:
        self.response = response
        self._held = held
        self._chunks = _chunks(response, held, secrets)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ChatCompletionChunk:
        """Return the next chunk.

        Raises:
            StatusError: The endpoint reports an error within the stream.
            TransportError: The connection broke, was silent for too long, or the stream ended without saying why.
        """
        return await anext(self._chunks)

    async def close(self) -> None:
        """Release the connection and the slot, ending the stream if it is not over. Closing again has no effect."""
        await self._held.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_raised: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        """Return the status."""
        return f"AsyncStream(status={self.response.status})"


# Not a method: a generator that refers to its stream would keep it alive after the reader has dropped it.
async def _chunks(response: Forwarded, held: AsyncExitStack, secrets: list[str]) -> AsyncGenerator[ChatCompletionChunk]:
    finished = False
    try:
        async for data in _events(response):
            if data.strip() == b"[DONE]":
                return
            chunk = _read_chunk(data, response, secrets)
            if chunk is not None:
                finished = finished or any(choice.finish_reason for choice in chunk.choices or ())
                yield chunk
        if not finished:
            raise TransportError("the stream was cut off: it ended without a finish_reason")
    finally:
        await held.aclose()


async def _events(response: Forwarded) -> AsyncGenerator[bytes]:
    """Yield the data of the events; the last one may lack its closing blank line, and is left out if it is cut."""
    decoder = SSEDecoder()
    async for piece in response:
        for data in decoder.feed(piece):
            yield data
    for data in decoder.close():
        if is_json(data) or data.strip() == b"[DONE]":
            yield data


def _read_chunk(data: bytes, response: Forwarded, secrets: list[str]) -> ChatCompletionChunk | None:
    """Return the chunk in *data*, None if it only keeps the connection alive."""
    try:
        members: Any = decode_body(data)
    except ValueError:
        if is_keep_alive(data):
            return None
        raise TransportError("an event of the stream is no chunk of a completion") from None
    if _may_fail(members) and (fault := read_fault(data, response.status)) is not None:
        raise to_error(fault, where=WHERE, headers=response.headers, secrets=secrets)
    if members is None:
        return None
    if not isinstance(members, dict):
        raise TransportError("an event of the stream is no chunk of a completion")
    return ChatCompletionChunk(members)


def _may_fail(event: Any) -> bool:
    """Return whether *event* may be an error, which takes a second look at its bytes."""
    fields = as_object(event)
    choices = fields.get("choices")
    if not choices or not is_array(choices) or fields.get("error") or fields.get("object") == "error":
        return True
    return any(as_object(choice).get("error") for choice in choices)


async def open_stream(
    batcher: Microbatcher, body: Mapping[str, Any], headers: Mapping[str, str] | None, timeout: float | None
) -> AsyncStream:
    """Send *body* unchanged and return the stream, once the endpoint has begun to answer, within *timeout* seconds.

    Raises:
        ConfigError: The body names no model, or is not JSON.
        DeadlineExceeded: The timeout has passed.
        TransportError: The endpoint could not be reached, refused (`StatusError`), or does not answer with a stream.
    """
    at_least(0, timeout=timeout)
    if not body.get("model"):
        raise ConfigError("a streamed completion is sent unchanged: name its model")
    encoded, sent = encoded_body(body), sent_headers("text/event-stream", headers)
    async with AsyncExitStack() as held:
        async with limited(timeout):
            response = await held.enter_async_context(batcher.forward("POST", CHAT_COMPLETIONS, sent, encoded))
        secrets = secrets_of(sent)
        await _check(response, secrets)
        return AsyncStream(response, held.pop_all(), secrets)


async def _check(response: Forwarded, secrets: list[str]) -> None:
    """Raise unless *response* is a stream."""
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if not has_failed(response.status) and not kind.endswith("json"):
        return
    fault = read_fault(await begin_of(response), response.status)
    if fault is None:
        raise TransportError(f"{WHERE} answered with one JSON object where a stream was asked for")
    raise to_error(fault, where=WHERE, headers=response.headers, secrets=secrets)
