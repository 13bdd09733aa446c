"""Whose turn it is: by itself, and through the batcher."""

import asyncio
from collections import Counter, deque

import pytest
from helpers import ask
from hypothesis import given, settings
from hypothesis import strategies as st

import microbatch as mb
from microbatch.batching.turns import WEIGHTS, Turns
from microbatch.testing import ScriptedTransport
from microbatch.transports.bucket import WINDOW


class Line:
    """A queue with some work."""

    def __init__(self, name, rank=1, tenant=None, account="a", work=10**9):
        self.name, self.rank, self.tenant, self.account, self.work = name, rank, tenant, account, work

    def __repr__(self):
        return self.name


def serve(turns, count):
    """Serve as the scheduler does; return who was served."""
    served = []
    while len(served) < count and (queue := turns.next()) is not None:
        if not queue.work:
            turns.remove(queue)
            continue
        queue.work -= 1
        turns.served(queue, stays=bool(queue.work))
        served.append(queue)
    return served


def turns_of(*queues):
    turns = Turns()
    for queue in queues:
        turns.add(queue)
    return turns


def names(queues):
    return "".join(queue.name for queue in queues)


def test_queues_of_a_tenant_take_turns():
    assert names(serve(turns_of(Line("a"), Line("b"), Line("c")), 7)) == "abcabca"


def test_tenants_take_turns_however_many_queues_they_have():
    busy = [Line(name, tenant="busy") for name in "abc"]
    assert names(serve(turns_of(*busy, Line("x", tenant="quiet")), 8)) == "axbxcxax"


def test_accounts_take_turns_however_many_tenants_they_have():
    busy = [Line(name, tenant=name) for name in "abc"]
    assert names(serve(turns_of(*busy, Line("x", account="other")), 8)) == "axbxcxax"


def test_priorities_share_by_weight_and_none_is_left_out():
    served = serve(turns_of(*(Line(f"{rank}", rank=rank) for rank in range(3))), 21 * 20)
    assert Counter(queue.rank for queue in served) == {0: 16 * 20, 1: 4 * 20, 2: 20}
    for start in range(0, len(served) - 42, 7):
        window = Counter(queue.rank for queue in served[start : start + 42])
        assert all(abs(window[rank] - 2 * weight) <= 2 for rank, weight in enumerate(WEIGHTS))


def test_one_priority_alone_has_all_the_turns():
    assert names(serve(turns_of(Line("l", rank=2)), 5)) == "lllll"


def test_a_priority_that_comes_back_after_a_rest_makes_up_for_nothing():
    low = Line("l", rank=2)
    turns = turns_of(low)
    serve(turns, 1_000)
    turns.add(Line("h", rank=0))
    assert names(serve(turns, 34)).count("h") == pytest.approx(32, abs=1)
    turns = turns_of(Line("h", rank=0))
    serve(turns, 16_000)
    turns.add(Line("l", rank=2))
    assert names(serve(turns, 34)).count("l") == pytest.approx(2, abs=1)


def test_a_queue_that_ran_out_takes_no_turn_from_the_others():
    assert names(serve(turns_of(Line("a", work=1), Line("b", work=3), Line("c", work=2)), 10)) == "abcbcb"


# --- blocked


def test_a_blocked_account_holds_up_nobody_else_and_its_head_goes_first():
    slow, fast = Line("s", account="slow"), Line("f", account="fast")
    turns = turns_of(slow, fast)
    assert turns.next() is slow
    turns.block(slow)
    turns.add(Line("t", account="slow"))
    turns.add(Line("u", account="slow", rank=0))
    assert names(serve(turns, 3)) == "fff"
    assert turns.unblock("slow")
    assert "s" in names(serve(turns, 2))
    assert not turns._heads


def test_the_head_goes_first_even_before_higher_priorities_of_its_account():
    normal = Line("n")
    turns = turns_of(normal)
    turns.block(normal)
    turns.add(Line("h", rank=0))
    turns.unblock("a")
    assert turns.next() is normal


def test_a_head_that_is_no_longer_due_is_no_head():
    head, other = Line("h", work=1), Line("o")
    turns = turns_of(head, other)
    turns.block(head)
    head.work = 0
    turns.unblock("a")
    assert names(serve(turns, 2)) == "oo"
    assert not turns._heads


def test_unblocking_who_is_not_blocked_changes_nothing():
    turns = turns_of(Line("a"))
    assert not turns.unblock("a")
    assert not turns.unblock("stranger")
    assert names(serve(turns, 1)) == "a"


