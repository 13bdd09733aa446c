"""What is paid is divided exactly, and what it would have cost one by one is known without counting the items."""

from __future__ import annotations

import asyncio
import json
import random
import re
from functools import partial
from importlib import resources

import pytest
from helpers import ask as ask_with
from hypothesis import given
from hypothesis import strategies as st
from shop import PRODUCTS, Label, Product

import microbatch as mb
from microbatch.accounting.stats import split
from microbatch.accounting.tokens import TokenCounter
from microbatch.testing import Faults, Latency, ScriptedTransport, SimulatedModel, SimulatedTransport

DEMO = resources.files("microbatch.demo")
INSTRUCTIONS = (DEMO / "instructions.txt").read_text("utf-8")
PRICE = mb.Price(0.40, 1.60, 0.10)
PRICES = {"simulated": PRICE}


ask = partial(ask_with, system=INSTRUCTIONS)


class KnownModel(SimulatedTransport):
    """The simulated model under the name of one whose tokens are known."""

    model = "gpt-4.1-mini"


def varied(count, seed=0):
    """Return texts of one line to a dozen, all different."""
    draw = random.Random(seed)
    texts = []
    for number in range(count):
        product, other = PRODUCTS[number % len(PRODUCTS)], draw.choice(PRODUCTS)
        words = f"{product.description} {other.description}".split()
        texts.append(f"Product {number}: {product.name}\nDescription: {' '.join(words[: draw.randint(3, len(words))])}")
    return texts


def total(usages):
    prompt = completion = cached = 0
    for usage in usages:
        prompt += usage.prompt_tokens
        completion += usage.completion_tokens
        cached += usage.cached_tokens
    return prompt, completion, cached


def paid(stats):
    return stats.prompt_tokens, stats.completion_tokens, stats.cached_tokens


# --- nothing is lost


@given(total=st.integers(0, 10**9), weights=st.lists(st.integers(0, 10**6), min_size=1, max_size=60))
@pytest.mark.promise(of="usage")
def test_shares_add_up_to_the_total_and_are_within_one_of_their_part(total, weights):
    shares = split(total, weights)
    assert sum(shares) == total
    assert all(type(share) is int for share in shares)
    whole = sum(weights)
    if whole:
        for share, weight in zip(shares, weights, strict=True):
            assert total * weight // whole <= share <= -(-total * weight // whole)
    else:
        assert max(shares) - min(shares) <= 1


@given(total=st.integers(0, 10**6), weights=st.lists(st.integers(0, 10**3), min_size=1, max_size=20))
def test_the_largest_remainders_get_what_rounding_leaves(total, weights):
    whole = sum(weights)
    if not whole:
        return
    shares = split(total, weights)
    up = [
        total * weight % whole for share, weight in zip(shares, weights, strict=True) if share > total * weight // whole
    ]
    down = [
        total * weight % whole
        for share, weight in zip(shares, weights, strict=True)
        if share == total * weight // whole
    ]
    assert not up or not down or min(up) >= max(down)


