"""Audits in a running batcher: what is sampled, what they cost, and that no caller notices."""

import asyncio
import random
import statistics
from typing import Literal

import msgspec
import pytest
from audited import EVERY, LABELS, SYSTEM, Label, PlantedModel, decided, left, play
from helpers import each
from simulation.broken import AUDIT, Breaker, Panic, broken_functions

import microbatch as mb
from microbatch.batching.overhead import in_prompt_tokens
from microbatch.batching.ticket import AloneReason
from microbatch.errors import ConfigError, ServerError

AUTO = mb.AuditPolicy()


class Notes:
    def __init__(self):
        self.audits, self.calls, self.settled = [], [], []

    def on_audit(self, event):
        self.audits.append(event)

    def on_call(self, event):
        self.calls.append(event)

    def on_settle(self, event):
        self.settled.append(event)


def batcher_on(model, *, audit=EVERY, size=4, hooks=(), slots=64, **others):
    policy = mb.FlushPolicy(max_batch_size=size, idle="wait", max_concurrent_batches=slots)
    others.setdefault("id_secret", "decides what is sampled")
    return mb.Microbatcher(model, policy=policy, audit=audit, hooks=hooks, tokens="bytes", **others)


async def ask_all(batcher, texts, **options):
    options.setdefault("output_type", Label)
    asked = [batcher.submit([*SYSTEM, {"role": "user", "content": text}], **options) for text in texts]
    return await asyncio.gather(*asked)


def model_with(harm=(), noise=0.0):
    return PlantedModel(dict(harm), noise, random.Random(5))


# --- the size follows


@pytest.mark.slow
def test_a_size_that_does_harm_is_left_and_answers_are_right_from_then_on():
    outcomes = [play(seed, {16: 0.26}, audit=AUTO, bursts=70) for seed in range(20)]
    assert sum((found := left(each, 16)) is not None and found[1] <= 60 for each in outcomes) >= 18
    for outcome in outcomes:
        rows = {row.size: row for row in outcome.rows}
        assert not rows.get(8, rows[16]).condemned or 8 not in rows
        if rows[16].condemned:
            after = outcome.calls[max(place for place, size in enumerate(outcome.calls) if size == 16) + 1 :]
            assert max(after) <= 8


@pytest.mark.slow
def test_an_excess_above_four_is_found_within_250_samples():
    outcomes = [play(seed, {5: 0.10}, audit=EVERY, bursts=260) for seed in range(5)]
    found = [left(outcome, 16) for outcome in outcomes]
    assert sum(each is not None and each[0] <= 250 for each in found) >= 4


@pytest.mark.slow
def test_noise_of_the_model_is_no_reason_to_shrink():
    outcomes = [play(seed, {}, noise=0.10, size=4, audit=EVERY, bursts=300) for seed in range(8)]
    assert sum(decided(outcome, "condemned") for outcome in outcomes) <= 1
    rows = [row for outcome in outcomes for row in outcome.rows]
    assert statistics.mean(row.noise for row in rows) == pytest.approx(0.10, abs=0.02)


def test_without_adapting_the_figures_are_reported_and_nothing_changes():
    policy = mb.AuditPolicy(rate=1.0, adapt=False)
    outcome = play(3, {16: 0.5}, audit=policy, bursts=40)
    (row,) = outcome.rows
    assert row.condemned
    assert row.asked == row.compared == 40
    assert max(size for size in outcome.calls) == 16
    assert outcome.calls.count(16) == 40


@pytest.mark.slow
def test_a_model_that_becomes_bad_after_a_certificate_is_found():
    outcome = play(11, {}, size=4, audit=EVERY, bursts=1000, later={4: 0.5})
    decisions = [(decision, size) for _, decision, size, _ in outcome.decisions]
    assert decisions[:2] == [("certified", 4), ("condemned", 4)]


@pytest.mark.slow
def test_after_a_certificate_at_the_smaller_size_the_larger_one_is_tried_again():
    outcome = play(11, {5: 0.5}, size=8, audit=EVERY, bursts=900, later={})
    decisions = [(decision, size) for _, decision, size, _ in outcome.decisions]
    assert decisions[0] == ("condemned", 8)
    assert ("certified", 4) in decisions
    assert decisions.count(("condemned", 8)) <= 3  # until the model becomes better; each time it takes longer
    assert 8 in outcome.calls[-20:]


