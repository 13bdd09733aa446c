"""The bound on a combined reply: how many tokens it may take at most.

Without a bound, a model that does not stop writes up to its context window, and every token is paid for. Where callers have set
`max_tokens`, the bound is what they allow together. Otherwise it is three times the expected length, so that a proper reply does not
reach it. Endpoints check it before they generate, against limits that differ by model and account; those are learned here from
refusals.

A reply that ends at a bound which no caller has set is judged:

- The model reasons (it reported reasoning, or the reply carried a thought, or ended without any content): the bound is lifted for
  the model, and the same requests are asked again at once.
- The reply was in order and not past the requests asked for: answers are longer than expected. The lane's bound is doubled, once.
- The reply is as long as the model, its context window or the account allow: batches are too large, and get smaller.
- Otherwise the model has run away. The bound stays, and the reply counts against combining.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.lru import LRU
from microbatch.prompt.compose import CANARY_ANSWER_TOKENS, LARGEST_SUM, limits_together, output_reserve

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from microbatch.batching.lane_history import LaneHistory
    from microbatch.messages import TokenLimits
    from microbatch.prompt.codec import Settings
    from microbatch.prompt.outcome import CallOutcome
    from microbatch.protocols import Completion

LEAST: Final = 256
"""Tokens that every combined reply may take."""

FRAME: Final = 16
"""Tokens around an answer: the id, the names of members, the braces."""

UNKNOWN_ANSWER: Final = 256
"""Tokens expected of an answer that its schema does not bound, until the endpoint has reported some."""

QUOTA_SHARE: Final = 4
"""A call is charged at most this part of the tokens allowed a minute, so that one long reply does not delay all others."""

_FACTOR: Final = 3
_CLOSE_FACTOR: Final = 1.5
"""Put on the length of earlier replies, where tokens a minute have run out."""

_LONGER: Final = 1.25
"""The least growth of a bound for which asking again is worth it."""

_MODELS: Final = 256

# Of models, by their names and parameters. Names are compared in lower case and without the part before the last slash
# ("openai/gpt-5-mini" is "gpt-5-mini"). What is missing or wrong here is learned from the endpoint's replies and refusals.

REASONING_MODELS: Final = (
    r"o[134](?:-|$)",  # OpenAI
    r"gpt-5(?!.*chat)",
    r"gpt-oss",
    r"codex-mini",
    r"deepseek-(?:reasoner|r\d)",
    r".*\br1\b",  # DeepSeek's distilled models and others trained like them
    r"qwq",
    r"qwen3(?!.*(?:instruct|coder|embedding))",
    r"gemini-(?:2\.5|[3-9])",
    r"grok-(?:3-mini|[4-9])(?!.*non-reasoning)",
    r"kimi-k2-thinking",
    r"glm-(?:4\.[5-9]|z1|[5-9])",
    r"minimax-m\d",
    r"magistral",
    r"seed-oss",
    r"ernie-x\d",
    r"hunyuan-(?:t1|a13b)",
    r"exaone-deep",
    r"nemotron.*(?:ultra|super|nano)",
    r"sonar-(?:reasoning|deep)",
    r".*(?<!non-)(?<!no-)(?:reasoning|reasoner|thinking)",
)
"""Regular expressions that match the beginnings of the names of models that reason unless they are told not to."""

OUTPUT_LIMITS: Final = (
    (r"gpt-3\.5|gpt-4-turbo|gpt-4-\d{4}-(?:preview|vision)|gpt-4-vision|gpt-4o-2024-05-13", 4_096),
    (r"gpt-4(?:-\d{4}|-32k|$)", 8_192),
    (r"gpt-4o|gpt-5.*chat", 16_384),
    (r"gpt-4\.1", 32_768),
    (r"gpt-5", 128_000),
    (r"o1-preview", 32_768),
    (r"o1-mini", 65_536),
    (r"o[134](?:-|$)", 100_000),
    (r"claude-3-(?:opus|sonnet|haiku)", 4_096),
    (r"claude-3[-.]5", 8_192),
    (r"claude-(?:3[-.]7|sonnet|haiku)", 64_000),
    (r"claude-opus", 32_000),
    (r"gemini-(?:1\.5|2\.0)", 8_192),
    (r"gemini-(?:2\.5|[3-9])", 65_536),
    (r"deepseek-chat", 8_192),
    (r"deepseek-reasoner", 64_000),
)
"""Regular expressions that match the beginnings of models' names, and the most tokens that those generate; the first match counts."""

