"""Reads the arguments of `Microbatcher.embed`: the options, which texts of one call have in common, and the text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.batching.request import as_headers, as_word, rank_of, request_fields
from microbatch.batching.ticket import Spec, text_of
from microbatch.checking import one_of, whole
from microbatch.embedding.vectors import VECTOR
from microbatch.errors import ConfigError
from microbatch.messages import Priority
from microbatch.prompt.compose import item_line
from microbatch.prompt.message_forms import encoded

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from microbatch.embedding.vectors import VectorAnswer

OURS: Final = frozenset({"input", "model", "dimensions", "encoding_format"})
"""Request fields that `embed` has an argument for or decides itself, and that `params` must not hold."""

_CONTENT: Final = "embeddings"
"""The beginning of keys, which tells lanes of texts from those of messages."""


class EmbeddingSpec(Spec, frozen=True, eq=False):
    """The options that the texts of a lane have in common; see `Spec`.

    Attributes:
        dimensions: Length of each vector; None for the model's own.
    """

    dimensions: int | None = None

    def counted_text(self, line: bytes) -> str:
        """See `Spec`: nothing is added to a text."""
        return text_of(line)


class EmbeddingOptions(msgspec.Struct, frozen=True):
    """The options of `embed`, checked and brought into the form that lanes compare.

    Attributes:
        content: All that two texts must have in common to have the same vector if they are equal: model, dimensions, the further fields
            as JSON, headers and tenant.
        rank: The priority as a number: 0 high, 1 normal, 2 low.
        answer: The form of the answer.
    """

    model: str
    dimensions: int | None
    params: Mapping[str, Any]
    headers: Mapping[str, str]
    tenant: str | None
    rank: int
    content: tuple[str, str, int | None, bytes, tuple[tuple[str, str], ...], str | None]
    answer: VectorAnswer = VECTOR

    @property
    def key(self) -> tuple[Hashable, ...]:
        """Return the options that the texts of a lane have in common."""
        return self.rank, *self.content

    def spec(self) -> EmbeddingSpec:
        """Return the same as a lane keeps it."""
        key = self.key
        return EmbeddingSpec(
            model=self.model,
            answer=self.answer,
            max_tokens=None,
            params=self.params,
            headers=self.headers,
            key=key,
            content=key[1:],
            shared=[],
            plain=None,
            tenant=self.tenant,
            rank=self.rank,
            shared_chars=0,
            dimensions=self.dimensions,
        )


def read_options(
    model: str | None,
    dimensions: int | None = None,
    params: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    tenant: str | None = None,
    priority: Priority = "normal",
    *,
    default_model: str | None = None,
) -> EmbeddingOptions:
    """Check the options of `embed` and return them.

    Raises:
        ConfigError: One is wrong, or there is no model; the message names it.
    """
    whole(1, dimensions=dimensions)
    one_of(Priority, priority=priority)
    model, tenant = as_word("model", model), as_word("tenant", tenant)
    named = model or default_model
    if not named:
        raise ConfigError(
            "no embedding model: give model=, or make the transport with one: OpenAIChat(embedding_model=...)"
        )
    fields = {} if params is None else request_fields(params, OURS, "embed")
    sent = as_headers(headers)
    asked = encoded(fields, "params", ordered=True) if fields else b""
    content = (_CONTENT, named, dimensions, asked, sent, tenant)
    return EmbeddingOptions(named, dimensions, fields, dict(sent), tenant, rank_of(priority), content)


def read_text(text: object, where: str = "the text", scratch: bytearray | None = None) -> bytes:
    """Return *text* as the line of a ticket; *where* names it in errors. *scratch* is a buffer, see `item_line`.

    Raises:
        ConfigError: It is not a string, is empty, or cannot be sent as UTF-8.
    """
    if type(text) is not str:
        if not isinstance(text, str):
            raise ConfigError(f"{where} to embed must be a string, got {type(text).__name__}")
        text = str.__str__(text)
    if not text:
        raise ConfigError(f"{where} to embed is empty, and an empty text has no embedding: leave it out")
    try:
        return item_line(text, scratch)
    except ConfigError as error:
        raise ConfigError(f"{where} to embed holds a lone surrogate, which cannot be sent as UTF-8") from error
