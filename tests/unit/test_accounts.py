"""Permits: in order of arrival, given back when not used, and never for ever out of reach."""

import asyncio
import contextvars
import gc
import weakref

import pytest
from helpers import ask, scheduler_for
from hypothesis import example, given, settings
from hypothesis import strategies as st

import microbatch as mb
from microbatch.errors import QuotaExhausted, RateLimited, ServerError
from microbatch.lru import IDLE_EXPIRY
from microbatch.messages import Limits, Usage
from microbatch.policy import RetryPolicy
from microbatch.protocols import Completion
from microbatch.testing import ScriptedTransport
from microbatch.testing.clock import VirtualClockLoop
from microbatch.transports.accounts import CAPACITY, Account, Accounts
from microbatch.transports.rate_limit import WINDOW, RateLimit


class Desk:
    """An account with a scheduler, and a queue of costs that is due while there are some."""

    tenant, rank, queued = None, 1, False

    def __init__(self, limit=None, *, estimates=(), slots=1_000):
        bucket = None if limit is None or not (limit.rpm or limit.tpm) else limit.bucket("key", 0.0)
        adaptive = limit is not None and limit.adaptive
        self.account = Account(RetryPolicy(), bucket, None, adaptive=adaptive)
        self.due = list(estimates)
        self.paid = []
        self.permits = []
        self.scheduler = scheduler_for(self.account, slots, begin=lambda desk, permit: desk.begin(permit))

    def next_cost(self):
        return self.due[0]

    def rested(self):
        pass

    def begin(self, permit):
        self.due.pop(0)
        self.permits.append(permit)
        self.paid.append(asyncio.get_running_loop().time())
        return permit

    def pump(self):
        self.scheduler.enqueue(self)
        self.scheduler._pump()

    def wait_for(self, tokens=0):
        permit = self.account.permit(tokens, self.rank)
        return permit, asyncio.ensure_future(permit.admit())


def at(seconds):
    """Some exact instants."""
    return [pytest.approx(second) for second in seconds]


# --- the scheduler's permits


async def test_without_limits_every_permit_is_paid_at_once():
    desk = Desk(estimates=[1_000_000] * 100)
    desk.pump()
    assert desk.paid == [0.0] * 100
    assert desk.account._timer is None


async def test_who_was_refused_is_told_when_a_permit_may_be_had():
    desk = Desk(RateLimit(rpm=2), estimates=[0] * 5)
    desk.pump()
    await asyncio.sleep(200)
    assert desk.paid == at([0, 0, WINDOW, WINDOW, 2 * WINDOW])
    assert desk.account._timer is None


async def test_nobody_is_woken_while_nobody_waits():
    desk = Desk(RateLimit(rpm=2), estimates=[0, 0])
    desk.pump()
    for permit in desk.permits:
        permit.paid = False
        desk.account.ended(permit, Completion("stop"))
    assert desk.account._timer is None


async def test_a_permit_that_is_not_used_is_worth_one_to_the_next():
    desk = Desk(RateLimit(rpm=1), estimates=[0, 0])
    desk.pump()
    await asyncio.sleep(5)
    desk.permits[0].cancel()
    desk.permits[0].cancel()
    await asyncio.sleep(1)
    assert desk.paid == at([0, 5])
    assert desk.account.on_wire == 1


async def test_what_a_reply_gives_back_is_granted_at_once():
    desk = Desk(RateLimit(tpm=1_000, charge="used"), estimates=[900, 900])
    desk.pump()
    await asyncio.sleep(5)
    desk.permits[0].paid = False
    desk.account.ended(desk.permits[0], Completion("stop", usage=Usage(50, 50)))
    await asyncio.sleep(1)
    assert desk.paid == at([0, 5])


async def test_a_request_that_was_refused_and_then_given_up_blocks_nobody_for_long():
    desk = Desk(RateLimit(tpm=1_000), estimates=[900, 900])
    desk.pump()
    desk.due.clear()
    await asyncio.sleep(WINDOW + 1)
    assert desk.account._timer is None
    desk.due.append(900)
    desk.pump()
    assert desk.paid == at([0, WINDOW + 1])


