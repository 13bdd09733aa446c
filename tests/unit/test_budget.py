"""Budgets, on virtual time: what is charged before a call leaves, what it is corrected to, and what is not sent."""

import asyncio
import gzip
import itertools
import json
import random
from datetime import UTC, datetime
from typing import Literal

import msgspec
import pytest
from audited import EVERY, SYSTEM, Label, PlantedModel
from helpers import ask, batcher_for, each, submit_all
from hypothesis import given
from hypothesis import strategies as st

import microbatch as mb
from microbatch.spending.counters import Counters, span_at
from microbatch.testing import ScriptedTransport
from microbatch.transports.relay import UsageReader, expected_usage

PRICES = {"m": mb.Price(1_000_000.0, 1_000_000.0)}  # a dollar for each token
DAY = datetime(2026, 2, 28, 23, 59, 50, tzinfo=UTC).timestamp()


class Model(ScriptedTransport):
    """Answers 10 tokens for each item, and reports 10 for each item of the prompt; counts what it has charged."""

    model = "m"

    def __init__(self, *script, delay=1.0, tokens=10, **options):
        super().__init__(*script, delay=delay, **options)
        self.model = "m"
        self.tokens = tokens
        self.charged = 0

    async def send(self, call, on_text):
        completion = await super().send(call, on_text)
        items = len(self.calls[-1].items)
        completion.usage = mb.Usage(self.tokens * items, self.tokens * items)
        self.charged += 2 * self.tokens * items
        return completion


def batcher_on(model, budget, **options):
    options.setdefault("max_wait", 0.0)
    return batcher_for(model, budget=budget, prices=PRICES, **options)


def spent(batcher):
    return batcher.stats().budget.spent_tokens


async def outcomes(batcher, texts, **options):
    return await asyncio.gather(*(batcher.submit(ask(text), **options) for text in texts), return_exceptions=True)


async def in_turn(batcher, texts, **options):
    return [(await outcomes(batcher, [text], **options))[0] for text in texts]


pytestmark = pytest.mark.promise(of="budget")

# --- charging


async def test_the_expected_cost_is_charged_before_a_call_leaves_and_corrected_afterwards():
    model = Model()
    async with batcher_on(model, mb.Budget(tokens=100_000)) as batcher:
        waiting = asyncio.ensure_future(batcher.submit(ask("a")))
        await asyncio.sleep(0.5)
        assert len(model.calls) == 1
        assert spent(batcher) > 256  # the prompt, and an answer of unknown length
        await waiting
        assert spent(batcher) == 20
        figures = batcher.stats().budget
    assert (figures.left_tokens, figures.refused, figures.spent_usd, figures.left_usd) == (99_980, 0, None, None)


async def test_answers_are_expected_to_be_as_long_as_those_before():
    model = Model()
    async with batcher_on(model, mb.Budget(tokens=100_000), max_batch_size=4, idle="wait") as batcher:
        charged = []
        for turn in range(3):
            before = spent(batcher)
            waiting = asyncio.ensure_future(submit_all(batcher, [f"{turn}{n}" for n in range(4)]))
            await asyncio.sleep(0.5)
            charged.append(spent(batcher) - before)
            await waiting
        assert charged[0] > 4 * 256
        assert charged[2] < 4 * 256 / 4
        assert spent(batcher) == model.charged == 3 * 4 * 20


async def test_single_answers_are_expected_to_be_longer_than_most():
    model = Model()
    prices = {"m": mb.Price(0.0, 1_000_000.0)}  # a dollar for each token of the answer
    async with batcher_for(model, budget=mb.Budget(usd=100_000), prices=prices, max_batch_size=1) as batcher:
        expected = []
        for number in range(40):
            model.tokens = (10, 20)[number % 2]
            before = batcher.stats().budget.spent_usd
            waiting = asyncio.ensure_future(batcher.submit(ask("a")))
            await asyncio.sleep(0.5)
            expected.append(batcher.stats().budget.spent_usd - before)
            await waiting
        assert expected[0] == 256
        assert 18 <= min(expected[20:]) <= max(expected) == 256
        assert max(expected[20:]) <= 20
        assert batcher.stats().budget.spent_usd == 40 * 15


