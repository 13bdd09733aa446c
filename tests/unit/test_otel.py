"""Spans and metrics as the SDK exports them: a call is one span, linked to its callers' and nobody's child."""

import asyncio
import builtins
import sys
import time

import pytest
from helpers import ask
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Decision, Sampler, SamplingResult
from opentelemetry.trace import SpanKind, StatusCode
from two_minds import TwoMinds, ask_pairs, audited_batcher
from vectors import VectorTransport

import microbatch as mb
from microbatch.testing import ScriptedTransport

SECRET = "sk-canary-key-0123456789"
WORDS = "words of a customer"
BATCH = {"idle": "wait", "max_wait": 0.5}


class Telescope:
    """An SDK that keeps all it is given, and hooks that tell it."""

    def __init__(self, sampler=ALWAYS_ON, **options):
        self._exporter = InMemorySpanExporter()
        self.tracer_provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._reader = InMemoryMetricReader()
        self._meter_provider = MeterProvider([self._reader], shutdown_on_exit=False)
        self.tracer = self.tracer_provider.get_tracer("callers")
        self.hooks = mb.OpenTelemetryHooks(
            tracer_provider=self.tracer_provider, meter_provider=self._meter_provider, **options
        )

    def batcher(self, transport, *, cache=None, **policy):
        return mb.Microbatcher(
            transport,
            hooks=[self.hooks],
            cache=cache,
            tokens="bytes",
            prices={"m": mb.Price(input=2.0, output=8.0)},
            policy=mb.FlushPolicy(**policy),
        )

    async def ask_in_a_span(self, batcher, text, **options):
        """Ask within a span of its own; return the span."""
        with self.tracer.start_as_current_span(f"caller {text}", record_exception=False) as span:
            await asyncio.gather(batcher.submit(ask(text), **options), return_exceptions=True)
        return span

    async def ask_all(self, batcher, texts, **options):
        return await asyncio.gather(*(self.ask_in_a_span(batcher, text, **options) for text in texts))

    def spans(self, kind=SpanKind.CLIENT):
        return [
            span
            for span in self._exporter.get_finished_spans()
            if span.kind is kind and not span.name.startswith("caller ")
        ]

    def points(self, name):
        """The points of a metric, as pairs of attributes and value; histograms as their sum, count and bounds."""
        data = self._reader.get_metrics_data()
        found = []
        for metric in [m for r in data.resource_metrics for scope in r.scope_metrics for m in scope.metrics]:
            if metric.name == name:
                for point in metric.data.data_points:
                    value = (
                        point.value
                        if hasattr(point, "value")
                        else (point.sum, point.count, tuple(point.explicit_bounds))
                    )
                    found.append((dict(point.attributes), value))
        return found

    def everything(self):
        """All that has been exported, as text."""
        spans = "".join(span.to_json() for span in self._exporter.get_finished_spans())
        return spans + self._reader.get_metrics_data().to_json()


async def test_a_batch_is_one_span_linked_to_the_span_of_each_caller_and_child_of_none():
    telescope = Telescope()
    async with telescope.batcher(ScriptedTransport(delay=1.0), **BATCH) as batcher:
        callers = await telescope.ask_all(batcher, "abc", model="m")
    (span,) = telescope.spans()
    assert span.parent is None
    assert span.context.trace_id not in {caller.context.trace_id for caller in callers}
    assert {link.context.span_id for link in span.links} == {caller.context.span_id for caller in callers}
    assert {link.context.trace_id for link in span.links} == {caller.context.trace_id for caller in callers}
    assert len(telescope._exporter.get_finished_spans()) == 4


async def test_who_opened_the_batcher_or_asked_first_is_no_parent_either():
    telescope = Telescope()
    with telescope.tracer.start_as_current_span("caller main") as main:
        async with telescope.batcher(ScriptedTransport()) as batcher:
            await batcher.submit(ask("a"))
            await asyncio.gather(batcher.submit(ask("b")), batcher.submit(ask("c"), priority="high"))
    spans = telescope.spans()
    assert len(spans) == 3
    for span in spans:
        assert span.parent is None
        assert [link.context.span_id for link in span.links] == [main.context.span_id]