async def test_timers_run_in_no_callers_context():
    variable = contextvars.ContextVar("variable", default="nobody's")
    seen = []
    desk = Desk(RateLimit(rpm=1), estimates=[0, 0])
    desk.pump()
    desk.scheduler.ready = lambda _: seen.append(variable.get())
    variable.set("a caller's")
    desk.account._ask_again()  # as a caller's own task would
    await asyncio.sleep(WINDOW + 1)
    assert seen == ["nobody's"]


# --- what was refused changes


async def test_what_grows_while_it_is_refused_is_not_passed_over_by_another_batcher():
    limit = RateLimit(tpm=1_000)
    other, growing = Desk(limit, estimates=[112]), Desk(limit)
    other.pump()
    await asyncio.sleep(16)
    other.due += [76, 824, 750]
    other.pump()
    growing.due.append(200)
    growing.pump()
    await asyncio.sleep(74)
    # At the end of the minute there would be room for the 750 and for the 200 refused, but not for the 300 needed now.
    growing.due[0] = 300
    growing.scheduler.enqueue(growing)
    await asyncio.sleep(200)
    assert other.paid == at([0, 16, WINDOW, 3 * WINDOW])
    assert growing.paid == at([2 * WINDOW])


async def test_when_what_was_refused_is_given_up_what_is_next_does_not_wait_for_as_long():
    desk = Desk(RateLimit(tpm=1_000), estimates=[600])
    desk.pump()
    desk.due += [600, 300]
    desk.pump()
    assert desk.paid == [0.0]
    await asyncio.sleep(1)
    del desk.due[0]
    desk.scheduler.enqueue(desk)
    await asyncio.sleep(1)
    assert desk.paid == at([0, 1])


async def test_what_is_refused_and_has_not_changed_is_not_asked_for_again():
    desk = Desk(RateLimit(tpm=1_000), estimates=[600, 600])
    desk.pump()
    timer = desk.account._timer
    desk.due.append(600)
    desk.pump()
    assert desk.account._timer is timer


# --- those who wait for theirs


async def test_waiters_are_served_in_order_of_arrival_and_before_the_scheduler():
    loop = asyncio.get_running_loop()
    desk = Desk(RateLimit(rpm=1), estimates=[0, 0, 0])
    desk.pump()
    order = []
    for name in "abc":
        _, task = desk.wait_for()
        task.add_done_callback(lambda _, name=name: order.append((name, loop.time())))
        await asyncio.sleep(1)
    await asyncio.sleep(6 * WINDOW)
    assert order == [(name, pytest.approx(number * WINDOW)) for number, name in enumerate("abc", 1)]
    assert desk.paid == at([0, 4 * WINDOW, 5 * WINDOW])


async def test_a_small_one_does_not_overtake_a_large_one():
    desk = Desk(RateLimit(tpm=1_000), estimates=[600])
    desk.pump()
    _, large = desk.wait_for(600)
    await asyncio.sleep(0)
    _, small = desk.wait_for(1)
    desk.due.append(1)
    desk.pump()
    await asyncio.sleep(WINDOW - 1)
    assert not large.done()
    assert not small.done()
    await asyncio.sleep(2)
    assert large.done()
    assert not small.done()  # it waits out the debt of the large one
    await asyncio.sleep(WINDOW)
    assert small.done()
    assert len(desk.paid) == 2


async def test_the_scheduler_does_not_overtake_those_who_wait():
    desk = Desk(RateLimit(tpm=1_000), estimates=[600])
    desk.pump()
    await asyncio.sleep(50)  # the debt is paid, but two large ones do not fit into one window
    _, large = desk.wait_for(600)
    await asyncio.sleep(0)
    desk.due.append(1)
    desk.pump()
    assert len(desk.paid) == 1
    large.cancel()
    await asyncio.wait([large])
    await asyncio.sleep(1)
    assert desk.paid == at([0, 50])


async def test_a_cancelled_waiter_leaves_its_place_to_the_next():
    desk = Desk(RateLimit(tpm=1_000), estimates=[600])
    desk.pump()
    permit, large = desk.wait_for(600)
    await asyncio.sleep(0)
    _, small = desk.wait_for(300)
    await asyncio.sleep(1)
    assert not small.done()
    large.cancel()
    await asyncio.wait([large])
    assert not permit.paid
    await asyncio.sleep(0)
    assert small.done()
    assert desk.account.on_wire == 2


