"""Which failures are tried again, when, and at whose expense."""

import asyncio
from email.utils import formatdate

import pytest
from helpers import ask, scheduler_for
from hypothesis import given
from hypothesis import strategies as st

import microbatch as mb
from microbatch.errors import (
    AuthFailed,
    BadRequest,
    ConnectFailed,
    ContextTooLong,
    DeadlineExceeded,
    Filtered,
    MalformedAnswer,
    QuotaExhausted,
    RateLimited,
    ServerError,
    StatusError,
    TransportError,
    TransportTimeout,
)
from microbatch.policy import MAX_WAIT, RetryPolicy
from microbatch.protocols import ChatCall, Completion
from microbatch.testing import ScriptedTransport
from microbatch.transience import RetryBudget, is_transient
from microbatch.transports.accounts import Account
from microbatch.transports.rate_limit import RateLimit
from microbatch.transports.response_headers import retry_after
from microbatch.transports.retry import Sender

CALL = {"messages": [{"role": "user", "content": "x"}]}


class Sent:
    """A call sent by a `Sender` of its own, and what was noticed of it."""

    def __init__(self, *script, policy=None, draw=lambda: 1.0, usable=True, limit=None, **transport):
        self.policy = policy or RetryPolicy()
        self.transport = ScriptedTransport(*script, **transport)
        self.sender = Sender(self.transport, self.policy, draw)
        bucket = None if limit is None else limit.bucket("key", 0.0)
        self.account = Account(self.policy, bucket, None, adaptive=limit is not None and limit.adaptive)
        self.heard = []
        self.cuts = []
        self.attempts = 0
        self.usable = usable

    def schedule(self):
        if self.account.slots is None:
            scheduler_for(self.account)

    def on_attempt(self):
        self.attempts += 1

    def on_cut(self, completion):
        self.cuts.append(completion)
        if self.usable:
            self.heard.clear()
        return self.usable

    async def send(self, *, timeout=None, stream=False, again=False, tokens=0):
        self.schedule()
        self.permit = self.account.permit(tokens, 1, again=again)
        return await self.sender.send(
            ChatCall(**CALL, timeout=timeout, stream=stream),
            self.heard.append,
            on_attempt=self.on_attempt,
            on_cut=self.on_cut,
            permit=self.permit,
        )

    @property
    def times(self):
        return [call.started for call in self.transport.calls]

    @property
    def in_flight(self):
        return self.account.on_wire


# --- which


@pytest.mark.parametrize(
    "error",
    [
        ConnectFailed("reset"),
        TransportTimeout("slow"),
        RateLimited("slow down", status=429),
        *(ServerError("oops", status=status) for status in (408, 409, 500, 502, 503, 504, 529)),
        BadRequest("odd", status=400, should_retry=True),
    ],
    ids=str,
)
async def test_what_time_may_heal_is_tried_again(error):
    sent = Sent(error, error)
    completion = await sent.send()
    assert completion.finish_reason == "stop"
    assert sent.attempts == len(sent.times) == 3
    assert sent.sender.repeats == 2
    assert sent.heard == ["X"]
    assert sent.in_flight == 0


@pytest.mark.parametrize(
    "error",
    [
        TransportError("no idea what that was"),
        QuotaExhausted("out of credit", status=429, code="insufficient_quota", should_retry=True),
        QuotaExhausted("pay", status=402),
        AuthFailed("who are you", status=401),
        BadRequest("nonsense", status=400),
        ContextTooLong("too long", status=400),
        Filtered("no", status=400),
        ServerError("no use", status=500, should_retry=False),
        RateLimited("no use", status=429, should_retry=False),
        StatusError("odd", status=302),
    ],
    ids=str,
)
async def test_what_time_does_not_heal_fails_at_once(error):
    sent = Sent(error)
    with pytest.raises(type(error)) as caught:
        await sent.send()
    assert caught.value is error
    assert sent.times == [0.0]
    assert sent.in_flight == 0


async def test_the_last_attempts_error_is_raised():
    sent = Sent(*(ServerError(f"number {number}", status=500) for number in range(1, 9)), draw=lambda: 0.0)
    with pytest.raises(ServerError, match="number 4"):
        await sent.send()
    assert sent.attempts == 4


