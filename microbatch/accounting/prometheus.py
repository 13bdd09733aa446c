"""What happens in a batcher as Prometheus metrics."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

from microbatch.accounting.stats import Stats, together
from microbatch.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client import CollectorRegistry, Counter, Histogram
    from prometheus_client.metrics_core import Metric

    from microbatch.accounting.events import Called, Flushed, Settled

_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_SIZES: Final = tuple(2**power for power in range(10))

_GAUGES: Final = {
    "queued": "Requests accepted and not settled.",
    "in_flight": "Calls under way.",
    "spool_depth": "Requests in the spool that are neither answered nor dead.",
    "spool_dead": "Dead letters in the spool.",
    "spool_oldest": "Age in seconds of the oldest request in the spool that is neither answered nor dead.",
}
_COUNTERS: Final = {
    "fallback_calls": "Calls made because an earlier reply left requests open.",
    "forwarded": "Requests relayed as they were.",
    "retries": "Attempts that repeated a failed one.",
    "retries_denied": "Failed calls not retried because the retry budget was used up.",
    "rate_limited": 'Attempts answered with "too many requests".',
    "cache_hits": "Requests answered from the cache.",
    "cache_misses": "Requests looked up in vain.",
    "cache_bypassed": "Requests for which the cache was out of order.",
    "cache_stores": "Answers put into the cache.",
    "cache_evictions": "Answers the cache dropped for want of room.",
    "canaries_failed": "Replies distrusted because they got their canary wrong.",
    "lanes_parted": "How often a lane stopped combining for a while, because it cost more than it saved.",
    "unbatched_calls": "Calls that the answered requests would have taken one by one.",
    "unbatched_prompt_tokens": "Prompt tokens that would have taken.",
    "unbatched_completion_tokens": "Completion tokens that would have taken.",
    "unbatched_cost_usd": "Price of that in US dollars.",
}


class PrometheusHooks:
    """Counts for Prometheus; one of the `hooks` of a `Microbatcher`, or of several.

    Labels hold routes, reasons, priorities and kinds of errors: few, and none that a caller can make up.

    Args:
        registry: Where the metrics are registered: `prometheus_client.REGISTRY` puts them beside those of the process. None makes a
            registry of its own, which only `render` shows.
        namespace: What all names begin with.

    Attributes:
        content_type: What `render` returns, for the header of that name.

    Raises:
        ConfigError: The package prometheus-client is missing, or the registry has metrics under this namespace already.
    """

    def __init__(self, *, registry: CollectorRegistry | None = None, namespace: str = "microbatch") -> None:
        try:
            import prometheus_client  # noqa: PLC0415 of the extra `prometheus`
        except ImportError:
            raise ConfigError(
                "PrometheusHooks needs the package prometheus-client: pip install 'microbatch[prometheus]'"
            ) from None
        self._registry = registry if registry is not None else prometheus_client.CollectorRegistry()
        self.content_type: str = prometheus_client.CONTENT_TYPE_LATEST
        self._render = prometheus_client.generate_latest
        self._watched = _Watched(namespace)

        def counter(name: str, description: str, *labels: str) -> Counter:
            return prometheus_client.Counter(name, description, labels, namespace, registry=self._registry)

        def histogram(name: str, description: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return prometheus_client.Histogram(
                name, description, labels, namespace, registry=self._registry, buckets=buckets
            )

        try:
            self._requests = counter("requests", "Requests that have ended.", "route", "outcome")
            self._waited = histogram(
                "wait_seconds", "Time from submit until the call that answered was sent.", _SECONDS, "priority"
            )
            self._latency = histogram("latency_seconds", "Time from submit to the answer.", _SECONDS, "priority")
            self._flushes = counter("flushes", "Batches and single requests that left their queue.", "reason")
            self._calls = counter("calls", "Calls that have ended.", "route", "outcome")
            self._attempts = counter("attempts", "HTTP attempts of calls.", "route")
            self._batch_size = histogram("batch_size", "Requests in a call.", _SIZES, "route")
            self._duration = histogram(
                "call_seconds", "Time from the first attempt of a call to its end.", _SECONDS, "route"
            )
            self._first_text = histogram("first_text_seconds", "Time until the first text came.", _SECONDS, "route")
            self._tokens = counter("tokens", "Tokens that endpoints reported.", "kind")
            self._cached = counter("cached_tokens", "Prompt tokens that endpoints read from their prefix caches.")
            self._unreported = counter("unreported_calls", "Calls that ended without reporting tokens.")
            self._cost = counter("cost_usd", "Price of the reported tokens in US dollars, where it is known.")
            self._registry.register(self._watched)
        except ValueError as error:
            raise ConfigError(
                f"the registry has metrics named {namespace}_... already: give one PrometheusHooks to all batchers, "
                "or pass another namespace= or registry="
            ) from error

    def watch(self, batcher: Any) -> None:
        """Show the figures that *batcher* keeps itself, such as its queue and its cache, at each scrape.

        Several batchers are shown as one. They are held for as long as these hooks are, so that counters never go back.

        Args:
            batcher: A `Microbatcher`. One with a spool is read only where its event loop runs: by `render`, called there.
        """
        self._watched.looks.append(batcher.stats)

    def render(self) -> bytes:
        """Return all metrics of the registry in Prometheus' text format."""
        return self._render(self._registry)

    def on_flush(self, event: Flushed) -> None:
        """Count a flush."""
        self._flushes.labels(event.reason).inc()

    def on_call(self, event: Called) -> None:
        """Count a call that has ended."""
        self._calls.labels(event.route, _outcome(event)).inc()
        self._attempts.labels(event.route).inc(event.attempts)
        self._batch_size.labels(event.route).observe(event.size)
        self._duration.labels(event.route).observe(event.duration)
        if event.first_text is not None:
            self._first_text.labels(event.route).observe(event.first_text)
        if event.usage is None:
            self._unreported.inc()
        else:
            self._tokens.labels("prompt").inc(event.usage.prompt_tokens)
            self._tokens.labels("completion").inc(event.usage.completion_tokens)
            self._cached.inc(event.usage.cached_tokens)
        if event.cost_usd is not None:
            self._cost.inc(event.cost_usd)

    def on_settle(self, event: Settled) -> None:
        """Count a request that has ended."""
        if event.route is None:
            self._requests.labels("none", type(event.error).__name__ if event.error else "cancelled").inc()
            return
        self._requests.labels(event.route, "answered").inc()
        self._waited.labels(event.priority).observe(event.waited)
        self._latency.labels(event.priority).observe(event.latency)


