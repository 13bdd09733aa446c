"""Equal requests under way at the same time are answered by one, and each caller is none the worse for it."""

import asyncio
import gc
from typing import Annotated

import msgspec
import pytest
from helpers import ask, batcher_for, each

import microbatch as mb
from microbatch.testing import ScriptedTransport

COLD = {"temperature": 0}


def start(batcher, count, text="same", **options):
    return [asyncio.ensure_future(batcher.submit(ask(text), **{**COLD, **options})) for _ in range(count)]


async def settle(tasks):
    return await asyncio.gather(*tasks, return_exceptions=True)


def upstream_items(transport):
    return [text for call in transport.calls for _, text in call.items]


@pytest.mark.promise(of="single_flight")
async def test_a_thousand_equal_submits_make_one_upstream_item():
    transport = ScriptedTransport()
    async with batcher_for(transport) as batcher:
        replies = await settle(start(batcher, 1_000))
        stats = batcher.stats()
    assert upstream_items(transport) == ["same"]
    assert {reply.output for reply in replies} == {"SAME"}
    assert [reply.route for reply in replies].count("shared") == 999
    assert (stats.items, stats.answered, stats.shared, stats.queued) == (1_000, 1_000, 999, 0)
    assert len(batcher._parts.in_flight) == 0


async def test_nothing_is_kept_of_kinds_of_requests_that_nobody_asks_any_more():
    async with batcher_for(ScriptedTransport()) as batcher:
        for number in range(50):
            asked = [{"role": "system", "content": f"Kind {number}."}, {"role": "user", "content": "same"}]
            await asyncio.gather(*(batcher.submit(asked, temperature=0, priority=each) for each in ("normal", "low")))
        gc.collect()
        assert len(batcher._parts.in_flight._by_content) <= 1  # the latest lane is kept


@pytest.mark.promise(of="single_flight")
@each("when", [0.0, 0.01, 0.05, 0.5, 0.999])
@each("who", [0, 1, 4])
async def test_a_caller_who_leaves_takes_nobody_along(who, when):
    transport = ScriptedTransport(delay=0.9)
    async with batcher_for(transport, idle="wait", max_wait=0.1) as batcher:
        tasks = start(batcher, 5)
        await asyncio.sleep(when)
        tasks[who].cancel()
        ended = await settle(tasks)
        stats = batcher.stats()
    assert isinstance(ended.pop(who), asyncio.CancelledError)
    assert [reply.output for reply in ended] == ["SAME"] * 4
    assert upstream_items(transport) == ["same"]
    assert (stats.answered, stats.cancelled, stats.queued) == (4, 1, 0)


@pytest.mark.promise(of="single_flight")
@pytest.mark.parametrize("leavers", [range(1), range(4), range(5)])
async def test_leaving_in_the_very_turn_of_the_answer_books_everything_once(leavers):
    tasks = []

    def answer(call):
        for who in leavers:
            tasks[who].cancel()
        return "yes"

    transport = ScriptedTransport(answer)
    async with batcher_for(transport) as batcher:
        tasks += start(batcher, 5)
        ended = await settle(tasks)
        stats = batcher.stats()
    left = len(leavers)
    assert sum(isinstance(end, asyncio.CancelledError) for end in ended) == left
    assert (stats.answered, stats.cancelled, stats.failed, stats.queued) == (5 - left, left, 0, 0)
    claimed = sum((reply.usage for reply in ended if isinstance(reply, mb.Reply)), mb.Usage())
    total = claimed + stats.unclaimed
    assert (total.prompt_tokens, total.completion_tokens) == (stats.prompt_tokens, stats.completion_tokens)


async def test_the_last_one_to_leave_takes_the_call_along():
    transport = ScriptedTransport(delay=5.0)
    async with batcher_for(transport) as batcher:
        tasks = start(batcher, 3)
        await asyncio.sleep(1.0)
        for task in tasks[:2]:
            task.cancel()
        await asyncio.sleep(1.0)
        assert not transport.calls[0].cancelled
        tasks[2].cancel()
        await settle(tasks)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert transport.calls[0].cancelled
        # A flight whose callers are all gone is not joined.
        assert (await batcher.submit(ask("same"), **COLD)).output == "SAME"
    assert len(transport.calls) == 2


