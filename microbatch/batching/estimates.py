"""Estimates of what a call will be charged, of the tokens that its prompt takes, and of how large a batch may be.

An endpoint that limits tokens a minute charges a call's prompt and the answer reserved for it. Tokens are counted only where that or a
context window matters: an item once, when it is queued, and what surrounds it once per lane. The endpoint's reports then correct the
estimates for later calls.
"""

from __future__ import annotations

import math
from operator import itemgetter
from typing import TYPE_CHECKING

import msgspec

from microbatch.batching.bounds import QUOTA_SHARE
from microbatch.batching.lane_history import TokenScale, above_most
from microbatch.batching.overhead import (
    MAX_COUNTED_CHARS,
    MAX_COUNTED_SHARED_CHARS,
    CacheReports,
    PrefixCache,
    PromptOverhead,
    estimate,
    message_tokens,
    prefix_of,
    shared_tokens,
    usual_frame,
)
from microbatch.batching.ticket import Charge, FlushReason
from microbatch.errors import ConfigError
from microbatch.lru import LRU
from microbatch.messages import Usage
from microbatch.prompt.compose import (
    CANARY_TOKENS,
    ID_TOKENS,
    SPARE_ID_TOKENS,
    instruction,
    limits_together,
    output_reserve,
)
from microbatch.transports.expenses import Expense

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from microbatch.accounting.prices import Price
    from microbatch.batching.bounds import Bounds
    from microbatch.batching.lane_history import LaneHistory
    from microbatch.batching.ticket import Spec, Ticket
    from microbatch.messages import TokenLimits
    from microbatch.policy import FlushPolicy
    from microbatch.schema.answer_type import AnswerType

_MARGIN = 1.05
"""Put on our count of a prompt where it must not be too low."""

_REMEMBERED = 256
"""Models and shapes of answers that are remembered."""

# For requests that are never combined, nothing is learned of their answers.
_UNKNOWN_ANSWER = 256


class Budget(msgspec.Struct, frozen=True, gc=False):
    """The limits of one batch of a lane.

    Attributes:
        size: Most requests.
        tokens: Most tokens of the items' lines, ids included.
        size_reason: What binds the size: SIZE, OUTPUT when the length of the reply does, or LATENCY when the time of replies does.
        frame: The tokens that each item takes besides its line.
    """

    size: int
    tokens: int
    size_reason: FlushReason = FlushReason.SIZE
    frame: int = ID_TOKENS


