"""The cost of answers one by one is learned from single replies of the same kind, once there are some."""

from __future__ import annotations

import asyncio
import random
from importlib import resources
from itertools import pairwise

import msgspec
import pytest
from helpers import ask
from shop import PRODUCTS, Label

import microbatch as mb
from microbatch.messages import Usage
from microbatch.testing import Faults, SimulatedModel, SimulatedTransport

INSTRUCTIONS = (resources.files("microbatch.demo") / "instructions.txt").read_text("utf-8")
PRICES = {"simulated": mb.Price(0.40, 1.60, 0.10)}


class OtherAlone(SimulatedTransport):
    """Reports that single replies took other tokens than the simulated model counts: *factor* times as many, and *more*."""

    def __init__(self, model, *, factor=1.0, more=0, prompt=0):
        super().__init__(model)
        self.factor, self.more, self.prompt = factor, more, prompt

    async def send(self, call, on_text):
        completion = await super().send(call, on_text)
        if "results" not in str(call.schema):
            usage = completion.usage
            tokens = round(usage.completion_tokens * self.factor) + self.more
            completion.usage = Usage(usage.prompt_tokens + self.prompt, tokens)
        return completion


def texts(count, seed=0):
    draw = random.Random(seed)
    return [f"{number} {draw.choice(PRODUCTS).description}" for number in range(count)]


async def figures(*, singles=0, batched=0, later=0, size=8, faults=None, output_type=Label, watch=None, **alone):
    """Ask *singles* questions in turn, then *batched* at once, then *later* in turn; return the stats."""
    transport = OtherAlone(SimulatedModel(faults=faults), **alone)
    policy = mb.FlushPolicy(max_batch_size=size)
    questions = iter(texts(singles + batched + later))
    async with mb.Microbatcher(transport, policy=policy, prices=PRICES) as batcher:

        async def submit(text):
            await batcher.submit(ask(text, INSTRUCTIONS), output_type=output_type)
            if watch is not None:
                watch.append(batcher.stats())

        for _ in range(singles):
            await submit(next(questions))
        await asyncio.gather(*(submit(next(questions)) for _ in range(batched)))
        for _ in range(later):
            await submit(next(questions))
        return batcher.stats()


def one_by_one(stats):
    return stats.unbatched_prompt_tokens, stats.unbatched_completion_tokens, stats.unbatched_cost_usd


@pytest.mark.parametrize("output_type", [Label, str], ids=["label", "text"])
@pytest.mark.parametrize("alone", [{"factor": 2.7}, {"more": 11}, {"more": 40, "prompt": 300}, {"prompt": 25}], ids=str)
@pytest.mark.parametrize(
    "order", [{"singles": 12, "batched": 160}, {"batched": 160, "later": 12}], ids=["singles first", "singles last"]
)
async def test_singles_that_take_more_than_calculated_correct_the_comparison(order, alone, output_type):
    """Of earlier answers too: the figures are those of the same questions asked one by one."""
    stats = await figures(**order, **alone, output_type=output_type)
    apart = await figures(batched=172, size=1, **alone, output_type=output_type)
    assert stats.batches == 20
    assert stats.singles_compared == 12
    assert one_by_one(apart) == (apart.prompt_tokens, apart.completion_tokens, apart.cost_usd)
    assert one_by_one(stats) == pytest.approx(one_by_one(apart), rel=0.06)


@pytest.mark.parametrize("output_type", [Label, str], ids=["label", "text"])
async def test_what_was_calculated_from_one_batch_gets_closer(output_type):
    stats, calculated = [await figures(batched=160, later=later, output_type=output_type) for later in (40, 0)]
    apart, some = [await figures(batched=count, size=1, output_type=output_type) for count in (200, 160)]
    assert (stats.singles_compared, calculated.singles_compared) == (40, 0)
    assert one_by_one(stats) == pytest.approx(one_by_one(apart), rel=0.03)
    assert one_by_one(calculated) == pytest.approx(one_by_one(some), rel=0.15)


async def test_a_few_singles_are_no_measure():
    stats, calculated = [await figures(batched=160, later=7, factor=factor) for factor in (3, 1)]
    assert stats.singles_compared == 0
    extra = stats.completion_tokens - calculated.completion_tokens  # of the seven, which cost what they cost
    assert stats.unbatched_completion_tokens == calculated.unbatched_completion_tokens + extra


async def test_singles_that_repair_a_damaged_reply_count_too():
    faults = Faults("missing", rate=0.5, seed=3)
    stats = await figures(batched=320, faults=faults, more=20)
    apart = await figures(batched=320, size=1, more=20)
    assert stats.singles_by_reason.keys() == {"fallback"}
    assert stats.singles_compared >= 8
    assert one_by_one(stats) == pytest.approx(one_by_one(apart), rel=0.03)


@pytest.mark.parametrize("factor", [0.4, 2.7])
async def test_the_figures_only_grow(factor):
    """They are counters of monitoring systems."""
    watch = []
    await figures(singles=5, batched=160, later=30, factor=factor, output_type=str, watch=watch)
    for before, after in pairwise(watch):
        assert all(old <= new for old, new in zip(one_by_one(before), one_by_one(after), strict=True))


async def test_singles_that_take_less_count_from_then_on():
    stats = await figures(singles=12, batched=160, factor=0.4, output_type=str)
    apart = await figures(batched=172, size=1, factor=0.4, output_type=str)
    assert one_by_one(stats) == pytest.approx(one_by_one(apart), rel=0.06)


async def test_lanes_learn_from_singles_of_their_own_kind_only():
    class Other(msgspec.Struct):
        category: str

    transport = OtherAlone(SimulatedModel(), more=40)
    async with mb.Microbatcher(transport, policy=mb.FlushPolicy(max_batch_size=8)) as batcher:
        for text in texts(20):
            await batcher.submit(ask(text, INSTRUCTIONS), output_type=Other)
        await asyncio.gather(*(batcher.submit(ask(text, INSTRUCTIONS), output_type=Label) for text in texts(80)))
        assert batcher.stats().singles_compared == 0
