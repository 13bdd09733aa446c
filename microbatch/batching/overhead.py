"""The cost of combining: what surrounds the requests of a combined call, and what a lane's calls have cost so far.

Nothing is tokenized per item. What surrounds the items is counted once, on a lane's first batch; the rest is what the endpoint
reports for each call. Of n requests sent one by one each pays for the shared messages; together they pay once for those and for the
instruction, and for a frame around each item in prompt and reply. Where the provider caches the beginnings of prompts, single calls
pay the lower price of cached tokens for most of the shared messages (see `PrefixCache`), and combining saves that much less.

`in_prompt_tokens` is the one measure by which usages are compared.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.messages import Usage, texts_of
from microbatch.prompt.compose import ALPHABET, USUAL_TOKENS, instruction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from microbatch.accounting.prices import Price
    from microbatch.batching.ticket import Ticket
    from microbatch.prompt.codec import CombinedCall

UNKNOWN_RATIO = 4.0
"""Price of a generated token in prompt tokens where no price is known; 4 to 5 is usual in 2026."""

_MILLION = 1_000_000

MAX_COUNTED_CHARS = 16_384
"""A longer text is not tokenized on the event loop, which that would block."""

MAX_COUNTED_SHARED_CHARS = 65_536
"""The same for the messages that the requests of a lane share, where a step of a prefix cache is at stake: once for each lane."""

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

# Ids of that sample that are counted before there is a batch.
_USUAL = 16

# A report this close to our count plus the schema shows that the endpoint charges the schema as prompt.
_SCHEMA_CHARGED = 0.7

# Tokens of a prompt, and the part of a reply, by which an endpoint may differ that counts in our own encoding.
_CLOSE = 16
_CLOSE_SHARE = 0.02

# The part by which the scales of a prompt and of its reply may differ if both show the encoding.
_ALIKE = 0.1

# An item and its answers until a lane's first batch has been measured: a text, JSON that is wrapped alone, and an object.
_USUAL_ITEM, _USUAL_TEXT, _USUAL_JSON, _USUAL_OBJECT = "Sort it.", "It is for the home.", '"home"', '{"kind":"home"}'

_FORGET = 0.95
"""The weight that each call leaves to those before it: about the last twenty count."""

LEAST_CACHED = 1_024
"""Tokens of the shortest prompt that OpenAI caches; of the beginning of a longer one multiples of `CACHE_STEP` are read."""

CACHE_STEP = 128

_ENOUGH = 10
"""Batches after which the cost of asking again can be judged."""

_SMALL_SAVING = 0.1
"""Where combining saves less than this part, or costs more, asking again may cost this part before combining is suspended."""


class CacheReports(msgspec.Struct, gc=False):
    """The reports of a provider's prefix cache for the single, or the combined, calls of a lane; the latest count most.

    Attributes:
        prefix: Tokens with which all of these prompts begin, by the endpoint's count.
        weight: The weight of all reports; 0 before the first.
        read: Sum of the tokens read from the cache.
        written: Sum of the shares of the other prompt tokens that were written to it.
    """

    prefix: float = 0.0
    weight: float = 0.0
    read: float = 0.0
    written: float = 0.0

    @property
    def documented(self) -> int:
        """The tokens of the common beginning that OpenAI reads from its cache: from 1,024 on, in steps of 128."""
        return int(self.prefix) // CACHE_STEP * CACHE_STEP if self.prefix >= LEAST_CACHED else 0

    def add(self, usage: Usage, expected: Usage) -> None:
        """Add the report of a call; what was *expected* of the first counts as one report before it."""
        for each in (usage,) if self.weight else (expected, usage):
            rest = each.prompt_tokens - each.cached_tokens
            self.weight = self.weight * _FORGET + 1
            self.read = self.read * _FORGET + each.cached_tokens
            self.written = self.written * _FORGET + (each.cache_write_tokens / rest if rest > 0 else 0.0)


class PrefixCache(msgspec.Struct, gc=False):
    """A provider's cache of the beginnings of prompts, as far as it concerns one lane.

    Single and combined prompts of a lane begin with the shared messages, the combined ones with the instruction after them. Before a
    kind of call was reported, it is taken to read what the other kind was reported to, or else what OpenAI documents; the rest of a
    prompt of at least 1,024 tokens is taken to be written to the cache, which matters only where that has a price.

    Attributes:
        alone: The reports of single calls.
        combined: Those of combined calls.
        warm: Loop time at which the first call of the lane was answered. Calls sent before that find nothing in the cache.
    """

    alone: CacheReports = msgspec.field(default_factory=CacheReports)
    combined: CacheReports = msgspec.field(default_factory=CacheReports)
    warm: float | None = None

    def usage(self, kind: CacheReports, prompt: float, completion: float = 0.0) -> Usage:
        """Return the usage of a call of one *kind*, `alone` or `combined`, with what is read from the cache and written to it."""
        prompt = max(0.0, prompt)
        read = min(self._read(kind), prompt)
        if kind.weight:
            written = kind.written / kind.weight
        elif prompt < LEAST_CACHED:
            written = 0.0
        else:
            other = self._other(kind)
            written = other.written / other.weight if other.weight and other.documented else 1.0
        return Usage(round(prompt), round(completion), round(read), cache_write_tokens=round(written * (prompt - read)))

    def measured(self, shared: float, scale: float) -> None:
        """Take the prompts to begin with *shared* tokens, as the endpoint counts them; it has *scale* of its own for each of ours."""
        self.combined.prefix = shared + (self.combined.prefix - self.alone.prefix) * scale
        self.alone.prefix = shared

    def _other(self, kind: CacheReports) -> CacheReports:
        return self.combined if kind is self.alone else self.alone

    def _read(self, kind: CacheReports) -> float:
        if kind.weight:
            return kind.read / kind.weight
        other = self._other(kind)
        if not other.weight:
            return kind.documented
        read = other.read / other.weight
        if other.documented:
            return kind.documented * min(1.0, read / other.documented)
        return min(kind.prefix, read) or kind.documented  # this one caches shorter prompts

    def learn(self, kind: CacheReports, usage: Usage, sent: float, now: float) -> None:
        """Learn from the *usage* of a call of one *kind* that was sent at *sent* and has ended *now*, both in loop time."""
        if self.warm is None:
            self.warm = now
        elif sent >= self.warm:
            kind.add(usage, self.usage(kind, usage.prompt_tokens))


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
        shared: Prompt tokens of the messages that all calls begin with.
        scale: The endpoint's tokens for each of ours in prompts; 1.0 if it counts as we do.
        booked: What `alone` has returned so far.
    """

    alone_prompt: float
    batch_prompt: float
    line: float
    reply: float
    element: float
    extra: float = 0.0
    carried: float = 0.0
    counted: int = 0
    shared: float = 0.0
    scale: float = 1.0
    booked: Booked = msgspec.field(default_factory=Booked)

    def is_cheaper_combined(self, items: int, price: Price | None, cache: PrefixCache, text: float = 0.0) -> bool:
        """Return whether *items* cost less together than one by one.

        Args:
            items: The number of requests.
            price: The price of the model; see `in_prompt_tokens` for None.
            cache: The prefix cache of the endpoint, by what is known of it.
            text: Prompt tokens of one request's own text. They cost the same in both ways, unless writing to the cache has a price.
        """
        single, combined = self.alone_prompt + text, self.batch_prompt + items * (self.line + text)
        alone = cache.usage(cache.alone, single)
        together = cache.usage(cache.combined, combined, self.reply + items * (self.element - self.extra))
        return items * in_prompt_tokens(alone, price) > in_prompt_tokens(together, price)

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
        # A correction by single replies may be more than the texts of one call.
        prompt = max(0, round(texts + answered * self.alone_prompt))
        booked = self.booked
        booked.answers += answered
        booked.line_bytes += line_bytes
        booked.answer_bytes += answer_bytes
        booked.texts += texts
        booked.elements += elements
        booked.prompt_tokens += prompt
        booked.completion_tokens += completion
        return self._with_cache(usage, Usage(prompt, completion), answered)

    def _with_cache(self, usage: Usage, alone: Usage, answered: int) -> Usage:
        """Return *alone* with the tokens that *answered* calls one by one would read from a cache, and write to it.

        Their prompts begin as that of the combined call did, whose *usage* shows what the cache does.
        """
        read, prompt = usage.cached_tokens, alone.prompt_tokens
        if not read:
            return alone
        reads = CacheReports(self.shared).documented if read >= LEAST_CACHED else self.shared
        cached = min(prompt, round(answered * min(read, reads)))
        share = usage.cache_write_tokens / max(1, usage.prompt_tokens - read)
        written = round(min(1.0, share) * (prompt - cached)) if prompt >= answered * LEAST_CACHED else 0
        return Usage(prompt, alone.completion_tokens, cached, cache_write_tokens=written)


