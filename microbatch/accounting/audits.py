"""Figures and events of audits."""

from __future__ import annotations

from typing import Literal

import msgspec

Decision = Literal["certified", "condemned"]
Outcome = Literal["same", "different", "noise", "not_comparable"]


class AuditedSize(msgspec.Struct, frozen=True, kw_only=True):
    """The audits of one size of batches of one kind of lane; shares are 0.0 before the first comparison.

    Attributes:
        kind: The kind of lane: a digest of endpoint, model, parameters, schema and shared messages.
        model: The model asked; None if none is named.
        size: The largest size that counts here: 2, 4, 8, 16 or 32; 64 stands for all above 32.
        asked: Items sampled, without those whose audit was dropped because the batcher closed.
        compared: Those of them whose answers were compared, as often as that took.
        not_comparable: Those of them whose answers cannot be compared, or were not given.
        raw: Share of the compared items whose answer alone differs from that in the batch.
        noise: The part of `raw` that is the model's disagreement with itself, estimated.
        excess: The part that combining causes, estimated without bias; may be negative.
        upper: The bound that the excess does not exceed with 95 % confidence, whenever it is looked at; 1.0 while nothing is known.
        certified: Whether the excess was found to be below `max_excess`.
        condemned: Whether it was found to be above; such batches are not sent, unless the policy only reports.
    """

    kind: str
    model: str | None
    size: int
    asked: int
    compared: int
    not_comparable: int
    raw: float
    noise: float
    excess: float
    upper: float
    certified: bool
    condemned: bool


class Audited(msgspec.Struct, frozen=True, kw_only=True):
    """The event of `on_audit`: the audit of one item has ended.

    Attributes:
        kind: See `AuditedSize`, as for `size` and `model`.
        score: 1 if the model alone disagrees with the answer from the batch and agrees with itself, -1 if its second answer agrees with
            that of the batch, 0 if no answers differ or all do; None if they cannot be compared.
        decision: What this item has decided about the size; None for nothing.
        limit: The largest size in use since; None for no limit.
        differs: Whether its first answer alone differs from that in the batch.
    """

    kind: str
    model: str | None
    size: int
    score: int | None
    decision: Decision | None
    limit: int | None
    differs: bool = False

    @property
    def outcome(self) -> Outcome:
        """The score in a word: "different" because of combining, or by the model's own "noise", for all that this one item shows."""
        if self.score is None:
            return "not_comparable"
        if not self.differs:
            return "same"
        return "different" if self.score > 0 else "noise"
