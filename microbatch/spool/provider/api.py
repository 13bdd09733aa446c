"""OpenAI's files and batches over HTTP: each request tried again as long as that can do no harm."""

from __future__ import annotations

import asyncio
import random
import secrets
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from microbatch.errors import RequestFailed, ServerError, StatusError, TransportError
from microbatch.policy import MAX_WAIT, RetryPolicy
from microbatch.transience import Backoff, is_transient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

T = TypeVar("T")

ENDPOINT: Final = "/v1/chat/completions"
PAGE: Final = 100
# Results are compressed by nobody then: what a transport forwards it does not unpack.
_HEADERS: Final = {"Accept": "application/json", "Accept-Encoding": "identity"}


class RequestError(msgspec.Struct, frozen=True):
    """What is wrong with the input of a batch.

    Attributes:
        code: The provider's word for it, or None.
        message: What it says to people, or None.
        param: The field, or None.
        line: Number of the line, from 1; None if it is about all of it.
    """

    code: str | None = None
    message: str | None = None
    param: str | None = None
    line: int | None = None


class _Errors(msgspec.Struct, frozen=True):
    data: list[RequestError] | None = None


class RemoteBatch(msgspec.Struct, frozen=True):
    """A batch as the provider tells of it.

    Attributes:
        id: Its id.
        status: How far it is.
        created_at: When it was made, in seconds since 1970; 0 if that is not told.
        input_file_id: The file that it reads.
        output_file_id: The file with the replies, or None.
        error_file_id: The file with what went wrong, or None.
        metadata: What its maker keeps with it, or None.
        errors: Why it failed, or None.
    """

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
        """Whether it will not change any more."""
        return self.status in ("completed", "failed", "expired", "cancelled")

    @property
    def complaints(self) -> list[RequestError]:
        """What is wrong with its input."""
        return (self.errors.data or []) if self.errors is not None else []


class BatchPage(msgspec.Struct, frozen=True):
    """Some batches, newest first.

    Attributes:
        data: The batches.
        has_more: Whether there are older ones.
    """

    data: list[RemoteBatch]
    has_more: bool = False


class _Id(msgspec.Struct):
    id: str


class BatchApi(Protocol):
    """A provider's files and batches. Every method raises `RequestFailed` when it cannot do what it says."""

    async def upload(self, name: str, content: bytes) -> str:
        """Keep *content* as the input of a batch, under any *name*; return the file's id."""
        ...

    async def create(self, file_id: str, metadata: Mapping[str, str]) -> RemoteBatch:
        """Make a batch.

        Raises:
            RequestFailed: It was not made, or nobody knows whether it was; see `is_ambiguous`.
        """
        ...

    async def get(self, batch_id: str) -> RemoteBatch:
        """Return a batch as it is now."""
        ...

    async def page(self, after: str | None = None) -> BatchPage:
        """Return the batches made before *after*, or the newest, a page of them."""
        ...

    async def content(self, file_id: str) -> bytes:
        """Return a file."""
        ...

    async def delete(self, file_id: str) -> None:
        """Delete a file."""
        ...


class Response(Protocol):
    """An answer, as a transport's `forward` yields it."""

    status: int
    headers: Mapping[str, str]

    def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body."""
        ...


class Forward(Protocol):
    """See `OpenAIChat.forward`."""

    def __call__(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> AbstractAsyncContextManager[Response]:
        """Make one request, and yield its answer whatever its status."""
        ...


class OpenAIBatchApi:
    """OpenAI's files and batches, and whoever copies them.

    Failures that time may heal are waited out as the policy says, but for making a batch: where it is not known whether that
    was done, doing it again might be billed twice.

    Args:
        forward: Makes one request.
        refusal: Makes the error of an answer from its status, headers and body.
        retry: How often and how long. There is no budget: these are few requests.
        draw: Makes the jitter: numbers from 0 to 1.
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
        """See `BatchApi.upload`; a file whose upload failed half way may be there all the same, under another id."""
        boundary = secrets.token_hex(16)
        parts = [
            _part(boundary, 'name="purpose"', b"batch"),
            _part(boundary, f'name="file"; filename="{name}"\r\nContent-Type: application/jsonl', content),
            f"--{boundary}--\r\n".encode(),
        ]
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        return _decoded(await self._ask("POST", "/files", b"".join(parts), headers), _Id).id

    async def create(self, file_id: str, metadata: Mapping[str, str]) -> RemoteBatch:
        """See `BatchApi.create`."""
        asked = {"input_file_id": file_id, "endpoint": ENDPOINT, "completion_window": "24h", "metadata": metadata}
        headers = {"Content-Type": "application/json"}
        raw = await self._ask("POST", "/batches", msgspec.json.encode(asked), headers, once=True)
        return _decoded(raw, RemoteBatch)

    async def get(self, batch_id: str) -> RemoteBatch:
        """See `BatchApi.get`."""
        return _decoded(await self._ask("GET", f"/batches/{quote(batch_id, safe='')}"), RemoteBatch)

    async def page(self, after: str | None = None) -> BatchPage:
        """See `BatchApi.page`."""
        query = urlencode({"limit": PAGE, **({} if after is None else {"after": after})})
        return _decoded(await self._ask("GET", f"/batches?{query}"), BatchPage)

    async def content(self, file_id: str) -> bytes:
        """See `BatchApi.content`."""
        return await self._ask("GET", f"/files/{quote(file_id, safe='')}/content")

    async def delete(self, file_id: str) -> None:
        """See `BatchApi.delete`."""
        await self._ask("DELETE", f"/files/{quote(file_id, safe='')}")

    async def _ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        once: bool = False,
    ) -> bytes:
        """Return the body of a successful answer.

        Args:
            method: The HTTP method.
            path: The path below the base address.
            body: What to send, or None.
            headers: Its headers.
            once: Whether an attempt that may have been successful must not be followed by another.

        Raises:
            RequestFailed: The last attempt's error.
        """
        failures, backoff = 0, Backoff(self._retry.base, self._retry.cap, draw=self._draw)
        while True:
            try:
                return await self._attempt(method, path, body, {**_HEADERS, **(headers or {})})
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
    """Return whether what was asked for may have been done, though *error* came of it."""
    return not isinstance(error, StatusError) or isinstance(error, ServerError)


def _part(boundary: str, disposition: str, content: bytes) -> bytes:
    head = f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n"
    return b"".join((head.encode(), content, b"\r\n"))


def _decoded(raw: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # The decoder's words quote no values, but its context may; so neither is passed on.
        message = f"the answer is none of OpenAI's files and batches API ({type(error).__name__})"
        raise TransportError(message) from None
