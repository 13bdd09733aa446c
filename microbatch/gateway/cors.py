"""CORS: web pages of some origins may read the answers of the API.

No answer allows a page to use its visitor's cookies: pages send keys and tokens themselves.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from aiohttp import web

from microbatch.errors import ConfigError
from microbatch.gateway.errors import GatewayError

if TYPE_CHECKING:
    from collections.abc import Collection

_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:]+\])(?::\d{1,5})?", re.ASCII)
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_METHODS: Final = "GET, POST, PUT, PATCH, DELETE"
_HEADER_NAMES: Final = re.compile(r"[!#$%&'*+.^`|~\w-]+(?:[ \t]*,[ \t]*[!#$%&'*+.^`|~\w-]+)*", re.ASCII)
_MAX_AGE: Final = "600"
_ASKED_METHOD: Final = "Access-Control-Request-Method"


class Cors:
    """Decides which pages may read answers.

    Args:
        origins: The origins of these pages, as browsers send them: "https://app.example", with the port if it is not the usual one.

    Raises:
        ConfigError: One of them is no exact origin.
    """

    def __init__(self, origins: Collection[str]) -> None:
        self._origins = frozenset(map(_normal, origins))

    def answer_preflight(self, request: web.Request) -> web.Response | None:
        """Return the answer to a browser's question whether a page may send a request; None if *request* is no such question.

        Raises:
            GatewayError: The page may not.
        """
        if not self._origins or request.method != "OPTIONS" or _ASKED_METHOD not in request.headers:
            return None
        if self._origin_of(request) is None:
            message = "Pages of this origin may not use the gateway; --cors-origin adds origins."
            raise GatewayError(403, message, code="unknown_origin")
        headers = {"Access-Control-Allow-Methods": _METHODS, "Access-Control-Max-Age": _MAX_AGE}
        asked = request.headers.get("Access-Control-Request-Headers", "")
        if _HEADER_NAMES.fullmatch(asked):
            headers["Access-Control-Allow-Headers"] = asked
        if request.headers.get("Access-Control-Request-Private-Network") == "true":
            headers["Access-Control-Allow-Private-Network"] = "true"
        return web.Response(status=204, headers=headers)

    def mark(self, request: web.Request, response: web.StreamResponse) -> None:
        """Add the headers to *response* with which the page that sent *request* may read it."""
        if not self._origins:
            return
        headers = response.headers
        headers["Vary"] = ", ".join([*headers.getall("Vary", []), "Origin"])
        origin = self._origin_of(request)
        if origin is None:
            return
        headers["Access-Control-Allow-Origin"] = origin
        exposed = sorted({name.lower() for name in headers if not name.lower().startswith(("access-control-", "vary"))})
        if exposed and request.method != "OPTIONS":
            headers["Access-Control-Expose-Headers"] = ", ".join(exposed)

    def _origin_of(self, request: web.Request) -> str | None:
        """Return the origin of the page that sent *request*, None if it may not read the answer."""
        given = request.headers.getall("Origin", [])
        return given[0] if len(given) == 1 and given[0] in self._origins else None


def _normal(origin: str) -> str:
    """Return *origin* in the form in which browsers send it."""
    text = origin.strip().lower()
    if not _ORIGIN.fullmatch(text):
        reason = "* would allow all pages" if text == "*" else "a scheme, a host and at most a port, without a path"
        raise ConfigError(
            f"the CORS origin {origin!r} must be exact, as https://app.example or http://localhost:3000 ({reason})"
        )
    parts = urlsplit(text)
    try:
        port = parts.port
    except ValueError:
        raise ConfigError(f"the CORS origin {origin!r} must have a port below 65,536") from None
    return text.rpartition(":")[0] if port is not None and port == _DEFAULT_PORTS.get(parts.scheme) else text
