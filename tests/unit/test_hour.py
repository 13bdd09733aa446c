"""The last hour: exact counts, percentiles within 6 %, a memory that no traffic enlarges, and nothing older than an hour."""

import random

import msgspec
import pytest

import microbatch as mb
from microbatch.accounting.labels import CallerLabels
from microbatch.gateway.hour import GROUP_SLICE, HOUR, SLICE, Hour, Latencies
from microbatch.gateway.served import Served

REQUESTS, ERRORS, CALLS, SAVED, SPENT, SPARED, UNPRICED, P50, P99 = range(1, 10)


class Clock:
    def __init__(self):
        self.now = 5_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def hour(clock):
    return Hour(CallerLabels(), clock)


def request(seconds=1.0, status=200, reason=None, **fields):
    given = {"method": "POST", "path": "/v1/x", "model": "m", "tenant": "t", **fields}
    return Served(id="x", id_given=False, began=0.0, status=status, reason=reason, seconds=seconds, **given)


def call(attempts=1, model="m", tenant="t", cost_usd=None, unbatched=None, usage=None, error=None, route="batch"):
    fixed = {"size": 1, "duration": 1.0, "first_text": None, "streamed": False, "max_tokens": None, "temperature": None}
    return mb.Called(
        **fixed,
        route=route,
        model=f"{model}-dated",
        requested_model=model,
        attempts=attempts,
        usage=usage,
        cost_usd=cost_usd,
        finish_reason="stop",
        request_id=None,
        error=error,
        origins=(),
        tenant=tenant,
        unbatched_cost_usd=unbatched,
    )


def test_before_anything_has_happened_it_is_empty(hour):
    figures = hour.snapshot()
    assert (figures["age"], figures["seconds"]) == (0.0, SLICE)
    assert figures["slices"] == [(0.0, 0, 0, 0, 0, None, None, 0, None, None)]
    assert figures["models"] == figures["callers"] == []


def test_requests_and_calls_are_in_the_slice_in_which_they_end(hour, clock):
    for _ in range(3):
        hour.add(request())
    hour.on_call(call(attempts=1, cost_usd=0.25, unbatched=1.0))
    clock.now += 3 * SLICE + 1
    hour.add(request(status=500, reason="ServerError"))
    hour.on_call(call(attempts=4, error=mb.ServerError("x")))
    first, second = hour.snapshot()["slices"]
    assert first[:8] == (0.0, 3, 0, 1, 2, 0.25, 0.75, 0)
    assert second[:8] == (3 * SLICE, 1, 1, 4, -4, None, None, 0)
    assert second[P50:] == (None, None)


def test_relayed_requests_are_calls_and_save_none(hour):
    hour.add(request(forwarded=True))
    hour.add(request(forwarded=True, status=429, reason="upstream"))
    (only,) = hour.snapshot()["slices"]
    assert (only[REQUESTS], only[ERRORS], only[CALLS], only[SAVED]) == (2, 1, 2, 0)


def test_clients_that_left_are_no_errors_and_pages_are_no_requests(hour):
    hour.add(request(status=499, reason="disconnected"))
    hour.add(request(page=True, model=None, tenant=None))
    hour.add(request(page=True, status=401, reason="wrong_access_token", model=None, tenant=None))
    (only,) = hour.snapshot()["slices"]
    assert (only[REQUESTS], only[ERRORS]) == (2, 1)


def test_what_is_older_than_an_hour_is_gone(hour, clock):
    hour.add(request(model="old"))
    hour.add(request(model="m"))
    clock.now += HOUR - SLICE
    hour.add(request(model="m"))
    assert [row[REQUESTS] for row in hour.snapshot()["slices"]] == [2, 1]
    clock.now += SLICE
    assert [row[REQUESTS] for row in hour.snapshot()["slices"]] == [1, 0]
    figures = hour.snapshot()
    assert [(row[0], row[REQUESTS]) for row in figures["models"]] == [("m", 1)]
    clock.now += HOUR
    figures = hour.snapshot()
    assert sum(row[REQUESTS] for row in figures["slices"]) == 0
    assert figures["models"] == figures["callers"] == []


