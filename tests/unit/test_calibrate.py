"""`calibrate` on virtual time: the size that it recommends, what it sends, what it leaves out, and what ends it."""

from __future__ import annotations

import asyncio
import math
import re
from collections import Counter
from typing import Literal

import pytest
from helpers import ask, each

import microbatch as mb
from microbatch.audit.calibration import MOST_BATCHES, ROUND, Trial
from microbatch.audit.means import least_count
from microbatch.calibration import Calibrator
from microbatch.testing import Faults, Latency, Mistakes, SimulatedModel, SimulatedTransport

LABELS = Literal["red", "green", "blue", "grey", "black", "white"]
QUICK = {"max_excess": 0.1, "sample": 60}
"""A bound that few items and batches decide."""

LEAST = least_count(0.1)


def requests(count, **options):
    options = {"output_type": LABELS} | options
    return [mb.Request(ask(f"thing {number}", "Name its colour."), **options) for number in range(count)]


def simulated(**options):
    """Return a model and a transport to it."""
    model = SimulatedModel(**{"latency": Latency(first_token=0.5, tokens_per_second=80), **options})
    return model, SimulatedTransport(model)


def asked_alone(model):
    texts = [body["messages"][-1]["content"] for body in model.requests]
    return [text for text in texts if text.startswith("thing ")]


async def calibrated(planted=(), noise=0.0, seed=0, asked=None, **options):
    model, transport = simulated(mistakes=Mistakes(by_size=dict(planted), noise=noise, seed=seed), record=True)
    options = {"seed": seed, **options}
    return await mb.calibrate(transport, requests(600) if asked is None else asked, **options), model


# --- the recommendation


@pytest.mark.slow
@pytest.mark.parametrize(
    ("right", "planted"), [(1, {2: 0.1}), (2, {4: 0.1}), (4, {8: 0.1}), (8, {16: 0.12}), (16, {32: 0.26})]
)
async def test_it_recommends_the_largest_size_that_does_no_harm(right, planted):
    found, _ = await calibrated(planted, sample=600)
    assert found.recommended == right
    assert found.needed is None
    assert [row.size for row in found.sizes] == [size for size in (2, 4, 8, 16, 32) if size <= 2 * right]
    assert [row.outcome for row in found.sizes[-2:]] == ["passes", "fails"][-len(found.sizes) :]
    for row in found.sizes[:-1]:
        assert (row.agreement, row.excess) == (1, 0)
        assert 0 < row.upper <= 0.02
        assert row.batches <= 200
    failed = found.sizes[-1]
    assert failed.upper > failed.excess > 0.05
    assert failed.agreement == pytest.approx(1 - failed.excess)
    assert failed.batches <= 4 * ROUND


async def test_if_all_sizes_pass_the_largest_is_recommended_and_the_same_seed_finds_the_same():
    found, model = await calibrated(**QUICK, sizes=(16, 1, 4, 4))
    assert [row.size for row in found.sizes] == [4, 16]
    assert found.recommended == 16
    assert (found.sample, found.compared, found.noise) == (60, 60, 0)
    assert model.calls == found.alone.calls + sum(row.calls for row in found.sizes)
    again, same = await calibrated(**QUICK, sizes=(4, 16))
    other, third = await calibrated(**QUICK, sizes=(4, 16), seed=1)
    figures = [[(row.outcome, row.batches, row.excess, row.upper) for row in each.sizes] for each in (found, again)]
    assert figures[0] == figures[1]
    assert sorted(asked_alone(model)) == sorted(asked_alone(same))
    assert sorted(asked_alone(model)) != sorted(asked_alone(third))
    assert other.recommended == 16


async def test_the_noise_of_the_model_is_not_held_against_batches():
    found, _ = await calibrated({8: 0.5}, noise=0.2, asked=requests(900), sample=800, max_excess=0.1, sizes=(4, 8))
    assert [row.outcome for row in found.sizes] == ["passes", "fails"]
    assert 0.05 < found.noise < 0.15
    assert found.alone.agreement == pytest.approx(1 - found.noise)
    assert found.sizes[0].agreement < 0.95
    assert abs(found.sizes[0].excess) < 0.05
    assert found.recommended == 4


async def test_a_sample_that_decides_nothing_says_how_many_items_are_needed():
    found, _ = await calibrated({2: 0.06}, noise=0.2, asked=requests(50), max_excess=0.1, sizes=(2, 4))
    assert found.sizes[0].outcome == "undecided"
    assert found.sizes[0].batches == MOST_BATCHES
    assert found.recommended is None
    assert found.needed > 50


