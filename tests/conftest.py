"""Tests run on virtual time; those in `integration` and `frameworks` use real sockets and real time."""

from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path

from hypothesis import HealthCheck, settings

from microbatch.testing import clock
from microbatch.testing.clock import VirtualClockLoop

# How long an example takes is up to whatever else the machine does. A red CI must mean that the change is to blame, so there the
# examples are always the same; elsewhere they go on exploring.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("unhurried"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "unhurried")

# The same goes for threads, for which a loop on virtual time waits in real time.
clock._PATIENCE = 40.0


def pytest_collection_finish(session):
    # What collecting has made stays to the end; the collector need not look at it again each time.
    gc.collect()
    gc.freeze()


REAL_TIME = {Path(__file__).parent / "integration", Path(__file__).parent / "frameworks"}


def pytest_asyncio_loop_factories(config, item):
    if not REAL_TIME.isdisjoint(item.path.parents):
        return {"real": asyncio.new_event_loop}
    return {"virtual": VirtualClockLoop}
