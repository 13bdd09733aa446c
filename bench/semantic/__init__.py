"""Answers to similar questions: `SemanticCache` beside caches with a fixed threshold.

The questions are real ones with gold labels, banking77's, where `--data` names the folder with them, else generated ones. Their vectors
are those of a real encoder, all-MiniLM-L6-v2, where its packages are installed, else simulated ones. The model is SIMULATED: its answer is
the gold label (77 intents) or the department that it belongs to (7, by rule), with or without noise. A false hit is an answer handed
out that differs from the right one. Each question is asked once in the stream "once"; in "rewritten" some are asked often, each time in
other words (greetings, case, punctuation, contractions); in "changed" half of those are mixed with questions and what they are changed to
in a fact, which have another answer.

A run ends with an error if an answer crossed from one tenant to another, or to a question that was changed in a fact.
"""

from __future__ import annotations

import logging
import random
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.benchmark import Option
from bench.integrity import wilson
from bench.integrity.tasks import folder_of
from bench.report import Run, Table, met
from bench.semantic import cached
from bench.semantic.encoder import PACKAGES, load
from bench.semantic.fixed import replay, signatures
from bench.semantic.questions import TASKS, changes, labelled, written
from microbatch.semantic.guards import refusal, signature

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from bench.semantic.encoder import Vectors
    from bench.semantic.questions import Pair

QUESTION = "How many answers to similar questions are handed out, and how many of them are wrong?"
COMPARED = PACKAGES
OPTIONS = {
    "data": Option(str, "", "", "folder with banking77_test.jsonl"),
    "encoder": Option(str, "auto", "auto", "minilm, simulated, or auto: minilm where its packages are installed"),
    "questions": Option(int, 4_000, 400, "most questions that are used"),
    "requests": Option(int, 6_000, 1_500, "requests of the stream in other words"),
    "pairs": Option(int, 120, 30, "pairs of each kind of change"),
}

THRESHOLDS = (0.8, 0.9, 0.95)
BOUND = 0.01
NOISE = 0.02
ONCE, REWRITTEN, CHANGED = "once", "rewritten", "changed"
SEMANTIC = "SemanticCache"
VARIANTS = {
    ONCE: [(BOUND, 0.0)],
    REWRITTEN: [(BOUND, 0.0), (BOUND, NOISE)],
    CHANGED: [(BOUND, 0.0), (5 * BOUND, 0.0)],
}
"""The error that is accepted, and the model's noise, of the semantic caches that each stream is asked of."""

WARMING = 3_000
"""Most requests after which answers should be handed out, before what must not be handed out is asked."""

