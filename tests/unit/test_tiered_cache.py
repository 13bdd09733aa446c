"""Caches in front of caches: who is asked for what, what is put where, and what one that is down costs."""

from __future__ import annotations

import asyncio

import pytest

from microbatch.caching.guard import LIVE_TIMEOUT, Guard
from microbatch.caching.memory import MemoryCache
from microbatch.caching.tiers import TieredCache
from microbatch.errors import ConfigError, StorageError
from microbatch.lru import LRU


class Tier(MemoryCache):
    """A cache in memory that takes time or fails, and writes down what it is asked.

    Attributes:
        takes: Seconds for each call.
        error: What each call raises, or None.
    """

    def __init__(self, **settings):
        super().__init__(**settings)
        self.takes = 0.0
        self.error = None
        self.got = []
        self.stored = []
        self.opened = 0

    async def _act(self):
        if self.takes:
            await asyncio.sleep(self.takes)
        if self.error is not None:
            raise self.error

    async def open(self):
        await self._act()
        self.opened += 1

    async def aclose(self):
        self.opened -= 1
        await self._act()

    async def get_many(self, keys):
        self.got.append(list(keys))
        await self._act()
        return await super().get_many(keys)

    async def set_many(self, entries):
        self.stored += entries
        await self._act()
        await super().set_many(entries)


class Lasting(Tier):
    letter = b"s"

    async def secret(self):
        await self._act()
        return self.letter * 32


async def time_of(call):
    begun = asyncio.get_running_loop().time()
    result = await call
    return result, round(asyncio.get_running_loop().time() - begun, 9)


async def test_a_tier_is_asked_only_for_what_those_above_it_have_not():
    top, middle, bottom = Tier(), Tier(), Tier()
    cache = TieredCache(top, middle, bottom)
    await top.set_many([(b"a", b"1", None)])
    await middle.set_many([(b"b", b"2", None)])
    await bottom.set_many([(b"c", b"3", None)])
    assert await cache.get_many([b"a", b"b", b"c", b"d"]) == [b"1", b"2", b"3", None]
    assert (top.got, middle.got, bottom.got) == ([[b"a", b"b", b"c", b"d"]], [[b"b", b"c", b"d"]], [[b"c", b"d"]])
    assert await cache.get_many([b"a"]) == [b"1"]
    assert len(middle.got) == 1


async def test_what_a_tier_had_is_put_into_all_above_it():
    top, middle, bottom = Tier(ttl=60.0), Tier(ttl=None), Tier()
    cache = TieredCache(top, middle, bottom)
    await middle.set_many([(b"b", b"2", None)])
    await bottom.set_many([(b"c", b"", 5.0)])
    middle.stored.clear()
    await cache.get_many([b"b", b"c", b"d"])
    assert sorted(top.stored) == [(b"b", b"2", 60.0), (b"c", b"", 60.0)]
    assert middle.stored == [(b"c", b"", None)]
    assert await cache.get_many([b"b", b"c"]) == [b"2", b""]
    assert len(bottom.got) == 1


async def test_what_is_stored_goes_into_all_tiers_for_no_longer_than_each_says():
    top, bottom = Tier(ttl=60.0), Tier(ttl=3600.0)
    cache = TieredCache(top, bottom)
    await cache.set_many([(b"a", b"1", 30.0), (b"b", b"2", 1e6), (b"c", b"3", None)])
    assert top.stored == [(b"a", b"1", 30.0), (b"b", b"2", 60.0), (b"c", b"3", 60.0)]
    assert bottom.stored == [(b"a", b"1", 30.0), (b"b", b"2", 1e6), (b"c", b"3", None)]


@pytest.mark.parametrize("down", [0, 1, 2])
@pytest.mark.parametrize("how", [1e9, OSError("down")], ids=["hangs", "fails"])
async def test_a_tier_that_is_down_costs_its_own_answers_only(down, how):
    tiers = [Tier(), Tier(), Tier()]
    cache = Guard(TieredCache(*tiers))
    await cache.set_many([(b"k", b"v", None)])
    if isinstance(how, Exception):
        tiers[down].error = how
    else:
        tiers[down].takes = how
    tiers[0 if down else 1]._entries = LRU(None)  # so that the one that is down is asked
    found, took = await time_of(cache.get_many([b"k", b"none"]))
    assert found == [b"v", None]
    assert took <= LIVE_TIMEOUT
    assert await time_of(cache.get_many([b"k", b"none"])) == ([b"v", None], 0)
    await cache.set_many([(b"new", b"w", None)])
    assert await time_of(cache.get_many([b"new"])) == ([b"w"], 0)
    assert repr(cache) == "<Guard of TieredCache: in use>"
    assert cache.bypassed