def test_blocking_with_every_grant_changes_no_shares():
    queues = [Line("h", rank=0), Line("n", rank=1), Line("l", rank=2), Line("o", rank=2, account="other")]
    turns = turns_of(*queues)
    count = Counter()
    for _ in range(21 * 40):
        served = serve(turns, 1)
        count[names(served)] += 1
        # The next one of the same account is refused, and is ready again before the next turn.
        following = turns.next()
        turns.block(following)
        turns.unblock(following.account)
    assert count["h"] == pytest.approx(16 * 40, rel=0.05)
    assert count["n"] == pytest.approx(4 * 40, rel=0.05)
    assert count["l"] + count["o"] == pytest.approx(40, rel=0.1)
    assert abs(count["l"] - count["o"]) <= 4


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "serve", "serve", "block", "unblock", "drain"]),
        st.integers(0, 2),
        st.sampled_from("xy"),
        st.sampled_from(["a", "b"]),
        st.integers(0, 3),
    ),
    max_size=80,
)


@settings(max_examples=300)
@given(operations=OPERATIONS)
def test_every_queue_is_served_in_the_end_and_nothing_is_left_behind(operations):
    turns, alive, blocked = Turns(), [], set()
    for what, rank, tenant, account, work in operations:
        if what == "add":
            queue = Line(f"{len(alive)}", rank, tenant, account, work)
            alive.append(queue)
            turns.add(queue)
        elif what == "serve":
            for queue in serve(turns, 1):
                assert queue.account not in blocked
        elif what == "block" and (queue := turns.next()) is not None:
            assert queue.account not in blocked
            turns.block(queue)
            blocked.add(queue.account)
        elif what == "unblock":
            turns.unblock(account)
            blocked.discard(account)
        elif what == "drain" and alive:
            alive[work % len(alive)].work = 0  # its callers have left
    for account in blocked:
        turns.unblock(account)
    serve(turns, 10**6)
    assert not any(queue.work for queue in alive)
    assert turns.next() is None
    assert not turns._heads
    assert not turns._blocked
    assert not any(priority.accounts for priority in turns._priorities)


def test_ten_thousand_queues_cost_no_more_a_turn_than_ten():
    turns = turns_of(*(Line(f"{i}", tenant=i % 100) for i in range(10_000)))
    assert len({id(queue) for queue in serve(turns, 10_000)}) == 10_000


# --- through the batcher


class Loads:
    """Callers who ask for as long as they are let, each with one request at a time."""

    def __init__(self, batcher):
        self.batcher = batcher
        self.answered = Counter()
        self.longest = Counter()
        self.tasks = []

    def add(self, name, callers=8, **options):
        async def caller(number):
            loop = asyncio.get_running_loop()
            while True:
                start = loop.time()
                await self.batcher.submit(ask(f"{number}", f"lane {name}"), **options)
                self.answered[name] += 1
                self.longest[name] = max(self.longest[name], loop.time() - start)

        self.tasks += [asyncio.ensure_future(caller(number)) for number in range(callers)]

    async def run(self, seconds):
        await asyncio.sleep(seconds)
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks)


def plain(**options):
    options = {"max_batch_size": 1, "max_concurrent_batches": 4, "low_max_wait": 0.0, **options}
    return mb.FlushPolicy(**options)


LIMITS = pytest.mark.parametrize("limit", [None, {"rpm": 240}], ids=["slots bind", "permits bind"])


def batcher_with(limit, transport=None, **policy):
    return mb.Microbatcher(
        transport or ScriptedTransport(delay=1.0),
        tokens="bytes",
        policy=plain(**policy),
        rate_limit=None if limit is None else mb.RateLimit(**limit),
    )


@LIMITS
@pytest.mark.promise(of="fair")
async def test_priorities_get_their_weights_and_none_starves(limit):
    async with batcher_with(limit) as batcher:
        loads = Loads(batcher)
        for priority in ("high", "normal", "low"):
            loads.add(priority, callers=60, priority=priority)
        await loads.run(600)
    total = loads.answered.total()
    assert total >= 0.95 * 4 * 580
    for name, weight in zip(("high", "normal", "low"), WEIGHTS, strict=True):
        assert loads.answered[name] / total == pytest.approx(weight / 21, rel=0.15)


