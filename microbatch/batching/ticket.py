"""One accepted request: what it shares with others, and how it stands with it."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.errors import ConfigError
from microbatch.prompt.compose import LINE_OVERHEAD_BYTES

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Hashable, Mapping

    from microbatch.batching.call_state import CallState
    from microbatch.batching.single_flight import Flight, InFlightIndex
    from microbatch.messages import Reply, Usage
    from microbatch.schema.answer_type import AnswerType

NEVER = float("inf")

HIGH, NORMAL, LOW = range(3)
"""Priorities as ranks: a lower one is more urgent."""

_text_of = msgspec.json.Decoder(str).decode


class AloneReason(enum.StrEnum):
    """Why a request was sent as a single call."""

    IDLE = "idle"
    NO_COMPANY = "no_company"
    TOO_LONG = "too_long"
    NOT_COMBINABLE = "not_combinable"
    HIGH = "high"
    BYPASS = "bypass"
    NOT_CHEAPER = "not_cheaper"
    FALLBACK = "fallback"


class Spec(msgspec.Struct, frozen=True, eq=False):
    """Everything of a request but its last user message; what the requests of a lane have in common.

    Attributes:
        key: The whole of it, hashable. Equal keys may share a prompt; anything that differs makes keys differ.
        content: The same without the priority: what two requests ask of the model, but for the last message.
        model: As given, None for the transport's own.
        shared: The messages before the last one, as given; of a request that goes alone, all of them.
        plain: The same, if each is a role and a text and nothing else; otherwise None.
        answer: The shape of an answer. Requests of one lane have equal schemas, though perhaps other Python types.
        max_tokens: Most tokens of one answer, or None.
        params: Further request fields, temperature included.
        headers: The caller's headers.
        tenant: The caller's trust domain, or None.
        rank: Its priority: 0 high, 1 normal, 2 low.
        shared_chars: Length of the shared messages' texts, for estimates.
    """

    key: tuple[Hashable, ...]
    content: Hashable
    model: str | None
    shared: list[dict[str, Any]]
    plain: list[dict[str, Any]] | None
    answer: AnswerType
    max_tokens: int | None
    params: Mapping[str, Any]
    headers: Mapping[str, str]
    tenant: str | None
    rank: int
    shared_chars: int

    def __repr__(self) -> str:
        """Tell the model, never the words or the headers."""
        return f"Spec(model={self.model!r}, shared=<{len(self.shared)}>, params={sorted(self.params)})"


class CallerOptions(msgspec.Struct, frozen=True, gc=False):
    """On what terms a caller asks.

    Attributes:
        timeout: Seconds until it gives up, or None.
        shared: Whether the answer to an equal request will do, and its own may serve others.
        key: The request's digest, by which others find it and its answer in the cache; None to compare it whole.
        ttl: Seconds for which the cache may give its answer to others, None for the cache's own time.
        since: Loop time from which `timeout` counts, None for that at which the request is accepted.
    """

    timeout: float | None = None
    shared: bool = False
    key: bytes | None = None
    ttl: float | None = None
    since: float | None = None

    def deadline(self, now: float) -> Deadline | None:
        """Return when the caller gives up, if it is accepted *now*; None for never."""
        if self.timeout is None:
            return None
        return Deadline(self.timeout + (now if self.since is None else self.since), self.timeout)


UNSHARED = CallerOptions()
SHARED = CallerOptions(shared=True)
"""The terms of most."""


class Deadline(msgspec.Struct):
    """When a caller gives up.

    Attributes:
        at: Loop time.
        timeout: The seconds that it was given.
        timer: Ends the wait then; None if somebody else sees to that.
    """

    at: float
    timeout: float
    timer: asyncio.TimerHandle | None = None

    def cancel(self) -> None:
        """The wait is over."""
        if self.timer is not None:
            self.timer.cancel()


class Charge(msgspec.Struct, frozen=True):
    """What a single call for a request is charged, where tokens are limited.

    Attributes:
        tokens: Tokens, those of the answer included.
        prompt: The prompt's part of that, by our own count; 0 where it is not counted.
    """

    tokens: int
    prompt: int = 0


class Past(msgspec.Struct, gc=False):
    """What has become of a request for which one call was not enough, or whose caller left in the moment it was answered.

    Attributes:
        attempts: Upstream calls that carried it before its present `call`.
        usage: Its shares of the calls that have ended, None if none of them has reported any.
        cost_usd: Their price, None once one of them had no known price.
        unclaimed: Whether its caller left in the moment it was answered.
    """

    attempts: int = 0
    usage: Usage | None = None
    cost_usd: float | None = 0.0
    unclaimed: bool = False


class Ticket(msgspec.Struct, eq=False):
    """One accepted request, from its lane to its caller's future.

    Many wait, so what few of them have stands apart, in `deadline`, `charge` and `past`.

    Attributes:
        future: The caller's; done means nobody waits any more.
        spec: What it shares with its lane; its own when it goes alone.
        answer: How its answer is decoded.
        created: Loop time of the submit, in seconds.
        line: The last user message as its line will hold it, or b"" when it cannot be combined.
        counted: The line's tokens without its id; None while they are known by their bound only.
        patience: Seconds that it waits for company; `NEVER` for bulk work, which waits for a full batch.
        terms: On what terms its caller asks; of a flight's, the first.
        on_taken: For bulk work: called when it leaves its queue.
        file: Where equal requests find it while it is under way, None if they do not.
        queue: Where it waits to be sent, or None once it was.
        call: The call it travels or travelled in, the latest one; None before the first.
        reply: What its caller got.
        flight: Its callers, once there are several; then `future` is nobody's.
        deadline: When its caller gives up, or None; its flight knows its callers' deadlines.
        charge: What a single call for it is charged; None where tokens are not limited.
        past: What became of it before, if anything did.
        origin: What hooks keep of its caller.
    """

    future: asyncio.Future[Reply[Any]]
    spec: Spec
    answer: AnswerType
    created: float
    line: bytes = b""
    counted: int | None = None
    patience: float = NEVER
    terms: CallerOptions = UNSHARED
    on_taken: Callable[[Ticket], None] | None = None
    file: InFlightIndex | None = None
    queue: Any = None
    call: CallState | None = None
    reply: Reply[Any] | None = None
    flight: Flight | None = None
    deadline: Deadline | None = None
    charge: Charge | None = None
    past: Past | None = None
    origin: Any = None

    @property
    def combinable(self) -> bool:
        """Whether it may share a prompt. If not, all of its messages are in its spec, which is its own."""
        return bool(self.line)

    @property
    def text(self) -> str:
        """The last user message; "" if it is not combinable. Read from the line, because one copy is enough to keep."""
        return _text_of(self.line) if self.line else ""

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Its messages as its caller gave them."""
        shared = self.spec.shared
        return [*shared, {"role": "user", "content": self.text}] if self.combinable else shared

    @property
    def tokens(self) -> int:
        """The line's tokens without its id; until they are counted, its bytes: every token of a byte-level BPE is at least one."""
        return len(self.line) + LINE_OVERHEAD_BYTES if self.counted is None else self.counted

    @property
    def cost(self) -> int:
        """Tokens that a single call for it is charged; 0 where tokens are not limited."""
        return 0 if self.charge is None else self.charge.tokens

    @property
    def due_at(self) -> float:
        """Loop time until which it waits for company."""
        return self.created + self.patience

    @property
    def bulk(self) -> bool:
        """Whether only bulk work waits for it, and nobody for it alone."""
        return self.on_taken is not None if self.flight is None else self.flight.bulk

    @property
    def attempts(self) -> int:
        """Upstream calls that carried it so far."""
        return (0 if self.past is None else self.past.attempts) + (0 if self.call is None else self.call.attempts)

    @property
    def usage(self) -> Usage | None:
        """Its shares of the calls that have ended and are on no reply; None before the first."""
        return None if self.past is None else self.past.usage

    @property
    def unclaimed(self) -> bool:
        """Whether its caller left in the moment it was answered."""
        return self.past is not None and self.past.unclaimed

    def remember(self) -> Past:
        """Return its past, which begins now if it had none."""
        if self.past is None:
            self.past = Past()
        return self.past

    def taken(self) -> None:
        """It is no longer in a queue."""
        self.queue = None
        if self.on_taken is not None:
            self.on_taken(self)

    def count(self, counter: Callable[[str], int]) -> int:
        """Replace the bound by the exact number of tokens, once; return it."""
        if self.counted is None:
            bound = self.tokens
            try:
                self.counted = counter(f" {self.line.decode()}\n")
            except ConfigError:  # the counter failed; the bound still holds
                self.counted = bound
        return self.tokens

    def __repr__(self) -> str:
        """Tell the state, never the words."""
        state = "settled" if self.future.done() else "waiting" if self.queue is not None else "in flight"
        return f"Ticket({state}, tokens={self.tokens}, attempts={self.attempts})"
