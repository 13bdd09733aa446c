"""`embed` and `embed_many`, as methods of the public class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from microbatch.embedding.embedder import Embedder
    from microbatch.messages import Embedding, Priority, UseCache


class Embeds:
    """The part of `Microbatcher` that is about embeddings."""

    _embedder: Embedder

    async def embed(
        self,
        text: str,
        *,
        model: str | None = None,
        dimensions: int | None = None,
        params: Mapping[str, Any] | None = None,
        tenant: str | None = None,
        headers: Mapping[str, str] | None = None,
        priority: Priority = "normal",
        timeout: float | None = None,
        use_cache: UseCache = True,
    ) -> Embedding:
        """Return the vector of *text*, asked for together with other texts, and this caller's share of the cost.

        Texts travel together if all options are equal: at most 2,048 of them with 300,000 tokens in one call. Vectors are matched by
        index, and checked; nothing that one text holds affects the vector of another.

        Args:
            text: The text; not empty.
            model: Name of the embedding model; None for the transport's `embedding_model`.
            dimensions: Length of the vector; None for the model's own.
            params: Any other request field.
            tenant: Name of a trust domain; texts of different tenants never share a call. None for the batcher's own.
            headers: This caller's headers. With a credential among them, the transport's own key is not sent.
            priority: "high" waits for no others; "low" waits for full lists, up to `low_max_wait`.
            timeout: Seconds from now until the caller gives up; None waits as long as the transport does.
            use_cache: Whether the vector of an equal text will do: from the cache, or from a call under way. "refresh" asks anew, and
                replaces the vector that the cache has.

        Raises:
            ConfigError: An argument is wrong, there is no model, or the transport makes no embeddings calls; nothing was sent.
            BatcherClosed: The batcher is not open, or belongs to another event loop.
            Overloaded: `max_queued` requests are pending and `when_full` does not wait.
            MalformedAnswer: The endpoint has no usable vector for this text, also when it is asked for it alone, twice.
            RequestFailed: What else ended the request; see its subclasses.
        """
        options = self._embedder.read_options(model, dimensions, params, headers, tenant, priority)
        return await self._embedder.embed(text, options, timeout=timeout, use_cache=use_cache)

    async def embed_many(
        self,
        texts: Iterable[str],
        *,
        model: str | None = None,
        dimensions: int | None = None,
        params: Mapping[str, Any] | None = None,
        tenant: str | None = None,
        headers: Mapping[str, str] | None = None,
        priority: Priority = "normal",
        timeout: float | None = None,
        use_cache: UseCache = True,
    ) -> list[Embedding]:
        """Return the vectors of any number of *texts*, in their order, in full lists and bounded memory beside the vectors.

        *texts* are an iterable of strings, none of them empty. An iterator is read as vectors arrive; a list or tuple is checked first,
        and nothing is sent if a text in it is wrong. The options are those of `embed`; *timeout* counts for all texts together.

        After an error no more texts are taken, and the error of the earliest text is raised once those under way have ended; with a
        cache their vectors are kept. An error of *texts* itself is raised at once.

        Raises:
            ConfigError: An argument or a text is wrong.
            BatcherClosed: The batcher is not open, or closes before the end.
            RequestFailed: What has ended one of them.
        """
        options = self._embedder.read_options(model, dimensions, params, headers, tenant, priority)
        return await self._embedder.embed_many(texts, options, timeout=timeout, use_cache=use_cache)
