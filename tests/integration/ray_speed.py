"""Times 2,000 products by `map` in one process, and by two Ray actors with half of the limit each; against the simulated endpoint:

    PYTHONPATH=. python tests/integration/ray_speed.py

Each time is from the first call to the end of the whole job. Work is given to the actors when both have started.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from itertools import cycle, islice
from pathlib import Path

import ray
from ray.data import DataContext

import microbatch as mb
from microbatch.demo import catalogue
from microbatch.ray import Ask
from microbatch.testing import Latency, SimulatedEndpoint

RPM = 600
SYSTEM = "Sort the products of an online shop."
ROWS = [{"text": f"{number}: {product.question}"} for number, product in enumerate(islice(cycle(catalogue()), 2_000))]
MODEL = "gpt-4.1-mini"
ROOT = Path(__file__).parents[2]


class Endpoint(threading.Thread):
    """Serves in a thread; `asked` are the times at which it was asked a question."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ready = threading.Event()
        self.asked: list[float] = []

    def run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        latency = Latency(first_token=0.4, tokens_per_second=100.0)
        async with SimulatedEndpoint(answer=self._answer, latency=latency) as self.server:
            self.ready.set()
            await asyncio.Event().wait()

    def _answer(self, text: str, _: object) -> str:
        self.asked.append(time.monotonic())
        return text.split()[1].upper()

    def seconds(self) -> float:
        """Return the seconds since the first question, and forget all of them."""
        first, self.asked = self.asked[0], []
        return time.monotonic() - first


async def plain() -> int:
    async with mb.Microbatcher(mb.OpenAIChat(MODEL), rate_limit=mb.RateLimit(rpm=RPM)) as batcher:
        messages = ([{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["text"]}] for row in ROWS)
        return len([result async for result in batcher.map(messages) if result.error is None])


def by_ray() -> int:
    names = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "PYTHONPATH")
    environment = {"env_vars": {name: os.environ[name] for name in names}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
    DataContext.get_current().wait_for_min_actors_s = 120
    limit = mb.RateLimit(rpm=RPM, share=0.5)
    rows = ray.data.from_items(ROWS)
    answered = Ask.over(rows, SYSTEM, model=MODEL, concurrency=2, rate_limit=limit).materialize()
    return len([row for row in answered.take_all() if row["error"] is None])


def main() -> None:
    endpoint = Endpoint()
    endpoint.start()
    endpoint.ready.wait()
    os.environ |= {"OPENAI_API_KEY": "test", "OPENAI_BASE_URL": endpoint.server.base_url, "PYTHONPATH": str(ROOT)}
    times = []
    for name, rows in (("map", lambda: asyncio.run(plain())), ("Ray", by_ray)):
        answered, calls = rows(), endpoint.server.calls
        times.append(endpoint.seconds())
        print(f"{name}: {answered:,} of {len(ROWS):,} rows answered in {times[-1]:.1f} s; {calls} calls so far")  # noqa: T201
    print(f"Ray takes {times[1] / times[0]:.2f} times the time of map")  # noqa: T201


if __name__ == "__main__":
    main()
