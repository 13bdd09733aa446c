"""`microbatch.openai` beside the real SDK: the same requests to the same endpoint, and the same objects back."""

from __future__ import annotations

import asyncio
import gc
import json
from contextlib import asynccontextmanager
from typing import Literal

import msgspec
import openai
import pydantic
import pytest
from aiohttp import web
from helpers import ask
from openai.types.chat import ChatCompletion as SDKCompletion
from openai.types.chat import ChatCompletionChunk as SDKChunk

import microbatch as mb
from microbatch.openai import AsyncOpenAI
from microbatch.testing import Latency, SimulatedEndpoint

pytestmark = pytest.mark.slow

KEY = "sk-canary-0123456789"
PATIENCE = 20.0
OTHER_KEY = "canary0123456789"  # of no known form
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Product(pydantic.BaseModel):
    category: Literal["home", "other"]
    tags: list[str]


class Struct(msgspec.Struct):
    category: Literal["home", "other"]
    tags: list[str]


def said(*choices, **more):
    """The body of a completion with these messages and finish reasons."""
    return {
        "id": "chatcmpl-abc",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "m-2025-01-01",
        "system_fingerprint": "fp_1",
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "refusal": None, "annotations": []} | message,
                "logprobs": None,
                "finish_reason": finish_reason,
            }
            for index, (message, finish_reason) in enumerate(choices)
        ],
        "usage": {
            "prompt_tokens": 20,
            "completion_tokens": 8,
            "total_tokens": 28,
            "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 2},
        },
    } | more


CALLS = {
    "content": None,
    "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}},
        {"id": "call_2", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bergen"}'}},
    ],
}
LOGPROBS = {"content": [{"token": "Hi", "bytes": [72, 105], "logprob": -0.1, "top_logprobs": []}], "refusal": None}


class Replaying:
    """An endpoint that says what it is told, and keeps what it was asked.

    Attributes:
        answer: The body of the next answers: a dict, or the events of a stream as bytes.
        bodies: The requests' bodies.
        headers: Their headers.
        gone: Set when a client has left a stream before its end.
    """

    def __init__(self):
        self.answer = said(({"content": "Hi"}, "stop"))
        self.status = 200
        self.content_type = "text/event-stream"
        self.bodies, self.headers = [], []
        self.wait = asyncio.Event()
        self.wait.set()
        self.gone = asyncio.Event()

    async def handle(self, request):
        self.bodies.append(await request.json())
        self.headers.append(request.headers)
        await self.wait.wait()
        if isinstance(self.answer, dict):
            return web.json_response(self.answer, status=self.status, headers={"x-request-id": "req_1"})
        response = web.StreamResponse(headers={"Content-Type": self.content_type})
        await response.prepare(request)
        try:
            for piece in self.answer:
                await response.write(piece)
                if not piece:
                    await asyncio.Event().wait()
        except (asyncio.CancelledError, ConnectionError):
            self.gone.set()
            raise
        return response


@asynccontextmanager
async def replaying():
    endpoint = Replaying()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", endpoint.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    endpoint.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield endpoint
    finally:
        await runner.cleanup()


@asynccontextmanager
async def both(endpoint, **policy):
    """Our client and the SDK's, of the same endpoint."""
    batcher = mb.Microbatcher(
        mb.OpenAIChat("m", base_url=endpoint.base_url, api_key=KEY),
        policy=mb.FlushPolicy(**policy),
        retry=mb.RetryPolicy(base=0.01, cap=0.01),
        tokens="bytes",
    )
    async with (
        AsyncOpenAI(batcher) as ours,
        openai.AsyncOpenAI(base_url=endpoint.base_url, api_key=KEY, max_retries=0) as theirs,
    ):
        yield ours, theirs


def told(completion):
    """What a completion says, less what no two calls have in common."""
    members = completion.to_dict()
    assert members.pop("id").startswith("chatcmpl-")
    assert members.pop("created") > 0
    return members


# --- text and parsed answers, combined or not


async def test_one_request_alone_is_answered_as_the_sdk_is():
    async with SimulatedEndpoint() as endpoint, both(endpoint) as (ours, theirs):
        request = {"model": "m", "messages": ask("A lamp")}
        mine = await ours.chat.completions.create(**request)
        assert told(mine) == told(await theirs.chat.completions.create(**request))
        assert mine.microbatch.route == "single"
        assert mine._request_id == "req_00000001"


