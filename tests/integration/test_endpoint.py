"""The simulated endpoint over real sockets, seen by a plain HTTP client."""

from __future__ import annotations

import asyncio
import errno
import gc
import io
import json
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
import pytest
import pytest_asyncio
from helpers import PATIENCE, each, in_time, until

from microbatch.errors import ConfigError
from microbatch.messages import Usage
from microbatch.testing.counting import split
from microbatch.testing.endpoint import SimulatedEndpoint
from microbatch.testing.faults import Faults
from microbatch.testing.pace import Latency
from microbatch.testing.quota import Quota

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from microbatch.testing.reading import Prompt

pytestmark = pytest.mark.slow

TEXTS = [f"Product: thing number {number}\nIt is green, and somewhat useful. 日本 🧿" for number in range(16)]
IDS = [f"{number}bcd{'fghjkmnpqrstvwxz'[number - 1]}f" for number in range(1, 17)]
COLOUR = {"enum": ["red", "green", "blue"]}


def combined(schema: dict | None = None, **fields: Any) -> dict[str, Any]:
    words = f" JSON Schema: {json.dumps(schema)}" if schema is not None else ""
    lines = "".join(f"[{name}] {json.dumps(text)}\n" for name, text in zip(IDS, TEXTS, strict=True))
    prompt = 'Reply {"results":[{"id":"...","answer":...}]}.' + words + "\n" + lines
    return {"model": "m", "messages": [{"role": "user", "content": prompt}], **fields}


def single(text: str = TEXTS[0], **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **fields}


class Streamed(NamedTuple):
    events: list[dict[str, Any]]
    times: list[float]
    done: bool

    @property
    def deltas(self) -> list[dict[str, Any]]:
        return [event["choices"][0]["delta"] for event in self.events if event["choices"]]

    @property
    def text(self) -> str:
        return "".join(delta.get("content") or "" for delta in self.deltas)

    @property
    def finish_reasons(self) -> list[str | None]:
        return [event["choices"][0]["finish_reason"] for event in self.events if event["choices"]]


@pytest_asyncio.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=40)) as session:
        yield session


async def post(
    client: aiohttp.ClientSession, endpoint: SimulatedEndpoint, body: dict, **headers: str
) -> tuple[int, dict]:
    async with client.post(f"{endpoint.base_url}/chat/completions", json=body, headers=headers) as response:
        assert response.content_type == "application/json"
        return response.status, await response.json()


async def stream(client: aiohttp.ClientSession, endpoint: SimulatedEndpoint, body: dict) -> Streamed:
    streamed = Streamed([], [], done=False)
    start = time.perf_counter()
    url = f"{endpoint.base_url}/chat/completions"
    async with client.post(url, json={**body, "stream": True}) as response:
        assert (response.status, response.content_type) == (200, "text/event-stream")
        async for line in response.content:
            if line == b"data: [DONE]\n":
                streamed = streamed._replace(done=True)
            elif line != b"\n":
                streamed.events.append(json.loads(line.removeprefix(b"data: ")))
                streamed.times.append(time.perf_counter() - start)
    return streamed


def content(body: dict[str, Any]) -> str:
    return body["choices"][0]["message"]["content"]


async def drain(response: aiohttp.ClientResponse, into: bytearray) -> None:
    async for chunk in response.content.iter_any():
        into += chunk


# Replies


async def test_a_call_is_answered_in_the_shape_of_a_chat_completion(client):
    async with SimulatedEndpoint(answer=lambda text, schema: "Yes.") as endpoint:
        status, body = await post(client, endpoint, single())
    assert status == 200
    assert (body["object"], body["model"]) == ("chat.completion", "m")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Yes.", "refusal": None}
    assert choice["finish_reason"] == "stop"
    usage = body["usage"]
    assert usage["completion_tokens"] == split("Yes.").tokens
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


