"""Validation of addresses, and the secrets in them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, unquote, urlsplit

from microbatch.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_BASE_URL: Final = "https://api.openai.com/v1"
CHAT_COMPLETIONS: Final = "/chat/completions"
EMBEDDINGS: Final = "/embeddings"

# Path segments and query values of this length may be keys.
_KEY_IN_PATH: Final = 16
_KEY_IN_QUERY: Final = 8
_VERSION: Final = re.compile(r"\d{4}-\d{2}-\d{2}[\w-]*")  # Azure's `api-version`, which some errors name
_PRINTABLE: Final = re.compile(r"[\x21-\x7e]*")


def checked_address(name: str, address: object, *, credentials: bool = False, example: str = DEFAULT_BASE_URL) -> str:
    """Return an http or https address; errors do not quote it, since addresses may contain keys, but an *example*.

    Raises:
        ConfigError: It is no such address, has a query, or has a user name or password without *credentials*.
    """
    problem = f"{name} must be an address such as {example}"
    if not isinstance(address, str) or not _PRINTABLE.fullmatch(address):
        raise ConfigError(problem)
    try:
        parts = urlsplit(address)
        host, _port = parts.hostname, parts.port
        (host or "").encode("idna")  # as resolvers are asked; names such as "a..b" cannot be
    except ValueError:
        raise ConfigError(problem) from None
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(f"{problem}, beginning with http:// or https://")
    if parts.query or parts.fragment:
        raise ConfigError(f"{name} must not have a query or a fragment; parameters go into query=")
    if parts.username is not None and not credentials:
        raise ConfigError(f"{name} must not hold a user name or a password; use headers= for credentials")
    return address


def checked_path(path: str) -> str:
    """Return *path* with one leading slash; raise `ConfigError` if it could lead out of the base address."""
    segments = re.split(r"[/\\]", unquote(path.partition("?")[0]))
    if not _PRINTABLE.fullmatch(path) or "#" in path or any(segment in (".", "..") for segment in segments):
        raise ConfigError("the path to forward must be a plain path below base_url")
    return "/" + path.lstrip("/")


def secrets_in(base_url: str, query: Mapping[str, str]) -> list[str]:
    """Return the parts of the address that may be keys, quoted and unquoted."""
    parts = [part for part in urlsplit(base_url).path.split("/") if len(part) >= _KEY_IN_PATH]
    parts += [value for value in query.values() if len(value) >= _KEY_IN_QUERY and not _VERSION.fullmatch(value)]
    return sorted({form for part in parts for form in (part, unquote(part), quote(part, safe=""))})


def host_and_port(address: str) -> str:
    """Return host and port of *address*."""
    parts = urlsplit(address)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{host}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


def is_openai(base_url: str) -> bool:
    """Return whether *base_url* is OpenAI's own API."""
    return urlsplit(base_url).hostname == urlsplit(DEFAULT_BASE_URL).hostname
