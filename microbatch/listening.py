"""The end of an aiohttp server that may be receiving connections."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiohttp import web


async def close_runner(runner: web.AppRunner) -> None:
    """Close every connection, those accepted a moment ago included, and stop listening.

    asyncio makes the transport of an accepted connection one turn of the loop later and announces it to aiohttp in the turn after
    that. A connection in between stays open when `AppRunner.cleanup` closes the listener, which it does first
    (https://github.com/python/cpython/issues/109564).
    """
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await runner.cleanup()
