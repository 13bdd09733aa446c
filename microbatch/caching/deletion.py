"""Deleting entries of caches: some, those of a tenant, or all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, TypeAlias

from microbatch.caching import entry as entries
from microbatch.caching.guard import secret_of
from microbatch.caching.key import tenant_digest
from microbatch.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    Matches: TypeAlias = Callable[[bytes, bytes], bool]
    """Returns whether an entry, given as its key and value, is to be deleted."""


class Deleting(ABC):
    """Base of caches whose entries can be listed and deleted.

    Calls raise `StorageError` if the store fails; then some of the entries may have been deleted.
    """

    @abstractmethod
    def entries(self) -> AsyncIterator[list[tuple[bytes, bytes]]]:
        """Yield all entries, expired ones included, in pages of keys and values.

        What is stored or deleted meanwhile may be missing. The others are there, and in Redis may be there twice.
        """
        ...

    @abstractmethod
    async def delete(self, keys: Sequence[bytes]) -> int:
        """Delete the entries with *keys*; return how many there were."""
        ...

    async def clear(self, tenant: str | None = None) -> int:
        """Delete all entries, or those of *tenant*, and return their number.

        Entries that do not say whose they are, those of releases without an audit and damaged ones, are deleted for any tenant. What
        is stored while this runs may stay: a batcher that has answers of the tenant under way should be closed before.

        Raises:
            ConfigError: *tenant* is no string.
            StorageError: The store failed.
        """
        return await self.erase(None if tenant is None else await of_tenant(self, tenant))

    async def erase(self, matches: Matches | None) -> int:
        """Delete the entries that match, all with None; return their number."""
        erased = 0
        async for page in self.entries():
            keys = [key for key, value in page if matches is None or matches(key, value)]
            erased += await self.delete(keys) if keys else 0
        return erased


async def of_tenant(cache: Any, tenant: str) -> Matches:
    """Return what matches the entries of *cache* that are those of *tenant*, or may be; for errors see `Deleting.clear`."""
    if not isinstance(tenant, str):
        raise ConfigError(f"tenant must be a string, got {type(tenant).__name__}")
    secret = await secret_of(cache)
    if secret is None:
        raise StorageError("the secret that keys the digests of tenants is not available")
    wanted = tenant_digest(tenant, secret)

    def matches(_key: bytes, value: bytes) -> bool:
        entry = entries.decode(value)
        return not isinstance(entry, entries.Entry) or entry.tenant == wanted

    return matches
