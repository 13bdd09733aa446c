"""The page at /dashboard, which shows the figures of /stats as they change."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from aiohttp import web

if TYPE_CHECKING:
    from microbatch.accounting.live import Live
    from microbatch.accounting.stats import Stats

_PAGE: Final = Path(__file__).with_name("dashboard.html").read_text("utf-8")
_PARTS: Final = re.compile(r"<(style|script)>(.*?)</\1>", re.DOTALL)


def _policy(page: str) -> str:
    """Return the Content-Security-Policy that allows the styles and scripts of *page* by their hashes, and /stats, and no more."""
    allowed = {
        part: f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for part, text in _PARTS.findall(page)
    }
    return (
        f"default-src 'none'; style-src {allowed['style']}; script-src {allowed['script']}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


_HEADERS: Final = {
    "Content-Security-Policy": _policy(_PAGE),
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


async def show_dashboard(_request: web.Request) -> web.Response:
    """Answer with the page. It reads `stats` beside its own address once a second, as `figures` makes it."""
    return web.Response(text=_PAGE, content_type="text/html", charset="utf-8", headers=_HEADERS)


def figures(stats: Stats, live: Live) -> bytes:
    """Return what the page reads, as JSON: all of *stats*, the share of cache hits, and *live* under that name."""
    return msgspec.json.encode(
        {**msgspec.structs.asdict(stats), "cache_hit_rate": stats.cache_hit_rate, "live": live},
    )
