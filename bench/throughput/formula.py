"""What combining saves by length of the shared instructions and by batch size, beside what a formula foretells."""

from __future__ import annotations

import asyncio
import logging
import random
import statistics
from typing import TYPE_CHECKING, Any

from bench.report import Column, Table
from bench.throughput.framing import Framing, answered, break_even, count_framing, foretell
from bench.throughput.scene import MODEL, PRICE, RATIO, SIZE, SIZES, TOKENS, labels_of, questions
from microbatch.testing.counting import text_tokens

if TYPE_CHECKING:
    from bench.report import Report

LENGTHS = (20, 100, 300, 1_000)
COUNT, COUNT_QUICK = 4_000, 800
"""Items of a run: multiples of 800, so that batches of every size are full."""

COUNTED = 800
"""Items of the calls whose parts are counted, drawn apart from those of the runs."""

Point = dict[str, Any]


def measure(found: Report, path: str | None) -> None:
    """Fill in the tables of prices, framing, savings, and lengths from which on it pays."""
    asyncio.run(_measure(found, path))


async def _measure(found: Report, path: str | None) -> None:
    logging.getLogger("microbatch").setLevel(logging.ERROR)  # where combining costs more is told by the tables
    labels = labels_of(path)
    count = COUNT_QUICK if found.quick else COUNT
    asked = questions(path, count, found.seed, repeated=False)
    sample = random.Random(found.seed + 1).choices(list(labels), k=COUNTED)
    framing = await count_framing(sample, labels, SIZE, TOKENS)
    text = statistics.mean(map(text_tokens, asked))
    points: list[Point] = []
    for length in LENGTHS:
        _, alone = await answered(asked, labels, 1, length)
        for size in SIZES:
            _, together = await answered(asked, labels, size, length)
            told = foretell(framing, length, size, text, RATIO)
            points.append(point(length, size, count, alone, together) | {"foretold": told._asdict()})
    found.samples["savings"] = points
    found.samples["framing"] = framing._asdict()
    found.samples["text_tokens"] = text
    found.tables["prices"] = prices()
    found.tables["framing"] = framing_table(framing)
    found.tables["savings"] = savings(points, count, text)
    found.tables["break_even"] = pays_from(framing)


def point(length: int, size: int, count: int, alone: Any, together: Any) -> Point:
    """Put together what was measured of a batch size."""
    tokens, base = (stats.prompt_tokens + stats.completion_tokens for stats in (together, alone))
    return {
        "instructions": length,
        "size": size,
        "calls": together.upstream_calls / alone.upstream_calls - 1,
        "prompt": together.prompt_tokens / count,
        "completion": together.completion_tokens / count,
        "alone_prompt": alone.prompt_tokens / count,
        "alone_completion": alone.completion_tokens / count,
        "tokens_saved": 1 - tokens / base,
        "dollars_saved": 1 - together.cost_usd / alone.cost_usd,
        "costs_more": together.costs_more,
        "dollars": together.cost_usd / count * 1000,
        "alone_dollars": alone.cost_usd / count * 1000,
    }


def prices() -> Table:
    table = Table(
        "Prices that the tokens of the SIMULATED endpoint are counted at, US dollars for a million",
        [Column("model"), Column("input", ".2f"), Column("output", ".2f"), Column("output / input", ".1f")],
        notes=["List prices, without what a provider takes off for a prompt's cached beginning."],
    )
    table.add(MODEL, PRICE.input, PRICE.output, RATIO)
    return table


def framing_table(framing: Framing) -> Table:
    table = Table(
        f"What surrounds items, in tokens, counted on the parts of real calls to the SIMULATED endpoint ({COUNTED} items, by {SIZE} and alone)",
        [Column("part"), Column("in the formula"), Column("tokens", ".1f")],
        notes=[
            "Saved of an item, in prompt tokens: S (1 - 1/N) - P/N - f_in - r (f_out + R/N), with N items a call. Single calls "
            "ask for the same schema, so their answers are JSON too."
        ],
    )
    table.add("roles, priming and schema of a single call", "S, with the instructions", framing.around)
    table.add("wrapper of a combined call, its larger schema included", "P", framing.wrapper)
    table.add("around an item's text in the prompt", "f_in", framing.line)
    table.add("an answer in a combined reply, above a single reply", "f_out", framing.element)
    table.add("around the answers of a combined reply", "R", framing.reply)
    table.add("a single reply", None, framing.answer)
    return table