async def test_batched_answers_equal_single_answers_streamed_or_not(client):
    wrapped = {
        "type": "object",
        "properties": {"answer": COLOUR},
        "required": ["answer"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "reply", "strict": True, "schema": wrapped}}
    async with SimulatedEndpoint() as endpoint:
        for schema in (None, COLOUR):
            _, body = await post(client, endpoint, combined(schema))
            streamed = await stream(client, endpoint, combined(schema))
            assert streamed.text == content(body)
            answers = {each["id"]: each["answer"] for each in json.loads(content(body))["results"]}
            assert list(answers) == IDS
            for name, text in zip(IDS, TEXTS, strict=True):
                extra = {} if schema is None else {"response_format": form}
                _, alone = await post(client, endpoint, single(text, **extra))
                answer = content(alone) if schema is None else json.loads(content(alone))["answer"]
                assert answer == answers[name]
        assert (endpoint.calls, endpoint.combined_calls, endpoint.single_calls) == (36, 4, 32)
        assert endpoint.items == 4 * 16 + 32


async def test_a_stream_has_the_role_then_one_token_an_event_then_the_end(client):
    text = "Ein kurzer Satz, 日本語 🧿🪬 inbegriffen."
    async with SimulatedEndpoint(answer=lambda *_: text) as endpoint:
        plain = await stream(client, endpoint, single())
        counted = await stream(client, endpoint, single(stream_options={"include_usage": True}))
    assert plain.deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert [delta["content"] for delta in plain.deltas[1:-1]] == split(text).texts
    assert plain.deltas[-1] == {}
    assert plain.finish_reasons == [None] * (len(plain.events) - 1) + ["stop"]
    assert plain.done
    assert not any("usage" in event for event in plain.events)
    assert counted.events[-1]["choices"] == []
    assert counted.events[-1]["usage"]["completion_tokens"] == split(text).tokens
    assert [event["usage"] for event in counted.events[:-1]] == [None] * (len(counted.events) - 1)
    assert counted.text == plain.text
    assert counted.done


