"""Tests run on virtual time; those in `integration` use real sockets and real time."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from hypothesis import settings

from microbatch.testing.clock import VirtualClockLoop

# A red CI must mean that the change is to blame, so there the examples are always the same; elsewhere they go on exploring.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")

REAL_TIME = Path(__file__).parent / "integration"


def pytest_asyncio_loop_factories(config, item):
    if REAL_TIME in item.path.parents:
        return {"real": asyncio.new_event_loop}
    return {"virtual": VirtualClockLoop}
