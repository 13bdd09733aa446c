"""How much of a quota is used without ever being refused: six virtual minutes against an endpoint that enforces it.

    python bench/quota.py

The endpoint counts requests and tokens in any 60 seconds, the strictest reading there is, and tells what is left in its headers.
Shares are of the binding limit, between the end of the first minute and that of the fifth.
"""

from __future__ import annotations

import asyncio
import platform
import random
import sys

import microbatch as mb
from microbatch.testing import Latency, Quota, SimulatedModel, SimulatedTransport, VirtualClockLoop

RPM, TPM, MINUTES = 1_000, 200_000, 6
WORDS = [
    "a",
    "product",
    "name",
    "with",
    "some",
    "words",
    "of",
    "a",
    "description",
    "that",
    "vary",
    "a",
    "good",
    "deal",
    "in",
    "length",
]
LONG = "You sort the products of an online shop. Read the name and the description. " * 12


async def load(*, singles: bool, max_tokens: int | None, charge: str) -> None:
    loop, draw = asyncio.get_running_loop(), random.Random(1)
    model = SimulatedModel(quota=Quota(rpm=RPM, tpm=TPM), latency=Latency(first_token=0.5, tokens_per_second=80))
    size, slots, most = (1, 256, 3) if singles else (16, 64, 80)
    policy = mb.FlushPolicy(max_batch_size=size, max_concurrent_batches=slots, max_output_tokens=8_000)

    def requests():
        while loop.time() < 60 * MINUTES:
            text = " ".join(draw.choices(WORDS, k=draw.randint(2, most)))
            system = {"role": "system", "content": "Sort." if singles else LONG}
            yield mb.Request([system, {"role": "user", "content": text}], max_tokens=max_tokens)

    limit = mb.RateLimit(rpm=RPM, tpm=TPM, charge=charge)
    # The start of each whole minute: what the endpoint has let in, in requests, and charged, in tokens.
    marks = []
    async with mb.Microbatcher(SimulatedTransport(model), policy=policy, rate_limit=limit) as batcher:
        async for result in batcher.map(requests()):
            result.unwrap()
            if loop.time() >= 60 * (len(marks) + 1):
                stats = batcher.stats()
                marks.append((loop.time(), stats.upstream_calls, stats.prompt_tokens + stats.completion_tokens))
        refused = batcher.stats().rate_limited
    (start, *before), (end, *after) = marks[0], marks[MINUTES - 2]
    per_minute = [(later - earlier) / (end - start) * 60 for earlier, later in zip(before, after, strict=True)]
    name = f"{'one by one' if singles else 'combined'}, max_tokens={max_tokens}, charge={charge}"
    print(
        f"{name:46} {per_minute[0]:6.0f} requests ({per_minute[0] / RPM:4.0%}) {per_minute[1]:8.0f} tokens used "
        f"({per_minute[1] / TPM:4.0%}) a minute; 429s: {refused}; most in any minute: {model.peak_requests} requests, "
        f"{model.peak_tokens} tokens charged ({model.peak_tokens / TPM:.1%})"
    )


def main() -> None:
    print(
        f"python {platform.python_version()}; {RPM} requests and {TPM} tokens a minute, {MINUTES} virtual minutes each"
    )
    for singles, max_tokens, charge in (
        (True, None, "reserved"),
        (False, None, "reserved"),
        (False, None, "used"),
        (False, 200, "reserved"),
    ):
        with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
            runner.run(load(singles=singles, max_tokens=max_tokens, charge=charge))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
