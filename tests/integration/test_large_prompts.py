"""A huge prompt does not hold up the neighbours."""

from __future__ import annotations

import pytest
from large_prompt import gaps, simulated_endpoint

LONGEST_S = 0.050


@pytest.mark.promise(of="loop")
async def test_a_prompt_of_a_megabyte_never_blocks_the_loop_for_long():
    """In CPU time of the loop's thread, which does not depend on what else the machine is doing."""
    with simulated_endpoint() as base_url:
        found = await gaps(base_url)
    assert len(found) == 3
    assert {name: beats.cpu for name, beats in found.items() if beats.cpu > LONGEST_S} == {}