async def test_larger_sizes_are_not_tried_after_one_that_seems_harmful():
    found, _ = await calibrated({2: 0.11}, **QUICK, sizes=(2, 4))
    assert [(row.size, row.outcome) for row in found.sizes] == [(2, "undecided")]
    assert (found.recommended, found.needed) == (None, None)


# --- what is sent


async def test_every_item_is_asked_alone_twice_and_then_in_batches_of_the_size():
    model, transport = simulated(record=True)
    found = await mb.calibrate(transport, requests(60), max_excess=0.1, sizes=(3,))
    texts = [body["messages"][-1]["content"] for body in model.requests]
    alone, batches = texts[: 2 * 60], texts[2 * 60 :]
    assert sorted(alone) == sorted(2 * [f"thing {number}" for number in range(60)])
    assert len(set(alone[:60])) == 60
    assert {len(set(re.findall(r"thing \d+", text))) for text in batches} == {3}
    row = found.sizes[0]
    assert (row.calls, row.batches, row.compared) == (len(batches), len(batches), 3 * len(batches))
    assert (found.alone.calls, found.alone.batches) == (120, 120)
    assert row.prompt_tokens + found.alone.prompt_tokens == model.prompt_tokens
    assert row.completion_tokens + found.alone.completion_tokens == model.completion_tokens
    assert row.seconds > 0.5


async def test_prices_are_applied_to_each_size():
    _, transport = simulated()
    prices = {"simulated": mb.Price(input=1.0, output=2.0)}
    options = {**QUICK, "sizes": (4,), "prices": prices}
    found = await mb.calibrate(transport, requests(60, model="simulated"), **options)
    for row in (found.alone, *found.sizes):
        assert row.cost_usd == pytest.approx((row.prompt_tokens + 2 * row.completion_tokens) / 1e6)


async def test_neither_cache_nor_equal_requests_under_way_answer_and_urgency_is_left_out():
    model, transport = simulated()
    options = {"temperature": 0, "priority": "high", "timeout": 1.0, "ttl": 9.0}
    found = await mb.calibrate(
        transport, requests(60, **options), **QUICK, sizes=(4,), policy=mb.FlushPolicy(share=True)
    )
    assert found.alone.calls == 120
    assert found.recommended == 4
    assert model.single_calls == 120


async def test_a_sample_has_no_request_twice_and_takes_all_if_there_are_few():
    found, model = await calibrated(asked=5 * requests(50), max_excess=0.1, sizes=(4,))
    assert found.sample == 50
    assert model.single_calls == 100


async def test_every_request_is_drawn_alike():
    drawn = Counter()
    asked = requests(80)
    for seed in range(40):
        model, transport = simulated(record=True)
        await mb.calibrate(transport, asked, max_excess=0.1, sample=40, sizes=(64,), seed=seed)
        drawn.update({body["messages"][-1]["content"] for body in model.requests})
    assert len(drawn) == 80
    assert 8 <= min(drawn.values()) <= max(drawn.values()) <= 32


async def test_requests_come_from_any_source_in_any_form():
    async def source():
        for number in range(60):
            yield ask(f"{number}")

    model, transport = simulated(answer=lambda text, schema: f"Number {text}.")
    found = await mb.calibrate(transport, source(), **QUICK, sizes=(4,))
    assert (found.sample, found.recommended) == (60, 4)
    assert model.calls


async def test_others_have_their_turn_while_a_long_source_is_read():
    """So a signal ends the command while it reads a file of a million lines."""

    def source():
        for number in range(10_000):
            read.append(number)
            begun.set()
            yield ask(f"{number}")

    read, begun = [], asyncio.Event()
    task = asyncio.create_task(mb.calibrate(simulated()[1], source(), **QUICK))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(read) < 1_000


async def test_lanes_are_not_mixed_and_what_cannot_be_combined_is_left_out():
    lanes = [mb.Request(ask(f"{n}", f"Lane {n % 2}."), output_type=LABELS) for n in range(80)]
    alone = requests(5, params={"seed": 1})
    wrong = [mb.Request(ask("x"), max_tokens=0)]
    found, _ = await calibrated(asked=[*alone, *lanes, *wrong], **QUICK | {"sample": 80}, sizes=(8, 64))
    assert (found.sample, found.unusable) == (80, 6)
    assert [(row.size, row.outcome) for row in found.sizes] == [(8, "passes"), (64, "not reached")]
    assert found.sizes[0].batches == found.sizes[0].calls
    assert found.sizes[1].calls == 0
    assert found.recommended == 8


