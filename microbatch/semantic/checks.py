"""Compares the answers to similar questions, and asks again where they differ, or where one was handed out.

Asking again is a call of the lowest priority, outside cache and single flight, for which no caller waits; its route is "check". See
`microbatch.semantic.evidence` for the scores. A pair whose score is not known, because asking again failed, counts as wrong.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

from microbatch.audit.comparison import agree, can_compare, score
from microbatch.batching.call_state import AloneAnswer
from microbatch.batching.ticket import LOW
from microbatch.errors import BudgetExceeded, ConfigError, Filtered, RequestFailed
from microbatch.storage.coalescer import Coalescer
from microbatch.transports.credentials import hold_credentials

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Coroutine, Mapping
    from contextlib import AbstractAsyncContextManager

    from microbatch.batching.dispatch import Dispatcher
    from microbatch.batching.ticket import SlotLease, Ticket
    from microbatch.caching.answer_cache import AnswerCache
    from microbatch.caching.entry import Entry
    from microbatch.semantic.cache import SemanticCache
    from microbatch.semantic.evidence import Decision, KindEvidence, Pair

    Start = Callable[[Callable[[], Coroutine[Any, Any, None]]], object]
    Lease = Callable[[str | None, Mapping[str, str], int, int], AbstractAsyncContextManager[SlotLease]]
    Compared = tuple[Ticket, KindEvidence, bytes, float]

logger: Final = logging.getLogger("microbatch")

RATE: Final = 0.05
"""Share of the answers handed out that are asked again."""

_MOST: Final = 64
"""Calls under way beyond which nothing is compared or asked again, so that a slow endpoint does not pile them up."""

_PAUSE: Final = 600.0
"""Seconds without comparisons after the budget has refused to pay for one."""

_TRIES: Final = 2


class Checks:
    """The comparisons and checks of one batcher.

    Args:
        cache: The index, the evidence, and the settings.
        answers: The exact cache, as the batcher uses it.
        dispatcher: Asks alone.
        draw: Decides what is asked again.

    Attributes:
        callers_pay: Returns whether requests with these headers are paid for by their callers; nothing is asked again for them.
    """

    def __init__(self, cache: SemanticCache, answers: AnswerCache, dispatcher: Dispatcher, draw: random.Random) -> None:
        self.callers_pay: Callable[[Mapping[str, str]], bool] = hold_credentials
        self._cache = cache
        self._answers = answers
        self._dispatcher = dispatcher
        self._draw = draw
        self._pairs: Coalescer[Compared, None] = Coalescer(self._compare_all)
        self._under_way = 0
        self._ended = asyncio.Event()
        self._paused_until = float("-inf")
        self._start: Start
        self._lease: Lease
        self._closing: Callable[[], bool]

    def start(self, start: Start, lease: Lease, closing: Callable[[], bool]) -> None:
        """Begin: *start* runs a task, *lease* holds a slot, *closing* returns whether nothing new is to be asked."""
        self._start, self._lease, self._closing = start, lease, closing

    @property
    def services(self) -> tuple[Callable[[], Coroutine[Any, Any, None]], ...]:
        """Functions that have to run while requests are accepted."""
        return (self._pairs.serve,)

    async def settled(self) -> None:
        """Wait until nothing is compared and nothing asked again."""
        while self._under_way:
            self._ended.clear()
            await self._ended.wait()

    def _end(self, count: int = 1) -> None:
        self._under_way -= count
        self._ended.set()

    # --- pairs

    def compare(self, ticket: Ticket, kind: KindEvidence, neighbour: bytes, similarity: float) -> None:
        """Compare the answer to *ticket* with the entry *neighbour*, of a question of that *similarity*."""
        # Decided before the answers are looked at: what is left out must not depend on them.
        idle = self._under_way < _MOST and asyncio.get_running_loop().time() >= self._paused_until
        if idle and not self._closing() and not self.callers_pay(ticket.spec.headers):
            self._under_way += 1
            self._pairs.submit_detached((ticket, kind, neighbour, similarity))

    async def _compare_all(self, pairs: list[Compared]) -> list[None]:
        try:
            kept, gone = await self._answers.look_up_entries([neighbour for _, _, neighbour, _ in pairs])
            self._cache.index.remove(gone)
            for (ticket, kind, _, similarity), entry in zip(pairs, kept, strict=True):
                if entry is not None and kind.wants(similarity):
                    self._compare(ticket, kind, entry, similarity)
        finally:
            self._end(len(pairs))
        return [None] * len(pairs)

    def _compare(self, ticket: Ticket, kind: KindEvidence, entry: Entry, similarity: float) -> None:
        reply, same = ticket.reply, self._cache.same
        if reply is None:
            return
        if not can_compare(ticket.answer, entry.text, same):
            kind.add_not_comparable()
            return
        pair = kind.begin(similarity)
        agrees = agree(ticket.answer, entry.text, reply.text, same)
        if agrees is False:
            self._under_way += 1
            self._start(lambda: self._settle(ticket, kind, pair, entry.text, reply.text))
        else:
            self._note(kind, kind.add(pair, 0 if agrees else 1))

    async def _settle(self, ticket: Ticket, kind: KindEvidence, pair: Pair, kept: str, asked: str) -> None:
        """Ask again, and add the score of *pair*, whose answers, *kept* and *asked*, differ."""
        scored: int | None = None
        try:
            scored = await self._second(ticket, kept, asked)
        finally:
            self._note(kind, kind.add(pair, 1 if scored is None else scored))
            self._end()

    async def _second(self, ticket: Ticket, kept: str, first: str) -> int | None:
        """Return the score of answers that differ, after asking once more; None if it is not known."""
        for _ in range(_TRIES):
            second = await self._ask(ticket)
            if second is not None and second.text is not None:
                answer, same = ticket.answer, self._cache.same
                return score(
                    first=agree(answer, first, second.text, same), batched=agree(answer, kept, second.text, same)
                )
        return None

    # --- answers that were handed out

    def sample(self, ticket: Ticket, kind: KindEvidence, entry: Entry, similarity: float) -> None:
        """Ask *ticket*, which was answered with *entry*, again, or not."""
        if (
            self._draw.random() < RATE
            and self._under_way < _MOST
            and not self._closing()
            and not self.callers_pay(ticket.spec.headers)
        ):
            self._under_way += 1
            self._start(lambda: self._check(ticket, kind, entry, similarity))

    async def _check(self, ticket: Ticket, kind: KindEvidence, entry: Entry, similarity: float) -> None:
        try:
            first = await self._ask(ticket)
            if first is None or first.text is None:
                return
            agrees, scored = agree(ticket.answer, entry.text, first.text, self._cache.same), 0
            if not agrees:
                second = None if agrees is None else await self._second(ticket, entry.text, first.text)
                scored = 1 if second is None else second
            self._note(kind, kind.add_live(similarity, scored))
            if scored > 0:
                self._cache.index.remove([entry.key])
                if ticket.caller.key is not None:
                    await self._answers.correct(ticket, first)
        finally:
            self._end()

    # --- both

    async def _ask(self, ticket: Ticket) -> AloneAnswer | None:
        """Ask for *ticket* alone; return None if no reply came."""
        spec = ticket.spec
        try:
            async with self._lease(spec.model, spec.headers, ticket.cost, LOW) as lease:
                if not self._closing():
                    return await self._dispatcher.ask_again(ticket, lease.granted.result(), None, "check")
        except Filtered:
            return AloneAnswer("", spec.model, None, kept=False)  # which agrees with no answer
        except BudgetExceeded:
            self._paused_until = asyncio.get_running_loop().time() + _PAUSE
        except (RequestFailed, ConfigError):
            pass
        return None

    def _note(self, kind: KindEvidence, decision: Decision | None) -> None:
        """Log what was decided."""
        if decision == "proven":
            logger.info(
                "answers to similar questions of the kind %s are handed out from a similarity of %g on",
                kind.digest,
                kind.threshold,
            )
        elif decision == "raised":
            logger.info("answers to similar questions of the kind %s are compared again: one was wrong", kind.digest)
        elif decision == "closed":
            logger.warning(
                "no answers to similar questions are handed out for questions of the kind %s any more: %s",
                kind.digest,
                kind.why,
            )
