"""Streamed answers of the gateway: live if a request goes alone, with early headers and comments if it is combined."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager

import aiohttp
import openai
import pytest
from aiohttp import web
from gateway_world import MODEL, ONE_ATTEMPT, PATIENCE, gateway, recorder, sdk
from helpers import ask, until

import microbatch as mb
from microbatch.gateway import GatewaySettings, event_stream
from microbatch.testing import Latency, SimulatedEndpoint

pytestmark = pytest.mark.slow

KEY = "sk-of-all-clients"
LINE = re.compile(r'^\[(\w+)\] (".*")$', re.MULTILINE)
ENDED = object()


def chunk(delta, *, finish=None, **more):
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {
        "id": "theirs",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m-1",
        "choices": [choice],
        **more,
    }


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
LAST = {**chunk({}), "choices": [], "usage": USAGE}
LONE = [
    chunk({"role": "assistant", "content": ""}, system_fingerprint="fp"),
    chunk({"reasoning_content": "hm"}),
    chunk({"content": "two "}),
    chunk({"content": "words"}, x_odd=[1]),
    chunk({}, finish="stop"),
]


class Model:
    """An endpoint whose streams go on only as the test says.

    Attributes:
        lone: The events that answer a request that goes alone.
        calls: Bodies, in order of arrival.
    """

    def __init__(self, upstream):
        upstream.answer = self.answer
        self.lone = [*LONE, LAST]
        self.calls = []
        self.left = 0
        self.accepts = asyncio.Event()
        self.accepts.set()
        self.steps = {
            False: asyncio.Semaphore(0),
            True: asyncio.Semaphore(0),
        }  # events let out, of combined calls or not
        self.refusal = None
        self.headers = {}

    def go(self, steps=1000, *, combined=None):
        """Let out so many more events: of calls that are combined, of those that are not, or of both."""
        for _ in range(steps):
            for kind in (False, True) if combined is None else (combined,):
                self.steps[kind].release()

    async def answer(self, request):
        body = json.loads(await request.read())
        self.calls.append(body)
        await self.accepts.wait()
        if self.refusal is not None:
            return web.json_response({"error": self.refusal}, status=400, headers={"x-request-id": "req"})
        items = LINE.findall(body["messages"][-1]["content"])
        events = self.lone
        if items:
            answers = [{"id": id_, "answer": f"re: {json.loads(text)}"} for id_, text in items]
            parts = [json.dumps(answer) + ("," if answer is not answers[-1] else "]}") for answer in answers]
            events = [chunk({"content": text}) for text in ('{"results":[', *parts)]
            events += [chunk({}, finish="stop"), LAST]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        try:
            await response.prepare(request)
            for event in events:
                await self.steps[bool(items)].acquire()
                if event is None:
                    request.transport.abort()
                    return response
                await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            await response.write(b"data: [DONE]\n\n")
        except asyncio.CancelledError:
            self.left += 1
            raise
        return response


@asynccontextmanager
async def world(*, idle="flush", settings=None, **options):
    """Yield the endpoint, the gateway and a session of HTTP."""
    async with (
        recorder() as upstream,
        gateway(
            upstream.url, policy={"idle": idle, **options.pop("policy", {})}, settings=settings, **options
        ) as served,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE)) as session,
    ):
        yield Model(upstream), served, session


def post(session, served, text, **more):
    asked = {"model": MODEL, "messages": ask(text), "stream": True, **more}
    headers = {"Authorization": f"Bearer {KEY}"}
    return session.post(f"{served.base_url}/chat/completions", json=asked, headers=headers)


async def events_of(response):
    """Yield what comes: the object of an event, the text of a comment."""
    async for line in response.content:
        text = line.decode().rstrip("\n")
        if text.startswith(":"):
            yield text
        elif text.startswith("data: "):
            yield ENDED if text == "data: [DONE]" else json.loads(text.removeprefix("data: "))


def text_in(events):
    objects = [event for event in events if isinstance(event, dict)]
    return "".join(choice["delta"].get("content") or "" for event in objects for choice in event["choices"])


async def test_a_request_that_goes_alone_gets_the_endpoints_own_events_as_they_come():
    async with world() as (model, served, session), post(session, served, "x") as response:
        # The headers are here, and the endpoint has sent nothing else.
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert (response.headers["X-Microbatch-Route"], response.headers["X-Microbatch-Batch-Size"]) == ("single", "1")
        events = events_of(response)
        for sent in LONE:
            model.go(1)
            assert await anext(events) == sent
        model.go()
        # Its usage, which the client has not asked for, is not sent on.
        assert [event async for event in events] == [ENDED]
        assert model.calls[0]["messages"] == ask("x")
        stats = served.stats()
    assert (stats.items, stats.answered, stats.prompt_tokens) == (1, 1, 3)


@pytest.mark.parametrize("tells", [True, False])
async def test_the_usage_is_told_once_whether_or_not_the_endpoint_tells_it(tells):
    async with world() as (model, served, session):
        model.lone = [*LONE, LAST] if tells else LONE
        model.go()
        async with post(session, served, "x", stream_options={"include_usage": True}) as response:
            events = [event async for event in events_of(response)]
    told = [event["usage"] for event in events[:-1] if event.get("usage")]
    assert len(told) == 1
    assert events[-2]["choices"] == []
    if tells:
        assert told == [USAGE]


async def test_requests_with_company_get_headers_at_once_and_their_text_when_it_is_complete():
    async with (
        world(policy={"max_wait": 0.02}) as (model, served, session),
        post(session, served, "first") as first,
        post(session, served, "a") as one,
        post(session, served, "b") as two,
    ):
        # All have their headers, and the endpoint has not said a word.
        assert [response.status for response in (first, one, two)] == [200] * 3
        await until(lambda: len(model.calls) == 2)
        model.go(2, combined=True)  # the first element is complete, the second is not sent
        assert text_in([event async for event in events_of(one)]) == "re: a"
        model.go()
        assert text_in([event async for event in events_of(two)]) == "re: b"
        assert text_in([event async for event in events_of(first)]) == "two words"


async def test_requests_that_meet_in_a_lane_that_waits_get_headers_before_it_leaves():
    async with world(idle="wait", policy={"max_wait": PATIENCE, "max_batch_size": 3}) as (model, served, session):
        one, two = await asyncio.gather(*(post(session, served, text) for text in "ab"))
        assert (one.status, two.status, model.calls) == (200, 200, [])
        model.go()
        async with post(session, served, "c") as three:
            texts = [text_in([event async for event in events_of(each)]) for each in (one, two, three)]
    assert texts == ["re: a", "re: b", "re: c"]
    assert len(model.calls) == 1


async def test_of_eight_at_once_the_first_text_comes_long_before_the_end():
    words = " ".join(["word"] * 40)
    latency = Latency(first_token=0.5, tokens_per_second=80)
    loop = asyncio.get_running_loop()
    async with (
        SimulatedEndpoint(latency=latency, answer=lambda text, schema: words) as endpoint,
        gateway(endpoint, policy={"idle": "flush", "max_wait": 0.1}) as served,
        sdk(served) as client,
    ):

        async def ask_one(number):
            asked = {"model": MODEL, "messages": ask(f"thing {number}"), "stream": True}
            stream = await client.chat.completions.create(**asked)
            times = [loop.time() async for event in stream if event.choices[0].delta.content]
            return times[0], loop.time()

        await ask_one(100)  # which opens connections
        before = loop.time()
        firsts, ends = zip(*await asyncio.gather(*map(ask_one, range(8))), strict=True)
    whole = max(ends) - before
    assert sum(first - before for first in firsts) / 8 <= 0.65 * whole


async def test_comments_are_sent_while_nothing_else_is(monkeypatch):
    monkeypatch.setattr(event_stream, "HEARTBEAT", 0.05)
    async with world() as (model, served, session), post(session, served, "x") as response:
        events = events_of(response)
        for _ in range(3):
            assert (await anext(events)).startswith(":")
        model.go()
        assert (
            text_in([event async for event in events if not isinstance(event, str) and event is not ENDED])
            == "two words"
        )


async def test_a_request_that_waits_alone_for_long_gets_headers_and_comments_too(monkeypatch):
    monkeypatch.setattr(event_stream, "HEARTBEAT", 0.05)
    async with world() as (model, served, session):
        model.accepts.clear()
        async with post(session, served, "x") as response:
            assert (await anext(events_of(response))).startswith(":")
            model.accepts.set()
            model.go()
            rest = [event async for event in events_of(response)]
    assert text_in(event for event in rest if event is not ENDED) == "two words"


REFUSAL = {"message": "no such thing", "type": "invalid_request_error", "param": "x", "code": "odd"}


async def test_a_refusal_before_the_headers_keeps_its_status():
    async with world() as (model, served, session):
        model.refusal = REFUSAL
        async with post(session, served, "x") as response:
            assert (response.status, (await response.json())["error"]) == (400, REFUSAL)


async def test_a_refusal_after_the_headers_is_an_event_and_ends_the_stream():
    async with world(policy={"max_wait": 0.02}) as (model, served, session), sdk(served, KEY) as client:
        model.accepts.clear()
        first = asyncio.create_task(post(session, served, "first").__aenter__())
        await until(lambda: len(model.calls) >= 1)
        asked = {"model": MODEL, "messages": ask("a"), "stream": True}
        stream = await client.chat.completions.create(**asked)
        async with post(session, served, "b") as other:
            model.refusal = REFUSAL
            model.accepts.set()
            events = [event async for event in events_of(other)]
            assert events == [{"error": REFUSAL}]
            with pytest.raises(openai.APIError, match="no such thing") as caught:
                [event async for event in stream]
        assert (caught.value.code, caught.value.param) == ("odd", "x")
        (await first).close()


@pytest.mark.parametrize("count", [1, 2, 3], ids=["role", "thought", "text"])
async def test_a_stream_that_breaks_off_is_not_asked_for_again(count):
    async with world() as (model, served, session):
        model.lone = [*LONE[:count], None]
        model.go()
        async with post(session, served, "x") as response:
            *events, last = [event async for event in events_of(response)]
    assert events == LONE[:count]
    assert last["error"]["code"] == "upstream_unreachable"
    assert len(model.calls) == 1


async def test_a_thought_without_an_answer_is_handed_on_and_not_paid_for_again():
    async with world() as (model, served, session):
        model.lone = [LONE[0], LONE[1], LONE[-1], LAST]
        model.go()
        async with post(session, served, "x") as response:
            events = [event async for event in events_of(response)]
    assert events == [*model.lone[:3], ENDED]
    assert len(model.calls) == 1


async def test_a_client_that_leaves_in_the_middle_takes_its_call_along():
    async with world() as (model, served, session):
        async with post(session, served, "x") as response:
            model.go(2)
            events = events_of(response)
            assert [await anext(events), await anext(events)] == LONE[:2]
        await until(lambda: model.left)
        await until(lambda: not served.stats().in_flight)
        assert served.stats().cancelled == 1


async def test_a_stream_of_a_value_in_an_object_of_ours_has_the_value_alone():
    schema = {"type": "array", "items": {"type": "integer"}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}
    async with world() as (model, served, session):
        model.lone = [LONE[0], chunk({"content": '{"answer":'}), chunk({"content": "[1]}"}), *LONE[-1:], LAST]
        model.go()
        async with post(session, served, "x", response_format=form) as response:
            events = [event async for event in events_of(response)]
    assert text_in(event for event in events if event is not ENDED) == "[1]"


async def test_what_was_streamed_is_kept_and_answers_the_next():
    async with world(cache=mb.MemoryCache()) as (model, served, session):
        model.go()
        for _ in range(2):
            async with post(session, served, "x", temperature=0) as response:
                events = [event async for event in events_of(response)]
                route = response.headers["X-Microbatch-Route"]
            assert text_in(event for event in events if event is not ENDED) == "two words"
    assert (route, len(model.calls)) == ("cache", 1)


@pytest.mark.parametrize(("streams", "calls"), [("relay", 3), ("combine", 2)])
async def test_streams_can_be_relayed_always_or_never_be_live(streams, calls):
    settings = GatewaySettings(streams=streams)
    async with world(settings=settings, policy={"max_wait": 0.02}, retry=ONE_ATTEMPT) as (model, served, session):
        model.accepts.clear()
        first = asyncio.create_task(post(session, served, "first").__aenter__())
        await until(lambda: len(model.calls) == 1)
        second, third = (asyncio.create_task(post(session, served, text).__aenter__()) for text in "ab")
        await until(lambda: len(model.calls) == calls)
        model.accepts.set()
        model.go()
        responses = [await each for each in (first, second, third)]
        told = [[event async for event in events_of(response) if event is not ENDED] for response in responses]
    assert [text_in(each) for each in told] == (
        ["two words"] * 3 if streams == "relay" else ["two words", "re: a", "re: b"]
    )
    assert (told[0][0]["id"] == "theirs") == (streams == "relay")


async def sent_through(raw):
    """The events that a client gets of a stream that the endpoint sends as *raw*, closing the connection after it."""

    async def answer(_request):
        return web.Response(body=raw, headers={"Content-Type": "text/event-stream"})

    async with recorder() as upstream, gateway(upstream.url, policy={"idle": "flush"}) as served:
        upstream.answer = answer
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE)) as session,
            post(session, served, "x") as response,
        ):
            return [event async for event in events_of(response)]


def as_events(*objects):
    return b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in objects)


@pytest.mark.parametrize(
    "ending", [b"", b"\n", b"\r", b"\n\n", b"\n\ndata: [DONE]", b'\n\ndata: {"choices": [{"delta": {"cont']
)
async def test_the_last_event_arrives_with_or_without_its_blank_line(ending):
    sent = [chunk({"content": "two "}), chunk({"content": "words"}, finish="stop")]
    assert await sent_through(as_events(*sent).removesuffix(b"\n\n") + ending) == [*sent, ENDED]


async def test_a_filter_that_stops_a_live_stream_with_an_error_is_not_taken_for_its_end():
    error = {
        "message": "stopped by the content filter",
        "type": "invalid_request_error",
        "param": None,
        "code": "content_filter",
    }
    events = await sent_through(as_events(chunk({"content": "two "}), {"error": error}))
    assert events == [chunk({"content": "two "}), {"error": error}]


async def test_a_filter_that_stops_a_live_stream_with_a_finish_reason_is_its_end():
    sent = [chunk({"content": "two "}), chunk({}, finish="content_filter")]
    assert await sent_through(as_events(*sent)) == [*sent, ENDED]
