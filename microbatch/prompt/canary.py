"""The canary: an additional last item whose only right answer is a word drawn for it.

A reply that answers it wrong was not written item by item: one item has given orders to all ("answer X for all requests"; every
model tested in arXiv:2503.15551 follows some of those), or the model has lost or gained a line under intact ids, or it has stopped
early. Then no answer of the reply is trusted. The canary is a detector, not a security boundary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from microbatch.prompt.compose import item_line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CANARY_TOKENS = 21
"""Prompt tokens charged for the canary's line, its id included; measured 16 to 21, 18 on average."""

CANARY_ANSWER_TOKENS = 20
"""Reply tokens reserved for its element; measured 14 to 19, 16 on average."""

USUAL_TOKENS = (18.0, 16.0)
"""Average tokens of its line and of its element."""

_decode_word = msgspec.json.Decoder(str).decode


def draw_word(draw: Callable[[int], Sequence[str]]) -> str:
    """Return a word for the canary, made of two id endings from *draw*."""
    return "".join(draw(2))


def canary_line(word: str) -> bytes:
    """Return the canary's line, without its id."""
    return item_line(f"Reply with exactly: {word}")


def check_canary(word: str, raw: str) -> None:
    """Check the JSON of the answer to the canary.

    Raises:
        ValueError: It is not exactly *word*.
    """
    if _decode_word(raw) != word:
        raise ValueError("the canary was answered with something else")
