"""Comparison of the answer from a batch with the answer alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.containment import contained

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.schema.answer_type import AnswerType

    Same = Callable[[Any, Any], bool]

LONGEST: Final = 64
"""Characters of the longest text that is compared: a longer one may say the same in other words."""


def can_compare(answer: AnswerType, batched: str, same: Same | None) -> bool:
    """Return whether an answer in the form *answer*, with the text *batched*, can be compared with another one at all."""
    return same is not None or not answer.is_text or len(batched) <= LONGEST


def agree(answer: AnswerType, batched: str, alone: str, same: Same | None = None) -> bool | None:
    """Return whether two answers in the form *answer*, given as their texts, are the same; None if they cannot be compared.

    Typed answers are the same if their values, or their JSON, are equal, sets in any order; their JSON decides alone if values cannot
    be compared. Texts are the same if they are equal but for case and white space, and neither is longer than 64 characters. *same*
    replaces both: it takes the outputs, that from the batch first, and an error of it makes them incomparable.
    """
    with contained():
        # Decoded anew: a caller may have changed the output it was given.
        outputs = [answer.decode_again(text)[0] for text in (batched, alone)]
        if same is not None:
            return bool(same(*outputs))
        if answer.is_text:
            return _folded(batched) == _folded(alone) if max(len(batched), len(alone)) <= LONGEST else None
        if answer.form is not None:  # JSON that the caller asked for as such
            return bool(msgspec.json.decode(batched) == msgspec.json.decode(alone))
        with contained():  # the `==` of a caller's type may raise, or return an array
            if outputs[0] == outputs[1]:
                return True
        return _same_json(batched, alone)
    return None


def score(*, first: bool | None, batched: bool | None) -> int | None:
    """Return the score of an item whose first answer alone differs from that of the batch; see `microbatch.audit.evidence`.

    Args:
        first: Whether its second answer alone agrees with the first; None if they cannot be compared.
        batched: Whether it agrees with that of the batch.

    Returns:
        1, 0 or -1; None if it is unknown.
    """
    return None if first is None or batched is None else first - batched


def _same_json(one: str, other: str) -> bool:
    """Return whether two texts are the same JSON: equal outputs of a class that compares by identity, for instance, differ."""
    try:
        return bool(msgspec.json.decode(one) == msgspec.json.decode(other))
    except msgspec.DecodeError:
        return False


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
