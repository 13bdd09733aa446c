"""The whole way over real sockets: batcher, transport, HTTP, simulated endpoint, and back to each caller."""

from __future__ import annotations

import asyncio
import itertools
import random
import re

import pytest
from helpers import ask
from shop import TEXTS, TYPES, Label, Product, right

import microbatch as mb
from microbatch.testing import (
    Faults,
    Latency,
    SimulatedEndpoint,
    SimulatedModel,
    SimulatedTransport,
    VirtualClockLoop,
)


def open_batcher(endpoint, *, fallback=None, **policy):
    """A batcher with retries to spare: endpoints here cut off more than the usual budget pays for if batches are large."""
    transport = mb.OpenAIChat("gpt-4.1-mini", base_url=endpoint.base_url, api_key="any")
    retry = mb.RetryPolicy(reserve=1_000)
    return mb.Microbatcher(transport, policy=mb.FlushPolicy(**policy), fallback=fallback, retry=retry, tokens="bytes")


async def outcomes(batcher, texts, output_type=str):
    asked = (batcher.submit(ask(text), output_type=output_type) for text in texts)
    return await asyncio.gather(*asked, return_exceptions=True)


@pytest.mark.parametrize("resolve", ["stream", "verified"])
@pytest.mark.parametrize("output_type", TYPES.values(), ids=TYPES)
async def test_concurrent_submits_share_calls_and_each_gets_its_own_answer(output_type, resolve):
    async with (
        SimulatedEndpoint() as endpoint,
        open_batcher(endpoint, fallback=mb.FallbackPolicy(resolve=resolve)) as batcher,
    ):
        replies = await outcomes(batcher, TEXTS[:96], output_type)
        assert [reply.output for reply in replies] == [right(text, output_type) for text in TEXTS[:96]]
        assert endpoint.calls == endpoint.combined_calls == batcher.upstream_calls <= 8
        settled = [await reply.settled() for reply in replies]
        assert {(reply.route, reply.model, reply.finish_reason) for reply in settled} == {
            ("batch", "gpt-4.1-mini", "stop")
        }
        assert not any(reply.usage.estimated for reply in settled)
        assert sum(reply.usage.prompt_tokens for reply in settled) == endpoint.reported.prompt_tokens
        assert sum(reply.usage.completion_tokens for reply in settled) == endpoint.reported.completion_tokens


async def test_a_lone_submit_is_the_callers_own_request():
    async with SimulatedEndpoint(record=True) as endpoint, open_batcher(endpoint) as batcher:
        reply = await batcher.submit(ask(TEXTS[0]), temperature=0.2, max_tokens=300)
        assert (reply.route, reply.output) == ("single", right(TEXTS[0]))
        assert reply.body["object"] == "chat.completion"
    body = endpoint.requests[0]
    assert body["messages"] == ask(TEXTS[0])
    assert (body["temperature"], body["model"]) == (0.2, "gpt-4.1-mini")
    assert "response_format" not in body


async def test_callers_are_answered_in_order_while_the_reply_still_streams(monkeypatch):
    """The endpoint sends an element only when the caller of the one before has its answer."""
    answered, turns = [], asyncio.Semaphore(1)

    async def paced(times, start):
        elements = [at for at in range(1, len(times)) if times[at] != times[at - 1]]
        for first, last in itertools.pairwise([0, *elements, len(times)]):
            await turns.acquire()
            yield first, last

    monkeypatch.setattr("microbatch.testing.endpoint.paced", paced)
    latency = Latency(first_token=0, element=0.001)
    async with SimulatedEndpoint(latency=latency) as endpoint, open_batcher(endpoint) as batcher:

        async def caller(number):
            reply = await batcher.submit(ask(TEXTS[number]))
            assert reply.output == right(TEXTS[number])
            answered.append((number, reply.finish_reason, batcher.stats().in_flight))
            turns.release()

        async with asyncio.timeout(30):
            await asyncio.gather(*map(caller, range(10)))
    assert [number for number, _, _ in answered] == list(range(10))
    # The first nine came before the reply had ended, and so before anybody knew how it would.
    assert [(reason, in_flight) for _, reason, in_flight in answered[:9]] == [(None, 1)] * 9