async def test_a_call_that_would_exceed_the_budget_is_not_sent_and_its_requests_end_with_budget_exceeded():
    model = Model()
    async with batcher_on(model, mb.Budget(tokens=1_000), max_batch_size=1) as batcher:
        results = await in_turn(batcher, map(str, range(60)), max_tokens=10)
        stats = batcher.stats()
    errors = [result for result in results if isinstance(result, BaseException)]
    assert all(type(error) is mb.BudgetExceeded for error in errors)
    assert all(error.attempts == 0 and error.retry_after is None for error in errors)
    assert len(model.calls) == 60 - len(errors) == stats.upstream_calls
    assert 900 < model.charged <= 1_000
    assert (stats.budget.spent_tokens, stats.budget.left_tokens) == (model.charged, 1_000 - model.charged)
    assert stats.budget.refused == len(errors)
    assert stats.failed == len(errors)


async def test_dollars_are_those_of_the_model_that_answers():
    prices = {"m": mb.Price(1.0, 2.0), "m-2": mb.Price(3.0, 4.0)}

    def answer(received):
        return "x", mb.Completion(
            "stop", usage=mb.Usage(1_000, 500), model="m-2" if received.items[0][1] == "b" else None
        )

    model = ScriptedTransport(answer, answer)
    model.model = "m"
    async with batcher_for(model, budget=mb.Budget(usd=1), prices=prices) as batcher:
        await batcher.submit(ask("a"))
        first = batcher.stats().budget
        await batcher.submit(ask("b"))
        stats = batcher.stats()
    assert first.spent_usd == pytest.approx((1_000 * 1 + 500 * 2) / 1e6)
    assert stats.budget.spent_usd == pytest.approx(first.spent_usd + (1_000 * 3 + 500 * 4) / 1e6)
    assert stats.budget.left_usd == pytest.approx(1 - stats.cost_usd)


async def test_no_more_than_the_budget_and_what_the_calls_under_way_were_dearer_is_spent():
    for seed in range(5):
        rng = random.Random(seed)
        model = Model(delay=0.5)
        budget = mb.Budget(tokens=3_000)
        async with batcher_on(model, budget, max_concurrent_batches=4, max_batch_size=4, idle="wait") as batcher:
            tasks = []
            for n in range(300):
                model.tokens = rng.randrange(5, 20)
                tasks.append(asyncio.ensure_future(batcher.submit(ask(f"{n}"), max_tokens=20)))
                if rng.random() < 0.2:
                    await asyncio.sleep(rng.random())
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert spent(batcher) == model.charged
        assert {type(result) for result in results} == {mb.Reply, mb.BudgetExceeded}
        assert 2_500 < model.charged <= 3_000 + 4 * 4 * 40


async def test_calls_wait_for_those_under_way_where_all_may_fit():
    model = Model()
    # Of unknown length, one answer at a time fits; all of them do as they turn out.
    async with batcher_on(model, mb.Budget(tokens=600), max_batch_size=1, max_concurrent_batches=8) as batcher:
        replies = await submit_all(batcher, map(str, range(20)))
        assert batcher.stats().in_flight == 0
    assert [reply.output for reply in replies] == [str(n) for n in range(20)]
    assert model.charged == 400


async def test_waiting_holds_no_slot_and_ends_with_the_callers_patience():
    model = Model(delay=5.0)
    async with batcher_on(model, mb.Budget(tokens=400), max_batch_size=1, max_concurrent_batches=2) as batcher:
        first = asyncio.ensure_future(batcher.submit(ask("a")))
        await asyncio.sleep(1)
        with pytest.raises(mb.DeadlineExceeded):
            await batcher.submit(ask("b"), timeout=1)
        assert batcher.stats().in_flight == 1
        await first
        assert (await batcher.submit(ask("c"))).output == "C"
    assert [call.items[0][1] for call in model.calls] == ["a", "c"]