@each("harm, size, words", [(2, 2, "up to 2 differ"), (9, 16, "up to 16 differ"), (33, 40, "more than 32 differ")])
def test_the_log_names_the_sizes_that_were_given_up_and_what_follows(harm, size, words, caplog):
    outcome = play(4, {harm: 1.0}, size=size, audit=EVERY, bursts=20)
    assert decided(outcome, "condemned")
    assert words in caplog.text
    assert ("go alone" if size == 2 else "in batches of at most") in caplog.text


def test_where_two_do_harm_nothing_is_combined_and_two_are_tried_again_later():
    outcome = play(4, {2: 0.6}, size=2, audit=EVERY, bursts=600)
    alone = outcome.stats.singles_by_reason[AloneReason.CONDEMNED]
    tried = [size for _, decision, size, _ in outcome.decisions if decision == "condemned"]
    assert alone >= 1000
    assert tried.count(2) == 2  # after 500 requests, and not yet after 1,000 more


async def test_with_merge_when_cheaper_two_are_tried_again_too():
    class Charging(PlantedModel):
        async def send(self, call, on_text):
            completion = await super().send(call, on_text)
            usage = mb.Usage(
                sum(len(message["content"]) for message in call.messages) // 4, completion.usage.completion_tokens
            )
            return msgspec.structs.replace(completion, usage=usage)

    notes = Notes()
    policy = mb.FlushPolicy(max_batch_size=2, idle="wait", merge="when-cheaper")
    shared = [{"role": "system", "content": "Say in which direction the path leads. " * 60}]
    model = Charging({2: 1.0}, 0.0, random.Random(1))
    async with mb.Microbatcher(model, policy=policy, audit=EVERY, hooks=[notes], tokens="bytes") as batcher:
        for number in range(300):
            texts = [[*shared, {"role": "user", "content": f"path {number} {item}"}] for item in range(2)]
            await asyncio.gather(*(batcher.submit(text, output_type=Label) for text in texts))
            await batcher.audits.settled()
        stats = batcher.stats()
    assert [event.decision for event in notes.audits].count("condemned") == 2
    assert AloneReason.NOT_CHEAPER not in stats.singles_by_reason
    assert stats.singles_by_reason[AloneReason.CONDEMNED] > 500


# --- what it costs


def test_callers_wait_no_longer():
    def slowest(audit):
        return sorted(play(8, {}, audit=audit, bursts=60, slots=64).latencies)

    assert slowest(EVERY) == slowest(None)


async def test_while_callers_wait_for_slots_audits_take_one_turn_in_five():
    model, notes = model_with(), Notes()
    async with batcher_on(model, hooks=[notes], slots=1, audit=EVERY) as batcher:
        await ask_all(batcher, [f"path {number}" for number in range(160)])
        routes = [call.route for call in notes.calls]
        assert routes.count("batch") == 40
        assert routes.count("audit") <= 10
        await batcher.audits.settled()
    assert [call.route for call in notes.calls].count("audit") == 40


@pytest.mark.slow
def test_auto_keeps_the_cost_of_audits_within_the_overhead_or_50_samples():
    policy = mb.AuditPolicy(max_overhead=0.05, max_excess=0.001)
    outcome = play(2, {}, size=4, audit=policy, bursts=800)
    (row,) = outcome.rows
    assert 50 < row.asked < 800
    spent = outcome.stats.audit_usage
    calls = (
        outcome.stats.prompt_tokens
        - spent.prompt_tokens
        + 4 * (outcome.stats.completion_tokens - spent.completion_tokens)
    )
    assert spent.prompt_tokens + 4 * spent.completion_tokens <= 0.05 * calls
    few = play(2, {}, size=4, audit=policy, bursts=60)
    assert few.rows[0].asked == 50


