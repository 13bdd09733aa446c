"""The time that a cache is given: exact while the loop keeps up, and none of the loop's own delays counts."""

from __future__ import annotations

import asyncio

import pytest
from helpers import now

from microbatch.caching.guard import LIVE_TIMEOUT, Deadline, Guard
from microbatch.caching.memory import MemoryCache
from microbatch.caching.tiers import TieredCache


async def used_up(deadline):
    begun = now()
    with pytest.raises(TimeoutError):
        async with deadline:
            await asyncio.sleep(1e9)
    return round(now() - begun, 9)


def stall(at, seconds):
    """Have the loop stand still for *seconds*, from *at* seconds from now on."""
    loop = asyncio.get_running_loop()
    loop.call_later(at, loop.advance, seconds)


@pytest.mark.parametrize("seconds", [0.05, 2.0])
async def test_it_ends_what_takes_longer_to_the_instant(seconds):
    deadline = Deadline(seconds)
    assert await used_up(deadline) == seconds
    assert (deadline.expired, deadline.left) == (True, pytest.approx(0, abs=1e-9))
    assert await used_up(deadline) == 0


async def test_what_is_in_time_ends_in_peace_and_its_time_is_gone():
    deadline = Deadline(0.05)
    async with deadline:
        await asyncio.sleep(0.049)
    assert not deadline.expired
    assert deadline.left == pytest.approx(0.001)
    assert await used_up(deadline) == pytest.approx(0.001)


@pytest.mark.parametrize("at", [0.0001, 0.0311, 0.0499])
async def test_a_loop_that_stands_still_takes_a_step_of_it_and_no_more(at):
    deadline = Deadline(0.05)
    stall(at, 60.0)
    took = await used_up(deadline)
    assert 60.0 <= took <= 60.05
    assert took >= 60.05 - 0.05 / 25


async def test_a_loop_that_is_always_late_does_not_make_it_endless():
    def again():
        loop = asyncio.get_running_loop()
        loop.advance(0.1)
        loop.call_soon(again)

    asyncio.get_running_loop().call_soon(again)
    assert 0.05 <= await used_up(Deadline(0.05)) <= 25 * 2 * 0.1 + 0.5  # a step is late by two turns


async def test_a_part_is_paid_for_by_the_whole():
    whole = Deadline(0.9)
    assert await used_up(whole.part(3)) == pytest.approx(0.3)
    assert whole.left == pytest.approx(0.6)
    async with whole.part(2):
        await asyncio.sleep(0.1)
    assert await used_up(whole) == pytest.approx(0.5)


async def test_a_cancellation_and_an_error_pass():
    deadline = Deadline(1.0)
    with pytest.raises(ZeroDivisionError):
        async with deadline:
            raise ZeroDivisionError
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1), deadline:
            await asyncio.sleep(1e9)
    assert not deadline.expired


class Slow(MemoryCache):
    async def get_many(self, keys):
        await asyncio.sleep(0.01)
        return await super().get_many(keys)

    async def set_many(self, entries):
        await asyncio.sleep(0.01)
        await super().set_many(entries)


@pytest.mark.parametrize(
    "make", [Slow, lambda: TieredCache(MemoryCache(), Slow()), lambda: TieredCache(Slow(), Slow())]
)
async def test_a_stall_of_the_loop_is_no_failure_of_the_cache(make):
    guard = Guard(make())
    stall(0.005, 60.0)
    assert await guard.store([(b"k", b"v", None)])
    stall(0.005, 60.0)
    assert await guard.get_many([b"k", b"l"]) == [b"v", None]
    assert guard.bypassed == 0
    assert "bypassed" not in repr(guard)


async def test_a_cache_that_hangs_is_found_out_though_the_loop_stalls():
    class Hanging(Slow):
        async def get_many(self, keys):
            await asyncio.sleep(1e9)

    guard = Guard(Hanging())
    begun = now()
    stall(0.005, 60.0)
    assert await guard.get_many([b"k"]) == [None]
    assert now() - begun <= 60 + LIVE_TIMEOUT
    assert "bypassed" in repr(guard)
