"""What the simulation has found, as small scenarios that show it."""

from __future__ import annotations

import pytest
from simulation import mixed_invariants, mixed_world
from simulation.invariants import breaches
from simulation.mixed_scenario import Call, Mixed
from simulation.scenario import TICK, Ask, Bulk, Fault, Scenario
from simulation.world import play

import microbatch as mb


def of(policy=None, **parts):
    """A scenario in which lanes wait for company and nothing is retried."""
    usual = {"max_batch_size": 2, "max_wait": 0.25, "low_max_wait": 2.0, "idle": "wait", "max_concurrent_batches": 4}
    retry = {"max_attempts": 1, "budget": 0.0, "reserve": 0}
    return Scenario(policy={**usual, **(policy or {})}, retry=retry, order=None, **parts)


def test_usage_is_conserved_when_a_caller_goes_in_the_moment_of_an_answer_whose_call_reports_nothing():
    scenario = of(
        {"max_batch_size": 4},
        asks=[Ask(cancel=("answer", "after")), Ask(), Ask(), Ask()],
        faults=[Fault("nonsense"), Fault(usage=False), Fault(usage=False)],
    )
    assert not breaches(play(scenario))


def test_map_goes_on_when_a_source_that_fell_silent_fills_max_pending():
    scenario = of(bulks=[Bulk(at=0.0, asks=[Ask(), Ask()], gaps=[3.0, 0.0], max_pending=1)])
    assert not breaches(play(scenario))


def test_map_goes_on_when_others_have_left_a_full_room():
    scenario = of(
        {"max_queued": 5, "when_full": "reject", "max_concurrent_batches": 1},
        asks=[Ask() for _ in range(4)],
        bulks=[Bulk(at=TICK, asks=[Ask(), Ask(), Ask()], max_pending=3)],
        faults=[Fault(latency=16 * TICK)],
    )
    assert not breaches(play(scenario))


def test_closing_does_not_wait_for_a_map_that_took_no_more_when_there_was_room():
    for order in range(10):
        scenario = of(
            {"max_queued": 1, "when_full": "wait", "max_wait": 0.0},
            asks=[Ask()],
            bulks=[Bulk(at=TICK, asks=[])],
            faults=[Fault(latency=16 * TICK)],
            closes=[(1.0, 30.0, None)],
        )
        scenario.order = order
        assert not breaches(play(scenario))


def test_a_single_call_whose_caller_has_gone_before_it_began_is_not_made():
    for order in range(10):
        scenario = of(
            {"idle": "flush"}, asks=[Ask(timeout=0.0)], faults=[Fault(kind="no_connection") for _ in range(4)]
        )
        scenario.order = order
        scenario.retry = {"max_attempts": 4, "budget": 1.0, "reserve": 10}
        assert not breaches(play(scenario))


def test_closing_does_not_wait_for_a_map_that_was_let_in_after_the_close():
    for order in range(10):
        scenario = of(
            {"max_queued": 1, "when_full": "wait", "max_wait": 0.0},
            asks=[Ask()],
            bulks=[Bulk(at=0.0, asks=[Ask(), Ask()], gaps=[0.5, 0.0])],
            faults=[Fault(latency=64 * TICK)],
            closes=[(0.25, 30.0, None)],
        )
        scenario.order = order
        assert not breaches(play(scenario))


def mixed(policy=None, **parts):
    """A run of several parts in which nothing is retried."""
    usual = {"max_batch_size": 2, "max_wait": 0.25, "low_max_wait": 2.0, "idle": "flush", "max_concurrent_batches": 1}
    retry = {"max_attempts": 1, "budget": 0.0, "reserve": 0}
    return Mixed(policy={**usual, **(policy or {})}, retry=retry, order=None, **parts)


def test_each_relayed_request_that_waits_when_the_batcher_closes_gets_an_error_of_its_own():
    for charged in (False, True):
        world = mixed_world.play(
            mixed(
                calls=[Call(what="forward", batcher=0, charged=charged) for _ in range(4)],
                forwards=[Fault(latency=1.0)],
                close=(0.5, 0.0),
            )
        )
        assert not mixed_invariants.breaches(world)
        errors = [caller.error for caller in world.callers if isinstance(caller.error, mb.ShutDown)]
        assert len({id(error) for error in errors}) == len(errors) >= 3


def test_relayed_requests_keep_to_the_limit_while_the_key_is_refused():
    calls = [Call(texts=("text here cook apples",)), *(Call(at=1.0, what="forward") for _ in range(5))]
    world = mixed_world.play(
        mixed(calls=calls, faults=[Fault("auth")], rate_limit={"rpm": 4}, parts=frozenset({"quota"}))
    )
    assert not mixed_invariants.breaches(world)
    assert len(world.upstream.others) == 5
    closing = mixed(calls=calls, faults=[Fault("auth")], rate_limit={"rpm": 4}, close=(1.5, 0.0))
    assert not mixed_invariants.breaches(mixed_world.play(closing))


def test_two_batchers_whose_requests_need_most_of_a_limit_do_not_give_way_to_each_other_for_ever():
    for what, kind in (("submit", "text"), ("embed", "vector")):
        calls = [
            Call(
                what=what,
                batcher=number % 2,
                texts=(f"{kind} {('here', 'there')[number % 2]} cook {'x' * 600}{number}",),
            )
            for number in range(6)
        ]
        policy = {"max_batch_size": 1} if what == "submit" else {}
        world = mixed_world.play(mixed(policy, batchers=2, calls=calls, rate_limit={"tpm": 1_000}))
        assert not mixed_invariants.breaches(world)
        assert all(caller.replies for caller in world.callers)


