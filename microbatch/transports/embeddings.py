"""Embeddings calls: their requests, their attempts, and the endpoints that do not send vectors in base64.

Base64 takes a quarter of the bytes of numbers, and is decoded faster. Endpoints that refuse `encoding_format`, or ignore it, are
remembered, and are not sent it again. Some answer with a refusal or a 500 that does not say so: a call that base64 was asked for, where
no call was ever answered in it, is then sent once without.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from weakref import WeakKeyDictionary

import msgspec

from microbatch.errors import BadRequest, ServerError
from microbatch.lru import LRU
from microbatch.protocols import Embedded
from microbatch.transports.embedding_reply import EmbeddingReader
from microbatch.transports.exchange import MAX_ERROR_BYTES, Exchange
from microbatch.transports.field_refusals import STATUSES, refuses_encoding
from microbatch.transports.http import read_into
from microbatch.transports.response_headers import read_limits, request_id

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    import aiohttp

    from microbatch.errors import StatusError
    from microbatch.protocols import EmbeddingCall
    from microbatch.transports.error_parsing import Fault

Endpoint: TypeAlias = tuple[str, str, bytes]
"""Address, model and a digest of the credentials."""

FIELD: Final = "encoding_format"
CAPACITY: Final = 256

MAX_VECTOR_BYTES: Final = 512 * 1024
"""Longest vector of a reply: 16,384 numbers of 32 characters."""

MAX_REPLY_BYTES: Final = 256 * 1024 * 1024
"""Longest reply: 2,048 vectors of 4,096 numbers of 24 characters, and a quarter more."""

SLICE: Final = 0.001
"""Seconds for which a reply is decoded before other tasks have their turn."""

_QUOTED_CHARS: Final = 262_144
"""Longest inputs in which quotations are looked for."""

_NOT_FOUND, _INTERNAL = 404, 500
_SURE: Final = 2
"""Doubt from which on base64 is not asked for: one refusal, or two failures, of calls that were answered without it."""


class _Entry(msgspec.Struct):
    """An endpoint's use of base64: whether calls were answered in it, whether it is not asked for, and how doubtful that is."""

    works: bool = False
    refused: bool = False
    doubt: int = 0


class Encodings:
    """The encodings that the most recently used endpoints support.

    Attributes:
        answered: Whether any call was ever answered, so that the address is right.
    """

    def __init__(self) -> None:
        self.answered: bool = False
        self._entries: LRU[Endpoint, _Entry] = LRU(CAPACITY)
        self._doubtful: WeakKeyDictionary[EmbeddingCall, int] = WeakKeyDictionary()

    def form(self, call: EmbeddingCall, endpoint: Endpoint) -> Form:
        """Return how to make the next attempt at *call*."""
        entry = self._entries.get_or_make(endpoint, _Entry)
        doubt = 0 if entry.works else self._doubtful.get(call, 0)
        return Form(call, entry, base64=not (FIELD in call.params or entry.refused or doubt), doubt=doubt)

    def accepted(self, form: Form, *, in_base64: bool) -> None:
        """Note that the endpoint answered; only now is it remembered that *form* left out what was only in doubt."""
        self.answered = True
        if form.base64:
            form.entry.works |= in_base64
            form.entry.refused = not form.entry.works
        elif form.doubt:
            form.entry.doubt += form.doubt
            form.entry.refused = form.entry.doubt >= _SURE

    def learn(self, form: Form, fault: Fault, error: StatusError) -> StatusError:
        """Learn from *error*, read from *fault*; return it, with `again` if the next attempt at the call will be made differently."""
        if not form.base64 or type(error) not in (BadRequest, ServerError):
            return error
        if error.status in STATUSES:
            about = refuses_encoding(fault, form.call.inputs)
            if about:
                form.entry.refused = error.again = True
            elif about is None and error.status != _NOT_FOUND and not form.entry.works:
                self._doubtful[form.call] = _SURE
                error.again = True
        elif error.status == _INTERNAL:
            self._doubtful[form.call] = 1  # sent again as a retry only, since the endpoint may be down
        return error


class Form(msgspec.Struct, frozen=True, eq=False):
    """The form of one attempt.

    Attributes:
        base64: Whether vectors are asked for in base64.
        doubt: How far the outcome of an earlier attempt, because of which that is left out, speaks against it; 0 if it is not.
    """

    call: EmbeddingCall
    entry: _Entry
    base64: bool
    doubt: int


def request_body(form: Form, model: str) -> dict[str, Any]:
    """Return the request body of one attempt."""
    call = form.call
    body: dict[str, Any] = {"model": model, "input": [*call.inputs], **call.params}
    if call.dimensions is not None:
        body["dimensions"] = call.dimensions
    if form.base64:
        body[FIELD] = "base64"
    return body


@dataclass(eq=False, repr=False, kw_only=True)
class EmbeddingAttempt(Exchange):
    """One attempt at one embeddings call."""

    form: Form
    encodings: Encodings

    def __post_init__(self) -> None:
        super().__post_init__()
        self._embedded: Embedded

    async def run(self, sending: Awaitable[aiohttp.ClientResponse]) -> Embedded:
        """Make the attempt; *sending* returns the response when its headers have arrived."""
        failure = await self._exchange(sending)
        if failure is not None:
            raise failure
        return self._embedded

    async def _receive(self) -> None:
        await self._check_status()
        body = bytearray()
        limit = min(MAX_REPLY_BYTES, MAX_ERROR_BYTES + MAX_VECTOR_BYTES * len(self.form.call.inputs))
        await read_into(body, self._response, limit, self.where)
        reader = EmbeddingReader(body)
        await _read(reader)
        if reader.fault is not None:
            self._refuse(reader.fault)
        if not reader.vectors:
            self._no_answer(
                "the answer has no vectors", bytes(body[:MAX_ERROR_BYTES]), len(body), known=self.encodings.answered
            )
        self.encodings.accepted(self.form, in_base64=reader.in_base64)
        headers = self._response.headers
        self._embedded = Embedded(
            vectors=reader.vectors,
            finish_reason="stop",
            usage=reader.usage,
            model=reader.model,
            request_id=request_id(headers),
            limits=read_limits(headers),
        )

    def _asked(self) -> Sequence[Any] | None:
        inputs = self.form.call.inputs
        return inputs if sum(map(len, inputs)) <= _QUOTED_CHARS else None

    def _learned(self, fault: Fault, error: StatusError) -> StatusError:
        return self.encodings.learn(self.form, fault, error)


async def _read(reader: EmbeddingReader) -> None:
    """Read a reply in slices of time, between which other tasks have their turn."""
    now = asyncio.get_running_loop().time
    until = now() + SLICE
    for _ in reader.read():
        if now() >= until:
            await asyncio.sleep(0)
            until = now() + SLICE