async def test_concurrent_requests_share_a_call_and_look_as_if_each_had_gone_alone():
    async with SimulatedEndpoint() as endpoint, both(endpoint, idle="wait", max_batch_size=8) as (ours, theirs):
        requests = [{"model": "m", "messages": ask(f"Lamp {number}"), "temperature": 0.5} for number in range(8)]
        mine = await asyncio.gather(*(ours.chat.completions.create(**request) for request in requests))
        assert endpoint.calls == 1
        assert len({completion.id for completion in mine}) == 8
        for completion in mine:
            await completion.settled()
            assert not completion.usage.microbatch_estimated
        for field in ("prompt_tokens", "completion_tokens"):
            assert sum(getattr(each.usage, field) for each in mine) == getattr(endpoint.reported, field)
        for request, completion in zip(requests, mine, strict=True):
            assert completion.microbatch.route == "batch"
            read = SDKCompletion.model_validate(completion.model_dump())
            assert read.model_dump(exclude_none=True) == completion.model_dump(exclude_none=True)
            same, other = told(completion), told(await theirs.chat.completions.create(**request))
            assert same.pop("usage").keys() <= other.pop("usage").keys()
            assert same == other


async def test_usage_is_marked_as_an_estimate_until_the_call_has_ended():
    latency = Latency(first_token=0.0, tokens_per_second=400.0)
    async with (
        SimulatedEndpoint(latency=latency) as endpoint,
        both(endpoint, idle="wait", max_batch_size=2) as (ours, _),
    ):
        asked = [
            ours.chat.completions.create(messages=ask(text)) for text in ("A lamp", "A far longer text about a lamp")
        ]
        tasks = [asyncio.ensure_future(each) for each in asked]
        done, _pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        first = done.pop().result()
        estimate = first.usage.total_tokens
        assert first.usage.microbatch_estimated
        assert first.to_dict()["usage"]["microbatch_estimated"] is True
        await first.settled()
        assert not first.usage.microbatch_estimated
        assert (
            first.usage.total_tokens == first.microbatch.usage.prompt_tokens + first.microbatch.usage.completion_tokens
        )
        assert first.usage.total_tokens != estimate
        await asyncio.wait(tasks)


@pytest.mark.parametrize("together", [1, 4])
async def test_parsed_answers_are_the_sdks(together):
    async with (
        SimulatedEndpoint() as endpoint,
        both(endpoint, max_batch_size=together, idle="wait", max_wait=PATIENCE) as (ours, theirs),
    ):
        requests = [{"model": "m", "messages": ask(f"Lamp {n}"), "response_format": Product} for n in range(together)]
        mine = await asyncio.gather(*(ours.chat.completions.parse(**request) for request in requests))
        assert endpoint.calls == 1
        for request, completion in zip(requests, mine, strict=True):
            other = await theirs.chat.completions.parse(**request)
            message = completion.choices[0].message
            assert isinstance(message.parsed, Product)
            assert message.parsed == other.choices[0].message.parsed
            assert json.loads(message.content) == json.loads(other.choices[0].message.content)
            assert (
                message.model_dump(exclude_none=True).keys()
                == other.choices[0].message.model_dump(exclude_none=True, warnings=False).keys()
            )
            assert completion.model_dump()["choices"][0]["message"]["parsed"] == message.parsed.model_dump()


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("output_type", [Struct, Literal["home", "other"], list[int], Product | None, str])
async def test_whatever_submit_decodes_can_be_parsed(output_type, together):
    async with (
        SimulatedEndpoint() as endpoint,
        both(endpoint, max_batch_size=together, idle="wait", max_wait=PATIENCE) as (ours, _),
    ):
        asked = [
            ours.chat.completions.parse(messages=ask(f"Lamp {number}"), response_format=output_type)
            for number in range(together)
        ]
        for completion in await asyncio.gather(*asked):
            message = completion.choices[0].message
            content = message.content if output_type is str else msgspec.json.decode(message.content)
            assert content == msgspec.to_builtins(message.parsed, enc_hook=Product.model_dump)
        assert endpoint.calls == 1


