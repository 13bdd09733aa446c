"""Figures of a batcher over the last minute, for a dashboard."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, Final

from microbatch.accounting.events import BESIDE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from microbatch.accounting.events import Called, Settled

WINDOW: Final = 60.0
MOST_KEPT: Final = 4_096
"""Recent figures cover so many seconds, and at most so many requests, and calls: the latest ones."""

_SIZES: Final = (*range(1, 17), 32, 64, 128, 256, 512, 1_024)


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

    def snapshot(self) -> dict[str, Any]:
        """Return the figures as they are now.

        `window` is the time in seconds that recent figures cover: less than a minute after the start, or with very many requests. In
        it, `requests_per_second` were answered; `latency_*` are percentiles of the seconds from submit to the answer, and `call_*` of
        those of calls, None if there were none. Since the start: `batch_sizes` counts calls by their number of requests, in pairs of
        the largest size counted and how many, the last one for all larger calls; `routes` counts answered requests by route, `errors`
        failed ones by class, or by what `note_error` was told.
        """
        now = self._now()
        start = max(self._started, now - WINDOW)
        latencies = _since(start, self._latencies)
        if len(latencies) == MOST_KEPT:
            start = self._latencies[0][0]  # there were more before it
        window = now - start
        calls = _since(now - WINDOW, self._calls)
        return {
            "window": window,
            "requests_per_second": len(latencies) / window if window > 0 else 0.0,
            "latency_p50": _percentile(latencies, 0.50),
            "latency_p99": _percentile(latencies, 0.99),
            "call_p50": _percentile(calls, 0.50),
            "call_p99": _percentile(calls, 0.99),
            "batch_sizes": list(zip(_SIZES, self._sizes, strict=True)),
            "routes": dict(self._routes),
            "errors": dict(self._errors),
        }


def _since(start: float, kept: deque[tuple[float, float]]) -> list[float]:
    """Return the durations of those that ended at *start* or later, in ascending order."""
    return sorted(seconds for when, seconds in kept if when >= start)


def _percentile(ordered: Sequence[float], share: float) -> float | None:
    """Return the smallest of *ordered* that *share* of them do not exceed, None if there are none."""
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else None
