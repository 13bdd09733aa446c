"""Where `merge="when-cheaper"` combines, against the cheaper of both ways: real prompts and replies, counted and priced apart from it.

The prompts of both ways are those that the library sends to a SIMULATED endpoint, with bundled products as the requests. Their tokens
are counted here, and priced with a provider's prefix cache that works as OpenAI documents it: the beginning that a prompt has in
common with an earlier one, from 1,024 tokens on in steps of 128, costs the price of cached input. Each decision is asked for by the
library's own calculation at four times: before any call, after combined calls, after single calls, and after both. A decision is
wrong if the other way is cheaper by more than 1 %.
"""

from __future__ import annotations

import asyncio
import itertools
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import msgspec

import microbatch as mb
from bench.benchmark import Option
from bench.questions import Label, products, shared_instructions
from bench.report import Run, Table, met
from microbatch.accounting.tokens import load_encoding
from microbatch.batching.chat_calls import ChatCalls
from microbatch.batching.lane_history import LaneHistory
from microbatch.testing import SimulatedModel, SimulatedTransport, VirtualClockLoop
from microbatch.testing.counting import compact, prompt_tokens, text_tokens

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from microbatch.batching.lane import Lane

QUESTION = "Does when-cheaper combine where that is cheaper, and only there?"
COMPARED = ["tiktoken"]
OPTIONS = {"rounds": Option(int, 4, 2, "calls of each kind before the decisions that follow them")}

SHARED = (20, 100, 300, 1_000, 3_000, 6_000)
SIZES = (2, 3, 4, 8, 16)
OUTPUT = (2.0, 4.0, 5.0, 8.0)
CACHED = (1.0, 0.25, 0.10, 0.025, 0.02)
KINDS = {"labels": Label, "texts": str}
"""Types of answers: one of six labels, and texts of 40 tokens."""

TEXT_TOKENS = 40
TIE = 0.01

Moment = Literal["before any call", "after combined calls", "after single calls", "after both"]
MOMENTS: tuple[Moment, ...] = ("before any call", "after combined calls", "after single calls", "after both")
MODEL = "gpt-4.1"
"""Its encoding is counted exactly."""

LEAST, STEP = 1_024, 128


class Bill(msgspec.Struct, frozen=True):
    """The tokens of all calls of one way."""

    prompt: int
    cached: int
    completion: int

    def cost(self, output: float, cached: float) -> float:
        """Return the cost in uncached prompt tokens."""
        return self.prompt - self.cached * (1 - cached) + self.completion * output


class Cell(msgspec.Struct, frozen=True):
    """The shared tokens, the size and the kind of answers of a case, what both ways cost, and what was decided for each price.

    Attributes:
        combined: Whether to combine, by moment, output price and price of cached input.
    """

    kind: str
    shared: int
    size: int
    alone: Bill
    together: Bill
    combined: dict[str, list[list[bool]]]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    cells = [cell(kind, shared, size, options.rounds) for kind, shared, size in itertools.product(KINDS, SHARED, SIZES)]
    return {"cells": msgspec.to_builtins(cells)}


def cell(kind: str, shared: int, size: int, rounds: int = 4) -> Cell:
    """Ask *size* requests with *shared* tokens of instructions, in both ways, *rounds* times each, and decide for all prices."""
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        together, history, lane = runner.run(_asked(kind, shared, size, rounds, combined=True))
        alone, of_singles, _ = runner.run(_asked(kind, shared, size, rounds, combined=False))
    both = msgspec.structs.replace(
        history,
        singles=of_singles.singles,
        cache=msgspec.structs.replace(history.cache, alone=of_singles.cache.alone),  # type: ignore[union-attr, type-var]
    )
    histories = dict(zip(MOMENTS, (LaneHistory(), history, of_singles, both), strict=True))
    decided = {moment: _decided(lane, known, size) for moment, known in histories.items()}
    return Cell(kind, shared, size, alone, together, decided)


def _decided(lane: Lane, history: LaneHistory, size: int) -> list[list[bool]]:
    assert isinstance(lane.calls, ChatCalls)
    estimates = lane.calls._estimates
    estimates.watch_cache(lane.spec, history)
    return [
        [
            estimates.is_cheaper_combined(lane.spec, history, size, mb.Price(1.0, output, cached), None)  # type: ignore[arg-type]
            for cached in CACHED
        ]
        for output in OUTPUT
    ]