async def test_counters_add_up_to_what_was_reported(client):
    total = Usage()
    async with SimulatedEndpoint() as endpoint:
        _, body = await post(client, endpoint, single())
        total += Usage(body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"])
        last = (await stream(client, endpoint, combined(stream_options={"include_usage": True}))).events[-1]
        total += Usage(last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"])
        assert endpoint.reported == total
        assert (endpoint.prompt_tokens, endpoint.completion_tokens) == (total.prompt_tokens, total.completion_tokens)
        await stream(client, endpoint, single())
        assert endpoint.reported == total
        assert endpoint.prompt_tokens > total.prompt_tokens


async def test_max_tokens_cuts_a_stream_with_length(client):
    async with SimulatedEndpoint() as endpoint:
        streamed = await stream(client, endpoint, single(max_completion_tokens=3))
    assert streamed.finish_reasons[-1] == "length"
    assert len(streamed.deltas) == 5
    assert streamed.done


async def test_requests_are_recorded_when_asked(client):
    async with SimulatedEndpoint(record=True) as endpoint:
        _, body = await post(client, endpoint, single(seed=3))
        assert endpoint.requests == [single(seed=3)]
        assert endpoint.replies == [content(body)]


# Time


async def test_tokens_are_streamed_at_their_rate(client):
    latency = Latency(first_token=0.1, tokens_per_second=200)
    last = 0.1 + (split("word " * 40).tokens - 1) / 200

    async def streamed():
        times = (await stream(client, endpoint, single())).times
        assert times[0] >= 0.099
        assert times[-1] >= last - 0.001
        for number, moment in enumerate(times[1:-1]):
            assert moment >= 0.099 + number / 200

    async with SimulatedEndpoint(latency=latency, answer=lambda *_: "word " * 40) as endpoint:
        await in_time(streamed, last + 0.5)
        assert await in_time(lambda: post(client, endpoint, single()), last + 0.5) >= last - 0.001


async def test_a_rate_beyond_the_clock_is_kept_by_writing_several_tokens_at_once(client):
    latency = Latency(first_token=0, tokens_per_second=20_000)
    async with SimulatedEndpoint(latency=latency, answer=lambda *_: "word " * 300) as endpoint:
        streamed = await stream(client, endpoint, combined())
        # The clock goes by milliseconds: one token at each of its ticks would be 1,000 in a second.
        await in_time(lambda: stream(client, endpoint, combined()), len(streamed.events) / 2_000)
    assert len(streamed.events) > 4_000


async def test_elements_arrive_whole_one_by_one(client):
    async def one_by_one():
        streamed = await stream(client, endpoint, combined(COLOUR))
        text, closed = "", {}
        for delta, moment in zip(streamed.deltas, streamed.times, strict=True):
            text += delta.get("content") or ""
            closed.setdefault(text.count('"}'), moment)
        # Of what a loaded machine is late with, more than one may come at once.
        for number in range(1, 17):
            assert min(moment for count, moment in closed.items() if count >= number) >= 0.05 + 0.02 * number - 0.001

    async with SimulatedEndpoint(latency=Latency(first_token=0.05, element=0.02)) as endpoint:
        await in_time(one_by_one, 0.05 + 0.02 * 16 + 0.3)


# Refusals


async def test_answers_and_refusals_say_in_their_headers_what_is_left_of_the_quota(client):
    async def ask(key: str, **fields: Any) -> tuple[int, dict[str, str], bytes]:
        url = f"{endpoint.base_url}/chat/completions"
        async with client.post(url, json=single(**fields), headers={"Authorization": f"Bearer {key}"}) as response:
            found = {name.lower(): value for name, value in response.headers.items()}
            return response.status, found, await response.read()

    def told(headers: dict[str, str], what: str) -> list[str]:
        return [headers[f"x-ratelimit-{name}-{what}"] for name in ("limit", "remaining", "reset")]

    tokens = SimulatedEndpoint().read(single()).tokens
    async with SimulatedEndpoint(quota=Quota(rpm=4, tpm=1_000)) as endpoint:
        status, headers, _ = await ask("a", max_tokens=600 - tokens)
        assert (status, told(headers, "requests"), told(headers, "tokens")) == (
            200,
            ["4", "3", "1m0s"],
            ["1000", "400", "1m0s"],
        )
        status, headers, raw = await ask("a", max_tokens=100 - tokens, stream=True)
        assert (status, told(headers, "tokens")) == (200, ["1000", "300", "1m0s"])
        assert raw.endswith(b"data: [DONE]\n\n")
        status, headers, raw = await ask("a", max_tokens=301 - tokens, stream=True)
        assert (status, told(headers, "requests"), told(headers, "tokens")[:2]) == (
            429,
            ["4", "1", "1m0s"],
            ["1000", "300"],
        )
        assert 50 < float(headers["retry-after"]) <= 60
        assert headers["retry-after-ms"] == f"{float(headers['retry-after']) * 1_000:.0f}"
        error = json.loads(raw)["error"]
        assert error.pop("message").startswith(
            "Rate limit reached for m on tokens per min (TPM): Limit 1000, Used 700, Requested 301. "
        )
        assert error == {"type": "tokens", "param": None, "code": "rate_limit_exceeded"}
        status, headers, _ = await ask("a", temperature=0, stream_options={})
        assert (status, told(headers, "requests")[1], "retry-after" in headers) == (400, "0", False)
        status, headers, raw = await ask("a", max_tokens=5)
        assert (status, json.loads(raw)["error"]["type"]) == (429, "requests")
        status, headers, raw = await ask("b", max_tokens=1_001)
        assert (status, "retry-after" in headers, "retry-after-ms" in headers) == (429, False, False)
        assert b"Request too large for m" in raw
        assert (await ask("b", max_tokens=900))[0] == 200
        assert (endpoint.quota_refusals, endpoint.peak_requests, endpoint.peak_tokens) == (3, 3, tokens + 900)
    async with SimulatedEndpoint() as endpoint:
        assert not any(name.startswith("x-ratelimit") for name in (await ask("a"))[1])


async def test_keys_are_checked_when_there_are_any(client):
    async with SimulatedEndpoint(api_keys={"sk-right"}) as endpoint:
        assert (await post(client, endpoint, single(), Authorization="Bearer sk-right"))[0] == 200
        status, body = await post(client, endpoint, single(), Authorization="Bearer sk-wrong-key-of-mine")
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        assert body["error"]["message"].startswith("Incorrect API key provided: sk-w********mine")
        for headers in ({}, {"Authorization": "Basic sk-right"}, {"Authorization": "Bearer"}):
            status, body = await post(client, endpoint, single(), **headers)
            assert (status, body["error"]["code"]) == (401, None)
        async with client.get(f"{endpoint.base_url}/models") as response:
            assert response.status == 401
        assert endpoint.calls == 1


async def test_models_are_listed_and_any_is_served(client):
    async with SimulatedEndpoint(models=["one", "two"]) as endpoint:
        async with client.get(f"{endpoint.base_url}/models") as response:
            listed = await response.json()
        assert [model["id"] for model in listed["data"]] == ["one", "two"]
        assert (await post(client, endpoint, {**single(), "model": "three"}))[1]["model"] == "three"


async def test_an_unknown_route_is_a_404_in_json(client):
    async with SimulatedEndpoint() as endpoint, client.get(f"{endpoint.base_url}/embeddings") as response:
        assert response.status == 404
        error = (await response.json())["error"]
        assert error["message"] == "Invalid URL (GET /v1/embeddings)"
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"model": "\xff"}', b"[" * 100_000])
async def test_a_malformed_body_is_a_400_in_json(client, raw):
    async with SimulatedEndpoint() as endpoint:
        async with client.post(f"{endpoint.base_url}/chat/completions", data=raw) as response:
            assert response.status == 400
            assert "could not parse" in (await response.json())["error"]["message"]
        assert endpoint.calls == 0


@pytest.mark.parametrize(
    ("options", "fields", "status", "kind", "code"),
    [
        ({"json_schema": "400"}, {"response_format": "schema"}, 400, "invalid_request_error", "unsupported_value"),
        ({"json_schema": "500"}, {"response_format": "schema"}, 500, "internal_server_error", None),
        (
            {"json_object": "400"},
            {"response_format": {"type": "json_object"}},
            400,
            "invalid_request_error",
            "unsupported_value",
        ),
        (
            {"max_tokens_name": "max_completion_tokens"},
            {"max_tokens": 5},
            400,
            "invalid_request_error",
            "unsupported_parameter",
        ),
        ({"temperature_fixed": True}, {"temperature": 0.5}, 400, "invalid_request_error", "unsupported_value"),
        ({"stream_supported": False}, {"stream": True}, 400, "invalid_request_error", "unsupported_value"),
        ({"context_tokens": 10}, {}, 400, "invalid_request_error", "context_length_exceeded"),
    ],
)
async def test_what_is_not_supported_is_refused_before_anything_is_streamed(
    client, options, fields, status, kind, code
):
    if fields.get("response_format") == "schema":
        schema = {"type": "object", "properties": {}}
        fields = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    async with SimulatedEndpoint(**options) as endpoint:
        found, body = await post(client, endpoint, single(**fields))
        assert (found, body["error"]["type"], body["error"]["code"]) == (status, kind, code)
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert (endpoint.calls, endpoint.single_calls, endpoint.prompt_tokens) == (1, 0, 0)


async def test_ignored_stream_options_report_no_usage(client):
    async with SimulatedEndpoint(stream_options="ignored") as endpoint:
        streamed = await stream(client, endpoint, single(stream_options={"include_usage": True}))
        assert not any("usage" in event for event in streamed.events)
        assert streamed.done
        assert endpoint.reported == Usage()


async def test_a_long_prompt_is_counted_off_the_loop_and_a_short_one_on_it(client):
    threads = []

    class Watched(SimulatedEndpoint):
        def read(self, body: dict[str, Any]) -> Prompt:
            threads.append(threading.get_ident())
            return super().read(body)

    async with Watched() as endpoint:
        raw = io.BytesIO(json.dumps(single("some words of a long text " * 50_000)).encode())
        async with client.post(f"{endpoint.base_url}/chat/completions", data=raw) as response:
            assert response.status == 200
            assert (await response.json())["usage"]["prompt_tokens"] > 250_000
        await post(client, endpoint, single())
    assert [thread == threading.get_ident() for thread in threads] == [False, True]


# Faults


@pytest.mark.parametrize(
    "kind", ["missing", "duplicate", "shifted_back", "shifted_forward", "unknown", "renamed", "reordered"]
)
async def test_faults_of_elements_are_seen_streamed_or_not(client, kind):
    async with SimulatedEndpoint(faults=Faults(kind, rate=1)) as endpoint:
        _, body = await post(client, endpoint, combined(COLOUR))
        elements = json.loads(content(body))["results"]
        assert [element["id"] for element in elements] != IDS
        streamed = await stream(client, endpoint, combined(COLOUR))
        assert [element["id"] for element in json.loads(streamed.text)["results"]] != IDS
        assert endpoint.faulted == 2
        assert not content((await post(client, endpoint, single()))[1]).isspace()


@pytest.mark.parametrize("kind", ["broken_json", "fenced", "whitespace", "truncated"])
async def test_faults_of_the_text_are_no_json(client, kind):
    async with SimulatedEndpoint(faults=Faults(kind, rate=1)) as endpoint:
        _, body = await post(client, endpoint, combined())
        streamed = await stream(client, endpoint, combined())
    for text in (content(body), streamed.text):
        with pytest.raises(json.JSONDecodeError):
            json.loads(text)
    expected = "length" if kind == "truncated" else "stop"
    assert streamed.finish_reasons[-1] == body["choices"][0]["finish_reason"] == expected
    assert streamed.done


async def test_empty_results_and_wrong_types_are_json(client):
    async with SimulatedEndpoint(faults=Faults("empty_results", rate=1)) as endpoint:
        assert content((await post(client, endpoint, combined()))[1]) == '{"results":[]}'
    async with SimulatedEndpoint(faults=Faults("wrong_type", rate=1)) as endpoint:
        elements = json.loads(content((await post(client, endpoint, combined(COLOUR)))[1]))["results"]
        assert sum(element["answer"] not in COLOUR["enum"] for element in elements) == 1


async def test_a_refusal_takes_the_place_of_the_content(client):
    async with SimulatedEndpoint(faults=Faults("refusal", rate=1)) as endpoint:
        _, body = await post(client, endpoint, combined())
        streamed = await stream(client, endpoint, combined())
    message = body["choices"][0]["message"]
    assert message["content"] is None
    assert "sorry" in message["refusal"]
    assert "".join(delta.get("refusal") or "" for delta in streamed.deltas) == message["refusal"]
    assert streamed.text == ""


async def test_a_filter_answers_400_or_cuts_the_reply(client):
    async with SimulatedEndpoint(faults=Faults("filtered", rate=1)) as endpoint:
        seen = set()
        for _ in range(12):
            status, body = await post(client, endpoint, combined())
            seen.add((status, body["error"]["code"] if status == 400 else body["choices"][0]["finish_reason"]))
    assert seen == {(400, "content_filter"), (200, "content_filter")}


async def test_a_cut_stream_ends_without_finish_reason_usage_or_done(client):
    async with SimulatedEndpoint(faults=Faults("cut", rate=1)) as endpoint:
        streamed = await stream(client, endpoint, combined(stream_options={"include_usage": True}))
        assert streamed.text
        assert set(streamed.finish_reasons) == {None}
        assert not streamed.done
        assert endpoint.reported == Usage()
        _, body = await post(client, endpoint, combined())
        assert body["choices"][0]["finish_reason"] is None


async def test_a_reset_breaks_the_connection_in_the_middle(client):
    async with SimulatedEndpoint(faults=Faults("reset", rate=1)) as endpoint:
        for streamed in (True, False):
            url = f"{endpoint.base_url}/chat/completions"
            async with client.post(url, json=combined(stream=streamed)) as response:
                received = bytearray()
                with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ClientConnectionError)):
                    await drain(response, received)
            assert received
            assert b"[DONE]" not in received
        assert endpoint.disconnects == 0