async def test_a_schema_as_json_is_kept_to_and_the_content_is_its_json():
    form = {
        "type": "json_schema",
        "json_schema": {"name": "n", "strict": True, "schema": TOOL["function"]["parameters"]},
    }
    async with (
        SimulatedEndpoint() as endpoint,
        both(endpoint, max_batch_size=3, idle="wait", max_wait=PATIENCE) as (ours, theirs),
    ):
        asked = [
            ours.chat.completions.create(model="m", messages=ask(f"Lamp {number}"), response_format=form)
            for number in range(3)
        ]
        completions = await asyncio.gather(*asked)
        other = await theirs.chat.completions.create(model="m", messages=ask("Lamp 0"), response_format=form)
        assert endpoint.calls == 2
    contents = [json.loads(completion.choices[0].message.content) for completion in completions]
    assert [list(content) for content in contents] == [["city"]] * 3
    assert contents[0] == json.loads(other.choices[0].message.content)
    assert completions[0].choices[0].message.parsed is None


async def test_fences_around_an_answer_that_keeps_to_a_schema_are_taken_off():
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": TOOL["function"]["parameters"]}}
    async with replaying() as endpoint, both(endpoint) as (ours, _):
        endpoint.answer = said(({"content": '```json\n{"city":"Oslo"}\n```'}, "stop"))
        completion = await ours.chat.completions.create(messages=ask("Hi"), response_format=form)
        assert completion.choices[0].message.content == '{"city":"Oslo"}'
        completion = await ours.chat.completions.create(messages=ask("Hi"), response_format=form, n=2)
        assert completion.to_dict() == endpoint.answer


async def test_tenants_priorities_and_the_cache_are_those_of_submit():
    async with SimulatedEndpoint() as endpoint:
        batcher = mb.Microbatcher(
            mb.OpenAIChat("m", base_url=endpoint.base_url, api_key=KEY),
            policy=mb.FlushPolicy(max_batch_size=2, idle="wait", max_wait=0.05),
            cache=mb.MemoryCache(),
            tokens="bytes",
        )
        async with AsyncOpenAI(batcher) as client:
            ask_for = client.chat.completions.create
            apart = await asyncio.gather(*(ask_for(messages=ask("A lamp"), tenant=name) for name in ("a", "b")))
            assert [each.microbatch.batch_size for each in apart] == [1, 1]
            assert (await ask_for(messages=ask("A chair"), priority="high")).microbatch.route == "single"
            known = await ask_for(messages=ask("A lamp"), tenant="a")
            assert (known.microbatch.route, known.usage.total_tokens, known.usage.microbatch_estimated) == (
                "cache",
                0,
                False,
            )
            assert known.choices[0].message.content == apart[0].choices[0].message.content
            assert (await ask_for(messages=ask("A lamp"), tenant="a", use_cache=False)).microbatch.route == "single"


# --- what goes alone


@pytest.mark.parametrize(
    ("more", "answer"),
    [
        ({"tools": [TOOL]}, said((CALLS, "tool_calls"))),
        ({"n": 2}, said(({"content": "Hi"}, "stop"), ({"content": "Ho"}, "length"))),
        ({"logprobs": True}, said(({"content": "Hi"}, "stop"))),
        ({"seed": 1, "stop": ["x"]}, said(({"content": "Hi"}, "stop"), service_tier="default")),
        ({"tools": [TOOL]}, said(({"content": None, "refusal": "No."}, "stop"))),
        (
            {"n": 2, "response_format": {"type": "json_object"}},
            said(({"content": "{}"}, "stop"), ({"content": "{}"}, "stop")),
        ),
        ({"tools": [TOOL], "max_tokens": 5}, said(({"content": None}, "content_filter"))),
    ],
)
async def test_what_cannot_be_combined_comes_back_as_the_endpoint_said_it(more, answer):
    answer["choices"][0]["logprobs"] = LOGPROBS if "logprobs" in more else None
    async with replaying() as endpoint, both(endpoint) as (ours, theirs):
        endpoint.answer = answer
        request = {"model": "m", "messages": ask("Hello JSON"), **more}
        mine = await ours.chat.completions.create(**request)
        other = await theirs.chat.completions.create(**request)
        assert mine.to_dict() == other.to_dict() == answer
        assert mine.model_dump(exclude_none=True) == other.model_dump(exclude_none=True)
        assert endpoint.bodies[0] == {**endpoint.bodies[1], "stream": False}
        assert mine.microbatch.route == "single"
        assert mine.microbatch.usage == mb.Usage(20, 8, 4, reasoning_tokens=2)


async def test_images_go_alone_as_they_are():
    parts = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
    ]
    async with replaying() as endpoint, both(endpoint) as (ours, theirs):
        request = {"model": "m", "messages": [{"role": "user", "content": parts}]}
        mine = await ours.chat.completions.create(**request)
        assert mine.to_dict() == (await theirs.chat.completions.create(**request)).to_dict() == endpoint.answer
        assert endpoint.bodies[0] == {**endpoint.bodies[1], "stream": False}