def test_models_and_callers_are_totals_those_with_most_requests_first(hour, clock):
    for number in range(12):
        clock.now += GROUP_SLICE / 3
        hour.add(request(model="a" if number % 3 else "b", tenant="t" if number % 4 else None, seconds=2.0))
        hour.on_call(call(model="b", tenant=None, cost_usd=0.5, unbatched=0.75))
    figures = hour.snapshot()
    assert [row[:UNPRICED] for row in figures["models"]] == [
        ("a", 8, 0, 0, 8, None, None),
        ("b", 4, 0, 12, -8, 6.0, 3.0),
    ]
    assert [row[: CALLS + 1] for row in figures["callers"]] == [("t", 9, 0, 0), ("none", 3, 0, 12)]
    assert figures["models"][0][P50] == pytest.approx(2.0, rel=0.07)


def test_dollars_are_those_of_calls_with_a_price_and_the_others_are_counted(hour):
    hour.on_call(call(usage=mb.Usage(1, 1), cost_usd=0.5, unbatched=2.0))
    hour.on_call(call(usage=mb.Usage(1, 1)))
    hour.on_call(call(usage=None))
    hour.on_call(call(usage=mb.Usage(1, 1), cost_usd=0.25, route="audit"))  # replaces nothing
    (only,) = hour.snapshot()["slices"]
    assert (only[SPENT], only[SPARED], only[UNPRICED]) == (0.75, 1.25, 1)


def settled(**fields):
    fixed = {"error": None, "priority": "normal", "waited": 0.0, "latency": 1.0, "batch_size": 1, "usage": mb.Usage()}
    return mb.Settled(**fixed, model="m", cost_usd=0.0, origin=None, tenant="t", requested_model="m", **fields)


def test_answers_from_the_cache_save_what_they_once_cost(hour):
    hour.on_settle(settled(route="cache", unbatched_cost_usd=0.5))
    hour.on_settle(settled(route="batch"))
    (only,) = hour.snapshot()["slices"]
    assert (only[REQUESTS], only[SPENT], only[SPARED]) == (0, None, 0.5)


@pytest.mark.parametrize("seed", range(3))
def test_percentiles_are_within_six_percent(seed):
    rng = random.Random(seed)
    times = [min(900.0, max(0.001, rng.lognormvariate(0, 2))) for _ in range(2_000)]
    latencies = Latencies()
    for seconds in times:
        latencies.add(seconds)
    times.sort()
    for share, rank in ((0.5, 999), (0.99, 1_979), (1.0, 1_999)):
        assert latencies.percentile(share) == pytest.approx(times[rank], rel=0.061)


@pytest.mark.parametrize(("seconds", "shown"), [(0.0, 0.001), (-1.0, 0.001), (1e9, 1_000.0), (1.0, 1.0)])
def test_any_time_has_its_place(seconds, shown):
    latencies = Latencies()
    latencies.add(seconds)
    assert latencies.percentile(0.5) == latencies.percentile(0.99) == pytest.approx(shown, rel=0.061)


def test_no_traffic_enlarges_it_beyond_its_bounds(hour, clock):
    for number in range(20_000):
        clock.now += 1.0
        hour.add(request(model=f"m{number % 500}", tenant=f"t{number % 700}"))
        hour.on_call(call(model=f"m{number % 500}", tenant=f"t{number % 700}"))
    assert len(hour._rows) == HOUR / SLICE
    for groups in (hour._models, hour._callers):
        assert len(groups.slices) == HOUR / GROUP_SLICE
        assert all(len(figures) <= 65 for _, figures in groups.slices)
    figures = hour.snapshot()
    assert len(figures["models"]) == len(figures["callers"]) == 65
    assert len(msgspec.json.encode(figures)) < 100_000
