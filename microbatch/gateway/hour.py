"""The last hour of a gateway: figures in slices of time, and by model and caller. Its memory does not depend on the traffic."""

from __future__ import annotations

import math
import time
from collections import deque
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from microbatch.gateway.served import DISCONNECTED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from microbatch.accounting.events import Called, Settled
    from microbatch.accounting.labels import CallerLabels
    from microbatch.gateway.served import Served

HOUR: Final = 3_600.0
SLICE: Final = 10.0
"""Seconds of a slice of the time axis."""

GROUP_SLICE: Final = 300.0
"""Seconds of a slice of the figures by model and caller, which are shown for the hour as a whole."""

_MOST_ROWS: Final = int(HOUR / SLICE)
_GROUP_SLICES: Final = int(HOUR / GROUP_SLICE)
_SHORTEST: Final = 0.001
_BINS_A_DECADE: Final = 20
_BINS: Final = 6 * _BINS_A_DECADE + 1


class Latencies(msgspec.Struct):
    """A histogram of times from 1 ms to 1,000 s, whose percentiles are within 6 %; longer and shorter times count as these.

    Attributes:
        bins: Number of times by their place on a logarithmic scale, of those with any.
    """

    bins: dict[int, int] = {}

    def add(self, seconds: float) -> None:
        """Count a time."""
        place = min(_BINS - 1, int(math.log10(max(seconds, _SHORTEST) / _SHORTEST) * _BINS_A_DECADE))
        self.bins[place] = self.bins.get(place, 0) + 1

    def add_all(self, other: Latencies) -> None:
        """Count the times that *other* has counted."""
        for place, times in other.bins.items():
            self.bins[place] = self.bins.get(place, 0) + times

    def percentile(self, share: float) -> float | None:
        """Return a time that *share* of those counted do not exceed; None if there are none."""
        rank = math.ceil(share * sum(self.bins.values()))
        for place in sorted(self.bins):
            rank -= self.bins[place]
            if rank <= 0:
                return float(_SHORTEST * 10.0 ** ((place + 0.5) / _BINS_A_DECADE))
        return None


class Figures(msgspec.Struct):
    """The counts of a slice of time, of all requests or of those of one group.

    Attributes:
        requests: Requests that have ended.
        errors: Those of them that have failed.
        calls: Attempts of calls.
        unbatched: Calls that the same would have taken one by one.
        cost_usd: Dollars of the calls with a price; None if there are none.
        saved_usd: Dollars that combining and the cache have saved; None likewise.
        unpriced: Calls that reported tokens and have no price.
        latencies: Times until answers were complete.
    """

    requests: int = 0
    errors: int = 0
    calls: int = 0
    unbatched: int = 0
    cost_usd: float | None = None
    saved_usd: float | None = None
    unpriced: int = 0
    latencies: Latencies = msgspec.field(default_factory=Latencies)

    def add(self, other: Figures) -> None:
        """Add the figures of another slice."""
        self.requests += other.requests
        self.errors += other.errors
        self.calls += other.calls
        self.unbatched += other.unbatched
        self.cost_usd = _sum(self.cost_usd, other.cost_usd)
        self.saved_usd = _sum(self.saved_usd, other.saved_usd)
        self.unpriced += other.unpriced
        self.latencies.add_all(other.latencies)

    def add_request(self, record: Served) -> None:
        """Count a request that has ended."""
        self.requests += 1
        self.calls += record.forwarded
        self.unbatched += record.forwarded or record.answered
        if record.answered:
            self.latencies.add(record.seconds)
        elif record.reason != DISCONNECTED:
            self.errors += 1

    def add_call(self, event: Called) -> None:
        """Count a call that has ended."""
        self.calls += event.attempts
        if event.cost_usd is not None:
            self.cost_usd = _sum(self.cost_usd, event.cost_usd)
            self.saved_usd = _sum(self.saved_usd, (event.unbatched_cost_usd or 0.0) - event.cost_usd)
        self.unpriced += event.usage is not None and event.cost_usd is None

    def save(self, cost_usd: float | None) -> None:
        """Count what an answer from the cache has saved."""
        self.saved_usd = _sum(self.saved_usd, cost_usd)

    def shown(self) -> tuple[Any, ...]:
        """Return requests, errors, calls, calls saved, dollars spent and saved, unpriced calls, median and 99th percentile."""
        # Combining may take more calls than it saves.
        counts = self.requests, self.errors, self.calls, self.unbatched - self.calls
        percentiles = self.latencies.percentile(0.50), self.latencies.percentile(0.99)
        return (*counts, self.cost_usd, self.saved_usd, self.unpriced, *percentiles)


def _sum(one: float | None, other: float | None) -> float | None:
    return one if other is None else other + (one or 0.0)


Slices: TypeAlias = list[tuple[int, dict[str, Figures]]]
"""Figures by name, for slices of time by number."""


