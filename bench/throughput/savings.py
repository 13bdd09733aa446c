"""The saving by length of the shared instructions and by batch size, and the tokens that combining adds to a call and to an item."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from typing import TYPE_CHECKING, Any

import microbatch as mb
from bench.questions import Label
from bench.report import Table
from bench.throughput.scene import MODEL, NO_LIMIT, PRICE, SIZE, SIZES, TOKENS, labels_of, messages, questions
from microbatch.testing import SimulatedModel, SimulatedTransport
from microbatch.testing.counting import compact, text_tokens

if TYPE_CHECKING:
    import argparse

    from bench.report import Run

LENGTHS = (20, 100, 300, 1_000)
COUNTED = 800
"""Items of the calls whose parts are counted, drawn apart from those of the runs."""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    logging.getLogger("microbatch").setLevel(logging.ERROR)  # the tables say where combining costs more
    return asyncio.run(_measure(options))


async def _measure(options: argparse.Namespace) -> dict[str, Any]:
    labels = labels_of(options.input)
    asked = questions(options.input, options.items, options.seed)
    counted = random.Random(options.seed + 1).choices(list(labels), k=COUNTED)
    points = []
    for length in LENGTHS:
        for size in (1, *SIZES):
            _, stats = await answered(asked, labels, size, length)
            points.append(
                {
                    "instructions": length,
                    "size": size,
                    "calls": stats.upstream_calls,
                    "prompt": stats.prompt_tokens,
                    "completion": stats.completion_tokens,
                    "dollars": stats.cost_usd,
                    "costs_more": stats.costs_more,
                }
            )
    return {"framing": await count_framing(counted, labels), "savings": points}


async def answered(
    texts: list[str], labels: dict[str, str], size: int, tokens: int, *, record: bool = False
) -> tuple[SimulatedModel, mb.Stats]:
    """Have *texts* answered in calls of *size* items; return the endpoint's model and the stats."""
    model = SimulatedModel(answer=lambda text, _: labels[text], record=record)
    policy = mb.FlushPolicy(max_batch_size=size, max_output_tokens=NO_LIMIT)
    async with mb.Microbatcher(SimulatedTransport(model), policy=policy) as batcher:
        requests = (mb.Request(messages(text, tokens), model=MODEL, output_type=Label) for text in texts)
        async for result in batcher.map(requests):
            assert result.unwrap().output == labels[texts[result.index]], "a wrong answer"
        return model, batcher.stats()


async def count_framing(texts: list[str], labels: dict[str, str]) -> dict[str, float]:
    """Return what combining adds, in tokens, counted on the parts of the calls that *texts* make, one by one and combined.

    Returns:
        `wrapper`: of a combined call, beside what a single call has; `line`: around an item's text in the prompt; `element`: of an
        answer in a combined reply, beside a single reply.
    """
    alone, _ = await answered(texts, labels, 1, TOKENS, record=True)
    together, _ = await answered(texts, labels, SIZE, TOKENS, record=True)
    schema, larger = (_schema_tokens(model.requests[0]) for model in (alone, together))
    prompts = [body["messages"][-1]["content"].partition("\n") for body in together.requests]
    lines = sum(text_tokens(lines) for _, _, lines in prompts)
    answer = sum(map(text_tokens, alone.replies)) / len(texts)
    return {
        "wrapper": sum(text_tokens(before + end) for before, end, _ in prompts) / len(prompts) + larger - schema,
        "line": (lines - sum(map(text_tokens, texts))) / len(texts),
        "element": sum(map(_elements_tokens, together.replies)) / len(texts) - answer,
    }


def _schema_tokens(body: dict[str, Any]) -> int:
    return text_tokens(compact(body["response_format"]["json_schema"]["schema"]))


def _elements_tokens(text: str) -> float:
    """Return the tokens of the elements of a combined reply.

    Tokens reach over the ends of elements, so an element is what it adds: the second half of them to a reply with the first half.
    """
    elements = json.loads(text)["results"]
    half = len(elements) // 2
    added = text_tokens(text) - text_tokens(compact({"results": elements[:half]}))
    return added / (len(elements) - half) * len(elements)


def tables(run: Run) -> dict[str, Table]:
    return {"framing": framing_table(run), "savings": savings_table(run)}


def framing_table(run: Run) -> Table:
    table = Table(
        f"What combining adds, in tokens, counted on the parts of real calls to the SIMULATED endpoint ({COUNTED} items, by {SIZE} and alone)",
        "part | tokens {:.1f}",
    )
    framing = run.samples["framing"]
    table.add("wrapper of a combined call, its larger schema included", framing["wrapper"])
    table.add("around an item's text in the prompt", framing["line"])
    table.add("an answer in a combined reply, above a single reply", framing["element"])
    return table


def savings_table(run: Run) -> Table:
    count = run.options["items"]
    table = Table(
        f"What combining saves: SIMULATED endpoint, {count:,} products, labels, prices of {MODEL} (${PRICE.input:.2f} and "
        f"${PRICE.output:.2f} for a million tokens in and out)",
        "instructions | batch size | calls, change {:+.1%} | prompt tokens an item {:.1f} | reply tokens an item {:.2f}"
        " | tokens, change {:+.1%} | dollars, change {:+.1%} | dollars for 1,000 items {:.4f}",
        "List prices, without a discount for a prompt's cached beginning.",
    )
    base: dict[str, Any] = {}
    for one in run.samples["savings"]:
        base = one if one["size"] == 1 else base
        tokens, alone = (each["prompt"] + each["completion"] for each in (one, base))
        changes = [one["calls"] / base["calls"] - 1, tokens / alone - 1, one["dollars"] / base["dollars"] - 1]
        calls, saved, dollars = [None] * 3 if one is base else changes
        table.add(
            f"{one['instructions']:,} tokens",
            "one call each" if one is base else f"{one['size']}",
            calls,
            one["prompt"] / count,
            one["completion"] / count,
            saved,
            dollars,
            one["dollars"] / count * 1000,
        )
    return table


def findings(run: Run, tables: dict[str, Table]) -> list[str]:
    rows = tables["savings"].by("instructions", "batch size")
    gains = [f"{-row['dollars, change']:.0%} at {length}" for (length, size), row in rows.items() if size == str(SIZE)]
    dearer = {key: row["dollars, change"] for key, row in rows.items() if (row["dollars, change"] or 0) > 0}
    costs = ", ".join(f"{length} by {size} ({change:+.1%})" for (length, size), change in dearer.items())
    said = {
        (f"{one['instructions']:,} tokens", str(one["size"])) for one in run.samples["savings"] if one["costs_more"]
    }
    return [
        f"Dollars saved by {SIZE} items a call, by length of the shared instructions: {', '.join(gains)}.",
        f"Combining costs more, of what was measured: {costs or 'nowhere'}. stats().costs_more says so "
        f"{'in these cases and no others' if said == set(dearer) else 'NOT in all of these cases, or in others'}.",
    ]