@pytest.mark.parametrize("turns", range(4))
async def test_a_waiter_cancelled_in_the_turn_in_which_it_is_granted_gives_the_permit_back(turns):
    desk = Desk(RateLimit(rpm=1), estimates=[0])
    desk.pump()
    permit, first = desk.wait_for()
    other, second = desk.wait_for()
    await asyncio.sleep(0)
    loop = asyncio.get_running_loop()

    def cancel(after):
        if after:
            loop.call_soon(cancel, after - 1)
        else:
            first.cancel()

    loop.call_at(WINDOW, cancel, turns)
    await asyncio.sleep(WINDOW + 1)
    if first.cancelled():
        assert not permit.paid
        assert second.done()
        assert other.paid
    else:
        assert permit.paid  # it had gone on before
        assert not second.done()
        second.cancel()
    assert desk.account.on_wire == 2


async def test_an_attempt_that_was_cancelled_is_charged_all_the_same():
    desk = Desk(RateLimit(rpm=1), estimates=[0, 0])
    desk.pump()
    desk.permits[0].paid = False
    desk.account.dropped(desk.permits[0])
    await asyncio.sleep(1)
    assert desk.paid == [0.0]
    assert desk.account.on_wire == 0


# --- the endpoint's own word


@pytest.mark.parametrize("limit", [None, RateLimit(rpm=1_000)])
async def test_a_pause_asked_for_is_kept_by_everybody(limit):
    desk = Desk(limit, estimates=[0])
    desk.pump()
    desk.permits[0].paid = False
    desk.account.ended(desk.permits[0], RateLimited("x", status=429, retry_after=7.5))
    _, task = desk.wait_for()
    desk.due.append(0)
    desk.pump()
    await asyncio.sleep(7.25)
    assert not task.done()
    await asyncio.sleep(0.5)
    assert task.done()
    assert desk.paid == at([0, 7.5])


async def test_a_shorter_pause_does_not_end_a_longer_one():
    desk = Desk(estimates=[0, 0])
    desk.pump()
    for permit, seconds in zip(desk.permits, (20.0, 1.0), strict=True):
        permit.paid = False
        desk.account.ended(permit, RateLimited("x", status=429, retry_after=seconds))
    desk.due.append(0)
    desk.pump()
    await asyncio.sleep(30)
    assert desk.paid == at([0, 0, 20])


async def test_only_a_429_holds_up_the_others():
    desk = Desk(estimates=[0])
    desk.pump()
    desk.permits[0].paid = False
    desk.account.ended(desk.permits[0], ServerError("x", status=503, retry_after=20.0))
    desk.due.append(0)
    desk.pump()
    assert len(desk.paid) == 2


async def test_a_lower_limit_told_by_the_endpoint_bounds_what_is_accepted():
    desk = Desk(RateLimit(tpm=100_000), estimates=[10])
    desk.pump()
    desk.permits[0].paid = False
    limits = Limits(limit_tokens=5_000, remaining_tokens=4_990, reset_tokens=0.1)
    desk.account.ended(desk.permits[0], Completion("stop", limits=limits))
    assert desk.account.max_tokens == 5_000


async def test_while_the_breaker_is_open_permits_cost_nothing():
    desk = Desk(RateLimit(rpm=1), estimates=[0])
    desk.pump()
    desk.permits[0].paid = False
    desk.account.ended(desk.permits[0], QuotaExhausted("x", status=429))
    permit = desk.account.permit(0, 1)
    assert permit.pay()
    assert not permit.paid
    permit.cancel()
    assert desk.account.on_wire == 0


# --- adaptive


async def test_with_nothing_under_way_one_call_is_allowed_always():
    desk = Desk(RateLimit(adaptive=True))
    for number in range(30):
        desk.due.append(0)
        desk.pump()
        assert len(desk.paid) == number + 1
        desk.permits[-1].paid = False
        await asyncio.sleep(1)
        desk.account.ended(desk.permits[-1], RateLimited("x", status=429))
        await asyncio.sleep(1)
    assert desk.account._concurrency.limit == 1


