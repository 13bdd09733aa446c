"""The words of a spool: what is kept of a request, how it is handed to workers, and what becomes of it.

A request is *put* once. Workers *take* it under a *lease*; each taking is a *delivery*. It ends *done*, with an answer, or *dead*,
with the error that its last delivery failed with. A delivery that ends otherwise (its worker failed or died) puts it on the next
*stage*: it travels in a full batch first, in half a batch next, then alone, so that a request that brings its worker down takes
no other with it. Only who has failed alone several times is dead.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Literal, Protocol, Self, runtime_checkable

import msgspec

from microbatch.errors import mask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

KEEP: float = 7 * 86_400.0
"""Seconds that answers are kept unless told otherwise."""

MAX_ALONE = 3
"""Deliveries alone after which a request is dead unless told otherwise."""

LEASE = 60.0
"""Seconds for which a worker takes requests; it renews them as long as it lives."""

OVERDUE = 60.0
"""Seconds, or the time of the longest lease if that is longer, for which a lease may have run out unnoticed. If it was longer, the
clock was set, or all machines were asleep or off: the lease is given once more, for its worker to renew if it lives."""

LOST = "its worker died, or did not return it within its lease: the last of {} deliveries in vain"
"""What is told of a dead letter whose last lease ran out; to be filled in with the number of its deliveries."""


class Stage(enum.IntEnum):
    """In what company a request travels, by how often it has been delivered."""

    FULL = 0
    HALF = 1
    ALONE = 2

    @classmethod
    def after(cls, deliveries: int) -> Stage:
        """Return the stage of a request that was delivered so often before."""
        return cls(min(deliveries, cls.ALONE))


def is_dead(deliveries: int, max_alone: int) -> bool:
    """Return whether a request that was delivered so often, each time in vain, has had its chances."""
    return deliveries >= Stage.ALONE + max_alone


def as_kept(error: str) -> str:
    """Return what a spool keeps of *error*: at most 2 KB, whatever looks like a key blotted out, and nothing that UTF-8 cannot say."""
    return mask(error).encode(errors="replace").decode()


class Name(msgspec.Struct, frozen=True, array_like=True):
    """Names a request: its id within its tenant."""

    tenant: str | None
    id: str

    @property
    def key(self) -> str:
        """The same as one text, different for different names."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def of(cls, key: str | bytes) -> Self:
        """Return the name whose `key` this is."""
        return msgspec.json.decode(key, type=cls)


class Item(msgspec.Struct, frozen=True):
    """A request as it is kept.

    Attributes:
        name: Its name.
        digest: Digest of its content; the same name with another digest is a conflict.
        payload: Its content, opaque to the spool. Never a key or a header.
    """

    name: Name
    digest: bytes
    payload: bytes

    def __repr__(self) -> str:
        """Tell the name, never the words."""
        return f"Item({self.name.key})"


class Delivery(msgspec.Struct, frozen=True):
    """A request in the hands of a worker.

    Attributes:
        item: The request.
        deliveries: How often it was handed out, this time included.
        lease: What tells this delivery from earlier and later ones of the same request; the backend's.
        queued_at: When it was put, in seconds since 1970.
    """

    item: Item
    deliveries: int
    lease: str
    queued_at: float


PutOutcome = Literal["new", "known", "conflict"]
"""What came of putting a request: it is queued now; it was there already; another one has its name."""

State = Literal["unknown", "waiting", "leased", "in_job", "done", "dead", "lost"]


class Found(msgspec.Struct, frozen=True):
    """What is known of a name.

    Attributes:
        state: Where the request is; "leased" may also mean that its worker has died since, "lost" that the server has dropped the
            request, its place in the queue, or its answer.
        result: What `finish` stored, if it is done.
        error: What it failed with, if it is dead.
    """

    state: State
    result: bytes | None = None
    error: str | None = None


class DeadLetter(msgspec.Struct, frozen=True):
    """A request that failed for good.

    Attributes:
        item: The request.
        deliveries: How often it was handed out.
        error: What its last delivery failed with.
        died_at: When, in seconds since 1970.
    """

    item: Item
    deliveries: int
    error: str
    died_at: float


class Kept(msgspec.Struct, frozen=True):
    """Everything that is known of one request, for exports.

    Attributes:
        name: Its name.
        found: Its state, answer and error.
        deliveries: How often it was handed out.
        payload: Its content; None once it is done.
    """

    name: Name
    found: Found
    deliveries: int
    payload: bytes | None


