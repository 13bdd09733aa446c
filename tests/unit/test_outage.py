"""Whose fault a failure is, and what is sent to an endpoint that does not answer; all times are exact."""

from __future__ import annotations

import asyncio

import pytest
from helpers import chat_call, each, now

import microbatch as mb
from microbatch.cli.session import PausingTransport
from microbatch.protocols import Completion
from microbatch.spool.endpoint import (
    BURST,
    ENOUGH,
    PACE,
    UNTRIED,
    Cause,
    Endpoint,
    cause_of,
    is_refusal,
    may_refuse_all,
)

R, E, N = Cause.REQUEST, Cause.EITHER, Cause.ENDPOINT


def status(kind, number, **data):
    return kind("x", status=number, **data)


@each(
    ("error", "cause"),
    [
        *((status(mb.ServerError, number), E) for number in (500, 501, 504, 505, 520, 522, 524, 408, 409)),
        *((status(mb.ServerError, number), N) for number in (502, 503, 529)),
        (status(mb.ServerError, 500, should_retry=False), E),
        (status(mb.BadRequest, 400), R),
        (status(mb.BadRequest, 400, should_retry=True), E),
        (status(mb.BadRequest, 404), E),
        (status(mb.BadRequest, 422), R),
        (status(mb.ContextTooLong, 400), R),
        (status(mb.Filtered, 403), R),
        (status(mb.AuthFailed, 401), N),
        (status(mb.AuthFailed, 403), E),
        (status(mb.QuotaExhausted, 402), N),
        (status(mb.RateLimited, 429), N),
        (mb.ConnectFailed("x"), N),
        (mb.TransportTimeout("x"), E),
        (mb.TransportError("cut off"), E),
        (mb.AuthFailed("its key has expired", status=401, again=True), R),
        (mb.ConfigError("no model"), E),
        (mb.ShutDown("x"), N),
        (mb.BatcherClosed("x"), N),
        (mb.MalformedAnswer("x"), R),
        (mb.TruncatedReply("x"), R),
        (mb.DeadlineExceeded("x"), R),
        (ValueError("a bug"), R),
    ],
)
def test_who_may_be_to_blame(error, cause):
    assert cause_of(error) is cause


def test_what_refuses_everything():
    refusals = [status(mb.AuthFailed, 401), status(mb.QuotaExhausted, 429)]
    doubtful = [status(mb.AuthFailed, 403), status(mb.BadRequest, 404)]
    others = [
        status(mb.BadRequest, 400),
        status(mb.RateLimited, 429),
        status(mb.ServerError, 500),
        mb.ConnectFailed("x"),
    ]
    assert [is_refusal(error) for error in (*refusals, *doubtful, *others)] == [True] * 2 + [False] * 6
    assert [may_refuse_all(error) for error in (*refusals, *doubtful, *others)] == [True] * 4 + [False] * 4


class Way:
    """A transport to an endpoint that fails in the windows given.

    Attributes:
        sent: When each attempt was sent, and its text.
        most: Most attempts under way at once.
    """

    model, base_url = "m", "there"

    def __init__(self, *windows, takes=0.0, fails_after=0.0, error=None):
        self.windows = windows
        self.takes = takes
        self.fails_after = fails_after
        self.error = error or status(mb.ServerError, 500)
        self.sent = []
        self.most = self.under_way = 0
        self.closed = 0

    async def send(self, call, on_text):
        text = call.messages[-1]["content"]
        now = asyncio.get_running_loop().time()
        self.sent.append((round(now - self.begun, 3), text))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        bad = any(start <= now - self.begun < end for start, end in self.windows) or text == "poison"
        try:
            await asyncio.sleep(self.fails_after if bad else self.takes)
        finally:
            self.under_way -= 1
        if bad:
            raise self.error
        on_text("yes")
        return Completion("stop")

    async def aclose(self):
        self.closed += 1


def resting(way, **options):
    way.begun = now()
    endpoint = Endpoint("nothing is sent", **options)
    return endpoint, PausingTransport(way, endpoint)