async def test_one_attempt_is_no_retry():
    sent = Sent(ServerError("oops", status=500), policy=RetryPolicy(max_attempts=1))
    with pytest.raises(ServerError):
        await sent.send()
    assert sent.attempts == 1
    assert sent.sender.unpaid == 0


async def test_anything_else_a_transport_raises_is_a_transport_error_and_final():
    cause = ZeroDivisionError("secret")
    sent = Sent(cause)
    with pytest.raises(TransportError, match="ZeroDivisionError") as caught:
        await sent.send()
    assert caught.value.__cause__ is cause
    assert sent.in_flight == 0


# --- when


@pytest.mark.parametrize(("draw", "factor"), [(0.0, 0.0), (0.25, 0.25), (1.0, 1.0)])
async def test_the_delay_is_drawn_up_to_a_bound_that_doubles_up_to_the_cap(draw, factor):
    policy = RetryPolicy(max_attempts=7, base=0.5, cap=5.0)
    sent = Sent(*[ServerError("oops", status=500)] * 6, policy=policy, draw=lambda: draw)
    await sent.send()
    delays = [later - earlier for earlier, later in zip(sent.times, sent.times[1:], strict=False)]
    assert delays == pytest.approx([bound * factor for bound in (0.5, 1.0, 2.0, 4.0, 5.0, 5.0)])


async def test_a_thousand_attempts_overflow_nothing():
    policy = RetryPolicy(max_attempts=1_001, base=0.001, cap=0.001, reserve=1_000)
    sent = Sent(*[ServerError("oops", status=500)] * 1_000, policy=policy)
    await sent.send()
    assert sent.attempts == 1_001


@pytest.mark.parametrize("draw", [0.0, 1.0])
@pytest.mark.parametrize("asked", [0.0, 0.001, 7.25, MAX_WAIT])
@pytest.mark.parametrize("kind", [RateLimited, ServerError])
@pytest.mark.promise(of="retries")
async def test_what_the_endpoint_asks_is_never_undercut_and_the_jitter_comes_on_top(kind, asked, draw):
    sent = Sent(kind("wait", status=429, retry_after=asked), draw=lambda: draw)
    await sent.send()
    assert sent.times == [0.0, pytest.approx(asked + 0.5 * draw)]
    assert sent.times[1] >= asked


async def test_whoever_asks_for_more_than_two_minutes_is_not_waited_for():
    sent = Sent(RateLimited("wait", status=429, retry_after=MAX_WAIT + 1))
    with pytest.raises(RateLimited):
        await sent.send()
    assert asyncio.get_running_loop().time() == 0.0
    assert sent.account.permit(0, 1).pay()  # nor by anybody else
    assert sent.sender.rate_limited == 1


async def test_a_429_holds_up_the_others_of_its_account():
    sent = Sent(RateLimited("wait", status=429, retry_after=3.0), draw=lambda: 0.0)
    first = asyncio.ensure_future(sent.send())
    await asyncio.sleep(1.0)
    second = asyncio.ensure_future(sent.send())
    await asyncio.gather(first, second)
    assert sent.times == [0.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after-ms": "1500", "retry-after": "60"}, 1.5),
        ({"llm_provider-retry-after": "7"}, 7.0),
        ({"retry-after": "soon", "llm_provider-retry-after": "7"}, 7.0),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "Sun, 99 Nov 1994 08:49:37 GMT"}, None),
        ({}, None),
    ],
)
def test_the_wait_is_read_in_any_of_its_forms(headers, seconds):
    assert retry_after(headers) == seconds


def test_a_date_is_a_wait_until_then():
    import time

    assert retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)}) == pytest.approx(30, abs=2)
    assert not retry_after({"retry-after": formatdate(time.time() - 30, usegmt=True)})


# --- before the first token, or nothing of it used


