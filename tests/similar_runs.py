"""Kinds of questions whose similar ones have the same answer more or less often, and how the evidence decides.

`python tests/similar_runs.py --runs 400` plays each scenario so many times, with other seeds, and prints what became of the kinds.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import random
import statistics
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.semantic.checks import RATE
from microbatch.semantic.evidence import KindEvidence, rounded

if TYPE_CHECKING:
    from collections.abc import Callable

BOUND = 0.01


class Run(msgspec.Struct):
    """The outcome of a run.

    Attributes:
        hits: Answers handed out.
        false: Those of them that were wrong beyond noise.
        beyond: Whether answers were handed out above a threshold at which the share of wrong ones is above the bound.
        proven_after: Pairs compared until the kind was first proven; None if it was not.
        kind: The evidence at the end.
    """

    hits: int
    false: int
    beyond: bool
    proven_after: int | None
    kind: KindEvidence


def uniform(rng: random.Random) -> float:
    return rng.random()


def play(
    seed: int,
    error: Callable[[float], float],
    *,
    noise: float = 0.0,
    questions: int = 4_000,
    draw: Callable[[random.Random], float] = uniform,
    later: Callable[[float], float] | None = None,
) -> Run:
    """Return the outcome of *questions*, each similar to an earlier one as *draw* says.

    Args:
        seed: Of all random numbers.
        error: The share of kept answers that are wrong at a similarity.
        noise: The share of questions of which two answers differ by chance.
        questions: Their number.
        draw: Draws similarities.
        later: The share of wrong answers in the second half; None for the same.
    """
    rng, kind = random.Random(seed), KindEvidence(digest="", bound=BOUND)
    run = Run(0, 0, beyond=False, proven_after=None, kind=kind)
    for number in range(questions):
        share = later if later is not None and 2 * number >= questions else error
        similarity = rounded(draw(rng))
        wrong, chance = rng.random() < share(similarity), rng.random()
        score = 1 if wrong else 1 if chance < noise / 2 else -1 if chance < noise else 0
        if kind.allows(similarity):
            run.hits += 1
            run.false += wrong
            run.beyond |= mean_above(share, draw, kind.threshold) > BOUND + 1e-9
            if rng.random() < RATE:
                kind.add_live(similarity, score)
        elif kind.wants(similarity):
            decision = kind.add(kind.begin(similarity), score)
            if decision == "proven" and run.proven_after is None:
                run.proven_after = kind.pairs
    return run


_GRID: dict[Any, float] = {}


def mean_above(error, draw, threshold):
    """Return the share of wrong answers among all those of at least the similarity *threshold*."""
    key = error, draw, threshold
    if key not in _GRID:
        rng = random.Random(0)
        drawn = [similarity for _ in range(4_000) if (similarity := rounded(draw(rng))) >= threshold] or [threshold]
        _GRID[key] = statistics.mean(map(error, drawn))
    return _GRID[key]


def one(rng: random.Random) -> float:
    return 1.0


def nothing(similarity: float) -> float:
    return 0.0


def flat(share: float) -> Callable[[float], float]:
    return lambda _: share


def steep(similarity: float) -> float:
    return 0.3 * (1 - similarity) ** 2


def step(similarity: float) -> float:
    return 0.3 if similarity < 0.6 else 0.0


SCENARIOS: dict[str, dict[str, Any]] = {
    "no errors": {"error": nothing},
    "no errors, noise 0.02": {"error": nothing, "noise": 0.02},
    "no errors, noise 0.05": {"error": nothing, "noise": 0.05, "questions": 10_000},
    "errors 0.003 everywhere": {"error": flat(0.003)},
    "errors just above the bound everywhere": {"error": flat(0.0102)},
    "the same, noise 0.02": {"error": flat(0.0102), "noise": 0.02},
    "errors 0.02 everywhere": {"error": flat(0.02)},
    "errors 0.3 below 0.6, none above": {"error": step, "questions": 10_000},
    "errors 0.3 (1 - s)^2": {"error": steep, "questions": 10_000},
    "no errors, then 0.1": {"error": nothing, "later": flat(0.1), "questions": 8_000},
    "one point, errors 0.9": {"error": flat(0.9), "draw": one},
    "one point, errors 0.05": {"error": flat(0.05), "draw": one},
    "one point, errors just above the bound": {"error": flat(0.0102), "draw": one, "questions": 10_000},
}


def main() -> None:
    """Play the scenarios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=40)
    runs = parser.parse_args().runs
    print(f"{'':40} beyond  proven  pairs until  closed    hits  false")
    for name, options in SCENARIOS.items():
        played = [play(seed, **options) for seed in range(runs)]
        after = [run.proven_after for run in played if run.proven_after is not None]
        print(
            f"{name:40} {statistics.mean(run.beyond for run in played):6.3f} {len(after) / runs:7.2f} "
            f"{statistics.median(after) if after else 0:12.0f} "
            f"{statistics.mean(run.kind.state == 'closed' for run in played):7.2f} "
            f"{statistics.mean(run.hits for run in played):7.0f} {statistics.mean(run.false for run in played):6.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