UNKNOWN_THOUGHT: Final = 2_000
"""Tokens of thoughts that are expected before any are known."""

REASONING_ALLOWANCE: Final = 16_000
"""Tokens granted to a reasoning model for its thoughts, unless a parameter names more."""

_reasons = re.compile("|".join(REASONING_MODELS)).match
_limits = [(re.compile(pattern).match, limit) for pattern, limit in OUTPUT_LIMITS]

_OFF: Final = frozenset({None, False, "none", "off", "disabled"})
_SWITCHES: Final = ("reasoning", "reasoning_effort", "enable_thinking", "thinking", "think", "enable_reasoning")
_BUDGETS: Final = ("budget_tokens", "thinking_budget")


class ModelLimits(msgspec.Struct):
    """The known and learned limits of one model.

    Attributes:
        output: The most tokens it generates.
        context: Its context window in tokens.
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
    """Works out the bounds of combined replies, and learns from how they end; with a *canary*, each combined prompt ends in one."""

    def __init__(self, default_model: str | None = None, *, canary: bool = False) -> None:
        self._default_model = default_model
        self._canary_tokens = CANARY_ANSWER_TOKENS if canary else 0
        self._models: LRU[str | None, ModelLimits] = LRU(_MODELS)

    def of(self, model: str | None) -> ModelLimits:
        """Return what is known of *model*, None for the transport's; the same object as long as it is remembered."""
        known = self._models.get(model)
        if known is None:
            name = model or self._default_model
            known = self._models.put(model, ModelLimits(output=output_limit(name), reasons=reasons_by_name(name)))
        return known

    def bound(
        self, spec: Settings, history: LaneHistory, items: int, *, prompt: Callable[[], int], quota: int | None
    ) -> int | None:
        """Return the most tokens that a combined reply to *items* may take; None for no bound, or none beside the callers' limits.

        *prompt* returns an upper bound of the prompt's tokens, and is called only if they matter; *quota* is the number of tokens a
        minute that the account may use, None for no limit.
        """
        model = self.of(spec.model)
        if model.unbounded:
            return None
        wanted = tokens = self.wanted(spec, history, items)
        for limit in (model.output, history.affordable):
            tokens = tokens if limit is None else min(tokens, limit)
        quota = _lower(quota, history.per_minute)
        if quota is not None and spec.max_tokens is None:
            share = quota // QUOTA_SHARE - prompt()
            if share < LEAST:  # the prompt alone takes nearly as much; then the answers take what they need
                share = min(items * self._each(spec, history), quota - prompt())
            tokens = min(tokens, share)
        if model.context is not None:
            tokens = min(tokens, model.context - prompt())
        if spec.max_tokens is not None and tokens == wanted <= LARGEST_SUM:
            return None
        return tokens if tokens > 0 else None

    def wanted(self, spec: Settings, history: LaneHistory, items: int) -> int:
        """Return the bound that a combined reply to *items* would have if nothing limited it."""
        allowed = limits_together(spec.max_tokens, items, canary=self._canary_tokens > 0)
        if allowed is not None:
            return allowed
        if history.per_minute is not None and history.answers:
            # Reserved tokens that the reply does not use delay other calls, and the length of earlier replies is known here.
            seen = math.ceil(_CLOSE_FACTOR * history.reply_tokens(items)) + self._canary_tokens
            return max(LEAST, seen) * (1 + history.doubled)
        tokens = max(LEAST, _FACTOR * (items * self._each(spec, history) + self._canary_tokens))
        return (tokens + self._thought(spec, history)) * (1 + history.doubled)

    def expected(self, spec: Settings, history: LaneHistory, items: int) -> int:
        """Return the tokens that a combined reply to *items* is likely to take."""
        if history.answers:
            return history.reply_tokens(items)
        each = spec.answer.expected_tokens
        each = UNKNOWN_ANSWER if each is None else each
        each = FRAME + (each if spec.max_tokens is None else min(each, spec.max_tokens))
        return items * each + self.expected_thought(spec)

    def expected_thought(self, spec: Settings) -> int:
        """Return the tokens of thoughts that a reply is likely to have, while none is known."""
        return UNKNOWN_THOUGHT if self._may_think(spec) else 0

    def tried(self, spec: Settings, history: LaneHistory, items: int, bound: int | None) -> tuple[int | None, bool]:
        """Return the bound to send instead of *bound*, and whether it is larger than any that was accepted.

        Only one call at a time tries a larger bound, as long as the accepted one is likely to suffice: an endpoint may have an
        unknown limit, and refuses all calls that are under way when it is reached.
        """
        model = self.of(spec.model)
        if bound is None or bound <= model.accepted:
            return bound, False
        if spec.max_tokens is not None:
            return bound, True  # a lower one might cut what callers allow
        least = math.ceil(_LONGER * history.reply_tokens(items))
        if not history.answers:
            least = self.wanted(spec, history, items) * (2 if history.doubled else 1) // _FACTOR
        if model.trying and model.accepted >= least:
            return model.accepted, False
        return bound, True

    def expected_element(self, spec: Settings, history: LaneHistory) -> int:
        """Return the tokens of an element by which batches are sized: what callers allow, if earlier replies do not show less."""
        if spec.max_tokens is None:
            return history.written
        return min(output_reserve(spec.max_tokens), history.written if history.answers else self._each(spec, history))

    def _each(self, spec: Settings, history: LaneHistory) -> int:
        """Return the tokens expected of one element."""
        expected = spec.answer.expected_tokens
        if expected is None:
            expected = 2 * history.written if history.answers else UNKNOWN_ANSWER
        return FRAME + expected

    def _thought(self, spec: Settings, history: LaneHistory) -> int:
        """Return the tokens granted for the thoughts of a reasoning model; they do not grow with the batch."""
        if not (history.reasons or self._may_think(spec)):
            return 0
        return max(REASONING_ALLOWANCE, reasoning_budget(spec.params), 2 * history.thought)

    def _may_think(self, spec: Settings) -> bool:
        asked = asked_reasoning(spec.params) if spec.params else None
        return bool(asked) or (asked is None and self.of(spec.model).reasons)

    # --- what is learned

    def refused(self, spec: Settings, history: LaneHistory, limits: TokenLimits) -> None:
        """Learn the limits that an endpoint named when it refused a bound."""
        model = self.of(spec.model)
        model.output = _lower(model.output, limits.completion)
        model.context = model.context if limits.context is None else limits.context
        history.record_limits(limits)

    def judge(
        self, spec: Settings, history: LaneHistory, outcome: CallOutcome, fresh: Callable[[], int | None]
    ) -> CallOutcome:
        """Return *outcome* with `again` and `runaway` judged, and learn from it.

        *fresh* returns the bound that the call would have by what is known now.
        """
        completion = outcome.completion
        sent = None if completion is None else completion.bound
        if completion is not None:
            self._learn(spec, history, outcome, completion)
        again, runaway = False, outcome.reply.elements.past_the_end and outcome.ending != "complete"
        ours = None if spec.max_tokens is not None or outcome.ending != "length" else sent
        if completion is not None and ours is not None and _reached(completion, ours):
            again, at_bound = self._at_the_bound(spec, history, outcome, ours, fresh)
            runaway = runaway or at_bound
        history.overran |= runaway
        if not again:
            bounded_length = outcome.ending == "length" and sent is not None
            history.record_outcome(
                good=outcome.reply.sound and not runaway,
                judged=runaway or outcome.ending == "complete" or bounded_length,
            )
        outcome.again, outcome.runaway = again, runaway
        return outcome

    def _learn(self, spec: Settings, history: LaneHistory, outcome: CallOutcome, completion: Completion) -> None:
        """Learn from a reply whether its model accepts bounds, and whether it reasons."""
        model, sent = self.of(spec.model), completion.bound
        if sent is not None:
            model.accepted = max(model.accepted, sent)
        elif outcome.bounded:
            model.unbounded = True
        thought = completion.thought or (completion.usage is not None and completion.usage.reasoning_tokens > 0)
        if thought or (outcome.ending == "length" and sent is not None and not outcome.reply.heard):
            if asked_reasoning(spec.params) is False:
                history.reasons = True  # it was told not to; with other parameters it may not
            else:
                model.reasons = True

    def _at_the_bound(
        self, spec: Settings, history: LaneHistory, outcome: CallOutcome, sent: int, fresh: Callable[[], int | None]
    ) -> tuple[bool, bool]:
        """Return whether a reply that ended at the bound *sent* is asked for again, and whether the model has run away."""

        def longer() -> bool:
            bound = fresh()
            return bound is None or bound >= sent * _LONGER

        reply = outcome.reply
        if reply.elements.past_the_end or reply.elements.disordered or (reply.heard and not reply.sound):
            return False, True
        if longer():
            return True, False  # the bound has been lifted since, by this reply or by another
        if not history.doubled:
            history.doubled = True
            if longer():
                return True, False
            history.doubled = False
        limit = fresh()
        # A reply as long as possible: the batch is too large. With room left, twice the expected length was not enough.
        return False, limit is not None and limit >= self.wanted(spec, history, outcome.asked)