@pytest.mark.parametrize(
    "cut",
    [
        lambda _: ("X ha", Completion(None)),
        lambda _: ("X ha", Completion("error")),
        lambda _: ("", Completion(None)),
        lambda _: ("X ha", ConnectFailed("reset")),
        lambda _: ("X ha", TransportTimeout("silent")),
        lambda _: ("X ha", TransportError("gibberish on the wire")),
        lambda _: ("X ha", ServerError("overloaded", status=503)),
    ],
    ids=["no finish_reason", "error", "empty", "reset", "silent", "gibberish", "error in the stream"],
)
async def test_a_cut_is_repeated_if_nothing_of_it_was_used(cut):
    sent = Sent(cut)
    completion = await sent.send()
    assert completion.finish_reason == "stop"
    assert sent.heard == ["X"]
    assert sent.attempts == 2
    assert len(sent.cuts) == 1
    assert sent.account.budget._balance == pytest.approx(10 + 0.2 - 1)


async def test_a_cut_of_which_something_was_used_is_not_repeated():
    sent = Sent(lambda _: ("X ha", Completion(None)), usable=False)
    assert (await sent.send()).finish_reason is None
    assert sent.heard == ["X ha"]
    sent = Sent(lambda _: ("X ha", ConnectFailed("reset")), usable=False)
    with pytest.raises(ConnectFailed):
        await sent.send()
    assert sent.attempts == 1
    assert sent.account.budget._balance == pytest.approx(10.2)


async def test_an_error_after_the_first_token_that_is_no_cut_is_final():
    sent = Sent(lambda _: ("X ha", Filtered("no", status=200)))
    with pytest.raises(Filtered):
        await sent.send()
    assert sent.attempts == 1
    assert not sent.cuts


async def test_nothing_is_repeated_for_callers_who_have_part_of_the_answers():
    def half(call):
        names = [name for name, _ in call.items]
        text = call.reply([(names[0], "A"), (names[1], "B")])
        return text[:-2] + ',{"id":"', Completion(None)

    transport = ScriptedTransport(half)
    async with mb.Microbatcher(transport, tokens="bytes", retry=RetryPolicy(base=0)) as batcher:
        replies = await asyncio.gather(*(batcher.submit(ask(text)) for text in "abcd"))
    assert [reply.output for reply in replies] == ["A", "B", "C", "D"]
    assert [text for _, text in transport.calls[0].items] == ["a", "b", "c", "d"]
    assert sorted(text for call in transport.calls[1:] for _, text in call.items) == ["c", "d"]


async def test_what_is_read_at_the_end_only_is_repeated_whole():
    def half(call):
        names = [name for name, _ in call.items]
        return call.reply([(names[0], "A")])[:-2], Completion(None)

    transport = ScriptedTransport(half)
    batcher = mb.Microbatcher(
        transport, tokens="bytes", retry=RetryPolicy(base=0), fallback=mb.FallbackPolicy(canary=True)
    )
    async with batcher:
        # A canary that the double does not know of fails the second reply, but the first one was repeated as it was.
        await asyncio.gather(*(batcher.submit(ask(text)) for text in "ab"))
    assert transport.calls[0].items == transport.calls[1].items
    assert batcher.stats().retries == 1


# --- the transport has learned


async def test_a_lesson_is_sent_again_at_once_and_costs_nothing():
    lesson = BadRequest("no json_schema here", status=400, again=True)
    sent = Sent(lesson, lesson, policy=RetryPolicy(max_attempts=1, reserve=0, budget=0))
    await sent.send()
    assert sent.times == [0.0, 0.0, 0.0]
    assert sent.sender.repeats == 2
    assert sent.sender.unpaid == 0


async def test_a_transport_that_never_stops_learning_is_stopped():
    sent = Sent(*[BadRequest("again and again", status=400, again=True)] * 50)
    with pytest.raises(BadRequest):
        await sent.send()
    assert sent.attempts == 9


# --- the budget


@given(
    steps=st.lists(st.sampled_from(["first", "draw", "give back"])),
    share=st.floats(0, 2),
    reserve=st.integers(0, 20),
)
def test_draws_never_exceed_the_share_of_first_attempts_and_the_reserve(steps, share, reserve):
    budget = RetryBudget(RetryPolicy(budget=share, reserve=reserve))
    firsts = drawn = 0
    for step in steps:
        if step == "first":
            budget.first()
            firsts += 1
        elif step == "draw":
            drawn += budget.draw()
        elif drawn:
            budget.give_back()
            drawn -= 1
        assert drawn <= share * firsts + reserve + 1e-6


