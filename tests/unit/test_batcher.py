"""The batcher as its callers see it."""

import asyncio

import microbatch as mb
from microbatch.testing.scripted import ScriptedTransport


def ask(text, system="Shout."):
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


async def test_concurrent_submits_leave_as_one_combined_prompt():
    transport = ScriptedTransport()
    async with mb.Microbatcher(transport, tokens="bytes") as batcher:
        replies = await asyncio.gather(*(batcher.submit(ask(f"item {i}")) for i in range(10)))
    assert [reply.output for reply in replies] == [f"ITEM {i}" for i in range(10)]
    assert len(transport.calls) == 1
    assert batcher.upstream_calls == 1
    assert {reply.route for reply in replies} == {"batch"}
