"""A shop's questions through cache, single flight, priorities and batches, against one call each under the same quota.

20,000 questions about products, drawn by Zipf's law (s = 1), come one by one at a steady pace: a tenth of high priority (somebody
looks at a page), most of normal, and a third of low (nightly work). The cache is empty at first. All on virtual time, against the
simulated model: tokens and dollars are counted as an endpoint counts them, latency and quota are those the table names.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import platform
import random
import statistics
import sys
from pathlib import Path
from typing import Literal

import msgspec

import microbatch as mb
from microbatch.demo import LABELS, catalogue, instructions
from microbatch.testing import Latency, Quota, SimulatedModel, SimulatedTransport, VirtualClockLoop

MODEL = "gpt-4.1-mini"
RPM, TPM = 1_000, 200_000
LATENCY = Latency(first_token=0.5, tokens_per_second=80.0)
SHARES = {"high": 0.1, "normal": 0.6, "low": 0.3}
SEED = 1


class Product(msgspec.Struct):
    name: str
    description: str
    label: str

    @property
    def question(self) -> str:
        return f"Product: {self.name}\nDescription: {self.description}"


def products_of(path: str | None):
    if path is None:
        return [(product.question, product.label) for product in catalogue()]
    decode = msgspec.json.Decoder(Product).decode
    found = [decode(line) for line in Path(path).read_bytes().splitlines()]
    return [(product.question, product.label) for product in found]


def stream(questions, count):
    """Draw *count* pairs of question and priority."""
    draw = random.Random(SEED)
    ranked = draw.sample(questions, len(questions))
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(ranked) + 1)))
    asked = draw.choices(ranked, cum_weights=weights, k=count)
    return list(zip(asked, draw.choices(list(SHARES), list(SHARES.values()), k=count), strict=True))


async def play(asks, labels, per_second, *, hybrid):
    """Let *asks* come at *per_second*; return the figures and what each priority waited, in all and over misses."""
    loop = asyncio.get_running_loop()
    model = SimulatedModel(answer=lambda text, _: labels[text], quota=Quota(rpm=RPM, tpm=TPM), latency=LATENCY)
    policy = mb.FlushPolicy(max_queued=10**6) if hybrid else mb.FlushPolicy(max_batch_size=1, max_queued=10**6)
    batcher = mb.Microbatcher(
        SimulatedTransport(model),
        policy=policy,
        rate_limit=mb.RateLimit(rpm=RPM, tpm=TPM),
        cache=mb.MemoryCache() if hybrid else None,
    )
    waits = {priority: [] for priority in SHARES}
    system = {"role": "system", "content": instructions()}

    async def ask(text, priority):
        reply = await batcher.submit(
            [system, {"role": "user", "content": text}],
            output_type=Literal[LABELS],
            model=MODEL,
            priority=priority if hybrid else "normal",
        )
        assert reply.output == labels[text]
        waits[priority].append((reply.latency, reply.route in ("cache", "shared")))

    async with batcher:
        tasks = []
        for number, (text, priority) in enumerate(asks):
            await asyncio.sleep(number / per_second - loop.time())
            tasks.append(loop.create_task(ask(text, priority)))
        for task in tasks:
            await task
        return batcher.stats(), waits, loop.time()


def percentile(values, share):
    return statistics.quantiles(values, n=1000, method="inclusive")[round(share * 1000) - 1] if len(values) > 1 else 0.0


def show(name, stats, waits, took) -> None:
    tokens = stats.prompt_tokens + stats.completion_tokens
    print(f"\n{name}: {took / 60:.0f} virtual minutes, {stats.rate_limited} refused with 429")
    print(
        f"  {stats.upstream_calls:,} calls, {tokens:,} tokens, ${stats.cost_usd:.4f}; hit rate {stats.cache_hit_rate:.1%}, "
        f"{stats.cache_hits:,} from the cache, {stats.shared:,} shared, {stats.batch_size_mean:.1f} items a batch"
    )
    print(f"  {'':8}{'items':>8}{'p50 s':>9}{'p99 s':>9}   {'misses':>8}{'p50 s':>9}{'p99 s':>9}")
    for priority, pairs in waits.items():
        every, missed = [wait for wait, _ in pairs], [wait for wait, hit in pairs if not hit]
        cells = "".join(f"{percentile(every, share):9.3f}" for share in (0.5, 0.99))
        over = "".join(f"{percentile(missed, share):9.3f}" for share in (0.5, 0.99))
        print(f"  {priority:8}{len(every):>8,}{cells}   {len(missed):>8,}{over}")


def run(asks, labels, per_second, *, hybrid):
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(play(asks, labels, per_second, hybrid=hybrid))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", help="JSON Lines with name, description and label (default: the bundled catalogue)")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--per-second", type=float, nargs="*", default=[5.0, 20.0], help="questions a second")
    options = parser.parse_args()
    questions = products_of(options.input)
    labels = dict(questions)
    asks = stream([text for text, _ in questions], options.count)
    print(
        f"python {platform.python_version()}, seed {SEED}; {options.count:,} questions about {len(questions):,} products, "
        f"SIMULATED endpoint: {LATENCY.first_token} s to the first token, {LATENCY.tokens_per_second:g} tokens/s, "
        f"{RPM:,} requests and {TPM:,} tokens a minute; prices of {MODEL}"
    )
    for per_second in options.per_second:
        print(f"\n=== {per_second:g} questions a second")
        alone, ours = (run(asks, labels, per_second, hybrid=hybrid) for hybrid in (False, True))
        show("one call each", *alone)
        show("cache, single flight, priorities, batches", *ours)
        before, now = alone[0], ours[0]
        missed = [[wait for wait, hit in waits["high"] if not hit] for _, waits, _ in (alone, ours)]
        print(
            f"\n  calls {now.upstream_calls / before.upstream_calls - 1:+.1%}, dollars {now.cost_usd / before.cost_usd - 1:+.1%}; "
            f"p99 of high priority over misses {percentile(missed[1], 0.99):.3f} s against {percentile(missed[0], 0.99):.3f} s"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
