"""What happens in a batcher as OpenTelemetry spans and metrics, under the names of its conventions for generative AI.

Those are still in development, and no package holds their names as they are now; hence the constants. They are as of October 2026
(open-telemetry/semantic-conventions-genai), when `gen_ai.client.operation.duration` and `time_to_first_chunk` had become those of
`gen_ai.client.inference` (#521), and counters had taken the place of the histogram `gen_ai.client.token.usage` (#374).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from microbatch.errors import ConfigError
from microbatch.messages import Usage

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter, MeterProvider
    from opentelemetry.trace import SpanContext, TracerProvider

    from microbatch.accounting.events import Called, Flushed, Settled

    Attributes = dict[str, str | int | float | bool | list[str]]

OPERATION: Final = "gen_ai.operation.name"
PROVIDER: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
REQUEST_STREAM: Final = "gen_ai.request.stream"
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_ID: Final = "gen_ai.response.id"
RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
RESPONSE_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
USAGE_INPUT: Final = "gen_ai.usage.input_tokens"
USAGE_OUTPUT: Final = "gen_ai.usage.output_tokens"
USAGE_CACHE_READ: Final = "gen_ai.usage.cache_read.input_tokens"
TOKEN_MODALITY: Final = "gen_ai.token.modality"  # noqa: S105 as it is no password
ERROR_TYPE: Final = "error.type"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"
BATCH_SIZE: Final = "microbatch.batch.size"
ROUTE: Final = "microbatch.route"
ATTEMPTS: Final = "microbatch.attempts"
COST: Final = "microbatch.cost_usd"
OUTCOME: Final = "microbatch.outcome"
PRIORITY: Final = "microbatch.priority"
FLUSH_REASON: Final = "microbatch.flush.reason"
WAITED: Final = "microbatch.waited"

_CHAT: Final = "chat"
_NANOSECONDS: Final = 1_000_000_000
_TOKEN_BUCKETS: Final = [4**power for power in range(14)]
_SECOND_BUCKETS: Final = [0.01 * 2**power for power in range(14)]
_SIZE_BUCKETS: Final = [2**power for power in range(10)]


class OpenTelemetryHooks:
    """Tells OpenTelemetry of calls and requests; one of the `hooks` of a `Microbatcher`, or of several.

    Each call is one CLIENT span, in a trace of its own: it belongs to many callers, so it is linked to the span of each and a child of
    none. Spans and metrics hold names, sizes, tokens and times, and never a message, an answer, a header or the words of an error.

    Args:
        tracer_provider: Where spans go; None for the global one.
        meter_provider: Where metrics go; None for the global one.
        provider_name: Who answers, in the words of the conventions: "openai", "deepseek", "mistral_ai", ...
        server_address: The host of the endpoint, or None to leave it out.
        server_port: Its port; told only with `server_address`.
        submit_spans: Whether each request is a span as well, `microbatch.submit`, a child of its caller's: how long it waited, and by
            which route its answer came. There is none for a caller without a span, or with one that is not sampled.

    Raises:
        ConfigError: The package opentelemetry-api is missing.
    """

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
        self._metrics = _Metrics(metrics.get_meter("microbatch", meter_provider=meter_provider))
        self._submit_spans = submit_spans
        self._common: Attributes = {OPERATION: _CHAT, PROVIDER: provider_name}
        if server_address is not None:
            self._common |= {SERVER_ADDRESS: server_address, SERVER_PORT: server_port}

    def on_submit(self) -> SpanContext | None:
        """Return the identity of the caller's span, None if it has none."""
        context = self._trace.get_current_span().get_span_context()
        return context if context.is_valid else None

    def on_flush(self, event: Flushed) -> None:
        """Count a flush."""
        self._metrics.flushes.add(1, {FLUSH_REASON: event.reason})

    def on_call(self, event: Called) -> None:
        """Make the span of a call, and count what it took."""
        # Without a reason to stop there was no whole reply, and the model is the one that was asked.
        answered_by = None if event.finish_reason is None else event.model
        of_call = _known({REQUEST_MODEL: event.requested_model, RESPONSE_MODEL: answered_by})
        failure = _known({ERROR_TYPE: _kind(event.error)})
        self._trace_call(event, self._common | of_call | failure)
        self._metrics.count_call(event, self._common | of_call, failure)

    def _trace_call(self, event: Called, attributes: Attributes) -> None:
        trace = self._trace
        # The wall clock, which spans are dated by; they have to say when something was, not only how long it took.
        end = time.time_ns()
        # A caller may have many requests in one batch, and one link to it says all.
        callers = {(origin.trace_id, origin.span_id): origin for origin in event.origins if origin is not None}
        span = self._tracer.start_span(
            f"{_CHAT} {event.requested_model}" if event.requested_model else _CHAT,
            self._root,
            trace.SpanKind.CLIENT,
            attributes | _of_span(event),
            # Given here and not added later: this is what samplers see.
            [trace.Link(caller) for caller in callers.values()],
            end - int(event.duration * _NANOSECONDS),
        )
        if event.error is not None:
            span.set_status(trace.StatusCode.ERROR)  # without a description: an endpoint's words may quote a prompt
        span.end(end)

    def on_settle(self, event: Settled) -> None:
        """Count a request and, if asked to, make its span."""
        attributes = _known(
            {
                ROUTE: event.route,
                OUTCOME: "failed" if event.error else "cancelled" if event.route is None else "answered",
                PRIORITY: event.priority,
                ERROR_TYPE: _kind(event.error),
            }
        )
        self._metrics.count_request(event, attributes)
        if self._submit_spans and event.origin is not None and event.origin.trace_flags.sampled:
            self._trace_request(event, attributes)

    def _trace_request(self, event: Settled, attributes: Attributes) -> None:
        trace = self._trace
        end = time.time_ns()
        span = self._tracer.start_span(
            "microbatch.submit",
            trace.set_span_in_context(trace.NonRecordingSpan(event.origin), self._root),
            trace.SpanKind.INTERNAL,
            attributes
            | _known(
                {
                    WAITED: event.waited,
                    BATCH_SIZE: event.batch_size,
                    COST: event.cost_usd,
                    RESPONSE_MODEL: None if event.route is None else event.model,
                }
            ),
            None,
            end - int(event.latency * _NANOSECONDS),
        )
        if event.error is not None:
            span.set_status(trace.StatusCode.ERROR)
        span.end(end)


