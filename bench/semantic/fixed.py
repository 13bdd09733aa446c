"""Caches with a fixed threshold, replayed: the nearest kept question at or above it gives its answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from microbatch.semantic.guards import refusal, signature

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.semantic.encoder import Vectors
    from microbatch.semantic.guards import Signature

CANDIDATES = 8
"""Nearest kept questions that the guards are asked about."""


class Outcome(NamedTuple):
    """The requests that a cache was asked for, its hits, and those with an answer that the model would not have given."""

    requests: int
    hits: int
    false_hits: int


def signatures(texts: Sequence[str]) -> list[Signature]:
    return [signature(text) for text in texts]


def replay(scores: Vectors, answers: Sequence[str], threshold: float, guarded: list[Signature] | None) -> Outcome:
    """Ask questions in order, each with the answer that the model would give.

    Args:
        scores: The similarity of any two of them.
        guarded: The signatures of all, which the guards compare; None for a cache without guards.
    """
    kept, count = np.empty(len(scores), np.intp), 0
    hits = false_hits = 0
    for asked, row in enumerate(scores):
        found = _nearest(row, kept[:count], threshold, asked, guarded)
        if found is None:
            kept[count] = asked
            count += 1
        else:
            hits += 1
            false_hits += answers[found] != answers[asked]
    return Outcome(len(scores), hits, false_hits)


def _nearest(row: Vectors, kept: Vectors, threshold: float, asked: int, guarded: list[Signature] | None) -> int | None:
    near = kept[row[kept] >= threshold]
    for place in near[np.argsort(-row[near], kind="stable")][: 1 if guarded is None else CANDIDATES]:
        if guarded is None or refusal(guarded[asked], guarded[place]) is None:
            return int(place)
    return None
