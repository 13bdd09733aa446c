"""Whose turn it is: by itself, and through the batcher."""

import asyncio
from collections import Counter, deque

import pytest
from helpers import ask
from hypothesis import given, settings
from hypothesis import strategies as st

import microbatch as mb
from microbatch.batching.fair_queue import WEIGHTS, Attempt, FairQueue
from microbatch.testing import ScriptedTransport
from microbatch.transports.rate_limit import WINDOW


class Load:
    """What an account says of itself."""

    def __init__(self, *, on_wire=0, begun=0, backing_off=0):
        self.on_wire, self.begun, self.backing_off = on_wire, begun, backing_off


A, B = Load(), Load()


class Line:
    """A queue with some work."""

    def __init__(self, name, rank=1, tenant=None, account=A, work=10**9):
        self.name, self.rank, self.tenant, self.account, self.work = name, rank, tenant, account, work

    def __repr__(self):
        return self.name


def serve(turns, count, in_use=0):
    """Serve as the scheduler does; return who was served."""
    served = []
    while len(served) < count and (queue := turns.next(in_use)) is not None:
        if not queue.work:
            turns.remove(queue)
            continue
        queue.work -= 1
        turns.served(queue, stays=bool(queue.work))
        served.append(queue)
    return served


def turns_of(*queues, slots=64):
    turns = FairQueue(slots)
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
    assert names(serve(turns_of(*busy, Line("x", account=B)), 8)) == "axbxcxax"


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
    slow, fast = Line("s", account=A), Line("f", account=B)
    turns = turns_of(slow, fast)
    assert turns.next() is slow
    turns.block(slow)
    turns.add(Line("t", account=A))
    turns.add(Line("u", account=A, rank=0))
    assert names(serve(turns, 3)) == "fff"
    assert turns.unblock(A)
    assert "s" in names(serve(turns, 2))
    assert turns._loads[A].head is None


def test_the_head_goes_first_even_before_higher_priorities_of_its_account():
    normal = Line("n")
    turns = turns_of(normal)
    turns.block(normal)
    turns.add(Line("h", rank=0))
    turns.unblock(A)
    assert turns.next() is normal


def test_a_head_that_is_no_longer_due_is_no_head():
    head, other = Line("h", work=1), Line("o")
    turns = turns_of(head, other)
    turns.block(head)
    head.work = 0
    turns.unblock(A)
    assert names(serve(turns, 2)) == "oo"
    assert turns._loads[A].head is None


def test_unblocking_who_is_not_blocked_changes_nothing():
    turns = turns_of(Line("a"))
    assert turns.unblock(A)
    assert not turns.unblock(B)
    assert names(serve(turns, 1)) == "a"


def test_blocking_with_every_grant_changes_no_shares():
    queues = [Line("h", rank=0), Line("n", rank=1), Line("l", rank=2), Line("o", rank=2, account=B)]
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
        st.sampled_from([A, B]),
        st.integers(0, 3),
    ),
    max_size=80,
)


@settings(max_examples=300)
@given(operations=OPERATIONS)
def test_every_queue_is_served_in_the_end_and_nothing_is_left_behind(operations):
    turns, alive, blocked = FairQueue(64), [], set()
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
    assert not turns._loads
    assert not any(priority.servable for priority in turns._priorities)


def test_ten_thousand_queues_cost_no_more_a_turn_than_ten():
    turns = turns_of(*(Line(f"{i}", tenant=i % 100) for i in range(10_000)))
    assert len({id(queue) for queue in serve(turns, 10_000)}) == 10_000


# --- attempts, and what an account may begin


class Call:
    """As much of a permit as an attempt needs."""

    def __init__(self, account=A, rank=1, *, begun=True):
        self.account, self.rank, self.begun = account, rank, begun


def attempt(account=A, rank=1, *, begun=True):
    return Attempt(Call(account, rank, begun=begun), None)


def test_retries_come_before_fallback_calls_and_these_before_new_work_of_their_priority():
    turns = turns_of(Line("n"))
    fallback, retry = attempt(begun=False), attempt()
    turns.add_attempt(fallback)
    turns.add_attempt(retry)
    for expected in (retry, fallback):
        assert turns.next() is expected
        turns.served(expected)
    assert names(serve(turns, 2)) == "nn"


def test_retries_of_low_priority_do_not_pass_new_work_of_high_priority_for_ever():
    turns = turns_of(Line("h", rank=0))
    for _ in range(10):
        turns.add_attempt(attempt(rank=2))
    served = []
    for _ in range(34):
        item = turns.next()
        turns.served(item, stays=isinstance(item, Line))
        served.append(isinstance(item, Attempt))
    assert sum(served) == pytest.approx(2, abs=1)


def test_an_attempt_does_not_wait_for_new_work_that_was_refused_a_permit():
    large = Line("l")
    turns = turns_of(large)
    turns.block(large)
    retry = attempt()
    turns.add_attempt(retry)
    assert turns.next() is retry
    turns.block(retry)
    turns.add_attempt(other := attempt(rank=0))
    assert turns.next() is None
    turns.discard(retry)
    assert turns.next() is other
    turns.served(other)
    assert turns.next() is large


