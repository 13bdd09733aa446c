"""What the simulated endpoint's quota lets in, refuses and says of it, to the instant."""

from __future__ import annotations

import asyncio
import copy
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microbatch.errors import BadRequest, ConfigError, RateLimited, ServerError
from microbatch.messages import Limits
from microbatch.protocols import ChatCall, Completion
from microbatch.testing import Faults, Latency, Quota, SimulatedModel, SimulatedTransport
from microbatch.testing.counting import prompt_tokens, split
from microbatch.testing.quota import SLACK, WINDOW, Meter, go_duration
from microbatch.testing.reading import EndpointError
from microbatch.testing.wire import limit_headers, wait_headers

MESSAGES = [{"role": "user", "content": "Is this a thing?"}]
PROMPT = prompt_tokens(MESSAGES)


def transport(quota: Quota | None, **options: Any) -> tuple[SimulatedTransport, SimulatedModel]:
    model = SimulatedModel(quota=quota, answer=lambda text, schema: "Yes, it is.", **options)
    return SimulatedTransport(model), model


async def send(to: SimulatedTransport, *, at: float | None = None, key: str | None = None, **fields: Any) -> Completion:
    """Send a call, at an instant of the virtual clock if one is named."""
    loop = asyncio.get_running_loop()
    if at is not None:
        await asyncio.sleep(at - loop.time())
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return await to.send(ChatCall(messages=MESSAGES, headers=headers, **fields), lambda text: None)


async def refused(to: SimulatedTransport, **options: Any) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        await send(to, **options)
    return caught.value


# The window


@pytest.mark.parametrize("options", [{}, {"rpm": 0}, {"tpm": 0}, {"rpm": 1.5}, {"tpm": True}, {"rpm": -1, "tpm": 5}])
def test_a_quota_without_a_limit_or_with_a_senseless_one_is_a_config_error(options):
    with pytest.raises(ConfigError, match=r"rpm|tpm"):
        Quota(**options)


async def test_what_was_charged_counts_for_sixty_seconds_and_no_longer():
    to, model = transport(Quota(rpm=2))
    await send(to, at=0)
    await send(to, at=10)
    error = await refused(to, at=59.9)
    # This refusal counts as a request too, so two must leave: the ones of 0 and of 10.
    assert error.retry_after == pytest.approx(10.1)
    await send(to, at=70)
    assert (model.calls, model.quota_refusals, model.peak_requests, model.single_calls) == (4, 1, 2, 3)


async def test_no_minute_begins_anew():
    to, _ = transport(Quota(rpm=4))
    for at in (50, 55, 58, 59):
        await send(to, at=at)
    # A fixed minute would have four more from 60 on, a bucket would have refilled one by 75.
    await refused(to, at=75)
    await refused(to, at=109.5)


async def test_refusals_count_as_requests_but_use_no_tokens():
    to, model = transport(Quota(rpm=2, tpm=2 * PROMPT + 20))
    await send(to, at=0, max_tokens=20)
    first = await refused(to, at=1, max_tokens=20)
    assert "tokens per min" in str(first)
    assert first.limits.remaining_tokens == PROMPT
    second = await refused(to, at=2, max_tokens=1)
    assert "requests per min (RPM): Limit 2, Used 2, Requested 1" in str(second)
    assert second.limits.remaining_requests == 0
    assert second.limits.remaining_tokens == PROMPT
    assert (model.quota_refusals, model.peak_requests, model.peak_tokens) == (2, 1, PROMPT + 20)


async def test_whoever_waits_as_told_is_let_in_and_whoever_comes_earlier_is_not():
    to, _ = transport(Quota(tpm=100))
    for at, cost in ((0, 30), (0.1, 30), (0.7, 30)):
        await send(to, at=at, max_tokens=cost - PROMPT)
    error = await refused(to, at=20.3, max_tokens=60 - PROMPT)
    loop = asyncio.get_running_loop()
    await asyncio.sleep(error.retry_after - 0.001)
    await refused(to, max_tokens=60 - PROMPT)
    await asyncio.sleep(0.001)
    assert loop.time() == pytest.approx(60.1)
    await send(to, max_tokens=60 - PROMPT)


async def test_a_wait_covers_both_limits():
    to, _ = transport(Quota(rpm=1, tpm=100))
    await send(to, at=0, max_tokens=80)
    # The tokens are free again at 60, but this refusal is a request until 90.
    assert (await refused(to, at=30, max_tokens=80)).retry_after == pytest.approx(60)
    await send(to, at=90, max_tokens=80)


async def test_a_request_larger_than_the_limit_is_always_refused_and_told_no_time():
    to, _ = transport(Quota(tpm=50))
    await send(to, max_tokens=50 - PROMPT)
    error = await refused(to, at=300, max_tokens=51 - PROMPT)
    assert str(error).startswith("Request too large for simulated on tokens per min (TPM): Limit 50, Requested 51.")
    assert (error.code, error.retry_after) == ("rate_limit_exceeded", None)
    assert error.limits.remaining_tokens == 50


