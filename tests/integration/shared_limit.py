"""Processes that come, go and are killed share one limit, against an endpoint that enforces it. In real time, over sockets:

    PYTHONPATH=. python tests/integration/shared_limit.py --minutes 6 --processes 8 --load requests --outage 20

The endpoint counts requests and tokens in any 60 seconds, the strictest reading there is; what it refuses counts as a request. Every
minute a process is killed, another ends, and two others start. Printed are the 429s, the fullest minute, and what was used of the limit
from the end of the first minute on, in which any client may use up what was unused before.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from redis_server import RedisServer

import microbatch as mb
from microbatch.testing import Latency, Quota, SimulatedEndpoint

RPM, TPM = 1_000, 200_000
LOADS = {"requests": (1, 16), "tokens": (8, 200), "large": (16, 280)}  # items in a call, and max_tokens of each
SYSTEM = "Answer with the word that is asked for. "


class Endpoint(SimulatedEndpoint):
    """Keeps the time, and the tokens, of what it let in."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.let_in: list[tuple[float, int]] = []

    def charge(self, body: Any, key: str, tokens: int = 0) -> Any:
        limits = super().charge(body, key, tokens)
        self.let_in.append((asyncio.get_running_loop().time(), tokens))
        return limits

    def used(self, begin: float, end: float) -> tuple[int, int]:
        """Return requests and tokens that were let in between two times."""
        tokens = [amount for at, amount in self.let_in if begin <= at < end]
        return len(tokens), sum(tokens)


async def client(base_url: str, store: str, rpm: int, tpm: int, load: str) -> None:
    """Ask for ever, or until told to end, as fast as the limit allows."""
    size, max_tokens = LOADS[load]
    transport = mb.OpenAIChat("gpt-4.1-mini", base_url=base_url, api_key="shared")
    batcher = mb.Microbatcher(
        transport,
        policy=mb.FlushPolicy(max_batch_size=size, max_wait=0.02, max_concurrent_batches=64),
        rate_limit=mb.RateLimit(rpm=rpm, tpm=tpm, store=store),
    )
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    numbers = itertools.count()

    async def ask() -> None:
        while True:
            question = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"word {next(numbers)}"}]
            with contextlib.suppress(mb.RequestFailed):
                await batcher.submit(question, max_tokens=max_tokens)

    async with batcher:
        asking = [asyncio.ensure_future(ask()) for _ in range(16 * size)]
        await ended.wait()
        for task in asking:
            task.cancel()


class Fleet:
    """The processes, each with the arguments of `client`."""

    def __init__(self, *words: object) -> None:
        self._words = [sys.executable, __file__, "--client", *map(str, words)]
        self.running: list[asyncio.subprocess.Process] = []

    async def start(self, number: int = 1) -> None:
        for _ in range(number):
            self.running.append(await asyncio.create_subprocess_exec(*self._words))

    async def end(self, how: signal.Signals) -> None:
        process = self.running.pop(0)
        process.send_signal(how)
        await process.wait()

    async def end_all(self) -> None:
        for process in self.running:
            process.kill()
        for process in self.running:
            await process.wait()


async def play(args: argparse.Namespace) -> dict[str, Any]:
    """Run the fleet; return the figures."""
    loop = asyncio.get_running_loop()
    latency = Latency(first_token=0.3, tokens_per_second=200.0)
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder), port=args.redis_port) as redis:
        async with Endpoint(quota=Quota(rpm=RPM, tpm=TPM), latency=latency) as endpoint:
            fleet = Fleet(endpoint.base_url, redis.url, RPM, TPM, args.load)
            begin = loop.time()
            try:
                await fleet.start(args.processes)
                rows = []
                turn = 20.0
                for number in range(1, round(args.minutes * 3) + 1):
                    if number % 3 == 0 and not args.calm:
                        await fleet.end(signal.SIGKILL)
                        await fleet.end(signal.SIGTERM)
                        await fleet.start(2)
                    if number == args.outage_at and args.outage:
                        redis.kill() if args.lose else redis.pause()
                    elif number == args.outage_at + -(-args.outage // 20) and args.outage:
                        redis.start() if args.lose else redis.resume()
                    await asyncio.sleep(begin + turn * number - loop.time())
                    row = endpoint.used(loop.time() - turn, loop.time())
                    rows.append(row)
                    share = max(row[0] / RPM, row[1] / TPM) * 60 / turn
                    used = f"{row[0]:5} requests, {row[1]:7} tokens, {share:6.1%}, 429s {endpoint.quota_refusals}"
                    print(f"{number * turn:5.0f} s: {used}", flush=True)  # noqa: T201
            finally:
                await fleet.end_all()
            steady = [sum(column) for column in zip(*rows[3:], strict=True)]
            minutes = len(rows[3:]) / 3
            return {
                "429s": endpoint.quota_refusals,
                "peak": (endpoint.peak_requests / RPM, endpoint.peak_tokens / TPM),
                "used": max(steady[0] / RPM, steady[1] / TPM) / minutes,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--client", nargs=5)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--load", choices=LOADS, default="requests")
    parser.add_argument("--outage", type=int, default=0, help="seconds for which the server hangs, a multiple of 20")
    parser.add_argument("--outage-at", type=int, default=7, help="after so many turns of 20 seconds")
    parser.add_argument("--lose", action="store_true", help="end the server instead, which loses its data")
    parser.add_argument("--calm", action="store_true", help="no process comes or goes")
    parser.add_argument("--redis-port", type=int, default=None)
    args = parser.parse_args()
    if args.client:
        base_url, store, rpm, tpm, load = args.client
        asyncio.run(client(base_url, store, int(rpm), int(tpm), load))
    else:
        print(asyncio.run(play(args)))  # noqa: T201


if __name__ == "__main__":
    main()