async def test_a_call_that_is_given_up_does_not_keep_others_waiting():
    model = Model(delay=60.0)
    async with batcher_on(model, mb.Budget(tokens=400), max_batch_size=1) as batcher:
        first = asyncio.ensure_future(batcher.submit(ask("a")))
        await asyncio.sleep(1)
        second = asyncio.ensure_future(batcher.submit(ask("b")))
        await asyncio.sleep(1)
        first.cancel()
        with pytest.raises(mb.BudgetExceeded):
            await second
        assert asyncio.get_running_loop().time() < 3


async def test_a_call_is_charged_at_the_service_tier_that_the_endpoint_reports():
    prices = {"m": mb.Price(4.0, 8.0, cached_input=1.0, tiers={"flex": mb.Price(2.0, 4.0)})}
    ends = [
        mb.Completion("stop", usage=mb.Usage(1_000, 500), service_tier="flex"),
        mb.Completion("stop", usage=mb.Usage(1_000, 500, 600)),
    ]
    model = ScriptedTransport(*(("x", end) for end in ends))
    model.model = "m"
    async with batcher_for(model, budget=mb.Budget(usd=1), prices=prices) as batcher:
        await batcher.submit(ask("a"))
        assert batcher.stats().budget.spent_usd == pytest.approx((1_000 * 2 + 500 * 4) / 1e6)
        await batcher.submit(ask("b"))
        stats = batcher.stats()
    assert stats.budget.spent_usd == pytest.approx(stats.cost_usd)


@each("asked, factor", [(None, 1), ("flex", 0.5), ("Priority", 2), ("auto", 1), (["flex"], 1)])
@each("texts", [1, 3])
async def test_the_expected_cost_is_that_of_the_service_tier_that_is_asked_for(asked, factor, texts):
    def rates(by):
        return mb.Price(4.0 * by, 8.0 * by)

    prices = {"m": msgspec.structs.replace(rates(1), tiers={"flex": rates(0.5), "priority": rates(2)})}
    costs = []
    for tier in (None, asked):
        async with batcher_for(Model(), budget=mb.Budget(usd=1), prices=prices, idle="wait") as batcher:
            params = None if tier is None else {"service_tier": tier}
            waiting = [asyncio.ensure_future(batcher.submit(ask(f"{n}"), params=params)) for n in range(texts)]
            await asyncio.sleep(0.5)
            assert batcher.stats().in_flight == 1
            costs.append(batcher.stats().budget.spent_usd)
            await asyncio.gather(*waiting)
    assert costs[1] == pytest.approx(costs[0] * factor)


@each("asked, limit", [(None, None), (8, 8), (64, 64)])
async def test_no_single_answer_is_expected_to_be_longer_than_its_caller_allows(asked, limit):
    model = Model(tokens=500)
    async with batcher_on(model, mb.Budget(tokens=100_000), max_batch_size=1) as batcher:
        await batcher.submit(ask("a"))
        before = spent(batcher)
        waiting = asyncio.ensure_future(batcher.submit(ask("a"), max_tokens=asked))
        await asyncio.sleep(0.5)
        expected = spent(batcher) - before
        await waiting
    assert (expected < 500 + 100) if limit is None else (expected < limit + 100)
    assert expected >= (limit or 500)


async def test_each_choice_of_an_answer_is_expected_to_be_as_long_as_those_before():
    expected = {}
    for choices in ((4, 1), (1, 1), (1, 4)):
        model = Model()
        async with batcher_on(model, mb.Budget(tokens=100_000), max_batch_size=1) as batcher:
            for number in choices:
                model.tokens = 100 * number
                before = spent(batcher)
                waiting = asyncio.ensure_future(batcher.submit(ask("a"), params={"n": number}))
                await asyncio.sleep(0.5)
                expected[choices] = spent(batcher) - before
                await waiting
    assert expected[4, 1] == expected[1, 1]
    assert expected[1, 4] == expected[1, 1] + 300


async def test_a_price_that_is_lost_during_a_call_leaves_its_charge():
    known = {"m": mb.Price(1_000_000.0, 1_000_000.0)}
    async with batcher_for(Model(), budget=mb.Budget(usd=10_000), prices=known.get) as batcher:
        waiting = asyncio.ensure_future(batcher.submit(ask("a")))
        await asyncio.sleep(0.5)
        charged = batcher.stats().budget.spent_usd
        assert charged > 0
        batcher._parts.spending._price = lambda *_, **__: None
        await waiting
        assert batcher.stats().budget.spent_usd == charged


