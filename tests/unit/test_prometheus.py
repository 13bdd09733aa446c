"""What Prometheus scrapes, read back with its own parser."""

import asyncio
import builtins
import sys

import prometheus_client
import pytest
from helpers import ask, batcher_for
from prometheus_client.parser import text_string_to_metric_families
from two_minds import TwoMinds, ask_pairs, audited_batcher

import microbatch as mb
from microbatch.accounting.audits import AuditedSize
from microbatch.testing import ScriptedTransport

WORDS = "words of a customer"

PRICES = {"m": mb.Price(input=2.0, output=8.0)}


def scraped(text):
    """The samples of an exposition: (name, labels) -> value."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def value(hooks, name, **labels):
    return scraped(hooks.render()).get((f"microbatch_{name}", *sorted(labels.items())))


async def ask_all(batcher, texts, **options):
    return await asyncio.gather(*(batcher.submit(ask(text), **options) for text in texts), return_exceptions=True)


async def test_batches_their_requests_and_their_tokens_are_counted():
    hooks = mb.PrometheusHooks()
    answer = mb.Completion("stop", usage=mb.Usage(70, 5, cached_tokens=64), model="m")
    transport = ScriptedTransport(lambda call: (call.reply((name, "A") for name, _ in call.items), answer), delay=1.0)
    async with batcher_for(transport, hooks=[hooks], prices=PRICES, idle="wait", max_wait=0.5) as batcher:
        await ask_all(batcher, "abc", model="m")
    assert value(hooks, "requests_total", route="batch", outcome="answered") == 3
    assert value(hooks, "calls_total", route="batch", outcome="answered") == 1
    assert value(hooks, "attempts_total", route="batch") == 1
    assert value(hooks, "flushes_total", reason="timeout") == 1
    assert value(hooks, "tokens_total", kind="prompt") == 70
    assert value(hooks, "tokens_total", kind="completion") == 5
    assert value(hooks, "cached_tokens_total") == 64
    assert value(hooks, "unreported_calls_total") == 0
    assert value(hooks, "cost_usd_total") == pytest.approx(batcher.stats().cost_usd)
    assert value(hooks, "batch_size_bucket", route="batch", le="2.0") == 0
    assert value(hooks, "batch_size_bucket", route="batch", le="4.0") == 1
    assert value(hooks, "batch_size_sum", route="batch") == 3
    assert value(hooks, "wait_seconds_sum", priority="normal") == pytest.approx(1.5)
    assert value(hooks, "latency_seconds_sum", priority="normal") == pytest.approx(4.5)
    assert value(hooks, "latency_seconds_count", priority="normal") == 3
    assert value(hooks, "call_seconds_sum", route="batch") == 1.0
    assert value(hooks, "first_text_seconds_count", route="batch") == 1


async def test_failures_are_counted_by_kind_and_cancels_as_such():
    hooks = mb.PrometheusHooks()
    down = [mb.ServerError(f"down: {WORDS}", status=503, retry_after=0.0) for _ in range(4)]
    async with batcher_for(ScriptedTransport(*down, delay=1.0), hooks=[hooks], prices=PRICES) as batcher:
        await ask_all(batcher, "a")
        task = asyncio.ensure_future(batcher.submit(ask("b")))
        await asyncio.sleep(0.5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert value(hooks, "requests_total", route="none", outcome="ServerError") == 1
    assert value(hooks, "requests_total", route="none", outcome="cancelled") == 1
    assert value(hooks, "calls_total", route="single", outcome="ServerError") == 1
    assert value(hooks, "calls_total", route="single", outcome="stopped") == 1
    assert value(hooks, "attempts_total", route="single") == 5
    assert value(hooks, "unreported_calls_total") == 2
    assert value(hooks, "latency_seconds_count", priority="normal") is None
    assert WORDS not in hooks.render().decode()


async def test_what_callers_make_up_is_no_label():
    hooks = mb.PrometheusHooks()
    async with batcher_for(ScriptedTransport(), hooks=[hooks], prices=PRICES, idle="wait") as batcher:
        hooks.watch(batcher)
        series = set()
        for model in ("one", "two", "three"):
            await ask_all(batcher, "ab", model=f"made up {model}", tenant=f"tenant {model}")
            series.add(frozenset(scraped(hooks.render())))
    assert len(series) == 1
    assert "made up" not in hooks.render().decode()


async def test_by_caller_requests_calls_tokens_and_dollars_have_a_model_and_a_tenant():
    hooks = mb.PrometheusHooks(by_caller=True)
    answer = mb.Completion("stop", usage=mb.Usage(70, 5, cached_tokens=64), model="m-2026-01-01")
    step = [lambda call: (call.reply((name, "A") for name, _ in call.items), answer)]
    transport = ScriptedTransport(*step * 2, delay=1.0)
    prices = {"m-2026-01-01": mb.Price(input=2.0, output=8.0)}
    async with batcher_for(transport, hooks=[hooks], prices=prices, idle="wait", max_wait=0.5) as batcher:
        await ask_all(batcher, "abc", model="m", tenant="t")
        await ask_all(batcher, "de", model="m", tenant="u")
    for tenant, size in (("t", 3), ("u", 2)):
        caller = {"model": "m", "tenant": tenant}
        assert value(hooks, "caller_requests_total", **caller, outcome="answered") == size
        assert value(hooks, "caller_calls_total", **caller, route="batch") == 1
        assert value(hooks, "caller_tokens_total", **caller, kind="prompt") == 70
        assert value(hooks, "caller_tokens_total", **caller, kind="completion") == 5
        assert value(hooks, "caller_cost_usd_total", **caller) == pytest.approx(batcher.stats().cost_usd / 2)
    assert value(hooks, "model_latency_seconds_count", model="m") == 5
    assert value(hooks, "model_latency_seconds_sum", model="m") == pytest.approx(7.5)
    assert value(hooks, "unpriced_calls_total") == 0


async def test_what_has_no_price_has_no_dollars_and_is_counted():
    hooks = mb.PrometheusHooks(by_caller=True)
    async with batcher_for(ScriptedTransport(), hooks=[hooks], prices=PRICES) as batcher:
        await ask_all(batcher, "ab", model="without a price")
        await ask_all(batcher, "c", model="m")
    assert value(hooks, "caller_cost_usd_total", model="without a price", tenant="none") is None
    assert value(hooks, "caller_cost_usd_total", model="m", tenant="none") > 0
    assert value(hooks, "unpriced_calls_total") == 1


async def test_made_up_models_and_tenants_are_few_labels_whatever_becomes_of_them():
    hooks = mb.PrometheusHooks(by_caller=True)
    transport = ScriptedTransport(*[mb.BadRequest("no") for _ in range(100)])
    async with batcher_for(transport, hooks=[hooks], prices=PRICES) as batcher:
        for number in range(100):
            await ask_all(batcher, "a", model=f"no such model {number}", tenant=f"refused {number}")
        few = len(scraped(hooks.render()))
        for number in range(400):
            await ask_all(batcher, "a", model=f"made up {number % 80}", tenant=f"tenant {number % 90}")
        text = hooks.render().decode()
    assert "no such model" not in text
    assert "refused 1" not in text
    assert len(scraped(text.encode())) < few + 256 * 8 + 64 * 20
    assert (
        value(hooks, "caller_requests_total", model="other models", tenant="other tenants", outcome="BadRequest") == 100
    )
    answered = sum(
        number
        for (name, *labels), number in scraped(text.encode()).items()
        if name == "microbatch_caller_requests_total" and ("outcome", "answered") in labels
    )
    assert answered == 400


async def test_what_a_watched_batcher_keeps_itself_is_read_at_each_scrape():
    hooks = mb.PrometheusHooks()
    async with batcher_for(
        ScriptedTransport(delay=1.0), hooks=[hooks], prices=PRICES, cache=mb.MemoryCache()
    ) as batcher:
        assert value(hooks, "queued") is None
        hooks.watch(batcher)
        assert value(hooks, "queued") == 0
        tasks = [asyncio.ensure_future(batcher.submit(ask(text))) for text in "abc"]
        await asyncio.sleep(0.5)
        assert value(hooks, "queued") == 3
        assert value(hooks, "in_flight") == 1
        await asyncio.gather(*tasks)
        assert value(hooks, "queued") == value(hooks, "in_flight") == 0
        await batcher.submit(ask("a"))
        assert value(hooks, "cache_hits_total") == 1
        assert value(hooks, "cache_misses_total") == 3
        assert value(hooks, "cache_stores_total") == 3
        assert value(hooks, "unbatched_calls_total") == batcher.stats().unbatched_calls
        assert value(hooks, "spool_depth") is None


async def test_several_batchers_are_shown_as_one():
    hooks = mb.PrometheusHooks()
    async with (
        batcher_for(ScriptedTransport(delay=1.0), hooks=[hooks], prices=PRICES) as one,
        batcher_for(ScriptedTransport(), hooks=[hooks], prices=PRICES) as two,
    ):
        hooks.watch(one)
        hooks.watch(two)
        task = asyncio.ensure_future(one.submit(ask("a")))
        await asyncio.gather(*(two.submit(ask(text)) for text in "bc"))
        assert value(hooks, "queued") == 1
        await task
    assert value(hooks, "requests_total", route="single", outcome="answered") == 1
    assert value(hooks, "requests_total", route="batch", outcome="answered") == 2


async def test_the_figures_of_a_spool_are_shown(tmp_path):
    class Spooled:
        stats = staticmethod(lambda: mb.Stats(spool_depth=7, spool_dead=1, spool_oldest=3.5))

    hooks = mb.PrometheusHooks()
    hooks.watch(Spooled)
    assert [value(hooks, name) for name in ("spool_depth", "spool_dead", "spool_oldest")] == [7, 1, 3.5]


async def test_a_scrape_that_cannot_read_shows_what_was_seen_last():
    class Elsewhere:
        def __init__(self):
            self.failing = False

        def stats(self):
            if self.failing:
                raise RuntimeError("no running event loop")
            return mb.Stats(queued=5)

    batcher = Elsewhere()
    hooks = mb.PrometheusHooks()
    hooks.watch(batcher)
    assert value(hooks, "queued") == 5
    batcher.failing = True
    assert value(hooks, "queued") == 5


def test_metrics_may_stand_beside_those_of_the_process():
    registry = prometheus_client.CollectorRegistry(auto_describe=True)
    prometheus_client.Gauge("theirs", "Something else.", registry=registry).set(3)
    hooks = mb.PrometheusHooks(registry=registry, namespace="shop_llm")
    samples = scraped(hooks.render())
    assert samples["theirs",] == 3
    assert samples["shop_llm_cost_usd_total",] == 0


def test_names_that_are_taken_are_a_mistake_in_the_settings():
    registry = prometheus_client.CollectorRegistry()
    mb.PrometheusHooks(registry=registry)
    with pytest.raises(mb.ConfigError, match="microbatch_"):
        mb.PrometheusHooks(registry=registry)
    mb.PrometheusHooks(registry=registry, namespace="other")
    mb.PrometheusHooks()


def test_all_names_and_units_are_as_prometheus_wants_them():
    hooks = mb.PrometheusHooks()
    hooks.watch(mb.Microbatcher(ScriptedTransport(), tokens="bytes"))
    families = list(text_string_to_metric_families(hooks.render().decode()))
    assert len(families) > 20
    for family in families:
        assert family.name.startswith("microbatch_")
        assert family.documentation.endswith(".")
        assert family.type != "unknown"
    assert hooks.content_type.startswith("text/plain")


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch):
    real_import = builtins.__import__

    def without(name, *arguments):
        if name.startswith("prometheus_client"):
            raise ImportError(name)
        return real_import(name, *arguments)

    monkeypatch.delitem(sys.modules, "prometheus_client")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(mb.ConfigError, match=r"pip install 'microbatch\[prometheus\]'"):
        mb.PrometheusHooks()


async def test_what_keeps_requests_alone_is_counted_by_field():
    hooks = mb.PrometheusHooks()
    async with batcher_for(ScriptedTransport()) as batcher:
        hooks.watch(batcher)
        await ask_all(batcher, "ab", params={"seed": 7, "stop": "x"})
        await ask_all(batcher, "c", params={"stop": "x"})
        assert value(hooks, "alone_total", field="seed") == 2
        assert value(hooks, "alone_total", field="stop") == 3


# --- audits

OUTCOMES = {"sound": "same", "worse": "different", "noisy": "noise", "long": "not_comparable"}


async def test_audits_are_counted_by_model_size_and_outcome_and_apart_from_requests():
    hooks = mb.PrometheusHooks()
    async with audited_batcher(TwoMinds(delay=1.0), hooks=[hooks], prices=PRICES) as batcher:
        hooks.watch(batcher)
        for times, word in enumerate(OUTCOMES, 1):
            await ask_pairs(batcher, word, times, model="m")
        for times, outcome in enumerate(OUTCOMES.values(), 1):
            assert value(hooks, "audits_total", model="m", size="2", outcome=outcome) == times
        audits = value(hooks, "calls_total", route="audit", outcome="answered")
        assert audits == 1 + 2 * 2 + 2 * 3  # the long ones are not asked again
        assert value(hooks, "call_seconds_count", route="audit") == audits
        assert (
            value(hooks, "batch_size_sum", route="batch") == 2 * value(hooks, "batch_size_count", route="batch") == 20
        )
        # Of requests, their time and their flushes audits are no part.
        assert value(hooks, "requests_total", route="audit", outcome="answered") is None
        assert value(hooks, "requests_total", route="batch", outcome="answered") == 20
        assert value(hooks, "latency_seconds_count", priority="normal") == 20
        assert value(hooks, "latency_seconds_sum", priority="normal") == pytest.approx(20.0)
        assert value(hooks, "flushes_total", reason="size") == 10


async def test_the_figures_of_an_audited_size_are_those_of_stats():
    hooks = mb.PrometheusHooks()
    async with audited_batcher(TwoMinds(), hooks=[hooks]) as batcher:
        hooks.watch(batcher)
        await ask_pairs(batcher, "worse", 10, model="m")
        await ask_pairs(batcher, "sound", 60, model="n")
        found = {row.model: row for row in batcher.stats().audit}
        assert (found["m"].condemned, found["n"].certified) == (True, True)
        for model, row in found.items():
            labels = {"model": model, "size": "2"}
            assert value(hooks, "audit_excess", **labels) == row.excess
            assert value(hooks, "audit_excess_upper", **labels) == row.upper
            assert value(hooks, "audit_condemned", **labels) == row.condemned
            assert value(hooks, "audit_certified", **labels) == row.certified


def row(kind, **fields):
    given = {"model": "m", "size": 4, "asked": 1, "not_comparable": 0, "raw": 0.0, "noise": 0.0, "certified": False}
    return AuditedSize(kind=kind, **{**given, "compared": 1, "excess": 0.0, "upper": 1.0, "condemned": False, **fields})


def test_many_kinds_of_one_model_and_size_are_one_row():
    class Watched:
        stats = staticmethod(
            lambda: mb.Stats(
                audit=(
                    row("a", compared=50, excess=0.25, upper=0.4, condemned=True),
                    row("b", condemned=True),
                    row("c", certified=True),
                    *(row(f"{number}", size=8) for number in range(300)),
                )
            )
        )

    hooks = mb.PrometheusHooks()
    hooks.watch(Watched)
    figures = {name: number for name, number in scraped(hooks.render()).items() if "_audit_" in name[0]}
    assert len(figures) == 8
    assert value(hooks, "audit_excess", model="m", size="4") == 0.25
    assert value(hooks, "audit_excess_upper", model="m", size="4") == 0.4
    assert value(hooks, "audit_condemned", model="m", size="4") == 2
    assert value(hooks, "audit_certified", model="m", size="4") == 1


async def test_audited_models_are_at_most_64_labels():
    hooks = mb.PrometheusHooks()
    async with audited_batcher(TwoMinds(), hooks=[hooks]) as batcher:
        hooks.watch(batcher)
        for number in range(80):
            await ask_pairs(batcher, "sound", 1, model=f"made up {number}")
        await ask_pairs(batcher, "sound", 1)
        models = {dict(labels)["model"] for name, *labels in scraped(hooks.render()) if "audit" in name}
        assert len(models) == 65
        assert value(hooks, "audits_total", model="other models", size="2", outcome="same") == 17
        assert value(hooks, "audit_condemned", model="other models", size="2") == 0
