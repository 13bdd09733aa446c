"""Headers and query parameters that say who asks.

They are recognised by how their names end, not by a list of vendors: a key that is not recognised would be dropped, and its owner
would share prompts with others and be served with a key that is not theirs. A name that only looks like a credential parts lanes
without need, and keeps its caller from the gateway's own key; `_OTHERS` are the known ones.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_CREDENTIALS: Final = (
    "auth",
    "authentication",
    "authorization",
    "bearer",
    "cookie",
    "cookie2",
    "credential",
    "credentials",
    "jwt",
    "key",
    "passwd",
    "password",
    "secret",
    "token",
)
"""How names of credentials end: `authorization`, `api-key`, `x-goog-api-key`, `ocp-apim-subscription-key`, `helicone-auth`..."""

_OTHERS: Final = (
    "affinity-key",
    "cache-key",
    "continuation-token",
    "csrf-token",
    "csrftoken",
    "hash-key",
    "idempotency-key",
    "page-token",
    "pagetoken",
    "partition-key",
    "routing-key",
    "websocket-key",
    "xsrf-token",
)
"""Endings of names that have nothing to do with who asks."""

_ON_BEHALF: Final = ("account", "org", "organization", "project", "tenant", "workspace")
"""How names end, with or without `-id`, that choose beside a credential for whom it is used: who pays, and whose limits count."""

_ON_BEHALF_NAMES: Final = frozenset({"client-id", *_ON_BEHALF, *(f"{word}-id" for word in _ON_BEHALF)})
_ON_BEHALF_ENDINGS: Final = tuple(f"-{name}" for name in _ON_BEHALF_NAMES)

_OF_A_PROXY: Final = frozenset(
    {
        "cf-access-client-id",
        "cf-access-client-secret",
        "cf-access-token",
        "cf-aig-authorization",
        "helicone-auth",
        "x-portkey-api-key",
    }
)
"""Credentials for something in front of the endpoint, which come beside the endpoint's own key and not in place of one."""

AMBIENT: Final = frozenset({"cookie", "cookie2"})
"""Credentials that browsers send unasked, to the host that they are for."""


def is_credential(name: str) -> bool:
    """Return whether the header or query parameter *name*, in any case, holds a credential."""
    words = name.lower().replace("_", "-")
    return words.endswith(_CREDENTIALS) and not words.endswith(_OTHERS)


def says_who(name: str) -> bool:
    """Return whether the header *name*, in any case, says whose limits count: it is a credential, or comes beside one."""
    words = name.lower().replace("_", "-")
    return is_credential(words) or words in _ON_BEHALF_NAMES or words.endswith(_ON_BEHALF_ENDINGS)


def in_place_of(own: Mapping[str, str], callers: Iterable[str]) -> dict[str, str]:
    """Return which of a transport's *own* headers, or query parameters, go along with those that a request's caller named *callers*.

    With a credential of the caller's, the transport's key stays behind, and so does what comes beside it: a request never goes out with
    two keys. Credentials for a proxy in front of the endpoint do go along.
    """
    if not any(map(is_credential, callers)):
        return dict(own)
    return {name: value for name, value in own.items() if name.lower() in _OF_A_PROXY or not says_who(name)}


_SALT: Final = secrets.token_bytes(16)


def credentials_digest(headers: Iterable[tuple[str, str]]) -> bytes:
    """Return a digest of those *headers* that say who asks, b"" if none does.

    It is keyed with random bytes of this process, so that credentials cannot be guessed from a memory dump.
    """
    who = sorted((name.lower(), value) for name, value in headers if says_who(name))
    return hashlib.blake2b(msgspec.json.encode(who), digest_size=16, key=_SALT).digest() if who else b""


def credentials_in(path: str) -> dict[str, str]:
    """Return the credentials in the query of *path*, by name in lower case with the question mark: `?key`. Values are not unquoted."""
    found: dict[str, str] = {}
    for pair in path.partition("?")[2].partition("#")[0].split("&"):
        quoted, _, value = pair.partition("=")
        name = f"?{unquote(quoted).lower()}"
        if value and is_credential(name):
            found[name] = f"{found[name]}&{value}" if name in found else value
    return found
