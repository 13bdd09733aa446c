"""The capability ladder: what is learned, for whom, and how it is unlearned."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from microbatch.protocols import ChatCall
from microbatch.transports.capabilities import CAPACITY, MAX_SCHEMAS, Capabilities, Plan, Rung
from microbatch.transports.credentials import credentials_digest
from microbatch.transports.error_parsing import Fault

HOUR = 3600.0
ENDPOINT: dict[str, Any] = {"base_url": "http://x/v1", "model": "m", "credentials": [("Authorization", "Bearer one")]}
NO_FORMAT = "response_format json_schema is not supported by this model"
BAD_SCHEMA = "Invalid schema for response_format 'answers': minItems is not permitted"


def call(schema: Any = None, **options: Any) -> ChatCall:
    return ChatCall(
        messages=[{"role": "user", "content": "hi"}], schema={"type": "object"} if schema is None else schema, **options
    )


def plan(ladder: Capabilities, each: ChatCall | None = None, now: float = 0.0, **changes: Any) -> Plan:
    endpoint = {name: changes.pop(name, usual) for name, usual in ENDPOINT.items()}
    key = endpoint["base_url"], endpoint["model"], credentials_digest(endpoint["credentials"])
    return ladder.plan(each or call(), key, now, **{"stream": None, **changes})


def refuse(ladder: Capabilities, attempt: Plan, message: str = NO_FORMAT, now: float = 0.0, **said: Any) -> bool:
    return ladder.refused(attempt, Fault(400, message=message, **said), now)


def learn_field(ladder: Capabilities, attempt: Plan, param: str, code: str = "unsupported_parameter") -> bool:
    return refuse(ladder, attempt, "no", code=code, param=param)


def test_a_call_without_schema_has_no_rung() -> None:
    ladder = Capabilities()
    attempt = plan(ladder, ChatCall(messages=[]))
    assert attempt.rung is None
    assert not refuse(ladder, attempt)
    assert not ladder.failed(attempt)
    ladder.accepted(attempt, 0.0)


@pytest.mark.parametrize("message", [NO_FORMAT, "unknown field json_schema", "failed to parse grammar"])
def test_a_refusal_of_the_format_steps_down_until_plain(message: str) -> None:
    ladder, each = Capabilities(), call()
    for rung in (Rung.JSON_SCHEMA, Rung.JSON_OBJECT):
        attempt = plan(ladder, each)
        assert attempt.rung is rung
        assert refuse(ladder, attempt, message)
    attempt = plan(ladder, each)
    assert attempt.rung is Rung.PLAIN
    assert not refuse(ladder, attempt, message)


def test_the_param_alone_names_the_format() -> None:
    ladder = Capabilities()
    assert refuse(ladder, plan(ladder), "Unknown name", param="response_format")


def test_other_refusals_teach_nothing() -> None:
    ladder = Capabilities()
    assert not refuse(ladder, plan(ladder), "messages must not be empty", param="messages")
    assert plan(ladder).rung is Rung.JSON_SCHEMA


def test_concurrent_refusals_step_once() -> None:
    ladder = Capabilities()
    attempts = [plan(ladder) for _ in range(5)]
    assert all(refuse(ladder, attempt) for attempt in attempts)
    assert plan(ladder).rung is Rung.JSON_OBJECT


def test_calls_with_a_schema_wait_for_the_first_one_until_an_endpoint_has_answered_one() -> None:
    ladder, text = Capabilities(), ChatCall(messages=[])
    ladder.accepted(plan(ladder, text), 0.0)
    assert ladder.untried(plan(ladder, text)) is None
    first = ladder.untried(plan(ladder))
    assert first is not None
    assert ladder.untried(plan(ladder, model="other")) is not first
    refuse(ladder, plan(ladder))
    assert ladder.untried(plan(ladder)) is first
    ladder.accepted(plan(ladder), 0.0)
    assert first.over
    assert ladder.untried(plan(ladder)) is None
    assert ladder.untried(plan(ladder, model="other")) is not None


def test_a_declared_form_is_not_tried() -> None:
    ladder = Capabilities("json_schema")
    assert ladder.untried(plan(ladder)) is None


def test_a_late_refusal_neither_climbs_back_nor_starts_the_hour_again() -> None:
    ladder = Capabilities()
    late = plan(ladder)
    refuse(ladder, plan(ladder))
    refuse(ladder, plan(ladder))
    assert refuse(ladder, late, now=HOUR - 1)
    assert plan(ladder, now=HOUR - 1).rung is Rung.PLAIN
    assert plan(ladder, now=HOUR).rung is Rung.JSON_OBJECT


def test_a_refusal_of_the_schema_counts_for_that_schema_only() -> None:
    ladder, other = Capabilities(), {"type": "object", "title": "other"}
    assert refuse(ladder, plan(ladder), BAD_SCHEMA)
    assert plan(ladder).rung is Rung.JSON_OBJECT
    assert plan(ladder, call(other)).rung is Rung.JSON_SCHEMA


def test_the_schemas_remembered_are_bounded() -> None:
    ladder = Capabilities()
    for number in range(MAX_SCHEMAS + 1):
        assert refuse(ladder, plan(ladder, call({"title": number})), BAD_SCHEMA)
    assert plan(ladder, call({"title": 0})).rung is Rung.JSON_SCHEMA
    assert plan(ladder, call({"title": 1})).rung is Rung.JSON_OBJECT


@pytest.mark.parametrize(
    "change",
    [
        {"base_url": "http://y/v1"},
        {"model": "n"},
        {"credentials": [("Authorization", "Bearer two")]},
        {"credentials": []},
    ],
)
def test_lessons_are_kept_apart_by_endpoint_model_and_credentials(change: dict[str, Any]) -> None:
    ladder = Capabilities()
    refuse(ladder, plan(ladder))
    assert plan(ladder, **change).rung is Rung.JSON_SCHEMA
    assert plan(ladder, credentials=[("authorization", "Bearer one")]).rung is Rung.JSON_OBJECT


def test_the_least_recently_used_endpoint_is_forgotten() -> None:
    ladder = Capabilities()
    refuse(ladder, plan(ladder))
    for number in range(CAPACITY - 1):
        plan(ladder, model=f"m{number}")
    assert plan(ladder).rung is Rung.JSON_OBJECT  # and is now the most recently used
    for number in range(CAPACITY):
        plan(ladder, model=f"n{number}")
    assert plan(ladder).rung is Rung.JSON_SCHEMA
    assert len(ladder._entries) == CAPACITY


def test_after_a_500_the_same_call_goes_one_rung_lower_and_success_is_remembered() -> None:
    ladder, each = Capabilities(), call()
    ladder.failed(plan(ladder, each))
    assert plan(ladder).rung is Rung.JSON_SCHEMA  # nobody else is affected yet
    lower = plan(ladder, each)
    assert lower.rung is Rung.JSON_OBJECT
    ladder.accepted(lower, 0.0)
    assert plan(ladder).rung is Rung.JSON_OBJECT


def test_a_500_on_the_lower_rung_as_well_is_remembered_nowhere() -> None:
    ladder, each = Capabilities(), call()
    ladder.failed(plan(ladder, each))
    ladder.failed(plan(ladder, each))
    again = plan(ladder, each)
    assert again.rung is Rung.JSON_SCHEMA
    ladder.failed(again)  # once a call
    assert plan(ladder, each).rung is Rung.JSON_SCHEMA
    assert plan(ladder, each).rung is Rung.JSON_SCHEMA


def test_another_failure_of_the_lower_attempt_leaves_it_to_be_tried() -> None:
    ladder, each = Capabilities(), call()
    ladder.failed(plan(ladder, each))
    plan(ladder, each)  # ends in a timeout, of which nothing is reported
    assert plan(ladder, each).rung is Rung.JSON_OBJECT


def test_a_refusal_on_the_lower_rung_leads_further_down_for_that_call_alone() -> None:
    ladder, each = Capabilities(), call()
    ladder.failed(plan(ladder, each))
    assert refuse(ladder, plan(ladder, each), "json_object is not supported")
    assert plan(ladder).rung is Rung.JSON_SCHEMA
    lowest = plan(ladder, each)
    assert lowest.rung is Rung.PLAIN
    ladder.accepted(lowest, 0.0)
    assert plan(ladder).rung is Rung.PLAIN


def test_a_500_where_this_schema_was_answered_before_is_an_outage() -> None:
    ladder = Capabilities()
    ladder.accepted(plan(ladder), 0.0)
    each = call()
    ladder.failed(plan(ladder, each))
    assert plan(ladder, each).rung is Rung.JSON_SCHEMA


def test_a_500_for_one_schema_among_others_that_work_counts_for_that_schema_only() -> None:
    ladder, other = Capabilities(), {"title": "fine"}
    ladder.accepted(plan(ladder, call(other)), 0.0)
    each = call()
    ladder.failed(plan(ladder, each))
    ladder.accepted(plan(ladder, each), 0.0)
    assert plan(ladder).rung is Rung.JSON_OBJECT
    assert plan(ladder, call({"title": "new"})).rung is Rung.JSON_SCHEMA


def test_a_500_at_plain_text_is_an_ordinary_one() -> None:
    ladder = Capabilities()
    refuse(ladder, plan(ladder))
    refuse(ladder, plan(ladder))
    each = call()
    ladder.failed(plan(ladder, each))
    assert plan(ladder, each).rung is Rung.PLAIN


def test_after_an_hour_one_call_tries_the_rung_above() -> None:
    ladder = Capabilities()
    refuse(ladder, plan(ladder), now=5.0)
    assert plan(ladder, now=5.0 + HOUR - 1).rung is Rung.JSON_OBJECT
    probe = plan(ladder, now=5.0 + HOUR)
    assert probe.rung is Rung.JSON_SCHEMA
    assert plan(ladder, now=5.0 + HOUR).rung is Rung.JSON_OBJECT  # one call only
    ladder.accepted(probe, 6.0 + HOUR)
    assert plan(ladder, now=6.0 + HOUR).rung is Rung.JSON_SCHEMA


def test_a_refused_probe_goes_back_and_waits_another_hour() -> None:
    ladder, each = Capabilities(), call()
    refuse(ladder, plan(ladder))
    probe = plan(ladder, each, now=HOUR)
    assert refuse(ladder, probe, now=HOUR + 10)
    assert plan(ladder, each, now=HOUR + 10).rung is Rung.JSON_OBJECT
    assert plan(ladder, now=2 * HOUR + 9).rung is Rung.JSON_OBJECT
    assert plan(ladder, now=2 * HOUR + 10).rung is Rung.JSON_SCHEMA


def test_a_probe_that_never_comes_back_costs_no_more_than_another_hour() -> None:
    ladder = Capabilities()
    refuse(ladder, plan(ladder))
    assert plan(ladder, now=HOUR).rung is Rung.JSON_SCHEMA
    assert plan(ladder, now=HOUR).rung is Rung.JSON_OBJECT
    assert plan(ladder, now=2 * HOUR).rung is Rung.JSON_SCHEMA


def test_a_schema_that_was_refused_is_tried_again_after_an_hour_too() -> None:
    ladder = Capabilities()
    refuse(ladder, plan(ladder), BAD_SCHEMA)
    probe = plan(ladder, now=HOUR)
    assert probe.rung is Rung.JSON_SCHEMA
    ladder.accepted(probe, HOUR)
    assert plan(ladder, now=HOUR).rung is Rung.JSON_SCHEMA


def test_a_late_success_above_does_not_undo_a_refusal() -> None:
    ladder = Capabilities()
    early, late = plan(ladder), plan(ladder)
    refuse(ladder, early)
    ladder.accepted(late, 0.0)
    assert plan(ladder).rung is Rung.JSON_OBJECT


@pytest.mark.parametrize("name", ["stream", "stream_options", "temperature"])
def test_an_optional_field_is_left_out_once_refused(name: str) -> None:
    ladder, each = Capabilities(), call(params={"temperature": 0})
    attempt = plan(ladder, each, stream=True)
    assert attempt.sent == {"stream", "stream_options", "temperature"}
    assert learn_field(ladder, attempt, name, "unsupported_value")
    left = {"stream", "stream_options", "temperature"} - {name} - ({"stream_options"} if name == "stream" else set())
    assert plan(ladder, each, stream=True).sent == left


def test_the_name_of_max_tokens_is_learned_in_both_directions() -> None:
    ladder = Capabilities()
    assert plan(ladder).sent == frozenset()
    assert learn_field(ladder, plan(ladder, call(max_tokens=5)), "max_tokens")
    later = plan(ladder, call(max_tokens=5))
    assert later.sent == {"max_completion_tokens"}
    assert learn_field(ladder, later, "max_completion_tokens")
    assert plan(ladder, call(max_tokens=5)).sent == {"max_tokens"}


def test_an_endpoint_that_takes_neither_name_ends_the_attempts() -> None:
    ladder, each = Capabilities(), call(max_tokens=5)
    assert learn_field(ladder, plan(ladder, each), "max_tokens")
    assert not learn_field(ladder, plan(ladder, each), "max_completion_tokens")


def test_concurrent_refusals_of_max_tokens_do_not_turn_the_name_back() -> None:
    ladder = Capabilities()
    attempts = [plan(ladder, call(max_tokens=5)) for _ in range(4)]
    assert all(learn_field(ladder, attempt, "max_tokens") for attempt in attempts)
    assert plan(ladder, call(max_tokens=5)).sent == {"max_completion_tokens"}


def test_a_field_that_was_not_sent_teaches_nothing() -> None:
    ladder = Capabilities()
    assert not learn_field(ladder, plan(ladder), "temperature")
    assert not learn_field(ladder, plan(ladder), "max_tokens")
    assert not learn_field(
        ladder, plan(ladder, call(params={"temperature": 9})), "temperature", "decimal_above_max_value"
    )


@pytest.mark.parametrize(
    "message",
    [
        "litellm.BadRequestError: OpenAIException - Unsupported parameter: 'max_tokens' is not supported with this model.",
        "litellm.UnsupportedParamsError: o1 does not support parameters: ['max_tokens', 'top_p'], for model=o1",
    ],
)
def test_fields_are_found_in_messages_that_pass_on_another_servers_words(message: str) -> None:
    ladder, each = Capabilities(), call(max_tokens=5)
    assert refuse(ladder, plan(ladder, each), message, code="400")
    assert plan(ladder, each).sent == {"max_completion_tokens"}


def test_sending_again_always_comes_to_an_end() -> None:
    """An endpoint that refuses whatever it is asked gets a bounded number of attempts from one call."""
    ladder, each = Capabilities(), call(max_tokens=5, params={"temperature": 0})
    message = (
        "does not support parameters: ['max_tokens', 'max_completion_tokens', 'temperature', 'stream', 'stream_options', "
        "'response_format'] Invalid schema"
    )
    attempts = 1
    while refuse(ladder, plan(ladder, each, stream=True, now=attempts * HOUR), message, now=attempts * HOUR):
        attempts += 1
        assert attempts < 20
    assert attempts > 2


def test_credentials_are_not_kept_in_clear() -> None:
    ladder = Capabilities()
    attempt = plan(ladder, credentials=[("Authorization", "Bearer CANARY-KEY")])
    seen: list[str] = []
    todo: list[Any] = [vars(ladder), repr(ladder), repr(attempt)]
    known: set[int] = set()
    while todo:
        thing = todo.pop()
        if id(thing) in known:
            continue
        known.add(id(thing))
        if isinstance(thing, str | bytes):
            seen.append(repr(thing))
        elif isinstance(thing, dict | list | tuple | set):
            todo += [*thing, *(thing.values() if isinstance(thing, dict) else ())]
        elif hasattr(thing, "__dict__"):
            todo.append(vars(thing))
    assert any("http://x/v1" in text for text in seen)
    assert not any("CANARY" in text for text in seen)


def test_notes_of_a_call_go_with_the_call() -> None:
    ladder, each = Capabilities(), call()
    ladder.failed(plan(ladder, each))
    assert len(ladder._histories) == 1
    del each
    gc.collect()
    assert len(ladder._histories) == 0


def test_a_plan_tells_no_words() -> None:
    each = ChatCall(messages=[{"role": "user", "content": "CANARY"}], schema={"title": "CANARY"})
    assert "CANARY" not in repr(plan(Capabilities(), each))
