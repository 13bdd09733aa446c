"""The index of kept answers: vectors of their questions, in partitions that share no entry.

An entry is a vector, the key under which the exact cache keeps the answer, and the signature of the question (see
`microbatch.semantic.guards`). The answer itself is in the exact cache only. The index is that of one process and is lost with it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.lru import LRU
from microbatch.semantic.evidence import rounded
from microbatch.semantic.guards import Signature, refusal
from microbatch.semantic.older import Older
from microbatch.semantic.vectors import Vectors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from microbatch.semantic.vectors import Floats, Ranked

logger: Final = logging.getLogger("microbatch")

MOST_EXACT: Final = 100_000
"""Entries of a partition that are all compared with a question: the newest."""

MOST_OLDER: Final = 1_000_000
"""Further entries of a partition, if usearch is installed."""

_MOST_PARTITIONS: Final = 1_024
_MOST_BYTES: Final = 1 << 30  # of vectors in all partitions

_CANDIDATES: Final = 8
"""Nearest entries whose guards are asked."""

_OLDER_CANDIDATES: Final = 32  # among them are entries that state other facts

_INLINE: Final = 1_000_000
"""Numbers that are multiplied on the event loop, in less than a millisecond; more in a thread."""


class Found(msgspec.Struct, frozen=True):
    """The outcome of a search.

    Attributes:
        key: The nearest entry that the guards allow, by its key; None for none.
        similarity: Its similarity; -1.0 for none.
        refused: Why the guards refuse the nearest entry of all; None if they allow it, or there is none.
        refused_similarity: Its similarity.
    """

    key: bytes | None = None
    similarity: float = -1.0
    refused: str | None = None
    refused_similarity: float = -1.0


NOTHING: Final = Found()


class _Entry(msgspec.Struct, eq=False):
    """An entry: its row, or with a *number* that it is an older one."""

    key: bytes
    signature: Signature
    row: int
    number: int | None = None

    def __repr__(self) -> str:
        """Return the place, without what the question states."""
        return f"_Entry(row={self.row}, number={self.number})"


class _Group(msgspec.Struct, eq=False):
    """Entries whose questions state the same facts: no others are compared."""

    number: int
    entries: int = 0


class Partition:
    """Entries that may answer the same questions.

    Attributes:
        tenant: Digest of the tenant; None for none.
        dimension: That of its vectors; None as long as it has had none.
    """

    def __init__(self, tenant: bytes | None, *, most: int = MOST_EXACT, most_older: int = MOST_OLDER) -> None:
        self.tenant = tenant
        self.dimension: int | None = None
        self._most = most
        self._most_older = most_older
        self._vectors: Vectors | None = None
        self._older: Older | None = None
        self._entries: dict[bytes, _Entry] = {}
        self._rows: dict[int, _Entry] = {}  # the oldest first, like the next
        self._numbers: dict[int, _Entry] = {}
        self._last_number = 0
        self._groups: dict[tuple[Any, ...], _Group] = {}
        self._last_group = 0

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._entries)

    @property
    def keys(self) -> Iterable[bytes]:
        """The keys of the entries."""
        return self._entries.keys()

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors."""
        return 0 if self._vectors is None else self._vectors.nbytes

    def fits(self, vector: Floats) -> bool:
        """Return whether *vector* has the length of the others."""
        return self.dimension is None or len(vector) == self.dimension

    def add(self, key: bytes, signature: Signature, vector: Floats) -> bytes | None:
        """Add an entry, in place of one with the same key; return the key of the oldest one if that had to go.

        *vector* has length 1, and fits.
        """
        if self._vectors is None:
            self.dimension = len(vector)
            self._vectors = Vectors(self.dimension)
        self.remove(key)
        evicted = self._make_room(self._vectors) if len(self._rows) >= self._most else None
        group = self._groups.get(signature.facts)
        if group is None:
            self._last_group += 1
            group = self._groups[signature.facts] = _Group(self._last_group)
        group.entries += 1
        entry = _Entry(key, signature, self._vectors.add(vector, group.number))
        self._entries[key] = self._rows[entry.row] = entry
        return evicted

    def _make_room(self, vectors: Vectors) -> bytes | None:
        """Move the oldest entry that has a row to the older ones; return the key of an entry that had to go, if any."""
        if self._older is None:
            self._older = Older.of(vectors.dimension)
        oldest = next(iter(self._rows.values()))
        if self._older is None:
            self.remove(oldest.key)
            return oldest.key
        evicted: bytes | None = None
        if len(self._numbers) >= self._most_older:
            evicted = next(iter(self._numbers.values())).key
            self.remove(evicted)
        self._last_number += 1
        self._older.add(self._last_number, vectors.vector(oldest.row))
        del self._rows[oldest.row]
        vectors.remove(oldest.row)
        oldest.number = self._last_number
        self._numbers[oldest.number] = oldest
        return evicted

    def remove(self, key: bytes) -> None:
        """Remove the entry with *key*, if there is one."""
        entry = self._entries.pop(key, None)
        if entry is None or self._vectors is None:
            return
        if entry.number is None:
            del self._rows[entry.row]
            self._vectors.remove(entry.row)
        else:
            del self._numbers[entry.number]
            if self._older is not None:
                self._older.remove(entry.number)
        group = self._groups[entry.signature.facts]
        group.entries -= 1
        if not group.entries:
            del self._groups[entry.signature.facts]

    async def nearest(self, asked: Sequence[tuple[Floats, Signature, bytes]]) -> list[Found]:
        """Return for each question that is *asked*, its vector, signature and key, what is nearest to it.

        The entry of the question itself is passed over. To a vector that does not fit nothing is near: entries of another length may
        have been added since it was read.
        """
        places = [place for place, (vector, _, _) in enumerate(asked) if self.fits(vector)]
        found = [NOTHING] * len(asked)
        for place, near in zip(places, await self._nearest([asked[place] for place in places]), strict=True):
            found[place] = near
        return found

    async def _nearest(self, asked: Sequence[tuple[Floats, Signature, bytes]]) -> list[Found]:
        """Return what `nearest` does, for vectors that fit."""
        vectors = self._vectors
        if vectors is None or not self._entries:
            return [NOTHING] * len(asked)
        groups = [self._groups.get(signature.facts) for _, signature, _ in asked]
        queries = [vector for vector, _, _ in asked]
        wanted = [0 if group is None else group.number for group in groups]
        search = vectors.search(list(zip(queries, wanted, strict=True)), _CANDIDATES)
        if self._older is not None:
            among_older = self._older.search(queries, _OLDER_CANDIDATES)
            ranked, older = await asyncio.to_thread(lambda: (search(), among_older()))
        else:
            small = vectors.numbers * len(asked) <= _INLINE
            nothing: Ranked = []
            ranked, older = search() if small else await asyncio.to_thread(search), [nothing] * len(asked)
        found: list[Found] = []
        for question, (allowed, any_), behind in zip(asked, ranked, older, strict=True):
            vector = question[0]
            # Looked at again, because rows may have changed since.
            near = [(vectors.similarity(vector, row), self._rows[row]) for _, row in allowed if row in self._rows]
            others = [(vectors.similarity(vector, row), self._rows[row]) for _, row in any_ if row in self._rows]
            near += (old := [(each, self._numbers[number]) for each, number in behind if number in self._numbers])
            found.append(_judged(question, near, others + old))
        return found