LOWEST, WIDTH = 0.5, 0.05
"""The similarities that pairs of questions are counted by."""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    logging.getLogger("microbatch").setLevel(logging.ERROR)  # that the model has no price is no news
    folder, chosen = folder_of(options.data), load(options.encoder)
    gold = labelled(folder)
    draw = random.Random(options.seed)
    gold = {text: gold[text] for text in draw.sample(list(gold), min(options.questions, len(gold)))}
    rewritten = dict(written(gold, options.requests, options.seed))
    pairs = changes(gold, options.pairs, options.seed)
    vectors = _Vectors(chosen.encode)
    of_pairs = [pair for kind in pairs.values() for pair in kind]
    thanks = [cached.thanks(pair.text) for pair in of_pairs]
    vectors.add([*gold, *rewritten, *thanks, *(text for pair in of_pairs for text in pair[:2])])
    _say(f"{len(vectors.known):,} vectors")
    samples: dict[str, Any] = {
        "encoder": chosen.name,
        "source": "generated messages" if folder is None else "banking77",
        "questions": len(gold),
        "paraphrases": _paraphrases(vectors.of(gold), list(gold), list(gold.values())),
        "changes": {kind: _changed(vectors, found) for kind, found in pairs.items()},
        "streams": [],
    }
    for task, rule in TASKS.items():
        right = {text: rule(label) for text, label in (rewritten | gold).items()}
        _answer_pairs(right, of_pairs)
        half = list(rewritten)[: len(rewritten) // 2]
        mixed = [*half, *(text for pair in of_pairs for text in pair[:2])]
        streams = {
            ONCE: list(gold),
            REWRITTEN: list(rewritten),
            CHANGED: list(dict.fromkeys(draw.sample(mixed, len(mixed)))),
        }
        for stream, texts in streams.items():
            answers = {text: right[text] for text in texts}
            samples["streams"] += _stream(stream, task, answers, vectors, options.seed)
    samples["walls"] = _walls(right, list(rewritten)[:WARMING], list(gold), pairs, vectors, options.seed)
    samples["one point"] = _one_point(gold, options.seed)
    return samples


class _Vectors:
    """The vectors of texts, computed once."""

    def __init__(self, encode: Any) -> None:
        self._encode = encode
        self.known: dict[str, Vectors] = {}

    def add(self, texts: Sequence[str]) -> None:
        new = list(dict.fromkeys(text for text in texts if text not in self.known))
        self.known.update(zip(new, self._encode(new), strict=True))

    def of(self, texts: Any) -> Vectors:
        return np.array([self.known[text] for text in texts], "f4")

    async def embed(self, texts: list[str]) -> Vectors:
        return self.of(texts)


def _paraphrases(vectors: Vectors, texts: list[str], labels: list[str]) -> dict[str, Any]:
    """Count all pairs of questions by similarity: pairs of one label, of two, and those of both that the guards let pass."""
    upper = np.triu_indices(len(texts), 1)
    scores = (vectors @ vectors.T)[upper]
    numbers = np.unique(labels, return_inverse=True)[1]
    same = (numbers[:, None] == numbers[None])[upper]
    right, other = scores[same], np.sort(scores[~same])
    below = np.searchsorted(other, right, "left") + np.searchsorted(other, right, "right")
    signed, bins = signatures(texts), []
    for place in range(round((1 - LOWEST) / WIDTH)):
        start = LOWEST + place * WIDTH
        inside = np.flatnonzero((scores >= start) & ((scores < start + WIDTH) | (start + WIDTH > 1 - WIDTH / 2)))
        passed = np.array([refusal(signed[upper[0][at]], signed[upper[1][at]]) is None for at in inside], bool)
        kinds = (same[inside], ~same[inside], same[inside] & passed, ~same[inside] & passed)
        bins.append([round(start, 2), *(int(kind.sum()) for kind in kinds)])
    return {"auc": float(below.mean()) / 2 / len(other), "bins": bins}


def _changed(vectors: _Vectors, pairs: list[Pair]) -> dict[str, Any]:
    scores = [float(vectors.known[pair.text] @ vectors.known[pair.changed]) for pair in pairs]
    passed = sum(refusal(signature(pair.text), signature(pair.changed)) is None for pair in pairs)
    return {"scores": [round(score, 4) for score in scores], "passed": passed}


def _stream(stream: str, task: str, answers: dict[str, str], vectors: _Vectors, seed: int) -> list[dict[str, Any]]:
    texts, labels = list(answers), sorted(set(answers.values()))
    matrix, given, signed = vectors.of(texts), [answers[text] for text in texts], signatures(texts)
    scores = matrix @ matrix.T
    rows: list[dict[str, Any]] = []
    _say(f"{stream}, {task}: {len(texts):,} texts")
    for threshold in THRESHOLDS:
        for guards in (False, True):
            outcome = replay(scores, given, threshold, signed if guards else None)
            rows.append({"cache": f"{threshold:g}", "guards": guards, "noise": 0.0, **outcome._asdict()})
    for max_error, noise in VARIANTS[stream]:
        scene = cached.Scene(answers, labels, vectors.embed, max_error=max_error, noise=noise, seed=seed)
        found = cached.run(cached.stream(scene, texts))
        rows.append({"cache": f"{SEMANTIC}, {max_error:g}", "guards": True, "noise": noise, **found})
        _say(f"{stream}, {task}, {rows[-1]}")
    return [{"stream": stream, "task": task, **row} for row in rows]


def _answer_pairs(right: dict[str, str], pairs: list[Pair]) -> None:
    """Add the right answers to the texts of *pairs*: that of the question to it with a remark, another one to what it is changed to."""
    labels = sorted(set(right.values()))
    following = dict(zip(labels, [*labels[1:], labels[0]], strict=True))
    for pair in pairs:
        same = right.setdefault(pair.text, right[pair.question])
        right.setdefault(cached.thanks(pair.text), same)
        right.setdefault(pair.changed, following[same])


def _walls(answers: dict[str, str], rewritten: list[str], gold: list[str], pairs: dict[str, list[Pair]], vectors: _Vectors, seed: int) -> dict[str, Any]:  # fmt: skip
    labels = sorted(set(answers.values()))
    # The walls are shown where answers are handed out, so they have to be handed out soon.
    scene = cached.Scene(answers, labels, vectors.embed, max_error=20 * BOUND, noise=0.0, seed=seed)
    found = cached.run(cached.walls(scene, rewritten, gold, pairs))
    _say(f"walls, {found}")
    crossed = {name: one["crossed"] for name, one in {**found["changed"], "tenants": found["tenants"]}.items()}
    if any(crossed.values()):
        raise SystemExit(f"bench semantic: answers crossed a wall: {crossed}")
    return found


def _one_point(gold: dict[str, str], seed: int) -> dict[str, Any]:
    async def embed(texts: list[str]) -> list[list[float]]:
        return [[1.0] * 8 for _ in texts]

    answers = {text: TASKS["departments"](label) for text, label in gold.items()}
    scene = cached.Scene(answers, sorted(set(answers.values())), embed, max_error=BOUND, noise=0.0, seed=seed)
    return cached.run(cached.stream(scene, list(answers)))


def _say(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


# --- what it shows


def tables(run: Run) -> dict[str, Table]:
    told = run.samples
    vectors = f"{told['encoder']}; {told['questions']:,} questions, {told['source']}"
    hits = Table(
        f"Hits, by a SIMULATED model's answers ({vectors}), 95 % intervals (Wilson)",
        "stream | asked for | cache | guards | noise {:.0%} | requests {:,} | hits {:,} | hit rate {:.1%} | wrong {:.2%} | from {:.2%} | to {:.2%}"
        " | beyond noise {:+.2%} | late hits {:.1%} | state | threshold {:.3f} | pairs {:,}",
        f"Caches: a fixed threshold, or `{SEMANTIC}` with its `max_error`. wrong: of the hits. late hits: the hit rate in the last quarter. "
        "pairs: answers to similar questions that were compared.",
    )
    for row in told["streams"]:
        share = row["false_hits"] / row["hits"] if row["hits"] else None
        late = row["late"]["hits"] / row["late"]["requests"] if "late" in row else None
        low, high = wilson(row["false_hits"], row["hits"]) if row["hits"] else (None, None)
        interval = (low and max(0.0, low), high)
        beyond = None if share is None else share - row["noise"]
        hits.add(
            *(row[name] for name in ("stream", "task", "cache", "guards", "noise", "requests", "hits")),
            *(row["hits"] / row["requests"], share, *interval, beyond, late),
            *(row.get(name) for name in ("state", "threshold", "pairs")),
        )
    paraphrases = Table(
        f"All pairs of questions, by similarity ({vectors}; labels of the data set, no SIMULATED answers)",
        "similarity from {:.2f} | same label {:,} | other label {:,} | same {:.1%} | same label, passed {:,} | other label, passed {:,}"
        " | same, passed {:.1%}",
        "passed: by the guards.",
    )
    for start, same, other, same_passed, other_passed in told["paraphrases"]["bins"]:
        paraphrases.add(
            start, same, other, _part(same, other), same_passed, other_passed, _part(same_passed, other_passed)
        )
    changed = Table(
        f"Pairs that differ in a fact, made by rule ({vectors}; and asked of the SIMULATED model)",
        "change | pairs {:,} | similarity {:.3f} | at 0.8 {:.0%} | at 0.9 {:.0%} | at 0.95 {:.0%} | pass the guards {:,} | asked {:,} | hits {:,} | unchanged, hits {:,}",
        "at: share that a cache with a fixed threshold takes for the same question; similarity: the median. asked, hits: of "
        f"`{SEMANTIC}` when it hands out answers, each pair by a tenant of its own who has asked the one and asks the other; unchanged: the "
        "one again, with a word of thanks.",
    )
    for kind, found in told["changes"].items():
        scores = sorted(found["scores"])
        above = [sum(score >= threshold for score in scores) / len(scores) for threshold in THRESHOLDS]
        asked = told["walls"]["changed"][kind]
        changed.add(
            kind,
            len(scores),
            scores[len(scores) // 2],
            *above,
            found["passed"],
            asked["asked"],
            asked["crossed"],
            asked["again"],
        )
    return {"hits": hits, "changes": changed, "paraphrases": paraphrases}


def _part(some: int, others: int) -> float | None:
    return some / (some + others) if some + others else None


def _share(row: dict[str, Any]) -> str:
    return "no hit" if row["wrong"] is None else f"{row['hit rate']:.1%} hits, {row['wrong']:.1%} of them wrong,"


def findings(run: Run, tables: dict[str, Table]) -> list[str]:
    told = run.samples
    real = "a real encoder" if "SIMULATED" not in told["encoder"] else "no encoder: words and letters in common"
    found = [
        f"Vectors: {told['encoder']} ({real}). A pair of questions with the same label is closer than one with two labels with a probability "
        f"of {told['paraphrases']['auc']:.3f} (the area under the ROC curve)."
    ]
    rows = tables["hits"].by("stream", "asked for", "cache", "guards", "noise")
    for (stream, task, cache, guards, _), row in rows.items():
        if stream == CHANGED and guards and not cache.startswith(SEMANTIC):
            without = rows[stream, task, cache, False, 0.0]
            found.append(
                f"A fixed threshold of {cache}, {stream}, {task}: {_share(without)} without guards, {_share(row)} with them."
            )
    for row in rows.values():
        if not str(row["cache"]).startswith(SEMANTIC):
            continue
        bound = float(row["cache"].rpartition(" ")[2])
        name = f"{row['cache']}, {row['stream']}, {row['asked for']}, noise {row['noise']:.0%}"
        if row["wrong"] is None:
            found.append(f"{name}: no hit in {row['requests']:,} requests ({row['state']}): met.")
        else:
            found.append(
                f"{name}: {row['hit rate']:.1%} hits, {row['wrong']:.2%} of them wrong ({row['from']:.2%} to {row['to']:.2%}), "
                f"{row['beyond noise']:+.2%} beyond the noise, at most {bound:.0%}: {met(row['beyond noise'] <= bound)}."
            )
    passed = sum(row["pass the guards"] for row in tables["changes"].by("change").values())
    walls, point = told["walls"], told["one point"]
    changed = walls["changed"].values()
    return [
        *found,
        "The verdicts are on the shares seen; an interval that reaches above the bound says that the hits are too few to tell more.",
        f"Pairs that differ in a fact: {passed} of {sum(len(one['scores']) for one in told['changes'].values()):,} pass the guards, "
        f"{sum(one['crossed'] for one in changed)} of {sum(one['asked'] for one in changed):,} are hits: "
        f"{met(not passed and not any(one['crossed'] for one in changed))}. The same questions unchanged, in other words: "
        f"{sum(one['again'] for one in changed):,} hits.",
        f"Tenants: after {walls['first']['hits']:,} hits of one, {walls['tenants']['crossed']} of the {walls['tenants']['asked']:,} questions "
        f"that others ask in the same words are hits: {met(not walls['tenants']['crossed'])}."
        + (
            ""
            if walls["first"]["hits"]
            else " Nothing was handed out to the first, so this and the hits before show nothing."
        ),
        f"With an encoder that maps everything to one point: {point['hits']} hits, {point['false_hits']} of them wrong, in {point['requests']:,} "
        f"requests; the kind is {point['state']}: {met(point['false_hits'] <= BOUND * point['hits'] and point['state'] == 'closed')}.",
    ]
