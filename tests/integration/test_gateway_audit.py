"""The audit behind the gateway: who pays for it, and where its findings are shown."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from gateway_world import PATIENCE, QUICK, Watched, gateway, sdk, serve
from helpers import ask

import microbatch as mb
from microbatch.cli.environment import with_environment
from microbatch.cli.main import make_parser
from microbatch.cli.serve import make_gateway
from microbatch.testing import Mistakes

pytestmark = pytest.mark.slow

OWN, CLIENTS = "sk-of-the-gateway", "sk-of-a-client"
WRONG_TOGETHER = Mistakes(by_size={2: 1.0})


async def chat(served, texts, *, key):
    async with sdk(served, key) as client:
        asked = [client.chat.completions.create(model="m", messages=ask(text)) for text in texts]
        return await asyncio.gather(*asked)


async def stats_of(session, address):
    async with session.get(f"{address}/stats") as response:
        return await response.json()


@pytest.mark.parametrize(
    ("key", "options", "audited"),
    [
        ("microbatch", {}, True),
        (CLIENTS, {}, False),
        (CLIENTS, {"audit_own_keys": True}, True),
    ],
)
async def test_the_gateways_own_key_pays_for_audits_and_a_clients_only_if_asked(key, options, audited):
    async with Watched() as upstream:
        policy = mb.AuditPolicy(rate=1.0, **options)
        async with gateway(upstream, policy={"max_wait": 5, "max_batch_size": 4}, api_key=OWN, audit=policy) as served:
            for batch in range(3):
                await chat(served, [f"{batch} {item}" for item in range(4)], key=key)
            async with asyncio.timeout(PATIENCE):
                await served.batcher.audits.settled()
            rows = served.stats().audit
    payer = f"Bearer {OWN if key == 'microbatch' else key}"
    assert {heard for heard, _ in upstream.heard} == {payer}
    assert len(upstream.heard) == (6 if audited else 3)
    assert [(row.size, row.asked, row.compared) for row in rows] == ([(4, 3, 3)] if audited else [])


async def test_a_client_of_an_open_gateway_that_sends_any_credential_pays_itself():
    async with Watched() as upstream, gateway(upstream, audit=mb.AuditPolicy(rate=1.0)) as served:
        pays = served.batcher.audits.callers_pay
        assert pays({"x-api-key": CLIENTS})
        assert pays({"authorization": f"Bearer {CLIENTS}"})
        assert pays({"openai-organization": "theirs"})
        assert not pays({"openai-beta": "x"})
        assert not pays({})


async def test_a_condemned_size_is_shown_by_stats_and_metrics_of_the_command():
    async with (
        Watched(mistakes=WRONG_TOGETHER, latency=QUICK) as upstream,
        serve(
            *("--upstream", upstream.base_url, "--port", "0", "--audit", "1", "--max-excess", "0.1"),
            *("--idle", "wait", "--max-wait", "5", "--max-batch-size", "4"),
        ) as served,
        aiohttp.ClientSession() as session,
    ):
        address, batch, found = served.base_url.removesuffix("/v1"), 0, []
        async with asyncio.timeout(PATIENCE):
            while not any(row["condemned"] for row in found):
                batch += 1
                await chat(served, [f"{batch} {item}" for item in range(4)], key="microbatch")
                found = (await stats_of(session, address))["audit"]
        (row,) = [row for row in found if row["condemned"]]
        assert (row["size"], row["model"], row["excess"], row["noise"]) == (4, "m", 1.0, 0.0)
        async with session.get(f"{address}/metrics") as response:
            metrics = await response.text()
        assert 'microbatch_audit_condemned{model="m",size="4"} 1.0' in metrics
        assert 'microbatch_audits_total{model="m",outcome="different",size="4"}' in metrics


@pytest.mark.parametrize(
    ("environment", "words", "policy"),
    [
        ({}, [], None),
        ({}, ["--audit"], mb.AuditPolicy()),
        ({}, ["--audit", "0.25", "--max-excess", "0.05"], mb.AuditPolicy(rate=0.25, max_excess=0.05)),
        ({}, ["--audit", "auto", "--audit-own-keys"], mb.AuditPolicy(audit_own_keys=True)),
        ({"AUDIT": "0.5", "MAX_EXCESS": "0.1"}, [], mb.AuditPolicy(rate=0.5, max_excess=0.1)),
        ({"AUDIT": "auto", "AUDIT_OWN_KEYS": "yes"}, [], mb.AuditPolicy(audit_own_keys=True)),
    ],
)
def test_the_flags_of_serve_and_their_variables_make_the_policy(environment, words, policy):
    parser = make_parser().parse_args(["serve"]).parser
    variables = {f"MICROBATCH_{name}": value for name, value in environment.items()}
    args = with_environment(parser, ["--upstream", "http://127.0.0.1:9/v1", *words], variables)
    served = make_gateway(args)
    assert (served.batcher.audits and served.batcher.audits._policy) == policy
