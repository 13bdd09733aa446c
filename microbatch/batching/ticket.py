"""Accepted requests and their callers: what a request shares with others, and its state."""

from __future__ import annotations

import contextvars
import enum
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from microbatch.errors import ConfigError
from microbatch.prompt.codec import Settings
from microbatch.prompt.compose import LINE_OVERHEAD_BYTES
from microbatch.transports.reply_fields import read_tier

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Hashable, Iterable

    from microbatch.audit.lane_kind import LaneKind
    from microbatch.messages import Reply, Usage
    from microbatch.schema.answer_type import AnswerType
    from microbatch.transports.accounts import Account, Permit

NEVER = float("inf")

NO_CONTEXT = contextvars.Context()
"""Callbacks and timers run in it, not in that of the caller who set them."""

HIGH, NORMAL, LOW = range(3)
"""Priorities as ranks: a lower one is more urgent."""

text_of: Callable[[bytes], str] = msgspec.json.Decoder(str).decode
"""Return the text in a line."""


class FlushReason(enum.StrEnum):
    """Why a batch left its lane."""

    SIZE = "size"
    TOKENS = "tokens"
    OUTPUT = "output"
    LATENCY = "latency"
    TIMEOUT = "timeout"
    IDLE = "idle"
    EXPLICIT = "explicit"
    DRAIN = "drain"


class AloneReason(enum.StrEnum):
    """Why a request was sent as a single call."""

    IDLE = "idle"
    NO_COMPANY = "no_company"
    TOO_LONG = "too_long"
    OUTPUT = "output"
    NOT_COMBINABLE = "not_combinable"
    HIGH = "high"
    BYPASS = "bypass"
    NOT_CHEAPER = "not_cheaper"
    CONDEMNED = "condemned"
    LATENCY = "latency"
    FALLBACK = "fallback"
    AUDIT = "audit"
    CHECK = "check"


class Spec(Settings, frozen=True, eq=False):
    """All of a request but its last user message: what the requests of a lane have in common.

    Attributes:
        key: The whole of it, hashable. Equal keys may share a prompt; anything that differs makes keys differ.
        content: The key without the priority: what two requests ask of the model, except the last message.
        shared: The messages before the last one, as given; of a request that goes alone, all of them.
        plain: The same if each is a role and a text and nothing else, otherwise None.
        rank: Priority: 0 high, 1 normal, 2 low.
        shared_chars: Length of the shared messages' texts, for estimates.
        kind: Its kind of lane; None without an audit and a cache, and for requests that go alone by their form.
    """

    key: tuple[Hashable, ...]
    content: Hashable
    shared: list[dict[str, Any]]
    plain: list[dict[str, Any]] | None
    tenant: str | None
    rank: int
    shared_chars: int
    kind: LaneKind | None = None

    @property
    def tier(self) -> str | None:
        """The service tier that its calls ask for, in lower case; None for the usual one."""
        return read_tier(self.params.get("service_tier"), None) if self.params else None

    def counted_text(self, line: bytes) -> str:
        """Return the text whose tokens an item with *line* takes in a call, its frame aside."""
        return f" {line.decode()}\n"

    def __repr__(self) -> str:
        """Return the model, without texts or headers."""
        return f"Spec(model={self.model!r}, shared=<{len(self.shared)}>, params={sorted(self.params)})"


class Live(Protocol):
    """See `LiveAnswer`."""

    streamed: bool
    begun: bool

    def take(self, data: bytes) -> None: ...  # noqa: D102


class CallerOptions(msgspec.Struct, frozen=True, gc=False):
    """The options of one caller.

    Attributes:
        shared: Whether the answer to an equal request will do, and its own may serve others.
        key: The request's digest, under which the cache keeps its answer and equal requests find it; None to compare the whole request.
        ttl: Seconds for which the cache may give its answer to others; None for the cache's own time.
        since: Loop time from which `timeout` counts; None for the time at which the request is accepted.
        live: What takes the answer while it arrives, and whatever it is; None to take it when it is complete and fits.
        audited: Whether its answer may be audited, or another one handed out in its place if that is right often enough.
    """

    timeout: float | None = None
    shared: bool = False
    key: bytes | None = None
    ttl: float | None = None
    since: float | None = None
    live: Live | None = None
    audited: bool = True

    def deadline(self, now: float) -> Deadline | None:
        """Return when the caller gives up if it is accepted *now*; None for never."""
        if self.timeout is None:
            return None
        return Deadline(self.timeout + (now if self.since is None else self.since), self.timeout)


UNSHARED = CallerOptions()
SHARED = CallerOptions(shared=True)
"""The options of most callers."""


class Deadline(msgspec.Struct):
    """When a caller gives up: the loop time, its timeout in seconds, and the timer that ends the wait."""

    at: float
    timeout: float
    timer: asyncio.TimerHandle | None = None

    def cancel(self) -> None:
        """Stop the timer."""
        if self.timer is not None:
            self.timer.cancel()


