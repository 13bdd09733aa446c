"""Vectors in the JSON of an answer: as numbers or base64, in pieces, none of which takes the event loop long."""

from __future__ import annotations

import asyncio
from array import array
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.openai.embedding import as_base64

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from microbatch.openai.embedding import Encoding

AT_ONCE: Final = 32_768
"""Most numbers that are encoded on the event loop, which takes about 2 ms, and numbers of a piece of a longer answer."""


_encode: Final = msgspec.json.Encoder().encode


def is_small(vectors: Sequence[array[float]]) -> bool:
    """Return whether *vectors* can be encoded on the event loop."""
    return sum(map(len, vectors)) <= AT_ONCE


def encode_list(vectors: Sequence[array[float]], encoding: Encoding, fields: dict[str, Any]) -> bytes:
    """Return the answer that holds *vectors*, with its further *fields*."""
    return _HEAD + _encode_vectors(vectors, encoding, 0) + _tail(fields)


async def encode_pieces(
    vectors: Sequence[array[float]], encoding: Encoding, fields: dict[str, Any]
) -> AsyncIterator[bytes]:
    """Yield the pieces of what `encode_list` returns, made in a thread."""
    yield _HEAD
    count = max(1, AT_ONCE // max(1, *map(len, vectors)))
    for start in range(0, len(vectors), count):
        piece = await asyncio.to_thread(_encode_vectors, vectors[start : start + count], encoding, start)
        yield b"," + piece if start else piece
    yield _tail(fields)


_HEAD: Final = b'{"object":"list","data":['


def _tail(fields: dict[str, Any]) -> bytes:
    return b"]," + _encode(fields)[1:]


def _encode_vectors(vectors: Sequence[array[float]], encoding: Encoding, start: int) -> bytes:
    """Return the elements of `data` for *vectors*, the first of which has the index *start*."""
    written = map(as_base64 if encoding == "base64" else array.tolist, vectors)
    return b",".join(
        _encode({"object": "embedding", "index": index, "embedding": embedding})
        for index, embedding in enumerate(written, start)
    )
