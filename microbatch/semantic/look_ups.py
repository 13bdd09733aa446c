"""Looks for answers to similar questions, while the requests wait in their queues, and collects the evidence on them.

A request that was accepted is looked up in a task of the batcher, together with all others of the same step. If its kind of question is
proven and there is something to be found, it is held in its queue meanwhile, for a few times as long as look-ups take; after one that
was late none is held until one was in time. On a hit it leaves its queue and is answered; one that is sent already goes on.

A look-up has four steps: the vector; the nearest entry of the partition that the guards allow; the evidence, whether it may be handed
out or is worth a comparison; the exact entry, read at that moment. What fails is a miss. When the answer of a request that was asked is
stored, its own entry is added to the index. Before that, one that had no neighbour is looked up once more: of many that are asked at
the same time the later ones are compared with the first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from microbatch.audit.comparison import can_compare
from microbatch.audit.evidence import Evidence
from microbatch.batching.ticket import HIGH, NO_CONTEXT
from microbatch.caching.key import last_text
from microbatch.containment import contained
from microbatch.errors import Filtered, MalformedAnswer, MicrobatchError, Refused
from microbatch.semantic.evidence import interval
from microbatch.semantic.guards import LONGEST, Signature, signature
from microbatch.semantic.index import NOTHING, Found
from microbatch.storage.coalescer import Coalescer

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from microbatch.accounting.stats import Ledger
    from microbatch.audit.lane_kind import LaneKinds
    from microbatch.batching.dependencies import Dependencies
    from microbatch.batching.request import Options
    from microbatch.batching.ticket import Ticket, TicketQueue
    from microbatch.caching.answer_cache import AnswerCache
    from microbatch.caching.entry import Entry
    from microbatch.messages import Messages
    from microbatch.semantic.cache import SemanticCache
    from microbatch.semantic.checks import Checks
    from microbatch.semantic.embedding import Embed
    from microbatch.semantic.evidence import KindEvidence
    from microbatch.semantic.vectors import Floats

logger: Final = logging.getLogger("microbatch")

_MORE_THAN_TEXT: Final = frozenset({"n", "logprobs", "top_logprobs", "modalities", "audio"})
"""Request parameters with which an answer is more than the text that is compared."""

_SLICE: Final = 8
"""Questions whose facts are read before the event loop gets its turn."""

_HOLD: Final = 4.0
"""Requests are held for so many times as long as look-ups take, and at least for `_SHORTEST_HOLD` seconds."""

_SHORTEST_HOLD: Final = 0.01
_WEIGHT: Final = 0.1  # of the latest look-up, unless it took longer than those before


class LookUp(msgspec.Struct, eq=False):
    """The look-up of one ticket.

    Attributes:
        text: Its last text.
        partition: The digest of its partition.
        looks: Whether the answer to a similar question will do; False only adds its own to the index.
        holds: Whether its ticket waits for it.
        vector: The vector of the text, once it has come.
        neighbour: The key of the entry with which its answer is going to be compared; None for none.
        similarity: That of the neighbour.
        kept: Whether the answer was stored.
    """

    text: str
    partition: bytes
    kind: KindEvidence
    looks: bool
    holds: bool = False
    signature: Signature | None = None
    vector: Floats | None = None
    neighbour: bytes | None = None
    similarity: float = -1.0
    kept: bool = False

    def __repr__(self) -> str:
        """Return the state, without the text."""
        return f"LookUp(looks={self.looks}, holds={self.holds}, similarity={self.similarity}, kept={self.kept})"


Looking: TypeAlias = tuple["Ticket", LookUp]


class LookUps:
    """The look-ups of one batcher.

    Args:
        cache: The index, the evidence, and the settings.
        answers: The exact cache, as the batcher uses it.
        given: What the parts of the batcher share.
        kinds: Names the kinds of questions.
        embed: Returns vectors.
        checks: Compares answers and asks again.

    Attributes:
        checks: As given.
    """

    def __init__(
        self,
        cache: SemanticCache,
        answers: AnswerCache,
        given: Dependencies,
        kinds: LaneKinds,
        *,
        embed: Embed,
        checks: Checks,
    ) -> None:
        self._cache = cache
        self._answers = answers
        self._ledger: Ledger = given.ledger
        self._settlement = given.settlement
        self._price = given.price
        self._default_model = given.default_model
        self._kinds = kinds
        self._embed = embed
        self.checks: Checks = checks
        self._trips: Coalescer[Ticket, None] = Coalescer(self._look_up_all)
        self._answered: Coalescer[Ticket, None] = Coalescer(self._add_all)
        self._typical = 0.0  # seconds that look-ups have taken lately
        self._late = False  # whether the latest one took too long
        self._failed = False  # whether one has failed, which was logged

    @property
    def services(self) -> tuple[Callable[[], Coroutine[Any, Any, None]], ...]:
        """Functions that have to run while requests are accepted."""
        return self._trips.serve, self._answered.serve, *self.checks.services

    def figures(self) -> dict[str, Any]:
        """Return those fields of `Stats` that the evidence holds."""
        kinds = [kind.figures() for kind in self._cache.kinds.values() if kind.pairs or kind.not_comparable]
        live = Evidence()
        for kind in self._cache.kinds.values():
            live.worse += kind.live.worse
            live.equal += kind.live.equal
            live.better += kind.live.better
        return {
            "shadow_pairs": sum(kind.pairs for kind in kinds),
            "similar_checks": live.count,
            "false_hits": live.worse,
            "false_hit_interval": interval(live) if live.count else None,
            "similar": tuple(kinds),
        }

    # --- requests

    def begin(self, ticket: Ticket, messages: Messages, options: Options) -> None:
        """Begin to look for the answer to a question similar to that of *ticket*, which has just been queued, if there may be one."""
        with contained() as beginning:  # the ticket is queued, and has to be answered whatever happens here
            ticket.look_up = look_up = self._look_up(ticket, messages, options)
            if look_up is not None:
                self._ledger.look_ups += look_up.looks
                self._trips.submit_detached(ticket)
        if beginning.error is not None:
            logger.error("a look-up failed in microbatch itself", exc_info=beginning.error)

    def _look_up(self, ticket: Ticket, messages: Messages, options: Options) -> LookUp | None:
        """Return the look-up of *ticket*; None if it takes no part."""
        keys, text = self._answers.keys, last_text(messages)
        if (
            keys is None
            or not text
            or len(text) > LONGEST
            or _role(messages[-1]) != "user"
            or not _MORE_THAN_TEXT.isdisjoint(options.params)
        ):
            return None
        partition = keys.without_last_text(messages, options)
        kind = self._cache.kind(self._name(ticket, partition), ticket.spec.model or self._default_model)
        if kind.state == "closed":
            return None
        looks = ticket.caller.shared and ticket.caller.audited  # not to fill a cache
        may_hit = looks and kind.state == "proven" and self._cache.index.get(partition) is not None
        return LookUp(text, partition, kind, looks, may_hit and self._may_wait(ticket))

    def _may_wait(self, ticket: Ticket) -> bool:
        """Return whether *ticket* has the time to wait for a look-up."""
        if self._late or ticket.spec.rank == HIGH:
            return False
        # As it may wait for other requests: no longer than for half of its caller's time.
        left = None if ticket.deadline is None else ticket.deadline.at - asyncio.get_running_loop().time()
        return left is None or self._patience <= left / 2

    @property
    def _patience(self) -> float:
        """Seconds for which requests are held."""
        return min(self._cache.lookup_timeout, max(_SHORTEST_HOLD, _HOLD * self._typical))

    def _name(self, ticket: Ticket, partition: bytes) -> str:
        """Return the digest of the kind of question."""
        spec = ticket.spec
        if self._cache.isolate:
            return partition.hex()[:16]
        if spec.kind is not None:
            return spec.kind.digest
        *shared, last = spec.shared
        return self._kinds.digest_of(spec, [*shared, {**last, "content": ""}])

    def keep(self, tickets: Iterable[Ticket]) -> None:
        """Note that the answers of *tickets* have been stored."""
        for ticket in tickets:
            look_up = _of(ticket)
            if look_up is not None:
                look_up.kept = True
                if look_up.vector is not None:
                    self._answered.submit_detached(ticket)

    async def _add_all(self, tickets: list[Ticket]) -> list[None]:
        """Add the questions of *tickets*, whose answers are stored, to the index, and compare them with those before."""
        shadow = [
            (ticket, look_up)
            for ticket in tickets
            if (look_up := _of(ticket))
            and look_up.looks
            and look_up.neighbour is None
            and look_up.kind.state == "shadow"
        ]
        for (_, look_up), found in await self._nearest_of_all(shadow):
            if found.key is not None and look_up.kind.wants(found.similarity):
                look_up.neighbour, look_up.similarity = found.key, found.similarity
        for ticket in tickets:
            if (look_up := _of(ticket)) is not None:
                self._add(ticket, look_up)
        return [None] * len(tickets)

    def _add(self, ticket: Ticket, look_up: LookUp) -> None:
        """Add the question of *ticket* to the index, and compare its answer with that of its neighbour."""
        ticket.look_up = None
        key, keys = ticket.caller.key, self._answers.keys
        if key is None or keys is None or look_up.vector is None or look_up.signature is None:
            return
        tenant = keys.tenant_digest(ticket.spec.tenant)
        self._cache.index.add(look_up.partition, tenant, key, look_up.signature, look_up.vector)
        if look_up.neighbour is not None:
            self.checks.compare(ticket, look_up.kind, look_up.neighbour, look_up.similarity)

    # --- look-ups

    async def _look_up_all(self, tickets: list[Ticket]) -> list[None]:
        loop = asyncio.get_running_loop()
        begun, timer = loop.time(), loop.call_later(self._patience, _release, tickets, context=NO_CONTEXT)
        try:
            await self._read_vectors(tickets)
            read = [ticket for ticket in tickets if (found := _of(ticket)) and found.vector is not None]
            await self._find(read)
            if read:
                took = loop.time() - begun
                self._typical = max(took, self._typical + _WEIGHT * (took - self._typical))
        except Exception:
            logger.exception("a look-up failed in microbatch itself")
        finally:
            timer.cancel()
            _release(tickets)
        return [None] * len(tickets)

    async def _read_vectors(self, tickets: list[Ticket]) -> None:
        """Set the vectors of *tickets*, as far as they come in time and can be used."""
        loop = asyncio.get_running_loop()
        begun, most = loop.time(), self._cache.lookup_timeout
        looking = [look_up for ticket in tickets if (look_up := _of(ticket)) is not None]
        try:
            vectors = await self._embed(tickets, [look_up.text for look_up in looking], most)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            self._note_failure(looking, error)
            return
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 foreign code; a Rust panic is a BaseException
            if isinstance(error, TimeoutError) and loop.time() - begun > most / 2:
                self._late = True
                self._ledger.look_ups_late += sum(look_up.looks for look_up in looking)
            else:
                self._note_failure(looking, error)
            return
        self._late = False
        lengths = {len(vector) for vector in vectors if vector is not None}
        for number, (look_up, vector) in enumerate(zip(looking, vectors, strict=True)):
            partition = self._cache.index.get(look_up.partition)
            if vector is None:
                self._note_failure(
                    [look_up], MalformedAnswer("a vector is not one of finite numbers, or has no length")
                )
            elif partition is not None and not partition.fits(vector):
                misfit = f"a vector has {len(vector)} numbers, and those before had {partition.dimension}"
                self._note_failure([look_up], MalformedAnswer(misfit))
            elif partition is None and len(lengths) > 1:  # the length of the partition would be a matter of chance
                self._note_failure([look_up], MalformedAnswer("the vectors of a list differ in length"))
            else:
                look_up.signature, look_up.vector = signature(look_up.text), vector
            if number % _SLICE == _SLICE - 1:
                await asyncio.sleep(0)

    def _note_failure(self, looking: Sequence[LookUp], error: BaseException) -> None:
        self._ledger.look_ups_failed += sum(look_up.looks for look_up in looking)
        if not self._failed:
            self._failed = True
            logger.warning(
                "the semantic cache got no vectors, and looks nothing up without them (told once): %s: %s",
                type(error).__name__,
                # Foreign messages may hold texts and keys.
                error if isinstance(error, MicrobatchError) else "raised by the embedding function",
            )

    async def _find(self, tickets: list[Ticket]) -> None:
        """Find what is nearest to each of *tickets*, which have vectors, and hand out what may be."""
        looking = [(ticket, look_up) for ticket in tickets if (look_up := _of(ticket)) and look_up.looks]
        hits: list[tuple[Ticket, LookUp, Found]] = []
        for (ticket, look_up), found in await self._nearest_of_all(looking):
            kind, similarity = look_up.kind, found.similarity
            if found.refused is not None and _matters(kind, found.refused_similarity):
                self._ledger.guard_refusals[found.refused] += 1
            if found.key is not None and kind.allows(similarity):
                hits.append((ticket, look_up, found))
            elif found.key is not None and kind.wants(similarity):
                look_up.neighbour, look_up.similarity = found.key, similarity
                ticket.future.add_done_callback(partial(_note_refusal, look_up), context=NO_CONTEXT)
        await self._hand_out_all(hits)
        for ticket in tickets:
            look_up = _of(ticket)
            if look_up is not None and look_up.kept:
                self._answered.submit_detached(ticket)

    async def _nearest_of_all(self, looking: Sequence[Looking]) -> list[tuple[Looking, Found]]:
        """Return each of *looking*, which have vectors, with what is nearest to it."""
        groups: dict[bytes, list[Looking]] = {}
        for each in looking:
            groups.setdefault(each[1].partition, []).append(each)
        nearest: list[tuple[Looking, Found]] = []
        for digest, group in groups.items():
            partition = self._cache.index.get(digest)
            asked = [
                (look_up.vector, look_up.signature, ticket.caller.key or b"")
                for ticket, look_up in group
                if look_up.vector is not None and look_up.signature is not None
            ]
            found = [NOTHING] * len(group) if partition is None else await partition.nearest(asked)
            nearest += zip(group, found, strict=True)
        return nearest

    # --- hits

    async def _hand_out_all(self, hits: Sequence[tuple[Ticket, LookUp, Found]]) -> None:
        """Read the exact entries of *hits*, and hand out those that are there."""
        kept, gone = await self._answers.look_up_entries([found.key for _, _, found in hits if found.key is not None])
        self._cache.index.remove(gone)
        for (ticket, look_up, found), entry in zip(hits, kept, strict=True):
            if entry is not None:
                self._hand_out(ticket, look_up.kind, entry, found.similarity)

    def _hand_out(self, ticket: Ticket, kind: KindEvidence, entry: Entry, similarity: float) -> None:
        """Answer the callers of *ticket*, if it is unsent, with *entry*."""
        queue = ticket.queue
        if queue is None or ticket.done or not kind.allows(similarity):
            return
        if not can_compare(ticket.answer, entry.text, self._cache.same):
            kind.not_comparable += 1
            return
        reply = self._answers.reply(entry, ticket.answer, ticket.created)
        if reply is None:
            return
        reply.route, reply.score = "similar", similarity
        reply._wait = None  # noqa: SLF001 no field, see `Reply`
        queue.discard(ticket)
        price = self._price(entry.model)
        self._settlement.answer([(ticket, reply)], saved=None if price is None else price(entry.alone))
        for waiter in ticket.callers:
            if waiter.own_reply is not None:
                self._ledger.save(entry.alone, price)
        if ticket.reply is not None:
            self.checks.sample(ticket, kind, entry, similarity)


def _note_refusal(look_up: LookUp, future: asyncio.Future[Any]) -> None:
    """Count a question that the endpoint, or the model, will not answer: the answer to a similar one would have been wrong."""
    if future.cancelled() or not isinstance(future.exception(), Filtered | Refused):
        return
    kind = look_up.kind
    if kind.wants(look_up.similarity):
        kind.add(kind.begin(look_up.similarity), 1)


def _of(ticket: Ticket) -> LookUp | None:
    return ticket.look_up if isinstance(ticket.look_up, LookUp) else None


def _role(message: Any) -> object:
    return message["role"] if isinstance(message, Mapping) and "role" in message else getattr(message, "role", None)


def _matters(kind: KindEvidence, similarity: float) -> bool:
    """Return whether an answer of that *similarity* would have been handed out or compared."""
    return kind.allows(similarity) or kind.wants(similarity)


def _release(tickets: Iterable[Ticket]) -> None:
    """Hold *tickets* no longer."""
    queues: dict[int, TicketQueue] = {}
    for ticket in tickets:
        look_up = ticket.look_up
        if look_up is not None and look_up.holds:
            look_up.holds = False
            if ticket.queue is not None:
                queues[id(ticket.queue)] = ticket.queue
    for queue in queues.values():
        queue.looked_up()