@pytest.mark.parametrize("how", ["ended", "dropped", "cancel"])
async def test_the_end_of_a_call_however_it_ends_lets_in_the_next(how):
    desk = Desk(RateLimit(adaptive=True), estimates=[0] * 21)
    desk.pump()
    assert len(desk.paid) == 20
    permit = desk.permits[0]
    if how == "cancel":
        permit.cancel()
    else:
        permit.paid = False
        desk.account.ended(permit, Completion("stop")) if how == "ended" else desk.account.dropped(permit)
    await asyncio.sleep(0)
    assert len(desk.paid) == 21


# --- who shares an account, and for how long it is kept


async def accounts_of(**options):
    transport = ScriptedTransport()
    transport.base_url, transport.model = "http://x", "m"
    return Accounts(transport, RetryPolicy(), options.get("limit"), None)


async def test_endpoint_model_and_credentials_make_an_account():
    accounts = await accounts_of()
    usual = accounts.of(None, {})
    assert accounts.of("m", {}) is usual
    assert accounts.of("m", {"X-Trace": "1"}) is usual
    assert accounts.of("other", {}) is not usual
    key = accounts.of(None, {"Authorization": "Bearer a"})
    assert key is not usual
    assert accounts.of(None, {"authorization": "Bearer a", "X-Trace": "2"}) is key
    assert accounts.of(None, {"Authorization": "Bearer b"}) is not key
    assert "Bearer" not in repr(list(accounts._kept._referenced.items()))


async def test_what_nobody_uses_is_forgotten_after_a_while():
    accounts = await accounts_of()
    accounts.of("a", {})
    await asyncio.sleep(IDLE_EXPIRY - 1)
    accounts.of("b", {})
    assert len(accounts._kept) == 2
    await asyncio.sleep(2)
    accounts.of("b", {})
    gc.collect()
    assert len(accounts._kept) == 1


async def test_what_was_used_lately_is_not_forgotten_though_it_was_asked_for_long_ago():
    accounts = await accounts_of()
    account = accounts.of("a", {})
    await asyncio.sleep(IDLE_EXPIRY + 1)
    account.permit(0, 1).pay()
    account.budget.draw()
    del account
    accounts.of("b", {})
    gc.collect()
    assert accounts.of("a", {}).budget._balance == 9


async def test_as_many_as_there_may_be_are_kept_and_those_in_use_beyond():
    accounts = await accounts_of(limit=RateLimit(rpm=100))
    held = accounts.of("held", {})
    permit = held.permit(0, 1)
    assert permit.pay()
    for number in range(3 * CAPACITY):
        accounts.of(f"{number}", {})
    gc.collect()
    assert len(accounts._kept) == CAPACITY + 1
    assert accounts.of("held", {}) is held
    assert permit.account is held


async def test_the_limit_outlives_its_accounts():
    limit = RateLimit(rpm=1)
    first = await accounts_of(limit=limit)
    assert first.of(None, {}).permit(0, 1).pay()
    del first
    gc.collect()
    second = await accounts_of(limit=limit)
    account = second.of(None, {})
    assert not account.permit(0, 1).pay()
    second.close()
    assert account._timer is None


async def test_a_limit_holds_on_to_no_batcher():
    limit = RateLimit(rpm=1)
    accounts = await accounts_of(limit=limit)
    account = accounts.of(None, {})
    account.permit(0, 1).pay()
    assert not account.permit(0, 1).pay()
    gone = weakref.ref(account)
    accounts.close()
    del accounts, account
    gc.collect()
    assert gone() is None


# --- through the batcher


async def test_a_request_larger_than_the_quota_is_refused_and_nothing_is_queued():
    transport = ScriptedTransport()
    async with mb.Microbatcher(transport, tokens="bytes", rate_limit=mb.RateLimit(tpm=2_000)) as batcher:
        for options in ({}, {"priority": "high"}, {"params": {"n": 2}}, {"params": {"tools": []}}):
            for text, more in (("x" * 2_000, {}), ("x", {"max_tokens": 2_000})):
                with pytest.raises(mb.ConfigError, match="raise tpm="):
                    await batcher.submit(ask(text), **options, **more)
        stats = batcher.stats()
        assert (stats.items, stats.queued) == (0, 0)
        assert not list(batcher._engine.lanes)
        results = [each async for each in batcher.map([ask("x" * 2_000), ask("y")])]
        assert {result.index: type(result.error) for result in results} == {0: mb.ConfigError, 1: type(None)}
    assert len(transport.calls) == 1


