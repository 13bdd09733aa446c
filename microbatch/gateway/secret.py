"""The key of the digests that distinguish tenants, as gateways that share a cache have it in common."""

from __future__ import annotations

import asyncio
import hmac
import logging
from typing import Final

logger: Final = logging.getLogger("microbatch")

SECRET_SECONDS: Final = 1.0
"""Seconds to wait for the secret of a shared cache."""


async def secret_of(cache: object) -> bytes | None:
    """Return a key derived from the secret of *cache*; None if it has none, or cannot be reached."""
    draw = getattr(cache, "secret", None)
    if draw is None:
        return None
    try:
        async with asyncio.timeout(SECRET_SECONDS):
            return hmac.digest(await draw(), b"microbatch gateway tenants", "sha256")
    except Exception as error:  # noqa: BLE001 the gateway works without the store, whatever it raises
        logger.warning(
            "the cache cannot be reached (%s): until it is restarted, this gateway finds no answers that other gateways cached for "
            "their tenants; secret= or --secret-file avoids this",
            type(error).__name__,
        )
        return None