async def test_auto_keeps_to_the_overhead_where_the_endpoint_reports_no_tokens():
    class Silent(PlantedModel):
        async def send(self, call, on_text):
            return msgspec.structs.replace(await super().send(call, on_text), usage=None)

    policy = mb.AuditPolicy(max_overhead=0.0)
    async with batcher_on(Silent({}, 0.0, random.Random(1)), audit=policy) as batcher:
        for number in range(80):
            await ask_all(batcher, [f"path {number} {item}" for item in range(4)])
            await batcher.audits.settled()
        (row,) = batcher.stats().audit
    assert row.asked == 50


@each("prices", [{"planted": mb.Price(input=1.0, output=4.0)}, lambda _: None])
async def test_audits_are_not_held_against_combining(prices, caplog):
    audit = mb.AuditPolicy(rate=1.0, adapt=False)
    async with batcher_on(model_with({2: 1.0}), audit=audit, size=4, prices=prices) as batcher:
        for number in range(30):
            await ask_all(batcher, [f"path {number} {item}" for item in range(4)])
        await batcher.audits.settled()
        stats = batcher.stats()
    spent = stats.audit_usage
    assert spent == stats.unclaimed
    with_audits, single = stats.prompt_tokens + 4 * stats.completion_tokens, stats.unbatched_prompt_tokens
    assert with_audits > single + 4 * stats.unbatched_completion_tokens
    assert not stats.costs_more
    assert not stats.damage_costs_more
    assert "costs more than it saves" not in caplog.text
    if stats.cost_usd is None:
        assert stats.audit_cost_usd is None
    else:
        assert stats.audit_cost_usd == pytest.approx((spent.prompt_tokens + 4 * spent.completion_tokens) / 1e6)


async def test_usage_is_conserved():
    model = model_with({2: 0.5}, noise=0.2)
    async with batcher_on(model) as batcher:
        replies = await ask_all(batcher, [f"path {number}" for number in range(400)])
        await batcher.audits.settled()
        settled = [await reply.settled() for reply in replies]
        stats = batcher.stats()
    total = sum((reply.usage for reply in settled), mb.Usage()) + stats.unclaimed
    assert total == model.reported
    assert stats.unclaimed.prompt_tokens >= stats.audit_usage.prompt_tokens > 0
    assert stats.items == stats.answered == stats.unbatched_calls == 400
    assert stats.singles_by_reason[AloneReason.AUDIT] > 50
    assert stats.upstream_calls == len(model.calls)


# --- what is sampled


async def test_one_item_of_each_batch_is_asked_again_and_twice_if_the_answers_differ():
    notes = Notes()
    model = model_with({4: 1.0})
    async with batcher_on(model, hooks=[notes], audit=mb.AuditPolicy(rate=1.0, adapt=False)) as batcher:
        await ask_all(batcher, [f"path {number}" for number in range(40)])
        await batcher.audits.settled()
    assert len(notes.audits) == 10
    assert {event.score for event in notes.audits} == {1}
    assert model.calls.count(1) == 20
    (event,) = {event.kind for event in notes.audits}
    assert (notes.audits[0].size, notes.audits[0].model) == (4, "planted")
    assert event


async def test_positions_are_drawn_uniformly():
    asked = []

    class Watched(PlantedModel):
        async def send(self, call, on_text):
            if "results" not in call.messages[-1]["content"]:
                asked.append(call.messages[-1]["content"])
            return await super().send(call, on_text)

    async with batcher_on(Watched({}, 0.0, random.Random(1))) as batcher:
        for _ in range(300):
            await ask_all(batcher, [f"path {position}" for position in range(4)])
        await batcher.audits.settled()
    counts = [asked.count(f"path {position}") for position in range(4)]
    assert sum(counts) == 300
    assert min(counts) > 40


@each("rate, batches, low, high", [(0.0, 200, 0, 0), (0.1, 400, 100, 220), (0.25, 100, 100, 100)])
async def test_the_rate_is_a_share_of_the_items(rate, batches, low, high):
    async with batcher_on(model_with(), audit=mb.AuditPolicy(rate=rate)) as batcher:
        for _ in range(batches):
            await ask_all(batcher, [f"path {position}" for position in range(4)])
        await batcher.audits.settled()
        rows = batcher.stats().audit
    asked = rows[0].asked if rows else 0
    assert low <= asked <= high


