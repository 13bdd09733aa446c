"""Stats, summary and log say what replies did wrong, and blame it only for what it has cost."""

from __future__ import annotations

import asyncio
import logging
from importlib import resources
from types import SimpleNamespace

import msgspec
import pytest
from helpers import ask
from shop import PRODUCTS, Label

import microbatch as mb
from microbatch.cli.summary import DAMAGE, damage, remarks
from microbatch.testing import Faults, SimulatedModel, SimulatedTransport

LONG = (resources.files("microbatch.demo") / "instructions.txt").read_text("utf-8")
SHORT = "Sort it."
PRICES = {"simulated": mb.Price(0.40, 1.60, 0.10)}


async def figures(kinds=None, *, system=LONG, rate=1.0, count=64, rounds=4, prices=PRICES, **options):
    """Classify products, several times as many at once as fit a batch, with a model that spoils combined replies."""
    faults = None if kinds is None else Faults(kinds, rate=rate, on="combined", seed=2)
    # Where schemas are charged, combining saves even without instructions.
    model = SimulatedModel(faults=faults, count_schema=system != SHORT)
    policy = mb.FlushPolicy(max_batch_size=16, max_concurrent_batches=2)
    async with mb.Microbatcher(SimulatedTransport(model), policy=policy, prices=prices, **options) as batcher:
        for number in range(rounds):
            texts = [f"{number} {product.description}" for product in PRODUCTS[:count]]
            asked = (batcher.submit(ask(text, system), output_type=Label) for text in texts)
            await asyncio.gather(*asked, return_exceptions=True)
        return batcher.stats()


def told(stats):
    """Return the text of the summary of a run, on one line."""
    plan = SimpleNamespace(single=False, simulated=None)
    return " ".join(" ".join([*damage(stats), *remarks(stats, plan)]).split())


@pytest.mark.parametrize(
    ("kinds", "figure", "words"),
    [
        (["truncated"], "cut_replies", "cut off"),
        (["cut"], "cut_replies", "cut off"),
        (["reset"], "cut_replies", "cut off"),
        (["strange_ids"], "unknown_ids", "unknown id"),
        (["unknown"], "unknown_ids", "unknown id"),
        (["whitespace"], "lanes_parted", "asked alone for a while"),
        (["missing"], "fallback_calls", "asked again"),
        (["broken_json"], "fallback_calls", "asked again"),
    ],
    ids=str,
)
async def test_each_kind_of_damage_has_its_figure(kinds, figure, words):
    stats, sound = await figures(kinds), await figures()
    assert getattr(stats, figure) > 0
    assert getattr(sound, figure) == 0
    assert words in told(stats)
    assert f"{getattr(stats, figure):,} " in told(stats)
    assert "damage:" not in told(sound)


async def test_a_canary_that_fails_is_told():
    stats = await figures(["shifted_back"], fallback=mb.FallbackPolicy(canary=True))
    assert stats.canaries_failed > 0
    assert "canar" in told(stats)


async def test_a_caller_that_leaves_damages_nothing():
    """Its call is broken off by us."""
    transport = SimulatedTransport(SimulatedModel(latency=mb.testing.Latency()))
    async with mb.Microbatcher(transport) as batcher:
        asked = [asyncio.ensure_future(batcher.submit(ask(f"item {number}"))) for number in range(8)]
        await asyncio.sleep(0.7)
        for each in asked:
            each.cancel()
        await asyncio.wait(asked)
    stats = batcher.stats()
    assert (stats.batches, [getattr(stats, name) for name in DAMAGE]) == (1, [0] * len(DAMAGE))


@pytest.mark.parametrize("prices", [PRICES, None], ids=["priced", "unpriced"])
@pytest.mark.parametrize("kinds", [["whitespace"], ["strange_ids"], ["empty_results"]], ids=str)
async def test_damage_is_blamed_where_it_has_eaten_up_the_saving(kinds, prices):
    """The instructions are long: without it combining saves half."""
    sound, stats = [await figures(some, prices=prices, rounds=1, count=32) for some in (None, kinds)]
    assert (sound.costs_more, stats.costs_more, stats.damage_costs_more) == (False, True, True)
    assert "because of damaged replies" in told(stats)
    assert "--max-batch-size" in told(stats)
    assert "shorter" not in told(stats)


@pytest.mark.parametrize("kinds", [None, ["missing"]], ids=str)
async def test_short_instructions_are_blamed_where_they_are_the_reason(kinds):
    stats = await figures(kinds, system=SHORT, rate=0.1)
    assert stats.costs_more
    assert not stats.damage_costs_more
    assert "shorter" in told(stats)
    assert "because of damaged replies" not in told(stats)


async def test_the_damage_is_the_cost_of_what_was_asked_again_and_of_replies_without_an_answer():
    stats, sound = await figures(["whitespace"], rounds=1, count=32), await figures(rounds=1, count=32)
    # Two useless replies, and then each request alone.
    assert (stats.batches, stats.fallback_calls) == (2, 32)
    assert stats.damage_usage == mb.Usage(stats.prompt_tokens, stats.completion_tokens)
    assert stats.damage_cost_usd == pytest.approx(stats.cost_usd)
    assert (sound.damage_usage, sound.damage_cost_usd) == (mb.Usage(), 0.0)
    unknown = await figures(["whitespace"], rounds=1, count=32, prices=lambda _: None)
    assert (unknown.damage_usage.prompt_tokens, unknown.damage_cost_usd) == (unknown.prompt_tokens, None)


async def test_the_log_gives_the_reason_too(caplog):
    with caplog.at_level(logging.WARNING, "microbatch"):
        await figures(["whitespace"])
    assert "nothing of use" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "microbatch"):
        await figures(system=SHORT, rounds=12)
    assert "costs more than it saves" in caplog.text
    assert "too short" in caplog.text
    assert "damaged" not in caplog.text


def test_one_call_each_is_said_to_be_measured_where_it_was():
    stats = mb.Stats(answered=20, unbatched_calls=20)
    assert "not measured" in told(stats)
    measured = told(msgspec.structs.replace(stats, singles_compared=12))
    assert "corrected by what 12 single calls took" in measured
    assert "not measured" not in measured
