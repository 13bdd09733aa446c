"""The gateway as OpenAI's own SDK sees it."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import openai
import pydantic
import pytest
from aiohttp import web
from gateway_world import MODEL, ONE_ATTEMPT, QUICK, Watched, gateway, recorder, sdk, serve
from helpers import ask, until
from openai.lib._pydantic import to_strict_json_schema
from yarl import URL

import microbatch as mb
from microbatch.gateway import GatewaySettings
from microbatch.testing import Faults, Latency, SimulatedEndpoint, simulated_answer

pytestmark = pytest.mark.slow  # real sockets and real time


class Product(pydantic.BaseModel):
    name: str
    price: float


async def create(client, text, **options):
    completion = await client.chat.completions.create(model=MODEL, messages=ask(text), **options)
    return completion.choices[0].message.content


async def parse(client, text):
    completion = await client.chat.completions.parse(model=MODEL, messages=ask(text), response_format=Product)
    return completion.choices[0].message.parsed.model_dump()


async def stream(client, text):
    events = await client.chat.completions.create(model=MODEL, messages=ask(text), stream=True)
    return "".join([event.choices[0].delta.content or "" async for event in events])


async def stream_parsed(client, text):
    asked = client.chat.completions.stream(model=MODEL, messages=ask(text), response_format=Product)
    async with asked as events:
        return (await events.get_final_completion()).choices[0].message.parsed.model_dump()


def right(text, way):
    return simulated_answer(text, None if way in (create, stream) else to_strict_json_schema(Product))


def company_of(number):
    """A policy that waits for *number* requests, however long a loaded machine takes to bring them."""
    return {"max_batch_size": number, "max_wait": 30}


@pytest.mark.slow
async def test_200_concurrent_calls_of_the_sdk_leave_as_at_most_15():
    ways = (create, parse, stream, stream_parsed)
    async with (
        SimulatedEndpoint(latency=Latency(first_token=1.0, tokens_per_second=0)) as upstream,
        serve("--upstream", upstream.base_url, "--port", "0", "--idle", "wait", "--max-wait", "3") as served,
        sdk(served) as client,
    ):
        # The SDK takes a while over its first calls, and to open connections.
        await asyncio.gather(*(way(client, f"warming up {number}") for number in range(25) for way in ways))
        before = upstream.calls
        asked = [(f"thing {number}", ways[number % 4]) for number in range(200)]
        answers = await asyncio.gather(*(way(client, text) for text, way in asked))
        calls = upstream.calls - before
    assert answers == [right(text, way) for text, way in asked]
    assert calls <= 15


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("upstream", "key", "kind"),
    [
        ({"context_tokens": 10}, "good", openai.BadRequestError),
        ({"api_keys": ["good"]}, "bad", openai.AuthenticationError),
        ({"faults": Faults("http_429", rate=1, on="all", retry_after=0.02)}, "good", openai.RateLimitError),
        ({"faults": Faults("http_500", rate=1, on="all")}, "good", openai.InternalServerError),
        ({"faults": Faults("http_400", rate=1, on="all")}, "good", openai.BadRequestError),
    ],
)
async def test_errors_are_those_that_the_sdk_raises_at_the_provider(upstream, key, kind, streamed):
    retry = mb.RetryPolicy(max_attempts=2, base=0.01)

    async def failing(served):
        async with sdk(served, key) as client:
            with pytest.raises(kind) as caught:
                await (stream if streamed else create)(client, "a thing")
        return caught.value

    async with SimulatedEndpoint(latency=QUICK, **upstream) as endpoint, gateway(endpoint, retry=retry) as served:
        direct = await failing(endpoint) if kind is not openai.RateLimitError else None
        before = endpoint.calls
        error = await failing(served)
        calls = endpoint.calls - before
    assert error.response.headers["x-should-retry"] == "false"
    # The gateway has tried again what is worth it, and the SDK did not.
    assert calls == (2 if error.status_code in (429, 500) else calls)
    assert calls <= 2
    if direct is not None:
        assert (error.status_code, error.code, error.param) == (direct.status_code, direct.code, direct.param)
        assert error.type == direct.type
    if kind is openai.RateLimitError:
        assert error.response.headers["Retry-After"] == "1"
        assert error.response.headers["retry-after-ms"] == "20"


async def test_a_reply_has_the_shape_and_the_share_of_the_caller():
    slow = Latency(first_token=0, tokens_per_second=0, element=0.5)  # the first answers are there before the bill
    async with (
        Watched(latency=slow) as upstream,
        gateway(upstream, policy=company_of(4)) as served,
        sdk(served) as client,
    ):
        asked = (client.chat.completions.create(model=MODEL, messages=ask(f"t{number}")) for number in range(4))
        completions = await asyncio.gather(*asked)
        paid = served.stats()
    assert upstream.combined_calls == 1
    for number, completion in enumerate(completions):
        choice = completion.choices[0]
        assert (choice.message.role, choice.message.content) == ("assistant", f"re: t{number}")
        assert (choice.index, choice.finish_reason, choice.message.refusal) == (0, "stop", None)
        assert (completion.object, completion.model) == ("chat.completion", MODEL)
    assert completions[0].usage.microbatch_estimated is True
    assert len({completion.id for completion in completions}) == 4
    assert paid.items == 4


@pytest.mark.parametrize("streamed", [False, True])
async def test_exact_usage_adds_up_to_what_the_upstream_reported(streamed):
    async def usage_of(client, text):
        options = {"stream": True, "stream_options": {"include_usage": True}} if streamed else {}
        answer = await client.chat.completions.create(model=MODEL, messages=ask(text), **options)
        if not streamed:
            return answer.usage
        events = [event async for event in answer]
        assert all(event.usage is None and len(event.choices) == 1 for event in events[:-1])
        assert events[-1].choices == []
        return events[-1].usage

    exact = GatewaySettings(exact_usage=True)
    slow = Watched(latency=Latency(first_token=0, tokens_per_second=0, element=0.05))
    async with (
        slow as upstream,
        gateway(upstream, policy=company_of(5), settings=exact) as served,
        sdk(served) as client,
    ):
        usages = await asyncio.gather(*(usage_of(client, f"thing {number}") for number in range(5)))
    assert not any(hasattr(usage, "microbatch_estimated") for usage in usages)
    assert sum(usage.prompt_tokens for usage in usages) == upstream.reported.prompt_tokens
    assert sum(usage.completion_tokens for usage in usages) == upstream.reported.completion_tokens
    assert upstream.calls == 1


async def test_a_stream_is_events_as_openai_sends_them():
    async with Watched() as upstream, gateway(upstream) as served, aiohttp.ClientSession() as session:
        body = {"model": MODEL, "messages": ask("x"), "stream": True, "stream_options": {"include_usage": True}}
        async with session.post(f"{served.base_url}/chat/completions", json=body) as response:
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            raw = (await response.read()).decode()
    *events, last = [event.removeprefix("data: ") for event in raw.strip().split("\n\n")]
    assert last == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert {(chunk["id"], chunk["object"], chunk["created"]) for chunk in chunks} == {
        (chunks[0]["id"], "chat.completion.chunk", chunks[0]["created"])
    }
    first, *rest, finish, usage = chunks
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in rest) == "re: x"
    assert (finish["choices"][0]["delta"], finish["choices"][0]["finish_reason"]) == ({}, "stop")
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] > 0


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
OWN = {"id": "theirs", "object": "chat.completion", "created": 1, "model": "m", "odd": [1], "choices": []}


@pytest.mark.parametrize("extra", [{"tools": [TOOL]}, {"n": 2}, {"logprobs": True}, {"seed": 1}, {"stop": "x"}])
async def test_what_cannot_be_combined_is_answered_with_the_endpoints_own_body(extra):
    choice = {"index": 0, "message": {"role": "assistant", "content": None, "tool_calls": []}, "finish_reason": "stop"}
    body = {**OWN, "choices": [choice, {**choice, "index": 1}]}

    async def answer(request):
        return web.json_response(body)

    async with recorder() as upstream, gateway(upstream.url) as served, aiohttp.ClientSession() as session:
        upstream.answer = answer
        asked = {"model": MODEL, "messages": ask("x"), **extra}
        async with session.post(f"{served.base_url}/chat/completions", json=asked) as response:
            assert await response.json() == body
    assert json.loads(upstream.requests[0][3])["messages"] == ask("x")


@pytest.mark.parametrize("extra", [{"tools": [TOOL]}, {"n": 2}])
async def test_a_stream_of_what_cannot_be_combined_is_relayed_byte_for_byte(extra):
    async with recorder() as upstream, gateway(upstream.url) as served, aiohttp.ClientSession() as session:
        raw = json.dumps({"stream": True, "model": MODEL, "messages": ask("x"), **extra}, indent=3).encode()
        headers = {"Authorization": "Bearer theirs", "Content-Type": "application/json"}
        async with session.post(f"{served.base_url}/chat/completions", data=raw, headers=headers) as response:
            assert (response.status, await response.read()) == (203, raw[::-1])
    assert upstream.requests[0][3] == raw


async def test_the_header_that_opts_out_relays_a_request_as_it_is():
    async with recorder() as upstream, gateway(upstream.url) as served, aiohttp.ClientSession() as session:
        raw = json.dumps({"model": MODEL, "messages": ask("x")}, indent=3).encode()
        headers = {"X-Microbatch-Batch": "no", "Content-Type": "application/json", "Authorization": "Bearer theirs"}
        address = f"{served.base_url}/chat/completions?a=%20b"
        async with session.post(address, data=raw, headers=headers) as response:
            assert (response.status, await response.read()) == (203, raw[::-1])
        assert served.stats().items == 0
    method, path, headers, body = upstream.requests[0]
    assert (method, path, body) == ("POST", "/v1/chat/completions?a=%20b", raw)
    assert headers["Authorization"] == "Bearer theirs"
    assert not any(name.lower().startswith("x-microbatch") for name in headers)


async def test_all_else_is_relayed_with_the_callers_key_and_without_what_is_private():
    async with recorder() as upstream, gateway(upstream.url) as served, aiohttp.ClientSession() as session:
        form = aiohttp.FormData({"purpose": "batch"})
        form.add_field("file", b"\x00\xff" * 1000, filename="a.jsonl")
        sent = {
            "Authorization": "Bearer theirs",
            "Cookie": "a=b",
            "X-Forwarded-For": "1.2.3.4",
            "Via": "x",
            "X-Own": "1",
        }
        address = URL(f"{served.base_url}/files/a%2Fb?limit=1&q=%25+%2B", encoded=True)
        async with session.post(address, data=form, headers=sent) as response:
            body = await response.read()
            assert response.status == 203
            assert response.headers["X-Kept"] == "yes"
            assert not [n for n in ("Set-Cookie", "Access-Control-Allow-Origin") if n in response.headers]
        async with session.delete(f"{served.base_url}/files/f", headers=sent) as response:
            assert response.status == 203
        async with session.head(f"{served.base_url}/models", headers=sent) as response:
            assert (response.status, await response.read()) == (203, b"")
    method, path, headers, sent = upstream.requests[0]
    assert (method, path) == ("POST", "/v1/files/a%2Fb?limit=1&q=%25+%2B")
    assert sent == body[::-1]
    assert b"\x00\xff" * 1000 in sent
    assert (headers["Authorization"], headers["X-Own"]) == ("Bearer theirs", "1")
    assert not [name for name in ("Cookie", "X-Forwarded-For", "Via") if name in headers]
    assert headers["Host"] == upstream.url.split("/")[2]
    assert [request[0] for request in upstream.requests] == ["POST", "DELETE", "HEAD"]


async def test_redirects_are_handed_back_not_followed():
    async def answer(request):
        raise web.HTTPTemporaryRedirect("http://127.0.0.1:1/elsewhere")

    async with recorder() as upstream, gateway(upstream.url) as served, aiohttp.ClientSession() as session:
        upstream.answer = answer
        async with session.get(f"{served.base_url}/models", allow_redirects=False) as response:
            assert response.status == 307
        async with session.post(
            f"{served.base_url}/chat/completions", json={"model": MODEL, "messages": ask("x")}
        ) as response:
            assert response.status == 502
    assert len(upstream.requests) == 2


async def test_a_refusal_and_a_cut_answer_come_as_the_provider_sends_them():
    refusing = SimulatedEndpoint(latency=QUICK, faults=Faults("refusal", rate=1, on="all"))
    async with refusing as upstream, gateway(upstream) as served, sdk(served) as client:
        completion = await client.chat.completions.parse(model=MODEL, messages=ask("x"), response_format=Product)
        assert completion.choices[0].message.refusal
        assert completion.choices[0].message.parsed is None
        events = await client.chat.completions.create(model=MODEL, messages=ask("y"), stream=True)
        assert "".join([event.choices[0].delta.refusal or "" async for event in events])
    async with SimulatedEndpoint(latency=QUICK) as upstream, gateway(upstream) as served, sdk(served) as client:
        with pytest.raises(openai.LengthFinishReasonError):
            await client.chat.completions.parse(model=MODEL, messages=ask("x"), response_format=Product, max_tokens=3)


async def test_a_client_that_leaves_takes_its_call_along():
    latency = Latency(first_token=30, tokens_per_second=0)
    async with SimulatedEndpoint(latency=latency) as upstream, gateway(upstream) as served, sdk(served) as client:
        asked = asyncio.create_task(create(client, "x"))
        await until(lambda: upstream.calls)
        asked.cancel()
        await until(lambda: upstream.disconnects)
        await until(lambda: not served.stats().in_flight)
        assert served.stats().cancelled == 1


async def test_priority_and_cache_are_chosen_by_headers():
    cache = mb.MemoryCache()
    async with Watched() as upstream, gateway(upstream, cache=cache) as served, sdk(served) as client:

        async def route(text, **headers):
            asked = await client.chat.completions.with_raw_response.create(
                model=MODEL, messages=ask(text), extra_headers={f"X-Microbatch-{n}": v for n, v in headers.items()}
            )
            return asked.headers["X-Microbatch-Route"]

        assert [await route("x"), await route("x"), await route("x", Cache="no")] == ["single", "cache", "single"]
        assert [await route("x", Cache="refresh"), await route("x")] == ["single", "cache"]
        await route("y", Priority="high")
        assert served.stats().singles_by_reason["high"] == 1
        with pytest.raises(openai.BadRequestError, match="X-Microbatch-Priority must be one of high, normal, low"):
            await route("z", Priority="urgent")
        with pytest.raises(openai.BadRequestError, match="X-Microbatch-Cache"):
            await route("z", Cache="maybe")


async def test_headers_of_the_client_software_split_no_lane():
    async with Watched() as upstream, gateway(upstream, policy=company_of(4)) as served, sdk(served) as client:
        await asyncio.gather(
            *(create(client, f"t{n}", extra_headers={"X-Request-Id": str(n), "traceparent": str(n)}) for n in range(4))
        )
    assert upstream.calls == 1


async def test_lane_headers_go_along_and_split_lanes():
    named = {"lane_headers": ["X-Team"], "retry": ONE_ATTEMPT}
    async with recorder() as upstream, gateway(upstream.url, **named) as served, sdk(served) as client:
        for team in ("red", "blue"):
            with pytest.raises(openai.APIStatusError):
                await create(client, "x", extra_headers={"x-team": team, "x-other": "1"})
    assert [request[2]["X-Team"] for request in upstream.requests] == ["red", "blue"]
    assert not any("x-other" in request[2] for request in upstream.requests)


async def test_an_unreachable_upstream_is_told_without_a_retry_of_the_sdk():
    async with gateway("http://127.0.0.1:9/v1", retry=ONE_ATTEMPT) as served, sdk(served) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await create(client, "x")
        assert (caught.value.status_code, caught.value.code) == (502, "upstream_unreachable")
        assert caught.value.response.headers["x-should-retry"] == "false"
        with pytest.raises(openai.InternalServerError) as caught:
            await client.with_options(max_retries=0).models.list()
        assert "x-should-retry" not in caught.value.response.headers


async def test_a_request_timeout_ends_a_request():
    latency = Latency(first_token=30, tokens_per_second=0)
    settings = GatewaySettings(request_timeout=0.2)
    slow = SimulatedEndpoint(latency=latency)
    async with slow as upstream, gateway(upstream, settings=settings) as served, sdk(served) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await create(client, "x")
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")


async def test_stats_are_the_batchers():
    async with Watched() as upstream, gateway(upstream, policy=company_of(3)) as served, sdk(served) as client:
        await asyncio.gather(*(create(client, f"t{number}") for number in range(3)))
        async with aiohttp.ClientSession() as session, session.get(served.base_url[:-3] + "/stats") as response:
            stats = await response.json()
    assert (stats["items"], stats["answered"], stats["upstream_calls"]) == (3, 3, 1)


async def test_a_gateway_whose_opening_is_cancelled_leaves_no_batcher_open():
    class Unreachable(mb.MemoryCache):
        async def secret(self):
            await asyncio.sleep(60)

    served = gateway("http://127.0.0.1:9/v1", cache=Unreachable())
    opening = asyncio.ensure_future(served.open())
    await until(lambda: repr(served.batcher).startswith("Microbatcher(open"))
    opening.cancel()
    await asyncio.wait([opening])
    assert opening.cancelled()
    assert repr(served.batcher).startswith("Microbatcher(closed")
