"""The figures of several processes of a gateway add up to those of one that would have done it all."""

import random

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

import microbatch as mb
from microbatch.accounting.budget import BudgetFigures
from microbatch.accounting.families import added
from microbatch.accounting.labels import CallerLabels
from microbatch.accounting.live import MOST_KEPT, WINDOW, LiveFigures
from microbatch.gateway.hour import HOUR, Hour
from microbatch.gateway.report import Report, total
from microbatch.gateway.served import Served


class Clock:
    def __init__(self):
        self.now = 5_000.0

    def __call__(self):
        return self.now


def settled(seconds, error=None, **fields):
    given = {"model": "m", "requested_model": "m", "tenant": None, "priority": "normal", "waited": seconds / 2} | fields
    answer = {"batch_size": 2, "usage": mb.Usage(), "cost_usd": None, "origin": None, "unbatched_cost_usd": None}
    return mb.Settled(route=None if error else "batch", error=error, latency=seconds, **given, **answer)


class Process:
    """What one process counts."""

    def __init__(self, clock, began):
        self.live = LiveFigures(clock)
        self.hour = Hour(CallerLabels(), clock)
        self.hour.begin_at(began)
        self.metrics = mb.PrometheusHooks(by_caller=True)
        self.answered = 0

    def add(self, seconds, model, tenant, status):
        reason = None if status == 200 else "ServerError"
        given = {"method": "POST", "path": "/v1/x", "model": model, "tenant": tenant}
        self.hour.add(Served(id="x", id_given=False, began=0.0, status=status, reason=reason, seconds=seconds, **given))
        error = None if reason is None else mb.ServerError("x")
        event = settled(seconds, error, model=model, requested_model=model, tenant=tenant)
        for hooks in (self.live, self.metrics):
            hooks.on_settle(event)
        self.answered += reason is None

    def report(self):
        stats = mb.Stats(items=self.answered, answered=self.answered, queued=1, in_flight=1)
        return Report(stats, self.live.state(), self.hour.state(), self.metrics.export())


def counted(report, hooks):
    """All that is shown, but for the time at which counting began."""
    families = text_string_to_metric_families(hooks.render_of(report.families, report.stats).decode())
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
    return {name: pytest.approx(value) for name, value in samples.items()}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("steps", [1.0, 40.0])
def test_the_sum_of_several_is_what_one_would_have_counted(seed, steps):
    draw, clock = random.Random(seed), Clock()
    one = Process(clock, clock.now)
    several = [Process(clock, clock.now) for _ in range(3)]
    for pair in range(9):  # names become labels with their first answer, in each process
        for each in (one, one, one, *several):
            each.add(1.0, f"m{pair // 3}", f"t{pair % 3}", 200)
    for _ in range(300):
        clock.now += draw.random() * steps
        what = (draw.expovariate(1.0), f"m{draw.randrange(3)}", f"t{draw.randrange(3)}", draw.choice([200, 200, 500]))
        one.add(*what)
        draw.choice(several).add(*what)
    reports = [each.report() for each in several]
    sent = [msgspec.msgpack.decode(msgspec.msgpack.encode(each), type=Report) for each in reports]
    assert sent == reports
    whole, alone = total(reports), one.report()
    assert reports == sent  # they are unchanged
    assert whole.live.shown(clock.now) == alone.live.shown(clock.now)
    shown, expected = whole.hour.shown(clock.now), alone.hour.shown(clock.now)
    # An empty slice is there if anything has looked.
    nonempty = [[row for row in each.pop("slices") if any(row[1:4])] for each in (shown, expected)]
    assert nonempty[0] == nonempty[1]
    assert {name: sorted(map(str, rows)) for name, rows in shown.items() if name in ("models", "callers")} == {
        name: sorted(map(str, rows)) for name, rows in expected.items() if name in ("models", "callers")
    }
    assert whole.stats.answered == one.answered
    assert (whole.stats.queued, whole.stats.in_flight) == (3, 3)
    alone.stats = msgspec.structs.replace(alone.stats, queued=3, in_flight=3)
    assert counted(whole, one.metrics) == counted(alone, one.metrics)


def test_what_has_ended_waits_for_nothing_and_is_counted_on():
    process = Process(Clock(), 5_000.0)
    process.add(1.0, "m", "t", 200)
    ended = process.report().ended()
    assert (ended.stats.queued, ended.stats.in_flight, ended.stats.answered) == (0, 0, 1)


def test_many_processes_that_have_ended_take_no_more_room_than_a_few():
    clock, past = Clock(), None
    for _ in range(40):
        process = Process(clock, 5_000.0)
        for _ in range(50):
            clock.now += 2.0
            process.add(1.0, "m", "t", 200)
        past = process.report() if past is None else total([past, process.report()])
    assert len(past.live.latencies) <= WINDOW / 2.0 + 1
    assert len(past.hour.rows) <= HOUR / 10
    assert past.stats.answered == 40 * 50


def test_a_process_with_too_many_requests_to_keep_shortens_the_time_that_is_shown():
    clock = Clock()
    busy, idle = Process(clock, clock.now), Process(clock, clock.now)
    for _ in range(MOST_KEPT + 10):
        clock.now += 0.001
        busy.live.on_settle(settled(0.1))
    idle.live.on_settle(settled(0.1))
    figures = total([idle.report(), busy.report()]).live.shown(clock.now)
    assert figures["window"] == pytest.approx((MOST_KEPT - 1) * 0.001)
    assert figures["requests_per_second"] == pytest.approx(1_000, rel=0.01)


def test_a_shared_budget_is_that_of_the_process_that_knows_most():
    def report(spent, refused):
        budget = BudgetFigures(spent_usd=spent, left_usd=10.0 - spent, refused=refused)
        clock = Clock()
        return Report(mb.Stats(budget=budget), LiveFigures(clock).state(), Hour(CallerLabels(), clock).state())

    assert total([report(1.0, 2), report(4.0, 1)]).stats.budget == BudgetFigures(spent_usd=4.0, left_usd=6.0, refused=3)


def test_the_beginning_of_a_counter_is_the_earliest_one():
    first, second = mb.PrometheusHooks(), mb.PrometheusHooks()
    for hooks in (first, second):
        hooks.on_settle(settled(1.0))
    parts = [first.export(), second.export()]

    def created(families):
        return {
            s[2] for each in families if each.name == "microbatch_requests" for s in each.samples if "_created" in s[0]
        }

    assert created(added(parts)) == {min(created(parts[0]) | created(parts[1]))}
