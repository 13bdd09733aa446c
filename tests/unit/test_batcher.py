"""When requests leave, and what their callers get."""

import asyncio
import contextvars
import inspect
from typing import Literal
from unittest import mock

import msgspec
import pytest
from helpers import ask, batcher_for, each

import microbatch as mb
from microbatch.batching.lane_table import LaneTable
from microbatch.batching.scheduler import Scheduler
from microbatch.openai import AsyncOpenAI
from microbatch.testing import ScriptedTransport


async def gather_outputs(batcher, texts, **options):
    replies = await asyncio.gather(*(batcher.submit(ask(text), **options) for text in texts))
    return [reply.output for reply in replies]


async def test_concurrent_submits_leave_as_one_combined_prompt():
    transport = ScriptedTransport()
    async with batcher_for(transport) as batcher:
        replies = await asyncio.gather(*(batcher.submit(ask(f"item {i}")) for i in range(10)))
    assert [reply.output for reply in replies] == [f"ITEM {i}" for i in range(10)]
    assert len(transport.calls) == 1
    assert batcher.upstream_calls == 1
    assert {reply.route for reply in replies} == {"batch"}
    assert {reply.batch_size for reply in replies} == {10}


async def test_a_batch_of_one_is_sent_as_the_callers_own_messages():
    transport = ScriptedTransport()
    async with batcher_for(transport) as batcher:
        reply = await batcher.submit(ask("alone"))
    assert reply.output == "ALONE"
    assert reply.route == "single"
    assert list(transport.calls[0].call.messages) == ask("alone")
    assert batcher.stats().singles_by_reason == {"idle": 1}


async def test_a_lone_submit_on_an_idle_lane_waits_for_nobody():
    loop = asyncio.get_running_loop()
    async with batcher_for(ScriptedTransport(), max_wait=0.05) as batcher:
        reply = await batcher.submit(ask("now"))
        assert loop.time() == 0.0
    assert reply.waited == 0.0


async def test_who_leaves_in_the_turn_of_the_flush_does_not_keep_the_next_one_waiting():
    transport = ScriptedTransport()
    async with batcher_for(transport, max_wait=5.0, max_batch_size=2) as batcher:
        tasks = [asyncio.ensure_future(batcher.submit(ask(text))) for text in "abc"]
        await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[1].cancel()
        await asyncio.wait(tasks)
        assert tasks[2].result().waited == 0.0


async def test_idle_wait_keeps_the_first_request_for_max_wait():
    loop = asyncio.get_running_loop()
    transport = ScriptedTransport()
    async with batcher_for(transport, max_wait=0.05, idle="wait") as batcher:
        first = asyncio.ensure_future(batcher.submit(ask("a")))
        await asyncio.sleep(0.03)
        second = await batcher.submit(ask("b"))
        await first
        assert loop.time() == pytest.approx(0.05)
    assert second.batch_size == 2
    assert batcher.stats().batches_by_reason == {"timeout": 1}


async def test_a_busy_lane_collects_until_its_last_call_ends():
    transport = ScriptedTransport(delay=1.0)
    async with batcher_for(transport, max_wait=30) as batcher:
        first = asyncio.ensure_future(batcher.submit(ask("first")))
        await asyncio.sleep(0.1)
        rest = [asyncio.ensure_future(batcher.submit(ask(f"r{i}"))) for i in range(5)]
        await asyncio.gather(first, *rest)
    assert [len(call.items) for call in transport.calls] == [1, 5]
    assert [call.started for call in transport.calls] == [0.0, 1.0]
    assert batcher.stats().batches_by_reason == {"idle": 1}


async def test_max_wait_counts_from_the_first_item_even_while_the_lane_is_busy():
    transport = ScriptedTransport(delay=10.0)
    async with batcher_for(transport, max_wait=0.5) as batcher:
        tasks = [asyncio.ensure_future(batcher.submit(ask("first")))]
        await asyncio.sleep(0.1)
        tasks += [asyncio.ensure_future(batcher.submit(ask(f"{i}"))) for i in range(3)]
        await asyncio.gather(*tasks)
    assert [call.started for call in transport.calls] == [0.0, pytest.approx(0.6)]