async def test_a_batch_of_one_is_charged_as_the_single_call_it_is():
    charges = {}
    for priority in ("high", "normal"):
        async with mb.Microbatcher(ScriptedTransport(), tokens="bytes", rate_limit=mb.RateLimit(tpm=9_000)) as batcher:
            await batcher.submit(ask("x"), max_tokens=100, priority=priority)
            (account,) = batcher._parts.accounts._kept.values()
            charges[priority] = account._bucket._tokens.total
    assert charges["normal"] == charges["high"] < 200


async def test_what_short_prompts_are_off_by_is_not_taken_for_a_ratio():
    # The endpoint counts 20 more for every call than we do.
    def counted(call):
        prompt = sum(4 + len(message["content"]) for message in call.call.messages) + 3
        return "ok", Completion("stop", usage=Usage(prompt + 20, 10))

    charges = []
    transport = ScriptedTransport(*[counted] * 1_000)
    async with mb.Microbatcher(transport, tokens="bytes", rate_limit=mb.RateLimit(tpm=9_000_000)) as batcher:
        for text in ["x"] * 20 + ["x" * 4_000]:
            (account,) = batcher._parts.accounts._kept.values() or [None]
            before = account._bucket._given_back - account._bucket._tokens.total if account else 0
            await batcher.submit(ask(text), max_tokens=10)
            (account,) = batcher._parts.accounts._kept.values()
            charges.append(before + account._bucket._tokens.total - account._bucket._given_back)
    assert charges[19] == pytest.approx(7 + 4 + 6 + 1 + 20 + 10, abs=6)
    assert charges[20] == pytest.approx(charges[19] + 4_000, abs=6)


async def test_the_length_of_single_replies_is_learned():
    def talkative(_):
        return "ok", Completion("stop", usage=Usage(10, 500))

    transport = ScriptedTransport(*[talkative] * 20)
    async with mb.Microbatcher(transport, tokens="bytes", rate_limit=mb.RateLimit(tpm=9_000_000)) as batcher:
        for number in range(20):
            await batcher.submit(ask(f"{number:02}"))
        charged = []
        (account,) = batcher._parts.accounts._kept.values()
        grant = account._bucket.grant
        account._bucket.grant = lambda tokens, *rest: charged.append(tokens) or grant(tokens, *rest)
        await batcher.submit(ask("20"))
    assert 500 <= charged[0] <= 530


async def test_a_share_of_the_quota_counts():
    async with mb.Microbatcher(
        ScriptedTransport(), tokens="bytes", rate_limit=mb.RateLimit(tpm=4_000, share=0.5)
    ) as batcher:
        with pytest.raises(mb.ConfigError, match="grants 2000 a minute"):
            await batcher.submit(ask("x" * 2_000))


async def test_a_batch_whose_learned_cost_outgrows_the_quota_is_still_sent():
    # The endpoint counts four times as many tokens as we do, and answers are long.
    def heavy(call):
        text = call.reply([(name, "y" * 400) for name, _ in call.items]) if call.combined else "y" * 400
        return text, Completion("stop", usage=Usage(4_000, 2_000))

    transport = ScriptedTransport(*[heavy] * 1_000)
    async with mb.Microbatcher(transport, tokens="bytes", rate_limit=mb.RateLimit(tpm=6_000)) as batcher:
        results = [each async for each in batcher.map(ask(f"item {i}") for i in range(40))]
    assert all(result.reply for result in results)


async def test_asking_again_for_more_than_the_quota_is_not_stuck():
    # The first reply is cut after one answer; by then the rest is estimated to cost more than a minute's tokens.
    def cut(call):
        name, _ = call.items[0]
        return call.reply([(name, "y" * 1_500)])[:-2], Completion(None, usage=Usage(3_000, 1_500))

    transport = ScriptedTransport(cut)
    async with mb.Microbatcher(transport, tokens="bytes", rate_limit=mb.RateLimit(tpm=4_000)) as batcher:
        replies = await asyncio.gather(*(batcher.submit(ask(f"item {i}")) for i in range(8)))
    assert len(replies) == 8


