"""The vocabulary of a spool.

A request is *put* once. Workers *take* it under a *lease*; each taking is a *delivery*. It ends *done*, with an answer, or *dead*,
with the error of its last delivery. After a delivery that failed, or whose worker died, it moves to the next *stage*: it is sent in a
full batch first, in half a batch next, then alone, so that a request that crashes its worker takes no other with it. It is
dead-lettered after `max_alone` failed single deliveries.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Literal, Protocol, Self, runtime_checkable

import msgspec

from microbatch.errors import ConfigError, StorageError, mask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

KEEP: float = 7 * 86_400.0  # default number of seconds for which answers are kept
MAX_ALONE = 3  # default number of single deliveries after which a request is dead
LEASE = 60.0  # default duration of a lease in seconds; workers renew their leases
OVERDUE = 60.0
"""Seconds, or the duration of the longest lease if that is longer, after which an expired lease proves nothing: the clock was set, or
all machines were asleep or off. It is granted once more, so that its worker can renew it."""

LOST = "its worker died, or did not return it within its lease: the last of {} deliveries in vain"
"""Error of a dead letter whose last lease expired, to be formatted with the number of deliveries."""


class Stage(enum.IntEnum):
    """The size of the batch in which a request is sent, by its earlier deliveries."""

    FULL = 0
    HALF = 1
    ALONE = 2

    @classmethod
    def after(cls, deliveries: int) -> Stage:
        """Return the stage of a request after that number of deliveries."""
        return cls(min(deliveries, cls.ALONE))


def is_dead(deliveries: int, max_alone: int) -> bool:
    """Return whether a request is dead after that number of failed deliveries."""
    return deliveries >= Stage.ALONE + max_alone


def as_kept(error: str) -> str:
    """Return *error* as a spool stores it: at most 2 KB, keys masked, and valid UTF-8."""
    return mask(error).encode(errors="replace").decode()


class Name(msgspec.Struct, frozen=True, array_like=True):
    """The name of a request: its id within its tenant."""

    tenant: str | None
    id: str

    @property
    def key(self) -> str:
        """The name as one string."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def of(cls, key: str | bytes) -> Self:
        """Return the name with that `key`; raise `StorageError` if it is none."""
        try:
            return msgspec.json.decode(key, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError, TypeError) as error:
            raise StorageError(f"the name of a spooled request is damaged ({type(error).__name__})") from None

    @classmethod
    def checked(cls, tenant: str | None, id: str) -> Self:  # noqa: A002 see `Microbatcher.enqueue`
        """Return the name that a caller gives; raise `ConfigError` if it is none."""
        for word, value in (("id", id), ("tenant", tenant)):
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{word} must be a string, got {type(value).__name__}")
        if not id:
            raise ConfigError("id must not be empty")
        name = cls(None if tenant is None else str.__str__(tenant), str.__str__(id))
        try:
            _ = name.key
        except UnicodeEncodeError:
            raise ConfigError("id and tenant must be texts that UTF-8 can say") from None
        return name


class Item(msgspec.Struct, frozen=True):
    """A request as stored.

    Attributes:
        digest: Digest of its content. The same name with another digest is a conflict.
        payload: Its content, opaque to the spool. Never a key or a header.
    """

    name: Name
    digest: bytes
    payload: bytes

    def __repr__(self) -> str:
        return f"Item({self.name.key})"  # without content


class Delivery(msgspec.Struct, frozen=True):
    """A request leased to a worker.

    Attributes:
        deliveries: Number of deliveries, this one included.
        lease: Token that distinguishes the deliveries of one request.
        queued_at: Seconds since 1970.
    """

    item: Item
    deliveries: int
    lease: str
    queued_at: float


PutOutcome = Literal["new", "known", "conflict"]
"""The request is queued now, was stored before, or another one has its name."""

State = Literal["unknown", "waiting", "leased", "in_job", "done", "dead", "lost"]


class Found(msgspec.Struct, frozen=True):
    """The state of a name.

    Attributes:
        state: "leased" may also mean that the worker has died since; "lost" that the server has dropped the request, its place in
            the queue, or its answer.
        result: The result passed to `finish`, if done.
        error: The error, if dead.
    """

    state: State
    result: bytes | None = None
    error: str | None = None


class DeadLetter(msgspec.Struct, frozen=True):
    """A request that failed for good; `died_at` is in seconds since 1970."""

    item: Item
    deliveries: int
    error: str
    died_at: float