@pytest.mark.parametrize("resolve", ["stream", "verified"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.promise(of="usage")
async def test_usage_is_conserved_to_the_token_under_faults_cancellations_and_failures(seed, resolve):
    kinds = (
        *("missing", "duplicate", "unknown", "renamed", "reordered", "empty_results", "wrong_type", "broken_json"),
        *("fenced", "whitespace", "truncated", "refusal", "filtered", "http_400", "http_429", "http_500"),
        *("shifted_back", "shifted_forward"),
    )
    faults = Faults(kinds, rate=0.4, on="all", seed=seed)
    model = SimulatedModel(faults=faults, latency=Latency(first_token=0.2, tokens_per_second=400), cached_prefixes=True)
    draw = random.Random(seed)
    async with mb.Microbatcher(
        SimulatedTransport(model), prices=PRICES, tokens="bytes", fallback=mb.FallbackPolicy(resolve=resolve)
    ) as batcher:

        async def caller(number, text):
            await asyncio.sleep(draw.random() * 3)
            output_type = (str, Label, Product)[number % 3]
            timeout = draw.choice([None, None, None, 1.0])
            asked = asyncio.ensure_future(
                batcher.submit(ask(text, system=3 * INSTRUCTIONS), output_type=output_type, timeout=timeout)
            )
            if draw.random() < 0.2:
                asyncio.get_running_loop().call_later(draw.random() * 2, asked.cancel)
            return await asked

        texts = varied(200, seed)
        ended = await asyncio.gather(*(caller(*each) for each in enumerate(texts)), return_exceptions=True)
        replies = [await each.settled() for each in ended if isinstance(each, mb.Reply)]
    stats = batcher.stats()
    reported = total([model.reported])
    assert paid(stats) == reported
    # A call whose last caller leaves is cancelled and never reports, so those it had answered are left with an estimate, which
    # holds what an earlier call reported for them.
    known = [reply for reply in replies if not reply.usage.estimated]
    mixed = [reply.usage for reply in replies if reply.usage.estimated and reply.route == "fallback"]
    assert len(known) > 0.9 * len(replies)
    assert resolve == "stream" or known == replies
    claimed = total([*(reply.usage for reply in known), stats.unclaimed])
    assert claimed == reported or mixed
    for some, most, rest in zip(claimed, reported, total(mixed), strict=True):
        assert some <= most <= some + rest
    assert min(stats.answered, stats.failed, stats.cancelled) > 0
    assert stats.answered + stats.failed + stats.cancelled == stats.items == 200
    assert stats.answered == len(replies)
    assert all(total([stats.unclaimed])[:2])
    assert all(reported)
    assert stats.cost_usd == pytest.approx(PRICE.cost(model.reported), abs=1e-9)
    if not mixed:
        claimed_usd = sum(reply.cost_usd for reply in known) + PRICE.cost(stats.unclaimed)
        assert claimed_usd == pytest.approx(stats.cost_usd, abs=1e-9)


@pytest.mark.parametrize("kind", ["cut", "reset"])
async def test_what_a_broken_stream_reported_is_conserved_and_what_it_did_not_is_marked(kind):
    model = SimulatedModel(faults=Faults(kind, rate=0.3))
    async with mb.Microbatcher(SimulatedTransport(model), tokens="bytes") as batcher:
        replies = await asyncio.gather(*map(batcher.submit, map(ask, varied(160))))
        settled = [await reply.settled() for reply in replies]
    stats = batcher.stats()
    assert paid(stats) == total([model.reported])
    assert stats.unreported_calls == model.faulted
    known = [reply.usage for reply in settled if not reply.usage.estimated]
    assert 0 < len(known) < 160
    assert total([*known, stats.unclaimed]) == paid(stats)


async def test_an_item_asked_twice_pays_for_both():
    transport = ScriptedTransport(
        lambda call: (call.reply([(call.items[0][0], "A")]), mb.Completion("stop", usage=mb.Usage(1_000, 10))),
        lambda call: ("B", mb.Completion("stop", usage=mb.Usage(300, 7))),
    )
    async with mb.Microbatcher(transport, tokens="bytes") as batcher:
        replies = await asyncio.gather(batcher.submit(ask("a" * 30)), batcher.submit(ask("b" * 30)))
    assert [(reply.route, reply.output) for reply in replies] == [("batch", "A"), ("fallback", "B")]
    # Prompts are split by the items' bytes, completions by the answers': the missing one said nothing.
    assert [reply.usage for reply in replies] == [mb.Usage(500, 10), mb.Usage(800, 7)]


async def test_what_a_failed_request_used_is_unclaimed():
    transport = ScriptedTransport(
        lambda call: (call.reply([(call.items[0][0], "A")]), mb.Completion("stop", usage=mb.Usage(1_000, 10))),
        lambda call: mb.Completion("content_filter", usage=mb.Usage(300, 7)),
    )
    async with mb.Microbatcher(transport, tokens="bytes") as batcher:
        replies = await asyncio.gather(
            batcher.submit(ask("a" * 30)), batcher.submit(ask("b" * 30)), return_exceptions=True
        )
        stats = batcher.stats()
    assert replies[0].usage == mb.Usage(500, 10)
    assert isinstance(replies[1], mb.Filtered)
    assert stats.unclaimed == mb.Usage(800, 7)
    assert paid(stats) == (1_300, 17, 0)


async def test_whoever_leaves_a_call_that_goes_on_leaves_their_share_unclaimed():
    model = SimulatedModel(latency=Latency(first_token=1.0, tokens_per_second=None))
    async with mb.Microbatcher(SimulatedTransport(model), tokens="bytes") as batcher:
        texts = varied(4)
        callers = [asyncio.ensure_future(batcher.submit(ask(text))) for text in texts]
        await asyncio.sleep(0.5)
        callers[2].cancel()
        ended = await asyncio.gather(*callers, return_exceptions=True)
        replies = [await each.settled() for each in ended if isinstance(each, mb.Reply)]
        stats = batcher.stats()
    assert len(replies) == 3
    assert stats.unclaimed.prompt_tokens > 0
    assert total([*(reply.usage for reply in replies), stats.unclaimed]) == total([model.reported])


@pytest.mark.parametrize("ended", [False, True])
async def test_a_caller_cancelled_in_the_moment_of_its_answer_leaves_its_share_unclaimed(ended):
    callers = []

    class Transport(ScriptedTransport):
        async def send(self, call, on_text):
            if ended:  # answers and end come in one step; the cancellation runs after it and before the caller does
                asyncio.get_running_loop().call_soon(callers[1].cancel)
                return await super().send(call, on_text)
            completion = await super().send(call, on_text)
            callers[1].cancel()
            await asyncio.sleep(0.5)
            return completion

    async with mb.Microbatcher(Transport(), tokens="bytes") as batcher:
        texts = varied(4)
        callers += [asyncio.ensure_future(batcher.submit(ask(text))) for text in texts]
        results = await asyncio.gather(*callers, return_exceptions=True)
        replies = [await each.settled() for each in results if isinstance(each, mb.Reply)]
        await batcher.aclose()
        stats = batcher.stats()
    assert len(replies) == stats.answered == 4 - stats.cancelled
    assert total([*(reply.usage for reply in replies), stats.unclaimed]) == paid(stats)
    assert stats.cancelled == 1
    assert stats.unclaimed.prompt_tokens > 0


# --- estimates


async def test_an_answer_that_comes_with_the_end_of_its_reply_is_exact_at_once():
    async with mb.Microbatcher(ScriptedTransport(), tokens="bytes") as batcher:
        callers = [asyncio.ensure_future(batcher.submit(ask(text))) for text in varied(10)]
        await asyncio.wait(callers, return_when=asyncio.FIRST_COMPLETED)
        replies = [(each.result(), each.result().usage) for each in callers]  # as their callers get them
        assert not any(usage.estimated for _, usage in replies)
        assert {(reply.finish_reason, reply.route) for reply, _ in replies} == {("stop", "batch")}
        assert total(usage for _, usage in replies) == paid(batcher.stats())


async def test_answers_that_come_with_a_cut_share_by_their_length_what_it_reported():
    class Transport(ScriptedTransport):
        async def send(self, call, on_text):
            ids = re.findall(r"^\[(\w+)\] ", call.messages[-1]["content"], re.MULTILINE)
            elements = [json.dumps({"id": name, "answer": "x" * 10**place}) for place, name in enumerate(ids)]
            on_text('{"results":[' + ",".join(elements))
            return mb.Completion(None, usage=mb.Usage(300, 111))

    async with mb.Microbatcher(Transport(), tokens="bytes") as batcher:
        replies = await asyncio.gather(*(batcher.submit(ask(text)) for text in varied(3)))
        assert [reply.output for reply in replies] == ["x", "x" * 10, "x" * 100]
        assert [reply.usage.completion_tokens for reply in replies] == [1, 10, 100]


async def test_an_early_answer_is_estimated_until_its_call_has_ended():
    model = SimulatedModel(latency=Latency(first_token=1.0, element=0.1))
    loop = asyncio.get_running_loop()
    async with mb.Microbatcher(SimulatedTransport(model), prices=PRICES, tokens="bytes") as batcher:
        callers = [asyncio.ensure_future(batcher.submit(ask(text))) for text in varied(10)]
        first = await callers[0]
        assert loop.time() == pytest.approx(1.1)
        assert first.usage.estimated
        assert (first.cost_usd, first.finish_reason, first.model, first.request_id) == (None, None, None, None)
        assert await first.settled() is first
        assert loop.time() == pytest.approx(2.0)
        assert not first.usage.estimated
        assert first.cost_usd == PRICE.cost(first.usage)
        assert (first.finish_reason, first.model) == ("stop", "simulated")
        assert first.request_id is not None
        await asyncio.gather(*callers)


async def test_an_estimate_is_of_the_right_size():
    model = SimulatedModel(latency=Latency(first_token=1.0, element=0.1))
    async with mb.Microbatcher(SimulatedTransport(model), tokens="bytes") as batcher:
        first, *_ = [asyncio.ensure_future(batcher.submit(ask(text))) for text in varied(10)]
        estimate = (await first).usage
        exact = (await (await first).settled()).usage
        await batcher.aclose()
    assert exact.prompt_tokens / 3 < estimate.prompt_tokens < exact.prompt_tokens * 3
    assert exact.completion_tokens / 3 < estimate.completion_tokens < exact.completion_tokens * 3


async def test_a_call_that_ends_without_usage_leaves_the_estimate_marked():
    async with mb.Microbatcher(ScriptedTransport(usage=False), tokens="bytes") as batcher:
        replies = await asyncio.gather(*map(batcher.submit, map(ask, varied(4))))
        alone = await batcher.submit(ask("alone"))
        for reply in (*replies, alone):
            assert (await reply.settled()).usage.estimated
            assert reply.usage.prompt_tokens > 0
        stats = batcher.stats()
    assert stats.unreported_calls == 2
    assert paid(stats) == (0, 0, 0)
    assert stats.unclaimed == mb.Usage()


async def test_settled_waits_at_most_the_patience_for_the_usage_of_a_reply_that_goes_on_and_on():
    model = SimulatedModel(latency=Latency(first_token=1.0, element=0.1))

    class Lingering(SimulatedTransport):
        async def send(self, call, on_text):
            completion = await super().send(call, on_text)
            await asyncio.sleep(60)
            return completion

    loop = asyncio.get_running_loop()
    async with mb.Microbatcher(Lingering(model), tokens="bytes") as batcher:
        replies = await asyncio.gather(*map(batcher.submit, map(ask, varied(3))))
        answered = loop.time()
        assert (await replies[0].settled()).usage.estimated
        assert loop.time() == pytest.approx(answered + 2.0)


async def test_dollars_are_unknown_when_one_models_price_is():
    async with mb.Microbatcher(SimulatedTransport(SimulatedModel()), tokens="bytes") as batcher:
        reply = await (await batcher.submit(ask("x"))).settled()
        stats = batcher.stats()
    assert (reply.cost_usd, stats.cost_usd, stats.unbatched_cost_usd) == (None, None, None)


# --- what it would have cost one by one


async def figures(texts, output_type, *, size, faults=None, **options):
    model = SimulatedModel(faults=faults, **options)
    policy = mb.FlushPolicy(max_batch_size=size, max_output_tokens=10**6, max_batch_tokens=10**6)
    async with mb.Microbatcher(KnownModel(model), policy=policy, prices=PRICES) as batcher:
        replies = await asyncio.gather(*(batcher.submit(ask(text), output_type=output_type) for text in texts))
        for reply in replies:
            await reply.settled()
        return batcher.stats()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("output_type", "options"),
    [
        (Label, {}),
        (Label, {"count_schema": False}),
        (Label, {"faults": Faults("missing")}),
        (str, {}),
        (Product, {}),
    ],
    ids=["label", "label, schema not charged", "label, answers missing", "str", "struct"],
)
async def test_the_cost_one_by_one_is_known_within_a_hundredth(output_type, options):
    count = 640
    texts = varied(count)
    together = await figures(texts, output_type, size=16, **options)
    options = {name: option for name, option in options.items() if name != "faults"}
    alone = await figures(texts, output_type, size=1, **options)
    assert together.unbatched_calls == alone.upstream_calls == count
    assert together.unbatched_prompt_tokens == pytest.approx(alone.prompt_tokens, rel=0.01)
    assert together.unbatched_completion_tokens == pytest.approx(alone.completion_tokens, rel=0.01)
    assert together.unbatched_cost_usd == pytest.approx(alone.cost_usd, rel=0.01)
    assert together.prompt_tokens < 0.6 * alone.prompt_tokens
    assert (alone.unbatched_prompt_tokens, alone.unbatched_completion_tokens) == paid(alone)[:2]


async def test_nothing_is_tokenized_per_item(monkeypatch):
    calls = 0
    count = TokenCounter.count

    def counted(self, text):
        nonlocal calls
        calls += 1
        return count(self, text)

    monkeypatch.setattr(TokenCounter, "count", counted)
    spent = []
    for items in (16, 160, 640):
        calls = 0
        await figures(varied(items), Label, size=16)
        spent.append(calls)
    assert spent[0] == spent[1] == spent[2]
