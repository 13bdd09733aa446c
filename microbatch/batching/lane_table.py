"""The open lanes: which of them a request joins, and when each is due.

Invariants:

- A lane takes turns with the scheduler if it is due; one that no longer is, is passed over.
- A lane that waits for a time has a timer; a lane that is empty or due has none. After requests have left a lane, that holds at the
  end of the step of the event loop.
- A lane is open as long as tickets wait in it or are in flight from it. The lane of the latest request of a kind of calls is kept
  beyond that, until a request of another lane comes: the next one mostly belongs to the same, and making a lane costs as much as
  several submits.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from microbatch.batching.ticket import LOW, NEVER, NO_CONTEXT, FlushReason

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from microbatch.audit.lane_kind import LaneKind
    from microbatch.batching.lane import Calls, Lane
    from microbatch.batching.scheduler import Scheduler
    from microbatch.batching.ticket import Spec


class LaneTable:
    """The open lanes.

    Args:
        scheduler: Serves the lanes that are due.
        idle: See `FlushPolicy`.

    Attributes:
        has_look_ups: Whether requests may be held by a look-up.
    """

    def __init__(self, scheduler: Scheduler, idle: str) -> None:
        self._scheduler = scheduler
        self.has_look_ups: bool = False
        self._flushes_idle = idle == "flush"
        self._by_key: dict[Hashable, Lane] = {}
        self._left: dict[Lane, None] = {}  # lanes that requests have left in this step; an ordered set

    def __iter__(self) -> Iterator[Lane]:
        """Yield the lanes that are open now."""
        return iter([lane for lane in self._by_key.values() if not lane.abandoned])

    # --- which lane

    def find(self, calls: Calls, key: tuple[Hashable, ...], spec: Callable[[], Spec]) -> Lane:
        """Return the lane of all requests with *key*, whose calls *calls* makes; if need be, opened for what *spec* returns."""
        before = calls.latest
        lane = calls.latest = self._by_key.get(key) or self._open(calls, spec())
        if before is not None and before is not lane:
            self.drop_if_abandoned(before)
        return lane

    def find_again(self, calls: Calls, spec: Spec) -> Lane:
        """Return the lane of the requests with *spec*, which has been one of a lane before."""
        return self._by_key.get(spec.key) or self._open(calls, spec)

    def get(self, spec: Spec) -> Lane | None:
        """Return the lane of the requests with *spec*; None if it is not open."""
        return self._by_key.get(spec.key)

    def _open(self, calls: Calls, spec: Spec) -> Lane:
        lane = self._by_key[spec.key] = calls.open(spec, self)
        lane.has_look_ups = self.has_look_ups
        return lane

    def drop_if_abandoned(self, lane: Lane) -> None:
        """Drop *lane* if nothing waits in it and nothing is under way, unless it is the latest."""
        if lane.abandoned and lane is not lane.calls.latest and self._by_key.get(lane.spec.key) is lane:
            self._disarm(lane)
            del self._by_key[lane.spec.key]

    # --- when they are due

    def joined(self, lane: Lane) -> None:
        """Note that a ticket has joined *lane*, and see whether it is due now."""
        if lane.queued:
            self._scheduler.enqueue(lane)  # it needs more than before
            return
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
        """Update the budget of *lane*, if its history has changed."""
        if lane.history.revised:
            lane.history.revised = False
            lane.calls.revise(lane)

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
        if lane.queued:
            self._scheduler.enqueue(lane)  # it needs less than before
        self._rearm(lane)
        self.drop_if_abandoned(lane)

    def changed(self, lane: Lane) -> None:
        """Enqueue *lane* for a slot if it is due, else set its timer."""
        if lane.due is None:
            self._rearm(lane)
            return
        if not lane.queued:
            self._disarm(lane)
        self._scheduler.enqueue(lane)

    def _flush_if_idle(self, lane: Lane) -> None:
        # A lane in which only bulk work waits has no time at which it falls due.
        idle = self._flushes_idle and lane.rank != LOW and not lane.in_flight
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
