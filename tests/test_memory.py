"""Memory stays flat however many requests and lanes have come and gone. Real time: this is about memory alone."""

import asyncio

import pytest

from bench.scale.items import mapped
from bench.scale.lanes import lanes

pytestmark = pytest.mark.slow


GROWTH_MIB = 4.0  # noise of the allocator; one kept object a request would be ten MiB and more


def test_twenty_thousand_lanes_leave_no_memory_behind():
    memory = asyncio.run(lanes(20_000))
    assert max(memory[2:]) - memory[1] < GROWTH_MIB, memory


def test_map_over_fifty_thousand_items_is_flat_and_fills_its_batches():
    memory, batch_size = asyncio.run(mapped(50_000))
    assert max(memory[2:]) - memory[1] < GROWTH_MIB, memory
    assert batch_size > 15.9
