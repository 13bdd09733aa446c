"""Refusals that concern every call with the same key."""

import asyncio

import pytest
from helpers import ask

import microbatch as mb
from microbatch.errors import AuthFailed, QuotaExhausted, RateLimited, ServerError
from microbatch.testing import ScriptedTransport
from microbatch.transports.guards import COOL_DOWN, Breaker

BROKE = QuotaExhausted("You exceeded your current quota", status=429, code="insufficient_quota", request_id="r1")


def note(breaker, error, *, sent, now, combined=False, permit="other"):
    breaker.note(error, sent=sent, now=now, combined=combined, permit=permit)


def closed(breaker):
    """Whether no refusal is held against any call."""
    return breaker._error is None and not breaker._forbidden


def refuses(breaker, now):
    try:
        breaker.check(now)
    except (AuthFailed, QuotaExhausted) as error:
        return error
    return None


@pytest.mark.parametrize("error", [BROKE, AuthFailed("wrong key", status=401)], ids=["quota", "key"])
def test_a_refusal_opens_it_and_its_copies_say_why(error):
    breaker = Breaker()
    breaker.check(0.0)
    note(breaker, error, sent=0.0, now=1.0)
    assert breaker.is_open(1.0)
    copy = refuses(breaker, 11.0)
    assert type(copy) is type(error)
    assert copy is not error
    assert str(copy) == f"not sent, and no other call before 20 s have passed: {error}"
    assert (copy.status, copy.code, copy.request_id) == (error.status, error.code, error.request_id)
    assert copy.should_retry is False
    assert error.should_retry is None
    assert "not sent" not in str(error)


@pytest.mark.parametrize("error", [ServerError("x", status=500), RateLimited("x", status=429), mb.ConnectFailed("x")])
def test_other_failures_do_not_concern_it(error):
    breaker = Breaker()
    note(breaker, error, sent=0.0, now=0.0)
    breaker.check(0.0)
    note(breaker, BROKE, sent=0.0, now=0.0)
    note(breaker, error, sent=1.0, now=1.0)
    assert breaker.is_open(1.0)


def test_after_the_cool_down_one_call_probes_and_its_outcome_decides():
    breaker = Breaker()
    note(breaker, BROKE, sent=0.0, now=0.0)
    assert refuses(breaker, COOL_DOWN - 0.001)
    assert not breaker.needs_probe(COOL_DOWN - 0.001)
    assert breaker.needs_probe(COOL_DOWN)
    breaker.probe = "probe"
    assert not breaker.needs_probe(COOL_DOWN + 1)
    assert not refuses(breaker, COOL_DOWN + 1), "whether the others wait is the account's business"
    note(breaker, BROKE, sent=COOL_DOWN, now=COOL_DOWN + 2, permit="probe")
    assert refuses(breaker, 2 * COOL_DOWN + 1)
    assert breaker.needs_probe(2 * COOL_DOWN + 2)
    breaker.probe = "another"
    note(breaker, None, sent=2 * COOL_DOWN + 2, now=2 * COOL_DOWN + 3, permit="another")
    assert closed(breaker)
    assert breaker.probe is None


def test_a_probe_that_never_comes_back_gives_way_to_the_next():
    breaker = Breaker()
    note(breaker, BROKE, sent=0.0, now=0.0)
    breaker.probe = "probe"
    assert not breaker.forget("other")
    assert breaker.forget("probe")
    assert breaker.needs_probe(COOL_DOWN)


def test_answers_to_calls_sent_before_the_refusal_do_not_close_it():
    breaker = Breaker()
    note(breaker, BROKE, sent=0.0, now=5.0)
    note(breaker, None, sent=4.9, now=6.0)
    assert breaker.is_open(6.0)


# --- through the batcher


async def outcome(batcher, text="x", **options):
    try:
        return (await batcher.submit(ask(text), **options)).output
    except mb.RequestFailed as error:
        return error


