"""`SemanticCache`: a cache that also answers questions that are similar to those that were asked before."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from microbatch.caching.deletion import Deleting, of_tenant
from microbatch.caching.guard import Guard, secret_of
from microbatch.caching.key import tenant_digest
from microbatch.checking import Positive, Share, checks_arguments, plain_function
from microbatch.errors import ConfigError
from microbatch.lru import LRU
from microbatch.protocols import Cache
from microbatch.semantic.evidence import KindEvidence
from microbatch.semantic.index import Index
from microbatch.semantic.vectors import load_numpy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from microbatch.caching.deletion import Matches

_MOST_KINDS = 1_024
"""Kinds of questions whose evidence is kept: those used last."""


class SemanticCache(Deleting, Cache):
    """Hands out answers to similar questions, where that was shown to be right, in addition to those of an exact cache.

    Use it as `Microbatcher(cache=)`. The answers are in the exact cache only, whose time to live, deletions and limits govern. This
    object keeps the vectors of their questions, and the evidence; both are lost with the process. Questions are similar only if all of
    the request but the last text is equal, tenant, headers, model, parameters and schema included, and if both state the same facts:
    numbers, dates, negations, quotations, names, codes (see `microbatch.semantic.guards`).

    A kind of question, those with the same model, schema and instructions, is asked as ever at first, and its answers are compared with
    those to similar questions. Only when the share of wrong ones above a similarity was shown to be below *max_error*, beyond the
    model's disagreement with itself, are answers handed out above it, with the route "similar"; for 0.01 that takes 500 comparisons or
    more. 5 % of them are asked again. Where answers cannot be compared, or are not the same, nothing is ever handed out. See
    `Stats.similar`.

    It may be shared by the batchers of one event loop, which should use the same vectors then. Within a `TieredCache` it is its exact
    cache and nothing more: put the tiers into it.

    Args:
        exact: The cache of answers: any other than this one.
        embed: An async function from a list of texts to a list of as many vectors of numbers, called on the event loop; None for the
            batcher's own endpoint.
        model: The embedding model if *embed* is None; None for the transport's.
        max_error: The largest share of wrong answers that is accepted, above 0 and below 1.
        same: A plain function that takes the kept output and one that was asked for, and returns whether they are the same. None
            compares typed answers by their values, and texts of at most 64 characters but for case and white space; with longer texts
            nothing is handed out.
        lookup_timeout: Seconds for a look-up at most. Requests of kinds that are proven wait so long for theirs, and not at all after
            one that took longer.
        isolate: Whether each tenant, and each set of headers, has evidence of its own.

    Attributes:
        ttl: That of the exact cache.

    Raises:
        ConfigError: An argument is wrong, or numpy is not installed (the extra `semantic`).
    """

    @checks_arguments
    def __init__(
        self,
        exact: Cache,
        *,
        embed: Callable[[list[str]], Awaitable[Sequence[Any]]] | None = None,
        model: str | None = None,
        max_error: Share = 0.01,
        same: Callable[[Any, Any], bool] | None = None,
        lookup_timeout: Positive = 0.5,
        isolate: bool = False,
    ) -> None:
        if isinstance(exact, SemanticCache):
            raise ConfigError("the exact cache of a SemanticCache must be another kind of cache")
        if not 0 < max_error < 1:
            raise ConfigError(f"max_error must be above 0 and below 1, got {max_error}")
        if embed is not None and model is not None:
            raise ConfigError(
                "model= names the embedding model of the batcher's own endpoint; with embed= it has no use"
            )
        plain_function(same, same="True or False")
        load_numpy()
        self.exact = exact
        self.embed = embed
        self.model = model
        self.max_error = max_error
        self.same = same
        self.lookup_timeout = lookup_timeout
        self.isolate = isolate
        self.index: Index = Index()
        """The vectors; for the batcher."""
        self.kinds: LRU[str, KindEvidence] = LRU(_MOST_KINDS)
        """The evidence of each kind; for the batcher."""

    def __repr__(self) -> str:
        return f"<SemanticCache: {len(self.index)} vectors, {self.exact!r}>"

    @property
    def ttl(self) -> float | None:
        """Seconds for which answers are valid unless the request says otherwise; None for no limit."""
        return getattr(self.exact, "ttl", None)

    @property
    def evictions(self) -> int:
        """Number of entries that the exact cache dropped for lack of space."""
        return getattr(self.exact, "evictions", 0)

    def kind(self, digest: str, model: str | None) -> KindEvidence:
        """Return the evidence of the kind named *digest*; for the batcher."""
        return self.kinds.get_or_make(digest, lambda: KindEvidence(digest=digest, model=model, bound=self.max_error))

    # --- the exact cache

    async def open(self) -> None:
        """Open the exact cache."""
        opening = getattr(self.exact, "open", None)
        if opening is not None:
            await opening()

    async def secret(self) -> bytes | None:
        """Return the 32 bytes that key the digests; None if they are not available now."""
        return await secret_of(self.exact)

    async def get_many(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        """Return the value of each key in the exact cache, None for keys without one."""
        return await self.exact.get_many(keys)

    async def set_many(self, entries: Sequence[tuple[bytes, bytes, float | None]]) -> None:
        """Store *entries* in the exact cache: key, value and seconds to live."""
        await self.exact.set_many(entries)

    async def aclose(self) -> None:
        """Close the exact cache. Vectors and evidence stay, so that another batcher can use them."""
        await self.exact.aclose()

    # --- deleting

    async def entries(self) -> AsyncIterator[list[tuple[bytes, bytes]]]:
        """Yield the entries of the exact cache, in pages of keys and values."""
        async for page in self._deleting.entries():
            yield page

    async def delete(self, keys: Sequence[bytes]) -> int:
        """Delete the entries with *keys*, and their vectors; return how many there were in the exact cache."""
        self.index.remove(keys)
        return await self._deleting.delete(keys)

    async def clear(self, tenant: str | None = None) -> int:
        """Delete all entries, or those of *tenant*, and their vectors; see `Deleting.clear`."""
        exact = self._deleting
        if tenant is None:
            self.index.clear()
            return await exact.erase(None)
        matches = await of_tenant(self, tenant)
        secret = await self.secret()
        wanted = None if secret is None else tenant_digest(tenant, secret)
        self.index.clear(lambda digest: digest == wanted)
        return await exact.erase(matches)

    async def erase(self, matches: Matches | None) -> int:
        """Delete the entries that match, all with None, and their vectors; return their number."""
        if matches is None:
            return await self.clear()
        gone: list[bytes] = []

        def noted(key: bytes, value: bytes) -> bool:
            found = matches(key, value)
            if found:
                gone.append(key)
            return found

        try:
            return await self._deleting.erase(noted)
        finally:
            self.index.remove(gone)

    @property
    def _deleting(self) -> Deleting:
        exact = self.exact.cache if isinstance(self.exact, Guard) else self.exact
        if not isinstance(exact, Deleting):
            raise ConfigError(f"entries cannot be deleted in {type(exact).__name__}")
        return exact
