"""The last hour of a gateway: figures in slices of time, and by model and caller. Its memory does not depend on the traffic."""

from __future__ import annotations

import math
import time
from array import array
from collections import deque
from operator import add
from typing import TYPE_CHECKING, Any, Final

from microbatch.gateway.served import DISCONNECTED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from microbatch.accounting.events import Called, Settled
    from microbatch.accounting.labels import CallerLabels
    from microbatch.gateway.served import Served

HOUR: Final = 3_600.0
SLICE: Final = 10.0
"""Seconds of a slice of the time axis."""

GROUP_SLICE: Final = 300.0
"""Seconds of a slice of the figures by model and caller, which are shown for the hour as a whole."""

_GROUP_SLICES: Final = int(HOUR / GROUP_SLICE)
_SHORTEST: Final = 0.001
_BINS_A_DECADE: Final = 20
_BINS: Final = 6 * _BINS_A_DECADE + 1


class Latencies:
    """A histogram of times from 1 ms to 1,000 s, whose percentiles are within 6 %; longer and shorter times count as these."""

    def __init__(self) -> None:
        self._bins = array("L", bytes(array("L").itemsize * _BINS))

    def add(self, seconds: float) -> None:
        """Count a time."""
        place = math.log10(max(seconds, _SHORTEST) / _SHORTEST) * _BINS_A_DECADE
        self._bins[min(_BINS - 1, int(place))] += 1

    def add_all(self, other: Latencies) -> None:
        """Count the times that *other* has counted."""
        self._bins = array("L", map(add, self._bins, other._bins))

    def percentile(self, share: float) -> float | None:
        """Return a time that *share* of those counted do not exceed; None if there are none."""
        rank = math.ceil(share * sum(self._bins))
        if not rank:
            return None
        place = 0
        while rank > self._bins[place]:
            rank -= self._bins[place]
            place += 1
        return float(_SHORTEST * 10.0 ** ((place + 0.5) / _BINS_A_DECADE))


class Figures:
    """The counts of a slice of time, of all requests or of those of one group."""

    __slots__ = ("calls", "cost_usd", "errors", "latencies", "requests", "saved_usd", "unbatched", "unpriced")

    def __init__(self) -> None:
        self.requests: int = 0
        self.errors: int = 0
        self.calls: int = 0
        self.unbatched: int = 0  # calls that the same would have taken one by one
        self.cost_usd: float | None = None  # of the calls with a price
        self.saved_usd: float | None = None
        self.unpriced: int = 0  # calls that reported tokens and have no price
        self.latencies: Latencies = Latencies()

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


class Groups:
    """Figures by name, for the slices of the last hour."""

    def __init__(self) -> None:
        self._slices: deque[tuple[int, dict[str, Figures]]] = deque(maxlen=_GROUP_SLICES)

    def at(self, age: float, name: str) -> Figures:
        """Return the figures of *name* in the slice of *age*, in seconds since the start."""
        number = int(age // GROUP_SLICE)
        if not self._slices or self._slices[-1][0] != number:
            self._slices.append((number, {}))
        return self._slices[-1][1].setdefault(name, Figures())

    def shown(self, age: float) -> list[tuple[Any, ...]]:
        """Return each name, with its figures in the hour before *age*, those with most requests first."""
        first = int(age // GROUP_SLICE) - _GROUP_SLICES + 1
        totals: dict[str, Figures] = {}
        for number, groups in self._slices:
            if number >= first:
                for name, figures in groups.items():
                    totals.setdefault(name, Figures()).add(figures)
        return sorted(((name, *total.shown()) for name, total in totals.items()), key=lambda row: (-row[1], row[0]))


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
        self._rows: deque[tuple[Any, ...]] = deque(maxlen=int(HOUR / SLICE))
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
            self._rows.append(self._row())
            self._number, self._slice = number, Figures()
        return age

    def _row(self) -> tuple[Any, ...]:
        return (self._number * SLICE, *self._slice.shown())

    def snapshot(self) -> dict[str, Any]:
        """Return the last hour.

        `age` is the time since the start, and `seconds` the length of a slice. `slices` are those in which anything happened, each
        with its beginning in seconds since the start and the figures of `Figures.shown`; the last one is under way. `models` and
        `callers` are the same figures, for at most an hour, of those with a name here and of all others, after their names.
        """
        age = self._advance()
        oldest = self._number * SLICE - HOUR
        return {
            "age": age,
            "seconds": SLICE,
            "slices": [*(row for row in self._rows if row[0] > oldest), self._row()],
            "models": self._models.shown(age),
            "callers": self._callers.shown(age),
        }
