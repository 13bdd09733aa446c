"""Metrics, log and dashboard of the requests that the gateway serves."""

from __future__ import annotations

import asyncio
import contextvars
from typing import TYPE_CHECKING, Any, Final

from microbatch.accounting.labels import CallerLabels
from microbatch.accounting.live import LiveFigures
from microbatch.accounting.prometheus import PrometheusHooks
from microbatch.errors import ConfigError
from microbatch.gateway.hour import Hour
from microbatch.gateway.report import Report
from microbatch.gateway.served import DISCONNECTED, UPSTREAM

if TYPE_CHECKING:
    from microbatch.accounting.stats import Stats
    from microbatch.client import Microbatcher
    from microbatch.gateway.access_log import AccessLog
    from microbatch.gateway.served import Served
    from microbatch.messages import Reply

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Observation:
    """Takes requests when they have been served, and is told of calls by events.

    Args:
        log: The access log; None for none.

    Attributes:
        hooks: What is to receive the batcher's events.
        metrics: The metrics; None if the package prometheus-client is missing.
    """

    def __init__(self, log: AccessLog | None) -> None:
        self._log = log
        self._unsettled: set[asyncio.Task[None]] = set()
        self._live = LiveFigures()
        self.metrics: PrometheusHooks | None = None
        try:
            self.metrics = PrometheusHooks(by_caller=True)
        except ConfigError:  # the package is missing, which /metrics reports
            self._labels = CallerLabels()
        else:
            self._labels = self.metrics.labels
            served, answered = "Requests that the gateway has served.", "Time until an answer was complete."
            self._requests = self.metrics.metric("http_requests", served, ("route", "status", "reason"))
            self._by_caller = self.metrics.metric("http_caller_requests", served, ("model", "tenant", "status"))
            self._seconds = self.metrics.metric("http_request_seconds", answered, ("route",), _SECONDS)
        self._hour = Hour(self._labels)
        self.hooks: list[object] = [self._live, self._hour, *([] if self.metrics is None else [self.metrics])]

    def watch(self, batcher: Microbatcher) -> None:
        """Show the figures of *batcher* among the metrics."""
        if self.metrics is not None:
            self.metrics.watch(batcher)

    def add(self, record: Served) -> None:
        """Take a request that has been served."""
        self._hour.add(record)
        reason = record.reason
        if reason is not None and reason != DISCONNECTED and not record.reported:
            self._live.note_error(f"{reason} {record.status}" if reason == UPSTREAM else reason)
        if self.metrics is not None:
            self._count(record)
        if self._log is not None and not (record.page and record.answered):
            self._note(self._log, record, record.reply)

    def _count(self, record: Served) -> None:
        status, route = str(record.status), record.route or "none"
        self._requests.labels(route, status, record.reason or "").inc()
        if record.answered:
            self._seconds.labels(route).observe(record.seconds)
        if not record.page:
            pair = self._labels.pair(record.model, record.tenant, answered=record.answered)
            self._by_caller.labels(*pair, status).inc()

    def _note(self, log: AccessLog, record: Served, reply: Reply[Any] | None) -> None:
        """Add the line of *record* to *log*; if its call is under way, when that has ended and the cost is known."""
        if reply is None or not reply.usage.estimated:
            log.write(record)
            return

        async def write_when_settled() -> None:
            await reply.settled()
            log.write(record)

        task = asyncio.get_running_loop().create_task(write_when_settled(), context=contextvars.Context())
        self._unsettled.add(task)
        task.add_done_callback(self._unsettled.discard)

    def begin_at(self, began: float) -> None:
        """Count the last hour from the monotonic time *began*, as other processes do."""
        self._hour.begin_at(began)

    def report(self, stats: Stats) -> Report:
        """Return what was counted, beside *stats*, those of the batcher."""
        families = [] if self.metrics is None else self.metrics.export()
        return Report(stats, self._live.state(), self._hour.state(), families)

    async def aclose(self) -> None:
        """Close the log; the batcher must have been closed, so that all calls have ended."""
        if self._unsettled:
            await asyncio.wait(self._unsettled)
        if self._log is not None:
            await self._log.aclose()