async def test_calls_fail_fast_until_one_has_tried():
    loop = asyncio.get_running_loop()
    transport = ScriptedTransport(BROKE, BROKE, delay=1.0)
    async with mb.Microbatcher(transport, tokens="bytes") as batcher:
        first = await outcome(batcher)
        assert (type(first), first.attempts) == (QuotaExhausted, 1)
        fast = await asyncio.gather(*(outcome(batcher, f"{i}", priority="high") for i in range(20)))
        assert loop.time() == 1.0
        assert {type(error) for error in fast} == {QuotaExhausted}
        assert all("not sent" in str(error) and "exceeded your current quota" in str(error) for error in fast)
        assert len({id(error) for error in fast}) == 20
        assert {error.attempts for error in fast} == {0}
        await asyncio.sleep(COOL_DOWN)
        tried = await asyncio.gather(*(outcome(batcher, f"{i}", priority="high") for i in range(20)))
        assert sorted(error.attempts for error in tried) == [0] * 19 + [1]
        await asyncio.sleep(COOL_DOWN)
        assert await outcome(batcher) == "X"
        assert await asyncio.gather(*(outcome(batcher, f"{i}", priority="high") for i in range(5))) == list("01234")
        stats = batcher.stats()
    assert len(transport.calls) == stats.upstream_calls == 8
    assert stats.retries == 0


async def test_other_credentials_models_and_batchers_are_unaffected():
    def by_key(call):
        return BROKE if "Bearer poor" in call.call.headers.values() else "ok"

    transport = ScriptedTransport(*[by_key] * 10)
    async with mb.Microbatcher(transport, tokens="bytes") as batcher:
        poor = {"Authorization": "Bearer poor"}
        assert isinstance(await outcome(batcher, headers=poor), QuotaExhausted)
        assert await outcome(batcher) == "ok"
        assert await outcome(batcher, headers={"Authorization": "Bearer rich"}) == "ok"
        # Headers are names in any case, and other headers are no credentials.
        more = {"authorization": "Bearer poor", "X-Trace": "1"}
        assert (await outcome(batcher, headers=more)).attempts == 0
        assert (await outcome(batcher, headers=poor, model="other")).attempts == 1


async def test_what_waits_for_a_permit_fails_with_the_others():
    loop = asyncio.get_running_loop()
    transport = ScriptedTransport(BROKE, delay=3.0)
    async with mb.Microbatcher(transport, tokens="bytes", rate_limit=mb.RateLimit(rpm=1)) as batcher:
        errors = await asyncio.gather(*(outcome(batcher, f"{i}", priority="high") for i in range(5)))
        assert loop.time() == 3.0
        assert [error.attempts for error in errors] == [1, 0, 0, 0, 0]


async def test_a_retry_that_waits_for_a_permit_fails_with_the_others():
    loop = asyncio.get_running_loop()

    async def slow_refusal(_):
        await asyncio.sleep(8.0)
        return BROKE

    transport = ScriptedTransport(slow_refusal, ServerError("oops", status=500))
    async with mb.Microbatcher(transport, tokens="bytes", rate_limit=mb.RateLimit(rpm=2)) as batcher:
        errors = await asyncio.gather(*(outcome(batcher, f"{i}", priority="high") for i in range(2)))
        assert loop.time() == 8.0
        assert [type(error) for error in errors] == [QuotaExhausted] * 2
        (account,) = batcher._parts.accounts._kept.values()
        assert account.on_wire == 0
        assert account.budget._balance == pytest.approx(10.4)


FORBIDDEN = AuthFailed("no", status=403)


def test_a_403_may_be_about_one_prompt_so_it_takes_three_in_a_row():
    breaker = Breaker()
    for at in (1.0, 2.0):
        note(breaker, FORBIDDEN, sent=at, now=at)
        breaker.check(at)
    note(breaker, None, sent=3.0, now=3.0)
    for at in (4.0, 5.0):
        note(breaker, FORBIDDEN, sent=at, now=at)
        breaker.check(at)
    note(breaker, FORBIDDEN, sent=6.0, now=6.0)
    assert breaker.is_open(6.0)


