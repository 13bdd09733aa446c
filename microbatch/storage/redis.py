"""A connection to Redis that fails soon and plainly."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any, Final

from microbatch.errors import ConfigError, MicrobatchError, StorageError

if TYPE_CHECKING:
    from collections.abc import Generator

_QUOTE: Final = re.compile(r"b?['\"`]")


def connect(url: str, *, timeout: float, max_connections: int) -> Any:
    """Return a client for the server at *url*; nothing is sent yet.

    The client's own defaults are not for this: they retry ten times with five seconds each (58.9 s against a server that accepts
    and never answers), and raise as soon as the pool is empty. Here nothing is retried, and callers wait for a connection. That wait
    has no limit of its own: whoever holds one gives it back within a few times *timeout*, and nobody is to fail for being one of many.

    Args:
        url: `redis://`, `rediss://` or `unix://`, with the number of the database and credentials if need be.
        timeout: Seconds for each of: connecting, each write, and each read.
        max_connections: Most connections open at once.

    Raises:
        ConfigError: The package redis is missing, or the address is malformed.
    """
    try:
        from redis import asyncio as redis  # noqa: PLC0415 of the extra `redis`
    except ImportError:
        raise ConfigError("Redis needs the package redis: pip install 'microbatch[redis]'") from None
    try:
        pool = redis.BlockingConnectionPool.from_url(
            url,
            max_connections=max_connections,
            timeout=None,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=None,
            # With version 3 the client (8.1.0) no longer looks whether a connection that it takes from its pool has something left to
            # be read, and hands out the answer to a command as that to the next one; it also says hello twice more.
            protocol=2,
        )
    except (ValueError, TypeError, AttributeError) as error:
        # Not quoted: addresses hold passwords.
        raise ConfigError(
            f"the address of Redis is malformed ({type(error).__name__}): write redis://host:6379/0"
        ) from None
    return redis.Redis.from_pool(pool)


@contextlib.contextmanager
def translated() -> Generator[None]:
    """Tell what the client raises inside as `StorageError`.

    Raises:
        StorageError: The server cannot be reached, did not answer in time, refused, or does not speak the protocol.
    """
    try:
        yield
    except MicrobatchError:
        raise
    except Exception as error:
        # The client's parser raises whatever its code meets when an answer is not what it should be: ValueError, TypeError, ...
        error.args = (_unquoted(error),)
        raise StorageError(f"Redis: {type(error).__name__}: {error}") from error


def _unquoted(error: Exception) -> str:
    """Return the message of *error* without what it quotes: commands, with keys and texts of callers, and broken answers."""
    return _QUOTE.split(str(error), maxsplit=1)[0].strip(" :")


async def results_of(pipeline: Any) -> list[Any]:
    """Send what is in *pipeline*; return the results, or raise the first error among them.

    The client's own way puts the failed command before the server's words, and with it what callers said.
    """
    results: list[Any] = await pipeline.execute(raise_on_error=False)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