@pytest.mark.parametrize("what", ["submit", "embed"])
@pytest.mark.parametrize("timeout", [None, 2.0])
@pytest.mark.parametrize("others", [0, 1])
def test_a_caller_is_not_bound_to_the_shorter_timeout_of_an_equal_request_under_way(what, timeout, others):
    text = "text here cook" if what == "submit" else "vector here cook"
    hasty = [Call(what=what, texts=(f"{text} {word}",), timeout=0.5) for word in ("apples", "pears")[: others + 1]]
    calls = [*hasty, Call(at=0.25, what=what, texts=(f"{text} apples",), timeout=timeout)]
    slow = [Fault(latency=1.0) for _ in range(4)]
    policy = {"share": True, "max_concurrent_batches": 4, "idle": "wait", "max_wait": 0.0}
    world = mixed_world.play(mixed(policy, calls=calls, faults=slow, embeds=slow))
    assert not mixed_invariants.breaches(world)
    assert [bool(caller.replies) for caller in world.callers] == [False] * len(hasty) + [True]
    assert world.callers[-1].ended == 1.25


def test_usage_is_conserved_when_embed_many_fails_after_a_text_whose_last_call_reports_nothing():
    texts = tuple(f"vector here cook {topic}" for topic in ("apples", "pears", "plums"))
    world = mixed_world.play(
        mixed(
            calls=[Call(what="embed_many", texts=texts)],
            embeds=[Fault("wrong_index"), Fault(usage=False), Fault("bad_request")],
        )
    )
    assert not mixed_invariants.breaches(world)
    assert isinstance(world.callers[0].error, mb.BadRequest)
    assert world.stats[0].unclaimed.prompt_tokens == world.upstream.others[0].reported.prompt_tokens


def test_a_relayed_request_under_way_when_its_batcher_has_closed_counts_against_the_limit_of_another():
    relayed = [Call(what="forward", charged=charged) for charged in (False, True)]
    others = [
        Call(at=2.0, batcher=1, what=what, texts=(f"text there cook {word}",) if what == "submit" else ())
        for what, word in [("submit", "apples"), ("submit", "pears"), ("forward", ""), ("submit", "plums")]
    ]
    for grace, latency in ((0.5, 4.0), (0.0, 4.0), (0.5, 100.0)):
        world = mixed_world.play(
            mixed(
                {"max_batch_size": 1, "max_concurrent_batches": 4},
                batchers=2,
                calls=[*relayed, *others],
                forwards=[Fault(latency=latency)] * 2,
                rate_limit={"rpm": 4},
                parts=frozenset({"quota", "pair", "forward"}),
                close=(1.0, grace),
            )
        )
        assert not mixed_invariants.breaches(world)
        assert [bool(caller.outcome) and not caller.error for caller in world.callers] == [True] * 6


def test_a_lane_that_grows_while_it_waits_for_a_permit_is_not_passed_over_by_another_batcher():
    asked = [
        (1, 96.0, "fact there cook apples of number 0 just"),
        (0, 112.0, "text here cook figs of number 1"),
        (1, 96.0, "text there cook melons of number 2 just"),
        (0, 16.0, "text here cook figs of number 3"),
        (0, 96.0, "fact here cook plums of number 4"),
        (1, 16.0, "text there cook pears of number 5 just"),
        (0, 96.0, "fact here cook plums of number 6"),
        (1, 144.0, "text there cook grapes of number 7 please"),
        (0, 48.0, "text here cook berries of number 8"),
        (0, 96.0, "text here cook figs of number 10 just"),
        (0, 64.0, "text here cook melons of number 12 please"),
    ]
    calls = [Call(at=at, batcher=batcher, kind=text[:4], texts=(text,)) for batcher, at, text in asked]
    policy = {"max_batch_size": 4, "idle": "wait"}
    world = mixed_world.play(mixed(policy, batchers=2, calls=calls, rate_limit={"tpm": 1_000}))
    assert not mixed_invariants.breaches(world)


def test_what_was_asked_again_in_vain_is_asked_a_third_time_with_all_retries():
    # The answer to a similar question is handed out, and turns out to be wrong; meanwhile the batcher stays open.
    texts = ("fact here cook apples", "fact here cook apples please", "text here cook figs")
    calls = [Call(at=8.0 * place, kind=text[:4], texts=(text,)) for place, text in enumerate(texts)]
    faults = [Fault(), Fault(), Fault("timeout"), Fault("timeout")]
    scenario = mixed(calls=calls, parts=frozenset({"similar"}), faults=faults)
    scenario.retry = {"max_attempts": 2, "budget": 1.0, "reserve": 10}
    scenario.order = 3  # decides that the answer is checked
    world = mixed_world.play(scenario)
    assert not mixed_invariants.breaches(world)
    assert [attempt.beside for attempt in world.upstream.attempts] == [None, "check", "check", "check", "check", None]


def test_a_text_that_another_caller_promotes_and_gives_up_is_embedded_all_the_same():
    text = ("vector here cook pears",)
    calls = [
        Call(texts=("text here cook apples",), priority="high"),
        Call(what="embed_many", at=0.5, texts=text, priority="low"),
        Call(what="embed_many", at=1.0, texts=text, cancel=("after", 0.0)),
    ]
    parts = frozenset({"vectors", "equal"})
    for idle in ("flush", "wait"):
        policy = {"idle": idle, "max_wait": TICK}
        world = mixed_world.play(mixed(policy, calls=calls, faults=[Fault(latency=2.0)], parts=parts))
        assert not mixed_invariants.breaches(world)
        assert [caller.outcome == "cancelled" for caller in world.callers] == [False, False, True]
