"""Limits on prompts where the endpoint's encoding is not the one that is counted here."""

from __future__ import annotations

import asyncio
from typing import Literal

import pytest
from helpers import ask
from hypothesis import given
from hypothesis import strategies as st

import microbatch as mb
from microbatch.accounting.tokens import TokenCounter
from microbatch.batching.lane_history import TokenScale
from microbatch.testing import ScriptedTransport, SimulatedModel, SimulatedTransport
from microbatch.testing.counting import prompt_tokens

SYSTEM = "Sort the product into one of the groups of our catalogue, and take care. " * 4
TEXTS = [
    f"Produkt {number}: {'Wanduhr aus Buchenholz mit leisem Laufwerk, ' * (1 + number % 4)}" for number in range(240)
]


class ForeignModel(SimulatedModel):
    """A model whose encoding takes *rate* tokens for each of ours, and whose template adds *template* to each prompt."""

    def __init__(self, rate=1.8, template=0, **options):
        super().__init__(**options)
        self.rate, self.template = rate, template
        self.prompts = []

    def read(self, body):
        prompt = super().read(body)
        prompt.tokens = round(prompt.tokens * self.rate) + self.template
        if prompt.combined:
            self.prompts.append((prompt.tokens, len(prompt.items)))
        return prompt


async def run(
    model,
    *,
    asked_by="waves",
    texts=TEXTS,
    name=None,
    output_type=str,
    rate_limit=None,
    tokens=None,
    system=SYSTEM,
    **policy,
):
    """Ask about all texts, 16 at once or as bulk work."""
    transport = SimulatedTransport(model)
    transport.model = name
    settings = mb.FlushPolicy(**policy)

    def messages(text):
        return ask(text, system)[system is None :]

    async with mb.Microbatcher(transport, policy=settings, rate_limit=rate_limit, tokens=tokens) as batcher:
        if asked_by == "map":
            requests = (mb.Request(messages(text), output_type=output_type) for text in texts)
            assert len([result.unwrap() async for result in batcher.map(requests)]) == len(texts)
        else:
            for start in range(0, len(texts), 16):
                some = texts[start : start + 16]
                await asyncio.gather(*(batcher.submit(messages(text), output_type=output_type) for text in some))


Label = Literal["home", "garden", "clothing"]
RATES = [(1.8, 0), (1.8, 60), (1.3, 0), (1.3, 60), (1.0, 0), (1.0, 60), (0.7, 0)]


@pytest.mark.parametrize("asked_by", ["waves", "map"])
@pytest.mark.parametrize("count_schema", [True, False])
@pytest.mark.parametrize("limited", [True, False], ids=["rate limit", "no rate limit"])
async def test_max_prompt_tokens_holds_after_the_first_report(asked_by, count_schema, limited):
    """By the endpoint's count, whatever its encoding, its template, and whether it charges the schema."""
    for rate, template in RATES:
        for most in (800, 1_600):
            model = ForeignModel(rate, template, count_schema=count_schema)
            limit = mb.RateLimit(tpm=10_000_000) if limited else None
            policy = {"max_prompt_tokens": most, "max_batch_size": 64, "max_concurrent_batches": 1}
            await run(model, asked_by=asked_by, output_type=Label, rate_limit=limit, **policy)
            (first, _), *others = model.prompts
            assert max(tokens for tokens, _ in others) <= most, (rate, template, most)
            if rate == 1.8:
                assert first > most
            if asked_by == "map":
                # Batches stay as large as they can be, but for a margin where texts may differ.
                full = [tokens for tokens, _ in others[3:-1]]
                assert sum(full) > 0.8 * most * len(full) or rate < 1, (rate, template, most)


def tokens_of(call):
    """Return the tokens of a call's prompt in an encoding that takes 1.8 times ours."""
    return round(1.8 * prompt_tokens(call.call.messages))


def some_answers(call):
    """Answer the short items, and say what the prompt took."""
    answers = [(name, "a") for name, text in call.items if len(text) < 100]
    return call.reply(answers), mb.Completion("stop", usage=mb.Usage(tokens_of(call), 50))


def no_answer(call):
    """Spend all tokens on a thought, so that the same requests are asked again with a higher bound."""
    usage = mb.Usage(tokens_of(call), call.call.bound)
    return "", mb.Completion("length", usage=usage, bound=call.call.bound)


@pytest.mark.parametrize("first", [some_answers, no_answer])
async def test_what_is_asked_again_together_keeps_to_the_limit_too(first):
    transport = ScriptedTransport(first, answer=lambda _: "a")
    texts = [f"{number} {'Wanduhr aus Buchenholz ' * (12 if number % 2 else 1)}" for number in range(16)]
    async with mb.Microbatcher(transport, policy=mb.FlushPolicy(max_prompt_tokens=1_400)) as batcher:
        await asyncio.gather(*(batcher.submit(ask(text, SYSTEM)) for text in texts))
    combined = [call for call in transport.calls if call.combined]
    assert len(combined[0].items) == 16
    assert tokens_of(combined[0]) > 1_400
    assert len(combined) > 2
    assert max(map(tokens_of, combined[1:])) <= 1_400


