"""How much one batch of a lane may hold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from microbatch.batching.bounds import QUOTA_SHARE
from microbatch.batching.ticket import FlushReason
from microbatch.prompt.canary import CANARY_TOKENS
from microbatch.prompt.compose import instruction

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.batching.bounds import Bounds
    from microbatch.batching.lane_history import LaneHistory
    from microbatch.batching.ticket import Spec
    from microbatch.policy import FlushPolicy
    from microbatch.schema.answer_type import AnswerType

MAX_COUNTED_CHARS = 16_384
"""A longer text is not tokenized on the event loop, which it would hold up."""

_SLICES = 3
_SLICE_CHARS = 4_096
"""What is counted of a text that is longer: its beginning, its middle and its end."""

_PREAMBLES = 256
"""Shapes of answers whose instruction's tokens are remembered."""


class Budget(msgspec.Struct, frozen=True, gc=False):
    """How much one batch of a lane may hold.

    Attributes:
        size: Most requests.
        tokens: Most tokens of the items' lines, ids included.
        size_reason: What binds the size: SIZE, or OUTPUT when the expected reply does.
    """

    size: int
    tokens: int
    size_reason: FlushReason = FlushReason.SIZE


class BatchLimits:
    """Works out the budget of a lane from the policy and from what the lane has learned.

    Args:
        policy: The limits.
        count: Counts a text's tokens.
        bounds: What is known of the limits of models.
        canary: Whether each batch has a canary as well.
    """

    def __init__(
        self, policy: FlushPolicy, count: Callable[[str], int], bounds: Bounds, *, canary: bool = False
    ) -> None:
        self._policy = policy
        self._bounds = bounds
        self._canary_tokens = CANARY_TOKENS if canary else 0
        self._count = count
        self._preambles: dict[str, int] = {}
        self._schemas: dict[str, tuple[int, int]] = {}

    def of(self, spec: Spec, history: LaneHistory, quota: int | None = None) -> Budget:
        """Return the budget of the lane with *spec*.

        Args:
            spec: What its requests have in common.
            history: What is known of it.
            quota: Tokens that one call can be charged at most, prompt and answers together; None for no limit.
        """
        policy, model = self._policy, self._bounds.of(spec.model)
        reserve = output_reserve(spec.max_tokens) if spec.max_tokens else history.written
        limits = [policy.max_output_tokens]
        if spec.max_tokens is None:
            limits += [limit for limit in (model.output, history.affordable) if limit is not None]
        by_output = max(1, min(limits) // reserve)
        size = min(policy.max_batch_size, history.batch_size or policy.max_batch_size)
        tokens = policy.max_batch_tokens
        if policy.max_prompt_tokens is not None:
            shared = "".join(str(message["content"]) for message in spec.shared)
            tokens = min(tokens, policy.max_prompt_tokens - self._tokens_of(shared))
        tokens -= self.preamble_tokens(spec.answer.words)
        around = (history.shared_tokens or 0) + self.preamble_tokens(spec.answer.words)
        around += history.thought if spec.max_tokens is None else 0
        for window in self._windows(spec, history, quota, around + 4 * reserve):
            left = window - around
            size = max(1, min(size, left // (2 * reserve)))  # half of a small one for the answers
            tokens = min(tokens, left - size * reserve)
        if history.max_line_tokens is not None:
            tokens = min(tokens, history.max_line_tokens)
        if history.apart:
            return Budget(1, tokens)
        if by_output < size:
            return Budget(by_output, tokens, FlushReason.OUTPUT)
        return Budget(size, tokens)

    def _windows(self, spec: Spec, history: LaneHistory, quota: int | None, least: int) -> list[int]:
        """Return what prompt and reply of one call have to fit in together: the context window, and a part of the quota.

        Of the quota it is the part that one call may be charged at most, unless that has not *least* tokens: then all of it, as
        where callers have said how long their answers are.
        """
        context = self._bounds.of(spec.model).context
        windows = [] if context is None or spec.max_tokens is not None else [context]
        quotas = [limit for limit in (quota, history.per_minute) if limit is not None]
        if quotas:
            share = min(quotas) // QUOTA_SHARE
            windows.append(share if spec.max_tokens is None and share >= least else min(quotas))
        return windows

    def preamble_tokens(self, words: str) -> int:
        """Return the tokens of our instruction and the canary, counted once for each shape of answer."""
        tokens = self._preambles.get(words)
        if tokens is None:
            if len(self._preambles) >= _PREAMBLES:
                self._preambles.clear()
            tokens = self._preambles[words] = self._tokens_of(instruction(words)) + self._canary_tokens
        return tokens

    def schema_tokens(self, answer: AnswerType) -> tuple[int, int]:
        """Return the tokens of the schemas of a single and of a combined reply, counted once for each shape of answer."""
        tokens = self._schemas.get(answer.words)
        if tokens is None:
            if len(self._schemas) >= _PREAMBLES:
                self._schemas.clear()
            single, combined = (
                0 if schema is None else self._tokens_of(msgspec.json.encode(schema).decode())
                for schema in (answer.single_schema, answer.batch_schema)
            )
            tokens = self._schemas[answer.words] = single, combined
        return tokens

    def _tokens_of(self, text: str) -> int:
        # Counting a huge text would hold up the event loop; its bytes are a bound as good as any.
        return self._count(text) if len(text) <= MAX_COUNTED_CHARS else len(text.encode())


def estimate(text: str, count: Callable[[str], int]) -> int:
    """Return the tokens of *text*; of a long one by slices of it, because counting it all would hold up the event loop."""
    length = len(text)
    if length <= MAX_COUNTED_CHARS:
        return count(text)
    step = (length - _SLICE_CHARS) // (_SLICES - 1)
    counted = sum(count(text[start : start + _SLICE_CHARS]) for start in range(0, length, step)[:_SLICES])
    return round(counted * length / (_SLICES * _SLICE_CHARS))


def output_reserve(max_tokens: int) -> int:
    """Return the tokens to reserve in a combined reply for an answer of at most *max_tokens*: that, JSON escapes, and framing."""
    return math.ceil(1.2 * max_tokens) + 16
