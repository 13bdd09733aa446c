"""Kills workers with SIGKILL at random while they drain a spool, and looks whether every request has its one right answer.

As a program: `python tests/integration/kill_loop.py --rounds 20 --items 2000`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import random
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from redis_server import RedisServer

import microbatch as mb
from microbatch.demo import catalogue
from microbatch.spool.records import Name
from microbatch.testing import Latency, SimulatedEndpoint

LEASE = 2.0  # a worker that a loaded machine stops for longer would be taken for a dead one
LATENCY = Latency(
    first_token=0.01, tokens_per_second=800.0
)  # so that full batches take their time, and suspects do not hold up the test
PRODUCTS = catalogue()
SYSTEM = {"role": "system", "content": "You sort the products of an online shop."}


@dataclass
class CallOutcome:
    """What a kill loop came to.

    Attributes:
        killed: Workers killed.
        in_work: Those of them that had calls under way.
        wrong: Ids whose answer is missing or not theirs.
        counts: The spool in the end.
        asked: Requests that the endpoint was asked, those asked again included.
    """

    killed: int
    in_work: int
    wrong: list[str]
    counts: object
    asked: int


def question(number: int) -> str:
    return f"{number}: {PRODUCTS[number % len(PRODUCTS)].question}"


def right(text: str, _schema: object) -> str:
    """An answer that no other question has."""
    return f"answer to {text[:60]}"


async def put(place: str, items: int) -> None:
    async with mb.Microbatcher(mb.OpenAIChat("m", base_url="http://127.0.0.1:9"), spool=spool_at(place)) as batcher:

        async def one(number: int) -> None:
            name = await batcher.enqueue([SYSTEM, {"role": "user", "content": question(number)}], id=str(number))
            assert name == str(number)

        for start in range(0, items, 500):
            await asyncio.gather(*(one(number) for number in range(start, min(items, start + 500))))


def spool_at(place: str):
    return mb.RedisSpool(place) if place.startswith("redis") else mb.SQLiteSpool(place)


async def start_worker(place: str, base_url: str, *more: str) -> asyncio.subprocess.Process:
    words = ["worker", place, "--base-url", base_url, "--lease", str(LEASE), "--low-max-wait", "0.05"]
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "microbatch", *words, "--max-concurrent-batches", "4", *more),
        env={**os.environ, "OPENAI_API_KEY": "test"},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )


async def kill_loop(place: str, *, items: int, rounds: int, workers: int = 2, seed: int = 1) -> CallOutcome:
    """Spool *items*, kill *workers* in each of *rounds*, let the rest be answered, and look."""
    draw = random.Random(seed)
    killed = in_work = 0
    await put(place, items)
    async with SimulatedEndpoint(answer=right, latency=LATENCY) as endpoint:
        for _ in range(rounds):
            before = endpoint.calls
            running = [await start_worker(place, endpoint.base_url) for _ in range(workers)]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(10):
                    while endpoint.calls < before + workers:  # noqa: ASYNC110 it tells nobody
                        await asyncio.sleep(0.01)
            in_work += workers if endpoint.calls >= before + workers else 0
            await asyncio.sleep(draw.random() * 0.6)
            for process in running:
                if process.returncode is None:
                    process.send_signal(signal.SIGKILL)
                    killed += 1
                await process.communicate()
        last = [await start_worker(place, endpoint.base_url, "--until-empty") for _ in range(workers)]
        for process in last:
            _, complaints = await process.communicate()
            assert process.returncode == 0, complaints.decode()
        asked = endpoint.items
    return await look(place, items, killed, in_work, asked)


async def look(place: str, items: int, killed: int, in_work: int, asked: int) -> CallOutcome:
    spool = spool_at(place)
    await spool.open()
    try:
        names = [Name(None, str(number)) for number in range(items)]
        wrong = []
        async with mb.Microbatcher(mb.OpenAIChat("m", base_url="http://127.0.0.1:9"), spool=spool_at(place)) as batcher:
            for name in names:
                try:
                    reply = await batcher.result(name.id, timeout=0)
                    if reply.output != right(question(int(name.id)), None):
                        wrong.append(name.id)
                except mb.MicrobatchError as error:
                    wrong.append(f"{name.id}: {error}")
        return CallOutcome(killed, in_work, wrong, await spool.counts(), asked)
    finally:
        await spool.aclose()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--items", type=int, default=2_000)
    options = parser.parse_args()
    logging.getLogger("microbatch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder), appendonly=True) as server:
        for place in (f"{folder}/spool.sqlite", server.url):
            outcome = await kill_loop(place, items=options.items, rounds=options.rounds)
            print(f"{place.partition(':')[0].rpartition('/')[2]}: {outcome}")  # noqa: T201 as a program it prints
            assert not outcome.wrong


if __name__ == "__main__":
    asyncio.run(main())
