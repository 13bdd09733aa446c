"""A Redis server as a store: connections that fail soon, and errors without callers' data."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.errors import ConfigError, MicrobatchError, StorageError
from microbatch.storage.address import client_address

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Sequence

_QUOTE: Final = re.compile(r"(?<![A-Za-z])b?['\"`]|[\"`]|'(?![A-Za-z])")
"""The beginning of a quotation; between two letters there is an apostrophe."""

_ABOUT_RIGHTS: Final = "NoPermissionError"
_NO_SCRIPT: Final = "NoScriptError"
_ABOUT_REACH: Final = frozenset({"ConnectionError", "TimeoutError", "OSError", "ClusterError", "RedisClusterException"})
_ABOUT_LOGIN: Final = frozenset({"AuthenticationError", "AuthorizationError"})
_QUOTE_NOTHING: Final = frozenset({_ABOUT_RIGHTS, "OutOfMemoryError", "ReadOnlyError", "MasterDownError"})
"""Errors in which the server quotes names of commands and settings, and nothing of what it was sent."""

_NO_LIMIT: Final = 2**31
_LONGEST: Final = 100 * 365 * 86_400.0  # seconds; the server refuses times that do not fit its integers
_NUMBERS: Final = re.compile(r"\d+")


class Server(msgspec.Struct, frozen=True):
    """A server, as it describes itself.

    Attributes:
        version: Such as "7.0.15"; "" if it is not known.
        cluster: Whether it is part of a cluster.
        replica: Whether it is a copy of another server, which by default takes no writes.
    """

    version: str = ""
    cluster: bool = False
    replica: bool = False

    @property
    def major(self) -> int | None:
        """The first number of the version; None if it is not known."""
        found = _NUMBERS.match(self.version)
        return None if found is None else int(found[0])


class RedisStore:
    """Base of a store on a Redis server; `RedisCache` documents the arguments, and checks them.

    The client's defaults retry ten times with five seconds each (58.9 s for a server that accepts and never answers), and raise when
    all connections of the pool are in use. Here nothing is retried, and callers wait for a connection without a limit of its own: each
    is returned within a few times *timeout*.
    """

    def __init__(self, url: str, *, prefix: str, timeout: float, max_connections: int) -> None:
        self._url = client_address(url)
        self._prefix = prefix
        self._timeout = timeout
        self._max_connections = max_connections
        self._client: Any = None
        self._server: Server | None = None  # once it was asked
        self._asking = asyncio.Lock()
        self._turns: contextlib.AbstractAsyncContextManager[Any] = contextlib.nullcontext()
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
                retry=None,
                **self._limits(),
            )
        except (ValueError, TypeError, AttributeError):  # not quoted: addresses hold passwords
            raise ConfigError(
                "the address of Redis is malformed (its port or an option cannot be read): write redis://host:6379/0"
            ) from None
        return redis.Redis.from_pool(pool)

    def _connect_to_cluster(self) -> Any:
        """Return a client of the cluster that the address is a node of; nothing is sent yet."""
        from redis import asyncio as redis  # noqa: PLC0415 of the extra `redis`
        from redis.asyncio.retry import Retry  # noqa: PLC0415
        from redis.backoff import NoBackoff  # noqa: PLC0415

        return redis.RedisCluster.from_url(
            self._url,
            max_connections=_NO_LIMIT,  # it would raise where the other client waits; see `_turns`
            retry=Retry(NoBackoff(), 1),  # for the second try it asks for the shape that the cluster has now
            **self._limits(),
        )

    def _limits(self) -> dict[str, Any]:
        return {
            "socket_timeout": self._timeout,
            "socket_connect_timeout": self._timeout,
            # With version 3 the client (8.1.0) no longer checks a pooled connection for unread data, and returns the answer to one
            # command as that to the next; it also sends HELLO twice more.
            "protocol": 2,
        }

    async def open(self) -> None:
        """Prepare the client. Nothing is sent, so a server that is down delays no start."""
        self._client, self._server = self._connect(), None
        self._asking, self._turns = asyncio.Lock(), contextlib.nullcontext()

    def _opened(self) -> Any:
        if self._client is None:
            raise StorageError(f"the {type(self).__name__} is not open")
        return self._client

    @contextlib.asynccontextmanager
    async def _in_use(self) -> AsyncGenerator[Any]:
        """Yield the client that suits the server, and turn its exceptions into `StorageError`."""
        self._opened()
        with translated():
            if self._server is None:
                async with self._asking:
                    await self._meet()
            async with self._turns:
                yield self._opened()

    async def reach(self) -> None:
        """Make the first contact; raise `StorageError` if the server cannot be reached."""
        async with self._in_use():
            pass

    async def _meet(self) -> None:
        """At the first contact, ask the server what it is, and take another client if it is part of a cluster."""
        if self._server is not None:
            return
        client = self._opened()
        server = await describe(client)
        if server.cluster:
            self._client, self._turns = self._connect_to_cluster(), asyncio.Semaphore(self._max_connections)
        self._server = server
        self._met(server)
        if self._client is not client:
            await client.aclose()

    def _met(self, server: Server) -> None:
        """Take note of what the *server* is."""

    async def _run_script(self, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """Run a *script*, which is sent only if the server does not have it, and return its result."""
        # Not for secrecy: it is how the server names scripts.
        name = hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
        async with self._in_use() as client:
            try:
                return await client.evalsha(name, len(keys), *keys, *arguments)
            except Exception as error:
                if type(error).__name__ != _NO_SCRIPT:
                    raise
            return await client.eval(script, len(keys), *keys, *arguments)

    async def _drop_connections(self) -> None:
        """Close the connections that are not in use, because one may be out of step."""
        client = self._opened()
        with translated():
            if self._server is not None and self._server.cluster:
                await client.aclose()  # it opens new ones
            else:
                await client.connection_pool.disconnect(inuse_connections=False)

    async def aclose(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(StorageError), translated():
                await client.aclose()


async def describe(client: Any) -> Server:
    """Return what the server of *client* is; of one that does not say, nothing is known."""
    from redis.exceptions import ResponseError  # noqa: PLC0415 of the extra `redis`

    with contextlib.suppress(ResponseError):  # a user who may not send it, or a proxy
        said = await client.execute_command("HELLO")
        if isinstance(said, list):
            facts = dict(zip(map(_word, said[::2]), map(_word, said[1::2]), strict=False))
            return Server(facts.get("version", ""), facts.get("mode") == "cluster", facts.get("role") == "replica")
    with contextlib.suppress(ResponseError):
        info = await client.info()
        if isinstance(info, dict):
            mode, role = info.get("redis_mode"), info.get("role")
            return Server(str(info.get("redis_version", "")), mode == "cluster", role == "slave")
    return Server()


def _word(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


@contextlib.contextmanager
def translated() -> Generator[None]:
    """Turn the client's exceptions into `StorageError`."""
    try:
        yield
    except MicrobatchError:
        raise
    except Exception as error:
        # For a malformed answer the client's parser raises ValueError, TypeError and others.
        kind, message = type(error).__name__, str(error)
        if kind not in _QUOTE_NOTHING:
            # The text from a quote on is dropped: it holds commands with keys and texts of callers, or broken answers.
            message = _QUOTE.split(message, maxsplit=1)[0]
        message = message.strip(" :(,")
        error.args = (message,)
        raise StorageError(f"Redis: {kind}: {message}") from error


def is_about_rights(error: StorageError) -> bool:
    """Return whether *error*, from `translated`, says that the user may not do this."""
    return type(error.__cause__).__name__ == _ABOUT_RIGHTS


def is_about_reach(error: StorageError) -> bool:
    """Return whether *error*, from `translated`, says that the server cannot be reached now, and not that it refuses."""
    kinds = {kind.__name__ for kind in type(error.__cause__).__mro__}
    return bool(kinds & _ABOUT_REACH) and not kinds & _ABOUT_LOGIN


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