@pytest.mark.parametrize(("kind", "status"), [("http_400", 400), ("http_429", 429), ("http_500", 500)])
async def test_faults_that_are_error_responses_have_their_status(client, kind, status):
    async with (
        SimulatedEndpoint(faults=Faults(kind, rate=1, retry_after=1.5)) as endpoint,
        client.post(f"{endpoint.base_url}/chat/completions", json=combined()) as response,
    ):
        assert response.status == status
        assert set((await response.json())["error"]) == {"message", "type", "param", "code"}
        assert response.headers.get("retry-after") == ("1.5" if status == 429 else None)
        assert response.headers.get("retry-after-ms") == ("1500" if status == 429 else None)
        assert response.headers["x-request-id"] == "req_00000001"


@pytest.mark.parametrize("kind", ["hang", "stall"])
@pytest.mark.parametrize("streamed", [True, False])
async def test_silence_lasts_until_the_client_leaves(client, kind, streamed):
    async with SimulatedEndpoint(faults=Faults(kind, rate=1)) as endpoint:
        url = f"{endpoint.base_url}/chat/completions"
        received = bytearray()

        async def listen() -> None:
            async with client.post(url, json=combined(stream=streamed)) as response:
                await drain(response, received)

        listening = asyncio.create_task(listen())
        await until(lambda: received if kind == "stall" else endpoint.calls)
        await asyncio.sleep(0.15)
        assert bool(received) is (kind == "stall")
        assert not listening.done()
        assert endpoint.disconnects == 0
        listening.cancel()
        await until(lambda: endpoint.disconnects == 1)


