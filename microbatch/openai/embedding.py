"""Embeddings requests: a body as texts and arguments of `embed`, the vectors of all texts, and what they cost together.

The gateway and the client in this package share these functions.
"""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from microbatch.embedding.vectors import vector_bytes
from microbatch.messages import Reply, Usage
from microbatch.prompt.parameters import shown_name
from microbatch.transports.lenient import is_array

if TYPE_CHECKING:
    from array import array
    from collections.abc import Collection, Mapping, Sequence

    from microbatch.client import Microbatcher
    from microbatch.messages import Embedding, Route

Encoding = Literal["float", "base64"]

MAX_INPUTS: Final = 2_048
"""Most texts of one request: https://platform.openai.com/docs/api-reference/embeddings/create."""

HARMLESS_FIELDS: Final = frozenset({"user"})
"""Fields that are sent with combined requests, which have them in common. Others may act on all texts together (`late_chunking`)."""

_MANY: Final = 256
"""More texts of one request than this are a list that is worth a call."""

_HUGE: Final = 2**31  # more dimensions than any model has: the request is relayed, and the endpoint refuses it
_DEAREST_FIRST: Final[Sequence[Route]] = ("fallback", "batch", "single", "shared", "cache")


class EmbeddingRequest(msgspec.Struct, frozen=True):
    """A request for embeddings that can be combined with others.

    Attributes:
        texts: The texts, in order.
        arguments: What the body says beside them, as arguments of `embed`.
        encoding: The form of the vectors in the answer, None if the body does not say it.
    """

    texts: list[str]
    arguments: dict[str, Any]
    encoding: Encoding | None = None

    def __repr__(self) -> str:
        """Return the number of texts."""
        return f"EmbeddingRequest(texts=<{len(self.texts)}>)"


def read_embedding_request(
    body: Mapping[str, Any], *, harmless: Collection[str] = HARMLESS_FIELDS
) -> EmbeddingRequest | tuple[str, ...]:
    """Return the request in *body*, or the names of the fields because of which only the endpoint can judge or answer it.

    Fields of the names *harmless* are sent unchanged with combined requests.
    """
    model, dimensions, encoding = (body.get(name) for name in ("model", "dimensions", "encoding_format"))
    texts = [given] if isinstance(given := body.get("input"), str) else given if is_array(given) else []
    sound = {
        "input": 0 < len(texts) <= MAX_INPUTS and all(isinstance(text, str) and text for text in texts),
        "model": "model" not in body or (isinstance(model, str) and bool(model)),
        "dimensions": "dimensions" not in body or (type(dimensions) is int and 0 < dimensions < _HUGE),
        "encoding_format": "encoding_format" not in body or encoding in ("float", "base64"),
    }
    params = {name: value for name, value in body.items() if name not in sound}
    sound |= {name: name in harmless and value is not None for name, value in params.items()}
    if "user" in params:
        sound["user"] = isinstance(params["user"], str)
    if not all(sound.values()):
        return tuple(dict.fromkeys(shown_name(name) for name, is_sound in sound.items() if not is_sound))
    return EmbeddingRequest(texts, {"model": model, "dimensions": dimensions, "params": params or None}, encoding)


async def embed_all(batcher: Microbatcher, texts: list[str], **options: Any) -> list[Embedding]:
    """Return the vectors of *texts*, in their order, each with the *options* of `Microbatcher.embed`.

    They are asked for at once, together with the texts of others. If one fails, or the caller leaves, the others are given up.

    Raises:
        MicrobatchError: As for `embed`, of the first text that fails.
    """
    if len(texts) == 1:
        return [await batcher.embed(texts[0], **options)]
    if len(texts) > _MANY:
        # They gain nothing by waiting for others.
        return await batcher.embed_many(texts, **options)
    try:
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(batcher.embed(text, **options)) for text in texts]
    except ExceptionGroup as errors:
        failure = errors.exceptions[0]
    else:
        return [task.result() for task in asked]
    raise failure


def reply_of(embeddings: list[Embedding]) -> Reply[list[Embedding]]:
    """Return *embeddings*, those of one request, as one reply: with the sum of their shares, and the way of the dearest of them."""
    costs = [embedding.cost_usd for embedding in embeddings if embedding.cost_usd is not None]
    routes = {embedding.route for embedding in embeddings}
    ids = {embedding.request_id for embedding in embeddings}
    return Reply(
        output=embeddings,
        text="",
        route=next(route for route in _DEAREST_FIRST if route in routes),
        usage=sum((embedding.usage for embedding in embeddings), Usage()),
        cost_usd=sum(costs) if len(costs) == len(embeddings) else None,
        batch_size=max(embedding.batch_size for embedding in embeddings),
        waited=max(embedding.waited for embedding in embeddings),
        model=next((embedding.model for embedding in embeddings if embedding.model is not None), None),
        request_id=ids.pop() if len(ids) == 1 else None,
    )


def as_base64(vector: array[float]) -> str:
    """Return *vector* as base64 of little-endian 32-bit floats."""
    return base64.b64encode(vector_bytes(vector)).decode()


def usage_of(reply: Reply[Any]) -> dict[str, Any]:
    """Return OpenAI's `usage` object of embeddings; an estimate is marked `microbatch_estimated`."""
    tokens = reply.usage.prompt_tokens
    fields: dict[str, Any] = {"prompt_tokens": tokens, "total_tokens": tokens}
    return fields | ({"microbatch_estimated": True} if reply.usage.estimated else {})