async def test_a_tool_loop_runs_with_the_messages_put_back():
    async with replaying() as endpoint, both(endpoint) as (ours, theirs):
        for client in (ours, theirs):
            messages = [{"role": "user", "content": "Weather?"}]
            endpoint.answer = said((CALLS, "tool_calls"))
            completion = await client.chat.completions.create(model="m", messages=messages, tools=[TOOL])
            messages.append(completion.choices[0].message)
            messages += [
                {"role": "tool", "tool_call_id": call.id, "content": json.loads(call.function.arguments)["city"]}
                for call in completion.choices[0].message.tool_calls
            ]
            endpoint.answer = said(({"content": "Rain."}, "stop"))
            completion = await client.chat.completions.create(model="m", messages=messages, tools=[TOOL])
            assert completion.choices[0].message.content == "Rain."
        sent = [
            [{name: value for name, value in message.items() if value is not None} for message in body["messages"]]
            for body in endpoint.bodies
        ]
        assert sent[1] == sent[3]


@pytest.mark.parametrize(
    ("more", "answer", "parsed"),
    [
        ({"tools": [TOOL]}, said((CALLS, "tool_calls")), [None]),
        (
            {"tools": [TOOL]},
            said(({"content": '{"category":"home","tags":[]}'}, "stop")),
            [Product(category="home", tags=[])],
        ),
        (
            {"n": 2},
            said(*[({"content": f'{{"category":"{word}","tags":[]}}'}, "stop") for word in ("home", "other")]),
            [Product(category="home", tags=[]), Product(category="other", tags=[])],
        ),
        ({"n": 2}, said(*[({"content": None, "refusal": "No."}, "stop")] * 2), [None, None]),
    ],
)
async def test_several_answers_and_tool_calls_are_parsed_as_the_sdk_does(more, answer, parsed):
    async with replaying() as endpoint, both(endpoint) as (ours, theirs):
        endpoint.answer = answer
        request = {"model": "m", "messages": ask("Hello"), "response_format": Product, **more}
        mine = await ours.chat.completions.parse(**request)
        other = await theirs.chat.completions.parse(**request)
        assert [choice.message.parsed for choice in mine.choices] == parsed
        dumps = [mine.model_dump(exclude_none=True), other.model_dump(exclude_none=True, warnings=False)]
        assert dumps[0] == dumps[1]
        schemas = [body["response_format"]["json_schema"] for body in endpoint.bodies]
        assert [schema["strict"] for schema in schemas] == [True, True]
        assert schemas[0]["schema"]["required"] == schemas[1]["schema"]["required"] == ["category", "tags"]
    for call in mine.choices[0].message.tool_calls or ():
        assert call.function.parsed_arguments == json.loads(call.function.arguments)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (said(({"content": '{"category":"home"'}, "length"), ({"content": "{}"}, "stop")), mb.TruncatedReply),
        (said(({"content": None}, "content_filter")), mb.Filtered),
        (said(({"content": '{"category":"none","tags":[]}'}, "stop")), mb.MalformedAnswer),
        (said(({"content": '{"category":"home","tags":[]}'}, "stop"), ({"content": "{}"}, "stop")), mb.MalformedAnswer),
        (
            said(
                (
                    CALLS
                    | {
                        "tool_calls": [
                            {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{"}}
                        ]
                    },
                    "tool_calls",
                )
            ),
            mb.MalformedAnswer,
        ),
    ],
)
async def test_what_cannot_be_parsed_is_an_error_without_its_words(answer, error):
    async with replaying() as endpoint, both(endpoint) as (ours, _):
        endpoint.answer = answer
        with pytest.raises(error) as caught:
            await ours.chat.completions.parse(messages=ask("Hi"), response_format=Product, n=2, tools=[TOOL])
    assert "none" not in str(caught.value)


# --- streams


def joined(chunks):
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