@pytest.mark.parametrize("output_type", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("json_object", ["ok", "400"])
async def test_an_endpoint_that_refuses_json_schema_is_asked_without_and_remembered(json_object, output_type):
    async with (
        SimulatedEndpoint(json_schema="400", json_object=json_object, record=True) as endpoint,
        open_batcher(endpoint) as batcher,
    ):
        for start in (0, 20):
            texts = TEXTS[start : start + 20]
            replies = await outcomes(batcher, texts, output_type)
            assert [reply.output for reply in replies] == [right(text, output_type) for text in texts]
        alone = await batcher.submit(ask(TEXTS[50]), output_type=Product)
        assert alone.output == right(TEXTS[50], Product)
        assert batcher.upstream_calls == endpoint.calls
    formats = [(body.get("response_format") or {}).get("type") for body in endpoint.requests]
    assert formats[0] == "json_schema"
    assert formats.count("json_schema") <= 2  # calls of one moment are refused together; later ones know
    rung = "json_object" if json_object == "ok" else None
    assert formats[-3:] == [rung] * 3


@pytest.mark.parametrize("json_object", ["ok", "400"])
async def test_an_endpoint_that_breaks_on_json_schema_is_asked_without(json_object):
    async with (
        SimulatedEndpoint(json_schema="500", json_object=json_object) as endpoint,
        open_batcher(endpoint) as batcher,
    ):
        replies = await outcomes(batcher, TEXTS[:10], Label)
        assert [reply.output for reply in replies] == [right(text, Label) for text in TEXTS[:10]]


async def test_what_an_endpoint_cannot_do_is_learned_on_the_way():
    async with (
        SimulatedEndpoint(
            json_schema="400",
            json_object="400",
            stream_supported=False,
            temperature_fixed=True,
            max_tokens_name="max_completion_tokens",
        ) as endpoint,
        open_batcher(endpoint) as batcher,
    ):
        for _ in range(2):
            asked = (batcher.submit(ask(text), output_type=Label, temperature=0, max_tokens=100) for text in TEXTS[:10])
            replies = await asyncio.gather(*asked)
            assert [reply.output for reply in replies] == [right(text, Label) for text in TEXTS[:10]]
        assert batcher.upstream_calls <= 2 + 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds", [("broken_json", "missing", "fenced"), ("cut", "reset"), ("refusal", "filtered"), ("truncated",)]
)
async def test_faults_on_the_wire_cost_calls_and_no_answers(kinds):
    async with SimulatedEndpoint(faults=Faults(kinds, rate=0.3)) as endpoint, open_batcher(endpoint) as batcher:
        texts = TEXTS[:200]
        replies = await outcomes(batcher, texts, Product)
        assert [reply.output for reply in replies] == [right(text, Product) for text in texts]
        assert endpoint.faulted > 0
        stats = batcher.stats()
        assert (stats.prompt_tokens, stats.completion_tokens) == (
            endpoint.reported.prompt_tokens,
            endpoint.reported.completion_tokens,
        )


@pytest.mark.slow
async def test_a_storm_with_random_cancellations_gives_everybody_their_own_number():
    draw = random.Random(3)

    def echo(text, schema):
        return f"the answer is {re.search('[0-9]+', text)[0]}"

    # About a third breaks in some way, so that cancellations meet streams, fallbacks and fresh calls.
    faults = Faults(("cut", "reset", "missing", "reordered", "broken_json", "filtered"), rate=0.3)
    latency = Latency(first_token=0.02, tokens_per_second=4_000)
    async with (
        SimulatedEndpoint(answer=echo, latency=latency, faults=faults) as endpoint,
        open_batcher(endpoint, max_wait=0.02) as batcher,
    ):

        async def caller(number):
            await asyncio.sleep(draw.random())
            asked = asyncio.ensure_future(batcher.submit(ask(f"number {number}")))
            if draw.random() < 0.25:
                asyncio.get_running_loop().call_later(draw.random() * 0.15, asked.cancel)
            reply = await asked
            assert reply.output == f"the answer is {number}"

        ended = await asyncio.gather(*map(caller, range(600)), return_exceptions=True)
        gone = sum(isinstance(each, asyncio.CancelledError) for each in ended)
        assert [each for each in ended if each is not None and not isinstance(each, asyncio.CancelledError)] == []
        assert gone > 20
        await batcher.aclose()
        stats = batcher.stats()
    assert (stats.answered, stats.cancelled, stats.failed, stats.queued, stats.in_flight) == (600 - gone, gone, 0, 0, 0)
    assert stats.upstream_calls < 600


