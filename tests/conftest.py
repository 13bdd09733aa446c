"""Tests run on virtual time; those in `integration` use real sockets and real time."""

from __future__ import annotations

import asyncio
from pathlib import Path

from microbatch.testing.clock import VirtualClockLoop

REAL_TIME = Path(__file__).parent / "integration"


def pytest_asyncio_loop_factories(config, item):
    if REAL_TIME in item.path.parents:
        return {"real": asyncio.new_event_loop}
    return {"virtual": VirtualClockLoop}
