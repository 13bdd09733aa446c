"""The calls of chat lanes: what a lane allows, which of its requests go alone, and how each call is made, mended and learned from."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from microbatch.batching.fallback import Recovery
from microbatch.batching.lane import Lane, why_only_one
from microbatch.batching.lane_history import LaneHistories, LaneHistory
from microbatch.batching.latency import ReplyTimes, first_size
from microbatch.batching.overhead import MAX_COUNTED_CHARS
from microbatch.batching.ticket import HIGH, LOW, AloneReason, Charge
from microbatch.errors import ConfigError
from microbatch.prompt.compose import ID_TOKENS, LINE_OVERHEAD_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from microbatch.audit.lane_kind import LaneKinds
    from microbatch.batching.audits import Audits
    from microbatch.batching.call_state import Batch
    from microbatch.batching.dependencies import Dependencies
    from microbatch.batching.dispatch import Dispatcher
    from microbatch.batching.lane import LaneOwner, Work
    from microbatch.batching.lane_table import LaneTable
    from microbatch.batching.single_queue import SingleQueues
    from microbatch.batching.ticket import Spec, Ticket

    MergeRule = Literal["priced", "unpriced", "requests_limited"]

logger: Final = logging.getLogger("microbatch")

CACHE_KEY = "prompt_cache_key"
"""The request field by which OpenAI brings calls with the same beginning to the same machine, which has it in its cache."""

MAX_LINE_BYTES = MAX_COUNTED_CHARS
"""A longer item goes alone: it would have to be counted, and it gains least from sharing a prompt."""

_ALONE_WARNING = 100
"""Requests of one lane in a row that went alone, though they need not have by their form, before a warning is logged."""

_COSTLY = "asking again for missing and broken answers costs more than combining saves"
_USELESS = "combined replies hold nothing of use, or do not end, so that asking again costs more than combining saves"


class ChatCalls:
    """The calls of chat lanes, and of requests that go alone; see `Calls`.

    Args:
        given: The objects that the parts of a batcher share.
        dispatcher: Makes the calls.
        lanes: The open lanes.
        singles: The queues of requests that go alone.
        kinds: The kinds of the lanes.
        audits: Audits the answers of combined calls; None without an audit.
        names_prefix: Whether the shared messages of each lane are named for the endpoint's prefix cache.

    Attributes:
        latest: See `Calls`.
        weigh_again: Queues a request that was to go alone because that is cheaper, by the rule that holds by now; set by the intake.
    """

    def __init__(
        self,
        given: Dependencies,
        dispatcher: Dispatcher,
        lanes: LaneTable,
        singles: SingleQueues,
        *,
        kinds: LaneKinds,
        audits: Audits | None,
        names_prefix: bool,
    ) -> None:
        self.latest: Lane | None = None
        self.weigh_again: Callable[[Ticket], None]
        self._given = given
        self._policy = given.policy
        self._ledger = given.ledger
        self._estimates = given.estimates
        self._settlement = given.settlement
        self._dispatcher = dispatcher
        self._lanes = lanes
        self._singles = singles
        self._kinds = kinds
        self._audits = audits
        self._names_prefix = names_prefix
        self._histories = LaneHistories(LaneHistory)

    def start(self, start: Callable[[Callable[[], Coroutine[Any, Any, None]]], object]) -> None:
        """Begin: *start* runs a task."""
        if self._audits is not None:
            self._audits.start(start, self._lanes.kind_changed)

    def close(self) -> None:
        """Begin nothing more that no caller waits for."""
        if self._audits is not None:
            self._audits.close()

    # --- lanes

    def open(self, spec: Spec, owner: LaneOwner) -> Lane:
        """See `Calls`."""
        kind = self._kinds.of(spec, spec.shared)
        spec = msgspec.structs.replace(spec, kind=kind)
        if self._names_prefix and spec.shared and CACHE_KEY not in spec.params:
            # In the calls only: keys of lanes and caches are made before.
            named = {**spec.params, CACHE_KEY: kind.digest}
            spec = msgspec.structs.replace(spec, params=named)
        history = self._histories.of(spec.key)
        account = self._given.accounts.of(spec.model, spec.headers)
        model = self._given.bounds.of(spec.model)
        policy = self._policy
        limits = (account.max_tokens, policy.max_prompt_tokens, model.context)
        if policy.merge != "always":
            self._estimates.watch_cache(spec, history)
        elif any(limit is not None for limit in limits):
            self._estimates.measure(spec, history)
        limit = policy.max_latency
        if limit is not None and history.times is None:
            history.times = ReplyTimes(limit, first_size(limit, spec.answer.expected_tokens))
        budget = self._estimates.budget(policy, spec, history, account.max_tokens)
        index = self._given.in_flight.index_of(spec.content)
        lane = Lane(spec, account, history, budget, index, self._given.count, self, owner)
        lane.model = model
        lane.max_wait = policy.low_max_wait if lane.rank == LOW else policy.max_wait
        self._set_fast_path(lane)
        return lane

    def _set_fast_path(self, lane: Lane) -> None:
        lane.needs_inspection = (
            lane.rank == HIGH or lane.account.max_tokens is not None or self._policy.merge != "always"
        )
        # Every token is at least a byte of UTF-8, but not by a caller's own count: there each bound is looked at.
        by_bytes = min(lane.budget.tokens - ID_TOKENS - LINE_OVERHEAD_BYTES, MAX_LINE_BYTES)
        lane.fast_path_max_bytes = -1 if lane.needs_inspection or self._given.upper is not None else by_bytes

    def revise(self, lane: Lane) -> None:
        """See `Calls`."""
        quota = lane.account.max_tokens
        lane.rebudget(self._estimates.budget(self._policy, lane.spec, lane.history, quota))
        self._set_fast_path(lane)

    def cost(self, lane: Lane, items: int, tokens: int, oldest: Ticket) -> int:
        """See `Calls`."""
        if items > 1:
            return self._estimates.together(lane.spec, lane.history, items, tokens, lane.account.max_tokens)
        # A request that was to travel with others was charged before anything was known of single answers.
        return self._estimates.alone(oldest, lane.history).tokens if lane.parted else oldest.cost

    def merge_rule(self, lane: Lane) -> MergeRule:
        """Return what `merge="auto"` means for *lane* now; see `Stats.merge_rules`."""
        if lane.account.requests_bind:
            return "requests_limited"
        return "unpriced" if self._given.price_of(lane.spec.model) is None else "priced"

    def pays(self, lane: Lane, items: int, ticket: Ticket) -> bool:
        """Return whether *items* of *lane*, such as *ticket*, may be combined, by the policy and all that is known of their cost."""
        merge = self._policy.merge
        if merge == "always" or items < 2 or (merge == "auto" and self.merge_rule(lane) != "priced"):  # noqa: PLR2004 two
            return True
        price = self._given.price_of(lane.spec.model)
        return self._estimates.is_cheaper_combined(lane.spec, lane.history, items, price, ticket)

    def history_of(self, ticket: Ticket) -> LaneHistory | None:
        """Return the history that learns from the single call of *ticket*, which waited in no lane; None if none does."""
        if self._policy.merge == "always" or not ticket.combinable:
            return None
        lane = self._lanes.get(ticket.spec)
        return self._histories.of(ticket.spec.key) if lane is None else lane.history

    # --- which requests go alone

    def why_alone(self, ticket: Ticket, lane: Lane, *, bypass: bool) -> AloneReason | None:
        """See `Calls`."""
        alone = self._weigh(ticket, lane) if lane.needs_inspection else None
        if bypass:
            return AloneReason.BYPASS
        if alone is None and not self._fits(ticket, lane):
            self._note_sent_alone(
                lane,
                f"too long to share a prompt (max_batch_tokens={self._policy.max_batch_tokens}, "
                f"max_prompt_tokens={self._policy.max_prompt_tokens}, {MAX_LINE_BYTES} bytes)",
            )
            return AloneReason.TOO_LONG
        return alone

    def _weigh(self, ticket: Ticket, lane: Lane) -> AloneReason | None:
        """Estimate what *ticket* costs alone, and return why it goes alone if its cost or priority is the reason.

        Raises:
            ConfigError: It is new, and can never be sent because it is larger than the whole quota.
        """
        history, quota = lane.history, lane.account.max_tokens
        if quota is not None and ticket.charge is None:  # else it was accepted when the quota was larger
            ticket.charge = fitting(self._estimates.alone(ticket, history), quota)
        if lane.rank == HIGH:
            return AloneReason.HIGH
        if self._policy.merge == "auto":
            self._ledger.merge_rules[self.merge_rule(lane)] += 1
        if lane.parted or self.pays(lane, lane.budget.size, ticket):
            return None
        if self._policy.merge != "auto":  # else it is for the batcher to choose
            self._note_sent_alone(lane, "not cheaper together")
        return AloneReason.NOT_CHEAPER

    def _fits(self, ticket: Ticket, lane: Lane) -> bool:
        """Return whether *ticket* can share a prompt, counting its tokens if their bound does not tell."""
        room = lane.budget.tokens - ID_TOKENS
        return len(ticket.line) <= MAX_LINE_BYTES and (ticket.tokens <= room or ticket.count(self._given.count) <= room)

    def _note_sent_alone(self, lane: Lane, why: str) -> None:
        lane.history.alone += 1
        if lane.history.alone == _ALONE_WARNING:
            logger.warning("%d requests in a row were %s: each goes alone, and nothing is saved", _ALONE_WARNING, why)

    # --- calls

    def begin(self, work: Work) -> bool:
        """See `Calls`."""
        tickets, lane, permit = work.tickets, work.lane, work.permit
        if lane is None:
            limited = self._policy.merge == "auto" and permit.account.requests_bind
            if work.reason is AloneReason.NOT_CHEAPER and limited:
                self.weigh_again(tickets[0])
                return False
            return True
        combined = len(tickets) > 1
        if combined and not self.pays(lane, len(tickets), tickets[0]):
            for ticket in tickets:
                self._singles.add(ticket, AloneReason.NOT_CHEAPER, lane.account)
            return False
        if not combined:
            work.reason = self._why_only_one(lane, work.reason)
        if self._audits is not None and lane.spec.kind is not None:
            self._audits.count(lane.spec.kind, len(tickets))
        if combined:
            batch = work.batch = self._dispatcher.compose(tickets, lane.history, permit)
            if self._audits is not None:
                self._audits.sample(batch)
            batch.taught = partial(self._lanes.taught, lane)
            self._lanes.revise(lane)
        return True

    def _why_only_one(self, lane: Lane, reason: object) -> AloneReason:
        """Return why the only request that leaves *lane*, for *reason*, goes alone."""
        if lane.history.consume_suspension():
            self._lanes.revise(lane)
            return AloneReason.NOT_CHEAPER
        if lane.condemned:
            return AloneReason.CONDEMNED
        times = lane.history.times
        if times is not None and times.left_alone():
            lane.history.revised |= times.trial
            self._lanes.revise(lane)
            return AloneReason.LATENCY
        return why_only_one(reason)

    async def make(self, work: Work) -> None:
        """See `Calls`."""
        if work.batch is not None and work.lane is not None:
            await self._answer_batch(work.batch, work.lane)
        else:
            await self._answer_alone(work)

    def ended(self, work: Work) -> None:
        """See `Calls`."""
        if work.batch is not None and self._audits is not None:
            self._audits.void(work.batch)

    async def _answer_batch(self, batch: Batch, lane: Lane) -> None:
        outcome = await self._dispatcher.batch(batch)
        if self._audits is not None:
            self._audits.call_ended(batch)
        batch.permit.finish()  # the calls of its recovery have permits of their own
        if outcome.ending == "complete" and not outcome.unanswered:
            batch.history.grow(outcome.asked, self._policy.max_batch_size)
        if not outcome.again:  # else what is asked now is the same call
            self._heed(lane)
        if outcome.unanswered or outcome.ending == "length":
            recovery = Recovery(self._given, self._dispatcher, batch, lambda: self._heed(lane))
            await recovery.after(outcome, batch.tickets, may_combine=True)
            self._heed(lane, mended=True)

    def _heed(self, lane: Lane, *, mended: bool = False) -> int:
        """Apply what a combined call of *lane* has shown, *mended* by fallback calls or not; return the size of its batches now."""
        history = lane.history
        useless = history.is_fruitless
        if history.is_useless(complete=mended):
            history.suspend()
            self._ledger.lanes_parted += 1
            if history.suspensions == 1:  # once is enough
                logger.warning("%s: requests of this kind go alone for a while", _USELESS if useless else _COSTLY)
        self._lanes.taught(lane)
        return lane.budget.size

    async def _answer_alone(self, work: Work) -> None:
        (ticket,) = work.tickets
        error = await self._dispatcher.single(ticket, work.permit)
        if error is not None:
            self._settlement.fail(ticket, error)
        elif (history := self.history_of(ticket) if work.lane is None else work.lane.history) is not None:
            self._dispatcher.attribution.learn_from_single(ticket, history)


def fitting(charge: Charge, quota: int) -> Charge:
    """Return *charge* if it can ever be granted.

    Raises:
        ConfigError: It is larger than the whole quota.
    """
    if charge.tokens > quota:
        raise ConfigError(
            f"this request would be charged about {charge.tokens} tokens (its prompt and max_tokens), but the rate limit grants "
            f"{quota} a minute, so it could never be sent: shorten it, lower max_tokens or raise tpm="
        )
    return charge