@LIMITS
@pytest.mark.promise(of="fair")
async def test_a_tenant_with_many_lanes_and_callers_gets_no_more_than_one_with_few(limit):
    async with batcher_with(limit) as batcher:
        loads = Loads(batcher)
        for number in range(10):
            loads.add(f"crowd {number}", callers=10, tenant="crowd")
        loads.add("loner", callers=8, tenant="loner")
        await loads.run(600)
    crowd = [loads.answered[f"crowd {number}"] for number in range(10)]
    assert sum(crowd) == pytest.approx(loads.answered["loner"], rel=0.05)
    assert max(crowd) <= 1.2 * min(crowd)


@LIMITS
async def test_what_goes_alone_takes_turns_with_the_lanes_of_its_tenant(limit):
    async with batcher_with(limit) as batcher:
        loads = Loads(batcher)
        loads.add("lane", callers=40)
        loads.add("alone", callers=40, params={"n": 2})
        await loads.run(300)
    assert loads.answered["lane"] == pytest.approx(loads.answered["alone"], rel=0.1)


@pytest.mark.promise(of="fair")
async def test_requests_of_a_lane_leave_in_order_of_arrival_whatever_blocks_them():
    transport = ScriptedTransport(delay=0.3)
    async with batcher_with({"rpm": 30}, transport, max_batch_size=3, max_concurrent_batches=2, idle="wait") as batcher:
        tasks = []
        for number in range(200):
            tasks.append(asyncio.ensure_future(batcher.submit(ask(f"{number:03}"))))
            await asyncio.sleep(0.05)
        await asyncio.gather(*tasks)
    sent = [text for call in transport.calls for _, text in call.items]
    assert sent == sorted(sent)


async def test_an_account_out_of_permits_holds_up_no_other():
    loop = asyncio.get_running_loop()
    async with batcher_with({"rpm": 3}) as batcher:
        key = {"headers": {"Authorization": "Bearer a"}}
        spent = [asyncio.ensure_future(batcher.submit(ask(f"{i}"), **key)) for i in range(8)]
        await asyncio.sleep(5)
        await batcher.submit(ask("x"), headers={"Authorization": "Bearer b"})
        assert loop.time() == 6.0
        await asyncio.gather(*spent)
        assert loop.time() == pytest.approx(2 * WINDOW + 1)


async def test_a_large_request_is_not_overtaken_by_small_ones_of_other_lanes():
    transport = ScriptedTransport(delay=0.1)
    async with batcher_with({"tpm": 20_000}, transport, max_concurrent_batches=64) as batcher:
        loads = Loads(batcher)
        loads.add("small", callers=20, max_tokens=100)
        await asyncio.sleep(100)
        start = asyncio.get_running_loop().time()
        await batcher.submit(ask("large"), max_tokens=10_000)
        assert asyncio.get_running_loop().time() - start <= WINDOW
        await loads.run(100)
    assert loads.longest["small"] < 2 * WINDOW


async def test_lanes_that_were_emptied_while_blocked_leave_nothing_behind():
    transport = ScriptedTransport()
    async with batcher_with({"rpm": 1}, transport, idle="wait", max_wait=0.0) as batcher:
        await batcher.submit(ask("first"))
        tasks = [
            asyncio.ensure_future(batcher.submit(ask("x", f"lane {i}"), tenant=f"{i % 3}", priority=priority))
            for i, priority in enumerate(["high", "normal", "low"] * 4)
        ]
        await asyncio.sleep(5)
        turns = batcher._collector.scheduler._turns
        assert turns._blocked
        assert len(turns._heads) == 1
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await asyncio.sleep(WINDOW)
        assert not turns._blocked
        assert not turns._heads
        assert turns.next() is None
        assert not list(batcher._collector.lanes)
        assert not batcher._collector._intake.alone
        assert (await batcher.submit(ask("last"))).output == "LAST"
    assert len(transport.calls) == 2


async def test_asking_again_is_not_held_up_by_what_is_new_and_does_not_starve_it():
    spoil = deque([True] * 5)

    def half(call):
        if call.combined and spoil:
            spoil.popleft()
            return call.reply([(name, text) for name, text in call.items[: len(call.items) * 9 // 10]])
        return call.reply(call.items) if call.combined else call.items[0][1]

    transport = ScriptedTransport(*[half] * 10_000, delay=0.5)
    async with batcher_with({"rpm": 60}, transport, max_batch_size=10) as batcher:
        loads = Loads(batcher)
        loads.add("x", callers=200)
        await loads.run(300)
        stats = batcher.stats()
    assert stats.fallback_calls == 5
    assert loads.answered["x"] >= 0.9 * 10 * 290
    assert loads.longest["x"] < 60