async def test_a_full_lane_leaves_at_once_as_full_batches():
    transport = ScriptedTransport()
    async with batcher_for(transport, max_batch_size=4, idle="wait", max_wait=5) as batcher:
        await gather_outputs(batcher, [f"{i}" for i in range(10)])
    assert [len(call.items) for call in transport.calls] == [4, 4, 2]
    assert batcher.stats().batches_by_reason == {"size": 2, "timeout": 1}


async def test_half_of_the_shortest_deadline_cuts_the_wait():
    transport = ScriptedTransport()
    async with batcher_for(transport, idle="wait", max_wait=60) as batcher:
        slow = asyncio.ensure_future(batcher.submit(ask("patient")))
        await asyncio.sleep(1)
        await batcher.submit(ask("hurried"), timeout=4)
        await slow
    assert [call.started for call in transport.calls] == [3.0]


async def test_flush_sends_what_waits():
    transport = ScriptedTransport()
    async with batcher_for(transport, idle="wait", max_wait=60) as batcher:
        tasks = [asyncio.ensure_future(batcher.submit(ask(f"{i}"))) for i in range(3)]
        await asyncio.sleep(0)
        await batcher.flush()
        await asyncio.gather(*tasks)
        assert asyncio.get_running_loop().time() == 0.0
    assert batcher.stats().batches_by_reason == {"explicit": 1}


async def test_a_due_lane_fills_while_it_waits_for_a_slot():
    transport = ScriptedTransport(delay=1.0)
    async with batcher_for(transport, max_concurrent_batches=1, max_batch_size=8) as batcher:
        blocker = asyncio.ensure_future(batcher.submit(ask("x", system="another lane")))
        await asyncio.sleep(0.1)
        early = asyncio.ensure_future(batcher.submit(ask("early")))
        await asyncio.sleep(0.5)
        late = [asyncio.ensure_future(batcher.submit(ask(f"{i}"))) for i in range(7)]
        await asyncio.gather(blocker, early, *late)
    assert [len(call.items) for call in transport.calls] == [1, 8]


@pytest.mark.promise(of="fair")
async def test_lanes_take_turns_for_slots():
    transport = ScriptedTransport(delay=1.0)
    async with batcher_for(transport, max_concurrent_batches=1, max_batch_size=2, max_wait=0) as batcher:
        texts = [(f"{lane}{i}", lane) for lane in "ab" for i in range(4)]
        await asyncio.gather(*(batcher.submit(ask(text, system=lane)) for text, lane in texts))
    systems = [call.call.messages[0]["content"] for call in transport.calls]
    assert systems == ["a", "b", "a", "b"]


@pytest.mark.parametrize(
    "difference",
    [
        {"model": "other"},
        {"max_tokens": 7},
        {"temperature": 0.5},
        {"params": {"top_p": 0.5}},
        {"headers": {"Authorization": "Bearer b"}},
        {"tenant": "b"},
        {"priority": "low"},
        {"output_type": Literal["A", "B"]},
    ],
    ids=lambda difference: next(iter(difference)),
)
@pytest.mark.promise(of="lane")
async def test_requests_that_differ_in_anything_never_share_a_prompt(difference):
    transport = ScriptedTransport()
    async with batcher_for(transport, max_wait=0.1, low_max_wait=0.1, idle="wait") as batcher:
        pairs = [batcher.submit(ask(text)) for text in "ab"] + [
            batcher.submit(ask(text), **difference) for text in "ab"
        ]
        replies = await asyncio.gather(*pairs)
    assert sorted(len(call.items) for call in transport.calls) == [2, 2]
    assert [reply.output for reply in replies] == ["A", "B", "A", "B"]