def measure_overhead(
    combined: CombinedCall, tickets: Sequence[Ticket], usage: Usage, count: Callable[[str], int], *, exact: bool
) -> PromptOverhead:
    """Count what surrounds the requests of a combined call that has ended with *usage*, at least one of them answered.

    *count* is *exact* if it is the model's own encoding.
    """
    call, answer, ids = combined.call, tickets[0].answer, combined.ids[: len(tickets)]
    content = count(call.messages[-1]["content"])
    reply, element, written = _element_tokens(ids, tickets, count)
    canary_prompt, canary_reply = (0.0, 0.0) if combined.canary is None else USUAL_TOKENS
    sample = tickets[:_SAMPLE]
    line = sum(count(f"[{name}]") for name in ids) / len(ids)
    line += sum(ticket.count(count) - count(ticket.text) for ticket in sample) / len(sample)
    before = shared_tokens(call.messages[:-1], count)
    single, schema = (
        count(msgspec.json.encode(schema).decode()) if schema else 0 for schema in (answer.charged_schema, call.schema)
    )
    generated = usage.completion_tokens - usage.reasoning_tokens
    of_reply = None if written is None or generated <= 0 else generated / (written + canary_reply)
    scale, charged = _scale(usage.prompt_tokens, content + before, schema, of_reply, exact=exact)
    # In another encoding a reply differs as much as a prompt, or as its own count shows.
    reply_scale = scale if of_reply is None or scale == 1.0 else min(2 * scale, max(scale / 2, of_reply))
    # The tokens reported beyond the items and the instruction are paid by every call, combined or not, except the schema: that of a
    # single call is another one, and only some endpoints charge for it.
    around = max(0.0, usage.prompt_tokens - content * scale)
    return PromptOverhead(
        alone_prompt=max(0.0, around + (single - schema) * scale * charged),
        batch_prompt=around + (count(instruction(answer.words)) + canary_prompt) * scale,
        line=line * scale,
        reply=(reply + canary_reply) * reply_scale,
        element=element * reply_scale,
        counted=content + before,
        shared=prefix_of(around - charged * schema * scale),
        scale=scale,
    )