class HourState(msgspec.Struct):
    """The figures of one process, or of several together, of the last hour.

    Attributes:
        began: When counting began; the slices are numbered from there.
        rows: Figures for each slice by number, in order; the last one is under way.
        models: Figures by model, in longer slices.
        callers: Figures by caller, likewise.
    """

    began: float
    rows: list[tuple[int, Figures]]
    models: Slices
    callers: Slices

    def add(self, other: HourState) -> None:
        """Add the figures of another process, for which counting began at the same time."""
        totals = dict(self.rows)
        for number, figures in other.rows:
            totals.setdefault(number, Figures()).add(figures)
        self.rows = sorted(totals.items(), key=itemgetter(0))[-_MOST_ROWS:]
        for mine, others in ((self.models, other.models), (self.callers, other.callers)):
            by_number = dict(mine)
            for number, groups in others:
                _add_groups(by_number.setdefault(number, {}), groups)
            mine[:] = sorted(by_number.items(), key=itemgetter(0))[-_GROUP_SLICES:]

    def shown(self, now: float) -> dict[str, Any]:
        """Return the last hour at the time *now*.

        `age` is the time since the start, and `seconds` the length of a slice. `slices` are those in which anything happened, each
        with its beginning in seconds since the start and the figures of `Figures.shown`; the last one is under way. `models` and
        `callers` are the same figures, for at most an hour, of those with a name here and of all others, after their names.
        """
        age = now - self.began
        oldest = int(age // SLICE) - _MOST_ROWS
        return {
            "age": age,
            "seconds": SLICE,
            "slices": [(number * SLICE, *figures.shown()) for number, figures in self.rows if number > oldest],
            "models": _shown_groups(self.models, age),
            "callers": _shown_groups(self.callers, age),
        }


def _add_groups(totals: dict[str, Figures], groups: Mapping[str, Figures]) -> None:
    for name, figures in groups.items():
        totals.setdefault(name, Figures()).add(figures)


def _shown_groups(slices: Slices, age: float) -> list[tuple[Any, ...]]:
    """Return each name, with its figures in the hour before *age*, those with most requests first."""
    first = int(age // GROUP_SLICE) - _GROUP_SLICES + 1
    totals: dict[str, Figures] = {}
    for number, groups in slices:
        if number >= first:
            _add_groups(totals, groups)
    return sorted(((name, *total.shown()) for name, total in totals.items()), key=lambda row: (-row[1], row[0]))


class Groups:
    """Figures by name, for the slices of the last hour."""

    def __init__(self) -> None:
        self.slices: deque[tuple[int, dict[str, Figures]]] = deque(maxlen=_GROUP_SLICES)

    def at(self, age: float, name: str) -> Figures:
        """Return the figures of *name* in the slice of *age*, in seconds since the start."""
        number = int(age // GROUP_SLICE)
        if not self.slices or self.slices[-1][0] != number:
            self.slices.append((number, {}))
        return self.slices[-1][1].setdefault(name, Figures())


class Hour:
    """Hooks of a gateway's batcher, which also takes the requests that the gateway has served, and shows the last hour.

    Args:
        labels: The models and tenants that have names here.
        now: Returns the time in seconds.
    """

    def __init__(self, labels: CallerLabels, now: Callable[[], float] = time.monotonic) -> None:
        self._labels = labels
        self._now = now
        self._began = now()
        self._rows: deque[tuple[int, Figures]] = deque(maxlen=_MOST_ROWS)
        self._number = 0  # of the slice under way
        self._slice = Figures()
        self._models = Groups()
        self._callers = Groups()

    def add(self, record: Served) -> None:
        """Count a request that the gateway has served; its own pages are none."""
        if not (record.page and record.answered):
            for figures in self._places(record.model, record.tenant, answered=record.answered):
                figures.add_request(record)

    def on_call(self, event: Called) -> None:
        """Count a call that has ended."""
        model = event.requested_model or event.model
        for figures in self._places(model, event.tenant, answered=event.error is None):
            figures.add_call(event)

    def on_settle(self, event: Settled) -> None:
        """Count what an answer from the cache has saved; else a request counts when it is served."""
        if event.unbatched_cost_usd is not None:
            model = event.requested_model or event.model
            for figures in self._places(model, event.tenant, answered=True):
                figures.save(event.unbatched_cost_usd)

    def _places(self, model: str | None, tenant: str | None, *, answered: bool) -> Iterable[Figures]:
        age = self._advance()
        model, caller = self._labels.each(model, tenant, answered=answered)
        return self._slice, self._models.at(age, model), self._callers.at(age, caller)

    def _advance(self) -> float:
        """Begin a new slice if it is time to; return the seconds since the start."""
        age = self._now() - self._began
        number = int(age // SLICE)
        if number != self._number:
            self._rows.append((self._number, self._slice))
            self._number, self._slice = number, Figures()
        return age

    def begin_at(self, began: float) -> None:
        """Number the slices from the time *began*, as other processes do; to be called before anything is counted."""
        self._began = began

    def state(self) -> HourState:
        """Return what was counted in the last hour."""
        self._advance()
        rows = [*self._rows, (self._number, self._slice)]
        return HourState(self._began, rows, list(self._models.slices), list(self._callers.slices))

    def snapshot(self) -> dict[str, Any]:
        """Return the last hour, see `HourState.shown`."""
        return self.state().shown(self._now())