@pytest.mark.promise(of="lane")
async def test_different_shared_messages_never_share_a_prompt():
    transport = ScriptedTransport()
    async with batcher_for(transport) as batcher:
        await asyncio.gather(*(batcher.submit(ask(text, system)) for text in "ab" for system in ("one", "two")))
    assert sorted(call.call.messages[0]["content"] for call in transport.calls) == ["one", "two"]


@pytest.mark.parametrize(
    "params",
    [
        {"tools": [{"type": "function"}]},
        {"n": 2},
        {"logprobs": True},
        {"stop": ["x"]},
        {"seed": 1},
        {"response_format": {"type": "json_object", "schema": {}}},
    ],
    ids=lambda params: next(iter(params)),
)
async def test_what_means_one_answer_goes_alone(params):
    transport = ScriptedTransport()
    async with batcher_for(transport) as batcher:
        replies = await asyncio.gather(*(batcher.submit(ask(text), params=params) for text in "ab"))
    assert {reply.route for reply in replies} == {"single"}
    assert batcher.stats().singles_by_reason == {"not_combinable": 2}


@pytest.mark.parametrize(
    "last",
    [
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "x", "name": "ann"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "data:,"}}],
        },
    ],
    ids=["not the user's", "named", "with an image"],
)
async def test_a_last_message_that_is_not_one_plain_user_text_goes_alone(last):
    transport = ScriptedTransport(answer=lambda _: "ok")
    async with batcher_for(transport) as batcher:
        await asyncio.gather(*(batcher.submit([last]) for _ in range(2)))
    assert [list(call.call.messages) for call in transport.calls] == [[last], [last]]


async def test_a_message_object_and_its_dict_are_the_same_request():
    transport = ScriptedTransport()
    async with batcher_for(transport) as batcher:
        system = mb.Message("system", "Shout.")
        replies = await asyncio.gather(
            batcher.submit([system, mb.Message("user", "a")]),
            batcher.submit([system, {"role": "user", "content": "b"}]),
        )
    assert [reply.output for reply in replies] == ["A", "B"]
    assert len(transport.calls) == 1


async def test_high_priority_goes_alone_at_once():
    transport = ScriptedTransport()
    async with batcher_for(transport, idle="wait", max_wait=60) as batcher:
        reply = await batcher.submit(ask("now"), priority="high")
    assert reply.route == "single"
    assert batcher.stats().singles_by_reason == {"high": 1}


async def test_low_priority_ignores_idle_and_waits_longer():
    transport = ScriptedTransport()
    async with batcher_for(transport, low_max_wait=3.0) as batcher:
        await asyncio.gather(*(batcher.submit(ask(text), priority="low") for text in "ab"))
    assert [call.started for call in transport.calls] == [3.0]


async def test_an_item_too_long_to_share_a_prompt_goes_alone():
    transport = ScriptedTransport()
    async with batcher_for(transport, max_batch_tokens=2_000) as batcher:
        replies = await asyncio.gather(*(batcher.submit(ask(text)) for text in ("a", "b", "c" * 3_000, "d" * 20_000)))
    assert [reply.route for reply in replies] == ["batch", "batch", "single", "single"]
    assert batcher.stats().singles_by_reason == {"too_long": 2}


async def test_the_expected_output_bounds_a_batch():
    transport = ScriptedTransport()
    async with batcher_for(transport, max_output_tokens=300) as batcher:
        await asyncio.gather(*(batcher.submit(ask(f"{i}"), max_tokens=50) for i in range(8)))
    # 1.2 x 50 + 16 = 76 for each, so three fit.
    assert [len(call.items) for call in transport.calls] == [3, 3, 2]
    assert transport.calls[0].call.max_tokens == 3 * 76
    assert batcher.stats().batches_by_reason["output"] == 2