# --- what counts


async def test_retries_count_and_a_failed_attempt_keeps_its_charge():
    model = Model(mb.ServerError("no", status=500))
    async with batcher_on(model, mb.Budget(tokens=10_000)) as batcher:
        waiting = asyncio.ensure_future(batcher.submit(ask("a")))
        await asyncio.sleep(0.5)
        expected = spent(batcher)
        await waiting
        assert len(model.calls) == 2
        assert spent(batcher) == expected + 20


@each(
    "error, kept",
    [
        (mb.ServerError("no", status=500), True),
        (mb.ConnectFailed("broke"), True),
        (mb.TransportTimeout("late"), True),
        (mb.Filtered("no", status=400), True),
        (mb.TransportError("cut"), True),
        (ValueError("a bug"), True),
        (mb.RateLimited("slower", status=429), False),
        (mb.QuotaExhausted("broke", status=402), False),
        (mb.AuthFailed("who", status=401), False),
        (mb.BadRequest("what", status=400), False),
        (mb.ConfigError("cannot send this"), False),
        (mb.ShutDown("not sent"), False),
    ],
)
async def test_only_attempts_that_never_left_or_were_refused_give_their_charge_back(error, kept):
    model = Model(error)
    policy = mb.RetryPolicy(max_attempts=1)
    async with batcher_on(model, mb.Budget(tokens=10_000), retry=policy) as batcher:
        waiting = asyncio.ensure_future(batcher.submit(ask("a")))
        await asyncio.sleep(0.5)
        expected = spent(batcher)
        with pytest.raises(mb.MicrobatchError):
            await waiting
        assert spent(batcher) == (expected if kept else 0)


async def test_a_connection_that_was_never_made_gives_the_charge_back():
    async with batcher_on(
        mb.OpenAIChat("m", base_url="http://127.0.0.1:23345/v1", api_key="k"),
        mb.Budget(tokens=10_000),
        retry=mb.RetryPolicy(max_attempts=1),
    ) as batcher:
        with pytest.raises(mb.ConnectFailed):
            await batcher.submit(ask("a"))
        assert spent(batcher) == 0


async def test_a_cancelled_call_and_one_that_reports_nothing_keep_their_charge():
    model = Model()
    async with batcher_on(model, mb.Budget(tokens=10_000)) as batcher:
        waiting = asyncio.ensure_future(batcher.submit(ask("a")))
        await asyncio.sleep(0.5)
        expected = spent(batcher)
        waiting.cancel()
        await asyncio.sleep(2)
        assert model.calls[0].cancelled
        assert spent(batcher) == expected
    silent = ScriptedTransport(usage=False)
    async with batcher_for(silent, budget=mb.Budget(tokens=10_000)) as batcher:
        await batcher.submit(ask("a"))
        assert spent(batcher) == expected


async def test_an_error_in_the_middle_of_an_answer_keeps_the_charge():
    def refused_late(_):
        return "half of it", mb.BadRequest("stopped", status=400)

    model = ScriptedTransport(refused_late)
    async with batcher_for(model, budget=mb.Budget(tokens=10_000), retry=mb.RetryPolicy(max_attempts=1)) as batcher:
        with pytest.raises(mb.BadRequest):
            await batcher.submit(ask("a"))
        assert spent(batcher) > 256


async def test_calls_that_ask_again_count_and_nothing_else_fails_if_they_may_not_be_made():
    def half(received):
        return received.reply([(name, text.upper()) for name, text in received.items[:4]])

    async def play(budget):
        model = Model(half, tokens=100)
        async with batcher_on(model, budget, max_batch_size=8, idle="wait") as batcher:
            results = await outcomes(batcher, "abcdefgh", output_type=Literal["A", "B", "C", "D", "E", "F", "G", "H"])
            assert spent(batcher) == model.charged
        return model, results

    model, results = await play(mb.Budget(tokens=100_000))
    assert len(model.calls) > 1
    assert model.charged > 1_600
    model, results = await play(mb.Budget(tokens=1_700))
    assert [result.output for result in results[:4]] == list("ABCD")
    assert {type(result) for result in results[4:]} == {mb.BudgetExceeded}
    assert [error.attempts for error in results[4:]] == [1] * 4
    assert (len(model.calls), model.charged) == (1, 1_600)