async def test_a_flight_all_of_whose_callers_were_cancelled_in_this_turn_is_not_joined():
    transport = ScriptedTransport(delay=1.0)
    async with batcher_for(transport) as batcher:
        tasks = start(batcher, 2)
        await asyncio.sleep(0.5)
        for task in tasks:
            task.cancel()
        assert (await batcher.submit(ask("same"), **COLD)).route == "single"
        await settle(tasks)
        (alone,) = start(batcher, 1, text="alone")
        await asyncio.sleep(0.5)
        alone.cancel()
        assert (await batcher.submit(ask("alone"), **COLD)).route == "single"
    assert len(transport.calls) == 4


@pytest.mark.promise(of="single_flight")
@pytest.mark.parametrize(
    "options",
    [{"temperature": 1}, {"temperature": None}, {"use_cache": False}],
)
async def test_what_may_differ_from_call_to_call_is_not_joined(options):
    transport = ScriptedTransport()
    async with batcher_for(transport) as batcher:
        await settle(start(batcher, 3, **options))
    assert upstream_items(transport) == ["same"] * 3


async def test_share_joins_whatever_the_temperature_but_not_who_wants_an_answer_of_their_own():
    transport = ScriptedTransport()
    async with batcher_for(transport, share=True) as batcher:
        await settle(start(batcher, 3, temperature=1))
        assert upstream_items(transport) == ["same"]
        await settle(start(batcher, 3, temperature=1, use_cache=False))
        assert upstream_items(transport) == ["same"] * 4


@pytest.mark.promise(of="lane")
@each(
    "other",
    [
        {"model": "m"},
        {"max_tokens": 9},
        {"params": {"top_p": 1}},
        {"params": {"seed": 1}},
        {"headers": {"Authorization": "Bearer b"}},
        {"tenant": "b"},
        {"output_type": list[int]},
    ],
)
@each("common", [{}, {"params": {"stop": "x"}}])
async def test_requests_that_differ_in_anything_are_never_joined(common, other):
    transport = ScriptedTransport(answer=lambda _: [1])
    options = {**common, **other, "params": {**common.get("params", {}), **other.get("params", {})}}
    async with batcher_for(transport) as batcher:
        await settle(start(batcher, 1, **common) + start(batcher, 1, **options))
    assert upstream_items(transport) == ["same"] * 2


def fact(*, picky):
    """A type of its own each time, with the same name and so the same schema."""

    class Fact(msgspec.Struct):
        number: int

        def __post_init__(self):
            if picky:
                raise ValueError("no")

    return Fact


async def test_equal_requests_of_two_types_share_an_answer_and_each_is_decoded_to_its_own():
    transport = ScriptedTransport(answer=lambda _: {"number": 7})
    easy, picky = fact(picky=False), fact(picky=True)
    async with batcher_for(transport) as batcher:
        tasks = start(batcher, 2, output_type=easy) + start(batcher, 1, output_type=picky)
        one, two, three = await settle(tasks)
        stats = batcher.stats()
    assert upstream_items(transport) == ["same"]
    assert type(one.output) is type(two.output) is easy
    assert one.output is not two.output
    assert isinstance(three, mb.MalformedAnswer)
    assert (stats.answered, stats.failed, stats.queued) == (2, 1, 0)


async def test_an_answer_that_fits_no_caller_that_is_left_belongs_to_none_and_all_is_counted_once():
    transport = ScriptedTransport(answer=lambda _: {"number": 7}, delay=1.0)
    async with batcher_for(transport) as batcher:
        (easy,) = start(batcher, 1, output_type=fact(picky=False))
        picky = start(batcher, 2, output_type=fact(picky=True))
        await asyncio.sleep(0.5)
        easy.cancel()
        ended = await settle([easy, *picky])
        await asyncio.sleep(1.0)
        stats = batcher.stats()
    assert [type(end) for end in ended] == [asyncio.CancelledError, mb.MalformedAnswer, mb.MalformedAnswer]
    assert (stats.items, stats.answered, stats.failed, stats.cancelled, stats.queued) == (3, 0, 2, 1, 0)
    assert stats.unclaimed.prompt_tokens == stats.prompt_tokens > 0


