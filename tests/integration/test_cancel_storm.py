"""Thousands of calls over few connections, cancelled at random moments: nobody may get what was meant for somebody else.

A connection given back to the pool half-read would make the next call read this one's rest. That is how ChatGPT once showed
people each other's conversations, and aiohttp had the same fault (aio-libs/aiohttp#7864).
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import Counter
from typing import Any

import pytest
from aiohttp import web
from helpers import ask, batcher_for

import microbatch as mb

pytestmark = pytest.mark.slow


CALLS = 1_500
ENOUGH = 8 * CALLS  # requests, should the calls of a broken client never get through
PATIENCE = 60.0
FIRST = 10**6
GROUPS_AT_ONCE = 48
CONNECTIONS = 12
LINE = re.compile(r'^\[(\d+[a-z]{5})\] "(\d+)"$', re.MULTILINE)
SLOWEST = 0.008
"""Seconds that the server takes to answer at most; cancels fall anywhere in that time and a little beyond it."""


class NumberServer:
    """Answers every question with its own text: a number that no other question of the test has."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.calls = 0
        self.served: Counter[str] = Counter()
        self.connections: set[Any] = set()

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.calls += 1
        self.connections.add(request.transport)
        asked = json.loads(body)
        question = asked["messages"][-1]["content"]
        items = LINE.findall(question)
        self.served["combined" if items else "single"] += 1
        self.served["streamed" if asked.get("stream") else "whole"] += 1
        # Some replies come in another order than they were asked for in: whoever goes by position is wrong.
        if self.random.random() < 0.3:
            self.random.shuffle(items)
        text = (
            json.dumps({"results": [{"id": name, "answer": number} for name, number in items]}) if items else question
        )
        if asked.get("stream"):
            return await self.stream(request, text)
        await asyncio.sleep(self.random.uniform(0, SLOWEST))
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice]})

    async def stream(self, request: web.Request, text: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        try:
            await response.prepare(request)
            for start in range(0, len(text), size := max(1, len(text) // 3)):
                await asyncio.sleep(self.random.uniform(0, SLOWEST / 4))
                await response.write(_event({"content": text[start : start + size]}))
            await response.write(_event({}, "stop") + b"data: [DONE]\n\n")
        except ConnectionError:
            self.served["left"] += 1
        return response


def _event(delta: dict[str, str], finish: str | None = None) -> bytes:
    return (
        b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}).encode() + b"\n\n"
    )


class Storm:
    """Asks in groups of one to four, so that calls are single or combined, and cancels some, or all of a group at once.

    Only a call whose callers are all gone is cancelled on the wire.
    """

    def __init__(self, server: NumberServer, seed: int) -> None:
        self.server = server
        self.random = random.Random(seed)
        self.number = FIRST
        self.seen: Counter[str] = Counter()

    async def blow(self, batcher: mb.Microbatcher) -> None:
        async def groups(worker: int) -> None:
            while self.server.calls < CALLS and self.number < FIRST + ENOUGH:
                await self.group(batcher, f"worker {worker}")

        await asyncio.gather(*(groups(worker) for worker in range(GROUPS_AT_ONCE)))

    async def group(self, batcher: mb.Microbatcher, system: str) -> None:
        first = self.number
        self.number += self.random.choice((1, 1, 2, 4))
        tasks = [asyncio.create_task(self.one(batcher, str(number), system)) for number in range(first, self.number)]
        loop = asyncio.get_running_loop()
        fate = self.random.choice(("left alone", "all", "some"))
        together = self.random.uniform(0, 1.2 * SLOWEST)
        for task in tasks:
            if fate == "all":
                loop.call_later(together, task.cancel)
            elif fate == "some" and self.random.random() < 0.5:
                loop.call_later(self.random.uniform(0, 1.2 * SLOWEST), task.cancel)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, asyncio.CancelledError):
                self.seen["cancelled"] += 1
            elif isinstance(result, BaseException):
                self.seen[repr(result)] += 1

    async def one(self, batcher: mb.Microbatcher, number: str, system: str) -> None:
        reply = await batcher.submit(ask(number, system), timeout=PATIENCE)
        self.seen["right" if reply.output == number else "wrong"] += 1
        self.seen[reply.route] += 1


@pytest.mark.promise(of="cross_talk")
@pytest.mark.timeout(180)
async def test_in_a_storm_of_cancels_every_answer_is_its_callers_own() -> None:
    server = NumberServer(1)
    storm = Storm(server, 2)
    application = web.Application()
    application.router.add_post("/v1/chat/completions", server.chat)
    runner = web.AppRunner(application, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    base_url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        async with asyncio.TaskGroup() as tasks:
            for stream in (True, False):
                tasks.create_task(_half(storm, base_url, stream=stream))
    finally:
        await runner.cleanup()
    told = f"{storm.seen} {server.served} connections={len(server.connections)}"
    assert storm.seen["wrong"] == 0, told
    assert storm.seen.keys() <= {"right", "cancelled", "batch", "single"}, told
    # It was a storm: calls of every kind, many answers, many cancels on the wire, and connections used again and again.
    assert min(server.served[kind] for kind in ("single", "combined", "streamed", "whole")) > CALLS / 5, told
    assert storm.seen["right"] > CALLS / 2, told
    assert storm.seen["cancelled"] > CALLS / 2, told
    assert 10 * CONNECTIONS < len(server.connections) < CALLS / 2, told


async def _half(storm: Storm, base_url: str, *, stream: bool) -> None:
    chat = mb.OpenAIChat("m", base_url=base_url, api_key="k", stream=stream, max_connections=CONNECTIONS)
    async with batcher_for(chat, max_batch_size=4, max_wait=0.002) as batcher:
        await storm.blow(batcher)