@pytest.mark.slow
async def test_after_a_certificate_few_are_sampled():
    async with batcher_on(model_with(), audit=AUTO, size=16) as batcher:
        for _ in range(900):
            await ask_all(batcher, [f"path {position}" for position in range(16)])
        await batcher.audits.settled()
        (row,) = batcher.stats().audit
    assert row.certified
    assert row.upper < 0.02
    assert 197 < row.asked < 300


@each(
    "headers, own, sampled",
    [({"X-Api-Key": "k"}, False, False), ({"X-Api-Key": "k"}, True, True), ({"x-trace": "t"}, False, True)],
)
async def test_requests_with_a_key_of_their_own_are_sampled_only_if_the_policy_says_so(headers, own, sampled):
    async with batcher_on(model_with(), audit=mb.AuditPolicy(rate=1.0, audit_own_keys=own)) as batcher:
        await ask_all(batcher, [f"path {number}" for number in range(8)], headers=headers)
        await batcher.audits.settled()
        assert bool(batcher.stats().audit) is sampled


async def test_warming_is_not_sampled_nor_is_what_the_cache_answers():
    async with batcher_on(model_with(), cache=mb.MemoryCache()) as batcher:
        questions = [[*SYSTEM, {"role": "user", "content": f"path {number}"}] for number in range(8)]
        warmed = await batcher.warm(mb.Request(each, output_type=Label) for each in questions)
        assert warmed.asked == 8
        await ask_all(batcher, [f"path {number}" for number in range(8)])
        await batcher.audits.settled()
        assert batcher.stats().audit == ()
        assert batcher.stats().cache_hits == 8


async def test_an_audit_asks_the_endpoint_and_neither_the_cache_nor_an_equal_request():
    model, notes = model_with({4: 1.0}), Notes()
    async with batcher_on(model, cache=mb.MemoryCache(), hooks=[notes]) as batcher:
        await ask_all(batcher, [f"path {number}" for number in range(4)])
        await batcher.audits.settled()
    assert [event.score for event in notes.audits] == [1]
    assert model.calls == [4, 1, 1]


async def test_repaired_answers_are_not_sampled():
    class Lossy(PlantedModel):
        async def send(self, call, on_text):
            def without_first(text):
                reply = msgspec.json.decode(text)
                if "results" in reply:
                    del reply["results"][0]
                on_text(msgspec.json.encode(reply).decode())

            return await super().send(call, without_first)

    notes = Notes()
    model = Lossy({}, 0.0, random.Random(1))
    async with batcher_on(model, hooks=[notes], size=2) as batcher:
        for number in range(30):
            await ask_all(batcher, [f"path {number}", f"path {number} x"])
        await batcher.audits.settled()
        repaired = [event for event in notes.settled if event.route == "fallback"]
        asked = sum(row.asked for row in batcher.stats().audit)
    assert repaired
    assert asked <= sum(event.route == "batch" for event in notes.settled)


async def test_a_caller_who_changes_its_answer_does_not_change_the_comparison():
    class Lists(PlantedModel):
        async def send(self, call, on_text):
            await asyncio.sleep(0.5)
            prompt = call.messages[-1]["content"]
            names = [line.split("]")[0][1:] for line in prompt.splitlines() if line.startswith("[")]
            if names:
                text = msgspec.json.encode({"results": [{"id": name, "answer": ["a", "b"]} for name in names]}).decode()
            else:
                text = '{"answer":["a","b"]}'
            on_text(text)
            return mb.Completion("stop", usage=mb.Usage(10, 10))

    notes = Notes()
    async with batcher_on(Lists({}, 0.0, random.Random(1)), hooks=[notes], size=2) as batcher:
        for reply in await ask_all(batcher, ["one", "two"], output_type=list[str]):
            reply.output.clear()
        await batcher.audits.settled()
    assert [event.score for event in notes.audits] == [0]


async def test_long_texts_are_not_asked_again_but_counted():
    class Texts(PlantedModel):
        def said(self, text, size):
            return "a long answer " * 9

    model = Texts({}, 0.0, random.Random(1))
    async with batcher_on(model) as batcher:
        await ask_all(batcher, [f"path {number}" for number in range(16)], output_type=str)
        await batcher.audits.settled()
        (row,) = batcher.stats().audit
    assert (row.asked, row.compared, row.not_comparable) == (4, 0, 4)
    assert 1 not in model.calls
    assert row.upper == 1.0


