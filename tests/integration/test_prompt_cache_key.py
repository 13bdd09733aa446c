"""`prompt_cache_key`: OpenAI's own API is told which calls begin alike; nobody else is, and no key of ours depends on it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from helpers import ask, batcher_for, submit_all

import microbatch as mb
from microbatch.caching.memory import MemoryCache
from microbatch.testing import SimulatedModel
from microbatch.testing.wire import completion_object

OPENAI = "http://api.openai.com/v1"
FIELD = "prompt_cache_key"


class Site:
    """A server on a Unix socket, under any name; *refuse* returns the message of a refusal, or None."""

    def __init__(self, path):
        self.path = str(path / "socket")
        self.bodies = []
        self.refuse = lambda _body: None
        self.model = SimulatedModel()

    async def answer(self, request):
        body = await request.json()
        self.bodies.append(body)
        message = self.refuse(body)
        if message is not None:
            return web.json_response({"error": {"message": message, "type": "invalid_request_error"}}, status=400)
        reply = await self.model.respond(body, "")
        return web.json_response(completion_object(reply, 1, body["model"]))

    def transport(self, base_url=OPENAI, **options):
        return mb.OpenAIChat("m", base_url=base_url, api_key="any", uds=self.path, stream=False, **options)

    @property
    def keys(self):
        return [body.get(FIELD) for body in self.bodies]


@pytest.fixture
async def site(tmp_path):
    site = Site(tmp_path)
    application = web.Application()
    application.router.add_post("/{path:.*}", site.answer)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, site.path).start()
    yield site
    await runner.cleanup()


@asynccontextmanager
async def opened(site, base_url=OPENAI, **options):
    async with batcher_for(site.transport(base_url), idle="wait", max_wait=0.05, **options) as batcher:
        yield batcher


async def key_of(site, system="Shout.", texts=("a", "b"), **options):
    """Return the only key that was sent for *texts*, by a batcher of its own."""
    site.bodies.clear()
    async with opened(site) as batcher:
        await asyncio.gather(*(batcher.submit(ask(text, system), **options) for text in texts))
    (key,) = set(site.keys)
    return key


async def test_combined_and_single_calls_of_a_lane_have_the_same_key_and_other_lanes_another(site):
    combined = await key_of(site)
    assert combined
    assert len(combined) <= 64  # OpenAI's limit
    assert await key_of(site, texts=["alone"]) == combined
    assert await key_of(site, tenant="someone", priority="low") == combined
    assert len({combined, await key_of(site, "Whisper."), await key_of(site, model="other")}) == 3


async def test_without_shared_messages_there_is_nothing_to_name(site):
    async with opened(site) as batcher:
        await batcher.submit([{"role": "user", "content": "Hi."}])
    assert site.keys == [None]


@pytest.mark.parametrize(
    "base_url", ["http://api.openai.com.example.org/v1", "http://localhost/v1", "http://eu.openai.com/v1"]
)
async def test_no_other_host_gets_it(site, base_url):
    async with opened(site, base_url) as batcher:
        await submit_all(batcher, ["a", "b"])
    assert set(site.keys) == {None}


async def test_the_callers_own_key_is_sent_as_it_is_and_to_any_host(site):
    for base_url in (OPENAI, "http://localhost/v1"):
        async with opened(site, base_url) as batcher:
            await submit_all(batcher, ["a", "b"], params={FIELD: "mine"})
    assert set(site.keys) == {"mine"}


@pytest.mark.parametrize(
    ("message", "times"),
    [
        ("Unrecognized request argument supplied: prompt_cache_key", 1),
        ("Unsupported parameter: 'prompt_cache_key' is not supported with this model.", 1),
        ("prompt_cache_key: Extra inputs are not permitted", 1),
        ("Unsupported request field.", 2),  # the schema is tried first
    ],
)
async def test_a_refusal_of_it_is_paid_for_once_and_loses_no_request(site, message, times):
    site.refuse = lambda body: message if FIELD in body else None
    async with opened(site) as batcher:
        for texts in (["a", "b", "c"], ["d", "e"], ["f"]):
            assert len(await submit_all(batcher, texts)) == len(texts)
    refused = [body for body in site.bodies if FIELD in body]
    assert len(refused) == times
    assert site.keys[-1] is None


async def test_a_refusal_of_the_value_of_the_callers_own_key_is_the_callers(site):
    site.refuse = lambda body: "Invalid 'prompt_cache_key': string too long." if body.get(FIELD) == "bad" else None
    async with opened(site) as batcher:
        with pytest.raises(mb.BadRequest):
            await batcher.submit(ask("a"), params={FIELD: "bad"})
        await batcher.submit(ask("b"))
    assert site.keys[-1]


async def test_keys_of_the_cache_and_of_lanes_do_not_depend_on_it(site):
    """An answer that was kept before the field was sent is found after it, and the other way round."""
    for first in (True, False):
        site.bodies.clear()
        cache, transports = MemoryCache(), []
        for sends in (first, not first):
            transport = site.transport()
            transport.takes_prompt_cache_key = sends
            transports.append(transport)
            async with batcher_for(transport, cache, idle="wait", max_wait=0.05) as batcher:
                replies = await submit_all(batcher, ["a", "b"])
        assert {reply.route for reply in replies} == {"cache"}
        assert [key is not None for key in site.keys] == [first]


async def test_the_key_names_the_kind_of_the_lane(site):
    async with opened(site, cache=MemoryCache()) as batcher:
        replies = await submit_all(batcher, ["a", "b", "c"])
    assert set(site.keys) == {reply.lane_kind for reply in replies}