async def test_nothing_is_sent_if_the_sample_is_too_small_even_without_a_difference():
    found, model = await calibrated(asked=requests(LEAST - 1), max_excess=0.1)
    assert (found.sample, found.needed, found.recommended, found.alone, found.sizes) == (
        LEAST - 1,
        LEAST,
        None,
        None,
        (),
    )
    assert model.calls == 0


# --- what cannot be compared, repaired, or reached


async def test_long_texts_cannot_be_compared_without_a_function_and_cost_one_question_each():
    words = "word " * 20
    for same, sizes in ((None, []), (lambda batched, alone: batched == alone == words, [4])):
        model, transport = simulated(answer=lambda text, schema: words)
        asked = requests(60, output_type=str)
        found = await mb.calibrate(transport, asked, **QUICK, sizes=(4,), same=same)
        assert [row.size for row in found.sizes] == sizes
        assert found.recommended == (4 if same else None)
        assert found.not_comparable == (0 if same else 60)
        assert model.single_calls == (120 if same else 60)
        assert found.needed is None


async def test_if_some_answers_cannot_be_compared_more_items_are_needed():
    def answer(text, schema):
        return "word " * (20 if int(text.split()[-1]) % 3 == 0 else 1)

    model, transport = simulated(answer=answer)
    asked = requests(LEAST + 1, output_type=str)
    found = await mb.calibrate(transport, asked, max_excess=0.1, sizes=(4,))
    assert model.single_calls == LEAST + 1  # the second answers would be paid for in vain
    compared = LEAST + 1 - found.not_comparable
    assert found.needed == -(-LEAST * (LEAST + 1) // compared)
    assert (found.sizes, found.compared) == ((), 0)


async def test_as_many_more_are_needed_for_a_size_as_cannot_be_compared(monkeypatch):
    """The number is that of the items to draw, of which some will not be compared either."""

    def same(batched, alone):
        if "white" in (batched, alone):
            raise ValueError
        return batched == alone

    monkeypatch.setattr(Trial, "needed", 100)
    options = {"max_excess": 0.1, "sizes": (2,), "same": same}
    found, _ = await calibrated({2: 0.06}, noise=0.2, asked=requests(60), **options)
    assert found.sizes[0].outcome == "undecided"
    assert LEAST <= found.compared < 60
    assert found.needed == math.ceil(100 * 60 / found.compared)


async def test_nothing_is_recommended_if_most_answers_cannot_be_compared():
    """The comparable answers are the short ones, and long ones may differ from them in accuracy."""

    def answer(text, schema):
        return "word " * (20 if int(text.split()[-1]) < 60 else 1)

    model, transport = simulated(answer=answer)
    found = await mb.calibrate(transport, requests(110, output_type=str), max_excess=0.1, sample=110, sizes=(4,))
    assert (found.not_comparable, found.recommended, found.needed, found.sizes) == (60, None, None, ())
    assert model.calls == 110


async def test_what_a_reply_lacks_is_asked_again_counted_and_scored_as_it_ends():
    _, transport = simulated(faults=Faults(("missing",), rate=0.2, on="combined"))
    found = await mb.calibrate(transport, requests(60), **QUICK, sizes=(8,))
    row = found.sizes[0]
    assert row.repaired > 0
    assert 0 < row.fallback_calls == row.calls - row.batches
    assert row.compared == row.batches * 8
    assert (row.outcome, row.agreement) == ("passes", 1)


@each("limits", [{"max_batch_tokens": 400}, {"max_output_tokens": 150}])
async def test_a_size_that_token_limits_keep_from_being_reached_is_not_recommended(limits):
    _, transport = simulated()
    found = await mb.calibrate(transport, requests(60), **QUICK, sizes=(2, 32), policy=mb.FlushPolicy(**limits))
    assert [(row.size, row.outcome) for row in found.sizes] == [(2, "passes"), (32, "not reached")]
    assert found.recommended == 2


# --- failures


async def test_items_that_fail_for_reasons_of_their_own_take_no_part():
    class Refusing(SimulatedTransport):
        async def send(self, call, on_text):
            if "thing 7" in [message["content"] for message in call.messages]:
                raise mb.Filtered("no", status=400)
            return await super().send(call, on_text)

    model, _ = simulated()
    found = await mb.calibrate(Refusing(model), requests(60), **QUICK, sizes=(4,))
    assert (found.failed, found.compared, found.recommended) == (1, 59, 4)


async def test_an_endpoint_that_answers_nothing_ends_it_with_its_error():
    class Dead(SimulatedTransport):
        calls = 0

        async def send(self, call, on_text):
            self.calls += 1
            raise mb.ServerError("down", status=500)

    transport = Dead(simulated()[0])
    with pytest.raises(mb.ServerError, match="down"):
        await mb.calibrate(transport, requests(60), **QUICK, sizes=(4,), retry=mb.RetryPolicy(max_attempts=1))
    assert transport.calls == 60


class Failing(SimulatedTransport):
    """A transport whose calls fail while the clock is between two times."""

    def __init__(self, simulated, start, end):
        super().__init__(simulated)
        self.window = start, end

    async def send(self, call, on_text):
        if self.window[0] <= asyncio.get_running_loop().time() < self.window[1]:
            raise mb.ServerError("down", status=500)
        return await super().send(call, on_text)


@each("since", ["the start", "the batches"])
async def test_batches_that_fail_in_an_outage_are_asked_again_as_a_whole(since):
    model, _ = simulated()
    sound = await mb.calibrate(SimulatedTransport(model), requests(60), **QUICK, sizes=(4,))
    begun = asyncio.get_running_loop().time() + (0 if since == "the start" else sound.alone.seconds + 0.3)
    transport = Failing(simulated()[0], begun, begun + 0.9)
    waited = []

    async def outage(error):
        waited.append(error)
        await asyncio.sleep(2)
        return True

    def make(policy):
        return mb.Microbatcher(transport, policy=policy, retry=mb.RetryPolicy(max_attempts=1), tokens="bytes")

    calibrator = Calibrator(make, mb.FlushPolicy(), **QUICK, sizes=(4,), outage=outage)
    await calibrator.run(requests(60))
    row = calibrator.result.sizes[0]
    assert waited
    assert (calibrator.result.failed, row.failed) == (0, 0)
    assert (row.outcome, row.compared) == ("passes", 4 * row.batches)


async def test_a_batch_that_fails_again_and_again_while_others_are_answered_is_given_up():
    class Poisoned(SimulatedTransport):
        async def send(self, call, on_text):
            text = call.messages[-1]["content"]
            if "thing 7" in text and "thing 8" in text:
                raise mb.ServerError("no", status=500)
            return await super().send(call, on_text)

    model, _ = simulated()
    options = {"retry": mb.RetryPolicy(max_attempts=1), "fallback": mb.FallbackPolicy(max_concurrent=1)}
    found = await mb.calibrate(Poisoned(model), requests(60), **QUICK, sizes=(20,), **options)
    row = found.sizes[0]
    assert row.compared + row.failed + row.not_comparable == 20 * row.batches


# --- arguments


@each(
    ("options", "message"),
    [
        ({"sample": 0}, "sample"),
        ({"sizes": ()}, "sizes"),
        ({"sizes": (1,)}, "sizes"),
        ({"sizes": (0, 4)}, "sizes"),
        ({"sizes": ("4",)}, "sizes must be a sequence of whole numbers"),
        ({"max_excess": 0}, "max_excess"),
        ({"max_excess": 1}, "max_excess"),
        ({"max_excess": "2 %"}, "max_excess"),
        ({"seed": "x"}, "seed"),
        ({"same": 1}, "same"),
        ({"policy": 16}, "policy"),
    ],
)
async def test_a_wrong_argument_is_named_before_anything_is_sent(options, message):
    model, transport = simulated()
    with pytest.raises(mb.ConfigError, match=message):
        await mb.calibrate(transport, requests(60), **options)
    assert model.calls == 0


@each(
    ("asked", "message"),
    [
        ([], "no requests"),
        ([mb.Request(ask("x"), params={"seed": 1})], "seed"),
        (["text"], "messages"),
        (5, "iterable"),
    ],
)
async def test_requests_of_which_none_can_be_combined_are_refused(asked, message):
    with pytest.raises(mb.ConfigError, match=message):
        await mb.calibrate(simulated()[1], asked)
