"""The ways to the simulated endpoint, each a process of its own that is asked for its address and its processor time."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DIRECT, PASS_THROUGH, GATEWAY = "direct", "pass-through", "gateway"
START_S = 30.0
"""Seconds within which a server must have said where it listens; one that does not is broken."""
SERVE = ("--max-batch-size", "16", "--idle", "flush")
"""With --idle flush a lone request does not wait for company, as it would not at the endpoint itself."""


class Way(NamedTuple):
    """A way to the endpoint.

    Attributes:
        url: Where its API is.
        middle: The process between client and endpoint, None if there is none.
        endpoint: The endpoint's.
    """

    name: str
    url: str
    middle: psutil.Process | None
    endpoint: psutil.Process

    def spent(self) -> tuple[float, float]:
        """Return the processor seconds so far, in the middle and at the endpoint."""
        return _cpu(self.middle) if self.middle else 0.0, _cpu(self.endpoint)


@asynccontextmanager
async def running(first_token: float) -> AsyncIterator[list[Way]]:
    """Start the endpoint, which takes *first_token* seconds to answer, and what leads to it."""
    async with AsyncExitStack() as stack:
        simulate = ("-m", "microbatch", "simulate", "--first-token", str(first_token), "--tokens-per-second", "0")
        endpoint, url = await stack.enter_async_context(_server(*simulate))
        relay = str(Path(__file__).with_name("pass_through.py"))
        through, through_url = await stack.enter_async_context(_server(relay, url))
        serve = ("-m", "microbatch", "serve", "--upstream", url, "--port", "0", *SERVE)
        gateway, gateway_url = await stack.enter_async_context(_server(*serve))
        yield [
            Way(DIRECT, url, None, endpoint),
            Way(PASS_THROUGH, through_url, through, endpoint),
            Way(GATEWAY, gateway_url, gateway, endpoint),
        ]


@asynccontextmanager
async def _server(*words: str) -> AsyncIterator[tuple[psutil.Process, str]]:
    """Run a server that says where it listens, and yield its process and address."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "MICROBATCH_"))}
    process = await asyncio.create_subprocess_exec(
        sys.executable, *words, env=clean, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(START_S):
            url = (await process.stdout.readline()).decode().strip()
        if not url:
            raise RuntimeError(f"{' '.join(words)} has not said where it listens")
        yield psutil.Process(process.pid), url
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system
