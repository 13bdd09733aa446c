"""Records of lanes from their earlier calls, kept longer than the lanes and without any text."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec

from microbatch.batching.overhead import LaneEconomics
from microbatch.batching.single_replies import SingleReplies
from microbatch.lru import LRU

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from microbatch.batching.latency import ReplyTimes
    from microbatch.batching.overhead import PrefixCache, PromptOverhead
    from microbatch.messages import TokenLimits, Usage

H = TypeVar("H", bound="LaneHistory")

_RANK_AFTER = 32
"""Answers after which their percentile is computed anew, unless a longer one comes first."""

_UP, _DOWN = 0.5, 0.05

_SUSPENSION = 500
"""Requests that go alone once combining has cost more than it saved, before it is tried again."""

_FRUITLESS = 2
"""Fruitless combined replies in a row after which combining is suspended."""

_BATCHES_ON_TRIAL = 7
"""Batches credited to a lane after a suspension: three more bad ones suspend combining again."""

_SHORT = 256
"""Prompts of fewer tokens show what is added to each, longer ones the ratio of the counts."""

# How far one report moves a scale, and the largest scale that is believed.
_STEP = 0.5
_MAX_SCALE = 4.0

# How far a report lowers the upper estimate. Texts of one lane differ in what they take of another encoding.
_STEP_DOWN = 0.25

_CLOSE = 1.02
"""Largest ratio of the counts at which the encoding counts as our own. With another one texts differ, and limits get a margin."""

_MARGIN = 1.05


class TokenScale(msgspec.Struct):
    """An endpoint's count of prompts, by our own count and its reports.

    The estimate is `scale` times our count, plus `more`. Endpoints differ in encodings, and in what they charge for schemas and chat
    templates. What surrounds a message does not depend on its length: learned as a ratio from short prompts, it would be wrong for long
    ones.

    A limit needs an estimate from above. It starts from the latest report, of which an unknown part does not depend on the length. So a
    shorter prompt is taken to have all of the fixed part, and a longer one to grow as if there were none.

    Attributes:
        known: Whether there was a report.
        ours: Our count of the latest prompt reported; 0 before the first report.
        theirs: The endpoint's, from above.
        ratio: The tokens of the endpoint for each of ours if it charges all of the fixed part.
    """

    scale: float = 1.0
    more: float = 0.0
    known: bool = False
    ours: int = 0
    theirs: float = 0.0
    ratio: float = 1.0

    def of(self, ours: float) -> float:
        """Return the endpoint's count of a prompt that has *ours* by our own."""
        return max(1.0, ours * self.scale + self.more)

    @property
    def _steep(self) -> float:
        return min(_MAX_SCALE, max(self.ratio, self.theirs / max(1, self.ours)))

    @property
    def factor(self) -> float:
        """The endpoint's tokens of a text for each of ours, from above; 1 if it has no more than we count."""
        return 1.0 if self.ratio <= _CLOSE else self._steep

    def at_most(self, ours: float) -> float:
        """Return an upper estimate of the endpoint's count of a prompt that has *ours* by our own."""
        if not self.ours:
            return ours
        return self.theirs + (ours - self.ours) * (self.ratio if ours < self.ours else self._steep)

    def room(self, limit: int) -> int:
        """Return the most tokens by our own count, and never more than *limit*, of a prompt that may have *limit* by the endpoint's."""
        if not self.ours:
            return limit
        theirs = limit if self.ratio <= _CLOSE else limit / _MARGIN
        slope = self.ratio if theirs < self.theirs else self._steep
        return min(limit, math.floor(self.ours + (theirs - self.theirs) / slope))

    def learn(self, ours: int, theirs: int, *, fixed: int = 0, spare: int = 0) -> None:
        """Learn that the endpoint counted *theirs* for a prompt that has *ours* by our own.

        *fixed* are tokens beyond *ours* that are charged by some endpoints, as those of a schema. *spare* are tokens of *ours* by which
        it is likely to be too high.
        """
        step, self.known = (_STEP if self.known else 1.0), True
        if ours < _SHORT:
            most = (_MAX_SCALE - 1) * _SHORT
            self.more += (min(most, max(-most, theirs - ours * self.scale)) - self.more) * step
        else:
            measured = (theirs - self.more) / ours
            self.scale += (min(_MAX_SCALE, max(1 / _MAX_SCALE, measured)) - self.scale) * step
        ours -= spare
        # About a prompt of another length this one says more than the one before.
        alike = abs(ours - self.ours) * 4 <= self.ours
        before = self.at_most(ours) if alike else theirs
        self._start_from(ours, theirs if theirs > before else before - (before - theirs) * _STEP_DOWN, fixed)

    def raise_to(self, ours: int, theirs: int) -> None:
        """Count at least *theirs* for a prompt that has *ours* by our own, as far as that is believed."""
        if theirs > self.of(ours):
            self.scale = min(_MAX_SCALE, (theirs - self.more) / ours)
        if theirs > self.at_most(ours):
            self._start_from(ours, min(theirs, _MAX_SCALE * ours), 0)

    def _start_from(self, ours: int, theirs: float, fixed: int) -> None:
        self.ours, self.theirs = ours, theirs
        self.ratio = min(_MAX_SCALE, max(1 / _MAX_SCALE, theirs / max(1, ours + fixed)))


