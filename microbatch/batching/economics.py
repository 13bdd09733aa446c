"""Whether combining pays, by what surrounds an item and what has been paid so far. Pure arithmetic, in tokens' worth of money.

Of n requests one by one each pays the shared messages; together they pay them once, and the wrapper, and a frame around each
item in prompt and reply. A generated token weighs `ratio` prompt tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from microbatch.batching.overhead import PromptOverhead

UNKNOWN_RATIO = 4.0
"""Price of a generated token in prompt tokens where no price is known; 4 to 5 is usual in 2026."""

# Until a lane's first batch has been measured: the id, its brackets and the quotes of an item's line; the id, the member names and
# the braces of an element; the array around them. Measured on the bundled catalogue.
_LINE = 9.0
_ELEMENT = 11.0
_WRAPPER = 5.0  # of a single reply whose answer is no object, which a combined one does without
_REPLY = 7.0

_FORGET = 0.95
"""What a batch leaves of the weight of those before it: about the last twenty count."""

_ENOUGH = 10
"""Batches after which it can be told whether asking again costs more than combining saves."""

_SMALL_SAVING = 0.1
"""Where combining saves less than this part, or is meant to cost more, asking again may cost as much before it is given up."""


def pays(
    items: int, *, apart: float, together: float, wrapped: bool, overhead: PromptOverhead | None, ratio: float
) -> bool:
    """Return whether *items* cost less together than one by one.

    Args:
        items: How many they are.
        apart: Tokens of a single prompt without its own text, by our own count.
        together: Tokens of a combined prompt without its lines, by our own count.
        wrapped: Whether a single reply wraps the answer in an object.
        overhead: What was measured on the lane, which then counts instead; or None.
        ratio: Price of a generated token in prompt tokens.
    """
    if overhead is None:
        once, line, reply, element = together, _LINE, _REPLY, _ELEMENT - wrapped * _WRAPPER
    else:
        apart, once, line, reply, element = (
            overhead.alone_prompt,
            overhead.batch_prompt,
            overhead.line,
            overhead.reply,
            overhead.element,
        )
    return items * apart > once + items * line + ratio * (reply + items * element)


class LaneEconomics(msgspec.Struct):
    """What a lane's combined calls have cost lately, asking again included, against single calls.

    Attributes:
        batches: How many there were.
        combined: Weight of the combined calls.
        mending: Weight of the calls that asked again for what they left open.
        alone: What single calls would have weighed for what was answered.
        items: Requests they carried.
        calls: Calls made for them.
    """

    batches: int = 0
    combined: float = 0.0
    mending: float = 0.0
    alone: float = 0.0
    items: float = 0.0
    calls: float = 0.0

    def begin(self, items: int) -> None:
        """A combined call of *items* is being made."""
        self.batches += 1
        self.combined *= _FORGET
        self.mending *= _FORGET
        self.alone *= _FORGET
        self.items = self.items * _FORGET + items
        self.calls = self.calls * _FORGET + 1

    @property
    def lost(self) -> bool:
        """Whether asking again has eaten up what combining saves, in money or in calls."""
        if self.batches < _ENOUGH:
            return False
        # Where combining costs more by itself, that is the caller's choice; it is about what damage adds to it.
        saving = max(self.alone - self.combined, self.alone * _SMALL_SAVING)
        return self.calls >= self.items or self.mending > saving > 0
