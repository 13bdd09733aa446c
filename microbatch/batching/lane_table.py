"""The open lanes: which of them a request joins, and when each is due.

Invariants:

- A lane takes turns with the scheduler if it is due; one that no longer is, is passed over.
- A lane that waits for a time has a timer; a lane that is empty or due has none. After requests have left a lane, that holds at the
  end of the step of the event loop.
- A lane is open as long as tickets wait in it or are in flight from it. The lane of the latest request is kept beyond that, until
  a request of another kind comes: the next one is mostly of the same kind, and making a lane costs as much as several submits.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal

import msgspec

from microbatch.batching.lane import Lane
from microbatch.batching.lane_history import LaneHistories, LaneHistory
from microbatch.batching.latency import ReplyTimes, first_size
from microbatch.batching.overhead import MAX_COUNTED_CHARS
from microbatch.batching.request import spec_of
from microbatch.batching.ticket import HIGH, LOW, NEVER, NO_CONTEXT, FlushReason
from microbatch.prompt.compose import ID_TOKENS, LINE_OVERHEAD_BYTES

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from microbatch.audit.lane_kind import LaneKind, LaneKinds
    from microbatch.batching.dependencies import Dependencies
    from microbatch.batching.request import Options
    from microbatch.batching.ticket import Spec, Ticket
    from microbatch.messages import Messages

    MergeRule = Literal["priced", "unpriced", "requests_limited"]

CACHE_KEY = "prompt_cache_key"
"""The request field by which OpenAI brings calls with the same beginning to the same machine, which has it in its cache."""

MAX_LINE_BYTES = MAX_COUNTED_CHARS
"""A longer item goes alone: it would have to be counted, and it gains least from sharing a prompt."""


class LaneTable:
    """The open lanes.

    Args:
        given: The objects that the parts of a batcher share.
        kinds: The kinds of the lanes.
        names_prefix: Whether the shared messages of each lane are named for the endpoint's prefix cache.

    Attributes:
        latest: The lane of the latest request that may share a prompt, None before the first.
        has_look_ups: Whether requests may be held by a look-up.
    """

    def __init__(self, given: Dependencies, kinds: LaneKinds, *, names_prefix: bool) -> None:
        self.latest: Lane | None = None
        self.has_look_ups: bool = False
        self._kinds = kinds
        self._names_prefix = names_prefix
        self._given = given
        self._policy = given.policy
        self._estimates = given.estimates
        self._histories = LaneHistories()
        self._by_key: dict[Hashable, Lane] = {}
        self._left: dict[Lane, None] = {}  # lanes that requests have left in this step; an ordered set

    def __iter__(self) -> Iterator[Lane]:
        """Yield the lanes that are open now."""
        return iter([lane for lane in self._by_key.values() if not lane.abandoned])

    # --- which lane

    def find(self, key: tuple[Hashable, ...], messages: Messages, options: Options) -> Lane:
        """Return the lane of all requests with *key*, made if need be."""
        before = self.latest
        lane = self.latest = self._by_key.get(key) or self._open(spec_of(messages[:-1], options, key))
        if before is not None:
            self.drop_if_abandoned(before)
        return lane

    def find_again(self, spec: Spec) -> Lane:
        """Return the lane of the requests with *spec*, which has been one of a lane before."""
        return self._by_key.get(spec.key) or self._open(spec)

    def _open(self, spec: Spec) -> Lane:
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
        lane = Lane(spec, account, history, budget, index, self._given.count, self._estimates, owner=self)
        self._by_key[spec.key] = lane
        lane.model, lane.has_look_ups = model, self.has_look_ups
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
        lane = self._by_key.get(ticket.spec.key)
        return self._histories.of(ticket.spec.key) if lane is None else lane.history

    def drop_if_abandoned(self, lane: Lane) -> None:
        """Drop *lane* if nothing waits in it and nothing is under way, unless it is the latest."""
        if lane.abandoned and lane is not self.latest and self._by_key.get(lane.spec.key) is lane:
            self._disarm(lane)
            del self._by_key[lane.spec.key]

    # --- when they are due

    def joined(self, lane: Lane) -> None:
        """Note that a ticket has joined *lane*, which takes no turns yet, and see whether it is due now."""
        if lane.live == 1:
            self._flush_if_idle(lane)
        self.changed(lane)

    def left(self, lane: Lane) -> None:
        """Note that a request has left *lane* unsent."""
        if not lane.live:
            self.rested(lane)
        else:
            # Many may leave in one step: the lane is looked at once, at its end.
            if not self._left:
                asyncio.get_running_loop().call_soon(self._look_at_left, context=NO_CONTEXT)
            self._left[lane] = None

    def _look_at_left(self) -> None:
        left, self._left = self._left, {}
        for lane in left:
            self.rested(lane)

    def looked_up(self, lane: Lane) -> None:
        """Note that requests of *lane* may be held no longer."""
        if lane.live:
            self.changed(lane)

    def call_ended(self, lane: Lane, *, combined: bool) -> None:
        """Note that a call of *lane* and its fallback are over."""
        lane.in_flight -= 1
        lane.combined -= combined
        self.revise(lane)
        if lane.live:
            self._flush_if_idle(lane)
        self.changed(lane)
        self.drop_if_abandoned(lane)

    def revise(self, lane: Lane) -> None:
        """Update the budget of *lane* from its history."""
        if lane.history.revised:
            lane.history.revised = False
            quota = lane.account.max_tokens
            lane.rebudget(self._estimates.budget(self._policy, lane.spec, lane.history, quota))
            self._set_fast_path(lane)

    def taught(self, lane: Lane) -> None:
        """Apply the record of an ended call of *lane* whose fallback is still under way."""
        if lane.history.revised:
            self.revise(lane)
            self.changed(lane)

    def kind_changed(self, kind: LaneKind) -> None:
        """Apply what audits have shown of *kind* to its lanes."""
        for lane in [lane for lane in self._by_key.values() if lane.spec.kind is kind]:
            lane.history.revised = True
            self.taught(lane)

    def flush(self, reason: FlushReason) -> None:
        """Make all lanes due with everything that waits in them now."""
        for lane in self:
            lane.flush(reason)

    def rested(self, lane: Lane) -> None:
        """Note that *lane* may be due no longer."""
        self._rearm(lane)
        self.drop_if_abandoned(lane)

    def changed(self, lane: Lane) -> None:
        """Enqueue *lane* for a slot if it is due, else set its timer."""
        if lane.due is None:
            self._rearm(lane)
            return
        if not lane.queued:
            self._disarm(lane)
        self._given.scheduler.enqueue(lane)

    def _flush_if_idle(self, lane: Lane) -> None:
        # A lane in which only bulk work waits has no time at which it falls due.
        idle = self._policy.idle == "flush" and lane.rank != LOW and not lane.in_flight
        if idle and lane.due is None and lane.due_at < NEVER:
            lane.schedule_flush(FlushReason.IDLE)

    def _rearm(self, lane: Lane) -> None:
        """Set the lane's timer to the time it falls due, or to none."""
        if lane.due is not None or lane.due_at == NEVER or lane.held:
            self._disarm(lane)
        elif lane.timer is None or lane.timer_at != lane.due_at:
            self._disarm(lane)
            # The time is kept beside the handle: uvloop's have no `when` if the time has come.
            lane.timer_at = lane.due_at
            loop = asyncio.get_running_loop()
            lane.timer = loop.call_at(lane.due_at, self._time_is_up, lane, context=NO_CONTEXT)

    def _disarm(self, lane: Lane) -> None:
        if lane.timer is not None:
            lane.timer.cancel()
            lane.timer = None

    def _time_is_up(self, lane: Lane) -> None:
        lane.timer = None
        if lane.due is None and lane.due_at > lane.timer_at:
            self._rearm(lane)  # those who were to leave now have left in this very step
            return
        lane.schedule_flush(FlushReason.TIMEOUT)
        self.changed(lane)
