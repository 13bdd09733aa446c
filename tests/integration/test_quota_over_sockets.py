"""A declared limit keeps a real endpoint with that quota from ever having to refuse."""

from __future__ import annotations

import asyncio

import pytest
from helpers import TRIES, ask

import microbatch as mb
from microbatch.testing import Quota, SimulatedEndpoint

pytestmark = pytest.mark.slow


@pytest.mark.promise(of="limits")
@pytest.mark.parametrize("what", ["requests", "tokens"])
async def test_over_sockets_a_declared_limit_is_kept_and_used(what):
    """Some seconds of real time: the burst of 2 %, and then as many as the minute's rate allows."""
    for _ in range(TRIES):
        if await kept_and_used(what):
            return
    pytest.fail("far slower than the limit")


async def kept_and_used(what):
    """Whether it was nearly as fast as the limit, and fail if it was faster. A loaded machine is slow now and then."""
    rpm, tpm = (1_200, 10**6) if what == "requests" else (10**5, 60_000)
    loop = asyncio.get_running_loop()
    async with SimulatedEndpoint(quota=Quota(rpm=rpm, tpm=tpm)) as endpoint:
        transport = mb.OpenAIChat("m", base_url=endpoint.base_url, api_key="any")
        async with mb.Microbatcher(
            transport, policy=mb.FlushPolicy(max_batch_size=1), rate_limit=mb.RateLimit(rpm=rpm, tpm=tpm)
        ) as batcher:
            start = loop.time()
            count = 64 if what == "requests" else 60
            await asyncio.gather(*(batcher.submit(ask(f"{number}"), max_tokens=50) for number in range(count)))
            took = loop.time() - start
            stats = batcher.stats()
    assert endpoint.quota_refusals == stats.rate_limited == 0
    used, limit = (count, rpm) if what == "requests" else (endpoint.peak_tokens, tpm)
    burst = 0.02 * limit
    assert used - burst <= limit * took / 60, "faster than the limit"
    return used - burst >= 0.9 * limit * took / 60
