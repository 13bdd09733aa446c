"""The parts of the SDK's client that frameworks use beside `create` and `parse`, and the type checks that ours has to pass."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys

import openai
import pydantic
import pytest
from helpers import ask
from openai._legacy_response import LegacyAPIResponse
from openai.types.chat import ChatCompletion as SDKCompletion
from test_openai_adapter import CALLS, KEY, TOOL, both, events, replaying, said

import microbatch as mb
from microbatch.openai import AsyncOpenAI
from microbatch.openai.client import CreateOptions
from microbatch.testing import SimulatedEndpoint

pytestmark = pytest.mark.slow

ASKED = {"model": "m", "messages": ask("A lamp")}
STREAM = [events({"index": 0, "delta": {"content": "Hi"}, "finish_reason": "stop"})]
ABSENT = [None, openai.NOT_GIVEN, openai.omit]


class weather(pydantic.BaseModel):  # noqa: N801 the name of the tool
    city: str


@pytest.mark.parametrize("absent", ABSENT, ids=["None", "NOT_GIVEN", "omit"])
async def test_every_argument_may_be_not_given(absent):
    names = [*CreateOptions.__annotations__, *inspect.get_annotations(CreateOptions.__mro__[0]), "moderation"]
    left_out = dict.fromkeys([*names, *CreateOptions.__optional_keys__], absent)
    async with SimulatedEndpoint() as endpoint, both(endpoint) as (ours, theirs):
        right = (await theirs.chat.completions.create(**ASKED)).choices[0].message.content
        given = await ours.chat.completions.create(**{**left_out, "stream": absent, **ASKED})
        assert given.choices[0].message.content == right
        parsed = await ours.chat.completions.parse(**{**left_out, **ASKED, "response_format": absent})
        assert parsed.choices[0].message.content == right
        headers = {"x-a": "1", "x-b": absent}
        assert (await ours.chat.completions.create(**ASKED, extra_headers=headers)).choices


async def test_a_timeout_may_be_the_sdks():
    async with replaying() as endpoint, both(endpoint) as (ours, _):
        endpoint.wait.clear()
        with pytest.raises(mb.DeadlineExceeded):
            await ours.chat.completions.create(**ASKED, timeout=openai.Timeout(5, read=0.05))
        with pytest.raises(mb.DeadlineExceeded):
            await ours.with_options(timeout=openai.Timeout(0.05)).chat.completions.create(**ASKED, timeout=openai.omit)


async def test_raw_responses_hold_the_result():
    async with replaying() as endpoint, both(endpoint) as (ours, theirs):
        for client in (ours, theirs):
            response = await client.chat.completions.with_raw_response.create(**ASKED)
            assert isinstance(response, LegacyAPIResponse)
            assert response.headers["x-request-id"] == "req_1"
            assert response.parse().choices[0].message.content == "Hi"
            parsed = await client.chat.completions.with_raw_response.parse(**ASKED)
            assert parsed.parse().choices[0].message.content == "Hi"
        endpoint.answer = STREAM
        for client in (ours, theirs):
            response = await client.chat.completions.with_raw_response.create(**ASKED, stream=True)
            assert response.headers["content-type"] == "text/event-stream"
            chunks = [chunk async for chunk in response.parse()]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hi"


async def test_options_of_a_client_are_those_of_its_requests():
    async with replaying() as endpoint, both(endpoint) as (ours, _):
        mine = ours.with_options(api_key="another", max_retries=3, default_headers={"X-A": "1", "X-B": "1"})
        await mine.copy(default_headers={"X-B": "2"}).chat.completions.create(**ASKED, extra_headers={"X-C": "3"})
        await ours.chat.completions.create(**ASKED)
        sent, plain = endpoint.headers
        assert (sent["Authorization"], sent["X-A"], sent["X-B"], sent["X-C"]) == ("Bearer another", "1", "2", "3")
        assert plain["Authorization"] == f"Bearer {KEY}"
        assert "X-A" not in plain
        endpoint.wait.clear()
        with pytest.raises(mb.DeadlineExceeded):
            await ours.with_options(timeout=0.05).chat.completions.create(**ASKED)
        with pytest.raises(mb.ConfigError, match="base_url, http_client"):
            ours.with_options(base_url="http://x", http_client=object(), organization=openai.NOT_GIVEN)
        assert (ours.base_url, ours.api_key) == (endpoint.base_url, "microbatch")
        assert ours.beta.chat.completions is ours.chat.completions


async def test_the_models_are_the_endpoints():
    async with SimulatedEndpoint(api_keys=[KEY, "other"]) as endpoint, both(endpoint) as (ours, theirs):
        right = [model.id async for model in theirs.models.list()]
        assert [model.id async for model in ours.models.list()] == right
        assert [model.id for model in (await ours.models.list()).data] == right
        assert [model.id async for model in ours.with_options(api_key="other").models.list()] == right
        with pytest.raises(mb.AuthFailed) as caught:
            await ours.with_options(api_key="wrong-key-of-theirs").models.list()
        assert "wrong-key-of-theirs" not in f"{caught.value!r}{caught.value.body}"


async def test_it_passes_for_the_sdks_where_that_is_loaded():
    async with replaying() as endpoint, both(endpoint) as (ours, _):
        completion = await ours.chat.completions.create(**ASKED)
    assert isinstance(ours, openai.AsyncOpenAI)
    assert isinstance(ours, AsyncOpenAI)
    assert isinstance(completion, SDKCompletion)
    assert isinstance(completion, dict)
    assert isinstance(completion.choices[0].message, pydantic.BaseModel)
    assert completion.model_extra == {}
    SDKCompletion.model_validate(completion.model_dump())
    del completion.__dict__["microbatch"]  # which holds the call
    assert pickle.loads(pickle.dumps(completion)) == copy.deepcopy(completion) == completion
    assert type(pickle.loads(pickle.dumps(completion)).choices[0]) is type(completion.choices[0])


def test_it_is_itself_where_the_sdk_is_not_loaded():
    code = (
        "import sys, microbatch as mb\n"
        "from microbatch.openai import AsyncOpenAI, ChatCompletion\n"
        "client = AsyncOpenAI(mb.Microbatcher(mb.OpenAIChat('m', base_url='http://127.0.0.1:9/v1', api_key='k')))\n"
        "assert client.__class__ is AsyncOpenAI and ChatCompletion({}).__class__ is ChatCompletion\n"
        "assert 'openai' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_the_lower_method_asks_too():
    async with replaying() as endpoint, both(endpoint) as (ours, _):
        options = {
            "headers": {"X-A": "1", "X-Stainless-Raw-Response": "true"},
            "extra_json": {"top_k": 2},
            "timeout": 5,
        }
        response = await ours.post(
            "/chat/completions", body=ASKED, cast_to=SDKCompletion, options=options, stream=False
        )
        assert response.parse().choices[0].message.content == "Hi"
        assert (await ours.post("/chat/completions", body=ASKED)).choices[0].message.content == "Hi"
        assert endpoint.bodies[0]["top_k"] == 2
        assert endpoint.headers[0]["X-A"] == "1"
        assert "X-Stainless-Raw-Response" not in endpoint.headers[0]
        endpoint.answer = STREAM
        stream = await ours.post("/chat/completions", body={**ASKED, "stream": True}, stream_cls=object)
        assert [chunk async for chunk in stream]
        with pytest.raises(mb.ConfigError, match="/embeddings"):
            await ours.post("/embeddings", body={})


async def test_calls_of_a_tool_made_of_a_model_are_parsed_to_it():
    async with replaying() as endpoint, both(endpoint) as (ours, theirs):
        endpoint.answer = said((CALLS, "tool_calls"))
        asked = {**ASKED, "tools": [openai.pydantic_function_tool(weather)]}
        found = [
            [call.function.parsed_arguments for call in completion.choices[0].message.tool_calls]
            for completion in [await client.chat.completions.parse(**asked) for client in (ours, theirs)]
        ]
        assert found == [[weather(city="Oslo"), weather(city="Bergen")]] * 2
        parsed = await ours.chat.completions.parse(**{**ASKED, "tools": [TOOL]})
        assert parsed.choices[0].message.tool_calls[0].function.parsed_arguments == {"city": "Oslo"}


async def test_a_response_format_in_json_is_parsed_to_what_json_has():
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}
    async with replaying() as endpoint, both(endpoint) as (ours, _):
        endpoint.answer = said(({"content": '{"a": 1}'}, "stop"))
        completion = await ours.chat.completions.parse(**ASKED, response_format=form)
        assert completion.choices[0].message.parsed == {"a": 1}
        endpoint.answer = said(({"content": "no JSON"}, "stop"))
        completion = await ours.chat.completions.parse(**ASKED, response_format={"type": "text"})
        assert completion.choices[0].message.parsed is None
