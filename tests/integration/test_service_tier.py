"""The service tier that an endpoint reports, over a socket, streamed or not: what was charged, not what was asked for."""

from __future__ import annotations

import pytest
from helpers import submit_all

import microbatch as mb
from microbatch.messages import Usage
from microbatch.testing import SimulatedEndpoint, SimulatedTransport

PRICE = mb.Price(2.0, 8.0, tiers={"flex": mb.Price(1.0, 4.0), "priority": mb.Price(4.0, 16.0)})
PRICES = {"m": PRICE}
POLICY = mb.FlushPolicy(idle="wait", max_wait=0.05)


async def cost(transport, texts, tier):
    """Return the dollars of a batcher, and what its usage costs at the tier of each name."""
    params = None if tier is None else {"service_tier": tier}
    async with mb.Microbatcher(transport, policy=POLICY, prices=PRICES, tokens="bytes") as batcher:
        replies = await submit_all(batcher, texts, params=params, model="m")
        for reply in replies:
            await reply.settled()
    stats = batcher.stats()
    assert sum(reply.cost_usd for reply in replies) == pytest.approx(stats.cost_usd)
    usage = Usage(stats.prompt_tokens, stats.completion_tokens)
    return stats.cost_usd, {name: PRICE.of_tier(name).cost(usage) for name in (None, "flex", "priority")}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("texts", [["a"], ["a", "b", "c"]])
@pytest.mark.parametrize(
    ("tier", "charged"), [("flex", "flex"), ("priority", "priority"), ("auto", None), ("default", None), (None, None)]
)
async def test_a_call_is_charged_at_the_tier_of_its_reply(tier, charged, texts, stream):
    async with SimulatedEndpoint() as endpoint:
        transport = mb.OpenAIChat("m", base_url=endpoint.base_url, api_key="any", stream=stream)
        paid, expected = await cost(transport, texts, tier)
    assert paid == pytest.approx(expected[charged])
    assert len(set(expected.values())) == 3


async def test_the_simulated_transport_reports_it_as_the_endpoint_does():
    paid, expected = await cost(SimulatedTransport(SimulatedEndpoint()), ["a", "b"], "flex")
    assert paid == pytest.approx(expected["flex"])


@pytest.mark.parametrize("granted", ["default", None])
async def test_a_tier_that_was_asked_for_and_not_granted_is_not_charged(granted, monkeypatch):
    monkeypatch.setattr("microbatch.testing.model._granted", lambda _: granted)
    async with SimulatedEndpoint() as endpoint:
        transport = mb.OpenAIChat("m", base_url=endpoint.base_url, api_key="any")
        paid, expected = await cost(transport, ["a", "b"], "flex")
    assert paid == pytest.approx(expected[None])