def _scale(theirs: int, ours: int, schema: int, of_reply: float | None, *, exact: bool) -> tuple[float, bool]:
    """Return the endpoint's tokens for each of ours in a prompt, and whether it charges the schema as a part of it.

    Args:
        theirs: The endpoint's count of the prompt.
        ours: Our own count, without the schema.
        schema: The tokens of the schema.
        of_reply: The same scale of the reply; None if it is unknown.
        exact: Whether ours should be the encoding of the model. A model of that name may have another one all the same, which shows in
            the reply; if it is the same, what is beyond our count of the prompt does not depend on its length.
    """
    likely = bool(schema) and theirs - ours >= schema * _SCHEMA_CHARGED
    scales = [(theirs / max(1, ours + charged * schema), charged) for charged in (False, True)]
    if theirs <= 0:
        return scales[0]
    if of_reply is not None and min(abs(of_reply / scale - 1) for scale, _ in (*scales, (1.0, likely))) > _ALIKE:
        of_reply = None  # the model has thought, indented its JSON, or the like
    if of_reply is None:
        same = ours - _CLOSE <= theirs <= ours + likely * schema / _SCHEMA_CHARGED + _CLOSE
    else:
        same = abs(of_reply - 1) <= _CLOSE_SHARE and theirs >= ours - _CLOSE
    if exact and same:
        return 1.0, likely
    # The one closer to that of the reply, which has no schema.
    return min(scales if schema else scales[:1], key=lambda each: abs(math.log(each[0] / (of_reply or 1.0))))


