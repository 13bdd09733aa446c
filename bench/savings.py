"""What combining saves, by batch size and length of the shared instructions, on the bundled catalogue.

The endpoint is simulated: it counts tokens as the provider's encoding does and answers with one label. No live model is asked.
Dollars are at the list price of the model named.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from importlib import resources
from typing import Literal

import microbatch as mb
from microbatch.accounting.tokens import load_encoding
from microbatch.testing import SimulatedModel, SimulatedTransport

Label = Literal["electronics", "clothing", "home", "beauty", "sports", "other"]
INSTRUCTIONS = resources.files("microbatch.demo").joinpath("instructions.txt").read_text()
PRODUCTS = [json.loads(line) for line in resources.files("microbatch.demo").joinpath("catalogue.jsonl").open()]


def instructions(tokens: int) -> str:
    encoding = load_encoding("o200k_base")
    ids = encoding.encode_ordinary(INSTRUCTIONS * (1 + tokens // 300))
    return encoding.decode(ids[:tokens])


async def run(system: str, size: int, model: str, *, typed: bool) -> mb.Stats:
    transport = SimulatedTransport(SimulatedModel(count_schema=typed))
    policy = mb.FlushPolicy(max_batch_size=size, max_output_tokens=100_000)
    async with mb.Microbatcher(transport, policy=policy) as batcher:
        options = {"model": model, "output_type": Label if typed else str}
        requests = (
            mb.Request(
                [
                    {"role": "system", "content": system},
                    {"role": "user", "content": f"Product: {row['name']}\nDescription: {row['description']}"},
                ],
                **options,
            )
            for row in PRODUCTS
        )
        async for result in batcher.map(requests):
            result.unwrap()
        return batcher.stats()


async def table(model: str, lengths: list[int], sizes: list[int]) -> None:
    print(f"{len(PRODUCTS)} products, six labels, simulated endpoint, list price of {model}")
    print("instructions  size   calls   prompt tokens   completion tokens   dollars")
    for length in lengths:
        system = instructions(length)
        base = await run(system, 1, model, typed=True)
        for size in sizes:
            stats = await run(system, size, model, typed=True)
            print(
                f"{length:12}  {size:4}  {stats.upstream_calls / base.upstream_calls - 1:+6.0%}  "
                f"{stats.prompt_tokens / base.prompt_tokens - 1:+14.0%}  "
                f"{stats.completion_tokens / base.completion_tokens - 1:+18.0%}  {stats.cost_usd / base.cost_usd - 1:+8.0%}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt-4.1-mini")
    parser.add_argument("--lengths", default="20,100,300,1000")
    parser.add_argument("--sizes", default="4,8,16,32,50")
    options = parser.parse_args()
    numbers = ([int(n) for n in text.split(",")] for text in (options.lengths, options.sizes))
    asyncio.run(table(options.model, *numbers))


if __name__ == "__main__":
    main()