@pytest.mark.parametrize(
    ("load", "begins"),
    [
        (Load(begun=7), True),
        (Load(begun=8), False),
        (Load(begun=8, backing_off=7), False),  # as many as there are slots
        (Load(begun=30, backing_off=7), True),
        (Load(begun=16, backing_off=8), True),
        (Load(begun=15, backing_off=8), False),
    ],
)
def test_an_account_begins_no_more_than_it_may(load, begins):
    slots = 8 if load.begun <= 8 else 64
    turns = turns_of(Line("n", account=load), Line("l", account=load, rank=2), slots=slots)
    assert (turns.next() is not None) == begins
    turns.add_attempt(fallback := attempt(load, begun=False))
    assert (turns.next() is fallback) == begins
    turns.add_attempt(retry := attempt(load))
    assert turns.next() is retry


def test_an_account_that_may_begin_again_takes_its_turns():
    load = Load(begun=8)
    turns = turns_of(Line("n", account=load), slots=8)
    assert turns.next() is None
    load.begun = 7
    turns.changed(load)
    assert names(serve(turns, 1)) == "n"


def test_an_account_with_fewer_calls_on_the_wire_comes_first():
    busy, idle = Load(on_wire=3), Load(on_wire=1)
    turns = turns_of(Line("b", account=busy), Line("i", account=idle))
    assert names(serve(turns, 3)) == "iii"
    idle.on_wire = 3
    turns.changed(idle)
    assert sorted(names(serve(turns, 2))) == ["b", "i"]
    busy.on_wire = 0
    turns.changed(busy)
    assert names(serve(turns, 2)) == "bb"


# --- the overdraft


@pytest.mark.parametrize(("in_use", "served"), [(63, "b"), (64, "i"), (71, "i"), (72, "h"), (79, "h"), (80, None)])
def test_beyond_the_slots_idle_accounts_and_high_priority_may_start(in_use, served):
    busy, urgent, idle = Load(on_wire=5, begun=5), Load(on_wire=60, begun=60), Load()
    queues = [Line("b", account=busy), Line("h", account=urgent, rank=0), Line("i", account=idle, rank=2)]
    turns = turns_of(*queues)
    startable = set()
    while (item := turns.next(in_use)) is not None:
        startable.add(item.name)
        turns.remove(item)
    assert startable == {"b": {"b", "h", "i"}, "i": {"h", "i"}, "h": {"h"}, None: set()}[served]


def test_below_four_slots_there_is_no_overdraft():
    turns = turns_of(Line("i"), Line("h", rank=0), slots=3)
    assert turns.next(3) is None
    assert turns.next(2) is not None


def test_high_priority_overdraws_once_for_each_account():
    load = Load(on_wire=64, begun=64)
    turns = turns_of(high := Line("h", account=load, rank=0))
    assert turns.next(64) is high
    permit = Call(load, 0)
    assert turns.overdraws(permit, 64)
    turns.served(high, stays=True)
    assert turns.next(65) is None
    turns.add(other := Line("o", account=Load(on_wire=1), rank=0))
    assert turns.next(65) is other
    turns.repaid(load)
    turns.served(other)
    turns.changed(load)
    assert turns.next(65) is high
    assert not turns.overdraws(Call(load, 1), 65)


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


@pytest.mark.parametrize(
    "large_one", [{"max_tokens": 1_200}, {"max_tokens": 600, "params": {"n": 2}}], ids=["of a lane", "alone"]
)
async def test_a_small_request_does_not_wait_for_a_large_one_that_was_given_up(large_one):
    loop = asyncio.get_running_loop()
    async with batcher_with({"tpm": 2_000}) as batcher:
        await batcher.submit(ask("first"), max_tokens=1_500)
        large = asyncio.ensure_future(batcher.submit(ask("large"), **large_one))
        await asyncio.sleep(0)
        small = asyncio.ensure_future(batcher.submit(ask("small", "another lane"), max_tokens=100))
        await asyncio.sleep(5)
        assert not small.done()
        large.cancel()
        await small
        assert loop.time() == 7.0


async def test_lanes_that_grow_while_they_wait_for_a_permit_are_not_passed_over_by_another_batcher():
    loop, limit = asyncio.get_running_loop(), mb.RateLimit(tpm=1_000)
    policies = [plain(idle="wait", max_wait=0.0, max_batch_size=size) for size in (1, 16)]
    single, combined = (
        mb.Microbatcher(ScriptedTransport(delay=0.1), tokens="bytes", policy=policy, rate_limit=limit)
        for policy in policies
    )
    async with single, combined:
        loads = Loads(single)
        loads.add("single", callers=3, max_tokens=400)
        await asyncio.sleep(1)
        waited = []

        async def submit(number):
            start = loop.time()
            await combined.submit(ask(f"{number}"), max_tokens=40)
            waited.append(loop.time() - start)

        tasks = []
        for number in range(20):
            tasks.append(asyncio.ensure_future(submit(number)))
            await asyncio.sleep(30)
        await loads.run(100)
        await asyncio.gather(*tasks)
    assert max(waited) <= 2 * WINDOW


async def test_lanes_that_were_emptied_while_blocked_leave_nothing_behind():
    transport = ScriptedTransport()
    async with batcher_with({"rpm": 1}, transport, idle="wait", max_wait=0.0) as batcher:
        await batcher.submit(ask("first"))
        tasks = [
            asyncio.ensure_future(batcher.submit(ask("x", f"lane {i}"), tenant=f"{i % 3}", priority=priority))
            for i, priority in enumerate(["high", "normal", "low"] * 4)
        ]
        await asyncio.sleep(5)
        turns = batcher._engine.scheduler._turns
        (load,) = turns._loads.values()
        assert load.refused is not None
        assert load.head is not None
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await asyncio.sleep(WINDOW)
        assert not turns._loads
        assert turns.next() is None
        assert not list(batcher._engine.lanes)
        assert not len(batcher._engine.singles)
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
