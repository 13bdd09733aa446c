"""The gateway's own pages about itself: health, readiness, figures and metrics."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from aiohttp import web

from microbatch.gateway.dashboard import figures
from microbatch.gateway.errors import GatewayError
from microbatch.gateway.report import Report, total

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.accounting.prometheus import PrometheusHooks
    from microbatch.gateway.crew import Lifecycle


class OwnPages:
    """The pages of a gateway; figures are those of all workers of which it is one.

    Args:
        life: How far it has come.
        report: Returns what this process has counted.
        metrics: Renders metrics; None if the package prometheus-client is missing.
    """

    def __init__(self, life: Lifecycle, report: Callable[[], Report], metrics: PrometheusHooks | None) -> None:
        self._life = life
        self._own_report = report
        self._metrics = metrics

    async def health(self, _request: web.Request) -> web.Response:
        """Return that the process answers."""
        return web.json_response({"status": "ok"})

    async def ready(self, _request: web.Request) -> web.Response:
        """Return whether requests are welcome: not before all workers serve, nor while the gateway closes."""
        status: dict[str, Any] = {"status": "ready"}
        crew = self._life.crew
        if self._life.draining:
            status = {"status": "draining"}
        elif crew is not None and crew.up < crew.wanted:
            status = {"status": "starting", "workers": crew.up, "wanted": crew.wanted}
        return web.json_response(status, status=200 if status["status"] == "ready" else 503)

    async def stats(self, _request: web.Request) -> web.Response:
        """Return the figures as JSON."""
        report, now = await self._report(), time.monotonic()
        live = {**report.live.shown(now), "hour": report.hour.shown(now)}
        crew = self._life.crew
        if crew is not None:
            live["workers"] = {"up": crew.up, "wanted": crew.wanted}
        body = figures(report.stats, live)
        return web.Response(body=body, content_type="application/json", headers={"Cache-Control": "no-store"})

    async def metrics(self, _request: web.Request) -> web.Response:
        """Return the metrics for Prometheus."""
        metrics = self._metrics
        if metrics is None:
            message = "This needs the package prometheus-client: pip install 'microbatch[prometheus]'."
            raise GatewayError(501, message, code="no_metrics")
        if self._life.crew is None:
            text = metrics.render()
        else:
            report = await self._report()
            text = metrics.render_of(report.families, report.stats)
        return web.Response(body=text, headers={"Content-Type": metrics.content_type})

    async def _report(self) -> Report:
        crew = self._life.crew
        return total([self._own_report(), *(() if crew is None else await crew.others())])