async def test_an_answer_longer_than_max_tokens_is_asked_again_alone():
    transport = ScriptedTransport(answer=lambda text: "long " * 40 if text == "b" else text)
    async with batcher_for(transport) as batcher:
        replies = await asyncio.gather(*(batcher.submit(ask(text), max_tokens=60) for text in "abcd"))
    assert [reply.route for reply in replies] == ["batch", "fallback", "batch", "batch"]
    assert batcher.fallback_calls == 1


# --- leaving


@pytest.mark.promise(of="cancel")
async def test_an_unsent_item_leaves_with_its_caller():
    transport = ScriptedTransport()
    async with batcher_for(transport, idle="wait", max_wait=1) as batcher:
        tasks = [asyncio.ensure_future(batcher.submit(ask(f"{i}"))) for i in range(4)]
        await asyncio.sleep(0.5)
        tasks[1].cancel()
        await asyncio.wait(tasks)
    assert [text for _, text in transport.calls[0].items] == ["0", "2", "3"]
    assert tasks[1].cancelled()
    assert [task.result().output for task in tasks if not task.cancelled()] == ["0", "2", "3"]
    stats = batcher.stats()
    assert (stats.items, stats.answered, stats.cancelled, stats.queued) == (4, 3, 1, 0)


@pytest.mark.promise(of="cancel")
async def test_a_caller_who_leaves_in_flight_harms_nobody():
    transport = ScriptedTransport(delay=1.0)
    async with batcher_for(transport) as batcher:
        tasks = [asyncio.ensure_future(batcher.submit(ask(f"{i}"))) for i in range(4)]
        await asyncio.sleep(0.5)
        tasks[2].cancel()
        await asyncio.wait(tasks)
    assert [task.result().output for task in tasks if not task.cancelled()] == ["0", "1", "3"]
    assert not transport.calls[0].cancelled


@pytest.mark.promise(of="cancel")
async def test_the_last_caller_takes_the_call_with_it():
    loop = asyncio.get_running_loop()
    transport = ScriptedTransport(delay=10.0)
    async with batcher_for(transport) as batcher:
        tasks = [asyncio.ensure_future(batcher.submit(ask(f"{i}"))) for i in range(3)]
        await asyncio.sleep(1)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    assert transport.calls[0].cancelled
    assert loop.time() == 1.0


async def test_a_lane_without_requests_is_forgotten():
    transport = ScriptedTransport()
    async with batcher_for(transport, idle="wait", max_wait=1) as batcher:
        task = asyncio.ensure_future(batcher.submit(ask("x")))
        await asyncio.sleep(0)
        assert len(list(batcher._engine.lanes)) == 1
        task.cancel()
        await asyncio.wait([task])
        assert not list(batcher._engine.lanes)
    assert transport.calls == []


@pytest.mark.promise(of="timeout")
async def test_a_timeout_ends_the_submit_on_time():
    loop = asyncio.get_running_loop()
    transport = ScriptedTransport(delay=10.0)
    async with batcher_for(transport) as batcher:
        with pytest.raises(mb.DeadlineExceeded) as caught:
            await batcher.submit(ask("x"), timeout=2.5)
        assert loop.time() == 2.5
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.attempts == 1
    assert transport.calls[0].cancelled
    assert transport.calls[0].call.timeout == 2.5


@pytest.mark.promise(of="timeout")
async def test_a_calls_timeout_is_the_longest_of_its_callers():
    transport = ScriptedTransport()
    async with batcher_for(transport) as batcher:
        await asyncio.gather(batcher.submit(ask("a"), timeout=3), batcher.submit(ask("b"), timeout=5))
        await asyncio.gather(batcher.submit(ask("a"), timeout=3), batcher.submit(ask("b")))
    assert [call.call.timeout for call in transport.calls] == [5.0, None]


# --- errors