async def ask(transport, text="q"):
    """Ask until there is an answer, as a patient caller does."""
    while True:
        try:
            await transport.send(chat_call(text), lambda _: None)
        except mb.ServerError:
            await asyncio.sleep(0.1)
        else:
            return now()


async def test_while_nothing_is_answered_one_attempt_is_made_after_each_rest_and_all_go_on_when_it_is():
    way = Way((0, 20))
    endpoint, transport = resting(way)
    ended = await asyncio.gather(*(ask(transport, str(number)) for number in range(100)))
    tries = [sent for sent, _ in way.sent if sent < 20]
    assert len([sent for sent in tries if sent < 1]) == UNTRIED  # those that were under way already
    assert [sent for sent in tries if sent >= 1] == [1, 3, 7, 15]  # after rests of 1, 2, 4 and 8 s
    assert next(sent for sent, _ in way.sent if sent >= 20) == 31
    assert all(31 <= time - way.begun < 32 for time in ended)
    assert (endpoint.down, endpoint.on_wire, endpoint.sent) == (False, 0, len(way.sent))


async def test_a_known_question_is_asked_at_once_and_then_after_each_rest_and_nothing_else():
    way = Way((1, 6))
    endpoint, transport = resting(way)

    async def probe():
        try:
            await way.send(chat_call("known"), lambda _: None)
        except mb.ServerError:
            return False
        return True

    endpoint.probe = probe
    await ask(transport)
    await asyncio.sleep(1.5)
    await asyncio.gather(*(ask(transport, str(number)) for number in range(60)))
    assert [sent for sent, text in way.sent if text == "known"] == [1.5, 2.5, 4.5, 8.5]
    assert len([text for sent, text in way.sent if text != "known" and 1 < sent < 6]) <= BURST
    assert len(way.sent) <= 1 + 60 + BURST + 4


async def test_a_request_that_fails_alone_holds_up_no_other():
    way = Way(takes=0.01)
    endpoint, transport = resting(way)
    endpoint.probe = lambda: asyncio.sleep(0, True)
    poison = [asyncio.ensure_future(ask(transport, "poison")) for _ in range(5)]
    await asyncio.sleep(5)
    for number in range(20):
        begun = now()
        assert await ask(transport, str(number)) - begun <= 0.01 + PACE
    assert len([1 for _, text in way.sent if text == "poison"]) > 50
    for task in poison:
        task.cancel()
    await asyncio.gather(*poison, return_exceptions=True)
    assert endpoint.on_wire == 0


async def test_answers_to_what_was_sent_before_do_not_end_an_outage():
    way = Way((1, 30), takes=3.0)
    endpoint, transport = resting(way)
    await ask(transport)  # until 3 s
    endpoint._latest = now() - 2.5  # as if it had been sent before the outage
    early = endpoint._latest - 0.1
    for _ in range(ENOUGH):
        endpoint.failed(status(mb.ServerError, 503), now())
    assert endpoint.down
    endpoint.succeeded(early)
    assert endpoint.down
    endpoint.failed(status(mb.ServerError, 503), early)  # nor do its failures count once something later was answered
    endpoint.succeeded(now())
    assert not endpoint.down
    for _ in range(9):
        endpoint.failed(status(mb.ServerError, 503), now() - 1)
    assert not endpoint.down


async def test_single_failures_among_answers_are_no_outage():
    endpoint = Endpoint("x")
    for _ in range(50):
        endpoint.failed(status(mb.ServerError, 500), now())
        endpoint.failed(mb.ConnectFailed("x"), now())
        await asyncio.sleep(0.01)
        endpoint.succeeded(now())
        assert not endpoint.down
        await asyncio.sleep(0.01)


async def test_a_refused_key_is_an_outage_at_once():
    endpoint = Endpoint("x")
    endpoint.succeeded(now())
    endpoint.failed(status(mb.AuthFailed, 401), now())
    assert endpoint.down