def test_a_span_that_happens_to_be_current_is_no_parent():
    telescope = Telescope()
    event = mb.Called(
        route="single",
        size=1,
        model=None,
        requested_model=None,
        duration=1.0,
        first_text=None,
        attempts=1,
        streamed=False,
        max_tokens=None,
        temperature=None,
        usage=None,
        cost_usd=None,
        finish_reason=None,
        request_id=None,
        error=None,
        origins=(None,),
    )
    with telescope.tracer.start_as_current_span("caller"):
        telescope.hooks.on_call(event)
    (span,) = telescope.spans()
    assert (span.name, span.parent, span.links) == ("chat", None, ())
    assert not {"gen_ai.request.model", "gen_ai.response.model"} & span.attributes.keys()


async def test_a_caller_with_many_requests_in_a_batch_is_linked_once():
    telescope = Telescope()
    async with telescope.batcher(ScriptedTransport(), **BATCH) as batcher:
        with telescope.tracer.start_as_current_span("caller") as caller:
            async for result in batcher.map([ask(text) for text in "abcdefgh"]):
                assert result.reply.batch_size == 8
    (span,) = telescope.spans()
    assert [link.context.span_id for link in span.links] == [caller.context.span_id]
    assert span.attributes["microbatch.batch.size"] == 8


async def test_callers_without_a_span_are_not_linked():
    telescope = Telescope()
    async with telescope.batcher(ScriptedTransport(), **BATCH) as batcher:
        _, caller = await asyncio.gather(batcher.submit(ask("nobody")), telescope.ask_in_a_span(batcher, "b"))
    (span,) = telescope.spans()
    assert [link.context.span_id for link in span.links] == [caller.context.span_id]


async def test_a_span_has_the_names_of_the_conventions():
    telescope = Telescope(provider_name="deepseek", server_address="api.example.com", server_port=8443)
    answer = mb.Completion("stop", usage=mb.Usage(70, 5, cached_tokens=64), model="m-2026-10-01", request_id="req_1")
    transport = ScriptedTransport(lambda call: (call.reply((name, "A") for name, _ in call.items), answer), delay=1.0)
    before = time.time_ns()
    async with telescope.batcher(transport, **BATCH) as batcher:
        await telescope.ask_all(batcher, "ab", model="m", temperature=0.5, max_tokens=9)
    (span,) = telescope.spans()
    assert span.name == "chat m"
    assert span.kind is SpanKind.CLIENT
    assert span.status.status_code is StatusCode.UNSET
    known = dict(span.attributes)
    assert known.pop("gen_ai.request.max_tokens") >= 18
    assert known == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "deepseek",
        "gen_ai.request.model": "m",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.stream": True,
        "gen_ai.response.model": "m-2026-10-01",
        "gen_ai.response.id": "req_1",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.time_to_first_chunk": 1.0,
        "gen_ai.usage.input_tokens": 70,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 64,
        "server.address": "api.example.com",
        "server.port": 8443,
        "microbatch.batch.size": 2,
        "microbatch.route": "batch",
        "microbatch.attempts": 1,
        "microbatch.cost_usd": pytest.approx(0.00018),
    }
    assert span.end_time - span.start_time == 1_000_000_000  # of the batcher's clock, which is virtual here
    assert before <= span.end_time <= time.time_ns()


async def test_a_failed_call_says_by_which_kind_of_error_and_nothing_of_its_words():
    telescope = Telescope()
    refusals = [mb.ServerError(f"down: {WORDS}", status=503, retry_after=0.0) for _ in range(4)]
    async with telescope.batcher(ScriptedTransport(*refusals)) as batcher:
        await telescope.ask_all(batcher, "a", model="m")
    (span,) = telescope.spans()
    assert (span.name, span.status.status_code, span.status.description) == ("chat m", StatusCode.ERROR, None)
    assert span.attributes["error.type"] == "ServerError"
    assert span.attributes["microbatch.attempts"] == 4
    assert "gen_ai.response.model" not in span.attributes
    assert not span.events
    ((attributes, (_, count, _)),) = telescope.points("gen_ai.client.inference.duration")
    assert (attributes["error.type"], count) == ("ServerError", 1)
    assert telescope.points("gen_ai.client.inference.operation.input_tokens") == []
    assert [value for _, value in telescope.points("gen_ai.client.inference.usage.input_tokens")] == [0]