@pytest.mark.promise(of="context")
async def test_each_caller_of_a_failed_batch_gets_an_error_of_its_own():
    transport = ScriptedTransport(mb.AuthFailed("boom", status=401))
    async with batcher_for(transport) as batcher:
        errors = await asyncio.gather(*(batcher.submit(ask(text)) for text in "abc"), return_exceptions=True)
    assert [type(error) for error in errors] == [mb.AuthFailed] * 3
    assert len({id(error) for error in errors}) == 3
    assert {error.status for error in errors} == {401}
    assert {error.attempts for error in errors} == {1}
    assert len(transport.calls) == 1


async def test_a_transport_that_raises_something_else_is_a_transport_error():
    transport = ScriptedTransport(ZeroDivisionError("oops"))
    async with batcher_for(transport) as batcher:
        with pytest.raises(mb.TransportError) as caught:
            await batcher.submit(ask("x"))
    assert isinstance(caught.value.__cause__.__cause__, ZeroDivisionError)


@pytest.mark.promise(of="bugs")
async def test_a_bug_in_composing_fails_its_batch_and_no_other(caplog):
    broken = [True]

    def draw(count):
        if broken.pop():
            raise RuntimeError("bad randomness")
        return ["bcdfg"] * count

    broken.insert(0, False)
    transport = ScriptedTransport()
    async with mb.Microbatcher(transport, tokens="bytes", draw_ids=draw) as batcher:
        errors = await asyncio.gather(*(batcher.submit(ask(text)) for text in "ab"), return_exceptions=True)
        assert [type(error) for error in errors] == [mb.RequestFailed] * 2
        assert await gather_outputs(batcher, "cd") == ["C", "D"]


@pytest.mark.promise(of="bugs")
@pytest.mark.parametrize("place", ["after a call", "in scheduling"])
async def test_a_bug_between_calls_is_logged_and_ends_no_other(place, monkeypatch, caplog):
    owner, name = (LaneTable, "call_ended") if place == "after a call" else (Scheduler, "_next")
    real, broken = getattr(owner, name), [True]

    def once(*args, **named):
        if broken:
            broken.clear()
            raise ZeroDivisionError("planted")
        return real(*args, **named)

    monkeypatch.setattr(owner, name, once)
    transport = ScriptedTransport(delay=0.1)
    async with batcher_for(transport, max_batch_size=2) as batcher:
        replies = await asyncio.gather(*(batcher.submit(ask(text)) for text in "abcd"), batcher.submit(ask("e", "Hi.")))
    assert [reply.output for reply in replies] == list("ABCDE")
    assert "microbatch itself" in caplog.text


@pytest.mark.promise(of="bugs")
@pytest.mark.parametrize("count", [1, 2])
async def test_a_transport_that_is_cancelled_inside_fails_its_call_and_no_other(count):
    class CancelledOnce(ScriptedTransport):
        broken = True

        async def send(self, call, on_text):
            if self.broken:
                self.broken = False
                raise asyncio.CancelledError
            return await super().send(call, on_text)

    async with batcher_for(CancelledOnce(), max_batch_size=2) as batcher:
        errors = await asyncio.gather(*(batcher.submit(ask(text)) for text in "ab"[:count]), return_exceptions=True)
        assert [type(error) for error in errors] == [mb.TransportError] * count
        assert await gather_outputs(batcher, "cd") == ["C", "D"]


@pytest.mark.promise(of="callbacks")
async def test_a_decoder_that_panics_fails_only_its_item():
    class Panic(BaseException):
        pass

    def hook(kind, value):
        if value == "B":
            raise Panic
        return kind(value)

    class Word:
        def __init__(self, text):
            self.text = text

    class Answer(msgspec.Struct):
        word: str

        def __post_init__(self):
            if self.word == "B":
                raise Panic

    transport = ScriptedTransport(answer=lambda text: {"word": text.upper()})
    async with batcher_for(transport) as batcher:
        results = await asyncio.gather(
            *(batcher.submit(ask(text), output_type=Answer) for text in "abc"), return_exceptions=True
        )
    assert [getattr(result, "output", None) for result in results] == [Answer("A"), None, Answer("C")]
    assert isinstance(results[1], mb.MalformedAnswer)


