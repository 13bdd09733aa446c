"""Connections that break in every way that connections break: each submit ends, rightly or with a typed error."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from typing import Any, get_args

import pytest
from fault_proxy import Fault, FaultProxy
from helpers import ask

import microbatch as mb
from microbatch.testing import SimulatedEndpoint

pytestmark = pytest.mark.slow


HARMLESS = {"none", "delay", "drip"}
HOPELESS = {"refuse", "silence"}
MIX: tuple[Fault, ...] = get_args(Fault)
ROUNDS = 2
PATIENCE = 40.0
IMPATIENT = {"timeout": 0.6, "idle_timeout": 0.5}  # as silence is waited out many times


def open_batcher(transport: mb.OpenAIChat) -> mb.Microbatcher:
    return mb.Microbatcher(
        transport,
        policy=mb.FlushPolicy(max_batch_size=4, max_wait=0.005),
        retry=mb.RetryPolicy(max_attempts=2, base=0.01),
        tokens="bytes",
    )


async def ask_around(batcher: mb.Microbatcher, number: int) -> Counter[str]:
    """Ask in groups of one to four, each group in a lane of its own; return how it ended."""

    async def one(text: str, system: str) -> str:
        try:
            reply = await batcher.submit(ask(text, system))
        except mb.RequestFailed as error:
            return type(error).__name__
        return "right" if reply.output == text.upper() else f"wrong: {reply}"

    # Of a lane's four, the first goes alone and the others together when it is back.
    asked = [one(f"word{number}x{lane}x{each}", f"Shout {lane}.") for lane in range(6) for each in range(1 + lane % 4)]
    return Counter(await asyncio.gather(*asked))


@pytest.fixture
async def complaints() -> Any:
    """Whatever the event loop complains of is an error."""
    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
    yield told
    gc.collect()  # what was not closed says so now
    assert told == []


async def weather(endpoint: SimulatedEndpoint, faults: tuple[Fault, ...], seed: int, *, stream: bool) -> Counter[str]:
    """Ask through bad connections, then through good ones; return how it ended while they were bad."""
    async with FaultProxy(endpoint.port, faults, seed=seed) as proxy:
        limits = {"timeout": PATIENCE, "idle_timeout": PATIENCE} if HARMLESS.issuperset(faults) else IMPATIENT
        chat = mb.OpenAIChat("m", base_url=proxy.base_url, api_key="k", stream=stream, max_connections=6, **limits)
        ended: Counter[str] = Counter()
        async with asyncio.timeout(PATIENCE), open_batcher(chat) as batcher:
            for number in range(ROUNDS):
                ended += await ask_around(batcher, number)
            proxy.faults = ("none",)
            chat._timeout = chat._idle_timeout = PATIENCE  # good ones are good however long a loaded machine takes
            assert set(await ask_around(batcher, ROUNDS)) == {"right"}
            while batcher.stats().in_flight:  # noqa: ASYNC110 nothing tells; callers may be answered before their call has ended
                await asyncio.sleep(0.01)
            assert batcher.stats().queued == 0
        assert await proxy.left_alone(PATIENCE), "a connection was left open"
        assert any(proxy.dealt[fault] for fault in faults)
    assert not any(how.startswith("wrong") for how in ended), ended
    return ended


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("fault", MIX)
async def test_whatever_connections_do_each_submit_ends_and_later_ones_work(
    fault: Fault, stream: bool, complaints: list[Any]
) -> None:
    async with SimulatedEndpoint(answer=lambda text, schema: text.upper()) as endpoint:
        ended = await weather(endpoint, (fault,), 7, stream=stream)
    if fault in HARMLESS:
        assert set(ended) == {"right"}
    else:
        assert set(ended) <= {"right", "ConnectFailed", "TransportTimeout", "TransportError"}
        assert ("right" in ended) == (fault not in HOPELESS)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_every_kind_of_bad_connection_at_once(stream: bool, complaints: list[Any]) -> None:
    ended: Counter[str] = Counter()
    async with SimulatedEndpoint(answer=lambda text, schema: text.upper()) as endpoint:
        for seed in range(3):
            ended += await weather(endpoint, MIX, seed, stream=stream)
    # Retries find another connection: most are answered all the same.
    assert ended["right"] > ended.total() / 2, ended
