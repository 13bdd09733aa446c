"""Asks again for the texts that a call has left without a vector.

- A refused list is halved until the cause is alone: k causes among n texts take at most 1 + 2k * ceil(log2 n) calls. If there is no
  cause, the endpoint takes smaller lists only, and the lane learns how small.
- A list whose reply cannot be trusted, or holds vectors that cannot be used, is asked for in halves. When that brought nothing of use
  twice, or many lists were wrong, texts go alone: n texts that are always answered wrong take about 2n further calls. What is wrong
  alone as well is repeated once, and ends with an error then.
- If all vectors of a list have the same other length, one text is asked for alone first. If its vector has that length too, the model
  has changed, which is believed; or it ignores the dimensions asked for, and every text fails.
- Anything else has no cause in the texts and would fail them again: every text fails with the error.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, Literal, cast

import anyio
import msgspec

from microbatch.batching.lane_history import LaneHistory
from microbatch.errors import MalformedAnswer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Protocol

    from microbatch.batching.dependencies import Dependencies
    from microbatch.batching.lane import Lane
    from microbatch.batching.lane_table import LaneTable
    from microbatch.batching.ticket import Ticket
    from microbatch.embedding.codec import Vectors
    from microbatch.embedding.request import EmbeddingSpec
    from microbatch.errors import ConfigError, RequestFailed
    from microbatch.messages import Route
    from microbatch.transports.accounts import Permit

    class Asks(Protocol):
        """See `EmbeddingCalls`."""

        def permit(self, tickets: list[Ticket], like: Permit) -> Permit: ...  # noqa: D102

        async def ask(  # noqa: D102
            self, tickets: list[Ticket], lane: Lane, permit: Permit, route: Route
        ) -> ListOutcome: ...


logger: Final = logging.getLogger("microbatch")

_TRIED_AFTER: Final = 8_192
"""Texts answered in full lists after which a learned size is doubled; twice as many each time that was in vain."""

_VAIN: Final = 2
"""Times that a list was divided in vain after which texts go alone."""

_WRONG_SHARE: Final = 8
"""Texts of a list for each list that may be answered wrong in its recovery; after more, texts go alone."""

_ODD_ONES: Final = 3
"""Texts that failed by the length of their vectors, none answered between them, after which the known length is forgotten."""


class ListHistory(LaneHistory):
    """The record of a lane of texts. Of `LaneHistory`, `batch_size` is the learned size of lists.

    Attributes:
        length: Length of its vectors; None until it is known.
        odd: Texts in a row that failed because their vectors had another length.
        full: Texts answered in full lists since the size was learned.
        needed: Those after which a longer list is tried.
    """

    length: int | None = None
    odd: int = 0
    full: int = 0
    needed: int = _TRIED_AFTER

    def learn(self, vectors: Vectors, asked: int, *, again: bool) -> None:
        """Learn from the reply to a list of *asked* texts; if it has asked *again*, the recovery learns whether lists are of use."""
        if not vectors.sound:
            return
        self.length, self.odd = vectors.length, 0
        if asked > 1 and not again:
            self.record_outcome(good=True, judged=True)
        if self.batch_size is not None and asked >= self.batch_size:
            self.full += asked
            if self.full >= self.needed:
                self.batch_size, self.full = 2 * self.batch_size, 0
                self.revised = True

    def learn_size(self, size: int) -> None:
        """Learn that the endpoint takes lists of *size* texts, and refuses larger ones."""
        if self.batch_size is None or size < self.batch_size:
            self.needed = _TRIED_AFTER if self.batch_size is None else 2 * self.needed
            self.batch_size, self.full = size, 0
            self.revised = True

    def learn_odd(self) -> None:
        """Learn that a text has failed by the length of its vector: if that goes on, the model has changed."""
        self.odd += 1
        if self.odd >= _ODD_ONES:
            self.length, self.odd = None, 0


class ListOutcome(msgspec.Struct):
    """The outcome of a call for *tickets*.

    Attributes:
        ending: "complete" if all are answered, "wrong" if the reply holds a fault, "refused" for something that one text may have
            caused, or "failed" for a reason that no text has caused.
        error: The error that ended the call, or None.
        fault: What is wrong with the reply, or None.
        sound: Whether any text was answered.
        odd: Whether the fault is the length of a vector.
        other: See `Vectors`.
    """

    tickets: list[Ticket]
    ending: Literal["complete", "wrong", "refused", "failed"] = "failed"
    error: RequestFailed | ConfigError | None = None
    fault: str | None = None
    sound: bool = False
    odd: bool = False
    other: int | None = None

    @property
    def complete(self) -> bool:
        """True if nothing is left to do."""
        return self.ending == "complete" or all(ticket.done for ticket in self.tickets)


class _Part(msgspec.Struct, eq=False):
    """A part of the list: texts that travel in one call.

    Attributes:
        within: The part that it was divided from, None for the whole list.
        repeated: Whether it repeats a call for the same text.
        accepted: The longest list within it that the endpoint took.
    """

    tickets: list[Ticket]
    within: _Part | None = None
    outcome: ListOutcome | None = None
    repeated: bool = False
    accepted: int = 0

    def around(self) -> Iterator[_Part]:
        """Yield this part, and those that it was divided from."""
        part: _Part | None = self
        while part is not None:
            yield part
            part = part.within


class Recovery:
    """The recovery of one list: ends every text that its call left unanswered, with a vector or an error.

    Args:
        asking: Makes the calls.
        given: The objects that the parts of the batcher share.
        lanes: The open lanes.
        lane: That of the texts.
        permit: That of the first call.
    """

    def __init__(self, asking: Asks, given: Dependencies, lanes: LaneTable, lane: Lane, permit: Permit) -> None:
        self._asking = asking
        self._ledger = given.ledger
        self._fail = given.settlement.fail
        self._lanes = lanes
        self._lane = lane
        self._history: ListHistory = lane.history  # type: ignore[assignment] # of the lanes of texts
        self._permit = permit
        self._at_once = anyio.Semaphore(given.fallback.max_concurrent)
        self._refused: list[_Part] = []
        self._alone = False  # whether texts go alone, because lists are always answered wrong

    async def after(self, outcome: ListOutcome) -> None:
        """End every text that the first call, which ended with *outcome*, has left unanswered."""
        if outcome.other is not None and len(outcome.tickets) > 1 and await self._ignores_dimensions(outcome):
            return
        parts, vain, wrong = [_Part(outcome.tickets, outcome=outcome)], 0, 0
        sound = outcome.sound
        while parts := [part for each in parts for part in self._divided(each)]:
            async with anyio.create_task_group() as tasks:
                for part in parts:
                    tasks.start_soon(self._ask, part)
            self._learn_sizes()
            endings = [part.outcome for part in parts if part.outcome is not None]
            sound = sound or any(each.sound and len(each.tickets) > 1 for each in endings)
            wrong_lists = sum(each.ending == "wrong" and len(each.tickets) > 1 for each in endings)
            vain, wrong = vain + bool(wrong_lists), wrong + wrong_lists
            self._alone = (vain >= _VAIN and not sound) or wrong * _WRONG_SHARE > len(outcome.tickets)
            self._lanes.taught(self._lane)
        if len(outcome.tickets) > 1 and (sound or outcome.ending == "wrong"):
            self._history.record_outcome(good=sound, judged=True)
            self._note_vain()

    async def _ignores_dimensions(self, outcome: ListOutcome) -> bool:
        """Ask for one text alone after a list of another length; return whether all have failed, because nothing else will come."""
        probe = _Part(outcome.tickets[:1])
        await self._ask(probe)
        if probe.outcome is None or probe.outcome.other != outcome.other:
            return False
        if cast("EmbeddingSpec", self._lane.spec).dimensions is None:
            self._history.length = None
            return False
        for ticket in outcome.tickets:
            self._fail(ticket, MalformedAnswer(f"{outcome.fault}, in a list and alone: the model ignores dimensions="))
        return True

    def _divided(self, part: _Part) -> list[_Part]:
        """Return the parts in which *part* is asked for again; none if all of its texts have ended."""
        outcome = part.outcome
        left = [ticket for ticket in part.tickets if not ticket.done]
        if outcome is None or not left:
            return []
        single, size = len(part.tickets) == 1, (len(left) + 1) // 2
        if outcome.ending == "wrong":
            if single and part.repeated:
                self._fail_wrong(left[0], outcome)
                return []
            size = 1 if self._alone else size
        elif outcome.ending == "refused" and not single:
            self._refused.append(part)
            if self._history.batch_size is not None:
                size = min(size, self._history.batch_size)
        else:
            if outcome.error is not None:
                for ticket in left:
                    self._fail(ticket, outcome.error)
            return []
        return [_Part(left[start : start + size], part, repeated=single) for start in range(0, len(left), size)]

    def _fail_wrong(self, ticket: Ticket, outcome: ListOutcome) -> None:
        if outcome.odd:
            self._history.learn_odd()
        self._fail(ticket, MalformedAnswer(f"{outcome.fault}, also when the text was asked alone, twice"))

    async def _ask(self, part: _Part) -> None:
        async with self._at_once:
            part.tickets = [ticket for ticket in part.tickets if not ticket.done]
            if not part.tickets:
                return
            permit = self._asking.permit(part.tickets, self._permit)
            try:
                part.outcome = await self._asking.ask(part.tickets, self._lane, permit, "fallback")
            finally:
                permit.finish()
        if part.outcome.ending in ("complete", "wrong"):
            for each in part.around():
                each.accepted = max(each.accepted, len(part.tickets))

    def _learn_sizes(self) -> None:
        """Learn from the refused lists whose texts have all been answered in smaller ones."""
        for part in self._refused:
            if part.accepted and all(ticket.reply is not None for ticket in part.tickets):
                self._history.learn_size(part.accepted)

    def _note_vain(self) -> None:
        """Send texts alone for a while if neither this list nor the one before got any sound reply, whole or in parts."""
        history = self._history
        if history.is_fruitless and not history.suspended_for:
            history.suspend()
            self._ledger.lanes_parted += 1
            if history.suspensions == 1:  # once is enough
                logger.warning("replies to lists of texts hold no vectors that can be used: texts go alone for a while")
        self._lanes.taught(self._lane)