def test_five_fifths_are_one_retry():
    budget = RetryBudget(RetryPolicy(budget=0.2, reserve=0))
    for _ in range(5):
        assert not budget.draw()
        budget.first()
    assert budget.draw()
    assert not budget.draw()


def test_savings_are_bounded():
    budget = RetryBudget(RetryPolicy(budget=0.2, reserve=10))
    for _ in range(100_000):
        budget.first()
    assert sum(budget.draw() for _ in range(100_000)) == 210


async def test_without_budget_the_error_is_raised_at_once_and_says_so():
    sent = Sent(ServerError("oops", status=500), policy=RetryPolicy(budget=0, reserve=0))
    with pytest.raises(ServerError) as caught:
        await sent.send()
    assert "retry budget is used up" in caught.value.__notes__[0]
    assert sent.sender.unpaid == 1


@pytest.mark.parametrize("policy", [RetryPolicy(), RetryPolicy(max_attempts=10, budget=0.5, reserve=3)], ids=repr)
@pytest.mark.promise(of="retries")
async def test_when_everything_fails_upstream_attempts_stay_within_the_budget(policy):
    transport = ScriptedTransport(*[lambda _: ServerError("down", status=503)] * 10_000)
    batcher = mb.Microbatcher(transport, tokens="bytes", policy=mb.FlushPolicy(idle="wait"), retry=policy)
    async with batcher:
        for _ in range(40):
            ended = await asyncio.gather(
                *(batcher.submit(ask(f"{i}", f"lane {i % 10}")) for i in range(50)), return_exceptions=True
            )
            assert {type(error) for error in ended} == {ServerError}
    stats = batcher.stats()
    firsts = stats.upstream_calls - stats.retries
    assert firsts == 400
    assert stats.upstream_calls == len(transport.calls) <= (1 + policy.budget) * firsts + policy.reserve
    assert stats.retries == pytest.approx(policy.budget * firsts + policy.reserve, abs=1)
    assert stats.retries_denied > 0


@pytest.mark.promise(of="retries")
async def test_asking_again_after_cuts_is_paid_from_the_budget_too():
    def cut(call):
        # One whole answer is delivered, so that the rest is not repeated but asked for again.
        name, text = call.items[0]
        return (call.reply([(name, text)])[:-2] if call.combined else ""), Completion(None)

    transport = ScriptedTransport(*[cut] * 100_000)
    batcher = mb.Microbatcher(transport, tokens="bytes", retry=RetryPolicy(base=0))
    async with batcher:
        for _ in range(50):
            await asyncio.gather(*(batcher.submit(ask(f"{i}")) for i in range(16)), return_exceptions=True)
    assert len(transport.calls) <= 1.2 * 50 + 10


async def test_a_retry_not_made_because_its_callers_left_is_given_back():
    sent = Sent(ServerError("oops", status=500))
    task = asyncio.ensure_future(sent.send())
    await asyncio.sleep(0.25)
    assert sent.account.budget._balance == pytest.approx(9.2)
    task.cancel()
    await asyncio.wait([task])
    assert sent.account.budget._balance == pytest.approx(10.2)
    assert sent.sender.repeats == 0
    assert sent.in_flight == 0


async def test_a_retry_not_made_because_its_callers_left_while_it_waited_for_a_permit_is_given_back():
    sent = Sent(ServerError("oops", status=500), limit=RateLimit(rpm=1), draw=lambda: 0.0)
    task = asyncio.ensure_future(sent.send())
    await asyncio.sleep(5.0)
    assert sent.attempts == 1
    task.cancel()
    await asyncio.wait([task])
    assert sent.account.budget._balance == pytest.approx(10.2)
    assert sent.sender.repeats == 0
    assert sent.in_flight == 0


@pytest.mark.parametrize("again", [False, True])
async def test_a_call_cancelled_while_it_waits_for_its_first_permit_gives_back_what_it_drew(again):
    sent = Sent(limit=RateLimit(rpm=1))
    sent.account.permit(0, 1).pay()
    assert not again or sent.account.budget.draw()
    task = asyncio.ensure_future(sent.send(again=again))
    await asyncio.sleep(5.0)
    task.cancel()
    await asyncio.wait([task])
    assert sent.account.budget._balance == pytest.approx(10.0)
    assert sent.in_flight == 1


