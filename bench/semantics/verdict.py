"""What a probe says of a library."""

from __future__ import annotations

from typing import Final

import msgspec

RIGHT: Final = "right"
ARGUABLE: Final = "arguable"
WRONG: Final = "wrong"
HANG: Final = "hang"

MARKS: Final = {RIGHT: "✓", ARGUABLE: "~", WRONG: "✗", HANG: "✗✗"}
"""From best to worst, and how each is written in a table."""


class Verdict(msgspec.Struct, frozen=True):
    """What happened, in a word or two, and what to think of it by the probe's rule.

    Attributes:
        mark: One of `MARKS`.
        word: What stands in the table.
        detail: The rest of what was seen, for whoever doubts it.
        misled: Callers who got an answer that was not theirs.
        seconds: How long the probe took.
    """

    mark: str
    word: str
    detail: str = ""
    misled: int = 0
    seconds: float = 0.0

    @property
    def cell(self) -> str:
        return f"{MARKS[self.mark]} {self.word}"
