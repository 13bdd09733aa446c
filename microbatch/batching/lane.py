"""A lane: the requests that may share a prompt, waiting for each other.

Pure bookkeeping: a lane is told the time, the limits and how to count tokens; it sends nothing and owns no timer.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import math
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.batching.prompt import ID_TOKENS
from microbatch.errors import ConfigError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

    from microbatch.batching.framing import Framing
    from microbatch.batching.schema import AnswerType
    from microbatch.messages import Reply, Usage

NEVER = float("inf")

_text_of = msgspec.json.Decoder(str).decode

_RANK_AFTER = 32
"""Answers after which their percentile is worked out anew, unless a longer one comes first."""


class FlushReason(enum.StrEnum):
    """Why a batch left its lane."""

    SIZE = "size"
    TOKENS = "tokens"
    OUTPUT = "output"
    TIMEOUT = "timeout"
    IDLE = "idle"
    EXPLICIT = "explicit"
    DRAIN = "drain"


class AloneReason(enum.StrEnum):
    """Why a request was sent as a single call."""

    IDLE = "idle"
    NO_COMPANY = "no_company"
    TOO_LONG = "too_long"
    NOT_COMBINABLE = "not_combinable"
    HIGH = "high"
    BYPASS = "bypass"
    FALLBACK = "fallback"


class Spec(msgspec.Struct, frozen=True, eq=False):
    """Everything of a request but its last user message; what the requests of a lane have in common.

    Attributes:
        key: The whole of it, hashable. Equal keys may share a prompt; anything that differs makes keys differ.
        model: As given, None for the transport's own.
        shared: The messages before the last one, as given.
        answer: The shape of an answer. Requests of one lane have equal schemas, though perhaps other Python types.
        max_tokens: Most tokens of one answer, or None.
        params: Further request fields, temperature included.
        headers: The caller's headers.
        low: Whether this is low-priority work, which waits longer and ignores `idle`.
        shared_chars: Length of the shared messages' texts, for estimates.
    """

    key: Hashable
    model: str | None
    shared: Sequence[Mapping[str, Any]]
    answer: AnswerType
    max_tokens: int | None
    params: Mapping[str, Any]
    headers: Mapping[str, str]
    low: bool
    shared_chars: int


class Ticket(msgspec.Struct, eq=False):
    """One accepted request, from its lane to its caller's future.

    Attributes:
        future: The caller's; done means nobody waits any more.
        spec: What it shares with its lane; its own when it goes alone.
        answer: How its answer is decoded.
        line: The last user message as its line will hold it, or b"" when it cannot be combined.
        tokens: The line's tokens without its id: an upper bound until `exact`.
        exact: Whether `tokens` was counted.
        created: Loop time of the submit, in seconds.
        due_at: Loop time until which it waits for company; `NEVER` for bulk work, which waits for a full batch.
        deadline: Loop time at which its caller gives up, or None.
        messages: All messages, for a request that is not combinable.
        attempts: Upstream calls that carried it so far.
        usage: Its shares of the calls that have ended, None before the first.
        cost_usd: Their price, None once one of them had no known price.
        queue: Where it waits to be sent, or None once it was.
        call: The call it travels or travelled in, the latest one; None before the first.
        reply: What its caller got.
        unclaimed: Whether its caller left in the moment it was answered.
        on_taken: For bulk work: called when it leaves its queue. None for a `submit`, whose caller waits for it alone.
        timer: Ends it at its deadline; the collector's.
    """

    future: asyncio.Future[Any]
    spec: Spec
    answer: AnswerType
    created: float
    line: bytes = b""
    tokens: int = 0
    due_at: float = NEVER
    deadline: float | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    exact: bool = False
    attempts: int = 0
    usage: Usage | None = None
    cost_usd: float | None = 0.0
    queue: Any = None
    call: Any = None
    reply: Reply[Any] | None = None
    unclaimed: bool = False
    on_taken: Callable[[Ticket], None] | None = None
    timer: asyncio.TimerHandle | None = None

    @property
    def text(self) -> str:
        """The last user message; "" when `messages` is set. Read from the line, because one copy is enough to keep."""
        return _text_of(self.line) if self.line else ""

    def taken(self) -> None:
        """It is no longer in a queue."""
        self.queue = None
        if self.on_taken is not None:
            self.on_taken(self)

    def count(self, counter: Callable[[str], int]) -> int:
        """Replace the bound by the exact number of tokens, once; return it."""
        if not self.exact:
            self.exact = True
            with contextlib.suppress(ConfigError):  # the counter failed; the bound still holds
                self.tokens = counter(f" {self.line.decode()}\n")
        return self.tokens


class Learned(msgspec.Struct):
    """What a lane has learned, kept beyond its life without any text.

    Attributes:
        batch_size: Most requests of a batch, halved when replies are cut off by the token limit; None until then.
        answers: Tokens of the latest answers.
        answer_tokens: Their 95th percentile, as of the latest ranking.
        unranked: Answers recorded since.
        framing: What surrounds its requests, measured on the first batch, or None.
        alone: Requests in a row that were too long to travel with others.
    """

    batch_size: int | None = None
    answers: deque[int] = msgspec.field(default_factory=lambda: deque(maxlen=64))
    answer_tokens: int = 32
    unranked: int = _RANK_AFTER
    framing: Framing | None = None
    alone: int = 0

    def record_answers(self, tokens: Sequence[int]) -> None:
        """Learn from the answers of one reply, in tokens each."""
        self.answers.extend(tokens)
        self.unranked += len(tokens)
        if self.unranked < _RANK_AFTER and max(tokens) <= self.answer_tokens:
            return
        self.unranked = 0
        ranked = sorted(self.answers)
        self.answer_tokens = max(1, ranked[min(len(ranked) - 1, len(ranked) * 95 // 100)])

    def halve(self, asked: int) -> None:
        """A reply to *asked* requests was cut off by the token limit: ask for half as many from now on."""
        self.batch_size = max(1, min(asked, self.batch_size or asked) // 2)

    def grow(self, asked: int, limit: int) -> None:
        """A reply to *asked* requests was complete: if that was a full batch of a halved lane, allow one more."""
        if self.batch_size is not None and asked >= self.batch_size:
            self.batch_size = self.batch_size + 1 if self.batch_size + 1 < limit else None


class Memory:
    """What lanes have learned, under a digest of their key, for the 1,024 used last."""

    def __init__(self, size: int = 1_024) -> None:
        self._size = size
        self._learned: OrderedDict[bytes, Learned] = OrderedDict()

    def of(self, key: Hashable) -> Learned:
        """Return what is known of the lane with *key*; the same object as long as it is remembered."""
        digest = hashlib.blake2b(repr(key).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        learned = self._learned.get(digest)
        if learned is None:
            learned = self._learned[digest] = Learned()
            if len(self._learned) > self._size:
                self._learned.popitem(last=False)
        else:
            self._learned.move_to_end(digest)
        return learned


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


class Lane:
    """Requests that may share a prompt, in order of arrival.

    The *fill* is the run of waiting requests, from the oldest, that the next batch will hold. It is extended as requests
    come, with upper bounds of their tokens as long as those suffice: only when one would overflow the budget are the
    largest bounds replaced by exact counts, until it fits or all are exact. So a short request is never tokenized, and none
    twice.

    Attributes:
        spec: What the requests have in common.
        learned: What is known of earlier batches.
        in_flight: Batches under way.
        live: Requests waiting.
        due_at: Loop time at which the lane falls due, `NEVER` if nothing waits for company.
    """

    __slots__ = (
        "_count",
        "_fill",
        "_fill_tokens",
        "_full",
        "_owed",
        "_owed_count",
        "_pending",
        "budget",
        "due_at",
        "in_flight",
        "learned",
        "live",
        "queued",
        "spec",
        "timer",
    )

    def __init__(self, spec: Spec, learned: Learned, budget: Budget, count: Callable[[str], int]) -> None:
        self.spec = spec
        self.learned = learned
        self.budget = budget
        self.in_flight = 0
        self.live = 0
        self.due_at = NEVER
        self.queued = False  # whether the scheduler has this lane in its turn
        self.timer: asyncio.TimerHandle | None = None  # the scheduler's
        self._count = count
        self._pending: deque[Ticket] = deque()  # discarded ones stay until they come up, or are too many
        self._fill = 0
        self._fill_tokens = 0
        self._full: FlushReason | None = None
        self._owed: FlushReason | None = None
        self._owed_count = 0

    @property
    def due(self) -> FlushReason | None:
        """Why the lane should leave now, or None to keep waiting."""
        return (self._full or self._owed) if self._fill else None

    @property
    def abandoned(self) -> bool:
        """Whether nothing waits and nothing is under way, so that the lane can go."""
        return not self.live and not self.in_flight

    def add(self, ticket: Ticket) -> None:
        """Queue *ticket*."""
        ticket.queue = self
        self._pending.append(ticket)
        self.live += 1
        if self._full is None:
            self._extend((ticket,))

    def rebudget(self, budget: Budget) -> None:
        """Work with another *budget* from now on."""
        if budget != self.budget:
            self.budget = budget
            self._refill()

    def owe(self, reason: FlushReason, *, everything: bool = False) -> None:
        """Make the lane due for *reason*: its next batch, or *everything* that waits now."""
        if self._owed is None:
            self._owed = reason
            self._owed_count = 0
        self._owed_count = max(self._owed_count, self.live if everything else 1)

    def discard(self, ticket: Ticket) -> None:
        """*ticket*, which waits here, has settled (its caller left): forget it."""
        ticket.taken()
        self.live -= 1
        self._pay_debt(self._owed_count - self.live)
        if len(self._pending) > 2 * self.live + 64:
            self._pending = deque(ticket for ticket in self._pending if ticket.queue is self)
        self._refill()

    def take(self) -> tuple[list[Ticket], FlushReason]:
        """Remove the next batch and return it with the reason it leaves. The lane must be due.

        The batch is empty if all of its callers have left in this very turn and have not been discarded yet.
        """
        reason = self.due
        if reason is None:
            raise AssertionError("take() from a lane that is not due")
        tickets: list[Ticket] = []
        left = self._fill
        while left:
            ticket = self._pending.popleft()
            if ticket.queue is self:
                left -= 1
                if not ticket.future.done():
                    ticket.taken()
                    tickets.append(ticket)
        self.live -= len(tickets)
        self._pay_debt(self._fill)
        self._refill()
        return tickets, reason

    def _pay_debt(self, count: int) -> None:
        """*count* fewer tickets are owed a flush."""
        if self._owed is not None and count > 0:
            self._owed_count -= count
            if self._owed_count <= 0:
                self._owed = None

    def waiting(self) -> list[Ticket]:
        """Return what waits, oldest first."""
        return [ticket for ticket in self._pending if ticket.queue is self and not ticket.future.done()]

    def _refill(self) -> None:
        """Work out the fill anew from the oldest waiting ticket."""
        self._fill = self._fill_tokens = 0
        self._full = None
        self.due_at = NEVER
        while self._pending and self._pending[0].queue is not self:
            self._pending.popleft()
        self._extend(self._pending)

    def _extend(self, tickets: Iterable[Ticket]) -> None:
        """Take *tickets* into the fill until it is full: then the lane is due, and no time is needed."""
        fill, total, budget = self._fill, self._fill_tokens, self.budget
        for ticket in tickets:
            if ticket.queue is not self:
                continue
            tokens = total + ticket.tokens + ID_TOKENS
            if tokens > budget.tokens and fill:
                self._fill, self._fill_tokens = fill, total
                if not self._fits_exactly(ticket):
                    self._full = FlushReason.TOKENS
                    return
                tokens = self._fill_tokens
            fill += 1
            total = tokens
            if fill >= budget.size:
                self._full = budget.size_reason
                break
            if ticket.due_at < self.due_at:  # noqa: PLR1730 min() is a call
                self.due_at = ticket.due_at
        self._fill, self._fill_tokens = fill, total

    def _fits_exactly(self, ticket: Ticket) -> bool:
        """Count the largest bounds until *ticket* fits behind the fill, or nothing is left to count."""
        fill = [waiting for waiting in self._pending if waiting.queue is self][: self._fill]
        fill.append(ticket)
        total = self._fill_tokens + ticket.tokens + ID_TOKENS
        for bounded in sorted(fill, key=_bound, reverse=True):
            if total <= self.budget.tokens or bounded.exact:
                break
            bound = bounded.tokens
            total -= bound - bounded.count(self._count)
        fits = total <= self.budget.tokens
        self._fill_tokens = total if fits else total - ticket.tokens - ID_TOKENS
        return fits


def _bound(ticket: Ticket) -> int:
    return -1 if ticket.exact else ticket.tokens


def output_reserve(max_tokens: int) -> int:
    """Return the tokens to reserve in a combined reply for an answer of at most *max_tokens*: that, JSON escapes, and framing."""
    return math.ceil(1.2 * max_tokens) + 16
