"""Calls that leave together for an endpoint that refuses their form: a refusal is paid for once, and nobody waits long."""

from __future__ import annotations

import asyncio
from typing import Literal

import pytest
from helpers import ask

import microbatch as mb
from microbatch.testing import SimulatedEndpoint
from microbatch.testing.reading import EndpointError

Label = Literal["home", "other"]


def form(body):
    return (body.get("response_format") or {}).get("type")


class Refusing(SimulatedEndpoint):
    """Refuses *forms* with *words*."""

    def __init__(self, words, *forms, **options):
        super().__init__(record=True, **options)
        self.words, self.forms = words, forms

    def read(self, body):
        if form(body) in self.forms:
            raise EndpointError(400, self.words)
        return super().read(body)


def batcher_for(endpoint, **policy):
    transport = mb.OpenAIChat("m", base_url=endpoint.base_url, api_key="k")
    return mb.Microbatcher(transport, policy=mb.FlushPolicy(**policy), tokens="bytes")


@pytest.fixture
def patient(monkeypatch):
    """Raise the time that calls wait for the first one to an hour, so that a loaded machine does not end the wait."""
    monkeypatch.setattr("microbatch.transports.first_form.PATIENCE", 3_600.0)


async def ask_all(batcher, count=8):
    asked = (batcher.submit(ask(f"item {number}"), output_type=Label) for number in range(count))
    return [reply.output for reply in await asyncio.gather(*asked)]


WORDS = {
    "of the form": "Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model.",
    "of the schema": "JSON schema conversion failed: Unrecognized schema: false",
    "none": "Bad request",
}


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("forms", [("json_schema",), ("json_schema", "json_object")], ids=["one form", "two forms"])
@pytest.mark.parametrize("size", [1, 4], ids=["singles", "batches"])
async def test_concurrent_first_calls_pay_for_each_refusal_once(words, forms, size):
    async with Refusing(WORDS[words], *forms) as endpoint, batcher_for(endpoint, max_batch_size=size) as batcher:
        assert len(await ask_all(batcher, 8 * size)) == 8 * size
        refused = [form(body) for body in endpoint.requests if form(body) in forms]
        # A batch that is refused without a reason is halved before its form is doubted.
        assert len(refused) <= len(forms) or (words == "none" and size > 1)
        if size == 1:
            assert len(endpoint.requests) == 8 + len(forms)
        await ask_all(batcher, 2)
    assert {form(body) for body in endpoint.requests[-2:]}.isdisjoint(forms)


async def test_calls_do_not_wait_for_the_answer_to_the_first_one():
    """The endpoint answers none before all of them have arrived."""
    arrived = asyncio.Barrier(8)

    class Slow(SimulatedEndpoint):
        async def respond(self, body, key, size=0):
            await arrived.wait()
            return await super().respond(body, key, size)

    async with Slow() as endpoint, batcher_for(endpoint, max_batch_size=1) as batcher:
        async with asyncio.timeout(30):
            assert len(await ask_all(batcher)) == 8
    assert endpoint.calls == 8


@pytest.mark.usefixtures("patient")
async def test_the_first_call_holds_nothing_back_once_it_is_given_up():
    began = asyncio.Event()

    class Hanging(SimulatedEndpoint):
        async def respond(self, body, key, size=0):
            if not began.is_set():
                began.set()
                await asyncio.sleep(3_600)
            return await super().respond(body, key, size)

    async with Hanging() as endpoint, batcher_for(endpoint, max_batch_size=1) as batcher:
        first = asyncio.ensure_future(batcher.submit(ask("first"), output_type=Label))
        await began.wait()
        first.cancel()
        async with asyncio.timeout(30):
            assert len(await ask_all(batcher)) == 8
    assert endpoint.calls == 9