async def _asked(kind: str, shared: int, size: int, rounds: int, *, combined: bool) -> tuple[Bill, LaneHistory, Lane]:
    """Ask in one way; return what all but the first round have taken, and what the lane has learned."""
    labels = products()
    model = SimulatedModel(answer=answer if kind == "texts" else lambda text, _: labels[text], cached_prefixes=True)
    model.record = True
    # Where requests are limited "auto" combines; elsewhere it does not if generated tokens cost a million times as much as others.
    limit = mb.RateLimit(rpm=10**9) if combined else None
    policy = mb.FlushPolicy(merge="auto", max_batch_size=size, idle="wait", max_output_tokens=10**6)
    system = {"role": "system", "content": shared_instructions(shared)}
    questions = iter(list(labels)[: (rounds + 1) * size])
    prices = {MODEL: mb.Price(0.001, 1_000.0)}
    batcher = mb.Microbatcher(
        SimulatedTransport(model), policy=policy, prices=prices, rate_limit=limit, id_secret="bench"
    )
    async with batcher:
        for _ in range(rounds + 1):
            asked = [[system, {"role": "user", "content": text}] for text in itertools.islice(questions, size)]
            await asyncio.gather(*(batcher.submit(each, model=MODEL, output_type=KINDS[kind]) for each in asked))
        lane = batcher._intake._chat.latest
        assert lane is not None
    calls = rounds if combined else rounds * size
    assert len(model.replies) == calls + calls // rounds, "not all went the same way"
    return _bill(model.requests, model.replies, calls), lane.history, lane


def answer(text: str, _: dict[str, Any] | None) -> str:
    encoding = load_encoding("o200k_base")
    return encoding.decode(encoding.encode_ordinary(text * TEXT_TOKENS)[:TEXT_TOKENS])


def _bill(requests: Sequence[dict[str, Any]], replies: Sequence[str], count: int) -> Bill:
    """Return what the last *count* calls have taken, the first of all being in the cache."""
    first = _beginning(requests[0])
    prompt = cached = completion = 0
    for body, reply in list(zip(requests, replies, strict=True))[-count:]:
        prompt += prompt_tokens(body["messages"])
        if "response_format" in body:
            prompt += text_tokens(compact(body["response_format"]["json_schema"]["schema"]))
        cached += _cached(first, _beginning(body))
        completion += text_tokens(reply)
    return Bill(prompt, cached, completion)


def _beginning(body: dict[str, Any]) -> list[int]:
    return [token for each in body["messages"] for token in _tokens(f"{each['role']}\n{each['content']}\n")]


@lru_cache(64)
def _tokens(text: str) -> list[int]:
    return load_encoding("o200k_base").encode_ordinary(text)


def _cached(first: list[int], prompt: list[int]) -> int:
    common = next((place for place, pair in enumerate(zip(first, prompt, strict=False)) if pair[0] != pair[1]), 0)
    return common // STEP * STEP if common >= LEAST else 0


# --- what it shows


def wrong(cells: Sequence[Cell], moment: Moment) -> Iterator[tuple[Cell, float, float]]:
    """Yield the cells in which the decision at *moment* is wrong, with the prices of output and of cached input."""
    for each, (row, output), (column, cached) in itertools.product(cells, enumerate(OUTPUT), enumerate(CACHED)):
        combined = each.combined[moment][row][column]
        if not tied(each, output, cached) and combined != (advantage(each, output, cached) > 0):
            yield each, output, cached


def advantage(cell: Cell, output: float, cached: float) -> float:
    """Return by what part of the cost one by one combining is cheaper."""
    alone = cell.alone.cost(output, cached)
    return (alone - cell.together.cost(output, cached)) / alone


def tied(cell: Cell, output: float, cached: float) -> bool:
    """Return whether both ways cost the same."""
    return abs(advantage(cell, output, cached)) <= TIE


def tables(run: Run) -> dict[str, Table]:
    cells = msgspec.convert(run.samples["cells"], list[Cell])
    prices = list(itertools.product(OUTPUT, CACHED))
    table = Table(
        "Decisions about prompts to a SIMULATED endpoint",
        "when | cells {:,} | cheaper combined {:,} | ties {:,} | wrong {:,} | lost by it, % {:.1f}",
    )
    ties = sum(tied(each, *price) for each in cells for price in prices)
    combined = sum(advantage(each, *price) > TIE for each in cells for price in prices)
    for moment in MOMENTS:
        found = list(wrong(cells, moment))
        worst = max((abs(advantage(*case)) for case in found), default=0.0)
        table.add(moment, len(cells) * len(prices), combined, ties, len(found), 100 * worst)
    return {"decisions": table}


def findings(run: Run, tables: dict[str, Table]) -> list[str]:
    rows = tables["decisions"].by("when")
    learned = (
        f"Decisions after calls have learned from {run.options['rounds']} rounds of them. Ties are within {TIE:.0%}."
    )
    return [
        *(
            f"{moment}: {row['wrong']} of {row['cells']:,} wrong: {met(not row['wrong'])}."
            for moment, row in rows.items()
        ),
        learned,
    ]
