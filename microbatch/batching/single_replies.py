"""The tokens of a lane's single replies, and so those that the answers of its combined replies would have taken one by one.

That is calculated from what surrounds the requests of a combined call (see `PromptOverhead`), as if a model wrote the same answer in
the same way when it is asked alone. Some do not: they indent, explain, or think. So the calculation is compared with single replies of
the same lane, of whatever reason, and replaced by their means once these differ by more than chance.
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from microbatch.batching.overhead import PromptOverhead
    from microbatch.messages import Usage

_ENOUGH: Final = 8
"""Single replies, and answers of combined replies, from which on the two are compared."""

_FORGET: Final = 1 - 1 / 64
"""The weight that each single reply leaves to those before it."""

_ERRORS: Final = 4.0
"""Standard errors that chance does not explain: the comparison is repeated with every call."""


class Pairs(msgspec.Struct, gc=False):
    """Sums over pairs of a number of bytes and one of tokens, of which the latest count most."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0

    def add(self, x: float, y: float) -> None:
        """Add a pair."""
        self.weight = self.weight * _FORGET + 1
        self.x = self.x * _FORGET + x
        self.y = self.y * _FORGET + y
        self.xx = self.xx * _FORGET + x * x
        self.xy = self.xy * _FORGET + x * y
        self.yy = self.yy * _FORGET + y * y

    def differs(self, bytes_each: float, others: int) -> bool:
        """Return whether their mean of bytes differs from *bytes_each*, the mean of *others*, by more than chance."""
        mean = self.x / self.weight
        variance = max(0.0, self.xx / self.weight - mean * mean)
        return abs(mean - bytes_each) > _ERRORS * sqrt(variance * (1 / self.weight + 1 / others))

    def tokens_at(self, bytes_each: float | None, others: int) -> tuple[float, float]:
        """Return the tokens that *others* of *bytes_each* take on average, and how much of that may be chance.

        The tokens follow the regression line, so that it matters little which few pairs there are; None for the mean of all pairs.
        """
        n = self.weight
        x, y = self.x / n, self.y / n
        spread, product = max(0.0, self.xx / n - x * x), self.xy / n - x * y
        slope, away = 0.0, 0.0
        if bytes_each is not None and spread > 0:
            slope, away = product / spread, (bytes_each - x) ** 2 / spread
        variance = max(0.0, self.yy / n - y * y - slope * product)
        mean = y if bytes_each is None else y + slope * (bytes_each - x)
        return mean, _ERRORS * sqrt(variance * ((1 + away) / n + 1 / others))


class SingleReplies(msgspec.Struct):
    """The single replies of one lane.

    Attributes:
        seen: How many there were.
        compared: How many of them were compared with combined replies.
        prompts: The bytes of each request's line, and the prompt tokens of its call.
        replies: The bytes of each answer, and the completion tokens of its call.
        longer: Whether the answers have differed in length from those of combined replies.
        other_prompts: Whether the prompts have taken other tokens than calculated, so that theirs count from then on.
        other_replies: The same of the replies.
    """

    seen: int = 0
    compared: int = 0
    prompts: Pairs = msgspec.field(default_factory=Pairs)
    replies: Pairs = msgspec.field(default_factory=Pairs)
    longer: bool = False
    other_prompts: bool = False
    other_replies: bool = False

    def record(self, usage: Usage, line_bytes: int, answer_bytes: int) -> None:
        """Record that a single call took *usage* for a request whose line has *line_bytes*, and gave an answer of *answer_bytes*."""
        self.seen += 1
        self.prompts.add(line_bytes, usage.prompt_tokens)
        self.replies.add(answer_bytes, usage.completion_tokens)

    def correct(self, overhead: PromptOverhead) -> Usage | None:
        """Correct *overhead* by what single replies took.

        Returns:
            The tokens that the earlier answers of combined replies would have taken beyond what was booked for them, negative ones if
            less; None before there are enough replies to compare.
        """
        booked = overhead.booked
        answers = booked.answers
        if self.seen < _ENOUGH or answers < _ENOUGH:
            return None
        self.compared = self.seen
        tokens, chance = self.prompts.tokens_at(booked.line_bytes / answers, answers)
        alone_prompt = tokens - booked.texts / answers
        self.other_prompts = self.other_prompts or abs(alone_prompt - overhead.alone_prompt) > chance
        if self.other_prompts:
            overhead.alone_prompt = alone_prompt
        bytes_each = booked.answer_bytes / answers
        self.longer = self.longer or self.replies.differs(bytes_each, answers)
        tokens, chance = self.replies.tokens_at(None if self.longer else bytes_each, answers)
        extra = tokens - (booked.elements / answers - overhead.element)
        self.other_replies = self.other_replies or abs(extra) > chance
        if self.other_replies:
            overhead.extra = extra
        return booked.missing(overhead.alone_prompt, overhead.element - overhead.extra)
