"""Workers that use a provider's batch API, killed at random: every request is answered, and none is paid twice."""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections import Counter

import pytest

from microbatch.spool.payload import Answer, Payload
from microbatch.spool.records import Name
from microbatch.spool.redis import RedisSpool
from microbatch.spool.sqlite import SQLiteSpool
from microbatch.testing import SimulatedEndpoint

pytestmark = pytest.mark.slow


ROUNDS = 3
PORTION = 30
PATIENCE = 60
LEASE = "2"  # seconds; a worker that a loaded machine stops for longer would be taken for a dead one


def question(number: int) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Shout."}, {"role": "user", "content": f"thing number {number}"}]


async def worker(place: str, base_url: str, *more: str) -> asyncio.subprocess.Process:
    words = [
        "worker",
        place,
        "--provider-batch",
        "--base-url",
        base_url,
        "--model",
        "m",
        "--poll",
        "0.05",
        "--lease",
        LEASE,
    ]
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "microbatch", *words, *more),
        env={**os.environ, "OPENAI_API_KEY": "test"},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize("backend", ["sqlite", "redis"])
async def test_whoever_is_killed_every_request_has_its_right_answer_and_none_is_paid_twice(backend, tmp_path, request):
    place = str(tmp_path / "spool.sqlite") if backend == "sqlite" else request.getfixturevalue("redis_url")
    draw = random.Random(7)
    spool = SQLiteSpool(place) if backend == "sqlite" else RedisSpool(place)
    await spool.open()
    names = [Name(None, str(number)) for number in range(ROUNDS * PORTION)]
    async with SimulatedEndpoint(answer=lambda text, schema: text.upper(), batch_seconds=0.3) as endpoint:
        killed = 0
        for start in range(0, len(names), PORTION):
            portion = names[start : start + PORTION]
            await spool.put([Payload.of(question(int(name.id))).item(name) for name in portion])
            running = [await worker(place, endpoint.base_url) for _ in range(2)]
            made = endpoint.batches_created
            async with asyncio.timeout(PATIENCE):
                # Some are killed before they have made anything.
                while endpoint.batches_created == made and draw.random() > 0.003:  # noqa: ASYNC110 it tells nobody
                    await asyncio.sleep(0.005)
            await asyncio.sleep(draw.random() * 0.4)
            for process in running:
                if process.returncode is None:
                    process.kill()
                    killed += 1
                await process.communicate()
        last = await worker(place, endpoint.base_url, "--until-empty")
        async with asyncio.timeout(PATIENCE):
            _, complaints = await last.communicate()
        assert last.returncode == 0, complaints.decode()
        assert killed > ROUNDS
        assert endpoint.items == len(names)
        assert endpoint.calls == 0
    found = await spool.find(names)
    assert Counter(each.state for each in found) == {"done": len(names)}
    for name, each in zip(names, found, strict=True):
        assert Answer.decode(each.result or b"").text == f"THING NUMBER {name.id}"
    await spool.aclose()
