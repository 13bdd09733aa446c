"""Counters in Redis, shared by processes and machines."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

from microbatch.storage.redis import RedisStore

if TYPE_CHECKING:
    from microbatch.spending.counters import Counter

_TIMEOUT: Final = 2.0
"""Seconds for connecting, each write and each read: calls wait for them."""

_CONNECTIONS: Final = 16
_LEEWAY: Final = 3_600
"""Seconds for which a counter is kept beyond the end of its period, for calls that end later and clocks that are behind."""

# Adds, unless that would exceed a limit; returns whether it has, and the totals. A number that is none ("") is no limit.
_ADD: Final = """
local had = redis.call('HMGET', KEYS[1], 'usd', 'tokens')
local usd, tokens = tonumber(had[1] or '0'), tonumber(had[2] or '0')
local most_usd, most_tokens = tonumber(ARGV[3]), tonumber(ARGV[4])
if (most_usd and usd + tonumber(ARGV[1]) > most_usd) or (most_tokens and tokens + tonumber(ARGV[2]) > most_tokens) then
    return {0, had[1] or '0', had[2] or '0'}
end
usd = redis.call('HINCRBYFLOAT', KEYS[1], 'usd', ARGV[1])
tokens = redis.call('HINCRBY', KEYS[1], 'tokens', ARGV[2])
if ARGV[5] ~= '' then
    redis.call('EXPIREAT', KEYS[1], ARGV[5])
end
return {1, usd, tostring(tokens)}
"""


class SharedCounters(RedisStore):
    """Counters on a Redis server, each in one hash, read and changed in one step.

    Raises:
        ConfigError: The package redis is missing, or the address is malformed.
    """

    def __init__(self, url: str, per: str) -> None:
        super().__init__(url, prefix=f"microbatch:budget:{per}:", timeout=_TIMEOUT, max_connections=_CONNECTIONS)

    async def add(
        self, counter: Counter, usd: float, tokens: int, most_usd: float | None = None, most_tokens: int | None = None
    ) -> bool:
        """Add to *counter*, unless a total would exceed its limit; return whether it was added. *counter* gets the totals.

        Raises:
            StorageError: The server cannot be used. It may have been added.
        """
        end = counter.span.end
        arguments: list[Any] = [repr(usd), tokens, "" if most_usd is None else repr(most_usd)]
        arguments += ["" if most_tokens is None else most_tokens, "" if end is None else round(end) + _LEEWAY]
        async with self._in_use() as client:
            added, spent, taken = await client.eval(_ADD, 1, self._key(counter), *arguments)
            counter.usd, counter.tokens = float(spent), int(taken)
        return bool(added)

    def _key(self, counter: Counter) -> str:
        key = f"{self._prefix}{counter.span.name}"
        if counter.tenant is None:
            return key
        # Names of tenants may be confidential, and long.
        return f"{key}:{blake2b(counter.tenant.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"
