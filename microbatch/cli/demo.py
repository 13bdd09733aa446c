"""`microbatch demo`: see what batching saves, on a simulated endpoint.

Sort the products of a bundled catalogue into departments, first one call each
and then in combined prompts, and compare. The endpoint is simulated and runs
within this process: no key, no network, nothing to pay.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from microbatch.cli.console import OK, SOME_FAILED, STOPPED, change, dollars, plural, print_result, seconds, table
from microbatch.cli.stopping import stoppable
from microbatch.client import Microbatcher
from microbatch.demo import LABELS, catalogue, instructions
from microbatch.messages import Request
from microbatch.policy import FlushPolicy
from microbatch.testing.endpoint import SimulatedEndpoint
from microbatch.testing.pace import Latency
from microbatch.transports.openai_chat import OpenAIChat

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from microbatch.accounting.stats import Stats
    from microbatch.demo import Product

MODEL = "gpt-4.1-mini"
MAX_CALLS = 32
BATCH_SIZE = 16
LATENCY = Latency(first_token=0.5, tokens_per_second=80.0)
SHOWN = 6
_NAME_WIDTH = 52


class Trial(msgspec.Struct):
    """The outcome of asking about the whole catalogue in one way; *labels* are the answers by product id."""

    labels: dict[str, str]
    stats: Stats
    wall_s: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `demo`: there are none."""


def run(args: argparse.Namespace) -> int:  # noqa: ARG001 every command takes them
    """Ask both ways, print the comparison and return the exit status."""
    return asyncio.run(_demo(catalogue()))


async def _demo(products: Sequence[Product]) -> int:
    print_result(f"""\
A shop sorts {len(products)} products into {len(LABELS)} departments. Each question needs the
same instructions; one call each sends them again every time, a combined
prompt sends them once for {BATCH_SIZE} products.

The endpoint is SIMULATED, in this process, over real HTTP: it needs
{LATENCY.first_token} s to the first token and then makes {LATENCY.tokens_per_second:g} tokens a second.
""")
    labels = {product.question: product.label for product in products}

    def look_up(text: str, _schema: dict[str, Any] | None) -> str:
        return labels[text]

    with stoppable():
        async with SimulatedEndpoint(answer=look_up, latency=LATENCY) as endpoint:
            print_result("one call each ...")
            single = await _ask(endpoint, products, 1)
            print_result("in batches ...")
            batched = await _ask(endpoint, products, BATCH_SIZE)
        print_result(f"\n{_sample(products, batched)}\n\n{_comparison(products, single, batched)}")
        return OK if len(single.labels) == len(batched.labels) == len(products) else SOME_FAILED
    return STOPPED


async def _ask(endpoint: SimulatedEndpoint, products: Sequence[Product], batch_size: int) -> Trial:
    loop = asyncio.get_running_loop()
    transport = OpenAIChat(MODEL, base_url=endpoint.base_url, api_key="simulated")
    policy = FlushPolicy(max_batch_size=batch_size, max_concurrent_batches=MAX_CALLS)
    system = {"role": "system", "content": instructions()}
    label: Any = Literal[LABELS]
    questions = [
        Request([system, {"role": "user", "content": product.question}], id=product.id, output_type=label)
        for product in products
    ]
    labels: dict[str, str] = {}
    async with Microbatcher(transport, policy=policy) as batcher:
        start = loop.time()
        async for result in batcher.map(questions):
            if result.reply is not None:
                labels[result.id or ""] = result.reply.output
        wall_s = loop.time() - start
    stats = batcher.stats()
    print_result(f"  {plural(stats.upstream_calls, 'call')}, {seconds(wall_s)}")
    return Trial(labels, stats, wall_s)


def _sample(products: Sequence[Product], trial: Trial) -> str:
    lines = []
    for product in products[:: max(1, len(products) // SHOWN)][:SHOWN]:
        name = product.name if len(product.name) <= _NAME_WIDTH else product.name[: _NAME_WIDTH - 3] + "..."
        lines.append(f"  {name.ljust(_NAME_WIDTH)}  -> {trial.labels.get(product.id, 'no answer')}")
    return "\n".join(lines)


def _comparison(products: Sequence[Product], single: Trial, batched: Trial) -> str:
    alone, shared = single.stats, batched.stats
    counts = {
        "calls": (alone.upstream_calls, shared.upstream_calls),
        "prompt tokens": (alone.prompt_tokens, shared.prompt_tokens),
        "completion tokens": (alone.completion_tokens, shared.completion_tokens),
    }
    rows = [(name, f"{before:,}", f"{now:,}", change(now, before)) for name, (before, now) in counts.items()]
    before, now = alone.cost_usd, shared.cost_usd
    rows.append((f"cost at {MODEL}", dollars(before), dollars(now), change(now, before)))
    before, now = single.wall_s, batched.wall_s
    rows.append(("wall time", f"{before:.1f} s", f"{now:.1f} s", change(now, before)))
    agreeing = sum(single.labels.get(product.id) == batched.labels.get(product.id) != None for product in products)  # noqa: E711
    return f"""\
{table(("", "one call each", "batched", "change"), rows)}

{agreeing} of {len(products)} products got the same answer both ways.

Measured: the calls, and the tokens of the prompts and replies that went over
the wire, counted with OpenAI's o200k_base tokenizer. Dollars are those tokens
at the list price of {MODEL}; nothing was paid.
From the simulation: the answers, which are looked up in the catalogue and say
nothing about how well a model does; and the time, which follows from the pace
above with at most {MAX_CALLS} calls at once, both ways. Batched, it is the time of two
calls in a row: the first on trial, until a reply shows that the model keeps to
the format; then all others at once. A longer job pays for the first only once.
With more calls at once, one call each is the faster way, as long as the
provider's rate limits allow it."""
