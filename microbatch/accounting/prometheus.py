"""Prometheus metrics of a batcher."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from microbatch.accounting.families import Family
from microbatch.accounting.labels import CallerLabels
from microbatch.accounting.stats import Stats, together
from microbatch.checking import checks_arguments
from microbatch.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from prometheus_client import CollectorRegistry  # noqa: TC004 an optional package
    from prometheus_client.metrics_core import Metric

    from microbatch.accounting.audits import Audited, AuditedSize
    from microbatch.accounting.events import Called, Flushed, Settled

_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_SIZES: Final = tuple(2**power for power in range(10))

_EVENTS: Final[dict[str, tuple[str, Sequence[str], Sequence[float] | None]]] = {
    "requests": ("Requests that have ended.", ("route", "outcome"), None),
    "wait_seconds": ("Time from submit until the call that answered was sent.", ("priority",), _SECONDS),
    "latency_seconds": ("Time from submit to the answer.", ("priority",), _SECONDS),
    "flushes": ("Batches and single requests that left their queue.", ("reason",), None),
    "calls": ("Calls that have ended.", ("route", "outcome"), None),
    "attempts": ("HTTP attempts of calls.", ("route",), None),
    "batch_size": ("Requests in a call.", ("route",), _SIZES),
    "call_seconds": ("Time from the first attempt of a call to its end.", ("route",), _SECONDS),
    "first_text_seconds": ("Time until the first text came.", ("route",), _SECONDS),
    "tokens": ("Tokens that endpoints reported.", ("kind",), None),
    "cached_tokens": ("Prompt tokens that endpoints read from their prefix caches.", (), None),
    "unreported_calls": ("Calls that ended without reporting tokens.", (), None),
    "cost_usd": ("Price of the reported tokens in US dollars, without those of unpriced calls.", (), None),
    "unpriced_calls": ("Calls that reported tokens and whose model has no known price.", (), None),
    "audits": (
        "Answers from batches that were compared with an answer alone.",
        ("model", "size", "outcome"),
        None,
    ),
}
"""Metrics counted from events: description, labels, and the buckets of a histogram or None for a counter."""

_BY_CALLER: Final[dict[str, tuple[str, Sequence[str], Sequence[float] | None]]] = {
    "caller_requests": ("Requests that have ended.", ("model", "tenant", "outcome"), None),
    "caller_calls": ("HTTP attempts of calls that have ended.", ("model", "tenant", "route"), None),
    "caller_tokens": ("Tokens that endpoints reported.", ("model", "tenant", "kind"), None),
    "caller_cost_usd": ("Price of the reported tokens in US dollars, where it is known.", ("model", "tenant"), None),
    "model_latency_seconds": ("Time from submit to the answer.", ("model",), _SECONDS),
}
"""Further ones with labels for the model that was asked for, and the tenant."""

# Metrics read from `Stats` at each scrape.
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
    "unknown_ids": "Answers under ids that were not asked for.",
    "cut_replies": "Combined replies that were broken off or hit a token limit.",
    "canaries_failed": "Replies distrusted because they got their canary wrong.",
    "lanes_parted": "How often a lane stopped combining for a while, because it cost more than it saved.",
    "similar_hits": "Requests answered with the answer to a similar question.",
    "similar_checks": "Such answers that were asked again.",
    "false_hits": "Those of them that were wrong.",
    "shadow_pairs": "Answers to similar questions compared because their kind is not proven.",
    "look_ups": "Questions for which a similar one was looked for.",
    "look_ups_late": "Those of them whose vector came too late.",
    "look_ups_failed": "Those of them without a vector that can be used.",
    "unbatched_calls": "Calls that the answered requests would have taken one by one.",
    "unbatched_prompt_tokens": "Prompt tokens that would have taken.",
    "unbatched_completion_tokens": "Completion tokens that would have taken.",
    "unbatched_cost_usd": "Price of that in US dollars.",
}
# Metrics of the sizes in `Stats.audit`, with labels for model and size, over all kinds of lanes that share them.
_SIZES_AUDITED: Final[dict[str, tuple[str, Callable[[Sequence[AuditedSize]], float]]]] = {
    "audit_excess": (
        "Share of answers that combining changes, beyond the model's own noise, in the kind of lane compared most often.",
        lambda rows: _most_compared(rows).excess,
    ),
    "audit_excess_upper": (
        "The bound that this excess does not exceed with 95 % confidence.",
        lambda rows: _most_compared(rows).upper,
    ),
    "audit_certified": (
        "Kinds of lanes whose excess was found to be below the accepted one.",
        lambda rows: sum(row.certified for row in rows),
    ),
    "audit_condemned": (
        "Kinds of lanes whose excess was found to be above the accepted one.",
        lambda rows: sum(row.condemned for row in rows),
    ),
}
# Gauges of `Stats.budget`: they fall when a period ends.
_BUDGET: Final = {
    "spent_usd": "US dollars spent in the present period of the budget.",
    "left_usd": "US dollars left in it.",
    "spent_tokens": "Tokens spent in it.",
    "left_tokens": "Tokens left in it.",
    "refused": "Calls not sent because of the budget.",
}
_REFUSED: Final = "Look-ups whose most similar question states other facts, by the kind of fact."
_KINDS: Final = "Kinds of questions that a semantic cache has compared, by their state."
_ALONE: Final = "Requests that a field or a message of theirs kept out of combined prompts."


class PrometheusHooks:
    """Hooks of one or several `Microbatcher`s that record metrics.

    Labels hold routes, reasons, priorities and classes of errors, which are few and which no caller can make up, and the names of at
    most 64 request fields and 64 models.

    Args:
        registry: Registry of the metrics: `prometheus_client.REGISTRY` puts them beside those of the process; None for a registry of
            their own, which only `render` shows.
        namespace: Prefix of all names.
        by_caller: Whether requests, calls, tokens and dollars are also counted by model and tenant, in metrics of their own. At most
            64 models, 64 tenants and 256 pairs of them are labels; all others count as "other models" and "other tenants". Tenants are
            labels as they are given, and digests of the gateway by their first 12 digits; what looks like a key is replaced.

    Attributes:
        labels: The models and tenants that are labels.
        content_type: The Content-Type of what `render` returns.

    Raises:
        ConfigError: The package prometheus-client is missing, or the registry has metrics under this namespace already.
    """

    @checks_arguments
    def __init__(
        self, *, registry: CollectorRegistry | None = None, namespace: str = "microbatch", by_caller: bool = False
    ) -> None:
        try:
            import prometheus_client  # noqa: PLC0415 of the extra `prometheus`
        except ImportError:
            raise ConfigError(
                "PrometheusHooks needs the package prometheus-client: pip install 'microbatch[prometheus]'"
            ) from None
        self._registry = registry if registry is not None else prometheus_client.CollectorRegistry()
        self.content_type: str = prometheus_client.CONTENT_TYPE_LATEST
        self._render = prometheus_client.generate_latest
        self._namespace = namespace
        self._families = prometheus_client.metrics_core
        self._sources: list[Callable[[], Stats]] = []
        self._latest: Stats | None = None
        self._priced = False  # whether any call was
        self._cost_shown = True
        self._counter, self._histogram = prometheus_client.Counter, prometheus_client.Histogram
        self.labels: CallerLabels = CallerLabels()
        self._by_caller = by_caller
        try:
            described = _EVENTS | (_BY_CALLER if by_caller else {})
            self._metrics = {name: self.metric(name, *parts) for name, parts in described.items()}
            self._registry.register(self)
        except ValueError as error:
            raise ConfigError(
                f"the registry has metrics named {namespace}_... already: give one PrometheusHooks to all batchers, "
                "or pass another namespace= or registry="
            ) from error

    def metric(self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float] | None = None) -> Any:
        """Return a new metric of the registry: a histogram with *buckets*, else a counter.

        Raises:
            ValueError: The registry has one of this name.
        """
        if buckets is None:
            return self._counter(name, text, labels, self._namespace, registry=self._registry)
        return self._histogram(name, text, labels, self._namespace, registry=self._registry, buckets=buckets)

    def watch(self, batcher: Any) -> None:
        """Export the `Stats` of *batcher* as well, such as its queue and its cache, at each scrape.

        Several batchers are exported as one. They are referenced as long as these hooks are, so that counters never go back.

        Args:
            batcher: A `Microbatcher`. One with a spool is read only in its event loop, by `render`.
        """
        self._sources.append(batcher.stats)

    def render(self) -> bytes:
        """Return all metrics of the registry in Prometheus' text format."""
        return self._render(self._registry)

    def export(self) -> list[Family]:
        """Return the metrics that were counted, without those of `Stats`, to be added to those of other processes."""
        of_stats = {family.name for family in self.describe()}
        return [
            Family(
                metric.name,
                metric.type,
                metric.documentation,
                [(sample.name, sample.labels, sample.value) for sample in metric.samples],
            )
            for metric in self._registry.collect()
            if metric.name not in of_stats
        ]

    def render_of(self, families: Iterable[Family], stats: Stats) -> bytes:
        """Return the metrics in *families*, of several processes together, and those of their *stats*, in the format of `render`."""
        metrics = list(self._stats_metrics(stats))
        for family in families:
            metric = self._families.Metric(family.name, family.text, family.kind)
            for sample in family.samples:
                metric.add_sample(*sample)
            metrics.append(metric)
        return self._render(_Collected(metrics))

    def on_flush(self, event: Flushed) -> None:
        """Count a flush."""
        self._metrics["flushes"].labels(event.reason).inc()

    def on_call(self, event: Called) -> None:
        """Count a call that has ended."""
        metrics, route = self._metrics, event.route
        metrics["calls"].labels(route, _outcome(event)).inc()
        metrics["attempts"].labels(route).inc(event.attempts)
        metrics["batch_size"].labels(route).observe(event.size)
        metrics["call_seconds"].labels(route).observe(event.duration)
        if event.first_text is not None:
            metrics["first_text_seconds"].labels(route).observe(event.first_text)
        if event.usage is None:
            metrics["unreported_calls"].inc()
        else:
            metrics["tokens"].labels("prompt").inc(event.usage.prompt_tokens)
            metrics["tokens"].labels("completion").inc(event.usage.completion_tokens)
            metrics["cached_tokens"].inc(event.usage.cached_tokens)
        if event.cost_usd is not None:
            metrics["cost_usd"].inc(event.cost_usd)
            self._show_cost(priced=True)
        elif event.usage is not None:
            metrics["unpriced_calls"].inc()
            self._show_cost(priced=False)
        if self._by_caller:
            self._count_call(event)

    def _count_call(self, event: Called) -> None:
        """Count a call by model and tenant."""
        metrics = self._metrics
        pair = self.labels.pair(event.requested_model or event.model, event.tenant, answered=event.error is None)
        metrics["caller_calls"].labels(*pair, event.route).inc(event.attempts)
        if event.usage is not None:
            metrics["caller_tokens"].labels(*pair, "prompt").inc(event.usage.prompt_tokens)
            metrics["caller_tokens"].labels(*pair, "completion").inc(event.usage.completion_tokens)
        if event.cost_usd is not None:
            metrics["caller_cost_usd"].labels(*pair).inc(event.cost_usd)

    def _show_cost(self, *, priced: bool) -> None:
        """Show the sum of dollars, unless all calls that have reported tokens were unpriced: it is not 0 then, but unknown."""
        self._priced = self._priced or priced
        if self._priced is not self._cost_shown:
            self._cost_shown = self._priced
            change = self._registry.register if self._priced else self._registry.unregister
            change(self._metrics["cost_usd"])

    def on_audit(self, event: Audited) -> None:
        """Count an audit that has ended."""
        model = self.labels.model(event.model, answered=True)
        self._metrics["audits"].labels(model, str(event.size), event.outcome).inc()

    def on_settle(self, event: Settled) -> None:
        """Count a request that has ended."""
        metrics, answered = self._metrics, event.route is not None
        outcome = "answered" if answered else type(event.error).__name__ if event.error else "cancelled"
        metrics["requests"].labels(event.route or "none", outcome).inc()
        if self._by_caller:
            pair = self.labels.pair(event.requested_model or event.model, event.tenant, answered=answered)
            metrics["caller_requests"].labels(*pair, outcome).inc()
            if answered:
                metrics["model_latency_seconds"].labels(pair[0]).observe(event.latency)
        if not answered:
            return
        metrics["wait_seconds"].labels(event.priority).observe(event.waited)
        metrics["latency_seconds"].labels(event.priority).observe(event.latency)

    def describe(self) -> Iterator[Metric]:
        """Return all metrics of `Stats`, so that registries notice duplicate names."""
        return self._stats_metrics(Stats())

    def collect(self) -> Iterator[Metric]:
        """Return the metrics of the present figures, for a registry."""
        if self._sources:
            # Scraped from a thread, as by prometheus_client's own server, a dict may grow while it is read, or a spool would have to
            # be counted where no event loop runs. Then the latest figures are returned.
            with contextlib.suppress(RuntimeError):
                parts = [source() for source in self._sources]
                self._latest = parts[0] if len(parts) == 1 else together(parts)
        return iter(()) if self._latest is None else self._stats_metrics(self._latest)

    def _stats_metrics(self, stats: Stats) -> Iterator[Metric]:
        families = self._families
        for kind, names in ((families.GaugeMetricFamily, _GAUGES), (families.CounterMetricFamily, _COUNTERS)):
            for name, description in names.items():
                value = getattr(stats, name)
                if value is not None:
                    yield kind(f"{self._namespace}_{name}", description, value=value)
        alone = families.CounterMetricFamily(f"{self._namespace}_alone", _ALONE, labels=["field"])
        for field, requests in stats.alone_by_field.items():
            alone.add_metric([field], requests)
        yield alone
        yield from self._audit_metrics(stats.audit)
        yield from self._similar_metrics(stats)
        for name, description in _BUDGET.items():
            value = getattr(stats.budget, name, None)
            if value is not None:
                yield families.GaugeMetricFamily(f"{self._namespace}_budget_{name}", description, value=value)

    def _similar_metrics(self, stats: Stats) -> Iterator[Metric]:
        refused = self._families.CounterMetricFamily(f"{self._namespace}_guard_refusals", _REFUSED, labels=["fact"])
        for fact, count in stats.guard_refusals.items():
            refused.add_metric([fact], count)
        yield refused
        kinds = self._families.GaugeMetricFamily(f"{self._namespace}_similar_kinds", _KINDS, labels=["state"])
        for state, count in Counter(kind.state for kind in stats.similar).items():
            kinds.add_metric([state], count)
        yield kinds

    def _audit_metrics(self, rows: Sequence[AuditedSize]) -> Iterator[Metric]:
        groups: dict[tuple[str, str], list[AuditedSize]] = {}
        for row in rows:
            groups.setdefault((self.labels.model(row.model, answered=True), str(row.size)), []).append(row)
        for name, (description, value) in _SIZES_AUDITED.items():
            gauge = self._families.GaugeMetricFamily(f"{self._namespace}_{name}", description, labels=["model", "size"])
            for labels, group in groups.items():
                gauge.add_metric(labels, value(group))
            yield gauge


class _Collected:
    """Metrics as a registry collects them."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Return the metrics."""
        return iter(self._metrics)


def _most_compared(rows: Sequence[AuditedSize]) -> AuditedSize:
    return max(rows, key=lambda row: row.compared)


def _outcome(event: Called) -> str:
    if event.error is not None:
        return type(event.error).__name__
    # Without a finish reason the reply was not read to its end, because no caller waited for it any more.
    return "stopped" if event.finish_reason is None else "answered"
