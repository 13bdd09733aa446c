"""What lanes learn, kept beyond their life and without any text."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from microbatch.batching.framing import Framing

_RANK_AFTER = 32
"""Answers after which their percentile is worked out anew, unless a longer one comes first."""


class Learned(msgspec.Struct):
    """What a lane has learned, kept beyond its life without any text.

    Attributes:
        batch_size: Most requests of a batch, halved when replies are cut off by the token limit; None until then.
        answers: Tokens of the latest answers.
        answer_tokens: Their 95th percentile, as of the latest ranking.
        unranked: Answers recorded since.
        framing: What surrounds its requests, measured on the first batch, or None.
        revised: Whether the batch size or the percentile has changed since the lane's budget was worked out.
        alone: Requests in a row that were too long to travel with others.
    """

    batch_size: int | None = None
    answers: deque[int] = msgspec.field(default_factory=lambda: deque(maxlen=64))
    answer_tokens: int = 32
    unranked: int = _RANK_AFTER
    framing: Framing | None = None
    revised: bool = False
    alone: int = 0

    def record_answers(self, tokens: Sequence[int]) -> None:
        """Learn from the answers of one reply, in tokens each."""
        self.answers.extend(tokens)
        self.unranked += len(tokens)
        if self.unranked < _RANK_AFTER and max(tokens) <= self.answer_tokens:
            return
        self.unranked = 0
        ranked = sorted(self.answers)
        self.answer_tokens = max(1, ranked[min(len(ranked) - 1, len(ranked) * 95 // 100)])
        self.revised = True

    def halve(self, asked: int) -> None:
        """A reply to *asked* requests was cut off by the token limit: ask for half as many from now on."""
        self.batch_size = max(1, min(asked, self.batch_size or asked) // 2)
        self.revised = True

    def grow(self, asked: int, limit: int) -> None:
        """A reply to *asked* requests was complete: if that was a full batch of a halved lane, allow one more."""
        if self.batch_size is not None and asked >= self.batch_size:
            self.batch_size = self.batch_size + 1 if self.batch_size + 1 < limit else None
            self.revised = True


class Memory:
    """What lanes have learned, under a digest of their key, for the 1,024 used last."""

    def __init__(self, size: int = 1_024) -> None:
        self._size = size
        self._learned: OrderedDict[bytes, Learned] = OrderedDict()

    def of(self, key: Hashable) -> Learned:
        """Return what is known of the lane with *key*; the same object as long as it is remembered."""
        digest = hashlib.blake2b(repr(key).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        learned = self._learned.get(digest)
        if learned is None:
            learned = self._learned[digest] = Learned()
            if len(self._learned) > self._size:
                self._learned.popitem(last=False)
        else:
            self._learned.move_to_end(digest)
        return learned