def test_403s_of_combined_calls_do_not_count():
    breaker = Breaker()
    for at in range(10):
        note(breaker, FORBIDDEN, sent=at, now=at, combined=True)
    assert closed(breaker)


def test_a_403_of_the_probe_opens_it_anew():
    breaker = Breaker()
    note(breaker, AuthFailed("wrong key", status=401), sent=0.0, now=0.0)
    breaker.probe = "probe"
    note(breaker, FORBIDDEN, sent=COOL_DOWN, now=COOL_DOWN + 1, permit="probe")
    assert breaker.is_open(2 * COOL_DOWN)


def test_a_probe_that_fails_for_another_reason_gives_way_to_the_next():
    breaker = Breaker()
    note(breaker, AuthFailed("no", status=401), sent=0.0, now=0.0)
    breaker.probe = "probe"
    note(breaker, ServerError("busy", status=503), sent=COOL_DOWN, now=COOL_DOWN + 2, permit="probe")
    assert breaker.needs_probe(COOL_DOWN + 2)
    assert not closed(breaker)


async def test_after_the_cool_down_the_others_wait_for_the_probe():
    loop = asyncio.get_running_loop()
    transport = ScriptedTransport(BROKE, delay=2.0)
    async with mb.Microbatcher(transport, tokens="bytes") as batcher:
        await outcome(batcher)
        await asyncio.sleep(COOL_DOWN)
        start = loop.time()
        crowd = await asyncio.gather(*(outcome(batcher, f"{i}", priority="high") for i in range(30)))
        assert crowd == [f"{i}" for i in range(30)]
        assert loop.time() == start + 4.0  # the probe, and then all others at once
        assert len(transport.calls) == 31


async def test_a_probe_whose_caller_leaves_gives_way_to_the_next_that_waits():
    loop = asyncio.get_running_loop()
    transport = ScriptedTransport(BROKE, delay=2.0)
    async with mb.Microbatcher(transport, tokens="bytes") as batcher:
        await outcome(batcher)
        await asyncio.sleep(COOL_DOWN)
        start = loop.time()
        probe = asyncio.ensure_future(outcome(batcher, "probe", priority="high"))
        await asyncio.sleep(1.0)
        waiting = asyncio.ensure_future(outcome(batcher, "waiting", priority="high"))
        await asyncio.sleep(0.5)
        assert len(transport.calls) == 2
        probe.cancel()
        assert await waiting == "WAITING"
        assert loop.time() == start + 3.5


async def test_while_a_probe_is_tried_other_accounts_go_on():
    transport = ScriptedTransport(BROKE, delay=2.0)
    loop = asyncio.get_running_loop()
    async with mb.Microbatcher(transport, tokens="bytes") as batcher:
        await outcome(batcher)
        await asyncio.sleep(COOL_DOWN)
        held = [asyncio.ensure_future(outcome(batcher, f"{i}", priority="high")) for i in range(100)]
        await asyncio.sleep(0.5)
        start = loop.time()
        assert await outcome(batcher, "x", model="other") == "X"
        assert loop.time() == start + 2.0
        await asyncio.gather(*held)


async def test_a_403_of_a_combined_call_stops_nothing_and_three_of_single_calls_do():
    transport = ScriptedTransport(*[FORBIDDEN] * 8)
    policy = mb.FlushPolicy(idle="wait", max_wait=0.1)
    async with mb.Microbatcher(transport, tokens="bytes", policy=policy) as batcher:
        for number in range(4):
            errors = await asyncio.gather(*(outcome(batcher, f"{number}{i}") for i in range(3)))
            assert {type(error) for error in errors} == {AuthFailed}
        (account,) = batcher._parts.accounts._kept.values()
        assert closed(account.breaker)
        calls = len(transport.calls)
        for number in range(4):
            await outcome(batcher, f"{number}", priority="high")
        assert len(transport.calls) == calls + 3
