"""What lanes learn from trouble: smaller batches, smaller prompts, or none combined at all."""

from __future__ import annotations

import asyncio
import logging

import pytest
from helpers import ask

import microbatch as mb
from microbatch.testing import ScriptedTransport, SimulatedModel, SimulatedTransport

LONG = "You sort the products of an online shop. Read the name and the description of one product. " * 6


async def rounds(batcher, count, size=16, system="Shout."):
    """Submit *size* requests at once, *count* times; return what they ended with."""
    ended = []
    for number in range(count):
        asked = (batcher.submit(ask(f"item {number}.{item:02}", system)) for item in range(size))
        ended += await asyncio.gather(*asked, return_exceptions=True)
    return ended


def sizes(transport):
    return [len(call.items) for call in transport.calls]


async def test_damage_halves_the_batches_of_its_lane_and_complete_replies_grow_them_back():
    def damaged(call):
        return call.reply((name, text.upper()) for name, text in call.items[1:])

    transport = ScriptedTransport(damaged)
    async with mb.Microbatcher(transport, tokens="bytes") as batcher:
        await rounds(batcher, 3)
    assert sizes(transport)[:2] == [16, 1]
    # 8, and one more after each complete reply to a full batch.
    assert sizes(transport)[2:] == [8, 8, 9, 7] or max(sizes(transport)[2:]) <= 10
    assert max(sizes(transport)[2:]) > 8


async def test_a_reply_whose_only_fault_is_order_costs_the_lane_nothing():
    def shuffled(call):
        return call.reply((name, text.upper()) for name, text in reversed(call.items))

    transport = ScriptedTransport(shuffled)
    async with mb.Microbatcher(transport, tokens="bytes") as batcher:
        await rounds(batcher, 2)
    assert sizes(transport) == [16, 16]


@pytest.mark.parametrize(
    "refusal", [mb.ContextTooLong("too long", status=400), mb.BadRequest("too large", status=413)], ids=["400", "413"]
)
@pytest.mark.promise(of="poison")
async def test_a_refusal_for_size_lowers_the_lanes_limit_before_the_halves_go(refusal):
    """At most 2n - 1 calls once, and then none are wasted: the window does not grow, so the limit does not either."""

    def narrow(call):
        if len(call.items) > 4:
            raise type(refusal)(*refusal.args, status=refusal.status)
        if not call.combined:
            return call.items[0][1].upper()
        return call.reply((name, text.upper()) for name, text in call.items)

    transport = ScriptedTransport(*[narrow] * 200)
    async with mb.Microbatcher(transport, tokens="bytes") as batcher:
        first = await rounds(batcher, 1)
        assert sizes(transport) == [16, 8, 8, 4, 4, 4, 4]
        transport.calls.clear()
        later = await rounds(batcher, 3)
    assert [reply.output for reply in first + later] == [
        f"ITEM {number}.{item:02}" for number in [0, *range(3)] for item in range(16)
    ]
    assert max(sizes(transport)) == 4
    assert len(transport.calls) == 12


async def test_while_halves_are_on_their_way_the_lane_sends_no_more_than_half_either():
    release = asyncio.Event()

    async def step(call):
        if len(call.items) == 16:
            raise mb.ContextTooLong("too long", status=400)
        await release.wait()
        return call.reply((name, text.upper()) for name, text in call.items)

    transport = ScriptedTransport(*[step] * 20)
    async with mb.Microbatcher(transport, tokens="bytes") as batcher:
        tasks = [asyncio.ensure_future(batcher.submit(ask(f"item 0.{item:02}"))) for item in range(16)]
        await asyncio.sleep(0.1)
        assert sizes(transport) == [16, 8, 8]
        tasks += [asyncio.ensure_future(batcher.submit(ask(f"item 1.{item:02}"))) for item in range(16)]
        await asyncio.sleep(0.2)
        assert sizes(transport) == [16, 8, 8, 8, 8]
        release.set()
        await asyncio.wait(tasks)


