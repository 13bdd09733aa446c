"""The cache in memory: what it keeps, for how long, and how much."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc

import pytest

from microbatch.caching.memory import ENTRY_BYTES, MemoryCache
from microbatch.errors import ConfigError


def keys(*numbers):
    return [b"key %04d" % number for number in numbers]


def entries(*numbers, ttl=None, size=100):
    return [(key, b"v" * size, ttl) for key in keys(*numbers)]


async def kept(cache, *numbers):
    """Which of *numbers* are kept; it does not count as a use of those that are asked for last."""
    found = await cache.get_many(keys(*numbers))
    return [number for number, value in zip(numbers, found, strict=True) if value is not None]


EACH = len(keys(0)[0]) + 100 + ENTRY_BYTES


async def test_an_entry_is_good_until_its_time_is_over_and_not_a_moment_longer():
    cache = MemoryCache()
    await cache.set_many(entries(1, ttl=10.0) + entries(2, ttl=11.0) + entries(3))
    await asyncio.sleep(9.999)
    assert await kept(cache, 1, 2, 3) == [1, 2, 3]
    await asyncio.sleep(0.001)
    assert await kept(cache, 1, 2, 3) == [2, 3]
    assert len(cache) == 2


async def test_the_bytes_are_bounded_to_the_byte():
    cache = MemoryCache(max_bytes=10 * EACH)
    await cache.set_many(entries(*range(10)))
    assert await kept(cache, *range(10)) == list(range(10))
    assert cache.evictions == 0
    await cache.set_many([(b"k", b"", None)])
    assert len(cache) == 10
    assert cache.evictions == 1


async def test_what_was_not_used_for_longest_goes_first():
    cache = MemoryCache(max_bytes=4 * EACH)
    await cache.set_many(entries(1, 2, 3, 4))
    await cache.get_many(keys(1))
    await cache.set_many(entries(2))
    await cache.set_many(entries(5, 6))
    assert await kept(cache, 1, 2, 3, 4, 5, 6) == [1, 2, 5, 6]
    assert cache.evictions == 2


async def test_the_number_of_entries_can_be_bounded_too():
    cache = MemoryCache(max_entries=3)
    await cache.set_many(entries(*range(10)))
    assert await kept(cache, *range(10)) == [7, 8, 9]
    assert cache.evictions == 7


async def test_an_entry_larger_than_the_bound_is_not_kept_and_drives_nothing_out():
    cache = MemoryCache(max_bytes=3 * EACH)
    await cache.set_many(entries(1, 2, 3))
    await cache.set_many(entries(2, size=3 * EACH))
    assert await kept(cache, 1, 2, 3) == [1, 3]  # nor is the value that it was to replace
    assert cache.evictions == 0


async def test_replacing_an_entry_takes_the_room_of_the_old_one():
    cache = MemoryCache(max_bytes=4 * EACH)
    for size in (100, 0, 400, 100):
        await cache.set_many(entries(1, size=size))
    await cache.set_many(entries(2, 3, 4))
    assert len(cache) == 4
    assert cache.evictions == 0


async def test_what_expired_is_no_eviction():
    cache = MemoryCache(max_entries=2)
    await cache.set_many(entries(1, ttl=1.0) + entries(2))
    await asyncio.sleep(2)
    await cache.set_many(entries(3))
    assert cache.evictions == 0
    await cache.set_many(entries(4))
    assert cache.evictions == 1


async def test_closing_keeps_everything_for_the_next_batcher():
    cache = MemoryCache()
    await cache.set_many(entries(1))
    await cache.aclose()
    assert await kept(cache, 1) == [1]


async def test_nothing_is_waited_for():
    """So a hit costs no turn of the event loop."""
    cache = MemoryCache()
    for call in (cache.set_many(entries(1)), cache.get_many(keys(1)), cache.aclose()):
        with pytest.raises(StopIteration):
            call.send(None)


async def test_memory_is_bounded_by_what_it_says():
    size = 1_000_000
    cache = MemoryCache(max_bytes=size)
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(8_000):
            await cache.set_many([(b"key %d" % number, b"%0200d" % number, 60.0)])
        gc.collect()
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.7 * size < used < 1.05 * size
    assert cache.evictions == 8_000 - len(cache)


async def test_its_repr_tells_how_full_it_is():
    cache = MemoryCache(max_bytes=4 * EACH)
    await cache.set_many(entries(1))
    assert repr(cache) == f"<MemoryCache: 1 entries, {EACH} of {4 * EACH} bytes>"


@pytest.mark.parametrize(
    "settings",
    [{"max_bytes": 0}, {"max_bytes": 1.5}, {"max_entries": 0}, {"ttl": -1}, {"ttl": float("nan")}, {"ttl": "1h"}],
)
def test_limits_that_make_no_sense_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        MemoryCache(**settings)


def test_answers_are_good_for_a_week_unless_somebody_says_otherwise():
    assert MemoryCache().ttl == 7 * 24 * 3600
    assert MemoryCache(ttl=None).ttl is None
