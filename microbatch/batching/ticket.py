"""One accepted request: what it shares with others, and how it stands with it."""

from __future__ import annotations

import contextlib
import enum
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.errors import ConfigError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Hashable, Mapping

    from microbatch.batching.exchange import Exchange
    from microbatch.batching.flight import File, Flight, Sharing
    from microbatch.batching.schema import AnswerType
    from microbatch.messages import Reply, Usage

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


class Ticket(msgspec.Struct, eq=False):
    """One accepted request, from its lane to its caller's future.

    Attributes:
        future: The caller's; done means nobody waits any more.
        spec: What it shares with its lane; its own when it goes alone.
        answer: How its answer is decoded.
        line: The last user message as its line will hold it, or b"" when it cannot be combined.
        tokens: The line's tokens without its id: an upper bound until `exact`.
        exact: Whether `tokens` was counted.
        cost: Tokens that a single call for it is charged; 0 where tokens are not limited.
        prompt_tokens: The prompt's part of that, by our own count; 0 where it is not counted.
        created: Loop time of the submit, in seconds.
        patience: Seconds that it waits for company; `NEVER` for bulk work, which waits for a full batch.
        sharing: How equal requests find its answer; None for one that is not shared.
        file: Where equal requests find it while it is under way, None if they do not.
        name: What it is filed under there.
        deadline: Loop time at which its caller gives up, or None.
        earlier_attempts: Upstream calls that carried it before `call`.
        usage: Its shares of the calls that have ended, None before the first.
        cost_usd: Their price, None once one of them had no known price.
        queue: Where it waits to be sent, or None once it was.
        call: The call it travels or travelled in, the latest one; None before the first.
        reply: What its caller got.
        unclaimed: Whether its caller left in the moment it was answered.
        on_taken: For bulk work: called when it leaves its queue.
        timer: Ends it at its deadline; the collector's.
        origin: What hooks keep of its caller.
        flight: Its callers, once there are several; then `future` is nobody's.
    """

    future: asyncio.Future[Reply[Any]]
    spec: Spec
    answer: AnswerType
    created: float
    line: bytes = b""
    tokens: int = 0
    patience: float = NEVER
    sharing: Sharing | None = None
    file: File | None = None
    name: bytes = b""
    deadline: float | None = None
    exact: bool = False
    cost: int = 0
    prompt_tokens: int = 0
    earlier_attempts: int = 0
    usage: Usage | None = None
    cost_usd: float | None = 0.0
    queue: Any = None
    call: Exchange | None = None
    reply: Reply[Any] | None = None
    unclaimed: bool = False
    on_taken: Callable[[Ticket], None] | None = None
    timer: asyncio.TimerHandle | None = None
    origin: Any = None
    flight: Flight | None = None

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
        return self.earlier_attempts + (self.call.attempts if self.call is not None else 0)

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

    def __repr__(self) -> str:
        """Tell the state, never the words."""
        state = "settled" if self.future.done() else "waiting" if self.queue is not None else "in flight"
        return f"Ticket({state}, tokens={self.tokens}, attempts={self.attempts})"
