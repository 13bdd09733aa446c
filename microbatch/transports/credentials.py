"""Headers and query parameters that identify the caller.

Credentials are recognised by how their names end, not by a list of vendors: an unrecognised key would be dropped, and its owner would
share prompts with others and be served with another's key. A name that only looks like a credential separates lanes without need, and
keeps its caller from the gateway's own key; `_OTHERS` lists the known ones.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# Endings of names of credentials: `authorization`, `api-key`, `x-goog-api-key`, `ocp-apim-subscription-key`, `helicone-auth`...
_CREDENTIALS: Final = re.compile(
    r"(?:auth|authentication|authorization|bearer|cookie|cookie2|credentials?|jwt|key|passwd|password|secret|token)\Z"
)
# Endings of names that have nothing to do with credentials.
_OTHERS: Final = re.compile(
    "(?:affinity-key|cache-key|continuation-token|csrf-token|csrftoken|hash-key|idempotency-key|page-token|pagetoken|partition-key"
    r"|routing-key|websocket-key|xsrf-token)\Z"
)

# Names that choose beside a credential who pays and whose limits apply.
_ON_BEHALF: Final = re.compile(r"(?:^|-)(?:client-id|(?:account|org|organization|project|tenant|workspace)(?:-id)?)\Z")

# Credentials for a proxy in front of the endpoint, which come beside the endpoint's own key.
_OF_A_PROXY: Final = frozenset({
    *("cf-access-client-id", "cf-access-client-secret", "cf-access-token", "cf-aig-authorization"),
    *("helicone-auth", "x-portkey-api-key"),
})  # fmt: skip
AMBIENT: Final = frozenset({"cookie", "cookie2"})
"""Credentials that browsers send by themselves, to the host that they belong to."""

_SALT: Final = secrets.token_bytes(16)


def is_credential(name: str) -> bool:
    """Return whether the header or query parameter *name*, in any case, holds a credential."""
    words = name.lower().replace("_", "-")
    return _CREDENTIALS.search(words) is not None and _OTHERS.search(words) is None


def is_for_a_proxy(name: str) -> bool:
    """Return whether the header *name*, in any case, holds a credential for a proxy in front of the endpoint."""
    return name.lower() in _OF_A_PROXY


def says_who(name: str) -> bool:
    """Return whether the header *name*, in any case, is a credential, or chooses beside one whose limits apply."""
    words = name.lower().replace("_", "-")
    return is_credential(words) or _ON_BEHALF.search(words) is not None


def hold_credentials(headers: Iterable[str]) -> bool:
    """Return whether one of *headers*, given as their names, identifies the caller; see `says_who`."""
    return any(map(says_who, headers))


def in_place_of(own: Mapping[str, str], callers: Iterable[str]) -> dict[str, str]:
    """Return those of a transport's *own* headers, or query parameters, that are sent when the caller's have the names *callers*.

    If the caller brings a credential, the transport's key and what comes beside it are left out: a request never has two keys.
    Credentials for a proxy in front of the endpoint are kept.
    """
    if not any(map(is_credential, callers)):
        return dict(own)
    return {name: value for name, value in own.items() if is_for_a_proxy(name) or not says_who(name)}


def credentials_digest(headers: Iterable[tuple[str, str]]) -> bytes:
    """Return a digest of those *headers* that identify the caller, b"" if none does.

    It is keyed with random bytes of this process, so that credentials cannot be guessed from a memory dump.
    """
    who = sorted((name.lower(), value) for name, value in headers if says_who(name))
    return hashlib.blake2b(msgspec.json.encode(who), digest_size=16, key=_SALT).digest() if who else b""


def lasting_digest(headers: Iterable[tuple[str, str]]) -> bytes:
    """Return a digest of those *headers* that identify the caller, b"" if none does; in every process the same."""
    who = sorted((name.lower(), value) for name, value in headers if says_who(name))
    return hashlib.blake2b(msgspec.json.encode(who), digest_size=16, person=b"microbatch").digest() if who else b""


def credentials_in(path: str) -> dict[str, str]:
    """Return the quoted credentials in the query of *path*, by name in lower case with the question mark: `?key`."""
    found: dict[str, str] = {}
    for pair in path.partition("?")[2].partition("#")[0].split("&"):
        quoted, _, value = pair.partition("=")
        name = f"?{unquote(quoted).lower()}"
        if value and is_credential(name):
            found[name] = f"{found[name]}&{value}" if name in found else value
    return found