def _reached(completion: Completion, bound: int) -> bool:
    """Return whether a reply that ended in "length" can have reached *bound*: not if it reports far fewer tokens."""
    usage = completion.usage
    return usage is None or usage.completion_tokens <= 0 or 2 * usage.completion_tokens >= bound


def _lower(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)


def reasons_by_name(model: str | None) -> bool:
    """Return whether *model* is known to reason."""
    return model is not None and _reasons(_bare(model)) is not None


def output_limit(model: str | None) -> int | None:
    """Return the most tokens that *model* is known to generate, or None."""
    return None if model is None else next((limit for match, limit in _limits if match(_bare(model))), None)


def asked_reasoning(params: Mapping[str, Any]) -> bool | None:
    """Return whether request parameters ask for reasoning; None if none is about reasoning."""
    switches = [_is_on(value) for name, value in _with_template(params) if name in _SWITCHES]
    if any(switches) or reasoning_budget(params):
        return True
    return False if switches else None


def reasoning_budget(params: Mapping[str, Any]) -> int:
    """Return the tokens of thought that request parameters ask for by number; 0 if they name none."""
    budgets = [value for name, value in _with_template(params) if name in _BUDGETS]
    for name, value in _with_template(params):
        if name in ("reasoning", "thinking") and isinstance(value, dict):
            budgets += [value.get(name) for name in (*_BUDGETS, "max_tokens")]
    return max((value for value in budgets if type(value) is int), default=0)


def _bare(model: str) -> str:
    return model.rpartition("/")[2].lower()


def _with_template(params: Mapping[str, Any]) -> list[tuple[str, Any]]:
    template = params.get("chat_template_kwargs")
    return [*params.items(), *(template.items() if isinstance(template, dict) else ())]


def _is_on(value: Any) -> bool:
    """Return whether the value of a parameter about reasoning turns it on."""
    if isinstance(value, dict):
        return all(_is_on(value[name]) for name in ("type", "enabled", "effort") if name in value)
    return not isinstance(value, str | bool | int | None) or value not in _OFF
