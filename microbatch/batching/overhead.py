"""The cost of combining: what surrounds the requests of a combined call, and what a lane's calls have cost so far.

Nothing is tokenized per item. What surrounds the items is counted once, on a lane's first batch; the rest is what the endpoint
reports for each call. Of n requests sent one by one each pays for the shared messages; together they pay once for those and for the
instruction, and for a frame around each item in prompt and reply.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.messages import Usage, texts_of
from microbatch.prompt.compose import ALPHABET, USUAL_TOKENS, instruction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from microbatch.batching.ticket import Ticket
    from microbatch.prompt.codec import CombinedCall

UNKNOWN_RATIO = 4.0
"""Price of a generated token in prompt tokens where no price is known; 4 to 5 is usual in 2026."""

MAX_COUNTED_CHARS = 16_384
"""A longer text is not tokenized on the event loop, which that would block."""

# The parts of a longer text that are counted: its beginning, its middle and its end.
_SLICES = 3
_SLICE_CHARS = 4_096

# Tokens that a chat template adds per message and per call: the rule of OpenAI's cookbook, with one token for the role.
_MESSAGE_TOKENS = 4
_PRIMING_TOKENS = 3

# Items of a first batch that are counted to measure what surrounds an item.
_SAMPLE = 4

# A fixed sample of ids, as long on average as random ones in the packaged encodings: those of one batch are longer or shorter, which
# is much compared with a label.
_drawn = random.Random(42)  # noqa: S311 not secret
_IDS = [f"{1 + number % 16}{''.join(_drawn.choices(ALPHABET, k=5))}" for number in range(64)]

# A report this close to our count plus the schema shows that the endpoint charges the schema as prompt.
_SCHEMA_CHARGED = 0.7

# Until a lane's first batch has been measured: an item's line without its text, an element without its answer, the array around the
# elements, and the object around a single answer that is none. Measured on the bundled catalogue.
_LINE = 9.0
ELEMENT = 11.0
_REPLY = 7.0
WRAPPER = 5.0

_FORGET = 0.95
"""The weight that each batch leaves to those before it: about the last twenty count."""

_ENOUGH = 10
"""Batches after which the cost of asking again can be judged."""

_SMALL_SAVING = 0.1
"""Where combining saves less than this part, or costs more, asking again may cost this part before combining is suspended."""


class Booked(msgspec.Struct, gc=False):
    """The cost of single calls that was booked for the answers of a lane's combined replies.

    Attributes:
        answers: The answers.
        line_bytes: The bytes of their requests' lines.
        answer_bytes: The bytes of the answers themselves.
        texts: The prompt tokens of those without what surrounds them.
        elements: The completion tokens of the answers and what surrounds each.
        prompt_tokens: The prompt tokens booked.
        completion_tokens: The completion tokens booked.
    """

    answers: int = 0
    line_bytes: int = 0
    answer_bytes: int = 0
    texts: float = 0.0
    elements: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def missing(self, alone_prompt: float, element: float) -> Usage:
        """Return, and book, what is missing if single calls take *alone_prompt* beyond the text, and *element* less than elements.

        The tokens are negative if less should have been booked.
        """
        prompt = round(self.texts + self.answers * alone_prompt) - self.prompt_tokens
        completion = round(self.elements - self.answers * element) - self.completion_tokens
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        return Usage(prompt, completion)


class PromptOverhead(msgspec.Struct, gc=False):
    """The text around the requests of a lane, in tokens.

    Attributes:
        alone_prompt: Prompt tokens of a single call without its own text.
        batch_prompt: Prompt tokens of a combined call without its lines.
        line: What an item's line adds to its text, on average.
        reply: Tokens of a combined reply without its elements.
        element: What an element adds to the answer as a single call would give it, on average.
        extra: What a single reply takes beyond that, as far as single replies have shown.
        carried: The rounding error so far, added to the next call: half a token a call is a hundredth of sixteen labels.
        counted: Our own count of the prompt of the call that was measured; 0 if none was.
        booked: What `alone` has returned so far.
    """

    alone_prompt: float
    batch_prompt: float
    line: float = _LINE
    reply: float = _REPLY
    element: float = ELEMENT
    extra: float = 0.0
    carried: float = 0.0
    counted: int = 0
    booked: Booked = msgspec.field(default_factory=Booked)

    def is_cheaper_combined(self, items: int, ratio: float) -> bool:
        """Return whether *items* cost less together than one by one; a generated token costs *ratio* prompt tokens."""
        framing = items * self.line + ratio * (self.reply + items * (self.element - self.extra))
        return items * self.alone_prompt > self.batch_prompt + framing

    def alone(
        self, usage: Usage, *, asked: int, asked_bytes: int, answered: int, line_bytes: int, answer_bytes: int
    ) -> Usage:
        """Return, and book, the usage that the *answered* of *asked* requests would have had one by one.

        Args:
            usage: That of the combined call.
            asked: Its requests.
            asked_bytes: The bytes of their lines.
            answered: Those that it has answered.
            line_bytes: The bytes of the lines of those.
            answer_bytes: The bytes of their answers.
        """
        texts = max(0.0, usage.prompt_tokens - self.batch_prompt - asked * self.line) * line_bytes / asked_bytes
        # An item without an answer mostly has no element in the reply either.
        elements = usage.completion_tokens - self.reply
        exact = max(0.0, elements - answered * (self.element - self.extra) + self.carried)
        completion = round(exact)
        self.carried = exact - completion
        prompt = round(texts + answered * self.alone_prompt)
        booked = self.booked
        booked.answers += answered
        booked.line_bytes += line_bytes
        booked.answer_bytes += answer_bytes
        booked.texts += texts
        booked.elements += elements
        booked.prompt_tokens += prompt
        booked.completion_tokens += completion
        # A provider caches the beginning of a combined prompt, with which the single prompts would begin too.
        return Usage(prompt, completion, min(prompt, answered * usage.cached_tokens))


def measure_overhead(
    combined: CombinedCall, tickets: Sequence[Ticket], usage: Usage, count: Callable[[str], int], *, exact: bool
) -> PromptOverhead:
    """Count what surrounds the requests of a combined call that has ended with *usage*, at least one of them answered.

    *count* is *exact* if it is the model's own encoding.
    """
    call, answer, ids = combined.call, tickets[0].answer, combined.ids[: len(tickets)]
    content = count(call.messages[-1]["content"])
    reply, element = _element_tokens(ids, tickets, count)
    canary_prompt, canary_reply = (0.0, 0.0) if combined.canary is None else USUAL_TOKENS
    sample = tickets[:_SAMPLE]
    line = sum(count(f"[{name}]") for name in ids) / len(ids)
    line += sum(ticket.count(count) - count(ticket.text) for ticket in sample) / len(sample)
    counted = content + shared_tokens(call.messages[:-1], count)
    scale = 1.0 if exact else usage.prompt_tokens / max(1, counted)
    # The tokens reported beyond the items and the instruction are paid by every call, combined or not...
    shared = usage.prompt_tokens - content * scale
    schemas = [
        count(msgspec.json.encode(schema).decode()) if schema else 0 for schema in (call.schema, answer.charged_schema)
    ]
    # ... except the schema, which differs for a single call, and which only some endpoints charge.
    charged = exact and usage.prompt_tokens - counted >= schemas[0] * _SCHEMA_CHARGED
    return PromptOverhead(
        alone_prompt=shared + (schemas[1] - schemas[0] if charged else 0),
        batch_prompt=shared + (count(instruction(answer.words)) + canary_prompt) * scale,
        line=line * scale,
        reply=(reply + canary_reply) * scale,
        element=element * scale,
        counted=counted,
    )


def _element_tokens(ids: Sequence[str], tickets: Sequence[Ticket], count: Callable[[str], int]) -> tuple[float, float]:
    """Return the tokens of a combined reply without its elements, and what each adds to a single reply, on average."""
    names: list[str] = []
    elements: list[str] = []
    alone = length = 0
    for name, ticket in zip(ids, tickets, strict=True):
        if ticket.reply is not None and length < MAX_COUNTED_CHARS:
            text = ticket.reply.text
            answer = msgspec.json.encode(text).decode() if ticket.answer.is_text else text
            names.append(name)
            elements.append(f'{{"id":"{name}","answer":{answer}}}')
            alone += count(f'{{"answer":{text}}}' if ticket.answer.wrapped else text)
            length += len(text)
    # The end of an element and the start of the next share a token, so they are counted in a row.
    once, twice = (count('{"results":[' + ",".join(elements * times) + "]}") for times in (1, 2))
    longer_ids = _id_tokens(names, count) - _id_tokens(_IDS, count)
    return once - (twice - once), (twice - once - alone) / len(elements) - longer_ids


def _id_tokens(names: Sequence[str], count: Callable[[str], int]) -> float:
    return count("".join(f'{{"id":"{name}"\n' for name in names)) / len(names)


_PROMPT_TOKEN: Final = Usage(prompt_tokens=1)


class LaneEconomics(msgspec.Struct):
    """The recent cost of a lane's combined calls and of asking again, against that of single calls, in prompt tokens of the same price.

    Attributes:
        again: Cost of the calls that asked again for what combined calls left unanswered.
        alone: What single calls would have cost for what was answered.
        items: Requests that combined calls carried.
        calls: Calls made for them.
    """

    batches: int = 0
    combined: float = 0.0
    again: float = 0.0
    alone: float = 0.0
    items: float = 0.0
    calls: float = 0.0

    def begin(self, items: int) -> None:
        """Note that a combined call of *items* is being made."""
        self.batches += 1
        self.combined *= _FORGET
        self.again *= _FORGET
        self.alone *= _FORGET
        self.items = self.items * _FORGET + items
        self.calls = self.calls * _FORGET + 1

    def record(self, usage: Usage, alone: Usage, price: Callable[[Usage], float] | None, *, again: bool) -> None:
        """Record the *usage* of a call, and that of single calls for its answers; *again* if it asked again."""
        # Some calls of a lane may have a price and others none, where a router chooses the model.
        rate = 0.0 if price is None else price(_PROMPT_TOKEN)
        cost, rate = (_in_prompt_tokens, 1.0) if price is None or not rate else (price, rate)
        self.alone += cost(alone) / rate
        if again:
            self.again += cost(usage) / rate
        else:
            self.combined += cost(usage) / rate

    @property
    def lost(self) -> bool:
        """True if asking again has cost as much as combining saves, in money or in calls."""
        if self.batches < _ENOUGH:
            return False
        # Where combining costs more by itself, that is the caller's choice; judged is what damage adds.
        saving = max(self.alone - self.combined, self.alone * _SMALL_SAVING)
        return self.calls >= self.items or self.again > saving > 0


def _in_prompt_tokens(usage: Usage) -> float:
    return usage.prompt_tokens + UNKNOWN_RATIO * usage.completion_tokens


def estimate(text: str, count: Callable[[str], int]) -> int:
    """Return the tokens of *text*; of a long one an estimate by slices, because counting all of it would block the event loop."""
    length = len(text)
    if length <= MAX_COUNTED_CHARS:
        return count(text)
    step = (length - _SLICE_CHARS) // (_SLICES - 1)
    counted = sum(count(text[start : start + _SLICE_CHARS]) for start in range(0, length, step)[:_SLICES])
    return round(counted * length / (_SLICES * _SLICE_CHARS))


def message_tokens(messages: Iterable[Mapping[str, Any]], count: Callable[[str], int]) -> int:
    """Return the tokens of the texts of *messages* and of the chat template around them; of long texts an estimate."""
    total = _PRIMING_TOKENS
    for message in messages:
        total += _MESSAGE_TOKENS + sum(estimate(text, count) for text in texts_of(message.get("content")))
    return total


def shared_tokens(shared: Iterable[Mapping[str, Any]], count: Callable[[str], int]) -> int:
    """Return the tokens of a prompt that begins with *shared*, without the text of its last message."""
    return message_tokens(shared, count) + _MESSAGE_TOKENS