class _Watched:
    """Reads the figures of batchers when they are asked for.

    Args:
        namespace: What the names begin with.

    Attributes:
        looks: The `stats` of each batcher.
    """

    def __init__(self, namespace: str) -> None:
        from prometheus_client import metrics_core  # noqa: PLC0415 of the extra `prometheus`

        self._families = metrics_core
        self._namespace = namespace
        self._latest: Stats | None = None
        self.looks: list[Callable[[], Stats]] = []

    def describe(self) -> Iterator[Metric]:
        """Tell the names, so that registries see when there are others of the same."""
        return self._told(Stats())

    def collect(self) -> Iterator[Metric]:
        """Tell the figures as they are now."""
        if self.looks:
            # Scraped from a thread, as prometheus_client's own server does, a dict may grow while it is read, or a spool may have to
            # be counted where no event loop runs. What was seen last has to do.
            with contextlib.suppress(RuntimeError):
                self._latest = _as_one([look() for look in self.looks])
        return iter(()) if self._latest is None else self._told(self._latest)

    def _told(self, stats: Stats) -> Iterator[Metric]:
        for kind, names in (
            (self._families.GaugeMetricFamily, _GAUGES),
            (self._families.CounterMetricFamily, _COUNTERS),
        ):
            for name, description in names.items():
                value = getattr(stats, name)
                if value is not None:
                    yield kind(f"{self._namespace}_{name}", description, value=value)


def _as_one(parts: list[Stats]) -> Stats:
    return parts[0] if len(parts) == 1 else together(parts)  # which leaves out the spool, as it may be the same one


def _outcome(event: Called) -> str:
    """Return how a call ended: the name of the kind of error, of which there are few, or a word."""
    if event.error is not None:
        return type(event.error).__name__
    # Without a reason the reply was not read to its end: nobody waited for it any more.
    return "stopped" if event.finish_reason is None else "answered"
