"""Where `--cache` and `SPOOL` lead: a file, or an address of Redis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from microbatch.caching.guard import Guard
from microbatch.caching.redis import RedisCache
from microbatch.caching.sqlite import SQLiteCache
from microbatch.spool.redis import RedisSpool
from microbatch.spool.sqlite import SQLiteSpool

if TYPE_CHECKING:
    from microbatch.spool.records import Spool

_REDIS: Final = ("redis://", "rediss://", "unix://")

CACHE_HELP: Final = "keep answers in FILE (SQLite), or in Redis at redis://HOST:PORT/DB, and ask nothing twice"

PATIENCE: Final = 10.0
"""Seconds for which a failing call of the cache is repeated in bulk work: a server may be about to come back."""


def bulk_cache_at(place: str) -> Guard:
    """Return the cache at *place* for bulk work: each failing call is repeated, and `open` checks that the cache can be used.

    Raises:
        ConfigError: As `cache_at`.
    """
    return Guard(cache_at(place), patience=PATIENCE)


def cache_at(place: str, *, timeout: float = 5.0) -> SQLiteCache | RedisCache:
    """Return the cache at *place*.

    Args:
        place: A path or an address.
        timeout: Seconds for each step towards a server.

    Raises:
        ConfigError: The package redis is missing, or the address is malformed.
    """
    return RedisCache(place, timeout=timeout) if is_address(place) else SQLiteCache(place)


def is_address(place: str) -> bool:
    """Return whether *place* is the address of a server; else it is the path of a file."""
    return place.startswith(_REDIS)


def spool_at(place: str, *, max_alone: int) -> Spool:
    """Return the spool at *place*.

    Args:
        place: A path or an address.
        max_alone: Deliveries alone after which a request is dead.

    Raises:
        ConfigError: The package redis is missing, or the address is malformed.
    """
    return RedisSpool(place, max_alone=max_alone) if is_address(place) else SQLiteSpool(place, max_alone=max_alone)
