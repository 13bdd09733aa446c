"""A model that answers otherwise in a combined prompt than alone, and a batcher that audits all it can."""

from __future__ import annotations

import itertools

from helpers import ask, batcher_for, submit_all

import microbatch as mb
from microbatch.testing import ScriptedTransport

LONG = "in many words " * 10


class TwoMinds(ScriptedTransport):
    """Answers by the first word of an item: "worse" items are wrong in combined prompts, "noisy" ones never the same twice, and "long"
    ones cannot be compared; all others are sound."""

    def __init__(self, **options):
        self._number = itertools.count()
        self.together = False
        super().__init__(answer=self._say_so, **options)

    def _say_so(self, text):
        if text.startswith("worse") and self.together:
            return "WRONG"
        if text.startswith("noisy"):
            return f"NOISE {next(self._number)}"
        return text.upper() + (LONG if text.startswith("long") else "")

    def _usual(self, received):
        self.together = received.combined
        return super()._usual(received)


def audited_batcher(transport, *, policy=None, **options):
    """Return a batcher whose batches of two are all audited."""
    policy = mb.AuditPolicy(**{"rate": 1.0, "max_excess": 0.1, "adapt": False, **(policy or {})})
    return batcher_for(transport, audit=policy, **{"idle": "wait", "max_batch_size": 2, **options})


async def ask_pairs(batcher, word, pairs, **options):
    """Ask items that begin with *word* in batches of two, and wait for the audits."""
    replies = []
    for pair in range(pairs):
        replies += await submit_all(batcher, [f"{word} {pair} {item}" for item in "ab"], **options)
    await batcher.audits.settled()
    return replies


__all__ = ["LONG", "TwoMinds", "ask", "ask_pairs", "audited_batcher"]