class Kept(msgspec.Struct, frozen=True):
    """All that is stored about one request, for exports; `payload` is None once it is done."""

    name: Name
    found: Found
    deliveries: int
    payload: bytes | None


class Counts(msgspec.Struct, frozen=True):
    """The number of requests by state.

    Attributes:
        waiting: Requests that can be taken now, by stage.
        leased: Requests under a lease that has not expired.
        oldest: Age in seconds of the oldest request that is neither done nor dead; None if there is none.
        lost: Requests that the server has dropped, or whose place in the queue or answer it has dropped. They are not answered unless
            put again.
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
        """Number of requests that are neither done nor dead."""
        return sum(self.waiting) + self.leased + self.in_job


class Job(msgspec.Struct, frozen=True):
    """A batch job at the provider, recorded before it is created there.

    Attributes:
        token: Its name here.
        content: What is needed to create it and to read its results; opaque to the spool.
        batch_id: The provider's name for it; None until its creation is recorded.
    """

    token: str
    content: bytes
    batch_id: str | None = None


@runtime_checkable
class Spool(Protocol):
    """A durable queue, and the answers to the requests in it. Every method raises `StorageError` if it fails.

    Several processes use one at a time. Each change is made as a whole or not at all.
    """

    async def open(self) -> None:
        """Open the spool; raise `ConfigError` if it cannot be used."""
        ...

    async def aclose(self) -> None:
        """Close the spool."""
        ...

    async def put(self, items: Sequence[Item]) -> list[PutOutcome]:
        """Queue *items*, durably; of several with one name the first counts. A lost one is queued again, and is new."""
        ...

    async def take(self, stage: Stage, most: int, *, lease: float) -> list[Delivery]:
        """Lease up to *most* requests of *stage* for *lease* seconds, in the order in which they were put.

        Requests whose lease has expired are moved to their next stage first, or become dead letters.
        """
        ...

    async def renew(self, deliveries: Sequence[Delivery], *, lease: float) -> None:
        """Extend the leases of *deliveries* to *lease* seconds from now, except those no longer held."""
        ...

    async def finish(self, results: Sequence[tuple[Delivery, bytes]]) -> None:
        """Store the results and acknowledge the requests, in one transaction.

        The first result of a request stays. It counts even if its lease has expired, or the request has become a dead letter.
        """
        ...

    async def give_back(self, deliveries: Sequence[Delivery], *, error: str, counted: bool) -> None:
        """Return requests that were not answered, except those done or held by another worker by now.

        If the delivery is *counted* they move to the next stage, or become dead letters with *error*.
        """
        ...

    async def find(self, names: Sequence[Name]) -> list[Found]:
        """Return the state of each of *names*."""
        ...

    async def counts(self) -> Counts:
        """Return the number of requests by state."""
        ...

    def dead_letters(self) -> AsyncIterator[DeadLetter]:
        """Yield the dead letters, oldest first; those whose last lease has expired by now are included."""
        ...

    async def requeue(self, names: Sequence[Name] | None = None) -> int:
        """Queue the dead letters of *names*, or all, as if they had never been delivered; return their number.

        Lost requests whose content is still there are queued as well.
        """
        ...

    def export(self) -> AsyncIterator[Kept]:
        """Yield everything stored, in pages; a change made meanwhile may or may not be seen."""
        ...

    # --- batch jobs at the provider

    async def begin_job(self, job: Job, deliveries: Sequence[Delivery], *, lease: float) -> None:
        """Record *job*, leased to the caller for *lease* seconds, and tie *deliveries* to it; their own leases end."""
        ...

    async def update_job(self, job: Job) -> None:
        """Record the `batch_id` of *job*, unless it has ended."""
        ...

    async def take_jobs(self, most: int, *, lease: float) -> list[Job]:
        """Lease up to *most* jobs that no worker holds for *lease* seconds."""
        ...

    async def renew_jobs(self, tokens: Sequence[str], *, lease: float) -> None:
        """Extend the leases of jobs to *lease* seconds from now."""
        ...

    async def job_items(self, token: str) -> list[Delivery]:
        """Return the requests still tied to a job; they can be finished and given back like any others."""
        ...

    async def end_job(self, token: str, *, error: str) -> None:
        """Delete a job. Requests still tied to it are given back as counted, with *error*."""
        ...
