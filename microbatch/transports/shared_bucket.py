"""The part of a shared limit that one process keeps: permits it has drawn, what it has spent, what it may do without the server.

Permits are drawn from the server in blocks and spent from here without a round trip. What is spent is noted in *slots* of a fraction
of a second, and reported with the next contact. `shared_limit.lua` is the other half, and describes what counts.

A process that has lost the server knows two things: its own requests count there until a window has passed, and of what was unused
the server keeps a share for it. In the first window it sends no more than what of the former has expired since, and the share; never
more than its part of the limit, 1/n. After that it has its part. As the server can grant nothing meanwhile, or does not until all are
back, all processes together stay within the limit. (One that is cut off from a server which the others still reach is dropped when its
lease ends; its part then comes on top of the limit.)
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakMethod

import msgspec

from microbatch.transports.permits import WINDOW, burst, endpoint_counts

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.messages import Limits, Usage

HEARTBEAT: Final = 1.0
"""Seconds between contacts when there is nothing to draw."""

RETRY: Final = 0.5
"""Seconds between contacts while the server cannot be reached."""

LOST: Final = 5.0
"""Seconds without contact after which the server is lost. Longer than `GAP` and a heartbeat: it then knows that there was an outage."""

GAP: Final = 3.0
"""Seconds without contact by any process after which the server takes it that there was an outage."""

GRACE: Final = 2.0
"""Seconds for which a server that knows of nothing waits for processes that do."""

LICENCE: Final = 1.5
LEASE: Final = 10.0
IDLE: Final = 1.0
"""Seconds after the latest request until unused permits are given back."""

LEAVE: Final = 2 * WINDOW
"""Seconds after the latest request until the process is no longer a member."""

_MARGIN: Final = 1 / 32
"""A part of a request's tokens that is drawn in addition. The request may be estimated anew before it is sent; it would then stand in
line again for a few tokens, and keep the others from using those that it holds."""

_MOST_MARGIN: Final = 1 / 256
"""The part of the limit that the margins of all processes are at most."""

_SLOT: Final = 0.25
_MAX_AHEAD: Final = 4_096
_FAST: Final = 0.05
"""Seconds: one that draws again so soon draws too little at a time."""

_NEVER: Final = float("inf")
_TOLERANCE: Final = 1e-6


class Slot(msgspec.Struct, eq=False):
    """Requests sent within a fraction of a second.

    Attributes:
        number: Identifies it among those of this process.
        begun: Time of the first.
        at: Time of the latest.
        spent: Requests and tokens.
        alone: Whether they were sent without the server.
        closed: Whether it was reported, and takes no more.
        changed: Whether it differs from the latest report.
    """

    number: int
    begun: float
    at: float
    spent: list[int]
    alone: bool
    closed: bool = False
    changed: bool = True


class SharedGrant(msgspec.Struct, eq=False):
    """The charge of one request: time, tokens that were not given back, slot, and what all processes had used, as last shown."""

    at: float
    tokens: int
    slot: Slot
    seen: list[float]


class Order(msgspec.Struct):
    """One contact: the arguments of the script, when it left, what was asked, and the slots in it."""

    arguments: list[Any]
    sent: float
    front: bool
    units: int
    slots: list[Slot]


class SharedBucket:
    """The shared rate limits of one (endpoint, model, credentials), in one process; see `Limiter`.

    Args:
        limits: Requests and tokens per minute, None for no limit.
        charge: See `RateLimit`.
        share: The part of the endpoint's limits that *limits* are.

    Attributes:
        wake: Called when the server has to be asked.
    """

    def __init__(self, limits: tuple[float | None, float | None], charge: str, share: float) -> None:
        self.wake: Callable[[], None] = lambda: None
        self.used: float = 0.0
        self._most = limits
        self._limits = list(limits)
        self._charge = charge
        self._share = share
        self._claims: dict[object, int] = {}  # tokens by claimant, the oldest first
        self._watchers: list[WeakMethod[Callable[[], None]]] = []
        self._slots: deque[Slot] = deque()  # of the last window
        self._number = self._sequence = 0
        self._latest = 0.0  # time of the latest grant
        self._tokens = 0.0  # of a usual request
        self._ahead = 0  # requests for which to draw beyond those that wait
        self._dry_until = 0.0
        # The count of the endpoint, the use that was known when the request was granted, and the seconds for which the count holds.
        self._endpoint: list[tuple[float, float, float] | None] = [None, None]
        self._newest = float("-inf")  # time of the grant whose reply reported it
        self.leave()

    def leave(self) -> None:
        """Become a process that has not reached the server, and has no rights without it."""
        self._held = [0, 0]
        self._epoch = ""  # of the server's state in which this process became a member
        self._part, self._shares, self._members = 0.0, [0, 0], 0
        self._all_used: list[float] = [0.0, 0.0]  # by all processes
        self._asked: tuple[int, ...] | None = None  # of the request that was refused last
        self._ask_at = 0.0
        self._contact = float("-inf")
        self._tried = float("-inf")
        self._failure: str | None = None
        self._round = 0  # the latest outage of which the server has told
        self._untold = False  # whether all has to be reported at once
        self._licence = float("-inf")  # until then it may go on as without the server
        self._alone_since: float | None = None
        self._own, self._base = [0, 0], [0, 0]  # when that began: what counted, and what could be spent besides

    def __repr__(self) -> str:
        return f"SharedBucket(held={self._held}, members={self._members}, alone={self._alone_since is not None})"

    @property
    def max_tokens(self) -> int | None:
        """See `Limiter`."""
        return None if self._limits[1] is None else int(self._limits[1])

    @property
    def limits_requests(self) -> bool:
        """See `Limiter`."""
        return self._limits[0] is not None

    @property
    def trouble(self) -> str | None:
        """See `Limiter`."""
        if self._failure is not None:
            lost = "cannot be used, and requests are sent at a reduced rate meanwhile"
            never = "was never reached, and no request is sent before it is"
            return f"the Redis server of the rate limit {lost if self._epoch else never} ({self._failure})"
        if self._alone_since is not None:
            return "after an outage the Redis server of the rate limit waits for the reports of the other processes"
        return None

    # --- requests

    def watch(self, changed: Callable[[], None]) -> None:
        """See `Limiter`."""
        self._watchers = [each for each in self._watchers if each() is not None]
        self._watchers.append(WeakMethod(changed))

    def notify(self) -> None:
        """Call the watchers."""
        for reference in self._watchers:
            changed = reference()
            if changed is not None:
                changed()

    def wait(self, tokens: int, now: float, who: object = None) -> float:
        """See `Limiter`."""
        self._pass_time(now)
        self.used = now
        first = next(iter(self._claims), who)
        kept = (0, 0) if first is who else (1, self._claims[first])
        room = self._room(now)
        if all(amount + more <= left + _TOLERANCE for amount, more, left in zip((1, tokens), kept, room, strict=True)):
            return 0.0
        self._claims[who] = tokens
        if self._alone_since is None and (now >= self._ask_at or self._needed() != self._asked):
            self._call(now)
        return _NEVER

    def grant(self, tokens: int, now: float, who: object = None) -> SharedGrant:
        """See `Limiter`."""
        self._pass_time(now)
        self._claims.pop(who, None)
        self._latest = now
        self._tokens += (tokens - self._tokens) / 8 if self._tokens else tokens
        if self._alone_since is None:
            self._hold((-1, -tokens))
        slot = self._slots[-1] if self._slots else None
        alone = self._alone_since is not None
        if slot is None or slot.closed or slot.alone != alone or now - slot.begun >= _SLOT:
            self._number += 1
            slot = Slot(self._number, now, now, [0, 0], alone)
            self._slots.append(slot)
        slot.at = now
        slot.spent[0] += 1
        slot.spent[1] += tokens
        slot.changed = True
        if not alone and self._ahead > 1 and self._units_held() < self._ahead // 2 and now >= self._dry_until:
            self._call(now)
        return SharedGrant(now, tokens, slot, self._all_used)

    def disclaim(self, who: object) -> None:
        """See `Limiter`."""
        self._claims.pop(who, None)

    def cancel(self, grant: SharedGrant) -> None:
        """See `Limiter`."""
        if grant.slot in self._slots:
            grant.slot.spent[0] -= 1
            grant.slot.spent[1] -= grant.tokens
            grant.slot.changed = True
            if self._alone_since is None and not grant.slot.alone:
                self._hold((1, grant.tokens))
        grant.tokens = 0

    def ended(
        self, grant: SharedGrant, usage: Usage | None, limits: Limits | None, now: float, *, reserved: bool = True
    ) -> None:
        """See `Limiter`."""
        self._pass_time(now)
        if limits is not None and grant.at >= self._newest:
            self._newest = grant.at
            self._follow(limits, grant)
        if usage is None or grant.slot not in self._slots:
            return
        surplus = grant.tokens - usage.prompt_tokens - usage.completion_tokens
        if reserved and self._charge == "reserved":
            # The endpoint's count is of all processes' requests, and does not show what it gave back of this one.
            surplus = min(0, surplus)
        grant.tokens -= surplus
        grant.slot.spent[1] -= surplus
        grant.slot.changed = grant.slot.changed or surplus != 0

    def _call(self, now: float) -> None:
        if self._failure is None or now >= self._tried + RETRY:
            self.wake()

    def _hold(self, amounts: tuple[int, int]) -> None:
        for which, amount in enumerate(amounts):
            if self._limits[which] is not None:
                self._held[which] += amount

    def _room(self, now: float) -> tuple[float, float]:
        """Return the requests and tokens that may be sent now."""
        if self._alone_since is None:
            room: list[float] = [*self._held]
        elif now < self._licence or now >= self._contact + LOST:
            room = [self._room_alone(which, self._alone_since, now) for which in (0, 1)]
        else:
            room = [0.0, 0.0]
        requests, tokens = (_NEVER if limit is None else left for limit, left in zip(self._limits, room, strict=True))
        if not self._epoch:
            requests = min(requests, 0.0)  # the one that has no limit neither
        return requests, tokens

    def _room_alone(self, which: int, since: float, now: float) -> float:
        part = self._part * (self._limits[which] or 0.0)
        before = sum(slot.spent[which] for slot in self._slots if not slot.alone)
        after = sum(slot.spent[which] for slot in self._slots if slot.alone)
        if now < since + WINDOW:
            part = min(part, self._own[which] - before + self._base[which])
        return part - after

    def _needed(self) -> tuple[int, int] | None:
        """Return what the first that waits needs beyond what is held; None if that is nothing."""
        if not self._claims:
            return None
        amounts = (1, next(iter(self._claims.values())))
        requests, tokens = (
            0 if limit is None else max(0, amount - held)
            for amount, held, limit in zip(amounts, self._held, self._limits, strict=True)
        )
        if tokens and self._limits[1] is not None:
            margin = min(
                _MARGIN * amounts[1],
                _MOST_MARGIN * self._limits[1] / max(1, self._members),
                self._limits[1] - amounts[1],
            )
            tokens += max(0, int(margin))
        return (requests, tokens) if requests or tokens else None

    def _units_held(self) -> float:
        """Return how many usual requests could be paid from what is held."""
        requests = _NEVER if self._limits[0] is None else self._held[0]
        tokens = _NEVER if self._limits[1] is None or not self._tokens else self._held[1] / self._tokens
        return min(requests, tokens)

    def _pass_time(self, now: float) -> None:
        while self._slots and self._slots[0].at <= now - WINDOW:
            self._slots.popleft()

    def _follow(self, limits: Limits, grant: SharedGrant) -> None:
        """Adopt the endpoint's limits, and note its count."""
        for which, count in enumerate(endpoint_counts(limits, self._share)):
            most = self._most[which]
            if most is None or count is None:
                continue
            if count.limit > 0:
                self._limits[which] = min(most, count.limit * self._share)
            self._endpoint[which] = max(0.0, count.used), grant.seen[which], count.seconds

    # --- contacts

    @property
    def is_member(self) -> bool:
        """True if the server was reached, and may know of this process."""
        return self._contact > float("-inf")

    def is_over(self, now: float) -> bool:
        """Return whether it was not used for so long that the process may leave."""
        return not self._claims and now - max(self._latest, self.used) >= LEAVE

    def pause(self, now: float) -> float:
        """Return the seconds until the next contact is due."""
        if self._failure is not None:
            due = self._tried + RETRY
        elif self._untold:
            due = now
        else:
            due = self._contact + HEARTBEAT
            if self._alone_since is not None and not self._epoch:
                due = min(due, self._ask_at)  # a newcomer: there is nothing to report
            elif self._alone_since is None and self._needed() is not None:
                due = min(due, self._ask_at)
        return max(0.0, due - now)

    def order(self, now: float, *, leaving: bool = False) -> Order:
        """Return the next contact: the report, and what is to be drawn; of a process that is *leaving*, the former."""
        self._pass_time(now)
        if leaving or (not self._claims and now - self._latest >= IDLE):
            self._held, self._ahead = [0, 0], 0
        needed = self._needed() if self._alone_since is None else None
        units = 0
        if needed is not None:
            self._ahead = min(_MAX_AHEAD, 2 * self._ahead or 1)
            units = self._ahead
        elif self._alone_since is None and self._ahead:
            units = max(0, self._ahead - int(min(self._units_held(), _MAX_AHEAD)))
            if now - self._tried < _FAST:
                self._ahead = min(_MAX_AHEAD, 2 * self._ahead)
            elif now - self._tried > HEARTBEAT / 2 and self._units_held() > self._ahead // 2:
                self._ahead //= 2
        slots = [slot for slot in self._slots if slot.changed]
        self._asked, self._tried, self._untold = needed, now, False
        self._sequence += 1
        arguments: list[Any] = [self._sequence, self._epoch, int(leaving)]
        for limit, unit in zip(self._limits, (1.0, 0.0), strict=True):
            arguments += [-1, 0] if limit is None else [repr(limit), repr(burst(limit, unit))]
        arguments += [*self._held, *(needed or (0, 0)), int(needed is not None), units, round(self._tokens)]
        arguments += [repr(self._part), *self._shares, *self._counted(now)]
        for slot in slots:
            arguments += [slot.number, round(1_000 * (now - slot.at)), *slot.spent]
            slot.closed, slot.changed = True, False
        return Order(arguments, now, needed is not None, units, slots)

    def _counted(self, now: float) -> list[int]:
        """Return the endpoint's count: of requests, and of tokens, with what was known to be used and ms; age in ms; -1 for nothing."""
        flat: list[int] = []
        for found in self._endpoint:
            flat += [-1, 0, 0] if found is None else [round(found[0]), round(found[1]), round(1_000 * found[2])]
        age = -1 if self._endpoint == [None, None] else round(1_000 * (now - self._newest))
        self._endpoint = [None, None]
        return [*flat, age]

    def answered(self, order: Order, answer: list[Any], now: float) -> None:
        """Take note of the server's *answer*."""
        word = bytes(answer[0])
        if word == b"late":
            self.failed(order, "it has heard of this process later than now", now)
            return
        self._failure, self._contact = None, order.sent
        if word == b"left":
            return
        requests, tokens, wait, members, part, *shares, epoch = answer[1:9]
        self._ask_at = now + int(wait) / 1_000
        if word != b"settled":
            self._go_alone(now)
            if int(answer[9]) != self._round:
                self._round = int(answer[9])
                self._report_all()
            self._licence = order.sent + LICENCE if word == b"unsettled" else float("-inf")
            return
        self._alone_since = None
        self._hold((int(requests), int(tokens)))
        if order.units and self._units_held() < 1:
            self._dry_until = now + _SLOT
        self._members, self._part, self._epoch = int(members), float(part), epoch.decode()
        self._shares = [int(share) for share in shares]
        self._all_used = [float(used) for used in answer[9:11]]

    def failed(self, order: Order, why: str, now: float) -> None:
        """Take note that the server could not be asked."""
        self._failure = why
        for slot in order.slots:
            slot.changed = True
        if self._epoch and now >= self._contact + LOST:
            self._go_alone(now)

    def _go_alone(self, now: float) -> None:
        if self._alone_since is not None:
            return
        self._pass_time(now)
        self._alone_since = now
        self._own = [sum(slot.spent[which] for slot in self._slots) for which in (0, 1)]
        self._base = [held + share for held, share in zip(self._held, self._shares, strict=True)]
        self._held, self._ahead = [0, 0], 0
        for slot in self._slots:
            slot.closed = True
            slot.alone = False  # those of an earlier outage count like others now

    def _report_all(self) -> None:
        """Have all of the last window reported at once: the server may have lost it, or taken it for older than it is."""
        self._untold = bool(self._epoch)
        for slot in self._slots:
            slot.closed = slot.changed = True