ARRIVALS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 30)), min_size=1, max_size=60)


@given(arrivals=ARRIVALS, rpm=st.none() | st.integers(1, 6), tpm=st.none() | st.integers(1, 60))
def test_a_meter_decides_as_adding_up_all_that_came_before_does(arrivals, rpm, tpm):
    """Sums are kept as they change; the plain rule is to look back over every charge."""
    if rpm is None and tpm is None:
        tpm = 40
    meter = Meter(Quota(rpm=rpm, tpm=tpm), "m")
    asked: list[float] = []
    spent: list[tuple[float, int]] = []
    now = peak_tokens = peak_requests = 0.0

    def fits(tokens: int, at: float) -> bool:
        requests = sum(when > at - WINDOW + SLACK for when in asked)
        used = sum(cost for when, cost in spent if when > at - WINDOW + SLACK)
        return (rpm is None or requests < rpm) and (tpm is None or used + tokens <= tpm)

    for tenths, tokens in arrivals:
        now += tenths / 10
        should = fits(tokens, now)
        asked.append(now)
        if should:
            limits = meter.charge(tokens, now)
            spent.append((now, tokens))
            recent = [cost for when, cost in spent if when > now - WINDOW + SLACK]
            peak_tokens, peak_requests = max(peak_tokens, sum(recent)), max(peak_requests, len(recent))
            if tpm is not None:
                assert limits.remaining_tokens == tpm - sum(recent)
            continue
        with pytest.raises(EndpointError) as caught:
            meter.charge(tokens, now)
        wait = caught.value.retry_after
        assert (wait is None) == (tpm is not None and tokens > tpm)
        if wait is not None:
            assert fits(tokens, now + wait)
            assert not fits(tokens, now + wait - 0.01)
            copy.deepcopy(meter).charge(tokens, now + wait)
    assert meter.peaks == (peak_requests, peak_tokens)


def test_what_has_left_is_forgotten():
    meter = Meter(Quota(rpm=1_000), "m")
    for number in range(10_000):
        meter.charge(7, number / 10)
    assert all(len(window._charges) < 2_000 for window in (meter._tokens, meter._asked))
    assert meter.peaks == (600, 4_200)


def test_a_sleeper_that_is_woken_a_hair_early_is_not_refused():
    meter = Meter(Quota(rpm=1), "m")
    meter.charge(1, 0.1)
    meter.charge(1, 0.1 + 59.9999999)


# What a request costs


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_the_longest_reply_allowed_is_charged_whatever_comes(name):
    to, model = transport(Quota(tpm=1_000), max_tokens_name=name)
    completion = await send(to, max_tokens=200)
    assert completion.usage.completion_tokens < 200
    assert completion.limits.remaining_tokens == 1_000 - PROMPT - 200
    assert model.peak_tokens == PROMPT + 200


@pytest.mark.parametrize("kind", [None, "truncated", "http_500", "hang"])
async def test_without_a_limit_on_the_reply_its_real_length_is_charged(kind):
    faults = None if kind is None else Faults(kind, rate=1, on="all")
    to, model = transport(Quota(tpm=1_000), faults=faults)
    if kind == "http_500":
        with pytest.raises(ServerError) as caught:
            await send(to)
        limits, length = caught.value.limits, 0
    elif kind == "hang":
        task = asyncio.create_task(send(to))
        await asyncio.sleep(1)
        task.cancel()
        limits, length = Limits(remaining_tokens=1_000 - model.peak_tokens), 0
    else:
        completion = await send(to)
        limits, length = completion.limits, completion.usage.completion_tokens
        assert (length == split("Yes, it is.").tokens) == (kind is None)
    assert limits.remaining_tokens == 1_000 - PROMPT - length


async def test_tokens_are_counted_even_where_only_requests_have_a_limit():
    to, model = transport(Quota(rpm=2))
    first = await send(to)
    await send(to, max_tokens=50)
    assert model.peak_tokens == 2 * PROMPT + first.usage.completion_tokens + 50


async def test_a_refused_request_leaves_no_trace_but_its_refusal():
    asked = []
    faults = Faults("whitespace", rate=1, on="all", limit=2)
    model = SimulatedModel(
        quota=Quota(rpm=1), answer=lambda *item: asked.append(item) or "Yes.", faults=faults, record=True
    )
    to = SimulatedTransport(model)
    await send(to, max_tokens=9)
    counted = (model.single_calls, model.items, model.prompt_tokens, model.completion_tokens, model.faulted)
    await refused(to, max_tokens=9)
    await refused(to, max_tokens=9)
    assert counted == (
        model.single_calls,
        model.items,
        model.prompt_tokens,
        model.completion_tokens,
        model.faulted,
    )
    assert (model.calls, model.quota_refusals, model.replies) == (3, 2, ["  \n ", "", ""])
    # Nor do refusals use up what the faults draw from.
    await send(to, at=100, max_tokens=9)
    await send(to, at=200, max_tokens=9)
    await refused(to, at=201, max_tokens=9)
    assert (model.faulted, len(asked)) == (2, 1)