async def test_audits_are_made_only_while_more_than_half_is_left_and_take_nothing_from_requests():
    def play(budget):
        model = PlantedModel({}, 0.0, random.Random(5))
        policy = mb.FlushPolicy(max_batch_size=4, idle="wait")
        return model, mb.Microbatcher(model, policy=policy, audit=EVERY, tokens="bytes", budget=budget, id_secret="x")

    async def ask_all(batcher, turn):
        asked = [
            batcher.submit([*SYSTEM, {"role": "user", "content": f"{turn} {n}"}], output_type=Label) for n in range(4)
        ]
        replies = await asyncio.gather(*asked)
        await batcher.audits.settled()
        return replies

    async def spent_by(budget, turns=40):
        model, batcher = play(budget)
        async with batcher:
            for turn in range(turns):
                await ask_all(batcher, turn)
            stats = batcher.stats()
        (row,) = stats.audit
        return model, stats, row

    model, _, row = await spent_by(mb.Budget(tokens=10**9))
    needed = model.reported.prompt_tokens + model.reported.completion_tokens
    assert (row.asked, row.compared) == (40, 40)
    model, stats, row = await spent_by(mb.Budget(tokens=needed))
    assert 5 < row.asked < 30
    assert row.asked == row.compared + row.not_comparable
    assert row.not_comparable == 0
    assert (stats.answered, stats.failed, stats.budget.refused) == (160, 0, 0)
    assert stats.budget.spent_tokens == model.reported.prompt_tokens + model.reported.completion_tokens


# --- prices


async def test_a_budget_in_dollars_needs_the_price_of_each_model_before_anything_is_sent():
    model = ScriptedTransport()
    model.model = "nobody-knows-it"
    with pytest.raises(mb.ConfigError, match=r"'nobody-knows-it'.*--prices"):
        await mb.Microbatcher(model, budget=mb.Budget(usd=1)).open()
    model = Model()
    async with batcher_on(model, mb.Budget(usd=1)) as batcher:
        with pytest.raises(mb.ConfigError, match="'nobody-knows-it'"):
            await batcher.submit(ask("a"), model="nobody-knows-it")
        (result,) = [result async for result in batcher.map([mb.Request(ask("a"), model="nobody-knows-it")])]
        assert type(result.error) is mb.ConfigError
        assert batcher.stats().items == batcher.stats().upstream_calls == 0
    unnamed = ScriptedTransport()
    async with batcher_for(unnamed, budget=mb.Budget(usd=1), prices=PRICES) as batcher:
        with pytest.raises(mb.ConfigError, match="name no model"):
            await batcher.submit(ask("a"))
    async with batcher_for(unnamed, budget=mb.Budget(tokens=1_000), prices=PRICES) as batcher:
        await batcher.submit(ask("a"), model="nobody-knows-it")


@each(
    "settings",
    [
        {},
        {"usd": -1},
        {"usd": float("inf")},
        {"usd": float("nan")},
        {"tokens": 0},
        {"tokens": 1, "period": "week"},
        {"usd": 1, "per": "caller"},
        {"usd": 1, "store": "http://localhost"},
    ],
)
def test_misuse_is_a_config_error(settings):
    with pytest.raises(mb.ConfigError):
        mb.Budget(**settings)


# --- tenants and periods


async def test_each_tenant_has_a_budget_of_its_own():
    model = Model()
    async with batcher_on(model, mb.Budget(tokens=600, per="tenant"), max_batch_size=1) as batcher:
        for tenant in ("a", "b", None):
            results = await in_turn(batcher, map(str, range(40)), tenant=tenant, max_tokens=10)
            answered = sum(isinstance(result, mb.Reply) for result in results)
            assert 25 <= answered <= 30
        figures = batcher.stats().budget
    assert figures.left_tokens is None
    assert figures.spent_tokens == model.charged