# --- what streaming is for, to the instant: the same way on virtual time, without the sockets


def on_virtual_time(scenario):
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(scenario)


def test_streaming_answers_the_first_caller_at_once_and_the_mean_one_halfway():
    async def scenario():
        model = SimulatedModel(latency=Latency(first_token=0.5, element=0.02))
        policy = mb.FlushPolicy(max_batch_size=50, max_output_tokens=10**6, max_batch_tokens=10**6, max_queued=10**6)
        loop = asyncio.get_running_loop()
        async with mb.Microbatcher(SimulatedTransport(model), policy=policy, tokens="bytes") as batcher:

            async def caller(text):
                await batcher.submit(ask(text), output_type=Label)
                return loop.time()

            times = await asyncio.gather(*map(caller, TEXTS[:50]))
            assert model.calls == 1
            return times

    times = on_virtual_time(scenario())
    start = 0.5  # the first element begins
    end = start + 50 * 0.02
    assert times == sorted(times)
    assert times[-1] == pytest.approx(end)
    assert times[0] - start <= 2 * 0.02
    assert sum(time - start for time in times) / 50 <= 0.55 * (end - start)


def test_verified_answers_nobody_before_the_end():
    async def scenario():
        model = SimulatedModel(latency=Latency(first_token=0.5, element=0.02))
        loop = asyncio.get_running_loop()
        fallback = mb.FallbackPolicy(resolve="verified")
        async with mb.Microbatcher(SimulatedTransport(model), fallback=fallback, tokens="bytes") as batcher:
            await asyncio.wait(
                [asyncio.ensure_future(batcher.submit(ask(text))) for text in TEXTS[:10]], return_when="FIRST_COMPLETED"
            )
            return loop.time()

    assert on_virtual_time(scenario()) == pytest.approx(0.7)


def test_a_lone_submit_on_an_idle_lane_waits_for_no_company():
    async def scenario(idle):
        model = SimulatedModel(latency=Latency(first_token=0.5, tokens_per_second=None))
        policy = mb.FlushPolicy(max_wait=0.05, idle=idle)
        loop = asyncio.get_running_loop()
        async with mb.Microbatcher(SimulatedTransport(model), policy=policy, tokens="bytes") as batcher:
            reply = await batcher.submit(ask(TEXTS[0]))
            assert (reply.route, reply.waited, reply.latency) == (
                "single",
                pytest.approx(loop.time() - 0.5),
                loop.time(),
            )
            return loop.time()

    assert on_virtual_time(scenario("flush")) == 0.5
    assert on_virtual_time(scenario("wait")) == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("settings", "asked", "told"),
    [
        ({"model": None}, {}, "no model"),
        ({}, {"headers": {"X-A": "b\r\nX: y"}}, "without line breaks"),
        ({}, {"headers": {"A b": "c"}}, "no HTTP header name"),
        ({}, {"headers": {"Content-Length": "3"}}, "cannot be set"),
    ],
)
async def test_what_cannot_be_sent_is_the_callers_config_error_and_no_call(settings, asked, told):
    async with SimulatedEndpoint() as endpoint:
        chat = mb.OpenAIChat(base_url=endpoint.base_url, api_key="k", **{"model": "m", **settings})
        async with mb.Microbatcher(chat, tokens="bytes") as batcher:
            submits = (batcher.submit(ask(text), **asked) for text in TEXTS[:3])
            errors = await asyncio.gather(*submits, return_exceptions=True)
            mapped = [mb.Request(ask(text), headers=asked.get("headers")) for text in TEXTS[:3]]
            errors += [result.error async for result in batcher.map(mapped)]
        assert {type(error) for error in errors} == {mb.ConfigError}
        assert all(told in str(error) and error.attempts == 0 for error in errors)
        assert endpoint.calls == batcher.stats().upstream_calls == 0
