"""A Redis server as a store: connections that fail soon, and errors without callers' data."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any, Final

from microbatch.errors import ConfigError, MicrobatchError, StorageError

if TYPE_CHECKING:
    from collections.abc import Generator

_QUOTE: Final = re.compile(r"b?['\"`]")
_LONGEST: Final = 100 * 365 * 86_400.0  # seconds; the server refuses times that do not fit its integers


class RedisStore:
    """Base of a store on a Redis server; `RedisCache` documents the arguments, and checks them.

    The client's defaults retry ten times with five seconds each (58.9 s for a server that accepts and never answers), and raise when
    all connections of the pool are in use. Here nothing is retried, and callers wait for a connection without a limit of its own: each
    is returned within a few times *timeout*.
    """

    def __init__(self, url: str, *, prefix: str, timeout: float, max_connections: int) -> None:
        self._url = url
        self._prefix = prefix
        self._timeout = timeout
        self._max_connections = max_connections
        self._client: Any = None
        self._connect()  # sends nothing; a malformed address is reported now

    def __repr__(self) -> str:
        # Without the address, which may hold a password.
        return f"<{type(self).__name__}: {self._prefix}*, {'closed' if self._client is None else 'open'}>"

    def _connect(self) -> Any:
        """Return a client; nothing is sent yet."""
        try:
            from redis import asyncio as redis  # noqa: PLC0415 of the extra `redis`
        except ImportError:
            raise ConfigError("Redis needs the package redis: pip install 'microbatch[redis]'") from None
        try:
            pool = redis.BlockingConnectionPool.from_url(
                self._url,
                max_connections=self._max_connections,
                timeout=None,
                socket_timeout=self._timeout,
                socket_connect_timeout=self._timeout,
                retry=None,
                # With version 3 the client (8.1.0) no longer checks a pooled connection for unread data, and returns the answer to
                # one command as that to the next; it also sends HELLO twice more.
                protocol=2,
            )
        except (ValueError, TypeError, AttributeError) as error:  # not quoted: addresses hold passwords
            raise ConfigError(
                f"the address of Redis is malformed ({type(error).__name__}): write redis://host:6379/0"
            ) from None
        return redis.Redis.from_pool(pool)

    async def open(self) -> None:
        """Prepare the client. Nothing is sent, so a server that is down delays no start."""
        self._client = self._connect()

    def _opened(self) -> Any:
        if self._client is None:
            raise StorageError(f"the {type(self).__name__} is not open")
        return self._client

    async def aclose(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(StorageError), translated():
                await client.aclose()


@contextlib.contextmanager
def translated() -> Generator[None]:
    """Turn the client's exceptions into `StorageError`."""
    try:
        yield
    except MicrobatchError:
        raise
    except Exception as error:
        # For a malformed answer the client's parser raises ValueError, TypeError and others.
        # What follows a quote is dropped: commands, with keys and texts of callers, and broken answers.
        message = _QUOTE.split(str(error), maxsplit=1)[0].strip(" :")
        error.args = (message,)
        raise StorageError(f"Redis: {type(error).__name__}: {message}") from error


async def results_of(pipeline: Any) -> list[Any]:
    """Send the commands in *pipeline*; return their results, or raise the first error among them."""
    # The client's own method puts the failed command, with its arguments, before the server's message.
    results: list[Any] = await pipeline.execute(raise_on_error=False)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def milliseconds(seconds: float) -> int:
    """Return a duration as the server takes it."""
    return round(min(seconds, _LONGEST) * 1000)
