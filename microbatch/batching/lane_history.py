"""What lanes learn, kept beyond their life and without any text."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from microbatch.batching.economics import LaneEconomics
from microbatch.lru import LRU

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from microbatch.batching.overhead import PromptOverhead
    from microbatch.messages import Usage

_RANK_AFTER = 32
"""Answers after which their percentile is worked out anew, unless a longer one comes first."""

_UP, _DOWN = 0.5, 0.05

_APART = 500
"""Requests that go alone once combining has cost more than it saved, before it is tried again."""

_FRUITLESS = 2
"""Fruitless combined replies in a row after which requests go alone."""

_BATCHES_ON_TRIAL = 7
"""Batches that a lane gets credit for when it is tried again: three more bad ones are enough to give up."""


class LaneHistory(msgspec.Struct):
    """What a lane has learned, kept beyond its life without any text.

    Attributes:
        batch_size: Most requests of a batch, halved when replies are damaged or cut off by the token limit; None until then.
        max_line_tokens: Most tokens of a batch's lines, lowered when a prompt was refused for its size; None until then. It does
            not grow back: a context window does not either.
        answers: Tokens of the latest answers.
        answer_tokens: Their 95th percentile, as of the latest ranking.
        answer_mean: Their mean, as of the latest ranking.
        thought: Tokens of the latest combined reply that went into thoughts. They do not grow with the batch.
        thinking: The part of that reply that they were, from 0 to 1.
        unranked: Answers recorded since.
        single_tokens: What all but the longest single replies took lately; None until the first.
        overhead: What surrounds its requests, measured on the first batch, or None.
        shared_tokens: Tokens of the messages its requests share, or None where nobody counts them.
        prompt_scale: The endpoint's count of combined prompts over ours.
        economics: What combining has cost and saved lately.
        apart: Requests that still go alone before combining is tried again, because it cost more than it saved.
        parted: How often that was so.
        revised: Whether anything has changed since the lane's budget was worked out.
        alone: Requests in a row that were too long, or not cheaper, to travel with others.
        drafts: Whether a reply has shown that its first answers may be drafts, so that none is handed out before its end.
        proven: Whether a combined reply was of use and ended where it should have.
        fruitless: Combined replies in a row that were of no use: without one sound element, or of a model that did not stop.
        doubled: Whether the bound on combined replies is twice what it would be, because it was too low.
        reasons: Whether the model reasons although it was told not to.
        affordable: The most tokens of a reply that the account's credit pays for; None until a call was refused for it.
        per_minute: Tokens allowed a minute, as a refusal has told; None until then. The bound is no longer generous from then on.
    """

    batch_size: int | None = None
    max_line_tokens: int | None = None
    answers: deque[int] = msgspec.field(default_factory=lambda: deque(maxlen=64))
    answer_tokens: int = 32
    answer_mean: float = 32.0
    thought: int = 0
    thinking: float = 0.0
    unranked: int = _RANK_AFTER
    single_tokens: float | None = None
    overhead: PromptOverhead | None = None
    shared_tokens: int | None = None
    prompt_scale: float = 1.0
    economics: LaneEconomics = msgspec.field(default_factory=LaneEconomics)
    apart: int = 0
    parted: int = 0
    revised: bool = False
    alone: int = 0
    drafts: bool = False
    proven: bool = False
    fruitless: int = 0
    doubled: bool = False
    reasons: bool = False
    affordable: int | None = None
    per_minute: int | None = None

    def record_answers(self, tokens: Sequence[int]) -> None:
        """Learn from the answers of one reply, in tokens each."""
        self.answers.extend(tokens)
        self.unranked += len(tokens)
        if self.unranked < _RANK_AFTER and max(tokens) <= self.answer_tokens:
            return
        self.unranked = 0
        ranked = sorted(self.answers)
        self.answer_mean = sum(ranked) / len(ranked)
        longest = max(1, ranked[min(len(ranked) - 1, len(ranked) * 95 // 100)])
        if longest != self.answer_tokens:  # the budget is worked out from it
            self.answer_tokens = longest
            self.revised = True

    def record_thinking(self, usage: Usage) -> None:
        """Learn how much of a combined reply went into thoughts."""
        part = usage.reasoning_tokens / max(1, usage.completion_tokens)
        if part != self.thinking:
            self.thought, self.thinking = usage.reasoning_tokens, part
            self.revised = True

    @property
    def written(self) -> int:
        """The 95th percentile of answers without their shares of thoughts, in tokens."""
        return max(1, math.ceil(self.answer_tokens * (1 - self.thinking)))

    def reply_tokens(self, items: int) -> int:
        """Return the tokens that a reply to *items* is likely to take at most, by those that were seen."""
        return items * self.written + self.thought

    def record_single(self, tokens: int) -> None:
        """Learn from a single reply, whose tokens are not those of an answer among others: think of reasoning."""
        known = tokens if self.single_tokens is None else self.single_tokens
        # Up fast and down slowly: so it stays above most of them.
        self.single_tokens = known + (tokens - known) * (_UP if tokens > known else _DOWN)

    def shrink(self, tokens: int) -> None:
        """A prompt with *tokens* in its lines was refused for its size: send half as much from now on."""
        half = tokens // 2
        self.max_line_tokens = half if self.max_line_tokens is None else min(half, self.max_line_tokens)
        self.revised = True

    def parts(self, *, mended: bool) -> bool:
        """Return whether combining is of no use, or costs more than it saves, and requests do not go alone yet.

        Args:
            mended: Whether what the latest reply left open has been asked again, so that the costs are complete.
        """
        return not self.apart and (self.fruitless >= _FRUITLESS or (mended and self.economics.lost))

    def part(self) -> None:
        """Send requests alone for a while. A single fruitless reply after that is enough to do so again."""
        self.apart = _APART
        self.parted += 1
        self.revised = True

    def go_alone(self) -> bool:
        """Return whether a request goes alone for that reason; the last one ends the while, and combining is on trial."""
        if not self.apart:
            return False
        self.apart -= 1
        if not self.apart:
            self.economics = LaneEconomics(batches=_BATCHES_ON_TRIAL)
            self.fruitless = min(self.fruitless, _FRUITLESS - 1)
            self.revised = True
        return True

    def halve(self, asked: int) -> None:
        """A reply to *asked* requests was damaged or cut off by the token limit: ask for half as many from now on.

        At least for two: from requests that go alone nothing is learned, and the lane would never grow again. Where two are too
        many, `economics` tells.
        """
        self.batch_size = max(2, min(asked, self.batch_size or asked) // 2)
        self.revised = True

    def grow(self, asked: int, limit: int) -> None:
        """A reply to *asked* requests was complete: if that was a full batch of a halved lane, allow one more."""
        if self.batch_size is not None and asked >= self.batch_size:
            self.batch_size = self.batch_size + 1 if self.batch_size + 1 < limit else None
            self.revised = True


class LaneHistories:
    """What lanes have learned, under a digest of their key, for the 1,024 used last."""

    def __init__(self, size: int = 1_024) -> None:
        self._histories: LRU[bytes, LaneHistory] = LRU(size)

    def of(self, key: Hashable) -> LaneHistory:
        """Return what is known of the lane with *key*; the same object as long as it is remembered."""
        digest = hashlib.blake2b(repr(key).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        return self._histories.get_or_make(digest, LaneHistory)