async def test_a_caller_that_is_cancelled_in_the_step_in_which_the_others_fail_is_counted_once():
    tasks = []

    def refuse(_):
        tasks[1].cancel()
        return mb.AuthFailed("no", status=401)

    async with batcher_for(ScriptedTransport(refuse)) as batcher:
        tasks += start(batcher, 3)
        ended = await settle(tasks)
        await asyncio.sleep(0)
        stats = batcher.stats()
        assert [type(end) for end in ended] == [mb.AuthFailed, asyncio.CancelledError, mb.AuthFailed]
        assert (stats.failed, stats.cancelled, stats.queued) == (2, 1, 0)
        assert len(batcher._parts.in_flight) == 0


async def test_who_waits_without_limit_may_join_bulk_work():
    async def silent():
        yield mb.Request(ask("same"), temperature=0)
        await asyncio.sleep(1.0)

    async with batcher_for(ScriptedTransport(), idle="wait", max_wait=float("inf")) as batcher:
        bulk = asyncio.ensure_future(anext(batcher.map(silent())))
        await asyncio.sleep(0.1)
        (joined,) = start(batcher, 1)
        await asyncio.sleep(0.1)
        (lane,) = batcher._engine.lanes
        assert (lane.live, lane._bulk) == (1, 0)
        batcher.flush()
        assert (await joined).output == "SAME"
        assert (await bulk).unwrap().output == "SAME"
        assert (lane.live, lane._bulk) == (0, 0)


@pytest.mark.promise(of="timeout")
async def test_each_caller_has_a_deadline_of_its_own():
    loop = asyncio.get_running_loop()
    transport = ScriptedTransport(delay=2.0)
    async with batcher_for(transport) as batcher:
        tasks = start(batcher, 1, timeout=1.0) + start(batcher, 1, timeout=1.5) + start(batcher, 1)
        with pytest.raises(mb.DeadlineExceeded):
            await tasks[0]
        assert loop.time() == 1.0
        with pytest.raises(mb.DeadlineExceeded):
            await tasks[1]
        assert loop.time() == 1.5
        assert (await tasks[2]).output == "SAME"
        assert loop.time() == 2.0
        assert batcher.stats().failed == 2
    assert transport.calls[0].call.timeout is None
    assert upstream_items(transport) == ["same"]


async def test_a_call_is_given_as_long_as_its_most_patient_caller_waits():
    transport = ScriptedTransport()
    async with batcher_for(transport) as batcher:
        await settle(start(batcher, 1, timeout=1.0) + start(batcher, 1, timeout=3.0) + start(batcher, 1, timeout=2.0))
    assert transport.calls[0].call.timeout == 3.0