class Counts(msgspec.Struct, frozen=True):
    """How many requests are where.

    Attributes:
        waiting: Those that can be taken now, by stage: full, half, alone.
        leased: Those in the hands of a worker whose lease has not run out.
        in_job: Those in a batch job at the provider.
        done: Answers that are kept.
        dead: Dead letters.
        oldest: Age in seconds of the one put longest ago that is neither done nor dead; None if there is none.
        lost: Those that the server has dropped, or whose place in the queue or answer it has dropped. They are not answered unless
            they are put again.
    """

    waiting: tuple[int, int, int] = (0, 0, 0)
    leased: int = 0
    in_job: int = 0
    done: int = 0
    dead: int = 0
    oldest: float | None = None
    lost: int = 0

    @property
    def depth(self) -> int:
        """Requests that are neither done nor dead."""
        return sum(self.waiting) + self.leased + self.in_job


class Job(msgspec.Struct, frozen=True):
    """A batch job at the provider, recorded before it is created there.

    Attributes:
        token: Its own name, which the provider keeps in the job's metadata.
        content: What is needed to create it, or to read its results; opaque to the spool.
        batch_id: The provider's name for it; None until it is known to exist.
    """

    token: str
    content: bytes
    batch_id: str | None = None


@runtime_checkable
class Spool(Protocol):
    """A durable queue, and the answers to what was in it. Every method raises `StorageError` when it cannot do what it says.

    Several processes use one at a time. Whatever a method changes, it changes as a whole or not at all.
    """

    async def open(self) -> None:
        """Make it ready.

        Raises:
            ConfigError: It cannot be used.
        """
        ...

    async def aclose(self) -> None:
        """Let go of it."""
        ...

    async def put(self, items: Sequence[Item]) -> list[PutOutcome]:
        """Queue *items*; once this returns they are durable. The first of several with one name counts.

        One that is lost is queued again, and is new.
        """
        ...

    async def take(self, stage: Stage, most: int, *, lease: float) -> list[Delivery]:
        """Take up to *most* requests of *stage* for *lease* seconds, in the order in which they were put.

        Requests whose lease has run out are taken anew, on their next stage; one that has had its chances becomes a dead letter.
        """
        ...

    async def renew(self, deliveries: Sequence[Delivery], *, lease: float) -> None:
        """Hold *deliveries* for *lease* seconds from now; those that are no longer held are passed over."""
        ...

    async def finish(self, results: Sequence[tuple[Delivery, bytes]]) -> None:
        """Store the results and acknowledge the requests, in one transaction.

        The first result of a request stays; it counts even if its lease has run out meanwhile. A dead letter that is answered
        after all is dead no longer.
        """
        ...

    async def give_back(self, deliveries: Sequence[Delivery], *, error: str, counted: bool) -> None:
        """Put requests back that were not answered.

        Args:
            deliveries: The requests; those that are done, or held by somebody else by now, are passed over.
            error: What they failed with; kept with a dead letter.
            counted: Whether they may be to blame, so that they go on to the next stage, or become dead letters; if not, it is as
                if they had not been delivered.
        """
        ...

    async def find(self, names: Sequence[Name]) -> list[Found]:
        """Return what is known of each of *names*."""
        ...

    async def counts(self) -> Counts:
        """Return how many requests are where."""
        ...

    def dead_letters(self) -> AsyncIterator[DeadLetter]:
        """Yield the dead letters, oldest first."""
        ...

    async def requeue(self, names: Sequence[Name] | None = None) -> int:
        """Queue dead letters anew, as if they had never been delivered: those of *names*, or all; return how many.

        Lost requests whose content is still there are queued as well.
        """
        ...

    def export(self) -> AsyncIterator[Kept]:
        """Yield everything that is kept, page by page; what changes meanwhile may be seen before or after its change."""
        ...

    # --- batch jobs at the provider

    async def begin_job(self, job: Job, deliveries: Sequence[Delivery], *, lease: float) -> None:
        """Record *job*, held by the caller for *lease* seconds, and tie *deliveries* to it: no lease of theirs runs out any more."""
        ...

    async def update_job(self, job: Job) -> None:
        """Record that *job*, begun before, has a `batch_id` by now."""
        ...

    async def take_jobs(self, most: int, *, lease: float) -> list[Job]:
        """Take up to *most* jobs that nobody holds, for *lease* seconds."""
        ...

    async def renew_jobs(self, tokens: Sequence[str], *, lease: float) -> None:
        """Hold jobs for *lease* seconds from now."""
        ...

    async def job_items(self, token: str) -> list[Delivery]:
        """Return the requests that are still tied to a job; they can be finished and given back like any others."""
        ...

    async def end_job(self, token: str, *, error: str) -> None:
        """Forget a job. Requests still tied to it are given back as counted, with *error*."""
        ...
