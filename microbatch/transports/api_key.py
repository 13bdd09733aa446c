"""The key that a transport sends: fixed, from the environment, or from a function of the user's whose keys expire."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeAlias
from urllib.parse import urlsplit

from anyio import to_thread

from microbatch.errors import ConfigError, ConnectFailed, MicrobatchError
from microbatch.transports.addresses import DEFAULT_BASE_URL, host_and_port

if TYPE_CHECKING:
    from collections.abc import Mapping

KeyFunction: TypeAlias = Callable[[], str] | Callable[[], Awaitable[str]]

KEY_TIMEOUT: Final = 30.0
"""Longest time that a function may take to return a key, in seconds."""


def environment_key(base_url: str) -> str | None:
    """Return OPENAI_API_KEY if it may be sent to *base_url*: to OpenAI's hosts, and to OPENAI_BASE_URL's, set with it."""
    scheme, host = _origin(base_url)
    # OpenAI has hosts of regions, too.
    own = scheme == "https" and f".{host}".endswith(f".{host_and_port(DEFAULT_BASE_URL)}")
    beside = os.environ.get("OPENAI_BASE_URL")
    return os.environ.get("OPENAI_API_KEY") if own or (beside and _origin(beside) == (scheme, host)) else None


class ApiKey:
    """A key, or a function that returns one; *key* is None or "" for no key.

    The function is called at first use, and again after the endpoint has refused its key. Callers that need a key meanwhile share
    one call. An async function runs in the event loop, any other in a thread.
    """

    def __init__(self, key: str | KeyFunction | None) -> None:
        self._function = key if callable(key) else None
        self._key = _checked(key) if key and not callable(key) else ""
        self._known = self._function is None
        self._asking: asyncio.Task[None] | None = None

    def __bool__(self) -> bool:
        return self._function is not None or bool(self._key)

    @property
    def fixed(self) -> str:
        """The key; "" if there is none, or a function returns it."""
        return "" if self._function is not None else self._key

    async def headers(self, timeout: float) -> dict[str, str]:
        """Return the Authorization header, if there is a key.

        Raises:
            ConfigError: The function returned something that is no key.
            ConnectFailed: It raised, or took longer than `KEY_TIMEOUT` or *timeout* seconds.
        """
        if not self._known:
            loop = asyncio.get_running_loop()
            asking = self._asking
            if asking is None or asking.done() or asking.get_loop() is not loop:
                # A task of its own: a caller that is cancelled takes nothing from the others.
                asking = self._asking = loop.create_task(self._ask(), context=contextvars.Context())
                asking.add_done_callback(_retrieved)
            await asyncio.wait([asking], timeout=timeout)
            if not asking.done() or asking.cancelled():
                raise ConnectFailed(
                    "no key: api_key() had not returned when the call's time was up or the transport closed"
                )
            try:
                asking.result()
            except MicrobatchError as error:
                raise error.replica() from error
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def refused(self, header: Mapping[str, str]) -> bool:
        """Note that the endpoint refused *header*, of `headers`; return whether the function may return another key."""
        if self._function is None or not header:
            return False
        if header["Authorization"] == f"Bearer {self._key}":
            self._known = False  # else another call has asked for one already
        return True

    def renew(self) -> None:
        """Call the function again before the next call; a fixed key stays."""
        self._known = self._function is None

    def close(self) -> None:
        """Stop waiting for the function."""
        if self._asking is not None and not self._asking.get_loop().is_closed():
            self._asking.cancel()

    async def _ask(self) -> None:
        try:
            async with asyncio.timeout(KEY_TIMEOUT) as limit:
                key = await self._call()
        except Exception as error:
            late = isinstance(error, TimeoutError) and limit.expired()
            problem = f"took longer than {KEY_TIMEOUT:g} s" if late else f"raised {type(error).__name__}"
            raise ConnectFailed(f"no key: api_key() {problem}") from error
        self._key, self._known = _checked(key), True

    async def _call(self) -> str:
        function = self._function
        if function is None:
            return self._key
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
            key = function()
        else:
            key = await to_thread.run_sync(function, abandon_on_cancel=True)
        return await key if inspect.isawaitable(key) else key


def _retrieved(asking: asyncio.Task[None]) -> None:
    """Mark the error of *asking* as seen, in case all who waited for it were cancelled."""
    if not asking.cancelled():
        asking.exception()


def _checked(key: object) -> str:
    if not isinstance(key, str) or not key.isprintable() or not key.isascii() or key != key.strip():
        raise ConfigError("api_key must be one line of printable ASCII; a key read from a file may end in a line break")
    return key


def _origin(address: str) -> tuple[str, str]:
    try:
        return urlsplit(address).scheme, host_and_port(address)
    except ValueError:
        return "", ""  # no address at all