class _Metrics:
    """The instruments.

    Args:
        meter: Makes them.
    """

    def __init__(self, meter: Meter) -> None:
        usage, operation = "gen_ai.client.inference.usage", "gen_ai.client.inference.operation"

        def tokens(name: str, of: str) -> Any:
            return meter.create_counter(f"{usage}.{name}", "{token}", f"The number of {of} tokens used.")

        def histogram(name: str, unit: str, description: str, buckets: list[Any]) -> Any:
            return meter.create_histogram(name, unit, description, explicit_bucket_boundaries_advisory=buckets)

        self._input = tokens("input_tokens", "input")
        self._output = tokens("output_tokens", "output")
        self._cache_read = tokens("cache_read.input_tokens", "cached input")
        self._inputs = histogram(
            f"{operation}.input_tokens", "{token}", "Input tokens used per inference operation.", _TOKEN_BUCKETS
        )
        self._outputs = histogram(
            f"{operation}.output_tokens", "{token}", "Output tokens used per inference operation.", _TOKEN_BUCKETS
        )
        self._duration = histogram(
            "gen_ai.client.inference.duration", "s", "GenAI client inference operation duration.", _SECOND_BUCKETS
        )
        self._first_chunk = histogram(
            "gen_ai.client.inference.time_to_first_chunk", "s", "Time to receive the first chunk.", _SECOND_BUCKETS
        )
        self._batch_size = histogram("microbatch.batch.size", "{request}", "Requests in a call.", _SIZE_BUCKETS)
        self._attempts = meter.create_counter("microbatch.call.attempts", "{attempt}", "HTTP attempts of calls.")
        self._cost = meter.create_counter("microbatch.cost", "{USD}", "Price of the tokens that calls used.")
        self._requests = meter.create_counter("microbatch.requests", "{request}", "Requests that have ended.")
        self._waited = histogram(
            "microbatch.request.wait", "s", "Time from submit until the call that answered was sent.", _SECOND_BUCKETS
        )
        self._latency = histogram("microbatch.request.duration", "s", "Time from submit to the end.", _SECOND_BUCKETS)
        self.flushes = meter.create_counter("microbatch.flushes", "{flush}", "Batches and single requests that left.")

    def count_call(self, event: Called, common: Attributes, failure: Attributes) -> None:
        """Count a call that has ended."""
        usage = event.usage if event.usage is not None else Usage()
        # Endpoints do not tell text from other tokens, and guesses would not add up.
        unknown = common | {TOKEN_MODALITY: "unknown"}
        self._input.add(usage.prompt_tokens, unknown)
        self._output.add(usage.completion_tokens, unknown)
        self._cache_read.add(usage.cached_tokens, unknown)
        if event.usage is not None:
            self._inputs.record(usage.prompt_tokens, common)
            self._outputs.record(usage.completion_tokens, common)
        self._duration.record(event.duration, common | failure)
        if event.streamed and event.first_text is not None:
            self._first_chunk.record(event.first_text, common)
        route: Attributes = {ROUTE: event.route}
        self._batch_size.record(event.size, route)
        self._attempts.add(event.attempts, route)
        if event.cost_usd is not None:
            self._cost.add(event.cost_usd, route)

    def count_request(self, event: Settled, attributes: Attributes) -> None:
        """Count a request that has ended."""
        self._requests.add(1, attributes)
        self._latency.record(event.latency, attributes)
        if event.route is not None:
            self._waited.record(event.waited, attributes)


def _of_span(event: Called) -> Attributes:
    """Return what only a span tells of a call: what is different for each, or asked for by few."""
    usage = event.usage
    return _known(
        {
            REQUEST_MAX_TOKENS: event.max_tokens,
            REQUEST_TEMPERATURE: event.temperature,
            REQUEST_STREAM: event.streamed or None,
            RESPONSE_ID: event.request_id,
            RESPONSE_FINISH_REASONS: None if event.finish_reason is None else [event.finish_reason],
            RESPONSE_FIRST_CHUNK: event.first_text if event.streamed else None,
            USAGE_INPUT: None if usage is None else usage.prompt_tokens,
            USAGE_OUTPUT: None if usage is None else usage.completion_tokens,
            USAGE_CACHE_READ: None if usage is None else usage.cached_tokens,
            BATCH_SIZE: event.size,
            ROUTE: event.route,
            ATTEMPTS: event.attempts,
            COST: event.cost_usd,
        }
    )


def _kind(error: Exception | None) -> str | None:
    """Return the name of the kind of *error*, of which there are few; those of ours are in `microbatch.errors`."""
    return None if error is None else type(error).__name__


def _known(values: dict[str, Any]) -> Attributes:
    """Return *values* without what is None."""
    return {name: value for name, value in values.items() if value is not None}
