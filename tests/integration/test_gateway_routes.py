"""Where requests to the gateway go: queries, Azure's paths, what is relayed whole, and what clients are told of a wrong one."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import aiohttp
import openai
import pytest
from aiohttp import web
from gateway_world import MODEL, ONE_ATTEMPT, error_in, gateway, post, recorder, sdk, serve, status, talk
from helpers import ask

from microbatch.cli.console import UsageError
from microbatch.cli.main import make_parser
from microbatch.cli.serve import make_gateway
from microbatch.gateway.upstream import Upstream, lacks_version
from microbatch.openai.chat_completion import completion_object
from microbatch.testing import SimulatedEndpoint
from microbatch.testing.reading import read_combined

pytestmark = pytest.mark.slow

VERSION = "2024-10-21"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@asynccontextmanager
async def world(address="{}", **options):
    """Yield an upstream that answers every question, combined ones too, and a gateway to *address* at it."""
    async with recorder() as upstream:
        upstream.answer = answer
        root = upstream.url.removesuffix("/v1")
        async with gateway(address.format(root), policy={"max_batch_size": 4}, **options) as served:
            yield upstream, served


async def answer(request):
    asked = json.loads(await request.read())["messages"][-1]["content"]
    items = read_combined(asked)[1]
    results = [{"id": id_, "answer": f"re: {text}"} for id_, text in items]
    text = json.dumps({"results": results}) if items else f"re: {asked}"
    return web.json_response(completion_object(text, model="m"), headers={"X-Theirs": "1"})


async def embed(_request):
    return web.json_response({"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.5]}]})


def paths(upstream):
    return [path for _method, path, _headers, _body in upstream.requests]


async def texts(client, number=4, **options):
    asked = (client.chat.completions.create(model=MODEL, messages=ask(f"t{n}"), **options) for n in range(number))
    return [completion.choices[0].message.content for completion in await asyncio.gather(*asked)]


RIGHT = [f"re: t{number}" for number in range(4)]

# --- queries


async def test_requests_are_combined_with_those_of_the_same_query_and_it_goes_upstream():
    async with world("{}/v1") as (upstream, served), sdk(served) as client:
        for query in ({"a": "1 2", "b": "%"}, {"a": "2"}):
            assert await texts(client, extra_query=query) == RIGHT
        assert await texts(client) == RIGHT
    assert paths(upstream) == [f"/v1/chat/completions{query}" for query in ("?a=1+2&b=%25", "?a=2", "")]


async def test_the_gateways_own_query_goes_with_every_call_unless_the_client_gives_another():
    async with world("{}/v1", query={"v": "1", "w": "2"}) as (upstream, served), sdk(served) as client:
        assert await texts(client) == RIGHT
        assert await texts(client, extra_query={"v": "3"}) == RIGHT
        await texts(client, 1, extra_query={"v": "4"}, tools=[TOOL])
    queries = [dict(pair.split("=") for pair in path.partition("?")[2].split("&")) for path in paths(upstream)]
    assert queries == [{"v": version, "w": "2"} for version in "134"]


# --- Azure


@pytest.mark.parametrize(
    ("address", "chat", "others"),
    [
        ("{}/v1", "/v1/chat/completions", "/v1/embeddings"),
        ("{}/v1/chat/completions", "/v1/chat/completions", "/v1/embeddings"),
        (
            "{}/openai",
            f"/openai/deployments/{MODEL}/chat/completions?api-version={VERSION}",
            f"/openai/deployments/{MODEL}/embeddings?api-version={VERSION}",
        ),
        (
            f"{{}}/openai/deployments/{MODEL}",
            f"/openai/deployments/{MODEL}/chat/completions",
            f"/openai/deployments/{MODEL}/embeddings",
        ),
        ("{}/openai/v1/", "/openai/v1/chat/completions", "/openai/v1/embeddings"),
    ],
)
async def test_azures_client_is_served_whatever_the_upstream_is(address, chat, others):
    query = {"api-version": VERSION} if "v1" not in address else None
    async with world(address, query=query) as (upstream, served):
        if "deployments" in address:
            chat, others = (f"{path}?api-version={VERSION}" for path in (chat, others))
        root = served.base_url.removesuffix("/v1")
        async with openai.AsyncAzureOpenAI(azure_endpoint=root, api_key="theirs", api_version=VERSION) as client:
            assert await texts(client) == RIGHT
            assert await texts(client, 1, tools=[TOOL]) == RIGHT[:1]
        # Where others write their base_url.
        async with openai.AsyncAzureOpenAI(base_url=served.base_url, api_key="theirs", api_version=VERSION) as client:
            assert await texts(client) == RIGHT
            upstream.answer = embed
            embedded = await client.embeddings.create(model=MODEL, input="x", encoding_format="float")
            assert embedded.data[0].embedding == [0.5]
    assert paths(upstream) == [chat, chat, chat, others]
    assert {headers.get("api-key") for _, _, headers, _ in upstream.requests} == {"theirs"}


async def test_a_deployment_in_the_path_is_the_model_of_requests_that_name_none():
    async with world("{}/v1") as (upstream, served), aiohttp.ClientSession() as session:
        root = served.base_url.removesuffix("/v1")
        for more in ({}, {"tools": [TOOL]}):
            asked = {"messages": ask("x"), **more}
            async with session.post(f"{root}/openai/deployments/my-own/chat/completions", json=asked) as response:
                assert response.status == 200
    assert [json.loads(body)["model"] for *_, body in upstream.requests] == ["my-own"] * 2


async def test_another_deployment_than_the_upstreams_is_refused_with_the_mend():
    async with world("{}/openai/deployments/one") as (upstream, served):
        answered = await talk(served.port, post(path="/openai/deployments/other/chat/completions"))
    assert status(answered) == 404
    assert "--upstream" in error_in(answered)["message"]
    assert upstream.requests == []


async def test_other_clients_reach_the_api_of_an_azure_resource():
    query = {"api-version": "preview"}
    async with world("{}/openai", query=query) as (upstream, served), sdk(served) as client:
        assert await texts(client) == RIGHT
    assert paths(upstream) == ["/openai/v1/chat/completions?api-version=preview"]


@pytest.mark.parametrize("path", ["/v1beta/openai", "/openai", ""])
async def test_other_addresses_are_not_taken_for_azures(path):
    async with world(f"{{}}{path}/") as (upstream, served), sdk(served) as client:
        assert await texts(client) == RIGHT
    assert paths(upstream) == [f"{path}/chat/completions"]


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("https://name.openai.azure.com", "https://name.openai.azure.com/openai"),
        ("https://name.openai.azure.com/", "https://name.openai.azure.com/openai"),
        ("https://x.example/v1/chat/completions/", "https://x.example/v1"),
        ("https://x.example/v1", "https://x.example/v1"),
        ("https://x.example", "https://x.example"),
        ("https://models.inference.ai.azure.com", "https://models.inference.ai.azure.com"),
        (
            "https://generativelanguage.googleapis.com/v1beta/openai/",
            "https://generativelanguage.googleapis.com/v1beta/openai",
        ),
    ],
)
def test_addresses_that_are_meant_are_taken(given, taken):
    assert Upstream(given).base_url == taken


# --- what is relayed whole


@pytest.mark.parametrize("extra", [{"tools": [TOOL]}, {"n": 2}, {"seed": 1}])
async def test_what_cannot_be_combined_is_relayed_with_its_headers_both_ways(extra):
    async with world("{}/v1") as (upstream, served), aiohttp.ClientSession() as session:
        headers = {"X-Trace": "t1", "User-Agent": "mine/1", "anthropic-beta": "b", "Authorization": "Bearer k"}
        raw = json.dumps({"model": MODEL, "messages": ask("x"), **extra}, indent=2).encode()
        sent = {**headers, "Content-Type": "application/json"}
        async with session.post(f"{served.base_url}/chat/completions", data=raw, headers=sent) as response:
            assert (response.status, response.headers["X-Theirs"]) == (200, "1")
    ((_, _, found, body),) = upstream.requests
    assert body == raw
    assert {name: found.get(name) for name in headers} == headers


@pytest.mark.parametrize(
    "field",
    [
        '"max_tokens": -1',
        '"max_tokens": 0',
        '"max_tokens": 10.0',
        '"max_tokens": "10"',
        '"temperature": "0.1"',
        '"temperature": 1e400',
        '"stream": 1',
        '"stream": true, "stream_options": []',
        '"stream_options": {"include_usage": "yes"}',
        '"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}',
        '"messages": "hi"',
        '"messages": []',
        '"messages": [{"content": "hi"}]',
    ],
)
async def test_what_only_the_endpoint_can_judge_is_relayed(field):
    async def refuse(_request):
        return web.json_response({"error": {"message": "theirs"}}, status=422)

    raw = f'{{"messages": [{{"role": "user", "content": "x"}}], "model": "m", {field}}}'.encode()
    async with world("{}/v1") as (upstream, served):
        upstream.answer = refuse
        answered = await talk(served.port, post(raw))
    assert (status(answered), error_in(answered)) == (422, {"message": "theirs"})
    assert [body for *_, body in upstream.requests] == [raw]


# --- what clients and operators are told


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b'\xef\xbb\xbf{"model": "m"}', "byte 0 is a byte order mark"),
        (b'{"temperature": NaN, "x": "NaN"}', "byte 16 is NaN"),
        (b'{"x": "NaN", "temperature": [-Infinity]}', "byte 29 is -Infinity"),
        (b'{"x": "\xc3\xa9", "t": Infinity}', "byte 17 is Infinity"),
        (b'{"content": "a\\ud800b"}', "byte 14 is half of a surrogate pair"),
        (b'{"content": "\\\\ud800 \\ud83d\\ude00 \\udc00"}', "byte 34 is half of a surrogate pair"),
        (b'{"content": "a\xed\xa0\x80"}', "byte 14 is no UTF-8, but half of a surrogate pair"),
        (b'{"content": "\xe9"}', "byte 13 is no UTF-8"),
        (b'{"model": "m" "x"}', "byte 14: "),
        (b'{"model": "m"', "byte 13: "),
        (b"", "byte 0: "),
        (b"[1]", "a JSON object, and is of type list"),
        (b'{"x": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
async def test_a_body_that_is_no_json_is_refused_with_position_and_cause(raw, said):
    async with world("{}/v1") as (upstream, served):
        answered = await talk(served.port, post(raw))
    assert (status(answered), error_in(answered)["code"]) == (400, "invalid_json")
    assert said in error_in(answered)["message"]
    assert upstream.requests == []


async def test_a_wrong_path_is_told_with_the_api_to_clients_and_with_the_flag_to_operators():
    asked = json.dumps({"model": MODEL, "messages": ask("x")}).encode()
    async with (
        SimulatedEndpoint() as endpoint,
        gateway(endpoint.base_url.removesuffix("/v1"), retry=ONE_ATTEMPT) as served,
    ):
        told = error_in(await talk(served.port, post(asked, path="/chat/completions")))
        assert "/v1/" in told["message"]
        answered = await talk(served.port, post(asked))
    assert status(answered) == 404
    assert "--upstream" in error_in(answered)["message"]
    assert "/v1" in error_in(answered)["message"]
    assert "base_url" not in error_in(answered)["message"]


@pytest.mark.parametrize(
    ("message", "code", "hinted"),
    [
        ("Invalid URL (POST /chat/completions)", None, True),
        ("The model `m` does not exist", "model_not_found", False),
        ('model "m" not found, try pulling it first', None, False),
    ],
)
async def test_the_hint_is_for_wrong_paths_and_not_for_unknown_models(message, code, hinted):
    async def refuse(_request):
        return web.json_response({"error": {"message": message, "type": "t", "param": None, "code": code}}, status=404)

    async with world("{}") as (upstream, served):
        upstream.answer = refuse
        answered = await talk(served.port, post(json.dumps({"model": "m", "messages": ask("x")}).encode()))
    assert error_in(answered)["message"].startswith(message)
    assert ("/v1" in error_in(answered)["message"]) == hinted


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--upstream", "localhost:8000/v1"], "--upstream must be an address"),
        (["--upstream", "http://x.example/v1?api-version=1"], "parameters go into --query"),
        (["--upstream", "http://u:p@x.example/v1"], "--upstream must not hold a user name"),
        (["--upstream", "http://x.example/v1", "--upstream-timeout", "0"], "--upstream-timeout must be"),
    ],
)
def test_wrong_flags_are_named_as_flags(words, said):
    with pytest.raises(UsageError) as caught:
        make_gateway(make_parser().parse_args(["serve", *words]))
    assert said in str(caught.value)
    for name in ("base_url", "query=", "headers="):
        assert name not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "lacking"),
    [
        ("http://localhost:8000", True),
        ("https://api.deepseek.com/beta", True),
        ("http://localhost:8000/v1", False),
        ("https://x.example/v1beta/openai", False),
        ("https://x.openai.azure.com", False),
    ],
)
async def test_an_address_that_may_lack_its_version_is_told_at_the_start(address, lacking):
    assert lacks_version(address) == lacking
    if lacking:
        async with serve("--upstream", address, "--port", "0") as served:
            served.stop()
            assert "ends in /v1" in (await served.ended())[2]


async def test_the_query_of_the_flag_goes_upstream():
    async with recorder() as upstream:
        upstream.answer = answer
        words = ("--upstream", f"{upstream.url}/chat/completions", "--query", "api-version=1=2", "--port", "0")
        async with serve(*words) as served, sdk(served) as client:
            assert await texts(client, 1) == RIGHT[:1]
    assert paths(upstream) == ["/v1/chat/completions?api-version=1%3D2"]
