"""An endpoint may count other tokens than our encoding: what calls one by one would cost is scaled with it, and never negative."""

from __future__ import annotations

import asyncio
import itertools
from importlib import resources

import msgspec
import pytest
from helpers import ask, each
from hypothesis import given, settings
from hypothesis import strategies as st
from shop import PRODUCTS, Label

import microbatch as mb
from microbatch.testing import Faults, SimulatedModel, SimulatedTransport, VirtualClockLoop

LONG = (resources.files("microbatch.demo") / "instructions.txt").read_text("utf-8")
EXACT, UNKNOWN = "gpt-4.1", "some-model"
"""A name that promises the encoding in which we count, and one that does not."""

PRICES = {name: mb.Price(1.0, 4.0, 0.1) for name in (EXACT, UNKNOWN)}
TYPES = {"label": Label, "text": str}


class OtherEncoding(SimulatedTransport):
    """Counts *scale* tokens for each of the simulated model's, and *more* for each prompt."""

    def __init__(self, model, scale, more=0):
        super().__init__(model)
        self.scale, self.more = scale, more

    async def send(self, call, on_text):
        completion = await super().send(call, on_text)
        usage = completion.usage
        prompt, generated = (round(tokens * self.scale) for tokens in (usage.prompt_tokens, usage.completion_tokens))
        completion.usage = msgspec.structs.replace(usage, prompt_tokens=prompt + self.more, completion_tokens=generated)
        return completion


async def figures(transport, size, *, name=EXACT, output_type=Label, system=LONG, count=48, **options):
    policy = mb.FlushPolicy(max_batch_size=size)
    async with mb.Microbatcher(transport, policy=policy, prices=PRICES, **options) as batcher:
        asked = (ask(product.description, system) for product in PRODUCTS[:count])
        await asyncio.gather(*(batcher.submit(each, model=name, output_type=output_type) for each in asked))
        return batcher.stats()


def told(stats):
    return stats.unbatched_prompt_tokens, stats.unbatched_completion_tokens, stats.unbatched_cost_usd


@pytest.mark.parametrize("scale", [0.3, 0.5, 0.8, 0.95, 1.0, 1.05, 1.3, 2.0, 3.0])
@each(
    "name, kind, charged, system",
    itertools.product([EXACT, UNKNOWN], TYPES, [True, False], [LONG, "Sort it."]),
)
async def test_one_call_each_is_what_one_call_each_costs_in_any_encoding(scale, name, kind, charged, system):
    async def run(size):
        transport = OtherEncoding(SimulatedModel(count_schema=charged), scale)
        return await figures(transport, size, name=name, output_type=TYPES[kind], system=system)

    together, apart = await run(16), await run(1)
    assert together.batches == 3
    assert together.unbatched_prompt_tokens == pytest.approx(apart.prompt_tokens, rel=0.02)
    # A single label has few tokens, and the endpoint rounds them: half a token for each item.
    rounding = 0.5 * 48 if scale != 1.0 else 0
    assert together.unbatched_completion_tokens == pytest.approx(
        apart.completion_tokens, rel=0.03, abs=max(rounding, 0.03 * apart.completion_tokens)
    )


@pytest.mark.parametrize("more", [40, 500])
async def test_what_an_endpoint_adds_to_each_prompt_in_our_own_encoding_is_no_scale(more):
    """A hidden instruction, for instance. The replies show that the encoding is ours."""
    together, apart = [await figures(OtherEncoding(SimulatedModel(), 1.0, more), size) for size in (16, 1)]
    assert together.unbatched_prompt_tokens == pytest.approx(apart.prompt_tokens, rel=0.02)


@pytest.mark.parametrize("name", [EXACT, UNKNOWN])
async def test_a_model_that_indents_its_replies_keeps_the_encoding_of_its_prompts(name):
    together, apart = [await figures(SimulatedTransport(SimulatedModel(indent=2)), size, name=name) for size in (16, 1)]
    assert together.unbatched_prompt_tokens == pytest.approx(apart.prompt_tokens, rel=0.05)


@pytest.mark.parametrize("canary", [False, True])
async def test_damaged_replies_and_canaries_are_scaled_too(canary):
    faults = Faults("missing", rate=0.6, on="combined", seed=3)
    options = {"fallback": mb.FallbackPolicy(canary=canary)}
    together, apart = [
        await figures(OtherEncoding(SimulatedModel(faults=faults), 0.4), size, **options) for size in (16, 1)
    ]
    assert together.fallback_calls
    assert together.unbatched_prompt_tokens == pytest.approx(apart.prompt_tokens, rel=0.03)


class Nonsense(SimulatedTransport):
    """Reports the numbers of *reports* in turn."""

    def __init__(self, reports):
        super().__init__(SimulatedModel())
        self.reports = itertools.cycle(reports)

    async def send(self, call, on_text):
        completion = await super().send(call, on_text)
        completion.usage = mb.Usage(*next(self.reports))
        return completion


tokens = st.integers(0, 50) | st.integers(0, 20_000)


@given(
    reports=st.lists(st.tuples(tokens, tokens, tokens), min_size=1, max_size=4),
    kind=st.sampled_from(list(TYPES)),
    name=st.sampled_from([EXACT, UNKNOWN]),
    merge=st.sampled_from(["always", "when-cheaper"]),
    size=st.sampled_from([3, 16]),
)
@settings(max_examples=60, deadline=None)
def test_no_report_makes_a_figure_negative(reports, kind, name, merge, size):
    async def run():
        policy = mb.FlushPolicy(max_batch_size=size, merge=merge)
        watched = []
        async with mb.Microbatcher(Nonsense(reports), policy=policy, prices=PRICES) as batcher:
            for part in (PRODUCTS[:16], PRODUCTS[16:17], PRODUCTS[17:33]):
                asked = (ask(product.description, "Sort.") for product in part)
                await asyncio.gather(*(batcher.submit(each, model=name, output_type=TYPES[kind]) for each in asked))
                watched.append(told(batcher.stats()))
        return watched

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        watched = runner.run(run())
    for before, after in itertools.pairwise([(0, 0, 0.0), *watched]):
        assert all(old <= new for old, new in zip(before, after, strict=True))