class Estimates:
    """Estimates charges and prompts, in tokens; with a *canary*, each combined prompt ends in one."""

    def __init__(self, count: Callable[[str], int], bounds: Bounds, *, canary: bool = False) -> None:
        self._count = count
        self._bounds = bounds
        self._canary_tokens = CANARY_TOKENS if canary else 0
        self._scales: LRU[str | None, TokenScale] = LRU(_REMEMBERED)  # of single prompts, by model
        self._preambles: LRU[str, int] = LRU(_REMEMBERED)  # by the words of the answer's shape
        self._schemas: LRU[str, tuple[int, int]] = LRU(_REMEMBERED)
        self._frames: LRU[tuple[bool, bool], tuple[float, float, float]] = LRU(_REMEMBERED)
        self._singles: LRU[tuple[str | None, str], float] = LRU(_REMEMBERED)  # tokens of a choice of single replies

    # --- prompts

    def tokens_of(self, text: str) -> int:
        """Return the tokens of *text*, of a long one its bytes: they are an upper bound that does not block the event loop."""
        return self._count(text) if len(text) <= MAX_COUNTED_CHARS else len(text.encode())

    def exceeds(self, text: str, limit: int) -> bool:
        """Return whether *text* has more than *limit* tokens; False if the counter fails."""
        try:
            return estimate(text, self._count) > limit
        except ConfigError:
            return False

    def preamble_tokens(self, answer: AnswerType) -> int:
        """Return the tokens of the instruction and the canary, counted once for each shape of answer."""
        words = answer.words
        return self._preambles.get_or_make(words, lambda: self.tokens_of(instruction(words)) + self._canary_tokens)

    def _schema_tokens(self, answer: AnswerType) -> tuple[int, int]:
        """Return the tokens of the schemas of a single and of a combined reply, counted once for each shape of answer."""
        schemas = (answer.charged_schema, answer.batch_schema)

        def count() -> tuple[int, int]:
            single, combined = (
                0 if schema is None else self.tokens_of(msgspec.json.encode(schema).decode()) for schema in schemas
            )
            return single, combined

        return self._schemas.get_or_make(answer.words, count)

    def _frame(self, answer: AnswerType) -> tuple[float, float, float]:
        """Return what usually surrounds the requests and answers of a combined call; see `usual_frame`."""
        is_text, wrapped = answer.is_text, answer.wrapped
        return self._frames.get_or_make(
            (is_text, wrapped), lambda: usual_frame(self._count, is_text=is_text, wrapped=wrapped)
        )

    def _scale_of(self, model: str | None) -> TokenScale:
        return self._scales.get_or_make(model, TokenScale)

    def measure(self, spec: Spec, history: LaneHistory) -> None:
        """Count the messages that the requests of a lane share, once."""
        if history.shared_tokens is None:
            history.shared_tokens = shared_tokens(spec.shared, self._count)

    def prompt_of(self, spec: Spec, history: LaneHistory, tokens: int) -> int:
        """Return the prompt's tokens of a combined call whose lines have *tokens*, by our own count."""
        return (history.shared_tokens or 0) + self.preamble_tokens(spec.answer) + tokens

    def _prompt_of_tickets(self, tickets: Sequence[Ticket], history: LaneHistory) -> int:
        """Return the same for a call with *tickets*, counted exactly."""
        self.measure(tickets[0].spec, history)
        for ticket in tickets:
            ticket.count(self._count)
        return self.prompt_of(tickets[0].spec, history, line_tokens(tickets))

    def _at_most(self, spec: Spec, history: LaneHistory, ours: int) -> int:
        """Return an upper bound of the endpoint's count of a combined prompt, its schema and a margin included."""
        prompt = max(float(ours), history.prompt_scale.of(ours))
        return math.ceil(_MARGIN * prompt) + self._schema_tokens(spec.answer)[1]

    def watch_cache(self, spec: Spec, history: LaneHistory) -> None:
        """Prepare to weigh what a provider's prefix cache does to the cost of a lane's calls, once."""
        if history.cache is None:
            shared = history.shared_tokens = shared_tokens(spec.shared, self._count, MAX_COUNTED_SHARED_CHARS)
            prefix = prefix_of(shared)
            together = prefix + self.tokens_of(instruction(spec.answer.words))
            history.cache = PrefixCache(CacheReports(prefix), CacheReports(together))

    def is_cheaper_combined(
        self, spec: Spec, history: LaneHistory, items: int, price: Price | None, ticket: Ticket
    ) -> bool:
        """Return whether *items* such as *ticket* cost less together than one by one, in a lane whose cache is watched.

        See `PromptOverhead.is_cheaper_combined`.
        """
        overhead, cache = history.overhead, history.cache or PrefixCache()
        if overhead is None:
            # Schemas are counted, as OpenAI charges them; the first reply shows whether the endpoint does not.
            single, combined = self._schema_tokens(spec.answer)
            alone_prompt = (history.shared_tokens or 0) + single
            overhead = PromptOverhead(alone_prompt, self.prompt_of(spec, history, combined), *self._frame(spec.answer))
        if price is not None:
            price = price.of_tier(spec.tier)
        text = 0 if price is None or price.cache_write is None else ticket.count(self._count)
        return overhead.is_cheaper_combined(items, price, cache, text * overhead.scale)

    # --- charges

    def alone(self, ticket: Ticket, history: LaneHistory) -> Charge:
        """Return the charge of a single call for *ticket*, which is of a lane that has been measured."""
        spec = ticket.spec
        short = len(ticket.line) <= MAX_COUNTED_CHARS
        ours = (history.shared_tokens or 0) + (
            ticket.count(self._count) if short else estimate(ticket.text, self._count)
        )
        answer: float | None = spec.max_tokens
        if answer is None:
            usual = history.written + history.thought
            answer = usual if history.single_tokens is None else history.single_tokens
        return Charge(round(self._scale_of(spec.model).of(ours) + answer), ours)

    def of_any(self, spec: Spec) -> Charge:
        """Return the charge of a request that is not combinable, whose messages are all in *spec*."""
        prompt = message_tokens(spec.shared, self._count) + self._extra(spec)
        each = spec.max_tokens if spec.max_tokens is not None else _UNKNOWN_ANSWER
        return Charge(prompt + each * _choices(spec))

    def _extra(self, spec: Spec) -> int:
        """Return the prompt's tokens of the tools that a request has."""
        extra = {name: spec.params[name] for name in ("tools", "functions") if name in spec.params}
        return estimate(msgspec.json.encode(extra).decode(), self._count) if extra else 0

    def together(self, spec: Spec, history: LaneHistory, items: int, tokens: int, quota: int | None) -> int:
        """Return the charge of a combined call of *items* with *tokens* in their lines, ids included.

        *quota* is the number of tokens a minute that may be charged; None for no limit.
        """
        ours = self.prompt_of(spec, history, tokens)
        bound = self._bounds.bound(spec, history, items, prompt=lambda: self._at_most(spec, history, ours), quota=quota)
        if bound is None:
            allowed = limits_together(spec.max_tokens, items, canary=self._canary_tokens > 0)
            bound = history.reply_tokens(items) if allowed is None else allowed
        return round(history.prompt_scale.of(ours)) + bound

    def expense(self, tickets: Sequence[Ticket], history: LaneHistory | None = None, *, spare: bool = False) -> Expense:
        """Return what a call for *tickets* is likely to cost; *history* is that of their lane, None for a single call."""
        spec = tickets[0].spec
        return Expense(self._expected(spec, tickets, history), spec.model, spec.tenant, spare, spec.tier)

    def _expected(self, spec: Spec, tickets: Sequence[Ticket], history: LaneHistory | None) -> Usage:
        single, combined = self._schema_tokens(spec.answer)
        if history is None or len(tickets) == 1:
            ours = message_tokens(tickets[0].messages, self._count) + self._extra(spec)
            return Usage(round(self._scale_of(spec.model).of(ours)) + single, self._expected_alone(spec))
        ours = self._prompt_of_tickets(tickets, history)
        scale = history.prompt_scale
        prompt = round(scale.of(ours)) if scale.known else ours + combined
        return Usage(prompt, self._bounds.expected(spec, history, len(tickets)))

    def _expected_alone(self, spec: Spec) -> int:
        """Return the tokens that a single reply is likely to have, of all its choices together."""
        answer = self._singles.get(_kind(spec))
        if answer is None:
            expected = spec.answer.expected_tokens
            answer = (_UNKNOWN_ANSWER if expected is None else expected) + self._bounds.expected_thought(spec)
        return round((answer if spec.max_tokens is None else min(answer, spec.max_tokens)) * _choices(spec))

    def bound(self, tickets: Sequence[Ticket], history: LaneHistory, quota: int | None) -> int | None:
        """Return the most tokens that the combined reply to *tickets*, of one lane, may take; None for no bound."""
        spec = tickets[0].spec

        def prompt() -> int:
            return self._at_most(spec, history, self._prompt_of_tickets(tickets, history))

        return self._bounds.bound(spec, history, len(tickets), prompt=prompt, quota=quota)

    def budget(self, policy: FlushPolicy, spec: Spec, history: LaneHistory, quota: int | None = None) -> Budget:
        """Return the budget of the lane with *spec*, by the policy and the lane's history.

        *quota* is the most tokens that one call can be charged, prompt and answers together; None for no limit.
        """
        model, expected = self._bounds.of(spec.model), self._bounds.expected_element(spec, history)
        outputs = [policy.max_output_tokens]
        outputs += [limit for limit in (model.output, history.affordable) if limit is not None]
        # Pairs show how long the answers are; requests that go alone do not.
        unknown = spec.max_tokens is not None and not history.answers and spec.answer.expected_tokens is None
        by_output = max(2 if unknown else 1, min(outputs) // expected)
        limits = [policy.max_batch_size, history.batch_size, None if spec.kind is None else spec.kind.limit]
        size = by_window = min(limit for limit in limits if limit is not None)
        scale, preamble = history.prompt_scale, self.preamble_tokens(spec.answer)
        tokens = int(policy.max_batch_tokens / scale.factor)
        if policy.max_prompt_tokens is not None:
            shared = history.shared_tokens if scale.ours else None
            if shared is None:
                shared = self.tokens_of("".join(str(message["content"]) for message in spec.shared))
            tokens = min(tokens, scale.room(policy.max_prompt_tokens) - shared)
        tokens -= preamble
        around, thought = (history.shared_tokens or 0) + preamble, history.thought if spec.max_tokens is None else 0
        for window, each in _windows(model.context, spec, history, quota, around + thought, expected):
            left = window - thought
            by_window = max(1, min(by_window, (left - around) // (2 * each)))  # half of a small one for the answers
            tokens = min(tokens, scale.room(left - by_window * each) - around)
        if history.max_line_tokens is not None:
            tokens = min(tokens, history.max_line_tokens)
        if history.suspended_for:
            return Budget(1, tokens)
        limits_by_reason = [(size, FlushReason.SIZE), (min(by_output, by_window), FlushReason.OUTPUT)]
        if history.times is not None:
            limits_by_reason.append((history.times.most, FlushReason.LATENCY))
        size, reason = min(limits_by_reason, key=itemgetter(0))
        return Budget(size, tokens, reason)

    # --- what is learned

    def learn_together(
        self, tickets: Sequence[Ticket], history: LaneHistory, prompt_tokens: int, *, every: bool = False
    ) -> None:
        """Learn that the endpoint counted *prompt_tokens* for a combined call of *tickets*.

        Nothing is counted for it, unless *every* call is to be learned from: the first call that was answered has been counted in any
        case, and so were requests whose tokens are charged.
        """
        spec, overhead = tickets[0].spec, history.overhead
        counted = history.shared_tokens is not None and all(ticket.counted is not None for ticket in tickets)
        if every or counted:
            ours, spare = self._prompt_of_tickets(tickets, history), SPARE_ID_TOKENS * len(tickets)
        elif overhead is not None and not history.prompt_scale.known:
            ours, spare = overhead.counted, 0
        else:
            return
        history.record_prompt(ours, prompt_tokens, fixed=self._schema_tokens(spec.answer)[1], spare=spare)

    def learn_alone(self, ticket: Ticket, usage: Usage) -> None:
        """Learn that the endpoint reported *usage* for a single call of *ticket*."""
        if ticket.charge is not None and ticket.charge.prompt:
            self._scale_of(ticket.spec.model).learn(ticket.charge.prompt, usage.prompt_tokens)
        kind, tokens = _kind(ticket.spec), usage.completion_tokens / _choices(ticket.spec)
        known = self._singles.get_or_make(kind, lambda: tokens)
        self._singles.put(kind, above_most(known, tokens))

    def learn_refused(self, tickets: Sequence[Ticket], history: LaneHistory, limits: TokenLimits) -> None:
        """Learn that the endpoint refused the bound of a combined call of *tickets*, and which limits it named."""
        self._bounds.refused(tickets[0].spec, history, limits)
        if limits.prompt:
            history.prompt_scale.raise_to(self._prompt_of_tickets(tickets, history), limits.prompt)


def _kind(spec: Spec) -> tuple[str | None, str]:
    return spec.model, spec.answer.words


def _choices(spec: Spec) -> int:
    """Return the number of answers that a single reply has."""
    answers = spec.params.get("n")
    return answers if isinstance(answers, int) and answers > 0 else 1


def line_tokens(tickets: Iterable[Ticket]) -> int:
    """Return the tokens that the lines of *tickets* take, ids included."""
    return sum(ticket.tokens + ID_TOKENS for ticket in tickets)


def _windows(
    context: int | None, spec: Spec, history: LaneHistory, quota: int | None, around: int, expected: int
) -> list[tuple[int, int]]:
    """Return the limits on prompt and reply of one call together, each with the tokens that an answer takes of it.

    They are the context window, and a part of the quota. The part is what one call may be charged at most, unless that is less than
    four answers of *expected* tokens take with the *around* of the prompt. Where callers have set the length of their answers, it is
    the whole quota, of which an answer takes all that its caller allows, because that is charged.
    """
    windows = [] if context is None else [(context, expected)]
    quotas = [limit for limit in (quota, history.per_minute) if limit is not None]
    if quotas and spec.max_tokens is not None:
        windows.append((min(quotas), output_reserve(spec.max_tokens)))
    elif quotas:
        share = min(quotas) // QUOTA_SHARE
        windows.append((share if share >= around + 4 * expected else min(quotas), expected))
    return windows