async def test_one_tenants_empty_budget_does_not_hold_up_another():
    model = Model(delay=10.0)
    budget = mb.Budget(tokens=700, per="tenant")
    async with batcher_on(model, budget, max_batch_size=1, max_concurrent_batches=4) as batcher:
        tasks = [asyncio.ensure_future(batcher.submit(ask(f"a{n}"), tenant="a")) for n in range(6)]
        await asyncio.sleep(1)
        begun = asyncio.get_running_loop().time()
        await batcher.submit(ask("b"), tenant="b", priority="high")
        assert asyncio.get_running_loop().time() - begun < 20
        await asyncio.gather(*tasks)


async def test_several_batchers_have_one_budget_together():
    budget = mb.Budget(tokens=600)
    one, other = Model(), Model()
    async with (
        batcher_on(one, budget, max_batch_size=1) as first,
        batcher_on(other, budget, max_batch_size=1) as second,
    ):
        await in_turn(first, map(str, range(15)), max_tokens=10)
        results = await in_turn(second, map(str, range(40)), max_tokens=10)
        assert spent(first) == spent(second) == one.charged + other.charged <= 600
    assert type(results[-1]) is mb.BudgetExceeded


async def test_a_new_period_has_a_new_budget_and_late_corrections_are_of_the_old_one():
    model = Model()
    async with batcher_on(model, mb.Budget(tokens=600, period="day"), max_batch_size=1) as batcher:
        wall = DAY
        batcher.spending._now = lambda: wall
        results = await in_turn(batcher, map(str, range(40)), max_tokens=10)
        assert results[-1].retry_after == 10
        wall += 9
        with pytest.raises(mb.BudgetExceeded):
            await batcher.submit(ask("a"))
        wall += 1
        assert spent(batcher) == 0
        waiting = asyncio.ensure_future(batcher.submit(ask("a"), max_tokens=10))
        await asyncio.sleep(0.5)
        wall += 86_400
        await waiting
        assert spent(batcher) == 0
        await batcher.submit(ask("b"), max_tokens=10)
        assert spent(batcher) == 20
        wall -= 86_400  # the clock is set back: the same money is not spent twice
        assert spent(batcher) == 20


@each(
    "period, at, name, end",
    [
        ("hour", (2026, 2, 28, 23, 59, 59), "2026-02-28T23", (2026, 3, 1)),
        ("hour", (2026, 3, 29, 1, 0, 0), "2026-03-29T01", (2026, 3, 29, 2)),
        ("day", (2026, 2, 28, 0, 0, 0), "2026-02-28", (2026, 3, 1)),
        ("day", (2028, 2, 28, 12, 0, 0), "2028-02-28", (2028, 2, 29)),
        ("month", (2026, 1, 31, 12, 0, 0), "2026-01", (2026, 2, 1)),
        ("month", (2026, 12, 31, 23, 59, 59), "2026-12", (2027, 1, 1)),
        ("month", (2028, 2, 1, 0, 0, 0), "2028-02", (2028, 3, 1)),
    ],
)
def test_periods_are_those_of_the_calendar_in_utc(period, at, name, end):
    span = span_at(period, datetime(*at, tzinfo=UTC).timestamp())
    assert span.name == name
    assert span.end == datetime(*end, tzinfo=UTC).timestamp()


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9), st.booleans()), max_size=200))
def test_no_tenant_is_taken_to_have_spent_less_than_it_has_however_few_are_remembered(steps):
    counters, truth, under_way = Counters("day", capacity=4), dict.fromkeys(map(str, range(13)), 0), []
    for number, tokens, held in steps:
        counter = counters.of(str(number), DAY)
        counter.tokens += tokens
        counter.usd += tokens
        truth[str(number)] += tokens
        if held:
            counter.hold(tokens, tokens)
            under_way.append((counter, tokens))
        elif under_way:
            other, amount = under_way.pop(0)
            other.usd += 50  # it has cost more than was expected
            other.tokens += 50
            truth[other.tenant] += 50
            other.release(amount, amount)
        assert counter.tokens >= truth[str(number)]
        assert counter.usd >= truth[str(number)]
        assert counters.total(DAY)[1] >= sum(truth.values())
        assert len(counters._counters) <= 4 + len(under_way) + 1
    for tenant, tokens in truth.items():
        assert counters.of(tenant, DAY).tokens >= tokens
    assert counters.of("0", DAY + 11).tokens == 0


