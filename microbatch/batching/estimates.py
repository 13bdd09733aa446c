"""What a call is charged by an endpoint that limits tokens a minute: its prompt, and the answer reserved for it.

Counted only where such a limit is set. An item is counted once, when it is queued; what surrounds it once a lane. What the
endpoint then reports corrects the estimate for the lane's next calls: schemas and chat templates are charged differently
everywhere, and not every model's encoding is known.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from microbatch.batching.batch_limits import MAX_COUNTED_CHARS, estimate, output_reserve
from microbatch.batching.overhead import message_tokens, shared_tokens
from microbatch.batching.ticket import Charge
from microbatch.prompt.compose import ID_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from microbatch.batching.batch_limits import BatchLimits
    from microbatch.batching.bounds import Bounds, ModelLimits
    from microbatch.batching.lane_history import LaneHistory
    from microbatch.batching.ticket import Spec, Ticket
    from microbatch.messages import TokenLimits

# How far one reply moves the ratio of the endpoint's count to ours, and the most that is believed of it.
_STEP = 0.5
_MAX_SCALE = 4.0

_MARGIN = 1.05
"""Put on our count of a prompt where it must not be too low."""

_SHORT = 256
"""Prompts of fewer tokens tell what is added to each, longer ones by how much they are off in proportion."""

_MODELS = 256

# For requests that never had company, nothing is learned of their answers.
_UNKNOWN_ANSWER = 256


class _Fit(msgspec.Struct):
    """How an endpoint counts a model's single prompts: so many times our count, and so many more.

    What frames a message is the same for short and long ones: learned as a ratio from short ones, it would be far off for long.
    """

    scale: float = 1.0
    more: float = 0.0

    def of(self, ours: int) -> float:
        """Return the endpoint's count of a prompt that has *ours* by our own."""
        return max(1.0, ours * self.scale + self.more)

    def learn(self, ours: int, theirs: int) -> None:
        """The endpoint counted *theirs* for a prompt that has *ours* by our own."""
        if ours < _SHORT:
            most = (_MAX_SCALE - 1) * _SHORT
            self.more += (min(most, max(-most, theirs - ours * self.scale)) - self.more) * _STEP
        else:
            self.scale = _nearer(self.scale, (theirs - self.more) / ours)


