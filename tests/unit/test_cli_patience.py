"""The patience that bulk work has with a cache, and what `warm` and `spool` say."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import msgspec
import pytest
from helpers import ask, now

import microbatch as mb
from microbatch.accounting.stats import Stats
from microbatch.caching import guard
from microbatch.caching.guard import Guard
from microbatch.cli.plan import CACHE_PATIENCE
from microbatch.cli.warm import summarize, summary_lines
from microbatch.errors import ConfigError, StorageError
from microbatch.testing import ScriptedTransport

ENTRY = (b"k", b"v", None)
STATS = Stats(
    answered=19,
    cache_hits=5,
    cache_stores=14,
    upstream_calls=2,
    batches=1,
    prompt_tokens=100,
    completion_tokens=50,
    unbatched_calls=19,
    cost_usd=0.001,
    unbatched_cost_usd=0.004,
)


def bulk(stats=STATS, **changes):
    """Return what a warming of 20 lines has come to."""
    figures = {"items": 20, "answered": 19, "failed": 1, "unasked": 0, "skipped": 0, "wall_s": 1.5, "broken": None}
    return SimpleNamespace(stats=stats, **(figures | changes))


class Ailing:
    """A cache that is unwell for a while.

    Attributes:
        until: Loop time from which it is well.
        takes: Seconds that every call takes.
        asked: How often it was asked for something.
        closed: Whether it was closed.
    """

    ttl = 60.0
    evictions = 7

    def __init__(self, until=0.0, *, takes=0.0):
        self.until = until
        self.takes = takes
        self.asked = 0
        self.closed = False
        self.values = {}

    async def open(self):
        pass

    async def aclose(self):
        self.closed = True

    async def _act(self):
        self.asked += 1
        if self.takes:
            await asyncio.sleep(self.takes)
        if now() < self.until:
            raise StorageError("database is locked")

    async def secret(self):
        await self._act()
        return b"s" * 32

    async def get_many(self, keys):
        await self._act()
        return [self.values.get(key) for key in keys]

    async def set_many(self, entries):
        await self._act()
        self.values.update((key, value) for key, value, _ in entries)


def patient_guard(cache):
    return Guard(cache, patience=CACHE_PATIENCE)


async def test_a_store_that_fails_is_repeated_until_it_succeeds():
    patient = patient_guard(Ailing(until=now() + 3))
    begun = now()
    assert await patient.store([ENTRY])
    assert 3 <= now() - begun < 3.2
    assert await patient.get_many([b"k", b"l"]) == [b"v", None]
    assert patient.failure is None


async def test_a_slow_call_is_in_time():
    patient = patient_guard(Ailing(takes=1.0))
    await patient.set_many([ENTRY])
    assert await patient.get_many([b"k"]) == [b"v"]
    assert (patient.bypassed, patient.evictions) == (0, 7)


@pytest.mark.parametrize(
    ("ailment", "why"),
    [
        ({"until": 1e9}, "database is locked"),
        ({"takes": 1e9}, "it took too long"),
        ({"until": 1e9, "takes": 3.0}, "database is locked"),  # the last try is cut off and has no reason of its own
    ],
)
async def test_one_that_does_not_get_well_is_given_up_and_not_asked_again(ailment, why):
    patient = patient_guard(cache := Ailing(**ailment))
    begun = now()
    assert await patient.get_many([b"k"]) == [None]
    assert CACHE_PATIENCE - 0.2 <= now() - begun <= CACHE_PATIENCE
    begun, asked = now(), cache.asked
    for _ in range(3):
        assert not await patient.store([ENTRY])
        assert (now(), cache.asked) == (begun, asked)
        await asyncio.sleep(100)
        begun = now()
    assert isinstance(patient.failure, StorageError)
    assert str(patient.failure) == why
    assert patient.bypassed == 1


async def test_one_that_takes_nothing_more_is_still_asked_for_what_it_has():
    """As a server does that is full: what it has would be paid for again."""

    class Full(Ailing):
        full = False

        async def set_many(self, entries):
            if self.full:
                self.asked += 1
                raise StorageError("no room")
            await super().set_many(entries)

    patient = patient_guard(cache := Full())
    assert await patient.store([ENTRY])
    cache.full = True
    assert not await patient.store([ENTRY])
    asked, begun = cache.asked, now()
    assert not await patient.store([ENTRY])
    assert (now(), cache.asked) == (begun, asked)
    assert await patient.get_many([b"k"]) == [b"v"]
    assert str(patient.failure) == "no room"


async def test_one_that_cannot_be_used_from_the_start_is_told_soon_and_closed():
    patient = patient_guard(cache := Ailing(until=1e9))
    begun = now()
    with pytest.raises(ConfigError, match=r"^the cache cannot be used: database is locked"):
        await patient.open()
    assert now() - begun <= guard._CHECK_PATIENCE
    assert cache.closed


async def test_one_that_is_busy_at_the_start_is_waited_for():
    patient = patient_guard(cache := Ailing(until=now() + 1))
    await patient.open()
    assert await patient.secret() == b"s" * 32
    assert (patient.ttl, cache.closed) == (60.0, False)
    await patient.aclose()
    assert cache.closed


async def test_one_that_needs_no_opening_is_checked_all_the_same():
    patient = patient_guard(mb.MemoryCache())
    await patient.open()
    assert len(await patient.secret()) == 32
    await patient.aclose()


async def test_opening_that_is_cancelled_closes_it():
    patient = patient_guard(cache := Ailing(takes=1.5))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(patient.open(), 1)
    assert cache.closed


async def test_batchers_that_share_a_guard_open_it_once_and_give_it_up_together():
    class Counted(Ailing):
        opened = 0

        async def open(self):
            self.opened += 1

    patient = patient_guard(cache := Counted())
    batchers = [mb.Microbatcher(ScriptedTransport(), cache=patient, tokens="bytes") for _ in range(2)]
    async with batchers[0], batchers[1]:
        assert cache.opened == 1
        cache.until = 1e9
        for batcher in batchers:
            assert [result.unwrap().output async for result in batcher.map([ask("a")])] == ["A"]
        assert now() == pytest.approx(CACHE_PATIENCE, abs=0.2)
    assert str(patient.failure) == "database is locked"
    assert cache.closed


def test_the_summary_has_exactly_these_keys():
    assert list(summarize(bulk())) == [
        "items",
        "known",
        "asked",
        "failed",
        "stored",
        "upstream_calls",
        "batches",
        "fallback_calls",
        "retries",
        "prompt_tokens",
        "completion_tokens",
        "cost_usd",
        "wall_s",
        "unasked",
        "alone_by_field",
        "unknown_ids",
        "cut_replies",
        "canaries_failed",
        "lanes_parted",
        "singles_compared",
        "unpriced_calls",
        "skipped",
    ]


def test_a_warming_is_told_with_what_it_cost():
    shown = "\n".join(summary_lines(bulk())).splitlines()
    assert shown[:3] == [
        "20 items: 5 known already, 14 asked, 1 failed, in 1.5 s",
        "14 answers stored in the cache",
        "",
    ]
    assert "one call each" in shown[3]


def test_answers_that_are_not_kept_are_told():
    stats = msgspec.structs.replace(STATS, cache_evictions=1, cache_stores=11)
    shown = "\n".join(summary_lines(bulk(stats)))
    assert "3 answers not stored: they were cut off, or came with others that were damaged" in shown
    assert "1 answer evicted because the cache is full" in shown
    assert "not stored" not in "\n".join(summary_lines(bulk(stats, broken=StorageError("x"))))


def test_a_warming_that_asked_nothing_is_told_in_one_line():
    stats = msgspec.structs.replace(STATS, cache_hits=20, cache_stores=0, upstream_calls=0)
    shown = list(summary_lines(bulk(stats, answered=20, failed=0)))
    assert shown == ["20 items: 20 known already, 0 asked, 0 failed, in 1.5 s"]