async def test_max_batch_tokens_is_divided_by_the_learned_scale_without_a_rate_limit():
    """Of the instruction and the items alone the endpoint reports nothing; a prompt without shared messages has nothing else."""
    for rate in (1.8, 1.3, 0.7):
        model = ForeignModel(rate, count_schema=False)
        await run(
            model, asked_by="map", max_batch_tokens=1_000, max_batch_size=64, max_concurrent_batches=1, system=None
        )
        (first, _), *others = model.prompts
        assert max(tokens for tokens, _ in others) <= 1_000 + 8 * rate  # the template around one message
        if rate > 1:
            assert first > 1_100
            assert sum(tokens for tokens, _ in others[3:-1]) > 800 * len(others[3:-1])


@pytest.mark.parametrize("name", ["gpt-4o", "o3-mini", "openai/gpt-4.1-mini"])
async def test_in_the_models_own_encoding_batches_are_exactly_as_large_as_max_batch_tokens_allows(name):
    model = ForeignModel(1.0)
    texts = [f"Product {number:03}: a clock of beech wood with a silent movement" for number in range(240)]
    await run(model, asked_by="map", texts=texts, name=name, max_batch_tokens=600, max_batch_size=64)
    sizes = [size for _, size in model.prompts]
    assert len(sizes) > 5
    assert {*sizes[:-1]} == {sizes[0]}


async def test_a_count_of_bytes_is_a_limit_in_bytes_whatever_is_reported():
    model = ForeignModel(1.8)
    await run(model, asked_by="map", tokens="bytes", max_prompt_tokens=2_000, max_batch_size=64)
    sizes = [size for _, size in model.prompts]
    assert max(sizes) <= sizes[0] + 2


async def test_nothing_is_counted_for_it_where_no_limit_is_near(monkeypatch):
    counted, real = [], TokenCounter.count

    def count(self, text):
        counted.append(text)
        return real(self, text)

    monkeypatch.setattr(TokenCounter, "count", count)
    model = ForeignModel(1.8)
    texts = [f"Produkt {number}: Wanduhr" for number in range(320)]
    await run(model, asked_by="map", texts=texts[:160], output_type=Label, max_concurrent_batches=1)
    assert len(model.prompts) == 10
    once = len(counted)
    assert once < 80  # what surrounds the items, on the first batch
    counted.clear()
    await run(model, asked_by="map", texts=texts, output_type=Label, max_concurrent_batches=1)
    assert len(counted) == once


async def test_a_context_window_is_kept_in_the_endpoints_tokens():
    """Once a refusal has named it, and a report the tokens."""
    model = ForeignModel(1.8)
    limit = mb.RateLimit(tpm=8_000)
    await run(model, texts=TEXTS[:64], rate_limit=limit, max_batch_size=64, max_concurrent_batches=1)
    assert max(tokens for tokens, _ in model.prompts[1:]) <= 8_000 // 4


# --- the scale itself

REPORTS = st.lists(st.integers(60, 6_000), min_size=1, max_size=12)


@given(
    rate=st.floats(1.0, 4.0),
    fixed=st.integers(0, 200),
    charged=st.booleans(),
    reports=REPORTS,
    most=st.integers(100, 8_000),
)
def test_a_prompt_within_the_room_is_within_the_limit_whatever_was_reported_before(rate, fixed, charged, reports, most):
    """For any encoding of at most four tokens for each of ours, whether the endpoint charges what is fixed or not."""

    def theirs(ours):
        return round(rate * (ours + fixed * charged))

    scale = TokenScale()
    for ours in reports:
        scale.learn(ours, theirs(ours), fixed=fixed)
        assert scale.room(most) <= most
        if scale.room(most) > 0:
            assert theirs(scale.room(most)) <= most + 2  # roundings
        assert theirs(ours) <= scale.at_most(ours) + 1


@given(rate=st.floats(1.0, 4.0), fixed=st.integers(0, 200), charged=st.booleans(), most=st.integers(1_000, 8_000))
def test_prompts_that_fill_the_room_come_close_to_the_limit(rate, fixed, charged, most):
    scale, ours = TokenScale(), most
    for _ in range(30):
        theirs = round(rate * (ours + fixed * charged))
        scale.learn(ours, theirs, fixed=fixed)
        ours = max(60, scale.room(most))
    assert theirs > 0.85 * most or ours == 60


def test_one_odd_report_moves_the_upper_estimate_up_at_once_and_down_slowly():
    scale = TokenScale()
    scale.learn(1_000, 1_500)
    scale.learn(1_000, 1_900)
    assert scale.at_most(1_000) == 1_900
    scale.learn(1_000, 1_500)
    assert scale.at_most(1_000) == 1_800
    scale.learn(4_000, 6_000)  # of long prompts it says nothing
    assert scale.at_most(4_000) == 6_000


def test_a_count_that_is_ours_limits_nothing_and_no_count_limits_to_less_than_a_quarter():
    scale = TokenScale()
    assert (scale.factor, scale.room(1_000)) == (1.0, 1_000)
    scale.learn(1_000, 1_080, fixed=80)
    assert scale.factor == 1.0
    scale.learn(1_000, 50_000)
    assert scale.factor == 4.0