class Charge(msgspec.Struct, frozen=True):
    """Tokens that a single call for a request is charged, and the prompt's part by our own count; 0 where it is not counted."""

    tokens: int
    prompt: int = 0


class Past(msgspec.Struct):
    """Data of a ticket that few need.

    Attributes:
        attempts: Upstream calls that carried it before its present `call`.
        usage: Its shares of the calls that have ended and are on no reply; None if none has reported any.
        cost_usd: Their price; None once one of them had no known price.
        unclaimed: Callers that left at the moment they were answered, while the call was still going on.
    """

    attempts: int = 0
    usage: Usage | None = None
    cost_usd: float | None = 0.0
    unclaimed: list[Waiter] = []


class Call(Protocol):
    """The upstream call that carries a ticket; see `CallState`."""

    attempts: int
    ended: bool
    only_reasoning: bool
    size: int
    unenforced: bool
    permit: Permit | None
    price: Callable[[Usage], float] | None
    sent: float
    usage: Usage | None

    def ends_before(self, deadline: Deadline | None) -> bool:
        """Return whether it may end for lack of time while a caller with *deadline*, None for none, goes on waiting."""

    def abandoned(self) -> None:
        """Note that one request it carries has ended without an answer."""

    def replaced(self, alone: Usage, price: Callable[[Usage], float] | None) -> None:
        """Note that answered requests would have used *alone*, at *price*, in calls of their own."""


class LookUp(Protocol):
    """The search for the answer to a similar question; see `microbatch.semantic.look_ups`."""

    holds: bool


class TicketQueue(Protocol):
    """The queue in which a ticket waits to be sent."""

    @property
    def account(self) -> Account:
        """The account that pays for its calls."""

    @property
    def due(self) -> object:
        """Something true if it has work to give now."""

    @property
    def has_company(self) -> bool:
        """True if what waits in it is likely to share a call."""

    @property
    def flushed(self) -> bool:
        """True if what waits may be due because it was flushed, rather than by its own time."""

    def discard(self, ticket: Any, *, moved: bool = False) -> None:
        """Forget *ticket*, which has ended, or has *moved* to another queue."""

    def hasten(self, ticket: Ticket, due_at: float, *, bulk: bool) -> None:
        """Advance the time by which *ticket* leaves to *due_at* (loop time) for a joining caller; *bulk* if it is bulk work."""

    def flush(self, reason: FlushReason) -> None:
        """Make everything that waits due now."""

    def looked_up(self) -> None:
        """Note that tickets in it may be held no longer."""


class InFlightIndex(dict["Hashable", "Ticket"]):
    """Tickets that may be joined: the latest under each name.

    The name is the request's digest if it has one, else its line, else, if it goes alone, its spec's key.
    """

    __slots__ = ("__weakref__",)


class Waiter(msgspec.Struct, eq=False):
    """One caller of a ticket.

    Attributes:
        future: Settled exactly once, by an answer, an error or the caller itself.
        created: Loop time of its submit.
        on_taken: For bulk work, which waits for full batches: called when the ticket leaves its queue.
        origin: What hooks keep for it.
    """

    future: asyncio.Future[Reply[Any]]
    answer: AnswerType
    created: float
    on_taken: Callable[[Waiter], None] | None
    deadline: Deadline | None
    origin: Any

    @property
    def own_reply(self) -> Reply[Any] | None:
        """Its answer; None if it has none (yet)."""
        future = self.future
        return future.result() if future.done() and not future.cancelled() and future.exception() is None else None