async def test_when_all_deadlines_have_passed_the_call_is_cancelled():
    transport = ScriptedTransport(delay=9.0)
    async with batcher_for(transport) as batcher:
        ended = await settle(start(batcher, 1, timeout=1.0) + start(batcher, 1, timeout=2.0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert transport.calls[0].cancelled
        assert batcher.stats().queued == 0
    assert [type(end) for end in ended] == [mb.DeadlineExceeded] * 2


async def test_everybody_gets_an_error_object_of_their_own():
    transport = ScriptedTransport(mb.AuthFailed("no", status=401), delay=0.1)
    async with batcher_for(transport) as batcher:
        ended = await settle(start(batcher, 3))
        assert batcher.stats().failed == 3
    assert [type(end) for end in ended] == [mb.AuthFailed] * 3
    assert len({id(end) for end in ended}) == 3
    assert {end.attempts for end in ended} == {1}


async def test_errors_are_not_remembered():
    transport = ScriptedTransport(mb.AuthFailed("no", status=403))
    async with batcher_for(transport) as batcher:
        await settle(start(batcher, 2))
        assert (await batcher.submit(ask("same"), **COLD)).output == "SAME"


@pytest.mark.promise(of="usage")
@pytest.mark.parametrize("count", [2, 3, 7])
async def test_shares_add_up_to_the_bill(count):
    transport = ScriptedTransport()
    async with mb.Microbatcher(transport, tokens="bytes", prices={"m": mb.Price(input=2.0, output=8.0)}) as batcher:
        tasks = start(batcher, count, model="m") + start(batcher, 2, text="other", model="m")
        replies = [await reply.settled() for reply in await settle(tasks)]
        stats = batcher.stats()
    total = sum((reply.usage for reply in replies), mb.Usage())
    assert (total.prompt_tokens, total.completion_tokens) == (stats.prompt_tokens, stats.completion_tokens)
    assert sum(reply.cost_usd for reply in replies) == pytest.approx(stats.cost_usd, abs=1e-9)
    assert not any(reply.usage.estimated for reply in replies)
    assert stats.unbatched_calls == count + 2


@pytest.mark.promise(of="usage")
async def test_early_answers_are_estimates_until_the_call_has_ended():
    def slowly(call):
        return call.reply([(name, "x" * 40) for name, _ in call.items])

    transport = ScriptedTransport(slowly, piece=10, interval=1.0)
    async with batcher_for(transport) as batcher:
        tasks = start(batcher, 3, text="a") + start(batcher, 1, text="b")
        first = await tasks[0]
        assert first.usage.estimated
        assert first.finish_reason is None
        await first.settled()
        assert not first.usage.estimated
        assert first.finish_reason == "stop"
        replies = await settle(tasks)
        stats = batcher.stats()
    total = sum((reply.usage for reply in replies), mb.Usage())
    assert (total.prompt_tokens, total.completion_tokens) == (stats.prompt_tokens, stats.completion_tokens)


# --- priorities


@pytest.mark.promise(of="single_flight")
async def test_an_urgent_follower_takes_an_unsent_request_along():
    loop = asyncio.get_running_loop()
    transport = ScriptedTransport()
    async with batcher_for(transport, idle="wait", max_wait=5.0) as batcher:
        slow = start(batcher, 1) + start(batcher, 1, text="neighbour")
        await asyncio.sleep(1.0)
        (urgent,) = start(batcher, 1, priority="high")
        assert (await urgent).route == "shared"
        assert loop.time() == 1.0
        assert (await slow[0]).output == "SAME"
        assert loop.time() == 1.0
        await slow[1]
        assert loop.time() == 5.0
        assert batcher.stats().singles_by_reason == {"high": 1, "no_company": 1}
    assert upstream_items(transport) == ["same", "neighbour"]


@pytest.mark.promise(of="single_flight")
async def test_an_urgent_follower_does_not_wait_for_what_is_under_way():
    transport = ScriptedTransport(delay=3.0)
    async with batcher_for(transport) as batcher:
        (slow,) = start(batcher, 1)
        await asyncio.sleep(1.0)
        urgent = start(batcher, 2, priority="high")
        routes = {reply.route for reply in await settle(urgent)}
        await slow
    assert routes == {"single", "shared"}
    assert upstream_items(transport) == ["same"] * 2


async def test_a_normal_follower_takes_a_low_request_into_its_own_lane():
    loop = asyncio.get_running_loop()
    transport = ScriptedTransport()
    async with batcher_for(transport, idle="wait", max_wait=0.5, low_max_wait=60.0) as batcher:
        low = start(batcher, 1, priority="low") + start(batcher, 1, priority="low", text="stays")
        await asyncio.sleep(1.0)
        (normal,) = start(batcher, 1)
        await normal
        assert loop.time() == 1.5
        await low[0]
        assert not low[1].done()
        assert batcher.flush().done()
        await settle(low)
    assert upstream_items(transport) == ["same", "stays"]


async def test_a_low_follower_of_a_normal_request_holds_it_up_in_no_way():
    loop = asyncio.get_running_loop()
    async with batcher_for(ScriptedTransport(), idle="wait", max_wait=0.5, low_max_wait=60.0) as batcher:
        tasks = start(batcher, 1) + start(batcher, 1, priority="low")
        await settle(tasks)
        assert loop.time() == 0.5


async def test_an_impatient_follower_makes_its_lane_leave_sooner():
    loop = asyncio.get_running_loop()
    async with batcher_for(ScriptedTransport(), idle="wait", max_wait=10.0) as batcher:
        (first,) = start(batcher, 1)
        await asyncio.sleep(1.0)
        start(batcher, 1, timeout=2.0)
        await first
        assert loop.time() == 2.0


async def test_an_urgent_follower_promotes_what_waits_alone_for_a_slot():
    transport = ScriptedTransport(delay=1.0)
    params = {"seed": 1}
    async with batcher_for(transport, max_concurrent_batches=1) as batcher:
        busy = start(batcher, 1, text="busy")
        await asyncio.sleep(0.1)
        others = start(batcher, 3, text="other", params=params, temperature=1)
        slow = start(batcher, 1, params=params)
        await asyncio.sleep(0.1)
        urgent = start(batcher, 1, params=params, priority="high")
        await settle(busy + others + slow + urgent)
    assert upstream_items(transport) == ["busy", "same", "other", "other", "other"]


# --- bounds, bulk, what goes alone


async def test_followers_count_against_max_queued():
    async with batcher_for(ScriptedTransport(delay=1.0), max_queued=3, when_full="reject") as batcher:
        ended = await settle(start(batcher, 5))
    assert [type(end) for end in ended] == [mb.Reply] * 3 + [mb.Overloaded] * 2


async def test_what_goes_alone_is_joined_too_and_bodies_are_copies():
    body = {"choices": [{"message": {"content": "hm"}}]}
    transport = ScriptedTransport(lambda _: ("hm", mb.Completion("stop", usage=mb.Usage(9, 9), body=body)))
    async with batcher_for(transport) as batcher:
        one, two = await settle(start(batcher, 2, params={"logprobs": True}))
    assert len(transport.calls) == 1
    assert one.body == two.body == body
    assert one.body is not two.body


async def test_a_map_joins_itself_and_others_and_all_of_it_ends():
    transport = ScriptedTransport()
    requests = [mb.Request(ask(f"q{number % 3}"), temperature=0) for number in range(9)]
    async with batcher_for(transport) as batcher:
        other = start(batcher, 1, text="q1")
        results = [result.unwrap().output async for result in batcher.map(requests, ordered=True)]
        await settle(other)
        assert batcher.stats().queued == 0
    assert results == ["Q0", "Q1", "Q2"] * 3
    assert sorted(upstream_items(transport)) == ["q0", "q1", "q2"]


async def test_a_map_that_joined_what_another_one_left_unsent_sends_it():
    transport = ScriptedTransport()
    async with batcher_for(transport) as batcher:
        requests = [mb.Request(ask(f"q{number}"), temperature=0) for number in range(19)]
        first = batcher.map(requests, max_pending=18)
        assert (await anext(first)).reply is not None  # 16 have left; two wait for a consumer that is busy elsewhere
        again = [mb.Request(ask(f"q{number}"), temperature=0) for number in (16, 17)]
        assert [result.unwrap().output async for result in batcher.map(again, ordered=True)] == ["Q16", "Q17"]
        await first.aclose()
        assert batcher.stats().queued == 0
    assert len(upstream_items(transport)) == 18


async def test_a_map_whose_unsent_request_was_promoted_by_another_that_left_sends_it_all_the_same():
    loop = asyncio.get_running_loop()

    async def silent(priority):
        yield mb.Request(ask("q"), temperature=0, priority=priority)
        await asyncio.sleep(1.0)  # as long as more may come, the request waits for company

    async with batcher_for(ScriptedTransport()) as batcher:
        first = asyncio.ensure_future(anext(batcher.map(silent("low"))))
        await asyncio.sleep(0.25)
        second = asyncio.ensure_future(anext(batcher.map(silent("normal"))))
        await asyncio.sleep(0.25)
        assert batcher.stats().queued == 2
        second.cancel()
        assert (await first).unwrap().output == "Q"
        assert loop.time() == 1.0
        await settle([second])


async def test_a_map_that_leaves_takes_nothing_from_who_joined_it():
    transport = ScriptedTransport(delay=1.0)
    async with batcher_for(transport) as batcher:
        first = batcher.map([mb.Request(ask("q"), temperature=0)])
        waiting = asyncio.ensure_future(anext(first))
        await asyncio.sleep(0.5)
        (joined,) = start(batcher, 1, text="q")
        await asyncio.sleep(0)
        waiting.cancel()
        assert (await joined).output == "Q"
        await settle([waiting])
        assert batcher.stats().queued == 0
    assert len(transport.calls) == 1


async def test_closing_ends_every_seat():
    transport = ScriptedTransport(delay=60.0)
    batcher = batcher_for(transport)
    await batcher.open()
    tasks = start(batcher, 3)
    await asyncio.sleep(1.0)
    await batcher.aclose(grace=1.0)
    ended = await settle(tasks)
    assert [type(end) for end in ended] == [mb.ShutDown] * 3
    assert batcher.stats().queued == 0


async def test_an_annotated_limit_is_part_of_what_is_asked():
    transport = ScriptedTransport(answer=lambda _: 3)
    async with batcher_for(transport) as batcher:
        tasks = start(batcher, 1, output_type=int)
        tasks += start(batcher, 1, output_type=Annotated[int, msgspec.Meta(ge=0)])
        await settle(tasks)
    assert len(upstream_items(transport)) == 2