def _element_tokens(
    ids: Sequence[str], tickets: Sequence[Ticket], count: Callable[[str], int]
) -> tuple[float, float, int | None]:
    """Return the tokens of a combined reply without its elements, what each adds to a single reply, on average, and those of all.

    The last is None if the reply is so long that only a part of it was counted.
    """
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
    # An item without an answer mostly has no element in the reply either.
    whole = once if length < MAX_COUNTED_CHARS else None
    return once - (twice - once), (twice - once - alone) / len(elements) - longer_ids, whole


def usual_frame(count: Callable[[str], int], *, is_text: bool, wrapped: bool) -> tuple[float, float, float]:
    """Return `PromptOverhead.line`, `reply` and `element` as they usually are, for answers that are texts, or are *wrapped* alone."""
    ids, item = _IDS[:_USUAL], msgspec.json.encode(_USUAL_ITEM).decode()
    lines = count("".join(f"[{name}] {item}\n" for name in ids))
    text = _USUAL_TEXT if is_text else _USUAL_JSON if wrapped else _USUAL_OBJECT
    answer = msgspec.json.encode(text).decode() if is_text else text
    elements = [f'{{"id":"{name}","answer":{answer}}}' for name in ids]
    once, twice = (count('{"results":[' + ",".join(elements * times) + "]}") for times in (1, 2))
    alone = count(f'{{"answer":{text}}}' if wrapped else text)
    return lines / len(ids) - count(_USUAL_ITEM), once - (twice - once), (twice - once) / len(ids) - alone


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
        cost, cost_alone = (
            in_prompt_tokens(each, None) if price is None or not rate else price(each) / rate for each in (usage, alone)
        )
        self.alone += cost_alone
        if again:
            self.again += cost
        else:
            self.combined += cost

    @property
    def lost(self) -> bool:
        """True if asking again has cost as much as combining saves, in money or in calls."""
        if self.batches < _ENOUGH:
            return False
        # Where combining costs more by itself, that is the caller's choice; judged is what damage adds.
        saving = max(self.alone - self.combined, self.alone * _SMALL_SAVING)
        return self.calls >= self.items or self.again > saving > 0


def in_prompt_tokens(usage: Usage, price: Price | None) -> float:
    """Return the cost of *usage* in prompt tokens that are neither read from a prefix cache nor written to one.

    Without a *price*, or if that of prompts is 0, a generated token costs `UNKNOWN_RATIO`, and cached tokens cost what others do.
    """
    if price is None or not price.input:
        return usage.prompt_tokens + UNKNOWN_RATIO * usage.completion_tokens
    return price.cost(usage) * _MILLION / price.input


def estimate(text: str, count: Callable[[str], int], exact: int = MAX_COUNTED_CHARS) -> int:
    """Return the tokens of *text*; of one longer than *exact* characters an estimate by slices, because counting it would block."""
    length = len(text)
    if length <= exact:
        return count(text)
    step = (length - _SLICE_CHARS) // (_SLICES - 1)
    counted = sum(count(text[start : start + _SLICE_CHARS]) for start in range(0, length, step)[:_SLICES])
    return round(counted * length / (_SLICES * _SLICE_CHARS))


def prefix_of(shared: float) -> float:
    """Return with how many tokens prompts begin alike, of the *shared* tokens of `shared_tokens`: the others begin the reply."""
    return max(0.0, shared - _PRIMING_TOKENS - 1)


def message_tokens(
    messages: Iterable[Mapping[str, Any]], count: Callable[[str], int], exact: int = MAX_COUNTED_CHARS
) -> int:
    """Return the tokens of the texts of *messages* and of the chat template around them; see `estimate` for *exact*."""
    total = _PRIMING_TOKENS
    for message in messages:
        total += _MESSAGE_TOKENS + sum(estimate(text, count, exact) for text in texts_of(message.get("content")))
    return total


def shared_tokens(
    shared: Iterable[Mapping[str, Any]], count: Callable[[str], int], exact: int = MAX_COUNTED_CHARS
) -> int:
    """Return the tokens of a prompt that begins with *shared*, without the text of its last message; see `estimate` for *exact*."""
    return message_tokens(shared, count, exact) + _MESSAGE_TOKENS
