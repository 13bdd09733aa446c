"""Figures of a batcher over the last minute, for a dashboard."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import Counter, deque
from operator import add
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.accounting.events import BESIDE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from microbatch.accounting.events import Called, Settled

WINDOW: Final = 60.0
MOST_KEPT: Final = 4_096
"""Recent figures cover so many seconds, and at most so many requests, and calls: the latest ones."""

_SIZES: Final = (*range(1, 17), 32, 64, 128, 256, 512, 1_024)


class LiveState(msgspec.Struct):
    """Recent figures of one process, or of several together, whose clock is the same.

    Attributes:
        started: When counting began.
        complete_from: From when on `latencies` are complete, if there were too many to keep; 0.0 if all are there.
        latencies: Ends and durations of answered requests.
        calls: Those of calls.
        sizes: Number of calls by size.
        routes: Number of answered requests by route.
        errors: Number of failed ones by class, or by what `LiveFigures.note_error` was told.
    """

    started: float
    complete_from: float
    latencies: list[tuple[float, float]]
    calls: list[tuple[float, float]]
    sizes: list[int]
    routes: dict[str, int]
    errors: dict[str, int]

    def add(self, other: LiveState) -> None:
        """Add the figures of another process."""
        self.started = min(self.started, other.started)
        self.complete_from = max(self.complete_from, other.complete_from)
        self.latencies = _latest(self.latencies + other.latencies)
        self.calls = _latest(self.calls + other.calls)
        self.sizes = list(map(add, self.sizes, other.sizes))
        self.routes = dict(Counter(self.routes) + Counter(other.routes))
        self.errors = dict(Counter(self.errors) + Counter(other.errors))

    def shown(self, now: float) -> dict[str, Any]:
        """Return the figures at the time *now*.

        `window` is the time in seconds that recent figures cover: less than a minute after the start, or with very many requests. In
        it, `requests_per_second` were answered; `latency_*` are percentiles of the seconds from submit to the answer, and `call_*` of
        those of calls, None if there were none. Since the start: `batch_sizes` counts calls by their number of requests, in pairs of
        the largest size counted and how many, the last one for all larger calls; `routes` counts answered requests by route, `errors`
        failed ones by class, or by what `note_error` was told.
        """
        start = max(self.started, now - WINDOW, self.complete_from)
        latencies = _since(start, self.latencies)
        window = now - start
        calls = _since(now - WINDOW, self.calls)
        return {
            "window": window,
            "requests_per_second": len(latencies) / window if window > 0 else 0.0,
            "latency_p50": _percentile(latencies, 0.50),
            "latency_p99": _percentile(latencies, 0.99),
            "call_p50": _percentile(calls, 0.50),
            "call_p99": _percentile(calls, 0.99),
            "batch_sizes": list(zip(_SIZES, self.sizes, strict=True)),
            "routes": self.routes,
            "errors": self.errors,
        }


class LiveFigures:
    """Hooks of a `Microbatcher` that collect recent figures, in less than 1 MB; *now* returns the time in seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._started = now()
        self._latencies: deque[tuple[float, float]] = deque(maxlen=MOST_KEPT)  # end, duration
        self._calls: deque[tuple[float, float]] = deque(maxlen=MOST_KEPT)
        self._sizes = [0] * len(_SIZES)
        self._routes = Counter[str]()
        self._errors = Counter[str]()

    def on_call(self, event: Called) -> None:
        """Record the size and the duration of a call, unless it belongs to no request, as audits do."""
        if event.route in BESIDE:
            return
        self._sizes[min(bisect_left(_SIZES, event.size), len(_SIZES) - 1)] += 1
        self._calls.append((self._now(), event.duration))

    def on_settle(self, event: Settled) -> None:
        """Record how a request ended, and when."""
        if event.error is not None:
            self._errors[type(event.error).__name__] += 1
        elif event.route is not None:
            self._routes[event.route] += 1
            self._latencies.append((self._now(), event.latency))

    def note_error(self, kind: str) -> None:
        """Count a failed request of which no event tells; *kind* must be one of a few."""
        self._errors[kind] += 1

    def state(self) -> LiveState:
        """Return what is needed to show the figures, alone or with those of other processes."""
        start = self._now() - WINDOW
        full = len(self._latencies) == MOST_KEPT
        return LiveState(
            started=self._started,
            complete_from=self._latencies[0][0] if full else 0.0,
            latencies=[pair for pair in self._latencies if pair[0] >= start],
            calls=[pair for pair in self._calls if pair[0] >= start],
            sizes=list(self._sizes),
            routes=dict(self._routes),
            errors=dict(self._errors),
        )

    def snapshot(self) -> dict[str, Any]:
        """Return the figures as they are now, see `LiveState.shown`."""
        return self.state().shown(self._now())


def _latest(kept: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return those of the last minute before the latest one: of processes that have ended, nothing older is needed."""
    start = max((when for when, _ in kept), default=0.0) - WINDOW
    return [pair for pair in kept if pair[0] >= start]


def _since(start: float, kept: Iterable[tuple[float, float]]) -> list[float]:
    """Return the durations of those that ended at *start* or later, in ascending order."""
    return sorted(seconds for when, seconds in kept if when >= start)


def _percentile(ordered: Sequence[float], share: float) -> float | None:
    """Return the smallest of *ordered* that *share* of them do not exceed, None if there are none."""
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else None