# --- life


@pytest.mark.promise(of="misuse")
async def test_misuse_is_refused_at_once():
    batcher = batcher_for(ScriptedTransport())
    with pytest.raises(mb.BatcherClosed, match="not open yet"):
        await batcher.submit(ask("x"))
    await batcher.open()
    with pytest.raises(mb.BatcherClosed, match="opened once"):
        await batcher.open()
    await batcher.aclose()
    await batcher.aclose()
    for use in (batcher.submit(ask("x")), batcher.open()):
        with pytest.raises(mb.BatcherClosed):
            await use
    with pytest.raises(mb.BatcherClosed):
        batcher.flush()


@pytest.mark.promise(of="misuse")
async def test_another_event_loop_is_refused():
    async with batcher_for(ScriptedTransport()) as batcher:

        def elsewhere():
            with pytest.raises(mb.BatcherClosed, match="another event loop"):
                asyncio.run(batcher.submit(ask("x")))
            with pytest.raises(mb.BatcherClosed, match="another event loop"):
                batcher.flush()

        await asyncio.to_thread(elsewhere)


@pytest.mark.promise(of="close")
async def test_closing_sends_what_waits_and_waits_for_answers():
    transport = ScriptedTransport(delay=5.0)
    batcher = await batcher_for(transport, idle="wait", max_wait=60).open()
    tasks = [asyncio.ensure_future(batcher.submit(ask(text))) for text in "abc"]
    await asyncio.sleep(1)
    await batcher.aclose()
    assert [task.result().output for task in tasks] == ["A", "B", "C"]
    assert asyncio.get_running_loop().time() == 6.0
    assert batcher.stats().batches_by_reason == {"drain": 1}
    assert transport.closed == 1


@pytest.mark.promise(of="close")
async def test_what_outlasts_the_grace_ends_with_shut_down():
    transport = ScriptedTransport(delay=100.0)
    batcher = await batcher_for(transport, max_concurrent_batches=1).open()
    tasks = [asyncio.ensure_future(batcher.submit(ask(text, system=text))) for text in "abc"]
    await asyncio.sleep(1)
    await batcher.aclose(grace=2)
    assert asyncio.get_running_loop().time() == 3.0
    assert [type(task.exception()) for task in tasks] == [mb.ShutDown] * 3
    assert len(asyncio.all_tasks()) == 1


async def test_leaving_the_block_by_an_exception_closes_without_grace():
    transport = ScriptedTransport(delay=100.0)
    with pytest.raises(KeyError):
        async with batcher_for(transport) as batcher:
            task = asyncio.ensure_future(batcher.submit(ask("x")))
            await asyncio.sleep(1)
            raise KeyError
    assert isinstance(task.exception(), mb.ShutDown)
    assert asyncio.get_running_loop().time() == 1.0


async def test_opening_and_closing_may_be_done_by_different_tasks():
    batcher = await asyncio.ensure_future(batcher_for(ScriptedTransport()).open())
    assert (await batcher.submit(ask("x"))).output == "X"
    await asyncio.ensure_future(batcher.aclose())
    assert len(asyncio.all_tasks()) == 1


async def test_a_shared_transport_is_closed_by_the_last_user():
    transport = ScriptedTransport()
    async with batcher_for(transport):
        async with batcher_for(transport):
            pass
        assert transport.closed == 0
    assert transport.closed == 1


@pytest.mark.promise(of="context")
async def test_callers_contextvars_never_reach_a_call():
    who = contextvars.ContextVar("who", default="nobody")
    seen = []
    transport = ScriptedTransport(answer=lambda text: (seen.append(who.get()), text)[1])

    async def caller(name):
        who.set(name)
        await batcher.submit(ask(name))
        assert who.get() == name

    async with batcher_for(transport, max_wait=0.1, idle="wait", max_batch_size=3) as batcher:
        await asyncio.gather(*(caller(f"tenant {i}") for i in range(8)))
    assert set(seen) == {"nobody"}