async def test_a_function_compares_long_texts():
    class Texts(PlantedModel):
        def said(self, text, size):
            return f"{self.rng.random()} a long answer in always other words, which however means just the same"

        async def send(self, call, on_text):
            return await super().send(call, lambda text: on_text(text.removeprefix('{"answer":"').removesuffix('"}')))

    audit = mb.AuditPolicy(rate=1.0, same=lambda batched, alone: batched[-20:] == alone[-20:])
    async with batcher_on(Texts({}, 0.0, random.Random(1)), audit=audit) as batcher:
        await ask_all(batcher, [f"path {number}" for number in range(16)], output_type=str)
        await batcher.audits.settled()
        (row,) = batcher.stats().audit
    assert (row.asked, row.compared, row.excess) == (4, 4, 0.0)


# --- kinds of lanes


async def test_lanes_of_one_kind_share_the_evidence_and_the_limit():
    async with batcher_on(model_with({4: 1.0})) as batcher:
        for tenant in ("a", "b"):
            for _ in range(3):
                replies = await ask_all(batcher, [f"path {number}" for number in range(4)], tenant=tenant)
            await batcher.audits.settled()
        (kind,) = {reply.lane_kind for reply in replies}
        rows = batcher.stats().audit
        assert {row.kind for row in rows} == {kind}
        assert {row.size for row in rows if row.condemned} == {4}
        replies = await ask_all(batcher, [f"path {number}" for number in range(4)], tenant="c")
        assert {reply.batch_size for reply in replies} <= {1, 2}


async def test_other_models_schemas_and_instructions_are_other_kinds():
    async with batcher_on(model_with()) as batcher:
        seen = set()
        for options in (
            {},
            {"model": "other"},
            {"output_type": Literal["a", *LABELS]},
            {"temperature": 0.5},
            {"max_tokens": 99},
        ):
            seen |= {reply.lane_kind for reply in await ask_all(batcher, ["x", "y"], **options)}
        asked = [batcher.submit([{"role": "user", "content": text}], output_type=Label) for text in "xy"]
        seen |= {reply.lane_kind for reply in await asyncio.gather(*asked)}
    assert len(seen) == 6
    assert None not in seen


async def test_a_kind_in_use_is_not_forgotten_for_others():
    async with batcher_on(model_with({2: 1.0}), size=2, slots=200) as batcher:
        for number in range(10):
            await ask_all(batcher, [f"path {number} {item}" for item in range(2)])
        await batcher.audits.settled()
        (kind,) = batcher.audits.kinds.values()
        assert kind.limit == 1
        async with asyncio.TaskGroup() as tasks:
            for group in range(22):  # so that the lane in use always has a call under way
                tasks.create_task(ask_all(batcher, [f"road {group}"]))
                for number in range(50):
                    other = {"role": "system", "content": f"Say where path {group} {number} leads."}
                    tasks.create_task(batcher.submit([other, {"role": "user", "content": "?"}], output_type=Label))
                await asyncio.sleep(0.25)
        assert batcher.audits.is_condemned(kind.digest, 2)
        await ask_all(batcher, ["path x", "path y"], tenant="another")
        assert batcher.audits.kinds.get(kind.digest) is kind
        assert len(batcher.audits.kinds) <= 1_024


async def test_the_name_of_a_kind_is_the_same_in_every_process():
    async with batcher_on(model_with()) as batcher:
        (kind,) = {reply.lane_kind for reply in await ask_all(batcher, ["x", "y"])}
    assert kind == "040ab92ba2ab489b"


# --- trouble


class Failing(PlantedModel):
    """Refuses what is asked alone."""

    async def send(self, call, on_text):
        if "results" not in call.messages[-1]["content"]:
            self.calls.append(1)
            raise ServerError("no", status=500)
        return await super().send(call, on_text)


