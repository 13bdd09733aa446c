"""The SDK's `client.embeddings`: texts are embedded together with those of other requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, cast

from microbatch.errors import ConfigError
from microbatch.messages import Reply, Usage
from microbatch.openai.compatible import raw
from microbatch.openai.embedding import (
    HARMLESS_FIELDS,
    EmbeddingRequest,
    as_base64,
    embed_all,
    read_embedding_request,
    reply_of,
    usage_of,
)
from microbatch.openai.objects import CreateEmbeddingResponse
from microbatch.openai.options import given_options, is_given, request_body
from microbatch.openai.relayed import ask_json
from microbatch.transports.addresses import EMBEDDINGS
from microbatch.transports.reply_fields import read_usage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from microbatch.client import Microbatcher
    from microbatch.messages import Priority, UseCache
    from microbatch.openai.compatible import RawResponse

_OF_EMBED = ("timeout", "tenant", "priority", "use_cache")


class EmbeddingOptions(TypedDict, total=False):
    """Arguments of `Embeddings.create`, all optional: fields of the API, and options of the SDK and of `Microbatcher.embed`."""

    model: str | None
    dimensions: int | None
    encoding_format: Literal["float", "base64"] | None
    user: str | None

    timeout: float | None
    extra_headers: Mapping[str, str] | None
    extra_body: Mapping[str, Any] | None
    extra_query: Mapping[str, Any] | None
    tenant: str | None
    priority: Priority
    use_cache: UseCache


class Embeddings:
    """Asks for embeddings, with the arguments and results of the SDK.

    Args:
        batcher: Coalesces the texts.
        defaults: Options of requests that do not give them.
    """

    def __init__(self, batcher: Microbatcher, defaults: Mapping[str, Any] | None = None) -> None:
        self._batcher = batcher
        self._defaults = dict(defaults or {})
        self._harmless = HARMLESS_FIELDS.union(batcher._policy.combine_params)  # noqa: SLF001 of this package

    @property
    def with_raw_response(self) -> RawEmbeddings:
        """`create` that returns a `RawResponse`, whose `parse()` returns the result."""
        return RawEmbeddings(self)

    async def create(
        self,
        *,
        input: str | Iterable[str] | Iterable[int] | Iterable[Iterable[int]],  # noqa: A002 the SDK's name
        **options: Unpack[EmbeddingOptions],
    ) -> CreateEmbeddingResponse:
        """Ask for the vectors of texts. None, and the SDK's `NOT_GIVEN` and `omit`, mean "not given" for every argument.

        Args:
            input: A text or several. Arrays of tokens, more than 2,048 texts and an empty text are sent alone, unchanged, and are not
                tried again.
            **options: See `EmbeddingOptions`. The model defaults to the transport's `embedding_model`. With
                `encoding_format="base64"` the vectors are base64, else lists of numbers. Other fields in `extra_body` also send the
                request alone, unless `FlushPolicy.combine_params` names them. What is sent alone has to name its model. `timeout`
                covers retries too.

        Returns:
            The vectors in the order of the texts, with this request's share of the tokens.

        Raises:
            ConfigError: An argument is wrong; nothing was sent.
            BatcherClosed: The batcher is not open.
            Overloaded: Too many requests are pending.
            RequestFailed: A text could not be embedded, as in `Microbatcher.embed`; there are no vectors of the others.
        """
        given = given_options(self._defaults, options)
        body = request_body(given, input=_as_json(input))
        asked = read_embedding_request(body, harmless=self._harmless)
        if not isinstance(asked, EmbeddingRequest):
            return await self._ask_alone(body, given, asked)
        embeddings = await embed_all(
            self._batcher,
            asked.texts,
            **asked.arguments,
            headers=given.get("extra_headers"),
            **{name: given[name] for name in _OF_EMBED if name in given},
        )
        encode = as_base64 if asked.encoding == "base64" else list
        reply = reply_of(embeddings)
        response = CreateEmbeddingResponse(
            {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": index, "embedding": encode(embedding.vector)}
                    for index, embedding in enumerate(embeddings)
                ],
                "model": reply.model or body.get("model") or "",
                "usage": usage_of(reply),
            }
        )
        response.microbatch = reply
        return response

    async def _ask_alone(
        self, body: Mapping[str, Any], given: Mapping[str, Any], alone: Sequence[str]
    ) -> CreateEmbeddingResponse:
        """Send *body* unchanged, because of the fields *alone*."""
        if not body.get("model"):
            raise ConfigError(f"{EMBEDDINGS}: a request with this {alone[0]} is sent unchanged, so name its model")
        members, request_id = await ask_json(
            self._batcher,
            EMBEDDINGS,
            body,
            given.get("extra_headers"),
            given.get("timeout"),
            alone=alone,
            tenant=given.get("tenant"),
        )
        response = CreateEmbeddingResponse(members)
        usage = read_usage(members.get("usage")) or Usage(estimated=True)
        response.microbatch = Reply(
            None, "", "forward", usage, model=cast("str | None", members.get("model")), request_id=request_id
        )
        return response


def _as_json(given: object) -> str | list[Any] | None:
    """Return *given*, an argument `input`, as it is sent; None if there is none.

    Raises:
        ConfigError: It is neither a string nor a list: bytes would be sent as tokens, and of a mapping the keys.
    """
    if isinstance(given, str):
        return given
    if not is_given(given):
        return None
    if not isinstance(given, Iterable) or isinstance(given, bytes | bytearray | memoryview | Mapping):
        raise ConfigError(f"input must be a text, a list of texts, or tokens, got {type(given).__name__}")
    return list(given)


class RawEmbeddings:
    """The method of `Embeddings` with raw responses."""

    def __init__(self, embeddings: Embeddings) -> None:
        self.create: Callable[..., Awaitable[RawResponse[CreateEmbeddingResponse]]] = raw(embeddings.create)