async def test_each_call_that_asks_again_is_a_span_too():
    telescope = Telescope()
    transport = ScriptedTransport(lambda call: call.reply([(call.items[0][0], "A")]))
    async with telescope.batcher(transport, **BATCH) as batcher:
        callers = await telescope.ask_all(batcher, "abc")
    first, *others = telescope.spans()
    assert first.attributes["microbatch.route"] == "batch"
    assert len(first.links) == 3
    assert {span.attributes["microbatch.route"] for span in others} == {"fallback"}
    known = {caller.context.span_id for caller in callers}
    assert {link.context.span_id for span in others for link in span.links} < known


async def test_samplers_see_links_and_attributes():
    class Nosy(Sampler):
        """Keeps what is linked to somebody, and no more."""

        def __init__(self):
            self.seen = []

        def should_sample(
            self, parent_context, trace_id, name, kind=None, attributes=None, links=None, trace_state=None
        ):
            self.seen.append((name, len(links or ()), dict(attributes or {})))
            decision = Decision.RECORD_AND_SAMPLE if links else Decision.DROP
            return SamplingResult(decision, attributes)

        def get_description(self):
            return "nosy"

    sampler = Nosy()
    telescope = Telescope(sampler)
    async with telescope.batcher(ScriptedTransport(), **BATCH) as batcher:
        await telescope.ask_all(batcher, "ab", model="m")
    assert len(telescope.spans()) == 1
    (name, links, attributes) = sampler.seen[-1]
    assert (name, links, attributes["gen_ai.provider.name"]) == ("chat m", 2, "openai")


async def test_neither_keys_nor_words_of_callers_models_or_errors_are_exported():
    telescope = Telescope(submit_spans=True)
    error = mb.BadRequest(f"no: {WORDS} {SECRET}", status=400, code=WORDS, param=WORDS, body=f"{WORDS} {SECRET}")
    transport = ScriptedTransport(error, answer=lambda text: f"{WORDS} {text} {SECRET}")
    options = {"model": "m", "headers": {"Authorization": f"Bearer {SECRET}"}, "tenant": WORDS}
    async with telescope.batcher(transport, **BATCH) as batcher:
        await telescope.ask_all(batcher, [f"{WORDS} {SECRET} {number}" for number in range(3)], **options)
        await batcher.submit(ask(WORDS), priority="high", **options)
    callers = telescope._exporter.get_finished_spans()
    assert telescope.spans()
    assert telescope.spans(SpanKind.INTERNAL)
    exported = telescope.everything()
    for caller in callers:
        exported = exported.replace(caller.name, "") if caller.name.startswith("caller ") else exported
    assert WORDS not in exported
    assert SECRET not in exported
    assert "Shout" not in exported


