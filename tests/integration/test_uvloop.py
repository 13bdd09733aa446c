"""On uvloop, which uvicorn's command prefers, as on asyncio's own loop."""

from __future__ import annotations

import asyncio

import pytest
import uvloop
from helpers import ask

import microbatch as mb
from microbatch.testing import ScriptedTransport, SimulatedEndpoint


def run(main):
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


@pytest.mark.parametrize("wait", [0.0, 0.001, 0.01])
def test_lanes_whose_time_has_come_are_sent(wait, caplog):
    """uvloop makes no timer of a time that has come, so its handle knows no time."""

    async def main():
        transport = ScriptedTransport(delay=0.002)
        policy = mb.FlushPolicy(idle="wait", max_wait=wait, max_batch_size=4, max_concurrent_batches=2)
        async with mb.Microbatcher(transport, policy=policy, tokens="bytes") as batcher:

            async def caller(number):
                await asyncio.sleep(number % 7 * 0.001)
                return await batcher.submit(ask(f"item {number}"), timeout=30.0)

            replies = await asyncio.gather(*map(caller, range(200)))
            results = [result async for result in batcher.map(ask(f"bulk {number}") for number in range(50))]
        return replies, results

    replies, results = run(main())
    assert [reply.output for reply in replies] == [f"ITEM {number}" for number in range(200)]
    assert sorted(result.unwrap().output for result in results) == sorted(f"BULK {number}" for number in range(50))
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_deadlines_cancels_limits_and_closing_work_over_sockets():
    async def main():
        async with SimulatedEndpoint() as endpoint:
            transport = mb.OpenAIChat("m", base_url=endpoint.base_url, api_key="k")
            async with mb.Microbatcher(
                transport, rate_limit=mb.RateLimit(rpm=60_000), policy=mb.FlushPolicy(max_wait=0.005), tokens="bytes"
            ) as batcher:
                tasks = [asyncio.ensure_future(batcher.submit(ask(f"{number}"))) for number in range(60)]
                await asyncio.sleep(0)
                for task in tasks[::3]:
                    task.cancel()
                late = asyncio.ensure_future(batcher.submit(ask("late"), timeout=0.0))
                await asyncio.wait([*tasks, late])
                assert isinstance(late.exception(), mb.DeadlineExceeded)
                return [task.cancelled() or task.result().output for task in tasks]

    ended = run(main())
    assert ended[::3] == [True] * 20
    assert all(isinstance(each, str) for position, each in enumerate(ended) if position % 3)