async def test_the_same_seed_spoils_the_same_replies(client):
    async def run(seed: int) -> list[str]:
        faults = Faults(["missing", "whitespace", "broken_json"], rate=0.5, on="all", seed=seed)
        async with SimulatedEndpoint(faults=faults) as endpoint:
            return [content((await post(client, endpoint, body))[1]) for body in [combined(), single()] * 6]

    first = await run(1)
    assert first == await run(1)
    assert first != await run(2)


# Coming and going


async def test_a_client_that_leaves_in_mid_stream_is_counted_and_nobody_complains(client, caplog):
    async with SimulatedEndpoint(latency=Latency(first_token=0, tokens_per_second=50)) as endpoint:
        for _ in range(3):
            async with client.post(f"{endpoint.base_url}/chat/completions", json=combined(stream=True)) as response:
                await response.content.readany()
        await until(lambda: endpoint.disconnects == 3)
        endpoint.latency = Latency(first_token=0, tokens_per_second=None)
        assert (await stream(client, endpoint, combined())).done
        assert endpoint.disconnects == 3
    assert caplog.records == []


async def test_closing_cuts_off_everybody_at_once_and_leaves_nothing_behind(client, caplog):
    before = asyncio.all_tasks()
    endpoint = SimulatedEndpoint(latency=Latency(first_token=0, tokens_per_second=1))
    async with endpoint:
        url = f"{endpoint.base_url}/chat/completions"
        streaming = asyncio.create_task(stream(client, endpoint, combined()))
        waiting = asyncio.create_task(post(client, endpoint, combined()))
        await until(lambda: endpoint.combined_calls == 2)
        endpoint.faults = Faults("hang", rate=1)
        hanging = asyncio.create_task(client.post(url, json=combined()))
        await until(lambda: endpoint.combined_calls == 3)
        start = time.perf_counter()
    assert time.perf_counter() - start < 10
    for task in (streaming, waiting, hanging):
        with pytest.raises(aiohttp.ClientError):
            await task
    assert endpoint.disconnects == 0
    await until(lambda: asyncio.all_tasks() <= before)
    gc.collect()
    assert caplog.records == []