@pytest.mark.parametrize("more", [{}, {"stream_options": {"include_usage": True}}, {"max_completion_tokens": 5}])
async def test_streams_are_the_sdks_chunk_by_chunk(more):
    async with SimulatedEndpoint(record=True) as endpoint, both(endpoint) as (ours, theirs):
        request = {"model": "m", "messages": ask("A lamp"), "stream": True, **more}
        mine = [chunk async for chunk in await ours.chat.completions.create(**request)]
        other = [chunk async for chunk in await theirs.chat.completions.create(**request)]
        assert [told(chunk) for chunk in mine] == [told(chunk) for chunk in other]
        assert joined(mine) == joined(other) != ""
        for chunk in mine:
            read = SDKChunk.model_validate(chunk.model_dump())
            assert read.model_dump(exclude_none=True) == chunk.model_dump(exclude_none=True)
        assert (mine[-1].usage is not None) == ("stream_options" in more)
        assert endpoint.requests[0] == endpoint.requests[1]
        stats = ours.batcher.stats()
    assert (stats.forwarded, stats.items) == (1, 0)


STREAMED_CALL = [
    {"index": 0, "delta": {"role": "assistant", "tool_calls": [{"index": 0, "id": "call_1", "type": "function",
     "function": {"name": "weather", "arguments": ""}}]}, "finish_reason": None},
    {"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": '{"city"'}}]}, "finish_reason": None},
    {"index": 1, "delta": {"content": "Ho"}, "finish_reason": None},
    {"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": ':"Oslo"}'}}]}, "finish_reason": "tool_calls"},
]  # fmt: skip


def events(*choices, done=True, newline="\n"):
    """The bytes of a stream with a keep-alive after each event."""
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": "m"}
    lines = [f"data: {json.dumps({**chunk, 'choices': [choice]})}" for choice in choices]
    lines += ["data: [DONE]"] if done else []
    return "".join(f"{line}{newline}{newline}: keep-alive{newline}{newline}" for line in lines).encode()


@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_streamed_tool_calls_and_several_choices_come_through_in_any_chunking(size):
    raw = events(*STREAMED_CALL)
    async with replaying() as endpoint, both(endpoint) as (ours, theirs):
        endpoint.answer = [raw[start : start + size] for start in range(0, len(raw), size)]
        request = {"model": "m", "messages": ask("Hi"), "stream": True, "tools": [TOOL], "n": 2}
        mine = [chunk async for chunk in await ours.chat.completions.create(**request)]
        other = [chunk async for chunk in await theirs.chat.completions.create(**request)]
    assert [chunk.to_dict() for chunk in mine] == [chunk.to_dict() for chunk in other]
    calls = [call for chunk in mine for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    assert "".join(call.function.arguments for call in calls) == '{"city":"Oslo"}'


STOP = {"index": 0, "delta": {}, "finish_reason": "stop"}
WORD = {"index": 0, "delta": {"content": "Hi"}, "finish_reason": None}


@pytest.mark.parametrize(
    ("answer", "words", "error", "message"),
    [
        ([events(WORD, done=False)], "Hi", mb.TransportError, "cut off"),
        ([events(WORD, STOP, done=False)], "Hi", None, ""),
        ([events(WORD)], "Hi", None, ""),
        ([events(WORD, done=False) + b"data: [DONE]"], "Hi", None, ""),
        ([events(WORD, done=False), b"data: {nonsense\n\n"], "Hi", mb.TransportError, "no chunk"),
        (
            [events(WORD, done=False), b'data: {"error":{"message":"canary","code":"server_error"}}\n\n'],
            "Hi",
            mb.ServerError,
            "",
        ),
        ([b'data: {"error":{"message":"canary","code":429,"type":"rate_limit_error"}}\n\n'], "", mb.RateLimited, ""),
    ],
)
async def test_a_stream_that_ends_badly_keeps_its_chunks_and_says_so(answer, words, error, message):
    async with replaying() as endpoint, both(endpoint) as (ours, _):
        endpoint.answer = answer
        stream = await ours.chat.completions.create(model="m", messages=ask("Hi"), stream=True)
        heard, raised = [], None
        try:
            async for chunk in stream:
                heard.append(chunk)  # noqa: PERF401 what came before the error counts
        except mb.RequestFailed as caught:
            raised = caught
        assert joined(heard) == words
        assert (raised is None) if error is None else (type(raised) is error and message in str(raised))
        assert "canary" not in str(raised)
        assert await idle(ours.batcher)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def idle(batcher):
    """Whether the slot comes back."""
    async with asyncio.timeout(PATIENCE):
        while batcher.stats().in_flight or batcher.stats().queued:  # noqa: ASYNC110 nobody tells
            await asyncio.sleep(0.001)
    return True


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (400, {"error": {"message": "canary", "code": "context_length_exceeded"}}, mb.ContextTooLong),
        (
            401,
            {"error": {"message": f"Incorrect API key provided: {KEY} {OTHER_KEY} .", "code": "invalid_api_key"}},
            mb.AuthFailed,
        ),
        (429, {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, mb.RateLimited),
        (500, {"error": {"message": "oops"}}, mb.ServerError),
        (200, {"error": {"message": "oops", "code": 429}}, mb.RateLimited),
        (200, said(({"content": "Hi"}, "stop")), mb.TransportError),
    ],
)
async def test_a_refused_stream_raises_where_it_was_asked_for(status, body, error):
    async with replaying() as endpoint, both(endpoint) as (ours, _):
        endpoint.answer, endpoint.status = body, status
        for key, headers in ((KEY, None), (OTHER_KEY, {"Authorization": f"Bearer {OTHER_KEY}"})):
            with pytest.raises(error) as caught:
                await ours.chat.completions.create(model="m", messages=ask("Hi"), stream=True, extra_headers=headers)
            assert type(caught.value) is error
            assert key not in f"{caught.value} {getattr(caught.value, 'body', '')}".split()
            assert await idle(ours.batcher)
        assert len(endpoint.bodies) == 2
        assert getattr(caught.value, "request_id", None) in ("req_1", None)


