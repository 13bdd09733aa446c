"""A huge prompt does not hold up the neighbours."""

from __future__ import annotations

import pytest

from bench.apart import simulated_endpoint
from bench.stalls import PROMISED_S, gaps

pytestmark = pytest.mark.slow


@pytest.mark.promise(of="loop")
async def test_a_prompt_of_a_megabyte_never_blocks_the_loop_for_long():
    """In CPU time of the loop's thread, which does not depend on what else the machine is doing."""
    with simulated_endpoint() as base_url:
        found = await gaps(base_url, seed=1)
    assert len(found) == 3
    assert {name: gap["cpu"] for name, gap in found.items() if gap["cpu"] >= PROMISED_S} == {}
