"""The bound on a combined reply: how many tokens it may take at most where no caller has set `max_tokens`.

Without one, a model that does not stop writes up to its context window, and every token is paid. The bound is three times what is
expected, so that a reply in order does not meet it. Endpoints check it before they generate, against limits that differ by model
and account; those are learned here from what they say when they refuse.

A reply that ends at the bound is judged:

- The model reasons (it reported reasoning, or carried a thought, or ended without any content): the bound is lifted for the model,
  and the same requests are asked again at once.
- It was in order and not past the requests asked for: answers are longer than expected. The lane's bound is doubled, once.
- It is as long as the model, its context window or the account allow: batches are too large, and get smaller as they always have.
- Otherwise the model has run away. The bound stays, and the reply speaks against combining.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from microbatch.batching.models import (
    REASONING_ALLOWANCE,
    asked_reasoning,
    output_limit,
    reasoning_budget,
    reasons_by_name,
)
from microbatch.lru import LRU
from microbatch.prompt.canary import CANARY_ANSWER_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from microbatch.batching.lane_history import LaneHistory
    from microbatch.messages import TokenLimits
    from microbatch.prompt.outcome import CallOutcome
    from microbatch.protocols import Completion
    from microbatch.schema.answer_type import AnswerType

LEAST: Final = 256
"""Tokens that every combined reply may take."""

FRAME: Final = 16
"""Tokens around an answer: the id, the names of members, the braces."""

UNKNOWN_ANSWER: Final = 256
"""Expected of an answer that its schema does not bound, until the endpoint has reported some."""

QUOTA_SHARE: Final = 4
"""A call is charged at most this part of the tokens allowed a minute, so that one long reply does not keep all others waiting."""

_FACTOR: Final = 3
_CLOSE_FACTOR: Final = 1.5
"""Put on what replies took, where tokens a minute have run out."""

_LONGER: Final = 1.25
"""By how much a bound must have grown for asking again to be worth it."""

_MODELS: Final = 256


class Asked(Protocol):
    """The common part of requests that decides the length of their answers; see `Spec` and `Options`."""

    @property
    def model(self) -> str | None:
        """Whom they ask; None for the transport's model."""
        ...

    @property
    def answer(self) -> AnswerType:
        """The shape of an answer."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """Most tokens of an answer as callers have set it, or None."""
        ...

    @property
    def params(self) -> Mapping[str, Any]:
        """Further request fields."""
        ...


class ModelLimits(msgspec.Struct):
    """The limits and habits of one model, as far as they are known.

    Attributes:
        output: The most tokens it generates, None if that is not known.
        context: Its context window in tokens, None if that is not known.
        reasons: Whether it reasons unless it is told not to.
        unbounded: Whether its calls go without a bound: the transport does not send it, or the endpoint refuses any.
        accepted: The largest bound that a call was answered with.
        trying: Calls under way whose bound is larger.
    """

    output: int | None = None
    context: int | None = None
    reasons: bool = False
    unbounded: bool = False
    accepted: int = 0
    trying: int = 0


class Bounds:
    """Works out the bounds of combined replies, and learns from how they end.

    Args:
        default_model: The transport's model, for calls that name none.
        canary: Whether each batch has a canary as well.
    """

    def __init__(self, default_model: str | None = None, *, canary: bool = False) -> None:
        self._default_model = default_model
        self._canary_tokens = CANARY_ANSWER_TOKENS if canary else 0
        self._models: LRU[str | None, ModelLimits] = LRU(_MODELS)

    def of(self, model: str | None) -> ModelLimits:
        """Return what is known of *model*, None for the transport's; the same object as long as it is remembered."""
        name = model or self._default_model
        return self._models.get_or_make(
            model, lambda: ModelLimits(output=output_limit(name), reasons=reasons_by_name(name))
        )

    def bound(
        self, spec: Asked, history: LaneHistory, items: int, *, prompt: Callable[[], int], quota: int | None
    ) -> int | None:
        """Return the most tokens that a combined reply may take; None for no bound of ours.

        Args:
            spec: What its *items* have in common.
            history: What is known of their lane.
            items: How many they are.
            prompt: Returns the tokens of the prompt, no fewer than there are. It is asked only if they matter.
            quota: Tokens a minute that the account may use, or None for no limit.
        """
        model = self.of(spec.model)
        if spec.max_tokens is not None or model.unbounded:
            return None
        tokens = self.wanted(spec, history, items)
        for limit in (model.output, history.affordable):
            tokens = tokens if limit is None else min(tokens, limit)
        quota = _lower(quota, history.per_minute)
        if quota is not None:
            share = quota // QUOTA_SHARE - prompt()
            if share < LEAST:  # the prompt alone takes nearly as much; then it is the answers that count
                share = min(items * self._each(spec, history), quota - prompt())
            tokens = min(tokens, share)
        if model.context is not None:
            tokens = min(tokens, model.context - prompt())
        return tokens if tokens > 0 else None

    def wanted(self, spec: Asked, history: LaneHistory, items: int) -> int:
        """Return the bound that a combined reply to *items* would have if nothing limited it."""
        if history.per_minute is not None and history.answers:
            # What a bound reserves and the reply does not use keeps other calls waiting; the length of earlier replies is known here.
            seen = math.ceil(_CLOSE_FACTOR * history.reply_tokens(items)) + self._canary_tokens
            return max(LEAST, seen) * (1 + history.doubled)
        tokens = max(LEAST, _FACTOR * (items * self._each(spec, history) + self._canary_tokens))
        return (tokens + self._thought(spec, history)) * (1 + history.doubled)

    def tried(self, spec: Asked, history: LaneHistory, items: int, bound: int | None) -> tuple[int | None, bool]:
        """Return the bound to send instead of *bound*, and whether it is larger than any that was accepted.

        Only one call at a time tries a larger bound, as long as that which was accepted is likely to do: an endpoint may have a
        limit that nobody knows of, and refuses all calls that are under way when it is found.
        """
        model = self.of(spec.model)
        if bound is None or bound <= model.accepted:
            return bound, False
        least = math.ceil(_LONGER * history.reply_tokens(items))
        if not history.answers:
            least = self.wanted(spec, history, items) * (2 if history.doubled else 1) // _FACTOR
        if model.trying and model.accepted >= least:
            return model.accepted, False
        return bound, True

    def _each(self, spec: Asked, history: LaneHistory) -> int:
        """Return the tokens expected of one element."""
        expected = spec.answer.expected_tokens
        if expected is None:
            expected = 2 * history.written if history.answers else UNKNOWN_ANSWER
        return FRAME + expected

    def _thought(self, spec: Asked, history: LaneHistory) -> int:
        """Return the tokens granted for what a reasoning model thinks, which are no more for a larger batch."""
        asked = asked_reasoning(spec.params) if spec.params else None
        if not (history.reasons or asked or (asked is None and self.of(spec.model).reasons)):
            return 0
        return max(REASONING_ALLOWANCE, reasoning_budget(spec.params), 2 * history.thought)

    # --- what is learned

    def refused(self, spec: Asked, history: LaneHistory, said: TokenLimits) -> None:
        """Learn from what an endpoint said of tokens when it refused a bound."""
        model = self.of(spec.model)
        model.output = _lower(model.output, said.completion)
        model.context = model.context if said.context is None else said.context
        history.affordable = said.affordable if said.affordable is not None else history.affordable
        history.per_minute = said.per_minute if said.per_minute is not None else history.per_minute
        history.revised = True

    def judge(
        self,
        spec: Asked,
        history: LaneHistory,
        outcome: CallOutcome,
        completion: Completion | None,
        fresh: Callable[[], int | None],
    ) -> None:
        """Judge how a combined call has ended, in *outcome* and in what is known of its lane and model.

        Args:
            spec: What its requests had in common.
            history: What is known of their lane.
            outcome: How it ended.
            completion: How the endpoint ended it; None if it did not.
            fresh: Returns the bound that the call would have by what is known now.
        """
        sent = None if completion is None else completion.bound
        if completion is not None:
            self._note(spec, history, outcome, completion)
        if outcome.ending == "length" and sent is not None and _reached(completion, sent):
            self._at_the_bound(spec, history, outcome, sent, fresh)
        outcome.runaway |= outcome.past_the_end and outcome.ending != "complete"
        if outcome.again:
            return
        good = outcome.sound and not outcome.runaway
        if good and not history.proven:
            history.proven = history.revised = True
        if outcome.runaway or outcome.ending == "complete" or (outcome.ending == "length" and sent is not None):
            history.fruitless = 0 if good else history.fruitless + 1

    def _note(self, spec: Asked, history: LaneHistory, outcome: CallOutcome, completion: Completion) -> None:
        """Learn from a reply what it shows of its model."""
        model, sent = self.of(spec.model), completion.bound
        if sent is not None:
            model.accepted = max(model.accepted, sent)
        elif outcome.bounded:
            model.unbounded = True
        thought = completion.thought or (completion.usage is not None and completion.usage.reasoning_tokens > 0)
        if thought or (outcome.ending == "length" and sent is not None and not outcome.heard):
            if asked_reasoning(spec.params) is False:
                history.reasons = True  # what it was told not to do; with other parameters it may be another matter
            else:
                model.reasons = True

    def _at_the_bound(
        self, spec: Asked, history: LaneHistory, outcome: CallOutcome, sent: int, fresh: Callable[[], int | None]
    ) -> None:
        """Judge a reply that has ended at our bound."""

        def longer() -> bool:
            bound = fresh()
            return bound is None or bound >= sent * _LONGER

        if outcome.past_the_end or not outcome.in_order or (outcome.heard and not outcome.sound):
            outcome.runaway = True
            return
        if longer():
            outcome.again = True  # the bound has been lifted since, by this reply or by another
        elif not history.doubled:
            history.doubled = True
            outcome.again = longer()
            history.doubled = outcome.again
        if not outcome.again:
            limited = fresh()
            # As long as it can be: the batch is too large. With room left, twice what was expected was not enough.
            outcome.runaway = limited is not None and limited >= self.wanted(spec, history, outcome.asked)


def _reached(completion: Completion | None, bound: int) -> bool:
    """Return whether a reply that ended in "length" can have done so at *bound*: not if it reports far fewer tokens."""
    usage = None if completion is None else completion.usage
    return usage is None or usage.completion_tokens <= 0 or 2 * usage.completion_tokens >= bound


def _lower(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)