async def test_a_refusal_of_one_request_shows_that_the_endpoint_answers():
    way = Way((0, 99), error=status(mb.BadRequest, 400))
    endpoint, transport = resting(way)
    for _ in range(9):
        with pytest.raises(mb.BadRequest):
            await transport.send(chat_call(), lambda _: None)
    assert endpoint.answered
    assert not endpoint.down


async def test_replies_that_are_all_cut_off_are_an_outage():
    class Cut(Way):
        async def send(self, call, on_text):
            await super().send(call, on_text)
            return Completion(None)

    endpoint, transport = resting(Cut())
    for _ in range(ENOUGH):
        assert (await transport.send(chat_call(), lambda _: None)).finish_reason is None
    assert endpoint.down
    assert not endpoint.answered


async def test_it_is_given_up_after_so_long_without_a_single_answer():
    way = Way((0, 1e9))
    endpoint, transport = resting(way, give_up_after=30)
    told = await asyncio.gather(*(ask(transport) for _ in range(20)), return_exceptions=True)
    assert {type(error) for error in told} == {mb.ShutDown}
    assert now() - way.begun == 30
    assert endpoint.given_up
    way.windows = ()
    with pytest.raises(mb.ShutDown, match="nothing was answered for 30 s"):
        await transport.send(chat_call(), lambda _: None)


async def test_an_answer_starts_the_patience_anew():
    way = Way((1, 14), (17, 30))
    endpoint, transport = resting(way, give_up_after=20)
    await ask(transport)
    for start in (1, 17):
        await asyncio.sleep(max(0.0, way.begun + start - now()))
        await asyncio.gather(*(ask(transport) for _ in range(4)))
    assert now() - way.begun == 32
    assert not endpoint.given_up


async def test_the_first_attempts_are_few_and_later_ones_never_leave_all_at_once():
    way = Way(takes=1.0)
    _, transport = resting(way)
    await asyncio.gather(*(ask(transport, str(number)) for number in range(200)))
    times = [sent for sent, _ in way.sent]
    assert len([sent for sent in times if sent < 1]) == UNTRIED
    for start in times:
        assert len([sent for sent in times if start <= sent < start + PACE - 1e-3]) <= 2 * BURST
    assert now() - way.begun < 3


async def test_who_stops_waits_for_what_is_under_way_and_sends_nothing_more():
    way, idle = Way(takes=2.0), []
    endpoint, transport = resting(way)
    calls = [asyncio.ensure_future(transport.send(chat_call(), lambda _: None)) for _ in range(20)]
    await asyncio.sleep(1)
    assert endpoint.on_wire == UNTRIED
    endpoint.stop(lambda: idle.append(now() - way.begun))
    ended = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(each) for each in ended] == [Completion] * UNTRIED + [mb.ShutDown] * (20 - UNTRIED)
    assert idle == [2.0]
    assert len(way.sent) == UNTRIED
    endpoint.stop(lambda: idle.append("at once"))
    assert idle == [2.0, "at once"]


async def test_a_cancelled_attempt_leaves_the_turn_to_the_next():
    way = Way((0, 10), fails_after=0.5)
    endpoint, transport = resting(way)
    for _ in range(ENOUGH):
        endpoint.failed(status(mb.ServerError, 500), now())
    first, second = (asyncio.ensure_future(ask(transport, name)) for name in ("first", "second"))
    await asyncio.sleep(1.2)
    assert [text for _, text in way.sent] == ["first"]
    first.cancel()
    await second
    assert endpoint.on_wire == 0


async def test_a_transport_that_is_used_with_and_without_rests_is_closed_once():
    way = Way()
    _, transport = resting(way)
    async with mb.Microbatcher(transport, tokens="bytes") as batcher, mb.Microbatcher(way, tokens="bytes") as other:
        for each in (batcher, other):
            assert (await each.submit([{"role": "user", "content": "q"}])).output == "yes"
    assert way.closed == 1
    assert (transport.model, transport.base_url) == ("m", "there")