def savings(points: list[Point], count: int, text: float) -> Table:
    table = Table(
        f"What combining saves, measured and foretold: SIMULATED endpoint, {count:,} products of {text:.1f} tokens, labels, prices of "
        f"{MODEL}",
        [
            Column("instructions"),
            Column("batch size"),
            Column("calls, change", "+.1%"),
            Column("prompt tokens an item", ".1f"),
            Column("prompt, foretold", ".1f"),
            Column("reply tokens an item", ".2f"),
            Column("reply, foretold", ".2f"),
            Column("tokens, change", "+.1%"),
            Column("tokens, foretold", "+.1%"),
            Column("dollars, change", "+.1%"),
            Column("dollars, foretold", "+.1%"),
            Column("dollars for 1,000 items", ".4f"),
        ],
    )
    seen = set()
    for one in points:
        told = one["foretold"]
        length = f"{one['instructions']:,} tokens"
        if length not in seen:
            seen.add(length)
            table.add(
                length,
                "one call each",
                None,
                one["alone_prompt"],
                None,
                one["alone_completion"],
                *([None] * 5),
                one["alone_dollars"],
            )
        table.add(
            length,
            f"{one['size']}",
            one["calls"],
            one["prompt"],
            told["prompt"],
            one["completion"],
            told["completion"],
            -one["tokens_saved"],
            -told["tokens_saved"],
            -one["dollars_saved"],
            -told["dollars_saved"],
            one["dollars"],
        )
    return table


def pays_from(framing: Framing) -> Table:
    table = Table(
        "Tokens of shared instructions from which on combining pays, by the formula over the SIMULATED endpoint's framing",
        [Column("batch size"), Column("in tokens", ",.0f"), Column("in dollars", ",.0f")],
        notes=[
            f"Single calls pay {framing.around:.0f} tokens each for roles and schema, which count as shared: where the endpoint charges no "
            "schema, it pays from somewhat longer instructions on."
        ],
    )
    for size in (2, *SIZES):
        table.add(f"{size}", break_even(framing, size, 1.0), break_even(framing, size, RATIO))
    return table


def findings(found: Report) -> list[str]:
    points: list[Point] = found.samples["savings"]
    gap = max(
        abs(one[name] - one["foretold"][name]) * 100 for one in points for name in ("tokens_saved", "dollars_saved")
    )
    dearer = [one for one in points if one["dollars_saved"] < 0]
    costs = ", ".join(f"{one['instructions']} tokens by {one['size']} ({-one['dollars_saved']:+.1%})" for one in dearer)
    agrees = all((one["dollars_saved"] < 0) == one["costs_more"] for one in points)
    gains = ", ".join(
        f"{one['dollars_saved']:.0%} at {one['instructions']:,} tokens" for one in points if one["size"] == SIZE
    )
    return [
        f"The formula foretells what is saved within {gap:.2f} points, in tokens and in dollars, at every length and size.",
        f"Dollars saved by {SIZE} items a call, by length of the shared instructions: {gains}.",
        f"Where batching pays, in dollars: {_starts(found.tables['break_even'])}.",
        f"Where it costs more, of what was measured: {costs or 'nowhere'}. stats().costs_more says so "
        f"{'in these cases and no others' if agrees else 'NOT in all of these cases, or in others'}.",
    ]


def _starts(table: Table) -> str:
    """Say from which length on each batch size pays."""
    return ", ".join(
        f"by {size} {f'from {dollars:.0f} tokens on' if dollars else 'at any length'}"
        for size, _, dollars in table.rows
    )