async def test_audits_that_fail_are_counted_and_harm_no_caller():
    model = Failing({}, 0.0, random.Random(1))
    async with batcher_on(model, retry=mb.RetryPolicy(max_attempts=1)) as batcher:
        await ask_all(batcher, [f"path {number}" for number in range(40)])
        await batcher.audits.settled()
        (row,) = batcher.stats().audit
        assert (row.asked, row.compared, row.not_comparable) == (10, 0, 10)
        replies = await ask_all(batcher, [f"path {number}" for number in range(4)])
        assert {reply.batch_size for reply in replies} == {4}
        assert batcher.stats().failed == 0


@each("error", [ValueError, Panic])
async def test_a_bug_at_any_step_of_an_audit_costs_that_audit_and_nothing_else(error):
    step, fired = 0, True
    while fired:
        breaker = Breaker(step, lambda: error("planted"))
        with broken_functions(breaker, AUDIT):
            async with batcher_on(model_with({4: 1.0}), audit=mb.AuditPolicy(rate=1.0, adapt=False)) as batcher:
                await ask_all(batcher, [f"path {number}" for number in range(8)])
                await batcher.audits.settled()
                await ask_all(batcher, [f"road {number}" for number in range(8)])
                await batcher.audits.settled()
                stats = batcher.stats()
        step, fired = step + 1, breaker.fired
        assert (stats.answered, stats.failed, stats.in_flight) == (16, 0, 0)
        assert sum(row.compared for row in stats.audit) >= 4 - fired
        assert sum(row.asked for row in stats.audit) == 4  # or a bug that stays would be audited without end
        (kind,) = batcher.audits.kinds.values()
        assert kind.under_way == 0
    assert step > 30


async def test_audits_that_always_fail_keep_to_the_overhead_too():
    model = Failing({}, 0.0, random.Random(1))
    policy = mb.AuditPolicy(max_overhead=0.01)
    async with batcher_on(model, audit=policy, retry=mb.RetryPolicy(max_attempts=1)) as batcher:
        for number in range(80):
            await ask_all(batcher, [f"path {number} {item}" for item in range(4)])
            await batcher.audits.settled()
        (row,) = batcher.stats().audit
    assert (row.asked, row.not_comparable) == (50, 50)


async def test_a_second_answer_that_fails_is_asked_for_once_more():
    class Flaky(PlantedModel):
        async def send(self, call, on_text):
            if "results" not in call.messages[-1]["content"] and self.calls.count(1) % 3 == 1:
                self.calls.append(1)
                raise ServerError("no", status=500)
            return await super().send(call, on_text)

    notes, once = Notes(), mb.RetryPolicy(max_attempts=1)
    only = mb.AuditPolicy(rate=1.0, adapt=False)
    model = Flaky({4: 1.0}, 0.0, random.Random(1))
    async with batcher_on(model, hooks=[notes], retry=once, audit=only, slots=1) as batcher:
        for number in range(5):
            await ask_all(batcher, [f"path {number} {item}" for item in range(4)])
            await batcher.audits.settled()
    assert [event.score for event in notes.audits] == [1] * 5
    assert model.calls.count(1) == 15  # the second answer of each fails at first


async def test_a_comparison_that_raises_is_not_comparable():
    def same(batched, alone):
        raise RuntimeError

    async with batcher_on(model_with(), audit=mb.AuditPolicy(rate=1.0, same=same)) as batcher:
        await ask_all(batcher, [f"path {number}" for number in range(8)])
        await batcher.audits.settled()
        (row,) = batcher.stats().audit
    assert (row.asked, row.not_comparable) == (2, 2)


async def test_closing_drops_audits_that_were_not_sent_and_waits_for_those_that_were():
    model = model_with()
    loop = asyncio.get_running_loop()
    async with batcher_on(model, slots=1) as batcher:
        await ask_all(batcher, [f"path {number}" for number in range(40)])
        sent, closing = model.calls.count(1), loop.time()
    assert sent < 9
    assert model.calls.count(1) <= sent + 1
    assert loop.time() - closing <= 0.5
    assert batcher.stats().upstream_calls == len(model.calls)
    assert batcher.stats().unclaimed.prompt_tokens > 0
    (row,) = batcher.stats().audit
    assert row.asked == row.compared == model.calls.count(1)
    (kind,) = batcher.audits.state()
    cost = in_prompt_tokens(batcher.stats().audit_usage, None)
    assert kind.steps[4].audits_cost == pytest.approx(cost), "what was not sent has cost nothing"


