"""OpenTelemetry spans and metrics of a batcher, under the names of the semantic conventions for generative AI.

The conventions are in development, and no package holds their current names, hence the constants. They are as of October 2026
(open-telemetry/semantic-conventions-genai), when `gen_ai.client.operation.duration` and `time_to_first_chunk` had become those of
`gen_ai.client.inference` (#521), and counters had replaced the histogram `gen_ai.client.token.usage` (#374).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from microbatch.accounting.events import BESIDE
from microbatch.checking import checks_arguments
from microbatch.errors import ConfigError
from microbatch.messages import Usage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.metrics import MeterProvider  # noqa: TC004 an optional package
    from opentelemetry.trace import SpanContext, TracerProvider  # noqa: TC004 an optional package

    from microbatch.accounting.audits import Audited
    from microbatch.accounting.events import Called, Flushed, Settled

    Attributes = dict[str, str | int | float | bool | list[str]]

REQUEST_MODEL: Final = "gen_ai.request.model"
RESPONSE_MODEL: Final = "gen_ai.response.model"
ERROR_TYPE: Final = "error.type"
BATCH_SIZE: Final = "microbatch.batch.size"
ROUTE: Final = "microbatch.route"
COST: Final = "microbatch.cost_usd"

_NANOSECONDS: Final = 1_000_000_000
_TOKENS: Final = [4**power for power in range(14)]
_SECONDS: Final = [0.01 * 2**power for power in range(14)]
_SIZES: Final = [2**power for power in range(10)]

_INFERENCE: Final = "gen_ai.client.inference"
_COUNTERS: Final = {
    f"{_INFERENCE}.usage.input_tokens": ("{token}", "The number of input tokens used."),
    f"{_INFERENCE}.usage.output_tokens": ("{token}", "The number of output tokens used."),
    f"{_INFERENCE}.usage.cache_read.input_tokens": ("{token}", "The number of cached input tokens used."),
    "microbatch.call.attempts": ("{attempt}", "HTTP attempts of calls."),
    "microbatch.cost": ("{USD}", "Price of the tokens that calls used."),
    "microbatch.unpriced_calls": ("{call}", "Calls that reported tokens and whose model has no known price."),
    "microbatch.requests": ("{request}", "Requests that have ended."),
    "microbatch.flushes": ("{flush}", "Batches and single requests that left."),
    "microbatch.audits": ("{audit}", "Answers from batches that were compared with an answer alone."),
    "microbatch.audit.decisions": ("{decision}", "Sizes of batches that audits certified or condemned."),
}
_SCORE: Final = "microbatch.audit.score"
_HISTOGRAMS: Final[dict[str, tuple[str, str, Sequence[float]]]] = {
    f"{_INFERENCE}.operation.input_tokens": ("{token}", "Input tokens used per inference operation.", _TOKENS),
    f"{_INFERENCE}.operation.output_tokens": ("{token}", "Output tokens used per inference operation.", _TOKENS),
    f"{_INFERENCE}.duration": ("s", "GenAI client inference operation duration.", _SECONDS),
    f"{_INFERENCE}.time_to_first_chunk": ("s", "Time to receive the first chunk.", _SECONDS),
    BATCH_SIZE: ("{request}", "Requests in a call.", _SIZES),
    "microbatch.request.wait": ("s", "Time from submit until the call that answered was sent.", _SECONDS),
    "microbatch.request.duration": ("s", "Time from submit to the end.", _SECONDS),
}
"""Each instrument with its unit, its description and the bounds of its buckets."""


class OpenTelemetryHooks:
    """Hooks of one or several `Microbatcher`s that record spans and metrics.

    Each call is one CLIENT span in a trace of its own: it belongs to many callers, so it has a link to the span of each and no parent.
    Spans and metrics hold names, sizes, tokens and times, and never a message, an answer, a header or the words of an error.

    Args:
        tracer_provider: Provider of the tracer; None for the global one.
        meter_provider: Provider of the meter; None for the global one.
        provider_name: The endpoint's provider, as the conventions name it: "openai", "deepseek", "mistral_ai", ...
        server_address: Host of the endpoint, or None to leave it out.
        server_port: Its port; recorded only with `server_address`.
        submit_spans: Whether each request is a span as well, `microbatch.submit`, a child of its caller's: how long it waited, and by
            which route its answer came. There is none for a caller without a span, or with one that is not sampled.

    Raises:
        ConfigError: The package opentelemetry-api is missing.
    """

    @checks_arguments
    def __init__(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        provider_name: str = "openai",
        server_address: str | None = None,
        server_port: int = 443,
        submit_spans: bool = False,
    ) -> None:
        try:
            from opentelemetry import context, metrics, trace  # noqa: PLC0415 of the extra `otel`
        except ImportError:
            raise ConfigError(
                "OpenTelemetryHooks needs the package opentelemetry-api: pip install 'microbatch[otel]'"
            ) from None
        self._trace = trace
        self._root = context.Context()  # holds no span, so what starts in it has no parent
        self._tracer = trace.get_tracer("microbatch", tracer_provider=tracer_provider)
        meter = metrics.get_meter("microbatch", meter_provider=meter_provider)
        self._add = {name: meter.create_counter(name, *described).add for name, described in _COUNTERS.items()}
        self._record = {
            name: meter.create_histogram(name, unit, text, explicit_bucket_boundaries_advisory=bounds).record
            for name, (unit, text, bounds) in _HISTOGRAMS.items()
        }
        score = "Sum of the scores of audits: by the number of those compared, the disagreement that combining causes."
        self._add[_SCORE] = meter.create_up_down_counter(_SCORE, "1", score).add
        self._submit_spans = submit_spans
        self._common: Attributes = {"gen_ai.provider.name": provider_name}
        if server_address is not None:
            self._common |= {"server.address": server_address, "server.port": server_port}

    def on_submit(self) -> SpanContext | None:
        """Return the context of the caller's span, None if it has none."""
        context = self._trace.get_current_span().get_span_context()
        return context if context.is_valid else None

    def on_flush(self, event: Flushed) -> None:
        """Count a flush."""
        self._add["microbatch.flushes"](1, {"microbatch.flush.reason": event.reason})

    def on_call(self, event: Called) -> None:
        """Record the span and the metrics of a call."""
        # Without a finish reason there was no complete reply, and the model is the one that was asked.
        answered_by = None if event.finish_reason is None else event.model
        common = self._common | {"gen_ai.operation.name": event.operation}
        of_call = _known({REQUEST_MODEL: event.requested_model, RESPONSE_MODEL: answered_by})
        failure = _known({ERROR_TYPE: _kind(event.error)})
        # A caller may have many requests in one batch, and needs one link.
        callers = {(origin.trace_id, origin.span_id): origin for origin in event.origins if origin is not None}
        self._record_span(
            f"{event.operation} {event.requested_model}" if event.requested_model else event.operation,
            event.duration,
            event.error,
            context=self._root,
            kind=self._trace.SpanKind.CLIENT,
            attributes=common | of_call | failure | _of_span(event),
            links=[self._trace.Link(caller) for caller in callers.values()],
        )
        # Such a call answers no caller: its duration and tokens are kept apart from those of the others.
        beside: Attributes = {ROUTE: event.route} if event.route in BESIDE else {}
        self._count_call(event, common | of_call | beside, failure)

    def _count_call(self, event: Called, common: Attributes, failure: Attributes) -> None:
        # Endpoints do not distinguish text from other tokens, and guesses would not add up.
        unknown = common | {"gen_ai.token.modality": "unknown"}
        for kind, tokens in _tokens(event.usage or Usage()).items():
            self._add[f"{_INFERENCE}.usage.{kind}"](tokens, unknown)
        if event.usage is not None:
            self._record[f"{_INFERENCE}.operation.input_tokens"](event.usage.prompt_tokens, common)
            self._record[f"{_INFERENCE}.operation.output_tokens"](event.usage.completion_tokens, common)
        self._record[f"{_INFERENCE}.duration"](event.duration, common | failure)
        if event.streamed and event.first_text is not None:
            self._record[f"{_INFERENCE}.time_to_first_chunk"](event.first_text, common)
        route: Attributes = {ROUTE: event.route}
        self._record[BATCH_SIZE](event.size, route)
        self._add["microbatch.call.attempts"](event.attempts, route)
        if event.cost_usd is not None:
            self._add["microbatch.cost"](event.cost_usd, route)
        elif event.usage is not None:
            self._add["microbatch.unpriced_calls"](1, route)

    def on_audit(self, event: Audited) -> None:
        """Count an audit that has ended, and what it has decided."""
        attributes = _known({REQUEST_MODEL: event.model, BATCH_SIZE: event.size})
        self._add["microbatch.audits"](1, attributes | {"microbatch.audit.outcome": event.outcome})
        if event.score is not None:
            self._add[_SCORE](event.score, attributes)
        if event.decision is not None:
            self._add["microbatch.audit.decisions"](1, attributes | {"microbatch.audit.decision": event.decision})

    def on_settle(self, event: Settled) -> None:
        """Record the metrics of a request and, with `submit_spans`, its span."""
        attributes = _known(
            {
                ROUTE: event.route,
                "microbatch.outcome": "failed" if event.error else "cancelled" if event.route is None else "answered",
                "microbatch.priority": event.priority,
                ERROR_TYPE: _kind(event.error),
            }
        )
        self._add["microbatch.requests"](1, attributes)
        self._record["microbatch.request.duration"](event.latency, attributes)
        if event.route is not None:
            self._record["microbatch.request.wait"](event.waited, attributes)
        if not self._submit_spans or event.origin is None or not event.origin.trace_flags.sampled:
            return
        attributes = attributes | _known(
            {
                "microbatch.waited": event.waited,
                BATCH_SIZE: event.batch_size,
                COST: event.cost_usd,
                RESPONSE_MODEL: None if event.route is None else event.model,
            }
        )
        parent = self._trace.set_span_in_context(self._trace.NonRecordingSpan(event.origin), self._root)
        self._record_span("microbatch.submit", event.latency, event.error, context=parent, attributes=attributes)

    def _record_span(self, name: str, duration: float, error: Exception | None, **options: Any) -> None:
        """Record a span of *duration* seconds that ends now; *options* are given here, not later, so that samplers see them."""
        end = time.time_ns()  # spans are dated by the wall clock
        span = self._tracer.start_span(name, start_time=end - int(duration * _NANOSECONDS), **options)
        if error is not None:
            # Without a description: an endpoint's words may quote a prompt.
            span.set_status(self._trace.StatusCode.ERROR)
        span.end(end)