# --- overload


@pytest.mark.promise(of="memory")
async def test_a_full_batcher_rejects():
    async with batcher_for(ScriptedTransport(delay=1.0), max_queued=2, when_full="reject") as batcher:
        tasks = [asyncio.ensure_future(batcher.submit(ask(f"{i}"))) for i in range(3)]
        await asyncio.wait(tasks)
    assert isinstance(tasks[2].exception(), mb.Overloaded)
    assert [task.result().output for task in tasks[:2]] == ["0", "1"]


@pytest.mark.promise(of="fair")
async def test_waiters_for_room_are_served_in_order_of_arrival():
    transport = ScriptedTransport(delay=1.0)
    async with batcher_for(transport, max_queued=1) as batcher:
        done = []
        tasks = [asyncio.ensure_future(batcher.submit(ask(f"{i}"))) for i in range(4)]
        for task in tasks:
            task.add_done_callback(lambda task: done.append(task.result().output))
        await asyncio.wait(tasks)
    assert done == ["0", "1", "2", "3"]
    assert asyncio.get_running_loop().time() == 4.0


async def test_waiting_for_room_counts_against_the_timeout():
    transport = ScriptedTransport(delay=10.0)
    async with batcher_for(transport, max_queued=1) as batcher:
        first = asyncio.ensure_future(batcher.submit(ask("first")))
        await asyncio.sleep(0)
        with pytest.raises(mb.DeadlineExceeded):
            await batcher.submit(ask("second"), timeout=3)
        assert asyncio.get_running_loop().time() == 3.0
        await first
    assert len(transport.calls) == 1


@pytest.mark.promise(of="timeout")
async def test_what_is_left_of_a_timeout_after_waiting_for_room_ends_the_submit_on_time():
    transport = ScriptedTransport(delay=2.0)
    async with batcher_for(transport, max_queued=1) as batcher:
        first = asyncio.ensure_future(batcher.submit(ask("first")))
        await asyncio.sleep(0)
        with pytest.raises(mb.DeadlineExceeded, match="within the timeout of 3 s"):
            await batcher.submit(ask("second"), timeout=3)
        assert asyncio.get_running_loop().time() == 3.0
        await first
    assert [call.call.timeout for call in transport.calls] == [None, 1.0]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda batcher: batcher.submit(ask("x"), temperature="hot"),
        lambda batcher: batcher.submit(ask("x"), max_tokens=0),
        lambda batcher: batcher.submit(ask("x"), timeout=-1),
        lambda batcher: batcher.submit("x"),
        lambda batcher: batcher.warm([], ttl=-1),
        lambda batcher: batcher.enqueue(ask("x")),
        lambda batcher: batcher.result("x"),
        lambda batcher: AsyncOpenAI(batcher).chat.completions.create(messages=ask("x"), model=3),
        lambda batcher: AsyncOpenAI(batcher).chat.completions.parse(
            messages=ask("x"), response_format=int, temperature="hot"
        ),
    ],
)
async def test_wrong_arguments_are_reported_where_a_coroutine_is_awaited(wrong):
    async with batcher_for(ScriptedTransport()) as batcher:
        good, bad = await asyncio.gather(batcher.submit(ask("x")), wrong(batcher), return_exceptions=True)
    assert good.output == "X"
    assert type(bad) is mb.ConfigError


async def test_a_coroutine_that_is_never_awaited_checks_nothing():
    assert inspect.iscoroutinefunction(mb.Microbatcher.submit)
    wrong = batcher_for(ScriptedTransport()).submit(ask("x"), temperature="hot")
    wrong.close()


async def test_a_mock_of_a_batcher_has_a_submit_to_await():
    batcher = mock.create_autospec(mb.Microbatcher, instance=True)
    batcher.submit.return_value = "answer"
    assert await batcher.submit(ask("x")) == "answer"


