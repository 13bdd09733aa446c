"""Recent figures: exact while they are few, bounded when they are many, and gone when they are old."""

import asyncio
from types import SimpleNamespace

import msgspec
import pytest
from helpers import ask

import microbatch as mb
from microbatch.accounting.live import MOST_KEPT, WINDOW, LiveFigures
from microbatch.testing import ScriptedTransport


class Clock:
    def __init__(self):
        self.now = 1_000.0

    def __call__(self):
        return self.now


def settled(latency=1.0, route="batch", error=None):
    return mb.Settled(
        route=route,
        error=error,
        model="m",
        priority="normal",
        waited=0.0,
        latency=latency,
        batch_size=1,
        usage=mb.Usage(),
        cost_usd=None,
        origin=None,
    )


def called(size=1, duration=1.0):
    return mb.Called(
        route="batch",
        size=size,
        model="m",
        requested_model="m",
        duration=duration,
        first_text=None,
        attempts=1,
        streamed=False,
        max_tokens=None,
        temperature=None,
        usage=None,
        cost_usd=None,
        finish_reason="stop",
        request_id=None,
        error=None,
        origins=(),
    )


def test_before_anything_has_happened_there_are_no_percentiles():
    live = SimpleNamespace(**LiveFigures(Clock()).snapshot())
    assert (live.window, live.requests_per_second) == (0.0, 0.0)
    assert (live.latency_p50, live.latency_p99, live.call_p50, live.call_p99) == (None, None, None, None)
    assert sum(calls for _, calls in live.batch_sizes) == 0


def test_percentiles_are_those_of_the_nearest_rank():
    clock = Clock()
    figures = LiveFigures(clock)
    for milliseconds in reversed(range(1, 201)):
        figures.on_settle(settled(milliseconds / 1_000))
        figures.on_call(called(duration=milliseconds / 100))
    clock.now += 10.0
    live = SimpleNamespace(**figures.snapshot())
    assert (live.latency_p50, live.latency_p99) == (0.1, 0.198)
    assert (live.call_p50, live.call_p99) == (1.0, 1.98)
    assert (live.window, live.requests_per_second) == (10.0, 20.0)


def test_the_median_of_three_is_the_one_in_the_middle():
    figures = LiveFigures(Clock())
    for seconds in (3.0, 1.0, 2.0):
        figures.on_settle(settled(seconds))
    assert (figures.snapshot()["latency_p50"], figures.snapshot()["latency_p99"]) == (2.0, 3.0)


def test_one_request_is_its_own_percentile():
    figures = LiveFigures(Clock())
    figures.on_settle(settled(0.25))
    assert (figures.snapshot()["latency_p50"], figures.snapshot()["latency_p99"]) == (0.25, 0.25)


def test_what_is_older_than_the_window_no_longer_counts():
    clock = Clock()
    figures = LiveFigures(clock)
    figures.on_settle(settled(9.0))
    figures.on_call(called(duration=9.0))
    clock.now += WINDOW + 1
    figures.on_settle(settled(1.0))
    live = SimpleNamespace(**figures.snapshot())
    assert (live.latency_p99, live.call_p99, live.window) == (1.0, None, WINDOW)
    assert live.requests_per_second == pytest.approx(1 / WINDOW)
    assert live.routes == {"batch": 2}  # from the start


def test_only_so_much_is_kept_and_the_rate_stays_right():
    clock = Clock()
    figures = LiveFigures(clock)
    for number in range(3 * MOST_KEPT):
        clock.now += 0.001
        figures.on_settle(settled(float(number)))
        figures.on_call(called())
    live = SimpleNamespace(**figures.snapshot())
    assert live.requests_per_second == pytest.approx(1_000, rel=0.01)
    assert live.latency_p50 >= 2 * MOST_KEPT
    assert len(figures._latencies) == len(figures._calls) == MOST_KEPT


@pytest.mark.parametrize(
    ("size", "counted"), [(1, 1), (2, 2), (16, 16), (17, 32), (32, 32), (33, 64), (1_024, 1_024), (5_000, 1_024)]
)
def test_calls_are_counted_by_size(size, counted):
    figures = LiveFigures(Clock())
    figures.on_call(called(size))
    assert [pair for pair in figures.snapshot()["batch_sizes"] if pair[1]] == [(counted, 1)]


def test_failures_are_counted_by_kind_and_those_who_left_not_at_all():
    figures = LiveFigures(Clock())
    figures.on_settle(settled(route=None, error=mb.RateLimited("secret words")))
    figures.on_settle(settled(route=None))
    live = SimpleNamespace(**figures.snapshot())
    assert (live.errors, live.routes, live.latency_p50) == ({"RateLimited": 1}, {}, None)


async def test_a_batcher_tells_it_all():
    figures = LiveFigures(asyncio.get_running_loop().time)
    policy = mb.FlushPolicy(idle="wait", max_wait=0.5)
    transport = ScriptedTransport(delay=1.0)
    async with mb.Microbatcher(transport, hooks=[figures], tokens="bytes", policy=policy) as batcher:
        await asyncio.gather(*(batcher.submit(ask(text)) for text in "abc"))
    live = SimpleNamespace(**figures.snapshot())
    assert (live.latency_p50, live.call_p50, live.routes) == (1.5, 1.0, {"batch": 3})
    assert (3, 1) in live.batch_sizes


def test_audits_are_no_part_of_the_figures_of_calls():
    figures = LiveFigures(Clock())
    figures.on_call(called(size=4, duration=2.0))
    for _ in range(9):
        figures.on_call(msgspec.structs.replace(called(duration=0.1), route="audit"))
    live = SimpleNamespace(**figures.snapshot())
    assert (live.call_p50, sum(calls for _, calls in live.batch_sizes)) == (2.0, 1)
