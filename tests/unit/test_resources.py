"""Parts that several batchers share, whatever the order in which these open, fail, are cancelled and close."""

import asyncio
import functools
import random
import subprocess
import sys
import threading

import pytest
from helpers import each, now

import microbatch as mb
from microbatch import resources
from microbatch.resources import acquire, release
from microbatch.testing import ScriptedTransport


class Slow:
    """A part whose opening and closing take time, and which sees how it is used."""

    def __init__(self, opening=1.0, closing=1.0):
        self.opening, self.closing = opening, closing
        self.failures = 0  # how many of the next openings fail
        self.state = "closed"
        self.opened = 0

    async def open(self):
        assert self.state == "closed"
        self.state = "opening"
        self.opened += 1
        try:
            await asyncio.sleep(self.opening)
        except BaseException:
            self.state = "closed"
            raise
        if self.failures:
            self.failures -= 1
            self.state = "closed"
            raise mb.ConfigError("cannot be opened")
        self.state = "open"

    async def aclose(self):
        assert self.state == "open"
        self.state = "closing"
        try:
            await asyncio.sleep(self.closing)
        finally:
            self.state = "closed"


@pytest.fixture(autouse=True)
async def nothing_stays(monkeypatch):
    monkeypatch.setattr(resources, "_in_use", {})  # other tests abandon batchers
    yield
    await asyncio.sleep(10)  # of virtual time: for what goes on in the background
    assert resources._in_use == {}
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def started(*coroutines):
    """Return tasks of *coroutines* that have got as far as they get in no time."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    await asyncio.sleep(0.01)
    return tasks


async def test_all_users_wait_for_one_opening():
    part = Slow()
    first, second = await started(acquire([part]), acquire([part]))
    assert not first.done()
    assert not second.done()
    await asyncio.wait([first, second])
    assert now() == 1.0
    assert (part.state, part.opened) == ("open", 1)
    await release([part])
    assert part.state == "open"
    await release([part])
    assert part.state == "closed"


async def test_an_opening_that_fails_fails_for_all_who_wait_and_is_tried_again_for_the_next():
    part = Slow()
    part.failures = 1
    users = await started(acquire([part]), acquire([part]), acquire([part]))
    errors = await asyncio.gather(*users, return_exceptions=True)
    assert [type(error) for error in errors] == [mb.ConfigError] * 3
    assert len({id(error) for error in errors}) == 3  # notes and tracebacks of one are not those of another
    assert part.opened == 1
    await acquire([part])
    assert (part.state, part.opened) == ("open", 2)
    await release([part])


async def test_a_user_who_comes_in_the_moment_of_the_failure_gets_an_opening_of_its_own():
    part = Slow()
    part.failures = 1

    async def retrying():
        try:
            await acquire([part])
        except mb.ConfigError:
            await acquire([part])

    await asyncio.wait(await started(retrying(), retrying(), retrying()))
    assert (part.state, part.opened) == ("open", 2)
    await release([part, part, part])


async def test_a_first_user_that_is_cancelled_leaves_the_opening_to_the_others():
    part = Slow()
    first, second = await started(acquire([part]), acquire([part]))
    first.cancel()
    await asyncio.wait([first, second])
    assert first.cancelled()
    assert second.exception() is None
    assert now() == 1.0
    assert (part.state, part.opened) == ("open", 1)
    await release([part])


async def test_the_last_user_that_is_cancelled_ends_the_opening():
    part = Slow()
    users = await started(acquire([part]), acquire([part]))
    for user in users:
        user.cancel()
    await asyncio.wait(users)
    assert now() == 0.01
    assert part.state == "closed"


async def test_a_part_that_opens_in_spite_of_being_cancelled_is_closed():
    class Stubborn(Slow):
        async def open(self):
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                await asyncio.sleep(1)
            self.state = "open"

    part = Stubborn()
    (user,) = await started(acquire([part]))
    user.cancel()
    await asyncio.wait([user])
    assert part.state == "closed"
    assert now() == 2.01


async def test_an_opening_waits_for_the_closing_before_it():
    part = Slow()
    await acquire([part])
    _, second = await started(release([part]), acquire([part]))
    assert part.state == "closing"
    await second
    assert (part.state, now()) == ("open", 3.0)
    await release([part])


async def test_a_closing_goes_on_if_whoever_waits_for_it_is_cancelled_twice_over():
    part = Slow()
    await acquire([part])
    (closing,) = await started(release([part]))
    closing.cancel()
    (second,) = await started(acquire([part]))
    second.cancel()
    (third,) = await started(acquire([part]))
    assert part.state == "closing"
    await third
    assert part.state == "open"
    await release([part])


async def test_a_part_that_cannot_be_opened_gives_the_others_back():
    good, bad = Slow(), Slow()
    bad.failures = 1
    with pytest.raises(mb.ConfigError):
        await acquire([good, bad])
    assert good.state == "closed"


async def test_all_parts_are_closed_even_if_one_cannot_be():
    class Broken(Slow):
        async def aclose(self):
            raise OSError("broken")

    before, after = Slow(), Slow()
    shared = [before, Broken(), after]
    await acquire(shared)
    with pytest.raises(OSError, match="broken"):
        await release(shared)
    assert before.state == after.state == "closed"


@each("seed", range(200))
async def test_any_order_of_opening_failing_cancelling_and_closing(seed):
    """`Slow` asserts that it is never opened twice nor closed while it opens; a user never has it in another state than open."""
    rng = random.Random(seed)
    part = Slow(opening=rng.choice([0, 1, 3]), closing=rng.choice([0, 1, 3]))

    async def use(delay, span):
        await asyncio.sleep(delay)
        await acquire([part])
        try:
            assert part.state == "open"
            await asyncio.sleep(span)
            assert part.state == "open"
        finally:
            await release([part])

    part.failures = rng.choice([0, 0, 1, 2])
    tasks = [asyncio.ensure_future(use(rng.randrange(8), rng.randrange(5))) for _ in range(6)]
    for _ in range(rng.randrange(6)):
        asyncio.get_running_loop().call_later(rng.randrange(12), rng.choice(tasks).cancel)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {type(None), mb.ConfigError, asyncio.CancelledError}, outcomes
    await asyncio.sleep(10)
    assert part.state == "closed"
    part.failures = 0
    await acquire([part])
    await release([part])


async def test_a_tier_that_two_caches_share_is_opened_once_and_closed_last():
    class Tier(Slow):
        async def get_many(self, keys):
            return [None] * len(keys)

        async def set_many(self, entries):
            pass

    tier = Tier()
    caches = [mb.TieredCache(mb.MemoryCache(), tier) for _ in range(2)]
    batchers = [mb.Microbatcher(ScriptedTransport(), cache=cache, tokens="bytes") for cache in caches]
    await asyncio.gather(*(batcher.open() for batcher in batchers))
    assert tier.opened == 1
    await batchers[0].aclose()
    assert tier.state == "open"
    await batchers[1].aclose()
    assert tier.state == "closed"


async def test_a_part_that_another_loop_is_opening_is_refused_until_it_is_open():
    part = Slow(opening=0, closing=0)
    going_on, may_go_on = asyncio.Event(), threading.Event()
    part.open = functools.partial(asyncio.to_thread, may_go_on.wait)
    loop = asyncio.get_running_loop()

    async def elsewhere():
        leasing = asyncio.ensure_future(acquire([part]))
        await asyncio.sleep(0)
        loop.call_soon_threadsafe(going_on.set)
        await leasing

    thread = asyncio.ensure_future(asyncio.to_thread(asyncio.run, elsewhere()))
    await going_on.wait()
    with pytest.raises(mb.ConfigError, match="another event loop"):
        await acquire([part])
    may_go_on.set()
    await thread
    part.state = "open"
    await acquire([part])
    await release([part])
    await release([part])
    assert part.state == "closed"


LEFT_BEHIND = """
import asyncio
from microbatch.resources import acquire

class Slow:
    async def open(self):
        await asyncio.sleep(opening)
    async def aclose(self):
        pass

part, opening = Slow(), 60
loop = asyncio.new_event_loop()
loop.create_task(acquire([part]))
loop.run_until_complete(asyncio.sleep(0.01))
loop.close()
opening = 0
asyncio.run(acquire([part]))
print("open")
"""


async def test_a_part_left_opening_by_a_loop_that_is_gone_is_opened_in_the_next():
    done = subprocess.run([sys.executable, "-c", LEFT_BEHIND], check=False, capture_output=True, text=True)  # noqa: ASYNC221
    assert done.stdout == "open\n", done.stderr