class LaneHistory(msgspec.Struct):
    """The record of a lane.

    Attributes:
        batch_size: Most requests of a batch, None until replies are damaged or hit the token limit.
        max_line_tokens: Most tokens of a batch's lines, None until a prompt was refused for its size.
        answer_tokens: The 95th percentile of the latest answers, as of the latest ranking; `unranked` were recorded since.
        thought: Tokens of the latest combined reply that were thoughts. They do not grow with the batch.
        thinking: Their part of that reply, from 0 to 1.
        single_tokens: An upper estimate of the tokens of single replies; None until the first.
        singles: What those took.
        shared_tokens: Tokens of the messages that its requests share; None until they are counted.
        suspended_for: Requests that still go alone before combining is tried again; 0 while it is not suspended.
        revised: Whether the lane's budget is outdated.
        alone: Requests in a row that were too long, or not cheaper, to be combined.
        drafts: Whether the first answers of replies may be drafts, so that none is handed out before the end.
        proven: Whether a combined reply was useful and ended where it should have.
        fruitless: Combined replies in a row without one sound element, or of a model that did not stop.
        overran: Whether a model did not stop after the last request.
        doubled: Whether the bound on combined replies is doubled, because it was too low.
        reasons: Whether the model reasons although it was told not to.
        affordable: The most tokens of a reply that the account's credit pays for.
        per_minute: Tokens allowed a minute according to a refusal. From then on the bound is close.
        times: How long its replies take; None without a limit on latency.
        cache: The provider's prefix cache; None unless it is weighed whether combining is cheaper.
    """

    batch_size: int | None = None
    max_line_tokens: int | None = None
    answers: deque[int] = msgspec.field(default_factory=lambda: deque(maxlen=64))
    answer_tokens: int = 32
    unranked: int = _RANK_AFTER
    thought: int = 0
    thinking: float = 0.0
    single_tokens: float | None = None
    singles: SingleReplies | None = None
    overhead: PromptOverhead | None = None
    shared_tokens: int | None = None
    prompt_scale: TokenScale = msgspec.field(default_factory=TokenScale)
    economics: LaneEconomics = msgspec.field(default_factory=LaneEconomics)
    suspended_for: int = 0
    suspensions: int = 0
    revised: bool = False
    alone: int = 0
    drafts: bool = False
    proven: bool = False
    fruitless: int = 0
    overran: bool = False
    doubled: bool = False
    reasons: bool = False
    affordable: int | None = None
    per_minute: int | None = None
    times: ReplyTimes | None = None
    cache: PrefixCache | None = None

    # --- lengths

    def record_answers(self, tokens: Sequence[int]) -> None:
        """Record the answers of one reply, in tokens each."""
        self.answers.extend(tokens)
        self.unranked += len(tokens)
        if self.unranked < _RANK_AFTER and max(tokens) <= self.answer_tokens:
            return
        self.unranked = 0
        ranked = sorted(self.answers)
        longest = max(1, ranked[min(len(ranked) - 1, len(ranked) * 95 // 100)])
        if longest != self.answer_tokens:  # the budget depends on it
            self.answer_tokens = longest
            self.revised = True

    def record_thinking(self, usage: Usage) -> None:
        """Record how much of a combined reply was thoughts."""
        part = usage.reasoning_tokens / max(1, usage.completion_tokens)
        if part != self.thinking:
            self.thought, self.thinking = usage.reasoning_tokens, part
            self.revised = True

    @property
    def written(self) -> int:
        """The 95th percentile of answers without their shares of thoughts, in tokens."""
        return max(1, math.ceil(self.answer_tokens * (1 - self.thinking)))

    def reply_tokens(self, items: int) -> int:
        """Return the tokens that a reply to *items* is likely to take at most, by earlier replies."""
        return items * self.written + self.thought

    def record_single(self, usage: Usage, line_bytes: int, answer_bytes: int) -> None:
        """Record a single reply; see `SingleReplies.record`.

        Its tokens differ from those of an answer in a combined reply, for instance by reasoning.
        """
        if self.singles is None:
            self.singles = SingleReplies()
        self.singles.record(usage, line_bytes, answer_bytes)
        tokens = usage.completion_tokens
        known = tokens if self.single_tokens is None else self.single_tokens
        self.single_tokens = above_most(known, tokens)

    def record_limits(self, limits: TokenLimits) -> None:
        """Record what a refusal said of the account's limits."""
        self.affordable = self.affordable if limits.affordable is None else limits.affordable
        self.per_minute = self.per_minute if limits.per_minute is None else limits.per_minute
        self.revised = True

    def record_prompt(self, ours: int, theirs: int, *, fixed: int, spare: int) -> None:
        """Record the endpoint's count of a prompt; see `TokenScale.learn`."""
        expected = self.prompt_scale.at_most(ours)
        self.prompt_scale.learn(ours, theirs, fixed=fixed, spare=spare)
        if abs(self.prompt_scale.at_most(ours) - expected) * 100 > expected:
            self.revised = True

    # --- sizes

    def shrink(self, tokens: int) -> None:
        """Halve the limit on the lines of a batch: a prompt with *tokens* in them was refused for its size.

        The limit never grows back, because a context window does not either.
        """
        half = tokens // 2
        self.max_line_tokens = half if self.max_line_tokens is None else min(half, self.max_line_tokens)
        self.revised = True

    def halve(self, asked: int) -> None:
        """Halve the size of batches: a reply to *asked* requests was damaged or hit the token limit.

        The least is two: nothing is learned from requests that go alone, and the lane would never grow again.
        """
        # Half of what was asked, not of the present size: calls of one size that were under way together halve it once.
        self.batch_size = max(2, min(asked // 2, self.batch_size or asked))
        self.revised = True

    def grow(self, asked: int, limit: int) -> None:
        """Allow one more request in a batch, up to *limit*: a reply to *asked* requests was complete."""
        if self.batch_size is not None and asked >= self.batch_size:
            self.batch_size = self.batch_size + 1 if self.batch_size + 1 < limit else None
            self.revised = True

    # --- whether combining is of use

    @property
    def parted(self) -> bool:
        """True while its requests go alone because of earlier replies."""
        return self.suspended_for > 0 or (self.times is not None and self.times.most == 1)

    def record_outcome(self, *, good: bool, judged: bool) -> None:
        """Record whether a combined reply was *good*: it had a sound element, and the model stopped. Cut replies are not *judged*."""
        if good and not self.proven:
            self.proven = self.revised = True
        if judged:
            self.fruitless = 0 if good else self.fruitless + 1

    @property
    def may_overrun(self) -> bool:
        """True if a combined reply may go on after the last request, by what earlier ones did."""
        return self.overran or not self.proven

    def is_useless(self, *, complete: bool) -> bool:
        """Return whether combining is of no use, or costs more than it saves, and is not suspended yet.

        Costs are *complete* once what the latest reply left unanswered has been asked again.
        """
        return not self.suspended_for and (self.is_fruitless or (complete and self.economics.lost))

    @property
    def is_fruitless(self) -> bool:
        """True if the latest combined replies were of no use."""
        return self.fruitless >= _FRUITLESS

    def suspend(self) -> None:
        """Suspend combining for a while. After that one fruitless reply suspends it again."""
        self.suspended_for = _SUSPENSION
        self.suspensions += 1
        self.revised = True

    def consume_suspension(self) -> bool:
        """Return whether a request goes alone because combining is suspended; the last such one ends the suspension."""
        if not self.suspended_for:
            return False
        self.suspended_for -= 1
        if not self.suspended_for:
            self.economics = LaneEconomics(batches=_BATCHES_ON_TRIAL)
            self.fruitless = min(self.fruitless, _FRUITLESS - 1)
            self.revised = True
        return True


def above_most(known: float, tokens: float) -> float:
    """Return an upper estimate of lengths that was *known* before one of *tokens*: up fast and down slowly, it stays above most."""
    return known + (tokens - known) * (_UP if tokens > known else _DOWN)


class LaneHistories(Generic[H]):
    """The histories of the lanes used last, which *make* makes, under a digest of their key."""

    def __init__(self, make: Callable[[], H], size: int = 1_024) -> None:
        self._make = make
        self._histories: LRU[bytes, H] = LRU(size)

    def of(self, key: Hashable) -> H:
        """Return the history of the lane with *key*; the same object as long as it is kept."""
        digest = hashlib.blake2b(repr(key).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        return self._histories.get_or_make(digest, self._make)
