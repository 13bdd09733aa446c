"""Opening a batcher: it fails, is cancelled or closed at any moment, and nothing of it stays."""

import asyncio
import gc

import pytest
from helpers import ask, batcher_for, each

import microbatch as mb
from microbatch import resources
from microbatch.testing import ScriptedTransport


class Cache:
    """A cache that opens, tells its secret and closes in three turns of the loop each."""

    def __init__(self):
        self.is_open = False
        self.wrong = None  # which of its methods fails next

    async def _turns(self, name):
        for _ in range(3):
            await asyncio.sleep(0)
        if self.wrong == name:
            self.wrong = None
            raise mb.ConfigError(f"{name} failed")

    async def open(self):
        await self._turns("open")
        self.is_open = True

    async def aclose(self):
        await self._turns("aclose")
        self.is_open = False

    async def secret(self):
        await self._turns("secret")
        return bytes(32)

    async def get_many(self, keys):
        return [None] * len(keys)

    async def set_many(self, entries):
        pass


@pytest.fixture(autouse=True)
async def nothing_is_logged(caplog, monkeypatch):
    monkeypatch.setattr(resources, "_in_use", {})  # other tests abandon batchers
    yield
    gc.collect()  # or asyncio complains of lost errors in the next test
    assert caplog.records == []


def nothing_stays():
    return asyncio.all_tasks() == {asyncio.current_task()} and resources._in_use == {}


async def works(batcher):
    """Return whether *batcher*, which is new, can be opened, used and closed."""
    async with batcher:
        answered = (await batcher.submit(ask("x"))).output == "X"
    return answered and nothing_stays()


TURNS = range(30)  # of the loop; opening takes fewer


@each("turns", TURNS)
async def test_an_opening_that_is_cancelled_at_any_moment_leaves_nothing_and_can_be_repeated(turns):
    cache = Cache()
    batcher = batcher_for(ScriptedTransport(), cache)
    opening = asyncio.ensure_future(batcher.open())
    for _ in range(turns):
        await asyncio.sleep(0)
    if not opening.cancel():
        await batcher.aclose()
        return
    await asyncio.wait([opening])
    assert opening.cancelled()
    assert not cache.is_open
    assert nothing_stays()
    assert repr(batcher).startswith("Microbatcher(new")
    with pytest.raises(mb.BatcherClosed, match="not open yet"):
        await batcher.submit(ask("x"))
    assert await works(batcher)
    assert not cache.is_open


async def test_the_moments_above_are_all_there_are():
    opening = asyncio.ensure_future(batcher_for(ScriptedTransport(), Cache()).open())
    for _ in TURNS:
        await asyncio.sleep(0)
    assert opening.done()
    await opening.result().aclose()


@each("turns", TURNS)
async def test_an_opening_that_is_cancelled_twice_can_be_repeated_at_once(turns):
    cache = Cache()
    batcher = batcher_for(ScriptedTransport(), cache)
    opening = asyncio.ensure_future(batcher.open())
    await asyncio.sleep(0)
    for _ in range(turns):
        await asyncio.sleep(0)
    if opening.cancel():
        await asyncio.sleep(0)
        opening.cancel()
        await asyncio.wait([opening])
        assert await works(batcher)
    else:
        await batcher.aclose()
    assert not cache.is_open


@pytest.mark.parametrize("wrong", ["open", "secret"])
async def test_a_failed_opening_can_be_repeated(wrong):
    cache = Cache()
    cache.wrong = wrong
    batcher = batcher_for(ScriptedTransport(), cache)
    if wrong == "open":
        with pytest.raises(mb.ConfigError, match="open failed"):
            await batcher.open()
        assert nothing_stays()
        with pytest.raises(mb.BatcherClosed, match="not open yet"):
            batcher.flush()
    assert await works(batcher)
    assert not cache.is_open


async def test_any_error_of_a_part_reaches_whoever_opens():
    class Odd(Cache):
        async def open(self):
            raise ZeroDivisionError

    batcher = batcher_for(ScriptedTransport(), Odd())
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await batcher.open()
        assert nothing_stays()


async def test_a_price_list_that_cannot_be_loaded_is_told_and_tried_again():
    calls = []

    class Prices:
        def __call__(self, model):
            return None

        def load(self):
            calls.append(None)
            if len(calls) == 1:
                raise mb.ConfigError("no prices")

    batcher = batcher_for(ScriptedTransport(), prices=Prices())
    with pytest.raises(mb.ConfigError, match="no prices"):
        await batcher.open()
    assert await works(batcher)
    assert len(calls) == 2


@each("turns", TURNS)
async def test_closing_a_batcher_while_it_opens_ends_the_opening(turns):
    cache = Cache()
    batcher = batcher_for(ScriptedTransport(), cache)
    opening = asyncio.ensure_future(batcher.open())
    await asyncio.sleep(0)
    for _ in range(turns):
        await asyncio.sleep(0)
    opened = opening.done()
    await batcher.aclose()
    await asyncio.wait([opening])
    if opened:
        assert opening.result() is batcher
    else:
        assert isinstance(opening.exception(), mb.BatcherClosed)
    assert not cache.is_open
    assert nothing_stays()
    assert repr(batcher).startswith("Microbatcher(closed")
    with pytest.raises(mb.BatcherClosed, match="opened once"):
        await batcher.open()


async def test_a_second_opening_is_refused_while_the_first_is_under_way():
    batcher = batcher_for(ScriptedTransport(), Cache())
    opening = asyncio.ensure_future(batcher.open())
    await asyncio.sleep(0)
    with pytest.raises(mb.BatcherClosed, match="opened once"):
        await batcher.open()
    with pytest.raises(mb.BatcherClosed, match="not open yet"):
        await batcher.submit(ask("x"))
    await opening
    await batcher.aclose()


async def test_a_timeout_around_async_with_ends_a_slow_opening():
    class Slow(Cache):
        async def open(self):
            await asyncio.sleep(60)

    batcher = batcher_for(ScriptedTransport(), Slow())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1), batcher:
            pytest.fail("it is not open")
    assert asyncio.get_running_loop().time() == 1.0
    assert nothing_stays()


async def test_the_other_batcher_on_shared_parts_does_not_notice():
    cache = Cache()
    first, second = batcher_for(ScriptedTransport(), cache), batcher_for(ScriptedTransport(), cache)
    openings = [asyncio.ensure_future(batcher.open()) for batcher in (first, second)]
    await asyncio.sleep(0)
    openings[0].cancel()
    await asyncio.wait(openings)
    assert openings[0].cancelled()
    assert cache.is_open
    assert (await second.submit(ask("x"))).output == "X"
    assert await first.open() is first
    await second.aclose()
    assert cache.is_open
    await first.aclose()
    assert nothing_stays()


async def test_a_part_that_cannot_be_closed_is_told_in_the_log(caplog):
    cache = Cache()
    batcher = await batcher_for(ScriptedTransport(), cache).open()
    cache.wrong = "aclose"
    await batcher.aclose()
    assert [record.exc_info[0] for record in caplog.records] == [mb.ConfigError]
    assert "bug in microbatch" not in caplog.text
    caplog.clear()