async def test_calls_and_requests_are_measured():
    telescope = Telescope()
    answer = mb.Completion("stop", usage=mb.Usage(70, 5, cached_tokens=64), model="m")
    transport = ScriptedTransport(lambda call: (call.reply((name, "A") for name, _ in call.items), answer), delay=1.0)
    async with telescope.batcher(transport, cache=mb.MemoryCache(), **BATCH) as batcher:
        await telescope.ask_all(batcher, "ab", model="m")
        await batcher.submit(ask("a"), model="m")
    common = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "m",
        "gen_ai.response.model": "m",
    }
    unknown = {**common, "gen_ai.token.modality": "unknown"}
    usage, operation = "gen_ai.client.inference.usage", "gen_ai.client.inference.operation"
    assert telescope.points(f"{usage}.input_tokens") == [(unknown, 70)]
    assert telescope.points(f"{usage}.output_tokens") == [(unknown, 5)]
    assert telescope.points(f"{usage}.cache_read.input_tokens") == [(unknown, 64)]
    buckets = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)
    assert telescope.points(f"{operation}.input_tokens") == [(common, (70, 1, buckets))]
    assert telescope.points(f"{operation}.output_tokens") == [(common, (5, 1, buckets))]
    ((attributes, (seconds, count, bounds)),) = telescope.points("gen_ai.client.inference.duration")
    assert (attributes, seconds, count) == (common, 1.0, 1)
    assert bounds == pytest.approx(
        [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92]
    )
    ((attributes, (seconds, count, _)),) = telescope.points("gen_ai.client.inference.time_to_first_chunk")
    assert (attributes, seconds, count) == (common, 1.0, 1)
    ((attributes, (size, count, _)),) = telescope.points("microbatch.batch.size")
    assert (attributes, size, count) == ({"microbatch.route": "batch"}, 2, 1)
    assert telescope.points("microbatch.flushes") == [({"microbatch.flush.reason": "timeout"}, 1)]
    assert telescope.points("microbatch.call.attempts") == [({"microbatch.route": "batch"}, 1)]
    ((_, dollars),) = telescope.points("microbatch.cost")
    assert dollars == pytest.approx(batcher.stats().cost_usd)
    requests = {
        (attributes["microbatch.route"], attributes["microbatch.outcome"]): value
        for attributes, value in telescope.points("microbatch.requests")
    }
    assert requests == {("batch", "answered"): 2, ("cache", "answered"): 1}
    waits = {
        attributes["microbatch.route"]: value[:2] for attributes, value in telescope.points("microbatch.request.wait")
    }
    assert waits == {"batch": (1.0, 2), "cache": (0.0, 1)}


async def test_requests_that_fail_or_are_cancelled_are_measured():
    telescope = Telescope()
    transport = ScriptedTransport(mb.AuthFailed("no", status=401), delay=1.0)
    async with telescope.batcher(transport) as batcher:
        await telescope.ask_all(batcher, "a")
        task = asyncio.ensure_future(batcher.submit(ask("b"), headers={"Authorization": "Bearer other"}))
        await asyncio.sleep(0.5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    outcomes = {
        attributes["microbatch.outcome"]: attributes for attributes, _ in telescope.points("microbatch.requests")
    }
    assert outcomes.keys() == {"failed", "cancelled"}
    assert outcomes["failed"]["error.type"] == "AuthFailed"
    assert "error.type" not in outcomes["cancelled"]
    assert telescope.points("microbatch.request.wait") == []


async def test_requests_are_spans_of_their_callers_traces_if_asked_for():
    telescope = Telescope(submit_spans=True)
    async with telescope.batcher(ScriptedTransport(delay=1.0), **BATCH) as batcher:
        callers, _ = await asyncio.gather(
            telescope.ask_all(batcher, "ab", model="m"), batcher.submit(ask("no span"), model="m")
        )
    spans = telescope.spans(SpanKind.INTERNAL)
    assert {span.name for span in spans} == {"microbatch.submit"}
    assert {span.parent.span_id for span in spans} == {caller.context.span_id for caller in callers}
    assert {span.context.trace_id for span in spans} == {caller.context.trace_id for caller in callers}
    for span in spans:
        assert span.end_time - span.start_time == 1_500_000_000
        assert span.attributes["microbatch.route"] == "batch"
        assert span.attributes["microbatch.waited"] == 0.5
        assert span.attributes["microbatch.batch.size"] == 3
        assert span.status.status_code is StatusCode.UNSET
    (call,) = telescope.spans()
    assert call.parent is None


async def test_a_failed_request_is_a_span_that_says_so():
    telescope = Telescope(submit_spans=True)
    async with telescope.batcher(ScriptedTransport(mb.AuthFailed("no", status=401))) as batcher:
        await telescope.ask_all(batcher, "a")
    (span,) = telescope.spans(SpanKind.INTERNAL)
    assert (span.status.status_code, span.attributes["error.type"]) == (StatusCode.ERROR, "AuthFailed")


async def test_callers_that_are_not_sampled_get_no_spans_of_their_requests():
    telescope = Telescope(submit_spans=True)
    unsampled = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False).get_tracer("unsampled")
    async with telescope.batcher(ScriptedTransport()) as batcher:
        with unsampled.start_as_current_span("caller"):
            await batcher.submit(ask("a"))
    assert telescope.spans(SpanKind.INTERNAL) == []
    (span,) = telescope.spans()
    assert len(span.links) == 1