def _judged(
    asked: tuple[Floats, Signature, bytes], near: list[tuple[float, _Entry]], others: list[tuple[float, _Entry]]
) -> Found:
    """Return what is nearest of *near*, and what the guards say to the nearest of all, those and *others*."""
    _, signature, own = asked
    candidates = sorted(((each, entry) for each, entry in near if entry.key != own), key=_similarity, reverse=True)
    nearest = max([*candidates, *(pair for pair in others if pair[1].key != own)], key=_similarity, default=None)
    refused = None if nearest is None else refusal(signature, nearest[1].signature)
    refused_similarity = -1.0 if nearest is None or refused is None else rounded(nearest[0])
    for similarity, entry in candidates:
        if refusal(signature, entry.signature) is None:
            return Found(entry.key, rounded(similarity), refused, refused_similarity)
    return Found(None, -1.0, refused, refused_similarity)


def _similarity(pair: tuple[float, _Entry]) -> float:
    return pair[0]


class Index:
    """The partitions used lately, by their digests.

    Attributes:
        evictions: Entries dropped for lack of space.
    """

    def __init__(self) -> None:
        self.evictions: int = 0
        self._partitions: LRU[bytes, Partition] = LRU(None)
        self._of_key: dict[bytes, bytes] = {}  # the digest of the partition of each entry
        self._told = False
        self._bytes = 0  # of the vectors in all partitions, older ones aside

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._of_key)

    def get(self, digest: bytes) -> Partition | None:
        """Return the partition with *digest*, which becomes the one used last; None if it has no entry."""
        return self._partitions.get(digest)

    def add(self, digest: bytes, tenant: bytes | None, key: bytes, signature: Signature, vector: Floats) -> bool:
        """Add an entry to the partition with *digest*; return whether its vector fits there."""
        partition = self._partitions.get_or_make(digest, lambda: Partition(tenant))
        if not partition.fits(vector):
            return False
        self._bytes -= partition.nbytes
        evicted = partition.add(key, signature, vector)
        self._bytes += partition.nbytes
        self._of_key[key] = digest
        if evicted is not None:
            self._of_key.pop(evicted, None)
            self.evictions += 1
            if not self._told:
                self._told = True
                logger.warning(
                    "the semantic cache has %d questions of a kind, and drops the oldest for each new one; with usearch "
                    "(pip install 'microbatch[semantic]') it keeps %d",
                    len(partition),
                    MOST_EXACT + MOST_OLDER,
                )
        self._fit(partition)
        return True

    def _fit(self, kept: Partition) -> None:
        """Drop the partitions used the longest time ago, except *kept*, while there are too many or too large ones."""
        while len(self._partitions) > _MOST_PARTITIONS or self._bytes > _MOST_BYTES:
            oldest = self._partitions.oldest()
            if oldest is None or oldest[1] is kept:
                return
            self.evictions += len(oldest[1])
            self._drop(*oldest)

    def _drop(self, digest: bytes, partition: Partition) -> None:
        self._partitions.pop(digest)
        self._bytes -= partition.nbytes
        for key in partition.keys:
            self._of_key.pop(key, None)

    def remove(self, keys: Iterable[bytes]) -> None:
        """Remove the entries with *keys*, as far as there are any, and partitions that have none left."""
        for key in keys:
            digest = self._of_key.pop(key, None)
            partition = None if digest is None else self._partitions.get(digest)
            if digest is None or partition is None:
                continue
            partition.remove(key)
            if not len(partition):
                self._drop(digest, partition)

    def clear(self, matches: Callable[[bytes | None], bool] | None = None) -> None:
        """Remove the partitions whose tenant's digest matches; all with None."""
        for digest, partition in self._partitions.items():
            if matches is None or matches(partition.tenant):
                self._drop(digest, partition)