async def test_an_endpoint_opens_again_on_the_same_port(client):
    endpoint = SimulatedEndpoint()
    with pytest.raises(ConfigError, match="opened"):
        _ = endpoint.base_url
    async with endpoint:
        base_url = endpoint.base_url
    with pytest.raises(aiohttp.ClientConnectionError):
        await post(client, endpoint, single())
    async with endpoint:
        assert endpoint.base_url == base_url
        assert (await post(client, endpoint, single()))[0] == 200
    await endpoint.aclose()


async def test_a_taken_port_is_an_os_error():
    async with SimulatedEndpoint() as endpoint:
        with pytest.raises(OSError) as caught:  # noqa: PT011 its words are the system's
            await SimulatedEndpoint(port=endpoint.port).open()
        assert caught.value.errno == errno.EADDRINUSE


async def test_a_combined_reply_of_16_items_costs_little(client):
    async with SimulatedEndpoint() as endpoint:
        await stream(client, endpoint, combined())
        costs = []
        for _ in range(20):
            start = time.process_time()
            endpoint.reply(endpoint.read(combined()))
            costs.append(time.process_time() - start)
        assert min(costs) < 0.01


@each("turns", range(6))
async def test_connections_made_a_moment_before_the_end_are_closed(turns):
    """asyncio takes several turns of the loop to announce a connection; one in between was left open."""
    connections = []
    async with SimulatedEndpoint() as endpoint:
        for _ in range(turns):
            connections.append(socket.create_connection((endpoint.host, endpoint.port), timeout=PATIENCE))
            await asyncio.sleep(0)
    for connection in connections:
        with connection, suppress(ConnectionResetError):
            assert await asyncio.to_thread(connection.recv, 1) == b""