async def test_without_providers_the_global_ones_are_told():
    hooks = mb.OpenTelemetryHooks()
    async with mb.Microbatcher(ScriptedTransport(), hooks=[hooks], tokens="bytes") as batcher:
        assert (await batcher.submit(ask("a"))).output == "A"
    assert hooks.on_submit() is None
    assert trace.get_current_span() is trace.INVALID_SPAN


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch):
    real_import = builtins.__import__

    def without(name, *arguments):
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real_import(name, *arguments)

    for name in [name for name in sys.modules if name.split(".")[0] == "opentelemetry"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(mb.ConfigError, match=r"pip install 'microbatch\[otel\]'"):
        mb.OpenTelemetryHooks()


# --- audits


async def test_a_call_of_an_audit_is_a_span_linked_to_the_callers_of_the_item_and_kept_apart_in_metrics():
    telescope = Telescope()
    async with audited_batcher(TwoMinds(delay=1.0), hooks=[telescope.hooks], prices={"m": mb.Price(1, 1)}) as batcher:
        callers = await telescope.ask_all(batcher, ["worse a", "worse b"], model="m")
        await batcher.audits.settled()
    batch, *audits = telescope.spans()
    assert [span.attributes["microbatch.route"] for span in (batch, *audits)] == ["batch", "audit", "audit"]
    assert len(batch.links) == 2
    (of_the_item,) = {tuple(link.context.span_id for link in span.links) for span in audits}
    assert len(of_the_item) == 1
    assert set(of_the_item) < {caller.context.span_id for caller in callers}
    for name in ("duration", "operation.input_tokens", "operation.output_tokens"):
        counts = {
            attributes.get("microbatch.route"): count
            for attributes, (_, count, _) in telescope.points(f"gen_ai.client.inference.{name}")
        }
        assert counts == {None: 1, "audit": 2}
    requests = {attributes["microbatch.route"] for attributes, _ in telescope.points("microbatch.request.duration")}
    assert requests == {"batch"}


async def test_audits_their_scores_and_their_decisions_are_counted():
    telescope = Telescope()
    async with audited_batcher(TwoMinds(), hooks=[telescope.hooks]) as batcher:
        await ask_pairs(batcher, "worse", 8, model="m")
        await ask_pairs(batcher, "noisy", 2, model="m")
        await ask_pairs(batcher, "sound", 3, model="m")
        await ask_pairs(batcher, "long", 1, model="m")
        ((row,), common) = batcher.stats().audit, {"gen_ai.request.model": "m", "microbatch.batch.size": 2}
    outcomes = {"different": 8, "noise": 2, "same": 3, "not_comparable": 1}
    assert telescope.points("microbatch.audits") == [
        ({**common, "microbatch.audit.outcome": outcome}, count) for outcome, count in outcomes.items()
    ]
    ((attributes, score),) = telescope.points("microbatch.audit.score")
    assert (attributes, score / 13) == (common, row.excess)
    assert telescope.points("microbatch.audit.decisions") == [({**common, "microbatch.audit.decision": "condemned"}, 1)]


async def test_embeddings_are_an_operation_of_their_own():
    telescope = Telescope()
    async with telescope.batcher(VectorTransport()) as batcher:
        await asyncio.gather(batcher.embed("one"), batcher.embed("two"))
    (span,) = telescope.spans()
    assert span.name == "embeddings embedder"
    assert span.attributes["gen_ai.operation.name"] == "embeddings"
    assert span.attributes["gen_ai.usage.input_tokens"] == 6
    assert "gen_ai.request.stream" not in span.attributes