async def test_the_callers_key_goes_with_the_stream():
    async with replaying() as endpoint, both(endpoint) as (ours, _):
        endpoint.answer = [events(WORD, STOP)]
        request = {"model": "m", "messages": ask("Hi"), "stream": True}
        async with await ours.chat.completions.create(
            **request, extra_headers={"Authorization": "Bearer theirs"}
        ) as stream:
            assert [chunk async for chunk in stream]
        async with await ours.chat.completions.create(**request) as stream:
            assert "200" in repr(stream)
        assert [each["Authorization"] for each in endpoint.headers] == ["Bearer theirs", f"Bearer {KEY}"]
        assert endpoint.headers[0]["Accept"] == "text/event-stream"


@pytest.mark.parametrize("way", ["close", "async with", "drop", "drop unread", "cancel"])
async def test_a_stream_that_nobody_reads_to_its_end_is_let_go(way):
    async with replaying() as endpoint, both(endpoint) as (ours, _):
        endpoint.answer = [events(WORD, done=False), b""]  # and then silence
        stream = await ours.chat.completions.create(model="m", messages=ask("Hi"), stream=True)
        assert ours.batcher.stats().in_flight == 1
        if way != "drop unread":
            assert joined([await anext(stream)]) == "Hi"
        if way == "close":
            await stream.close()
            await stream.close()
        elif way == "async with":
            async with stream:
                pass
        elif way == "cancel":
            reading = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            reading.cancel()
            await asyncio.wait([reading])
        gc.disable()  # what is dropped must go without the help of the collector
        try:
            del stream
            assert await idle(ours.batcher)
        finally:
            gc.enable()
        async with asyncio.timeout(PATIENCE):
            await endpoint.gone.wait()


async def test_a_stream_that_does_not_begin_in_time_is_given_up():
    async with replaying() as endpoint, both(endpoint) as (ours, _):
        endpoint.wait.clear()
        with pytest.raises(mb.DeadlineExceeded, match=r"0\.05 s"):
            await ours.chat.completions.create(model="m", messages=ask("Hi"), stream=True, timeout=0.05)
        assert await idle(ours.batcher)
        endpoint.wait.set()


# --- errors of ordinary requests


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (400, "x", mb.BadRequest),
        (401, "invalid_api_key", mb.AuthFailed),
        (429, "insufficient_quota", mb.QuotaExhausted),
    ],
)
async def test_errors_are_this_librarys(status, code, error):
    async with replaying() as endpoint, both(endpoint) as (ours, _):
        endpoint.answer, endpoint.status = {"error": {"message": "canary", "code": code}}, status
        with pytest.raises(error) as caught:
            await ours.chat.completions.create(messages=ask("Hi"))
        assert (caught.value.status, caught.value.code, caught.value.attempts) == (status, code, 1)


async def test_a_refusal_is_an_error_unless_the_request_went_alone():
    async with replaying() as endpoint, both(endpoint) as (ours, _):
        endpoint.answer = said(({"content": None, "refusal": "No."}, "stop"))
        with pytest.raises(mb.Refused) as caught:
            await ours.chat.completions.create(messages=ask("Hi"))
        assert caught.value.raw == "No."
        message = (await ours.chat.completions.create(messages=ask("Hi"), seed=1)).choices[0].message
    assert (message.content, message.refusal) == (None, "No.")