# --- relayed requests

DETAILS = {"prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0}, "queue_time": 0.0123, "total_time": 0.5}
CHAT = {
    "id": "c",
    "choices": [{"message": {"content": '"usage": {"prompt_tokens": 9}'}}],
    "usage": {"prompt_tokens": 70, **DETAILS, "completion_tokens": 5},
}
EVENTS = b"".join(
    b"data: " + json.dumps(event).encode() + b"\n\n"
    for event in (
        {"type": "message_start", "message": {"usage": {"input_tokens": 70, "output_tokens": 1}}},
        {"choices": [{"delta": {"content": "x" * 40_000}}], "usage": None},
        {"type": "message_delta", "usage": {"output_tokens": 5, "output_tokens_details": {"reasoning_tokens": 0}}},
    )
)


@given(
    st.sampled_from([json.dumps(CHAT).encode(), json.dumps(CHAT, indent=1).encode(), EVENTS]),
    st.lists(st.integers(0, 50_000), max_size=12),
    st.booleans(),
)
def test_the_usage_of_a_relayed_answer_is_read_however_it_is_cut(body, cuts, compressed):
    body = gzip.compress(body) if compressed else body
    reader = UsageReader("gzip" if compressed else None)
    edges = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    for start, end in itertools.pairwise(edges):
        reader.feed(body[start:end])
    assert (reader.usage.prompt_tokens, reader.usage.completion_tokens) == (70, 5)


@each(
    "events, tier",
    [
        ([{"service_tier": "flex", "usage": {"prompt_tokens": 1}}], "flex"),
        ([{"usage": {"input_tokens": 1, "service_tier": "priority"}}], "priority"),
        ([{"service_tier": "auto"}, {"choices": "x" * 40_000}, {"service_tier": "Priority", "usage": {}}], "priority"),
        ([{"service_tier": "flex"}, {"service_tier": "default"}], None),
        ([{"choices": [{"message": {"content": '"service_tier": "flex"'}}]}], None),
        ([{"service_tier": None}], None),
    ],
)
def test_the_service_tier_of_a_relayed_answer_is_read_however_it_is_cut(events, tier):
    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    for size in (1, 7, 10_000_000):
        reader = UsageReader()
        for start in range(0, len(body), size):
            reader.feed(body[start : start + size])
        assert reader.tier == tier


def test_an_answer_whose_usage_cannot_be_read_has_none():
    for encoding, body in (
        ("br", b"\x00\x01"),
        ("gzip", b"no gzip"),
        (None, b'{"usage": null}'),
        (None, b'{"usage": {'),
    ):
        reader = UsageReader(encoding)
        reader.feed(body)
        assert reader.usage is None


def test_what_names_no_model_is_not_charged():
    assert expected_usage(None) is None
    assert expected_usage(b"--boundary") is None
    assert expected_usage(b'{"input_file_id": "f"}') is None
    assert expected_usage(b'{"model": "m", "input": "hello"}').completion_tokens == 0
    assert expected_usage(b'{"model": "m", "messages": [], "n": 3, "max_tokens": 50}').completion_tokens == 150
    assert expected_usage(b'{"model": "m", "messages": [], "n": "3"}').completion_tokens == 256


# --- what operators see


async def test_the_figures_of_a_budget_are_gauges():
    hooks = mb.PrometheusHooks()
    async with batcher_on(Model(), mb.Budget(usd=1_000, tokens=1_000), max_batch_size=1, hooks=[hooks]) as batcher:
        hooks.watch(batcher)
        await batcher.submit(ask("a"))
        batcher.spending._budget.tokens = 40
        with pytest.raises(mb.BudgetExceeded):
            await batcher.submit(ask("b" * 400))
        told = dict(
            line.split() for line in hooks.render().decode().splitlines() if line.startswith("microbatch_budget")
        )
    assert {name.removeprefix("microbatch_budget_"): float(value) for name, value in told.items()} == {
        "spent_usd": 20.0,
        "left_usd": 980.0,
        "spent_tokens": 20.0,
        "left_tokens": 20.0,
        "refused": 1.0,
    }