class Estimates:
    """Estimates charges, in tokens.

    Args:
        budgets: Knows what our own instruction takes.
        count: Counts a text's tokens.
        bounds: Knows how long combined replies may be.
    """

    def __init__(self, budgets: BatchLimits, count: Callable[[str], int], bounds: Bounds) -> None:
        self._budgets = budgets
        self._count = count
        self._bounds = bounds
        self._fits: dict[str | None, _Fit] = {}  # by model

    def measure(self, spec: Spec, history: LaneHistory) -> None:
        """Count what the requests of a lane share, once."""
        if history.shared_tokens is None:
            history.shared_tokens = shared_tokens(spec.shared, self._count)

    def model(self, spec: Spec) -> ModelLimits:
        """Return what is known of the model that requests with *spec* go to."""
        return self._bounds.of(spec.model)

    def alone(self, ticket: Ticket, history: LaneHistory) -> Charge:
        """Return the charge of a single call for *ticket*, which is of a lane that has been measured."""
        text = (
            ticket.count(self._count) if len(ticket.line) <= MAX_COUNTED_CHARS else estimate(ticket.text, self._count)
        )
        ours = (history.shared_tokens or 0) + text
        fit = self._fits.get(ticket.spec.model)
        prompt = ours if fit is None else fit.of(ours)
        answer: float | None = ticket.spec.max_tokens
        if answer is None:
            usual = history.written + history.thought
            answer = usual if history.single_tokens is None else history.single_tokens
        return Charge(round(prompt + answer), ours)

    def of_any(self, spec: Spec) -> Charge:
        """Return the charge of a request that is not combinable, whose messages are all in *spec*."""
        extra = {name: spec.params[name] for name in ("tools", "functions") if name in spec.params}
        prompt = message_tokens(spec.shared, self._count) + (
            estimate(msgspec.json.encode(extra).decode(), self._count) if extra else 0
        )
        answers = spec.params.get("n")
        each = spec.max_tokens if spec.max_tokens is not None else _UNKNOWN_ANSWER
        return Charge(prompt + each * (answers if isinstance(answers, int) and answers > 0 else 1))

    def together(self, spec: Spec, history: LaneHistory, items: int, tokens: int, quota: int | None) -> int:
        """Return the charge of a combined call.

        Args:
            spec: What its *items* have in common.
            history: What is known of their lane.
            items: How many they are.
            tokens: The tokens of their lines, ids included.
            quota: Tokens a minute that may be charged; None for no limit.
        """
        prompt = self.prompt_of(spec, history, tokens) * history.prompt_scale
        bound = self._bounds.bound(
            spec, history, items, prompt=lambda: self._at_most(spec, history, tokens), quota=quota
        )
        return round(prompt) + (self._answers(spec, history, items) if bound is None else bound)

    def bound(self, tickets: Sequence[Ticket], history: LaneHistory, quota: int | None) -> int | None:
        """Return the most tokens that the combined reply to *tickets* may take; None for no bound of ours.

        Args:
            tickets: The requests, of one lane.
            history: What is known of it.
            quota: Tokens a minute that may be charged; None for no limit.
        """
        spec = tickets[0].spec

        def prompt() -> int:
            self.measure(spec, history)
            for ticket in tickets:
                ticket.count(self._count)
            return self._at_most(spec, history, line_tokens(tickets))

        return self._bounds.bound(spec, history, len(tickets), prompt=prompt, quota=quota)

    def _at_most(self, spec: Spec, history: LaneHistory, tokens: int) -> int:
        """Return the tokens of a combined prompt with a schema, whether or not the endpoint charges that, and with a margin."""
        ours = self.prompt_of(spec, history, tokens) * max(1.0, history.prompt_scale)
        return math.ceil(_MARGIN * ours) + self._budgets.schema_tokens(spec.answer)[1]

    def surroundings(self, spec: Spec, history: LaneHistory) -> tuple[int, int]:
        """Return the tokens of a single prompt without its text, and of a combined one without its lines.

        Schemas are counted in, as OpenAI charges them: who does not shows that with the first reply.
        """
        single, combined = self._budgets.schema_tokens(spec.answer)
        return (history.shared_tokens or 0) + single, self.prompt_of(spec, history, combined)

    def of_tickets(self, tickets: Sequence[Ticket], history: LaneHistory, quota: int | None) -> int:
        """Return the charge of a combined call for *tickets*; see `together`."""
        return self.together(tickets[0].spec, history, len(tickets), line_tokens(tickets), quota)

    def prompt_of(self, spec: Spec, history: LaneHistory, tokens: int) -> int:
        """Return the prompt's tokens of a combined call whose lines have *tokens*, by our own count."""
        return (history.shared_tokens or 0) + self._budgets.preamble_tokens(spec.answer.words) + tokens

    def learn_together(self, tickets: Sequence[Ticket], history: LaneHistory, prompt_tokens: int) -> None:
        """The endpoint counted *prompt_tokens* for a combined call of *tickets*."""
        if history.shared_tokens is not None:
            ours = self.prompt_of(tickets[0].spec, history, line_tokens(tickets))
            history.prompt_scale = _nearer(
                history.prompt_scale, prompt_tokens / ours, 1.0 if history.prompt_scale == 1.0 else _STEP
            )

    def learn_refused(self, tickets: Sequence[Ticket], history: LaneHistory, said: TokenLimits) -> None:
        """The endpoint refused the bound of a combined call of *tickets*, and said what of tokens."""
        spec = tickets[0].spec
        self._bounds.refused(spec, history, said)
        if said.prompt:
            self.measure(spec, history)
            for ticket in tickets:
                ticket.count(self._count)
            counted = said.prompt / self.prompt_of(spec, history, line_tokens(tickets))
            history.prompt_scale = min(_MAX_SCALE, max(history.prompt_scale, counted))

    def learn_alone(self, ticket: Ticket, prompt_tokens: int) -> None:
        """The endpoint counted *prompt_tokens* for a single call of *ticket*."""
        ours = 0 if ticket.charge is None else ticket.charge.prompt
        if ours:
            model = ticket.spec.model
            if len(self._fits) >= _MODELS and model not in self._fits:
                self._fits.clear()
            self._fits.setdefault(model, _Fit()).learn(ours, prompt_tokens)

    @staticmethod
    def _answers(spec: Spec, history: LaneHistory, items: int) -> int:
        if spec.max_tokens is not None:
            return items * output_reserve(spec.max_tokens)
        # Of many answers only a few are long: what is drawn independently strays from its mean by the root of the number.
        stray = max(0.0, history.answer_tokens - history.answer_mean) * math.sqrt(items)
        return round(items * history.answer_mean + stray)


def _nearer(scale: float, measured: float, step: float = _STEP) -> float:
    return scale + (min(_MAX_SCALE, max(1 / _MAX_SCALE, measured)) - scale) * step


def line_tokens(tickets: Iterable[Ticket]) -> int:
    """Return the tokens that the lines of *tickets* take, ids included."""
    return sum(ticket.tokens + ID_TOKENS for ticket in tickets)
