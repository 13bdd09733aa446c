"""The connections of a transport to its endpoint."""

from __future__ import annotations

import os
import urllib.request
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import aiohttp

from microbatch.errors import ConfigError
from microbatch.transports.addresses import checked_address, host_and_port

if TYPE_CHECKING:
    import ssl as tls


class Connection:
    """Settings of the connections to *base_url*; the others are described at `OpenAIChat`, which checks their types and ranges.

    Attributes:
        where: What errors call the endpoint: host and port, or the path of the socket.
        proxy: Address of the proxy, or None.

    Raises:
        ConfigError: A setting is wrong; the message names it.
    """

    def __init__(
        self,
        base_url: str,
        *,
        proxy: str | None,
        trust_env: bool,
        ssl: tls.SSLContext | bool | None,
        uds: str | os.PathLike[str] | None,
        max_connections: int,
        connect_timeout: float,
        max_header_bytes: int,
    ) -> None:
        if uds == "":
            raise ConfigError("uds must be the path of a Unix socket, or None")
        if uds is not None and (proxy is not None or not base_url.startswith("http://")):
            raise ConfigError("uds needs a base_url with http://, and no proxy")
        self.where: str = host_and_port(base_url) if uds is None else os.fspath(uds)
        self.proxy = (
            None
            if proxy is None
            else checked_address("proxy", proxy, credentials=True, example="http://localhost:3128")
        )
        if trust_env and proxy is None and uds is None:
            self.proxy = _environment_proxy(base_url)
        self._ssl = True if ssl is None else ssl
        self._uds = None if uds is None else os.fspath(uds)
        self._limit = max_connections
        self._connect_timeout = connect_timeout
        self._max_header_bytes = max_header_bytes

    def session(self) -> aiohttp.ClientSession:
        """Return a new session, of the running event loop."""
        connector: aiohttp.BaseConnector
        if self._uds is None:
            connector = aiohttp.TCPConnector(limit=self._limit, ssl=self._ssl)
        else:
            connector = aiohttp.UnixConnector(self._uds, limit=self._limit)
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),  # a cookie set for one tenant must not reach another
            # No sock_read: it poisoned pooled connections (aio-libs/aiohttp#12953). `Clock` measures silence.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout),
            max_line_size=self._max_header_bytes,
            max_field_size=self._max_header_bytes,
            trust_env=False,  # it would also read .netrc, and send what is there in place of the key
        )


def _environment_proxy(base_url: str) -> str | None:
    """Return the proxy for *base_url* according to the environment."""
    parts = urlsplit(base_url)
    proxies = urllib.request.getproxies_environment()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return None
    address = proxy if "://" in proxy else f"http://{proxy}"
    return checked_address(
        f"{parts.scheme}_proxy in the environment (trust_env)",
        address,
        credentials=True,
        example="http://localhost:3128",
    )