def _tokens(usage: Usage) -> dict[str, int]:
    return {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_read.input_tokens": usage.cached_tokens,
    }


def _of_span(event: Called) -> Attributes:
    """Return the attributes that are only on spans of calls: those with many values, or rarely queried."""
    usage = {} if event.usage is None else _tokens(event.usage)
    return _known(
        {
            "gen_ai.request.max_tokens": event.max_tokens,
            "gen_ai.request.temperature": event.temperature,
            "gen_ai.request.stream": event.streamed or None,
            "gen_ai.response.id": event.request_id,
            "gen_ai.response.finish_reasons": None if event.finish_reason is None else [event.finish_reason],
            "gen_ai.response.time_to_first_chunk": event.first_text if event.streamed else None,
            **{f"gen_ai.usage.{kind}": tokens for kind, tokens in usage.items()},
            BATCH_SIZE: event.size,
            ROUTE: event.route,
            "microbatch.attempts": event.attempts,
            COST: event.cost_usd,
        }
    )


def _kind(error: Exception | None) -> str | None:
    """Return the class name of *error*, of which there are few."""
    return None if error is None else type(error).__name__


def _known(values: dict[str, Any]) -> Attributes:
    """Return *values* without those that are None."""
    return {name: value for name, value in values.items() if value is not None}