async def test_what_is_refused_for_its_parameters_counts_as_a_request():
    to, model = transport(Quota(rpm=2, tpm=500), context_tokens=PROMPT + 50)
    with pytest.raises(BadRequest) as caught:
        await send(to, params={"stream_options": {}})
    assert caught.value.limits.remaining_requests == 1
    assert caught.value.limits.remaining_tokens == 500
    assert caught.value.limits.reset_tokens == 0
    await send(to, max_tokens=10)
    error = await refused(to, at=30, params={"stream_options": {}})
    # It would have cost no tokens, so theirs are free again when those of the answer are.
    assert (error.retry_after, error.limits.reset_requests, error.limits.reset_tokens) == (30, 60, 30)
    assert (model.quota_refusals, model.single_calls) == (1, 1)
    with pytest.raises(BadRequest) as caught:
        await send(to, at=89, params={"stream_options": {}})
    assert caught.value.limits.reset_tokens == 0
    await send(to, at=95, max_tokens=10)
    with pytest.raises(BadRequest) as caught:
        await send(to, at=149, params={"stream_options": {}})
    assert (caught.value.limits.reset_requests, caught.value.limits.reset_tokens) == (60, 6)


async def test_each_key_and_each_model_has_a_quota_of_its_own():
    to, model = transport(Quota(rpm=1))
    await send(to)
    await send(to, key="a")
    await send(to, key="b")
    await send(to, key="a", model="other")
    await refused(to, key="a")
    assert "for other" in str(await refused(to, key="a", model="other"))
    assert (model.peak_requests, model.quota_refusals) == (1, 2)


# What is said of it


async def test_limits_are_told_to_the_instant_with_answers_and_refusals():
    to, _ = transport(Quota(rpm=3, tpm=300), latency=Latency(first_token=5, tokens_per_second=None))
    completion = await send(to, at=1, max_tokens=100 - PROMPT)
    # As of the arrival, not of the answer five seconds later.
    assert asyncio.get_running_loop().time() == 6
    assert completion.limits == Limits(
        limit_requests=3,
        remaining_requests=2,
        reset_requests=60,
        limit_tokens=300,
        remaining_tokens=200,
        reset_tokens=60,
    )
    error = await refused(to, at=21, max_tokens=201 - PROMPT)
    assert (error.status, error.code, error.retry_after) == (429, "rate_limit_exceeded", 40)
    assert error.limits == Limits(
        limit_requests=3,
        remaining_requests=1,
        reset_requests=60,
        limit_tokens=300,
        remaining_tokens=200,
        reset_tokens=40,
    )
    assert str(error) == (
        "Rate limit reached for simulated on tokens per min (TPM): Limit 300, Used 100, Requested 201. "
        "Please try again in 40s."
    )
    assert '"type":"tokens","param":null,"code":"rate_limit_exceeded"' in error.body


async def test_of_what_has_no_limit_nothing_is_told():
    requests, _ = transport(Quota(rpm=1))
    tokens, _ = transport(Quota(tpm=100))
    only_requests = Limits(limit_requests=1, remaining_requests=0, reset_requests=60)
    assert (await send(requests)).limits == (await refused(requests)).limits == only_requests
    assert set(limit_headers(only_requests)) == {
        f"x-ratelimit-{what}-requests" for what in ("limit", "remaining", "reset")
    }
    assert set(limit_headers((await send(tokens)).limits)) == {
        f"x-ratelimit-{what}-tokens" for what in ("limit", "remaining", "reset")
    }
    assert (await send(transport(None)[0])).limits is None
    assert limit_headers(None) == {}


def test_a_wait_is_told_in_seconds_and_milliseconds_rounded_up():
    def told(wait: float | None) -> dict[str, str]:
        return wait_headers(EndpointError(429, "", retry_after=wait))

    assert told(None) == {}
    assert told(14.7) == {"retry-after": "14.7", "retry-after-ms": "14700"}
    assert told(0.0001) == {"retry-after": "0.001", "retry-after-ms": "1"}
    assert told(math.inf) == {"retry-after": "inf"}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0s"),
        (0.012, "12ms"),
        (0.0001, "1ms"),
        (0.9999, "1s"),
        (1, "1s"),
        (14.7, "14.7s"),
        (74.7 - 60, "14.7s"),
        (14.70001, "14.701s"),
        (59.9996, "1m0s"),
        (60, "1m0s"),
        (90.25, "1m30.25s"),
        (360, "6m0s"),
    ],
)
def test_durations_are_written_as_go_does_and_never_too_short(seconds, words):
    assert go_duration(seconds) == words