async def test_a_lane_whose_repairs_eat_up_its_savings_stops_combining_for_a_while(caplog):
    """Every combined reply is worthless, so each request is paid for several times until the lane gives combining up."""
    garbage = [True]

    def step(call):
        if call.combined:
            return "I cannot do that." if garbage[0] else call.reply((name, text.upper()) for name, text in call.items)
        return call.items[0][1].upper()

    transport = ScriptedTransport(*[step] * 5_000)
    async with mb.Microbatcher(transport, policy=mb.FlushPolicy(max_batch_size=4), tokens="bytes") as batcher:
        with caplog.at_level(logging.WARNING, "microbatch"):
            await rounds(batcher, 20, system=LONG)
        stats = batcher.stats()
        assert stats.lanes_parted == 1
        assert "costs more than combining saves" in caplog.text
        apart = stats.singles_by_reason["not_cheaper"]
        assert apart > 100
        batches = stats.batches
        garbage[0] = False
        await rounds(batcher, 40, system=LONG)
        stats = batcher.stats()
        assert stats.singles_by_reason["not_cheaper"] == 500, "then it is tried again"
        assert stats.batches > batches + 10
        assert stats.answered == 60 * 16


async def test_a_little_damage_does_not_stop_a_lane():
    def damaged(call):
        return call.reply((name, text.upper()) for name, text in call.items[1:])

    script = [damaged if number % 4 == 0 else None for number in range(80)]

    def usual(call):
        step = script[len(transport.calls) % 80] if call.combined else None
        if step is not None:
            return step(call)
        return call.reply((n, t.upper()) for n, t in call.items) if call.combined else call.items[0][1].upper()

    transport = ScriptedTransport(*[usual] * 500)
    async with mb.Microbatcher(transport, tokens="bytes") as batcher:
        await rounds(batcher, 40, system=LONG * 3)
        assert batcher.stats().lanes_parted == 0


# --- merge="when-cheaper"


async def merged(system, count=16, *, prices=None, model=None, merge="when-cheaper"):
    policy = mb.FlushPolicy(merge=merge, idle="wait", max_output_tokens=10**6)
    async with mb.Microbatcher(SimulatedTransport(SimulatedModel()), policy=policy, prices=prices) as batcher:
        replies = [
            reply
            for number in range(2)
            for reply in await asyncio.gather(
                *(batcher.submit(ask(f"item {number}.{item}", system), model=model) for item in range(count))
            )
        ]
        return {reply.route for reply in replies}, batcher.stats()


async def test_when_cheaper_combines_what_shares_much_and_sends_alone_what_shares_little():
    routes, stats = await merged(LONG)
    assert routes == {"batch"}
    routes, stats = await merged("Shout.")
    assert routes == {"single"}
    assert dict(stats.singles_by_reason) == {"not_cheaper": 32}


async def test_when_cheaper_judges_by_the_size_of_the_batch_that_leaves():
    """Fifty shared tokens are worth it for sixteen, not for two."""
    system = "Sort the product into the shop's categories. " * 7
    assert (await merged(system, 16))[0] == {"batch"}
    assert (await merged(system, 2))[0] == {"single"}


async def test_when_cheaper_weighs_answers_by_their_price_and_four_times_where_none_is_known():
    system = "Sort the product into the shop's categories. " * 7
    dear = {"m": mb.Price(input=1.0, output=100.0)}
    assert (await merged(system, 16, prices=dear, model="m"))[0] == {"single"}
    assert (await merged(system, 16, prices={"m": mb.Price(input=1.0, output=1.0)}, model="m"))[0] == {"batch"}
    assert (await merged(system, 16, model="nobody-knows"))[0] == {"batch"}


async def test_a_hundred_in_a_row_that_go_alone_for_their_price_are_worth_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "microbatch"):
        await merged("Shout.", 101)
    assert sum("in a row were not cheaper together" in record.message for record in caplog.records) == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING, "microbatch"):
        _, stats = await merged("Shout.", 101, prices={"m": mb.Price(1.0, 100.0)}, model="m", merge="auto")
    assert (stats.singles_by_reason, caplog.records) == ({"not_cheaper": 202}, [])
