"""Limits on one batch of a lane."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from microbatch.batching.bounds import QUOTA_SHARE
from microbatch.batching.ticket import FlushReason
from microbatch.prompt.compose import output_reserve

if TYPE_CHECKING:
    from microbatch.batching.estimates import Estimates
    from microbatch.batching.lane_history import LaneHistory
    from microbatch.batching.ticket import Spec
    from microbatch.policy import FlushPolicy


class Budget(msgspec.Struct, frozen=True, gc=False):
    """The limits of one batch of a lane.

    Attributes:
        size: Most requests.
        tokens: Most tokens of the items' lines, ids included.
        size_reason: What binds the size: SIZE, or OUTPUT when the expected reply does.
    """

    size: int
    tokens: int
    size_reason: FlushReason = FlushReason.SIZE


def batch_budget(
    policy: FlushPolicy, estimates: Estimates, spec: Spec, history: LaneHistory, quota: int | None = None
) -> Budget:
    """Return the budget of the lane with *spec*, by the policy and the lane's history.

    *quota* is the most tokens that one call can be charged, prompt and answers together; None for no limit.
    """
    model = estimates.model(spec)
    reserve = output_reserve(spec.max_tokens) if spec.max_tokens else history.written
    limits = [policy.max_output_tokens]
    if spec.max_tokens is None:
        limits += [limit for limit in (model.output, history.affordable) if limit is not None]
    by_output = max(1, min(limits) // reserve)
    size = min(policy.max_batch_size, history.batch_size or policy.max_batch_size)
    preamble, tokens = estimates.preamble_tokens(spec.answer), policy.max_batch_tokens
    if policy.max_prompt_tokens is not None:
        shared = "".join(str(message["content"]) for message in spec.shared)
        tokens = min(tokens, policy.max_prompt_tokens - estimates.tokens_of(shared))
    tokens -= preamble
    around = (history.shared_tokens or 0) + preamble + (history.thought if spec.max_tokens is None else 0)
    for window in _windows(model.context, spec, history, quota, around + 4 * reserve):
        left = window - around
        size = max(1, min(size, left // (2 * reserve)))  # half of a small one for the answers
        tokens = min(tokens, left - size * reserve)
    if history.max_line_tokens is not None:
        tokens = min(tokens, history.max_line_tokens)
    if history.suspended_for:
        return Budget(1, tokens)
    if by_output < size:
        return Budget(by_output, tokens, FlushReason.OUTPUT)
    return Budget(size, tokens)


def _windows(context: int | None, spec: Spec, history: LaneHistory, quota: int | None, least: int) -> list[int]:
    """Return the limits on prompt and reply of one call together: the context window, and a part of the quota.

    The part is what one call may be charged at most, unless that is less than *least* tokens, or callers have set the length of
    their answers: then it is the whole quota.
    """
    windows = [] if context is None or spec.max_tokens is not None else [context]
    quotas = [limit for limit in (quota, history.per_minute) if limit is not None]
    if quotas:
        share = min(quotas) // QUOTA_SHARE
        windows.append(share if spec.max_tokens is None and share >= least else min(quotas))
    return windows