async def test_cancelled_callers_are_not_audited():
    async with batcher_on(model_with()) as batcher:
        tasks = [asyncio.ensure_future(ask_all(batcher, [f"path {number}"])) for number in range(4)]
        await asyncio.sleep(0.2)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(1)
        await batcher.audits.settled()
        assert batcher.stats().audit == ()
        assert batcher.stats().cancelled == 4


# --- bulk work


def bulk(count):
    """Return as many requests for `map`."""
    return (
        mb.Request([*SYSTEM, {"role": "user", "content": f"path {each}"}], output_type=Label) for each in range(count)
    )


class Slow(PlantedModel):
    """Takes its time for what is asked alone; `most` is by how many combined calls it was ahead of these."""

    ahead = most = 0

    async def send(self, call, on_text):
        if "results" in call.messages[-1]["content"]:
            self.ahead += 1
            self.most = max(self.most, self.ahead)
        else:
            await asyncio.sleep(5)
            self.ahead -= 1
        return await super().send(call, on_text)


@each("slots", [1, 2, 64])
async def test_until_a_decision_bulk_work_is_at_most_8_combined_calls_ahead_of_its_audits(slots):
    model = Slow({}, 0.0, random.Random(1))
    async with batcher_on(model, audit=AUTO, slots=slots) as batcher:
        results = [result async for result in batcher.map(bulk(160))]
    assert len(results) == 160
    assert all(result.error is None for result in results)
    assert model.most <= 8
    assert model.calls.count(4) == 40


async def test_a_caller_who_waits_is_not_held_up_by_the_audits_of_bulk_work():
    async with batcher_on(Slow({}, 0.0, random.Random(1)), audit=AUTO) as batcher:

        async def run():
            return [result async for result in batcher.map(bulk(160))]

        running = asyncio.ensure_future(run())
        await asyncio.sleep(1)
        assert batcher.stats().batches == 8  # all of which have ended
        (reply,) = await ask_all(batcher, ["path x"])
        assert reply.waited == pytest.approx(0.1)  # `max_wait`: it is the last in its batch
        assert len(await running) == 160


async def test_after_a_condemnation_sizes_above_64_come_back():
    model = model_with({33: 1.0})
    async with batcher_on(model, size=100, audit=EVERY) as batcher:
        for number in range(12):
            await ask_all(batcher, [f"path {number} {item}" for item in range(100)])
            await batcher.audits.settled()
        assert max(model.calls[-20:]) == 16
        model.harm = {}
        (kind,) = batcher.audits.kinds.values()
        for step in (16, 32, 64):
            kind.record(step).evidence.equal += 2_000
        for number in range(60):
            await ask_all(batcher, [f"road {number} {item}" for item in range(100)])
            await batcher.audits.settled()
        assert model.calls[-1] == 1
        assert model.calls[-2] == 100


@each("slots", [1, 2, 64])
async def test_bulk_work_with_audits_ends_whatever_fails(slots):
    model = Failing({}, 0.0, random.Random(1))
    async with batcher_on(model, audit=AUTO, slots=slots, retry=mb.RetryPolicy(max_attempts=2)) as batcher:
        results = [result async for result in batcher.map(bulk(400))]
        assert len(results) == 400
        assert all(result.error is None for result in results)


# --- settings


async def same_later(batched, alone):
    """Its coroutine would be true."""


class SameLater:
    async def __call__(self, batched, alone):
        return False


@each(
    "arguments",
    [
        {"rate": 1.5},
        {"rate": "often"},
        {"rate": -0.1},
        {"max_excess": 0},
        {"max_excess": 1.0},
        {"max_overhead": -1},
        {"same": 3},
        {"same": same_later},
        {"same": SameLater()},
    ],
)
def test_settings_out_of_range_are_refused(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        mb.AuditPolicy(**arguments)


async def test_without_an_audit_there_is_none():
    async with batcher_on(model_with(), audit=None) as batcher:
        await ask_all(batcher, ["x", "y"])
        assert batcher.audits is None
        assert batcher.stats().audit == ()
