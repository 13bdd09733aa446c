"""A cache that fails, lies or hangs: what it costs, how long it is left alone, and what is said of it."""

from __future__ import annotations

import asyncio
import logging

import pytest
from helpers import now

from microbatch.caching.guard import LIVE_TIMEOUT, Guard
from microbatch.errors import StorageError


class Moody:
    """A cache that does what its mood says.

    Attributes:
        mood: An error to raise, a number of seconds to take, or None to be well.
        asked: How often it was asked for something.
    """

    evictions = 3

    def __init__(self, mood=None, *, answer=None):
        self.mood = mood
        self.answer = answer
        self.asked = 0
        self.values = {}

    async def _act(self):
        self.asked += 1
        if isinstance(self.mood, BaseException):
            raise self.mood
        if self.mood is not None:
            await asyncio.sleep(self.mood)

    async def get_many(self, keys):
        await self._act()
        return [self.values.get(key) for key in keys] if self.answer is None else self.answer

    async def set_many(self, entries):
        await self._act()
        self.values.update((key, value) for key, value, _ in entries)

    async def aclose(self):
        pass


class Secretive(Moody):
    async def secret(self):
        await self._act()
        return self.answer


class Panic(BaseException):
    """As Rust's panics are told in Python."""


async def time_of(call):
    begun = now()
    result = await call
    return result, round(now() - begun, 9)


HANGS = 1e9


async def test_a_cache_that_is_well_is_not_noticed():
    guard = Guard(Moody())
    await guard.set_many([(b"k", b"v", None)])
    assert await time_of(guard.get_many([b"k", b"l"])) == ([b"v", None], 0)
    assert guard.bypassed == 0
    assert guard.evictions == 3
    assert repr(guard) == "<Guard of Moody: in use>"


async def test_a_cache_may_take_all_of_its_time_and_no_more():
    guard = Guard(cache := Moody(LIVE_TIMEOUT - 0.001))
    cache.values[b"k"] = b"v"
    assert await guard.get_many([b"k"]) == [b"v"]
    cache.mood = LIVE_TIMEOUT + 0.001
    assert await time_of(guard.get_many([b"k"])) == ([None], LIVE_TIMEOUT)
    assert repr(guard) == "<Guard of Moody: bypassed>"


@pytest.mark.parametrize(
    "mood",
    [
        HANGS,
        StorageError("down"),
        OSError("down"),
        ZeroDivisionError(),
        TimeoutError(),
        Panic(),
        asyncio.CancelledError(),
    ],
    ids=lambda mood: type(mood).__name__,
)
async def test_whatever_a_cache_does_its_callers_get_a_miss_and_then_do_without(mood):
    guard = Guard(cache := Moody(mood))
    found, took = await time_of(guard.get_many([b"k", b"l"]))
    assert found == [None, None]
    assert took == (LIVE_TIMEOUT if mood is HANGS else 0)
    for _ in range(10):
        assert await time_of(guard.get_many([b"k"])) == ([None], 0)
    assert cache.asked == 1
    assert guard.bypassed == 12
    await guard.set_many([(b"k", b"v", None)])
    assert cache.asked == 2  # stores are judged apart
    await guard.set_many([(b"k", b"v", None)])
    assert cache.asked == 2


@pytest.mark.parametrize(
    "answer",
    [[], [b"v"], [b"v", b"w", b"x"], [b"v", "w"], [b"v", bytearray(b"w")], "vw", 7],
    ids=repr,
)
async def test_an_answer_that_breaks_the_protocol_is_a_failure(answer):
    guard = Guard(cache := Moody(answer=answer))
    assert await guard.get_many([b"k", b"l"]) == [None, None]
    assert await guard.get_many([b"k", b"l"]) == [None, None]
    assert cache.asked == 1


async def test_any_sequence_is_an_answer():
    assert await Guard(Moody(answer=(b"v", None))).get_many([b"k", b"l"]) == [b"v", None]


async def test_nothing_is_asked_for_nothing():
    guard = Guard(cache := Moody(HANGS))
    assert await guard.get_many([]) == []
    await guard.set_many([])
    assert cache.asked == 0


async def test_it_is_left_alone_for_twice_as_long_each_time_up_to_half_a_minute():
    guard = Guard(cache := Moody(StorageError("down")))
    tries = []
    while now() < 200:
        before = cache.asked
        await guard.get_many([b"k"])
        if cache.asked > before:
            tries.append(round(now(), 3))
        await asyncio.sleep(0.125)
    assert tries == [0, 1, 3, 7, 15, 31, 61, 91, 121, 151, 181]


async def test_after_it_has_recovered_the_next_outage_begins_with_a_second():
    guard = Guard(cache := Moody(StorageError("down")))
    for pause in (0, 1, 2, 4):
        await asyncio.sleep(pause)
        await guard.get_many([b"k"])
    assert cache.asked == 4
    cache.mood = None
    await asyncio.sleep(8)
    await guard.get_many([b"k"])
    cache.mood = StorageError("down again")
    await guard.get_many([b"k"])
    assert cache.asked == 6
    await asyncio.sleep(1)
    await guard.get_many([b"k"])
    assert cache.asked == 7


