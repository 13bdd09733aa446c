"""`use_cache="refresh"` asks anew and replaces the answer that the cache has; `use_cache=False` leaves it."""

import asyncio
import itertools

import pytest
from helpers import ask, batcher_for

import microbatch as mb
from microbatch.testing import ScriptedTransport


def counting(**options):
    """Return a transport that answers "1", "2", ... in the order of its calls."""
    numbers = itertools.count(1)
    return ScriptedTransport(answer=lambda _: str(next(numbers)), **options)


class Hastening(ScriptedTransport):
    """Takes nine seconds for its first call, and one for each later one."""

    async def send(self, call, on_text):
        self._delay = 1.0 if self.calls else 9.0
        return await super().send(call, on_text)


def tiers():
    return mb.TieredCache(mb.MemoryCache(), mb.MemoryCache())


async def texts(batcher, *ways, **options):
    return [(await batcher.submit(ask("a"), use_cache=way, **options)).text for way in ways]


@pytest.mark.parametrize("make_cache", [mb.MemoryCache, tiers])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"params": {"n": 1, "seed": 3}}, {"timeout": 60.0}])
async def test_a_refreshed_answer_replaces_the_one_that_is_kept(make_cache, options):
    async with batcher_for(counting(), make_cache()) as batcher:
        asked = await texts(batcher, True, True, "refresh", True, False, True, "refresh", "refresh", True, **options)
        assert batcher.stats().cache_misses == 1
    assert asked == ["1", "1", "2", "2", "3", "2", "4", "5", "5"]


async def test_a_refreshed_answer_is_found_by_another_batcher_of_the_same_cache():
    cache = mb.MemoryCache()
    async with batcher_for(counting(), cache) as one, batcher_for(counting(), cache) as other:
        assert await texts(one, True, "refresh") == ["1", "2"]
        assert await texts(other, True) == ["2"]


async def test_map_and_open_answer_refresh_too():
    async with batcher_for(counting(), mb.MemoryCache()) as batcher:
        await texts(batcher, True)
        request = mb.Request(ask("a"), use_cache="refresh")
        assert [result.unwrap().text async for result in batcher.map([request])] == ["2"]
        assert await texts(batcher, True) == ["2"]
        options = {
            **dict.fromkeys(("model", "max_tokens", "temperature", "params", "headers", "tenant")),
            "priority": "normal",
        }
        async with batcher.open_answer(ask("a"), streamed=False, timeout=None, use_cache="refresh", **options) as live:
            assert (await live.reply()).text == "3"
        assert await texts(batcher, True) == ["3"]


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"params": {"seed": 3}}])
async def test_a_refresh_takes_no_answer_that_is_under_way(options):
    """It may have been asked for before whatever made the caller want a new one."""
    transport = counting(delay=5.0)
    async with batcher_for(transport, mb.MemoryCache()) as batcher:
        before = asyncio.ensure_future(batcher.submit(ask("a"), **options))
        await asyncio.sleep(1.0)
        anew = await batcher.submit(ask("a"), use_cache="refresh", **options)
        assert {anew.text, (await before).text} == {"1", "2"}
        assert (await batcher.submit(ask("a"), **options)).text == anew.text == "2"


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"params": {"seed": 3}}])
@pytest.mark.parametrize("callers", [1, 3])
async def test_an_answer_that_was_asked_for_before_a_refresh_never_replaces_that_of_the_refresh(options, callers):
    numbers = itertools.count(1)
    transport = Hastening(answer=lambda _: str(next(numbers)))  # in the order in which its calls end
    async with batcher_for(transport, mb.MemoryCache()) as batcher:
        before = [asyncio.ensure_future(batcher.submit(ask("a"), **options)) for _ in range(callers)]
        await asyncio.sleep(1.0)
        assert (await batcher.submit(ask("a"), use_cache="refresh", **options)).text == "1"
        assert [reply.text for reply in await asyncio.gather(*before)] == ["2"] * callers
        await asyncio.sleep(1.0)
        assert (await batcher.submit(ask("a"), **options)).text == "1"
        assert len(transport.calls) == 2
        assert not len(batcher._parts.in_flight)


@pytest.mark.parametrize("ttl", [0, 0.0001])
async def test_a_refresh_that_may_not_be_kept_leaves_no_old_answer(ttl):
    async with batcher_for(counting(), mb.MemoryCache()) as batcher:
        await texts(batcher, True)
        assert await texts(batcher, "refresh", ttl=ttl) == ["2"]
        await asyncio.sleep(1.0)
        assert await texts(batcher, True) == ["3"]


async def test_without_a_cache_a_refresh_is_asked_like_any_other():
    async with batcher_for(counting(), None) as batcher:
        assert await texts(batcher, "refresh", "refresh") == ["1", "2"]


@pytest.mark.parametrize("word", ["Refresh", "no", "", None, 2])
@pytest.mark.parametrize("cache", [None, mb.MemoryCache()])
async def test_another_word_is_refused_and_nothing_is_asked(word, cache):
    transport = counting()
    async with batcher_for(transport, cache) as batcher:
        with pytest.raises(mb.ConfigError, match="use_cache"):
            await batcher.submit(ask("a"), use_cache=word)
        with pytest.raises(mb.ConfigError, match="use_cache"):
            [result.unwrap() async for result in batcher.map([mb.Request(ask("a"), use_cache=word)])]
        assert batcher.stats().queued == 0
    assert transport.calls == []