async def test_a_cancelled_waiter_for_room_passes_its_place_on():
    transport = ScriptedTransport(delay=1.0)
    async with batcher_for(transport, max_queued=1) as batcher:
        tasks = [asyncio.ensure_future(batcher.submit(ask(f"{i}"))) for i in range(3)]
        tasks[0].add_done_callback(lambda _: tasks[1].cancel())
        await asyncio.wait(tasks)
        assert (await batcher.submit(ask("after"))).output == "AFTER"
    assert tasks[1].cancelled()
    assert tasks[2].result().output == "2"


@pytest.mark.promise(of="memory")
async def test_bypass_goes_alone_while_a_call_may_start():
    transport = ScriptedTransport(delay=1.0)
    async with batcher_for(transport, max_queued=1, max_concurrent_batches=2, when_full="bypass") as batcher:
        tasks = []
        for i in range(3):
            tasks.append(asyncio.ensure_future(batcher.submit(ask(f"{i}"))))
            await asyncio.sleep(0.1)
        await asyncio.wait(tasks)
    assert [task.result().output for task in tasks[:2]] == ["0", "1"]
    assert isinstance(tasks[2].exception(), mb.Overloaded)
    assert batcher.stats().singles_by_reason["bypass"] == 1


async def test_closing_refuses_those_who_wait_for_room():
    batcher = await batcher_for(ScriptedTransport(delay=1.0), max_queued=1).open()
    tasks = [asyncio.ensure_future(batcher.submit(ask(f"{i}"))) for i in range(2)]
    await asyncio.sleep(0.1)
    await batcher.aclose()
    assert tasks[0].result().output == "0"
    assert isinstance(tasks[1].exception(), mb.BatcherClosed)


# --- bad arguments


@each(
    ("messages", "options", "complaint"),
    [
        ("hello", {}, "messages must be a non-empty list"),
        ([], {}, "an empty list"),
        ([{"content": "x"}], {}, r"messages\[0\] must be a Message or a dict with a role"),
        (ask("\ud800"), {}, "lone surrogate"),
        (ask("x"), {"max_tokens": 0}, "max_tokens"),
        (ask("x"), {"temperature": "hot"}, "temperature"),
        (ask("x"), {"priority": "urgent"}, "priority must be one of 'high', 'normal', 'low'"),
        (ask("x"), {"params": {"stream": True}}, "params: stream"),
        (ask("x"), {"params": {"model": "m"}}, "params: model"),
        (ask("x"), {"headers": {"a": 1}}, "headers"),
        (ask("x"), {"timeout": -1}, "timeout"),
        (ask("x"), {"output_type": object()}, "output_type"),
        (ask("x"), {"params": {"user": {1, 2}}}, None),
        (ask("x"), {"params": {"user": object()}}, "params must be JSON values"),
    ],
)
async def test_wrong_arguments_are_named(messages, options, complaint):
    transport = ScriptedTransport()
    async with batcher_for(transport) as batcher:
        if complaint is None:
            await batcher.submit(messages, **options)
            return
        with pytest.raises(mb.ConfigError, match=complaint):
            await batcher.submit(messages, **options)
    assert transport.calls == []
    assert batcher.stats().items == 0


async def test_an_idle_batcher_wakes_nobody(monkeypatch):
    loop = asyncio.get_running_loop()
    async with batcher_for(ScriptedTransport(), max_wait=0.05) as batcher:
        await asyncio.gather(*(batcher.submit(ask(f"{i}"), timeout=10) for i in range(20)))
        await asyncio.sleep(1)  # the calls' tasks end
        turns = 0
        select = loop._selector.select

        def counted(timeout=None):
            nonlocal turns
            turns += 1
            return select(timeout)

        monkeypatch.setattr(loop._selector, "select", counted)
        await asyncio.sleep(10_000)
        assert turns <= 2  # going to sleep, and waking up
