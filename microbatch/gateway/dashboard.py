"""The page at /dashboard, which shows the figures of /stats as they change."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
from aiohttp import web

if TYPE_CHECKING:
    from microbatch.accounting.stats import Stats

_PAGE: Final = Path(__file__).with_name("dashboard.html").read_text("utf-8")
_INLINE: Final = re.compile(r"<(style|script)>(.*?)</\1>", re.DOTALL)


def _content_security_policy(page: str) -> str:
    """Return the policy that allows the style and the script of *page*, by their hashes, and requests to this host."""
    allowed = {
        element: f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for element, text in _INLINE.findall(page)
    }
    return (
        f"default-src 'none'; style-src {allowed['style']}; script-src {allowed['script']}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


_HEADERS: Final = {
    "Content-Security-Policy": _content_security_policy(_PAGE),
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


async def show_dashboard(_request: web.Request) -> web.Response:
    """Return the page, which reads `stats` next to its own address once a second."""
    return web.Response(text=_PAGE, content_type="text/html", charset="utf-8", headers=_HEADERS)


def figures(stats: Stats, live: dict[str, Any]) -> bytes:
    """Return the JSON that the page reads: all fields of *stats*, the cache hit rate, and *live*."""
    return msgspec.json.encode(
        {**msgspec.structs.asdict(stats), "cache_hit_rate": stats.cache_hit_rate, "live": live},
    )