async def test_a_limit_lowered_by_the_endpoint_stops_nobody_for_ever():
    limits = Limits(limit_tokens=1_000, remaining_tokens=900, reset_tokens=1.0)

    def lowered(call):
        text = call.reply([(name, "ok") for name, _ in call.items]) if call.combined else "ok"
        return text, Completion("stop", usage=Usage(100, 10), limits=limits)

    transport = ScriptedTransport(*[lowered] * 1_000)
    async with mb.Microbatcher(transport, tokens="bytes", rate_limit=mb.RateLimit(tpm=10_000)) as batcher:
        # Some of them are accepted, but cannot be sent before the endpoint has told that they are too large.
        waiting = [batcher.submit(ask("x" * 2_000), priority="high") for _ in range(6)]
        assert len(await asyncio.wait_for(asyncio.gather(*waiting), 600)) == 6
        assert asyncio.get_running_loop().time() >= WINDOW
        with pytest.raises(mb.ConfigError):
            await batcher.submit(ask("x" * 9_000))


async def test_relayed_requests_count_against_the_limit():
    loop = asyncio.get_running_loop()

    class Relay(ScriptedTransport):
        def forward(self, method, path, headers, body):
            return self

        async def __aenter__(self):
            return self

        async def __aexit__(self, *_):
            pass

    async with mb.Microbatcher(Relay(), tokens="bytes", rate_limit=mb.RateLimit(rpm=2)) as batcher:
        for _ in range(3):
            async with batcher.forward("POST", "chat/completions", {}, b"{}"):
                pass
        assert loop.time() == pytest.approx(WINDOW)
        (account,) = batcher._parts.accounts._kept.values()
        await asyncio.sleep(1)
        assert account.on_wire == 0


@pytest.mark.parametrize("error", [mb.AuthFailed("who?", status=401), mb.QuotaExhausted("broke", status=429)], ids=repr)
async def test_relayed_requests_count_against_the_limit_while_calls_can_only_be_refused(error):
    loop, begun = asyncio.get_running_loop(), []

    class Relay(ScriptedTransport):
        def forward(self, method, path, headers, body):
            return self

        async def __aenter__(self):
            begun.append(loop.time())
            return self

        async def __aexit__(self, *_):
            pass

    limit = mb.RateLimit(rpm=4)
    async with mb.Microbatcher(Relay(error), tokens="bytes", rate_limit=limit) as batcher:

        async def relay():
            async with batcher.forward("POST", "chat/completions", {}, b"{}"):
                pass

        with pytest.raises(type(error)):
            await batcher.submit(ask("a"))
        await asyncio.gather(*(relay() for _ in range(5)))
        assert loop.time() == pytest.approx(WINDOW)
        await asyncio.sleep(1)
        (account,) = batcher._parts.accounts._kept.values()
        assert account.on_wire == account.begun == 0
    assert begun == at([0, 0, 0, WINDOW, WINDOW])


async def test_a_borrower_who_leaves_before_it_is_served_costs_nothing():
    class Relay(ScriptedTransport):
        forwarded = 0

        def forward(self, method, path, headers, body):
            self.forwarded += 1
            return self

        async def __aenter__(self):
            await asyncio.sleep(10)

        async def __aexit__(self, *_):
            pass

    transport = Relay()
    async with mb.Microbatcher(transport, tokens="bytes", rate_limit=mb.RateLimit(rpm=100)) as batcher:

        async def relay():
            async with batcher.forward("POST", "chat/completions", {}, b"{}"):
                pass

        for turns in range(8):
            task = asyncio.ensure_future(relay())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        await asyncio.sleep(1)
        (account,) = batcher._parts.accounts._kept.values()
        assert account.on_wire == 0
        assert 0 < transport.forwarded < 8
        assert account._bucket._requests.total == transport.forwarded


