"""Credentials in any header, and in the query: they part those who ask, and go upstream in place of every other key."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest
from gateway_world import (
    MODEL,
    ONE_ATTEMPT,
    Watched,
    error_in,
    gateway,
    post,
    recorder,
    status,
    talk,
)
from helpers import ask

import microbatch as mb
from microbatch.openai import AsyncOpenAI
from microbatch.protocols import ChatCall

OWN = "sk-the-gateway-s-own-key"
TOKEN = "the-access-token"
NAMES = [
    "Authorization",
    "api-key",
    "x-api-key",
    "x-goog-api-key",
    "Ocp-Apim-Subscription-Key",
    "cf-aig-authorization",
    "Helicone-Auth",
    "x-portkey-api-key",
    "X-Unheard-Of-Token",
    "Cookie",
]
PAIRS = {
    "max_batch_size": 2,
    "max_wait": 30,
    "share": True,
}  # batches leave when they are full: nothing depends on time


class Spy(Watched):
    """A simulated endpoint that remembers the headers of each call and the texts in it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    async def _chat(self, request):
        self.seen.append((request.headers.copy(), await request.text()))
        return await super()._chat(request)


def body(text, **more):
    return {"model": MODEL, "messages": ask(text), "temperature": 0, **more}


async def asked(session, served, text, headers, **more):
    async with session.post(
        f"{served.base_url}/chat/completions", json=body(text, **more), headers=headers
    ) as response:
        return response.status, await response.text()


@pytest.mark.parametrize("own", [None, OWN])
@pytest.mark.parametrize("name", NAMES)
async def test_callers_with_different_credentials_share_nothing_and_go_upstream_as_who_they_are(name, own):
    options = {"cache": mb.MemoryCache(), "policy": PAIRS, "api_key": own}
    async with Spy() as upstream, gateway(upstream, **options) as served, aiohttp.ClientSession() as session:
        for _ in range(2):  # together, and again once all is in the cache
            answers = await asyncio.gather(
                *(
                    asked(session, served, text, {name: f"secret-{who}"}, stream=streamed)
                    for who in "abc"
                    for text, streamed in (("x", False), (f"thing-{who}", False), ("x", True))
                )
            )
            assert {code for code, _ in answers} == {200}
            for who, (_, told) in zip("abc", answers[1::3], strict=True):
                assert f"re: thing-{who}" in told
        stats = served.stats()
    assert sorted(headers[name] for headers, _ in upstream.seen) == ["secret-a", "secret-b", "secret-c"]
    for headers, told in upstream.seen:
        assert f"thing-{headers[name][-1]}" in told
        assert sum(f"thing-{who}" in told for who in "abc") == 1
        assert OWN not in str(headers.items())
        assert [each for each in NAMES if each in headers] == [name]
    assert (stats.batches, stats.shared + stats.cache_hits) == (3, 12)


@pytest.mark.parametrize("relayed", [{"n": 2, "stream": True}, {"tools": [], "seed": 1}])
@pytest.mark.parametrize("name", NAMES)
async def test_so_do_those_whose_requests_cannot_be_combined(name, relayed):
    options = {"api_key": OWN, "retry": ONE_ATTEMPT}
    async with (
        recorder() as upstream,
        gateway(upstream.url, **options) as served,
        aiohttp.ClientSession() as session,
    ):
        await asked(session, served, "x", {name: "theirs"}, **relayed)
        async with session.get(f"{served.base_url}/files", headers={name: "theirs"}) as response:
            assert response.status == 203
    assert len(upstream.requests) == 2
    for _, _, headers, _ in upstream.requests:
        assert headers[name] == "theirs"
        assert OWN not in str(headers.items())


@pytest.mark.parametrize("name", ["key", "api_key", "subscription-key", "access_token"])
async def test_a_credential_in_the_query_goes_upstream_in_place_of_the_gateways_key(name):
    async with recorder() as upstream, gateway(upstream.url, api_key=OWN) as served:
        async with aiohttp.ClientSession() as session:
            paths = [f"{path}?alt=json&{name}=theirs-{who}" for path in ("/chat/completions", "/files") for who in "ab"]
            asking = [session.post(f"{served.base_url}{path}", json=body("x")) for path in paths]
            assert [response.status for response in await asyncio.gather(*asking)] == [203] * 4
        assert len(served.batcher._parts.accounts._kept) == 2
    assert sorted(path for _, path, _, _ in upstream.requests) == sorted(f"/v1{path}" for path in paths)
    assert not any(OWN in str(headers.items()) for _, _, headers, _ in upstream.requests)


async def test_a_cookie_beside_a_key_parts_those_who_ask_and_goes_no_further():
    options = {"policy": PAIRS, "api_key": OWN, "access_token": TOKEN}
    async with Spy() as upstream, gateway(upstream, **options) as served, aiohttp.ClientSession() as session:
        for key in ("theirs", TOKEN):
            sent = [
                asked(
                    session, served, f"thing-{who}{n}", {"Authorization": f"Bearer {key}", "Cookie": f"session={who}"}
                )
                for n in (1, 2)
                for who in "ab"
            ]
            assert {code for code, _ in await asyncio.gather(*sent)} == {200}
    assert [headers["Authorization"] for headers, _ in upstream.seen] == ["Bearer theirs"] * 2 + [f"Bearer {OWN}"] * 2
    for headers, told in upstream.seen:
        assert "Cookie" not in headers
        assert ("thing-a" in told) != ("thing-b" in told)