async def test_one_call_tries_and_the_others_do_without_until_it_has_succeeded():
    guard = Guard(cache := Moody(StorageError("down")))
    await guard.get_many([b"k"])
    await asyncio.sleep(1)
    cache.mood = 0.03
    trial = asyncio.create_task(guard.get_many([b"k"]))
    await asyncio.sleep(0.01)
    assert await asyncio.gather(*(guard.get_many([b"k"]) for _ in range(20))) == [[None]] * 20
    assert cache.asked == 2
    await trial
    await guard.get_many([b"k"])
    assert cache.asked == 3


async def test_a_trial_whose_caller_goes_away_is_made_up_for_by_another():
    guard = Guard(cache := Moody(StorageError("down")))
    await guard.get_many([b"k"])
    await asyncio.sleep(1)
    cache.mood = 0.03
    trial = asyncio.create_task(guard.get_many([b"k"]))
    await asyncio.sleep(0.01)
    trial.cancel()
    cache.mood = None
    await asyncio.sleep(1)
    await guard.get_many([b"k"])
    assert cache.asked == 3
    assert repr(guard) == "<Guard of Moody: in use>"


async def test_many_that_fail_together_are_one_failure():
    guard = Guard(cache := Moody(HANGS))
    await asyncio.gather(*(guard.get_many([b"k"]) for _ in range(100)))
    cache.mood = None
    await asyncio.sleep(1)
    await guard.get_many([b"k"])
    assert cache.asked == 101


async def test_a_straggler_from_before_the_outage_does_not_end_it():
    guard = Guard(cache := Moody(0.04))
    straggler = asyncio.create_task(guard.get_many([b"k"]))
    await asyncio.sleep(0.01)
    cache.mood = StorageError("down")
    await guard.get_many([b"k"])
    assert await straggler == [None]
    assert repr(guard) == "<Guard of Moody: bypassed>"


async def test_stores_that_fail_do_not_cost_the_answers_that_are_there():
    guard = Guard(cache := Moody())
    await guard.set_many([(b"k", b"v", None)])
    cache.mood = StorageError("full")
    await guard.set_many([(b"l", b"w", None)])
    cache.mood = None
    assert await guard.get_many([b"k"]) == [b"v"]
    await guard.set_many([(b"l", b"w", None)])
    assert b"l" not in cache.values
    await asyncio.sleep(1)
    await guard.set_many([(b"l", b"w", None)])
    assert await guard.get_many([b"l"]) == [b"w"]


@pytest.mark.parametrize("mood", [None, HANGS], ids=["well", "hanging"])
async def test_a_caller_that_is_cancelled_is_cancelled_and_says_nothing_of_the_cache(mood):
    guard = Guard(cache := Moody(mood or 0.02))
    caller = asyncio.create_task(guard.get_many([b"k"]))
    await asyncio.sleep(0.01)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert guard.bypassed == 0
    cache.mood = None
    await guard.get_many([b"k"])
    assert cache.asked == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()], ids=["interrupt", "exit"])
def test_what_ends_the_program_passes(error):
    with pytest.raises(type(error)):
        asyncio.run(Guard(Moody(error)).get_many([b"k"]))


async def test_a_callers_timeout_is_its_own():
    guard = Guard(Moody(HANGS))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(LIVE_TIMEOUT / 2):
            await guard.get_many([b"k"])
    assert repr(guard) == "<Guard of Moody: in use>"


async def test_an_outage_is_told_once_and_so_is_its_end(caplog):
    caplog.set_level(logging.INFO, logger="microbatch")
    guard = Guard(cache := Moody(StorageError("no connection")))
    for _ in range(5):
        await guard.get_many([b"canary"])
        await guard.set_many([(b"canary", b"canary", None)])
        await asyncio.sleep(10)
    cache.mood = None
    await asyncio.sleep(30)
    for _ in range(3):
        await guard.get_many([b"canary"])
        await guard.set_many([(b"canary", b"canary", None)])
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "the cache Moody has failed and is bypassed for now: no connection"),
        ("INFO", "the cache Moody is in use again"),
    ]


async def test_the_words_of_foreign_errors_are_not_logged(caplog):
    await Guard(Moody(ValueError("canary"))).get_many([b"k"])
    await Guard(Moody(HANGS)).get_many([b"k"])
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["ValueError", "it took too long"]


async def test_a_secret_comes_from_the_cache():
    assert await Guard(Secretive(answer=b"s" * 32)).secret() == b"s" * 32


async def test_caches_without_a_secret_share_that_of_the_process():
    secret = await Guard(Moody()).secret()
    assert len(secret) == 32
    assert await Guard(Moody()).secret() == secret


@pytest.mark.parametrize("answer", [b"", b"s" * 31, "s" * 32, 32])
async def test_a_secret_that_is_none_is_a_failure(answer):
    guard = Guard(cache := Secretive(answer=answer))
    assert await guard.secret() is None
    assert await guard.secret() is None
    assert cache.asked == 1


async def test_a_secret_that_cannot_be_had_now_can_be_had_later():
    guard = Guard(cache := Secretive(HANGS, answer=b"s" * 32))
    assert await time_of(guard.secret()) == (None, LIVE_TIMEOUT)
    cache.mood = None
    assert await guard.secret() is None
    await asyncio.sleep(1)
    assert await guard.secret() == b"s" * 32


async def test_counts_that_a_cache_cannot_tell_are_zero():
    class Broken(Moody):
        evictions = property(lambda self: 1 / 0)
        bypassed = "many"

    assert Guard(Broken()).evictions == 0
    assert Guard(Broken()).bypassed == 0