async def test_tiers_that_hang_share_the_time_of_one():
    tiers = [Tier(), Tier(), Tier()]
    cache = Guard(TieredCache(*tiers))
    for tier in tiers:
        tier.takes = 1e9
    found, took = await time_of(cache.get_many([b"k"]))
    assert found == [None]
    assert took == pytest.approx(LIVE_TIMEOUT)
    _, took = await time_of(cache.set_many([(b"k", b"v", None)]))
    assert took == pytest.approx(LIVE_TIMEOUT)
    assert await time_of(cache.get_many([b"k"])) == ([None], 0)
    assert repr(cache) == "<Guard of TieredCache: in use>"
    assert [len(tier.got) for tier in tiers] == [1, 1, 1]  # each has had its turn
    assert cache.bypassed == 6


async def test_the_last_tier_may_take_what_the_others_leave():
    top, bottom = Tier(), Tier()
    await bottom.set_many([(b"k", b"v", None)])
    bottom.takes = LIVE_TIMEOUT - 0.001
    assert await Guard(TieredCache(top, bottom)).get_many([b"k"]) == [b"v"]


async def test_a_tier_comes_back_after_its_while():
    top, bottom = Tier(), Tier()
    cache = TieredCache(top, bottom)
    bottom.error = OSError("down")
    await cache.get_many([b"k"])
    bottom.error = None
    await bottom.set_many([(b"k", b"v", None)])
    assert await cache.get_many([b"k"]) == [None]
    await asyncio.sleep(1)
    assert await cache.get_many([b"k"]) == [b"v"]


async def test_the_secret_is_that_of_the_last_tier_that_has_one():
    assert await TieredCache(Lasting(), Tier()).secret() == b"s" * 32
    first, last = Lasting(), Lasting()
    first.letter = b"f"
    assert await TieredCache(first, last, Tier()).secret() == b"s" * 32
    process = await TieredCache(Tier(), Tier()).secret()
    assert process == await Guard(MemoryCache()).secret()


async def test_a_secret_that_cannot_be_had_now_is_nothing_that_the_other_tiers_are_to_blame_for():
    top, bottom = Tier(), Lasting()
    cache = Guard(TieredCache(top, bottom))
    bottom.takes = 1e9
    assert await time_of(cache.secret()) == (None, LIVE_TIMEOUT)
    await cache.set_many([(b"k", b"v", None)])
    assert await cache.get_many([b"k"]) == [b"v"]
    bottom.takes = 0
    await asyncio.sleep(1)
    assert await cache.secret() == b"s" * 32


async def test_its_ttl_is_that_of_the_last_and_its_counts_are_sums():
    top, bottom = Tier(max_entries=1, ttl=60.0), Tier(max_entries=2, ttl=3600.0)
    cache = TieredCache(top, bottom)
    assert cache.ttl == 3600
    await cache.set_many([(b"%d" % number, b"v", None) for number in range(3)])
    assert cache.evictions == 3
    assert TieredCache(Tier(ttl=None)).ttl is None


async def test_all_tiers_are_opened_and_closed():
    tiers = [Tier(), Tier()]
    cache = TieredCache(MemoryCache(), *tiers)
    await cache.open()
    assert [tier.opened for tier in tiers] == [1, 1]
    await cache.aclose()
    await cache.aclose()
    assert [tier.opened for tier in tiers] == [0, 0]


async def test_a_tier_that_cannot_be_opened_leaves_none_open():
    tiers = [Tier(), Tier(), Tier()]
    tiers[1].error = ConfigError("no such file")
    with pytest.raises(ConfigError, match="no such file"):
        await TieredCache(*tiers).open()
    assert [tier.opened for tier in tiers] == [0, 0, 0]


async def test_a_tier_that_cannot_be_closed_keeps_no_other_open():
    tiers = [Tier(), Tier(), Tier()]
    cache = TieredCache(*tiers)
    await cache.open()
    tiers[1].error = StorageError("stuck")
    with pytest.raises(StorageError, match="stuck"):
        await cache.aclose()
    assert [tier.opened for tier in tiers] == [0, 0, 0]


def test_no_tier_is_no_cache():
    with pytest.raises(ConfigError, match="at least one"):
        TieredCache()


def test_its_repr_tells_which_tiers_are_in_use():
    assert repr(TieredCache(MemoryCache())) == "<TieredCache: [<Guard of MemoryCache: in use>]>"