async def test_the_way_here_goes_no_further_even_where_it_holds_a_credential():
    async with Spy() as upstream, gateway(upstream, api_key=OWN) as served, aiohttp.ClientSession() as session:
        assert (await asked(session, served, "x", {"X-Forwarded-Access-Token": "t", "Via": "v"}))[0] == 200
    ((headers, _),) = upstream.seen
    assert headers["Authorization"] == f"Bearer {OWN}"
    assert not [name for name in ("X-Forwarded-Access-Token", "Via") if name in headers]


@pytest.mark.parametrize("name", ["Authorization", "api-key", "x-api-key", "x-goog-api-key", "X-Unheard-Of-Token"])
async def test_the_access_token_and_the_word_for_none_go_no_further_in_any_header(name):
    options = {"api_key": OWN, "access_token": TOKEN}
    async with Spy() as upstream, gateway(upstream, **options) as served, aiohttp.ClientSession() as session:
        for value, code in ((TOKEN, 200), (f"Bearer {TOKEN}", 200), ("microbatch", 401), ("Bearer", 401)):
            assert (await asked(session, served, value, {name: value}))[0] == code
        for path in ("/chat/completions", "/files", "/models"):
            refused = await talk(served.port, post(json.dumps(body("x")).encode(), path=f"/v1{path}?key={TOKEN}"))
            assert (status(refused), error_in(refused)["code"]) == (401, "no_key")
    assert [headers.get("Authorization") for headers, _ in upstream.seen] == [f"Bearer {OWN}"] * 2
    assert not any(TOKEN in str(headers.items()) for headers, _ in upstream.seen)


@pytest.mark.parametrize("sent", [{"Cookie": "a=b"}, {}])
async def test_what_a_browser_sends_unasked_shows_nothing(sent):
    async with recorder() as upstream, gateway(upstream.url) as served:
        for path in ("/v1/files", "/v1/files?key=any", "/v1/chat/completions?key=any"):
            answer = await talk(served.port, post(b"{}", path=path, Content_Type="text/plain", **sent))
            assert (status(answer), error_in(answer)["code"]) == (415, "unsupported_media_type")
    assert upstream.requests == []


async def test_who_pays_is_chosen_beside_a_key_of_ones_own_only():
    who = {"OpenAI-Project": "p", "X-Goog-User-Project": "g", "X-Org-Id": "o"}
    async with Spy() as upstream, gateway(upstream, api_key=OWN) as served, aiohttp.ClientSession() as session:
        for extra in ({}, {"X-Microbatch-Batch": "no"}):
            for key in ({}, {"api-key": "theirs"}):
                assert (await asked(session, served, "x", {**who, **key, **extra}))[0] == 200
    for (headers, _), own in zip(upstream.seen, (True, False, True, False), strict=True):
        assert {name: headers[name] for name in who if name in headers} == ({} if own else who)
        assert ("Authorization" in headers, "api-key" in headers) == (own, not own)


@pytest.mark.parametrize("name", NAMES)
async def test_a_transport_sends_no_key_of_its_own_beside_a_callers(name):
    own = {"headers": {"api-key": "own-1", "X-Trace": "t"}, "query": {"key": "own-2", "api-version": "1"}}
    async with Spy() as upstream:
        transport = mb.OpenAIChat(MODEL, base_url=upstream.base_url, api_key="own-3", **own)
        async with mb.Microbatcher(transport, tokens="bytes") as batcher:
            await batcher.submit(ask("x"), headers={name: "theirs"})
            client = AsyncOpenAI(batcher)
            await client.chat.completions.create(model=MODEL, messages=ask("y"), extra_headers={name: "theirs"})
            asking = client.chat.completions.create(
                model=MODEL, messages=ask("z"), stream=True, extra_headers={name: "theirs"}
            )
            async for _ in await asking:
                pass
    assert len(upstream.seen) == 3
    for headers, _ in upstream.seen:
        assert (headers[name], headers["X-Trace"]) == ("theirs", "t")
        assert "own-" not in str(headers.items())


async def test_a_transport_sends_no_key_of_its_own_beside_one_in_the_query_or_in_its_place():
    async with recorder() as upstream:
        own = {"api_key": "own-1", "query": {"key": "own-2", "api-version": "1"}}
        transport = mb.OpenAIChat(MODEL, base_url=upstream.url, **own)
        async with mb.Microbatcher(transport, tokens="bytes") as batcher:
            for path in ("files?key=theirs", "files"):
                async with batcher.forward("GET", path, {"api-key": "theirs"} if path == "files" else {}) as answer:
                    assert answer.status == 203
        call = ChatCall(messages=ask("x"), headers={"x-api-key": "theirs"})
        with pytest.raises(mb.TransportError):
            await transport.send(call, lambda _: None)
        await transport.aclose()
    assert [path for _, path, _, _ in upstream.requests] == [
        "/v1/files?key=theirs&api-version=1",
        "/v1/files?api-version=1",
        "/v1/chat/completions?api-version=1",
    ]
    assert not any("own-" in str(headers.items()) for _, _, headers, _ in upstream.requests)