# --- deadlines


async def test_the_attempts_share_one_timeout():
    sent = Sent(ServerError("oops", status=500), delay=2.0)
    timeouts = []
    inner = sent.transport.send

    async def send(call, on_text):
        timeouts.append(call.timeout)
        return await inner(call, on_text)

    sent.transport.send = send
    await sent.send(timeout=10.0)
    assert timeouts == [10.0, pytest.approx(7.5)]


async def submit_timed(transport, timeout, **options):
    loop = asyncio.get_running_loop()
    policy = mb.FlushPolicy(max_concurrent_batches=1)
    async with mb.Microbatcher(transport, tokens="bytes", policy=policy, **options) as batcher:
        start = loop.time()
        with pytest.raises(DeadlineExceeded) as caught:
            await batcher.submit(ask("x"), timeout=timeout)
        assert loop.time() == start + timeout
        for _ in range(5):  # turns of the loop, no time
            await asyncio.sleep(0)
        (account,) = batcher._parts.accounts._kept.values()
        assert account.on_wire == 0
        assert batcher._engine.scheduler.in_use == 0
        yield caught.value, account, batcher


@pytest.mark.promise(of="timeout")
async def test_a_deadline_during_back_off_ends_the_submit_at_that_instant():
    transport = ScriptedTransport(RateLimited("wait", status=429, retry_after=50.0))
    async for error, account, batcher in submit_timed(transport, 2.5):
        assert "RateLimited" in str(error)
        assert error.attempts == 1
        assert account.budget._balance == pytest.approx(10.2)
        assert batcher.stats().retries == 0
        # The slot is free, the account still paused.
        assert (await batcher.submit(ask("y"))).output == "Y"
        assert asyncio.get_running_loop().time() == 50.0


@pytest.mark.promise(of="timeout")
async def test_a_deadline_while_waiting_for_the_first_permit_ends_the_submit_at_that_instant():
    transport = ScriptedTransport()
    limit = mb.RateLimit(rpm=1)
    limit.bucket(("", None, b""), 0.0).grant(0, 0.0)
    async for error, account, batcher in submit_timed(transport, 2.5, rate_limit=limit):
        assert error.attempts == 0
        assert not transport.calls
        assert account.budget._balance == 10
        assert (await batcher.submit(ask("y"))).output == "Y"
        assert asyncio.get_running_loop().time() == pytest.approx(61.0)


async def test_a_deadline_while_a_retry_waits_for_its_permit_ends_the_submit_at_that_instant():
    transport = ScriptedTransport(ServerError("oops", status=500))
    options = {"rate_limit": mb.RateLimit(rpm=1), "retry": RetryPolicy(base=0)}
    async for error, account, batcher in submit_timed(transport, 2.5, **options):
        assert "ServerError" in str(error)
        assert error.attempts == 1
        assert account.budget._balance == pytest.approx(10.2)
        assert (await batcher.submit(ask("y"))).output == "Y"
        assert asyncio.get_running_loop().time() == pytest.approx(61.0)


async def test_an_item_that_times_out_leaves_the_others_of_its_batch_to_their_retries():
    transport = ScriptedTransport(ServerError("oops", status=500, retry_after=5.0))
    async with mb.Microbatcher(transport, tokens="bytes") as batcher:
        hurried = asyncio.ensure_future(batcher.submit(ask("a"), timeout=1.0))
        patient = asyncio.ensure_future(batcher.submit(ask("b")))
        await asyncio.wait([hurried])
        assert asyncio.get_running_loop().time() == 1.0
        assert isinstance(hurried.exception(), DeadlineExceeded)
        assert (await patient).output == "B"


async def test_answers_that_do_not_fit_are_not_retried_here():
    transport = ScriptedTransport("no number", "nor this")
    async with mb.Microbatcher(transport, tokens="bytes") as batcher:
        with pytest.raises(MalformedAnswer):
            await batcher.submit(ask("x"), output_type=int)
        assert batcher.stats().retries == 0
    assert len(transport.calls) == 2


def test_the_endpoints_own_word_counts_more_than_its_status():
    assert is_transient(StatusError("x", status=418, should_retry=True))
    assert not is_transient(ServerError("x", status=500, should_retry=False))
