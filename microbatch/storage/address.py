"""Addresses of Redis servers, as users write them."""

from __future__ import annotations

import re
from typing import Final

from microbatch.errors import ConfigError

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_CLIENTS: Final = {"redis": "redis", "rediss": "rediss", "unix": "unix", "valkey": "redis", "valkeys": "rediss"}
"""The schemes that are taken, in lower case, and those by which the client knows them. Valkey speaks the same protocol."""

_NEARLY: Final = re.compile(r"(?:rediss?|valkeys?|unix):.*|[\w.-]+:\d{1,5}(?:/\d*)?", re.IGNORECASE)

_DATABASE: Final = re.compile(r"\d*/?", re.ASCII)
_OURS: Final = re.compile(r"(?:decode_responses|protocol)=")
"""Options in an address that would change how answers are read, which the stores rely on."""


def is_address(place: str) -> bool:
    """Return whether *place* begins like the address of a server, whatever its scheme; else it is the path of a file."""
    return _SCHEME.match(place) is not None


def is_nearly_address(place: str) -> bool:
    """Return whether *place*, which is no address, is probably meant as one: a host with a port, or a scheme without slashes."""
    return _NEARLY.fullmatch(place) is not None


def client_address(address: str) -> str:
    """Return *address* as the client takes it, without options that are the store's own decision.

    Raises:
        ConfigError: It has no scheme, or one that is not taken, or a path that is no database number. It is not quoted, as it may
            hold a password.
    """
    found = _SCHEME.match(address)
    if found is None:
        raise ConfigError("the address of Redis is malformed (it has no scheme): write redis://host:6379/0")
    scheme = found[1].lower()
    if scheme in _CLIENTS:
        server, _, options = address[found.end() :].partition("?")
        # The client takes "/x" for database 0, and "/1/2" for 12.
        if _CLIENTS[scheme] != "unix" and not _DATABASE.fullmatch(server.partition("/")[2]):
            raise ConfigError(
                "the address of Redis is malformed (the part after the host is no database number): "
                "write redis://host:6379/0, and a / within a password as %2F"
            )
        kept = "&".join(option for option in options.split("&") if option and not _OURS.match(option))
        return f"{_CLIENTS[scheme]}://{server}{kept and '?'}{kept}"
    if "sentinel" in scheme:
        remedy = "Sentinels are not asked: write the address of the primary, redis://host:6379/0"
    elif "cluster" in scheme:
        remedy = "write the address of any node, redis://host:6379; a cluster is recognised"
    else:
        remedy = f"write {', '.join(f'{name}://' for name in _CLIENTS)}"
    raise ConfigError(f"the address of Redis is malformed (unknown scheme {scheme}://): {remedy}")
