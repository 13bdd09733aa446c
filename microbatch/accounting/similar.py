"""Figures of answers to similar questions."""

from __future__ import annotations

from typing import Literal

import msgspec

SimilarState = Literal["shadow", "proven", "closed", "not measurable"]


class SimilarKind(msgspec.Struct, frozen=True, kw_only=True):
    """The evidence of a `SemanticCache` on one kind of question.

    Attributes:
        kind: The kind: a digest of endpoint, model, parameters, schema and shared messages, as in `AuditedSize`.
        model: The model asked; None if none is named.
        state: "shadow" while questions are asked and compared; "proven" if answers are handed out; "closed" for good; "not measurable"
            if its answers cannot be compared, which is so for texts of more than 64 characters without `same`.
        why: Why it was closed; None if it was not.
        threshold: The similarity from which on answers are handed out, or are being compared; None while one is looked for.
        pairs: Answers to similar questions that were compared.
        not_comparable: Kept answers that cannot be compared, and are not handed out for that reason.
        excess: Share of the pairs, since the threshold was last changed, whose answers differ beyond the model's disagreement with
            itself; an estimate without bias, which may be negative.
        upper: The bound that it does not exceed with 95 % confidence, whenever it is looked at; 1.0 while nothing is known.
        tests: Thresholds tested so far.
        failures: Those of them that failed.
        checked: Answers handed out and asked again.
        false_hits: Those of them that were wrong: the model says otherwise, and says it again.
        false_hit_interval: The share of wrong ones among all that were handed out, from and to, with 95 % confidence each, beyond the
            model's disagreement with itself.
    """

    kind: str
    model: str | None
    state: SimilarState
    why: str | None
    threshold: float | None
    pairs: int
    not_comparable: int
    excess: float
    upper: float
    tests: int
    failures: int
    checked: int
    false_hits: int
    false_hit_interval: tuple[float, float]
