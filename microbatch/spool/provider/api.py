"""OpenAI's files and batches over HTTP, with retries where they are safe."""

from __future__ import annotations

import asyncio
import random
import secrets
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from microbatch.errors import RequestFailed, ServerError, StatusError, TransportError
from microbatch.policy import MAX_WAIT, RetryPolicy
from microbatch.transience import Backoff, is_transient

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from microbatch.transports.relay import Forwarded

    Forward = Callable[..., AbstractAsyncContextManager[Forwarded]]

T = TypeVar("T")

ENDPOINT: Final = "/v1/chat/completions"
PAGE: Final = 100
_HEADERS: Final = {"Accept": "application/json", "Accept-Encoding": "identity"}  # what is forwarded stays compressed


class RequestError(msgspec.Struct, frozen=True):
    """An error in the input of a batch; `line` counts from 1 and is None if the error concerns the whole input."""

    code: str | None = None
    param: str | None = None
    line: int | None = None


class _Errors(msgspec.Struct, frozen=True):
    data: list[RequestError] | None = None


class RemoteBatch(msgspec.Struct, frozen=True):
    """A batch as the provider reports it; `created_at` is in seconds since 1970, and 0 if not reported."""

    id: str
    status: str
    created_at: int = 0
    input_file_id: str | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    metadata: dict[str, Any] | None = None
    errors: _Errors | None = None

    @property
    def is_over(self) -> bool:
        """True if its status is final."""
        return self.status in ("completed", "failed", "expired", "cancelled")

    @property
    def complaints(self) -> list[RequestError]:
        """The errors in its input."""
        return (self.errors.data or []) if self.errors is not None else []


class _Page(msgspec.Struct):
    data: list[RemoteBatch]  # newest first
    has_more: bool = False


class _Id(msgspec.Struct):
    id: str


class OpenAIBatchApi:
    """OpenAI's files and batches, and compatible ones. Every method raises `RequestFailed` if it fails.

    Transient failures are retried as the policy says, except where the creation of a batch may have succeeded: a second one might be
    billed.

    Args:
        forward: Makes one request; see `OpenAIChat.forward`.
        refusal: Returns the error for a response's status, headers and body.
        retry: Number of attempts and delays; its budget has no effect, as there are few requests.
        draw: Returns random numbers from 0 to 1, for the jitter.
    """

    def __init__(
        self,
        forward: Forward,
        refusal: Callable[[int, Mapping[str, str], bytes], StatusError],
        *,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 frozen
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._forward = forward
        self._refusal = refusal
        self._retry = retry
        self._draw = draw

    async def upload(self, name: str, content: bytes) -> str:
        """Upload *content* as the input of a batch, under any *name*; return the file's id. After an error it may exist as well."""
        boundary = secrets.token_hex(16)
        parts = [
            _part(boundary, 'name="purpose"', b"batch"),
            _part(boundary, f'name="file"; filename="{name}"\r\nContent-Type: application/jsonl', content),
            f"--{boundary}--\r\n".encode(),
        ]
        kind = f"multipart/form-data; boundary={boundary}"
        return _decoded(await self._ask("POST", "/files", b"".join(parts), kind), _Id).id

    async def create(self, file_id: str, metadata: Mapping[str, str]) -> RemoteBatch:
        """Create a batch; after an error for which `is_ambiguous` is true, it may exist as well."""
        asked = {"input_file_id": file_id, "endpoint": ENDPOINT, "completion_window": "24h", "metadata": metadata}
        raw = await self._ask("POST", "/batches", msgspec.json.encode(asked), "application/json", once=True)
        return _decoded(raw, RemoteBatch)

    async def get(self, batch_id: str) -> RemoteBatch:
        """Return the present state of a batch."""
        return _decoded(await self._ask("GET", f"/batches/{quote(batch_id, safe='')}"), RemoteBatch)

    async def find(self, key: str, value: str, *, since: float) -> RemoteBatch | None:
        """Return the batch created after *since* (seconds since 1970) whose metadata has that *value* for *key*, or None."""
        query: dict[str, str | int] = {"limit": PAGE}
        while True:
            page = _decoded(await self._ask("GET", f"/batches?{urlencode(query)}"), _Page)
            for batch in page.data:
                if (batch.metadata or {}).get(key) == value:
                    return batch
            if not page.data or not page.has_more or 0 < page.data[-1].created_at < since:
                return None
            query["after"] = page.data[-1].id

    async def content(self, file_id: str) -> bytes:
        """Return the content of a file."""
        return await self._ask("GET", f"/files/{quote(file_id, safe='')}/content")

    async def delete(self, file_id: str) -> None:
        """Delete a file."""
        await self._ask("DELETE", f"/files/{quote(file_id, safe='')}")

    async def _ask(
        self, method: str, path: str, body: bytes | None = None, content_type: str | None = None, *, once: bool = False
    ) -> bytes:
        """Return the body of a successful response; with *once*, no attempt is made after one that may have succeeded."""
        headers = _HEADERS if content_type is None else {**_HEADERS, "Content-Type": content_type}
        failures, backoff = 0, Backoff(self._retry.base, self._retry.cap, draw=self._draw)
        while True:
            try:
                return await self._attempt(method, path, body, headers)
            except RequestFailed as error:
                failures += 1
                error.attempts = failures
                hopeless = not is_transient(error) or (once and is_ambiguous(error))
                asked = (error.retry_after or 0.0) if isinstance(error, StatusError) else 0.0
                if hopeless or failures >= self._retry.max_attempts or asked > MAX_WAIT:
                    raise
            await asyncio.sleep(asked + backoff.next())

    async def _attempt(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> bytes:
        async with self._forward(method, path, headers, body) as response:
            received = bytearray()
            async for chunk in response.chunks():
                received += chunk
        raw = bytes(received)
        if not 200 <= response.status < 300:  # noqa: PLR2004 (the class of success)
            raise self._refusal(response.status, response.headers, raw)
        return raw


def is_ambiguous(error: RequestFailed) -> bool:
    """Return whether a request that failed with *error* may have been executed."""
    return not isinstance(error, StatusError) or isinstance(error, ServerError)


def _part(boundary: str, disposition: str, content: bytes) -> bytes:
    head = f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n"
    return b"".join((head.encode(), content, b"\r\n"))


def _decoded(raw: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # Without the decoder's error, whose context may quote values.
        message = f"the response is not one of OpenAI's files and batches API ({type(error).__name__})"
        raise TransportError(message) from None
