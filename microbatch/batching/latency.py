"""The size of a lane's batches under a limit on latency, learned from how long its replies took.

The time of a reply is close to a line: a part that is paid once, up to the first token, and one for each answer. That batch size
follows a latency objective, through a linear model of a high quantile of the time by size, is taken from Clipper (Crankshaw et al.,
NSDI 2017, section 4.3.1); its other rule, additive increase and multiplicative decrease, is taken for the case in which the line is
unknown: one call at a time tries one request more, and sizes shrink to half at most. Unlike there, a reply is streamed, so that one
reply shows both parts of the line.

Each of the latest calls took some multiple of what the line says for its size; scaled by that, the line shows how many answers a call
like it gives within the limit. A size is allowed if, of its answers in all of those calls, few would have been late: less than 5 %, and
one call's worth as an outlier where calls are few. Half of the calls must give their last answer in time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from statistics import median
from typing import Final

import msgspec

_WINDOW: Final = 40
"""Replies that count, and calls between two trials, which so make up less than 5 %."""

_TICK: Final = 1e-6
"""The least time of a reply, in seconds."""

_ROUNDING: Final = 1e-9

_MARGIN: Final = 0.98
"""The part of the limit that is used where the line is rough: after few replies, and where replies are not streamed, whose answers are
late together."""

_FEW: Final = 3
"""Replies from which on one of them may be an outlier."""

_AT_ONCE: Final = 0.02
"""A reply whose later answers take at most this part of its time was held back, and does not show the time of an answer."""

# A hosted model of ordinary speed, until the first reply: the time to the first token, the tokens a second, what surrounds an answer,
# and an answer that its schema does not bound. The first two answers to arrive correct it; too small a batch costs some calls until
# then, one too large breaks the limit.
_FIRST_TOKEN: Final = 0.5
_RATE: Final = 80
_FRAME: Final = 16
_ANSWER: Final = 12


class TimedCall(msgspec.Struct, frozen=True, gc=False):
    """A combined call: the answers that it gave, the seconds until the last one, and whether they arrived one by one."""

    answers: int
    seconds: float
    streamed: bool


class ReplyTimes(msgspec.Struct):
    """How long the replies of one lane take, and how many requests may share a call.

    Attributes:
        limit: Seconds within which the last answer should arrive.
        first_size: Most requests of a batch until the first reply.
        size: Most requests by the replies so far; 1 if they go alone, None before the first.
        trial: Whether the next batch may hold one more, to see how long that takes.
        until_trial: Calls until the next trial.
        calls: The latest combined calls.
        paces: The seconds for each further answer in those that were streamed.
        singles: The seconds of the latest single calls.
    """

    limit: float
    first_size: int
    size: int | None = None
    trial: bool = False
    until_trial: int = 0
    calls: deque[TimedCall] = msgspec.field(default_factory=lambda: deque(maxlen=_WINDOW))
    paces: deque[float] = msgspec.field(default_factory=lambda: deque(maxlen=_WINDOW))
    singles: deque[float] = msgspec.field(default_factory=lambda: deque(maxlen=_WINDOW // 4))

    @property
    def most(self) -> int:
        """Most requests of the next batch; 1 if they go alone."""
        return self.first_size if self.size is None else self.size + self.trial

    def left(self, items: int) -> bool:
        """Note that a combined call of *items* has left; return whether `most` has changed because it was the trial."""
        if not self.trial or items < self.most:
            return False
        self.trial, self.until_trial = False, _WINDOW
        return True

    def left_alone(self) -> bool:
        """Return whether a request that goes alone does so because of the limit; see whether it is time for a trial."""
        if self.most != 1:
            return False
        self.until_trial -= 1
        self.trial = self.until_trial <= 0 and (not self.singles or median(self.singles) <= self.limit)
        return True

    def record(self, answers: int, seconds: float, pace: float | None = None) -> None:
        """Record that a combined call gave *answers*, the last one after *seconds*, in steps of *pace* seconds if that is known."""
        self.calls.append(TimedCall(answers, max(seconds, _TICK), streamed=pace is not None))
        if pace is not None:
            self.paces.append(pace)
        size = self._fitting()
        alone = size < 2 and (self.size == 1 or len(self.calls) >= _FEW)  # noqa: PLR2004 a batch
        self.size = 1 if alone else max(2, size)
        if alone:  # what is known is of no use for the time after that
            self.calls.clear()
            self.paces.clear()
            self.trial, self.until_trial = False, _WINDOW

    def _fitting(self) -> int:
        """Return the most requests of a batch that is answered within the limit, less than 1 if even one is not."""
        each = self._each()
        shares = median(call.seconds / call.answers for call in self.calls)
        if each is None:
            # With all of the time for the answers, no size is taken for faster than it is; one call of another size will show the line.
            self.until_trial -= 1
            self.trial = self.trial or self.until_trial <= 0
            each = shares
        each = min(each, shares)
        once = max(0.0, median(call.seconds - each * call.answers for call in self.calls))
        # For each call, the answers that one like it gives within the limit.
        in_time = []
        for call in self.calls:
            multiple = call.seconds / (once + each * call.answers)
            rough = not call.streamed or len(self.calls) < _FEW
            limit = self.limit * _MARGIN if rough else self.limit
            in_time.append((max(0, int((limit / multiple - once) / each + _ROUNDING)), call.streamed))
        # Far from the sizes that were measured the line is a guess.
        latest = [call.answers for call in self.calls][-_FEW:]
        largest = max(call.answers for call in self.calls)
        bold = each == shares or (self.paces and len(self.calls) < _WINDOW // 4)
        reach = 2 * largest if bold else largest + max(1, largest // 4)
        return max(max(latest) // 2, _most(in_time, max(reach, self.size or 0)))

    def _each(self) -> float | None:
        """Return the seconds for each answer, None if they are unknown: the larger of two figures, so that batches grow carefully."""
        known = [each for each in (self._by_stream(), self._by_size()) if each is not None]
        return max(known) if known else self._by_singles()

    def _by_stream(self) -> float | None:
        return median(self.paces) if self.paces else None

    def _by_size(self) -> float | None:
        """Return the slope between the smaller and the larger calls, the medians of each; None if it shows nothing."""
        calls = [(call.answers, call.seconds) for call in self.calls]
        middle = (min(calls)[0] + max(calls)[0]) / 2
        small = [call for call in calls if call[0] <= middle]
        large = [call for call in calls if call[0] > middle]
        return _slope(small, large) if large else None

    def _by_singles(self) -> float | None:
        calls = [(call.answers, call.seconds) for call in self.calls]
        return _slope([(1, seconds) for seconds in self.singles], calls) if self.singles else None


def _slope(small: list[tuple[int, float]], large: list[tuple[int, float]]) -> float | None:
    """Return the seconds for each further answer; None unless the larger calls hold more and take longer."""
    (less, sooner), (more, later) = (
        [median(column) for column in zip(*calls, strict=True)] for calls in (small, large)
    )
    return (later - sooner) / (more - less) if more > less and later > sooner else None


def _most(in_time: list[tuple[int, bool]], largest: int) -> int:
    """Return the most requests of a batch, up to *largest*, of whose answers enough are in time.

    *in_time* are the answers that each of the latest calls gives within the limit, and whether it was streamed: if not, one late
    answer makes all late.
    """
    few = len(in_time) < _FEW
    # In calls' worth of answers; one call may be an outlier.
    allowed = 1e-9 if few else 1 + len(in_time) / _WINDOW

    def too_many(size: int) -> bool:
        late = sum(max(0.0, 1 - fits / size) if streamed else fits < size for fits, streamed in in_time)
        return late >= allowed

    usual = int(median(fits for fits, _ in in_time))
    return bisect_left(range(1, min(usual, largest) + 1), x=True, key=too_many)


def first_size(limit: float, answer_tokens: int | None) -> int:
    """Return the requests of a batch under *limit* seconds before any reply; *answer_tokens* is None if the schema bounds no answer."""
    tokens = _FRAME + (_ANSWER if answer_tokens is None else answer_tokens)
    return max(2, int((limit - _FIRST_TOKEN) * _RATE / tokens))


class ReplyClock(msgspec.Struct):
    """The times of one combined reply, for `ReplyTimes`.

    Attributes:
        sent: Loop time at which the call left.
        first: The answers that came first, and the seconds until then.
        last: All answers, and the seconds until the last one.
    """

    times: ReplyTimes
    sent: float
    first: tuple[int, float] = (0, 0.0)
    last: tuple[int, float] = (0, 0.0)

    def found(self, answers: int, now: float) -> None:
        """Note that there are *answers* so far."""
        self.last = answers, now - self.sent
        if not self.first[0]:
            self.first = self.last

    def learn_early(self) -> bool:
        """Learn from the answers so far if nothing is known and they show the time of an answer; return whether they do."""
        if self.times.size is not None or self.last[0] == self.first[0]:
            return False
        self._record()
        return True

    def ended(self, asked: int, now: float, *, given_up: bool) -> bool:
        """Note that the call of *asked* requests is over, *given_up* if all callers have left; return whether the lane has learned."""
        seconds = now - self.sent
        if self.last[0]:
            self._record()
        elif given_up and seconds > self.times.limit:
            self.times.record(asked, seconds)  # it would have taken longer
        else:
            return False
        return True

    def _record(self) -> None:
        (first, begun), (last, seconds) = self.first, self.last
        spread = seconds - begun
        paced = last > first and spread > seconds * _AT_ONCE
        self.times.record(last, seconds, spread / (last - first) if paced else None)