class Ticket(Waiter, eq=False):
    """One accepted request: the unit that waits in a queue and travels in a prompt.

    It is its own first caller, which may have left, and has others once equal requests have joined it. Many tickets wait, so what few
    of them need is kept apart, in `charge`, `past` and `waiters`.

    Attributes:
        line: The last user message, or the text to embed, as its line will hold it: JSON; b"" if it cannot be combined.
        counted: The line's tokens without its id; None while they are known by their bound only.
        patience: Seconds that it waits for other requests; `NEVER` for bulk work, which waits for a full batch.
        bulk: Whether all of its callers are bulk work.
        index: Where equal requests find it, None if they do not.
        waiters: All of its callers that have not left, in order of arrival, once there have been several; after the answer those
            that were answered. A dict that serves as an ordered set, because many may leave at once.
        call: The latest call that carried it.
        reply: Its answer. With one caller it is the caller's own; with several each has a copy with a share of the cost.
        charge: The charge of a single call for it; None where tokens are not limited.
        own: Its messages as given, which a single call carries, if they have another form than those of its spec and line.
        look_up: The search for the answer to a similar question; None if there is none.
    """

    spec: Spec
    line: bytes = b""
    counted: int | None = None
    patience: float = NEVER
    caller: CallerOptions = UNSHARED
    bulk: bool = False
    index: InFlightIndex | None = None
    waiters: dict[Waiter, None] | None = None
    queue: TicketQueue | None = None
    call: Call | None = None
    reply: Reply[Any] | None = None
    charge: Charge | None = None
    past: Past | None = None
    own: list[dict[str, Any]] | None = None
    look_up: LookUp | None = None

    @property
    def callers(self) -> Iterable[Waiter]:
        """Its callers; see `waiters`."""
        return (self,) if self.waiters is None else self.waiters

    @property
    def done(self) -> bool:
        """True if no caller waits for it any more, even if a cancelled one has not been noticed yet."""
        if self.waiters is None:
            return self.future.done()
        return all(waiter.future.done() for waiter in self.waiters)

    @property
    def held(self) -> bool:
        """True while it may soon be answered without a call, and is not urgent."""
        return self.look_up is not None and self.look_up.holds and self.spec.rank != HIGH

    @property
    def last_deadline(self) -> Deadline | None:
        """When the last caller gives up; None if one never does."""
        latest: Deadline | None = None
        for waiter in self.callers:
            if waiter.deadline is None:
                return None
            if latest is None or waiter.deadline.at > latest.at:
                latest = waiter.deadline
        return latest

    @property
    def combinable(self) -> bool:
        """True if it may share a prompt. If not, all of its messages are in its spec, which is its own."""
        return bool(self.line)

    @property
    def text(self) -> str:
        """The last user message; "" if it is not combinable. Read from the line, because one copy is enough to keep."""
        return text_of(self.line) if self.line else ""

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Its messages as its caller gave them."""
        if self.own is not None:
            return self.own
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
        """Loop time until which it waits for other requests."""
        return self.created + self.patience

    @property
    def attempts(self) -> int:
        """Upstream calls that carried it so far."""
        return (0 if self.past is None else self.past.attempts) + (0 if self.call is None else self.call.attempts)

    def join(self, waiter: Waiter) -> None:
        """Add another caller."""
        if self.waiters is None:
            self.waiters = {self: None}
        self.waiters[waiter] = None
        self.bulk = self.bulk and waiter.on_taken is not None

    def remember(self) -> Past:
        """Return its past, which begins now if it had none."""
        if self.past is None:
            self.past = Past()
        return self.past

    def taken(self) -> None:
        """Note that it has left its queue."""
        self.queue = None
        if self.waiters is None:
            if self.on_taken is not None:
                self.on_taken(self)
            return
        for waiter in self.waiters:
            if waiter.on_taken is not None:
                waiter.on_taken(waiter)

    def unlist(self) -> None:
        """Take it out of its index, so that no other caller joins it."""
        if self.index is not None:
            name = self.caller.key or self.line or self.spec.key
            if self.index.get(name) is self:  # else a later one has taken its place
                del self.index[name]

    def count(self, counter: Callable[[str], int]) -> int:
        """Replace the bound by the exact number of tokens, once; return it."""
        if self.counted is None:
            bound = self.tokens
            try:
                self.counted = counter(self.spec.counted_text(self.line))
            except ConfigError:  # the counter failed; the bound still holds
                self.counted = bound
        return self.tokens

    def __repr__(self) -> str:
        """Return the state, without any text."""
        state = "settled" if self.done else "waiting" if self.queue is not None else "in flight"
        return f"Ticket({state}, tokens={self.tokens}, attempts={self.attempts})"


class SlotLease(msgspec.Struct, eq=False):
    """A slot and a permit for code outside, which makes one attempt of its own.

    Attributes:
        granted: The permit, when the slot is granted; fails if it never will be.
        returned: Set by `give_back`.
        rank: Its priority.
        used: Whether the holder sent something past the permit.
    """

    cost: int
    granted: asyncio.Future[Permit]
    returned: asyncio.Event
    rank: int = NORMAL
    used: bool = False
    queue: TicketQueue | None = None

    @property
    def done(self) -> bool:
        """True if it is granted, or its holder has left."""
        return self.granted.done()

    @property
    def held(self) -> bool:
        """False: see `Ticket.held`."""
        return False

    def taken(self) -> None:
        """Note that it has left its queue."""
        self.queue = None

    def grant(self, permit: Permit) -> None:
        """Grant it *permit* and its slot."""
        self.granted.set_result(permit)

    def refuse(self, error: Exception) -> None:
        """Fail it with *error*, if it still waits."""
        if not self.done:
            self.granted.set_exception(error)

    def give_back(self) -> None:
        """Leave the queue, or give back the slot and what the permit has paid for and was not used.

        Only the holder calls it, when nothing that it sent is under way: a permit taken from it earlier, as when the batcher closes,
        would be refunded although its request was sent, and others would exceed the limits.
        """
        if self.queue is not None:
            self.queue.discard(self)
        granted = self.granted
        if granted.done() and not granted.cancelled() and granted.exception() is None:
            permit = granted.result()
            if self.used:
                permit.used()
            permit.finish()
        self.returned.set()
