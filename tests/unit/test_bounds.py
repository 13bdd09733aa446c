"""The bound on combined replies, and models that do not stop, against a simulated model on virtual time."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import pytest
from bounded import (
    ENDPOINTS,
    TPM,
    TYPES,
    USELESS,
    Item,
    Label,
    Recorded,
    batcher_for,
    by_map,
    in_waves,
    messages,
    simulated,
    text_of_700,
)

import microbatch as mb
from microbatch.batching.bounds import FRAME, LEAST
from microbatch.schema.answer_type import answer_type
from microbatch.testing import Faults, Latency, Quota, SimulatedModel, SimulatedTransport

pytestmark = pytest.mark.timeout(120)

# --- nothing fails because of the bound


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize(("ask", "kind"), [*((by_map, kind) for kind in TYPES), (in_waves, "short texts")])
async def test_at_most_two_calls_are_cut_or_refused_until_the_bound_is_learned(kind, endpoint, ask):
    options = ENDPOINTS[endpoint]
    if kind == "texts of 700 tokens":
        options = {**options, "answer": text_of_700}
    model = simulated(**options)
    transport = Recorded(model)
    limit = mb.RateLimit(tpm=TPM) if "quota" in options else None
    async with batcher_for(transport, rate_limit=limit) as batcher:
        outputs = await ask(batcher, 128, TYPES[kind])
        first = list(transport.troubled)
        outputs += await ask(batcher, 128, TYPES[kind])
        stats = batcher.stats()
    if TYPES[kind] is str:
        assert outputs == [model.answer(messages(number)[-1]["content"], None) for number in range(128)] * 2
    assert len(outputs) == 256
    assert stats.failed == 0
    assert len(first) <= 2
    assert transport.troubled == first, "none after"
    assert None not in transport.sent, "every combined call is bounded"


@pytest.mark.parametrize("name", ["gpt-5-mini", "o4-mini", "deepseek-r1"])
async def test_a_model_that_is_known_to_reason_has_room_to_from_the_start(name):
    transport = Recorded(simulated(reasoning_tokens=6_000), name)
    async with batcher_for(transport) as batcher:
        await by_map(batcher, 64, Label)
    assert transport.troubled == []
    assert min(transport.sent) > 16_000


@pytest.mark.parametrize(
    "params", [{"reasoning_effort": "low"}, {"thinking": {"type": "enabled", "budget_tokens": 30_000}}]
)
async def test_a_model_that_is_asked_to_reason_has_room_to_from_the_start(params):
    transport = Recorded(simulated(reasoning_tokens=6_000))
    async with batcher_for(transport) as batcher:
        await by_map(batcher, 64, Label, params=params)
    assert transport.troubled == []
    assert min(transport.sent) > (30_000 if "thinking" in params else 16_000)


@pytest.mark.parametrize("quota", [TPM, 60_000])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("hidden", [0, 6_000])
@pytest.mark.promise(of="limits")
async def test_no_call_is_charged_more_than_a_quarter_of_the_tokens_a_minute(quota, kind, hidden):
    options = {"answer": text_of_700} if kind == "texts of 700 tokens" else {}
    transport = Recorded(simulated(quota=Quota(tpm=quota), reasoning_tokens=hidden, **options))
    async with batcher_for(transport, rate_limit=mb.RateLimit(tpm=quota)) as batcher:
        outputs = await by_map(batcher, 96, TYPES[kind])
        assert batcher.stats().failed == 0
    assert len(outputs) == 96
    assert 0 < max(transport.charged) <= quota / 4


# --- what the bound is


@pytest.mark.parametrize("items", [2, 5, 16])
async def test_the_bound_is_three_times_what_the_schema_lets_expect(items):
    transport = Recorded(simulated())
    async with batcher_for(transport) as batcher:
        await in_waves(batcher, items, Item, each=items)
    expected = answer_type(Item).expected_tokens
    assert transport.sent == [max(LEAST, 3 * items * (FRAME + expected))]


async def test_where_the_schema_does_not_tell_it_is_what_replies_took():
    transport = Recorded(simulated(answer=text_of_700))
    async with batcher_for(transport) as batcher:
        await in_waves(batcher, 4, str, each=4)
        await in_waves(batcher, 2, str, each=2)
    first, second = transport.sent
    assert first == 3 * 4 * (FRAME + 256)
    assert 3 * 2 * (FRAME + 2 * 700) <= second <= 3 * 2 * (FRAME + 2 * 720)


async def test_a_caller_s_own_limit_is_all_that_is_sent():
    transport = Recorded(simulated())
    async with batcher_for(transport) as batcher:
        await in_waves(batcher, 4, Label, each=4, max_tokens=10)
    assert transport.sent == [None]
    assert [body["max_tokens"] for body in transport.simulated.requests] == [4 * 28]


async def test_a_transport_that_knows_no_bound_sees_what_it_always_saw():
    class Old(SimulatedTransport):
        async def send(self, call, on_text):
            assert call.max_tokens is None
            call.bound = None
            return await super().send(call, on_text)

    model = simulated()
    async with batcher_for(Old(model)) as batcher:
        await by_map(batcher, 64, Label)
    assert all("max_tokens" not in body for body in model.requests)


class Remarks:
    """Answers as their schema has them, and beside that a remark of so many words, which it does not forbid."""

    FORMAT: ClassVar = {
        "type": "json_schema",
        "json_schema": {
            "name": "x",
            "strict": False,
            "schema": {"type": "object", "properties": {"sure": {"type": "boolean"}}},
        },
    }

    def __init__(self, words: int) -> None:
        self.words = words

    def __call__(self, text: str, schema: dict[str, Any] | None) -> Any:
        return {"sure": True, "remark": "x " * self.words}


async def test_a_reply_that_is_cut_in_order_doubles_the_bound_once_and_leaves_the_batches_as_large_as_they_are():
    model = simulated(answer=Remarks(70))
    transport = Recorded(model)
    async with batcher_for(transport) as batcher:
        for _ in range(4):
            await in_waves(batcher, 16, str, params={"response_format": Remarks.FORMAT})
        assert batcher.stats().failed == 0
    assert transport.troubled == ["cut"]
    first, rest, *others = transport.sent
    assert others == [2 * first] * 3, "and nothing is halved"
    assert rest < 2 * first, "only those that were left open are asked again"
    assert len(transport.simulated.requests) == 5


async def test_twice_the_bound_is_the_most_and_a_model_that_needs_more_goes_alone():
    model = simulated(answer=Remarks(300))
    transport = Recorded(model)
    async with batcher_for(transport) as batcher:
        await in_waves(batcher, 160, str, params={"response_format": Remarks.FORMAT})
        stats = batcher.stats()
    assert stats.failed == 0
    assert stats.lanes_parted == 1
    assert max(transport.sent) <= 2 * transport.sent[0]
    assert transport.combined < 10


# --- models that do not stop


@pytest.mark.slow
@pytest.mark.parametrize("kind", USELESS)
@pytest.mark.parametrize("ask", [by_map, in_waves])
@pytest.mark.parametrize("context", [None, 8_192])
async def test_a_model_of_no_use_for_combining_costs_few_calls_before_its_lane_goes_alone(kind, ask, context):
    model = simulated(faults=Faults(kind, rate=1.0, on="combined"), context_tokens=context)
    transport = Recorded(model)
    async with batcher_for(transport) as batcher:
        outputs = await ask(batcher, 320, str)
        stats = batcher.stats()
    assert outputs == [model.answer(messages(number)[-1]["content"], None) for number in range(320)]
    assert transport.combined <= 4
    assert stats.lanes_parted == 1
    assert model.single_calls + 16 * transport.combined >= 320, "and whoever waited goes alone as well"


async def test_after_a_while_combining_is_tried_again_and_one_useless_reply_is_enough():
    model = simulated(faults=Faults("strange_ids", rate=1.0, on="combined"))
    transport = Recorded(model)
    async with batcher_for(transport) as batcher:
        await in_waves(batcher, 2 * 16, str)
        before = transport.combined
        await in_waves(batcher, 496, str)
        assert transport.combined == before
        await in_waves(batcher, 16, str)
        await in_waves(batcher, 64, str)
        assert transport.combined == before + 1
        assert batcher.stats().lanes_parted == 2


async def test_now_and_then_a_useless_reply_is_no_reason_to_go_alone():
    model = simulated(faults=Faults(("strange_ids", "whitespace", "rambling"), rate=0.15, on="combined", seed=2))
    transport = Recorded(model)
    async with batcher_for(transport) as batcher:
        outputs = await in_waves(batcher, 640, str)
        stats = batcher.stats()
    assert outputs == [model.answer(messages(number)[-1]["content"], None) for number in range(640)]
    assert model.faulted >= 3
    assert stats.lanes_parted == 0


@pytest.mark.parametrize("items", [2, 5, 16])
async def test_a_streamed_reply_is_read_no_further_than_two_elements_past_the_last(items):
    left = []

    class Watched(SimulatedTransport):
        async def send(self, call, on_text):
            try:
                return await super().send(call, on_text)
            except asyncio.CancelledError:
                left.append(asyncio.get_running_loop().time())
                raise

    latency = Latency(first_token=0.5, element=0.25)
    model = SimulatedModel(latency=latency, faults=Faults("rambling", rate=1.0, on="combined"))
    async with batcher_for(Watched(model)) as batcher:
        outputs = await in_waves(batcher, items, str, each=items)
        assert asyncio.get_running_loop().time() == 0.5 + 0.25 * items
        assert outputs == [model.answer(messages(number)[-1]["content"], None) for number in range(items)]
    stats = batcher.stats()
    assert left == [0.5 + 0.25 * (items + 2)]
    assert (stats.upstream_calls, stats.fallback_calls) == (1, 0), "what was answered stands"
    assert stats.unreported_calls == 1, "of a call that was cut nobody tells the usage"


@pytest.mark.parametrize("policy", [{}, {"resolve": "verified"}, {"canary": True}])
async def test_nor_is_one_to_bulk_work_whatever_its_answers_wait_for(policy):
    """A model that does not stop under ids of its own, without any limit but the bound, which is three times a sound reply."""
    seen = []

    class Watched(SimulatedTransport):
        async def send(self, call, on_text):
            seen.append("")

            def heard(text):
                seen[-1] += text
                on_text(text)

            return await super().send(call, heard)

    model = SimulatedModel(
        latency=Latency(first_token=0.5, element=0.25), faults=Faults("rambling", rate=1.0, on="combined")
    )
    async with batcher_for(Watched(model), fallback=mb.FallbackPolicy(**policy)) as batcher:
        outputs = await by_map(batcher, 48, str)
        stats = batcher.stats()
    asked = 16 + bool(policy.get("canary"))
    assert outputs == [model.answer(messages(number)[-1]["content"], None) for number in range(48)]
    assert [text.count('"id"') for text in seen if '"id"' in text] == [asked + 2] * stats.batches
    assert stats.unreported_calls == stats.batches == 2


async def test_bulk_work_is_read_as_it_comes_until_a_reply_has_ended_by_itself_and_again_after_one_that_did_not():
    streamed = []

    class Watched(SimulatedTransport):
        async def send(self, call, on_text):
            streamed.append(call.stream)
            return await super().send(call, on_text)

    model = simulated()
    async with batcher_for(Watched(model)) as batcher:
        await by_map(batcher, 16, str)
        await by_map(batcher, 16, str)
        assert streamed == [True, False]
        model.faults = Faults("rambling", rate=1.0, on="combined")
        await by_map(batcher, 16, str)
        model.faults = None
        await by_map(batcher, 16, str)
        assert [streamed[2], streamed[-1]] == [False, True]


async def test_until_a_reply_was_of_use_bulk_work_has_few_combined_calls_under_way_and_others_as_many_as_ever():
    transport = Recorded(simulated(faults=Faults("missing", rate=0.0)))
    async with batcher_for(transport) as batcher:
        waiting = asyncio.ensure_future(by_map(batcher, 160, Label))
        await asyncio.sleep(0.4)
        assert transport.peak == 1, "one, while it is not known whether the model takes the bound"
        await waiting
        assert transport.peak > 4
    transport = Recorded(simulated())
    async with batcher_for(transport) as batcher:
        await in_waves(batcher, 160, Label, each=160)
        assert transport.peak == 10


async def test_bulk_work_of_another_kind_may_have_two():
    """The model has taken a bound; whether combining is of use is another question for each kind of request."""
    transport = Recorded(simulated())
    async with batcher_for(transport) as batcher:
        await in_waves(batcher, 16, str)
        transport.peak = 0
        waiting = asyncio.ensure_future(by_map(batcher, 160, Label))
        await asyncio.sleep(0.4)
        assert transport.peak == 2
        await waiting
        assert transport.peak > 4


async def test_somebody_who_waits_is_not_held_up_by_bulk_work_that_is():
    transport = Recorded(simulated())
    async with batcher_for(transport) as batcher:
        bulk = asyncio.ensure_future(by_map(batcher, 160, Label))
        await asyncio.sleep(0.2)
        assert transport.under_way == 1
        one = asyncio.ensure_future(batcher.submit(messages(1_000), output_type=Label))
        await asyncio.sleep(0.2)
        assert transport.under_way == 10
        await asyncio.gather(bulk, one)


@pytest.mark.parametrize(("items", "model"), [(3_000, {}), (600, {"reasoning_tokens": 1_000})])
async def test_no_request_fails_for_what_bounds_reserve_of_a_quota_that_was_not_declared(items, model):
    async with batcher_for(Recorded(simulated(quota=Quota(tpm=TPM), **model))) as batcher:
        requests = (mb.Request(messages(number), output_type=Label) for number in range(items))
        errors = [result.error async for result in batcher.map(requests)]
        assert batcher.stats().rate_limited > 0
    assert errors == [None] * items