async def test_closing_while_permits_are_waited_for_ends_everybody_and_leaves_no_timer():
    transport = ScriptedTransport(ServerError("x", status=500))
    limit = mb.RateLimit(rpm=1)
    batcher = mb.Microbatcher(transport, tokens="bytes", rate_limit=limit, retry=RetryPolicy(base=0))
    await batcher.open()
    tasks = [asyncio.ensure_future(batcher.submit(ask(f"{i}"), priority="high")) for i in range(5)]
    await asyncio.sleep(10)
    (account,) = batcher._parts.accounts._kept.values()
    assert account.refused is not None
    await batcher.aclose(grace=5)
    assert asyncio.get_running_loop().time() == 15
    await asyncio.wait(tasks)
    assert {type(task.exception()) for task in tasks} == {mb.ShutDown}
    assert account._timer is None
    assert account.on_wire == 0
    assert not limit.bucket(("", None, b""), 15.0)._claims


async def test_closing_with_time_enough_sends_what_waits_for_permits():
    transport = ScriptedTransport()
    batcher = await mb.Microbatcher(transport, tokens="bytes", rate_limit=mb.RateLimit(rpm=1)).open()
    tasks = [asyncio.ensure_future(batcher.submit(ask(f"{i}"), priority="high")) for i in range(3)]
    await asyncio.sleep(1)
    await batcher.aclose(grace=None)
    assert [task.result().output for task in tasks] == ["0", "1", "2"]
    assert asyncio.get_running_loop().time() == pytest.approx(2 * WINDOW)


# --- whatever happens

EVENTS = st.lists(
    st.tuples(
        st.floats(0, 40),
        st.integers(0, 900),
        st.sampled_from(["answer", "answer", "fail", "pause", "leave", "never mind"]),
        st.floats(0, 30),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@example(events=[(0, 501, "answer", 0.5, 0), (0, 500, "never mind", 0.5, 0)], adaptive=False, rpm=None, slots=4)
@given(events=EVENTS, adaptive=st.booleans(), rpm=st.sampled_from([None, 2, 10]), slots=st.sampled_from([1, 4, 64]))
def test_permits_are_granted_in_the_end_and_nothing_is_leaked(events, adaptive, rpm, slots):
    async def run():
        loop = asyncio.get_running_loop()
        desk = Desk(RateLimit(rpm=rpm, tpm=1_000, adaptive=adaptive, charge="used"), slots=slots)
        account = desk.account

        async def attempt(permit, ending, lasts):
            permit.paid = False
            await asyncio.sleep(lasts)
            if ending == "leave":
                account.dropped(permit)
            elif ending == "answer":
                account.ended(permit, Completion("stop", usage=Usage(permit.tokens // 3, 0)))
            else:
                kind = RateLimited if ending == "pause" else ServerError
                account.ended(permit, kind("x", status=429, retry_after=lasts))

        async def ask(tokens, ending, lasts, rank):
            permit = account.permit(tokens, rank)
            if ending == "never mind":
                task = asyncio.ensure_future(permit.admit())
                await asyncio.sleep(lasts)
                task.cancel()
                await asyncio.wait([task])
            else:
                await permit.admit()
                await attempt(permit, ending, lasts)
            permit.finish()

        tasks = []
        for pause, tokens, ending, lasts, rank in events:
            await asyncio.sleep(pause)
            tasks.append(asyncio.ensure_future(ask(tokens, ending, lasts, rank)))
        await asyncio.wait_for(asyncio.gather(*tasks), 4 * WINDOW * len(events))
        assert account.on_wire == account.begun == account.backing_off == 0
        assert desk.scheduler.in_use == 0
        assert not desk.scheduler._turns._loads
        assert not desk.scheduler._turns._overdrawn
        await asyncio.sleep(WINDOW)
        assert account._timer is None
        assert account._bucket.wait(1_000, loop.time()) == 0.0

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(run())


@pytest.mark.parametrize("tokens", [2**31, 10**18, 10**30])
async def test_a_charge_beyond_all_measure_leaves_the_limit_as_it_is(tokens):
    desk = Desk(RateLimit(tpm=1_000, charge="used"), estimates=[tokens])
    desk.pump()
    desk.permits[0].paid = False
    desk.account.ended(desk.permits[0], Completion("stop", usage=Usage(400, 500)))
    await asyncio.sleep(2 * WINDOW)
    desk.due = [999] * 2
    desk.pump()
    await asyncio.sleep(2 * WINDOW)
    assert desk.paid == at([0, 2 * WINDOW, 3 * WINDOW])
    assert desk.account._bucket._tokens.total == pytest.approx(999)
