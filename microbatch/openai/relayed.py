"""JSON requests that are relayed to the endpoint, and what relayed requests of this folder have in common."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.checking import at_least
from microbatch.errors import ConfigError, DeadlineExceeded, TransportError
from microbatch.transports.credentials import is_credential
from microbatch.transports.error_parsing import has_failed, read_failure, to_error
from microbatch.transports.lenient import as_object, decode_body
from microbatch.transports.response_headers import request_id

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from microbatch.client import Microbatcher
    from microbatch.transports.relay import Forwarded

WHERE: Final = "the endpoint"
MAX_BODY_BYTES: Final = 1024 * 1024
MAX_ANSWER_BYTES: Final = 256 * 1024 * 1024
"""Longest refusal and longest answer that is read."""


async def read_json(batcher: Microbatcher, path: str, headers: Mapping[str, str]) -> dict[str, Any]:
    """Return the JSON object at *path* of the endpoint.

    Raises:
        TransportError: The endpoint could not be reached, refused (`StatusError`), or does not answer with JSON.
    """
    sent = {"accept": "application/json", "user-agent": "microbatch", **headers}
    async with batcher.forward("GET", path, sent) as response:
        return await _object_in(response, [*headers.values()])


async def ask_json(
    batcher: Microbatcher,
    path: str,
    body: Mapping[str, Any],
    headers: Mapping[str, str] | None,
    timeout: float | None,
    **options: Any,
) -> tuple[dict[str, Any], str | None]:
    """Send *body* unchanged, with the further *options* of `forward`; return the JSON object of the answer, and the id of the call.

    Raises:
        ConfigError: The body is not JSON.
        DeadlineExceeded: The timeout has passed.
        TransportError: As for `read_json`.
    """
    encoded, sent = encoded_body(body), sent_headers("application/json", headers)
    async with limited(timeout), batcher.forward("POST", path, sent, encoded, **options) as response:
        return await _object_in(response, secrets_of(sent)), request_id(response.headers)


async def _object_in(response: Forwarded, secrets: list[str]) -> dict[str, Any]:
    if has_failed(response.status):
        fault = read_failure(await begin_of(response), response.status)
        raise to_error(fault, where=WHERE, headers=response.headers, secrets=secrets)
    try:
        return as_object(decode_body(await begin_of(response, MAX_ANSWER_BYTES)))
    except ValueError:
        raise TransportError(f"{WHERE} answered with no JSON") from None


def encoded_body(body: Mapping[str, Any]) -> bytes:
    """Return *body* as JSON; raise `ConfigError` if it is none."""
    try:
        return msgspec.json.encode(body)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the request cannot be written as JSON ({type(error).__name__})") from None


def sent_headers(accept: str, headers: Mapping[str, str] | None) -> dict[str, str]:
    """Return the headers of a request with a JSON body, whose caller has *headers*."""
    sent = {"content-type": "application/json", "accept": accept, "user-agent": "microbatch"}
    return sent | {name.lower(): value for name, value in (headers or {}).items()}


def secrets_of(headers: Mapping[str, str]) -> list[str]:
    """Return the credentials in *headers*, which are left out of errors."""
    return [value.rpartition(" ")[2] for name, value in headers.items() if value and is_credential(name)]


@asynccontextmanager
async def limited(timeout: float | None) -> AsyncGenerator[None]:
    """Limit the block to *timeout* seconds; raise `DeadlineExceeded` when they have passed."""
    at_least(0, timeout=timeout)
    limit = asyncio.timeout(timeout)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineExceeded(f"no answer within the timeout of {timeout} s") from None


async def begin_of(response: Forwarded, most: int = MAX_BODY_BYTES) -> bytes:
    """Return the body of *response*, or its first *most* bytes and some more."""
    raw = bytearray()
    async for piece in response:
        raw += piece
        if len(raw) > most:
            break
    return bytes(raw)
