"""No more than the limit in any minute, nobody overtaken, nobody stuck: the bucket by itself, told the time."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microbatch.errors import ConfigError
from microbatch.messages import Limits, Usage
from microbatch.transports.rate_limit import MINUTE, WINDOW, RateLimit

# What one waits at most: until a minute's grants no longer count, and others' do not either; then until the debt is paid.
LONGEST_WAIT = 2 * WINDOW + MINUTE


def bucket_for(**settings):
    return RateLimit(**settings).bucket("key", 0.0)


class Line:
    """Requests that wait for *bucket* in order of arrival, and all that was ever granted."""

    def __init__(self, bucket):
        self.bucket = bucket
        self.now = 0.0
        self.waiting = deque()
        self.granted = []  # [time, grant, arrival]
        self.peaks = []

    def arrive(self, tokens):
        self.waiting.append((tokens, self.now))
        self.serve()

    def serve(self):
        while self.waiting and self.bucket.wait(self.waiting[0][0], self.now) <= 0:
            tokens, arrival = self.waiting.popleft()
            grant = self.bucket.grant(tokens, self.now)
            self.granted.append((self.now, grant, arrival))
            self.peaks.append(self.last(WINDOW))

    def last(self, window):
        """Requests and tokens granted within the last *window* seconds, by a count of our own."""
        # A hair apart is apart: sums of floats end a little early or late.
        recent = [grant for at, grant, _ in self.granted if at > self.now - window + 1e-6]
        return len(recent), sum(grant.tokens for grant in recent)

    def advance(self, to):
        """Let time pass until *to*, granting whatever can be."""
        for _ in range(10_000):
            if not self.waiting:
                break
            wait = self.bucket.wait(self.waiting[0][0], self.now)
            assert 0 <= wait < LONGEST_WAIT
            if self.now + wait > to:
                break
            self.now += wait
            self.serve()
        else:
            raise AssertionError("asked in vain 10,000 times")
        self.now = max(self.now, to)

    def run_dry(self):
        """Let time pass until nobody waits; return how long that took."""
        start = self.now
        while self.waiting:
            self.advance(self.now + self.bucket.wait(self.waiting[0][0], self.now))
            assert self.now - start < LONGEST_WAIT * (len(self.granted) + len(self.waiting) + 1)
        return self.now - start


# --- settings


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "needs rpm=, tpm= or adaptive=True"),
        ({"rpm": 0}, "rpm"),
        ({"tpm": 0}, "tpm"),
        ({"rpm": 1.5}, "rpm"),
        ({"rpm": 10, "share": 0}, "share"),
        ({"rpm": 10, "share": 1.01}, "share"),
        ({"rpm": 10, "share": float("nan")}, "share"),
        ({"rpm": 10, "share": 0.05}, "less than one request"),
        ({"tpm": 10, "share": 0.05}, "less than one token"),
        ({"rpm": 10, "charge": "sometimes"}, "charge"),
    ],
)
def test_a_senseless_limit_is_a_config_error(options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        RateLimit(**options)


def test_a_limit_tells_its_settings():
    assert repr(RateLimit(rpm=10, share=0.5)) == (
        "RateLimit(rpm=10, tpm=None, share=0.5, charge='reserved', adaptive=False)"
    )
    bucket = bucket_for(rpm=10)
    bucket.grant(5, 0.0)
    assert repr(bucket) == "Bucket(requests=1.0, tokens=None)"


def test_the_largest_request_is_the_share_of_the_tokens():
    assert RateLimit(tpm=1_000, share=0.25).max_tokens == 250
    assert RateLimit(rpm=1_000).max_tokens is None


# --- exact instants


def test_a_burst_goes_at_once_and_the_rest_at_the_steady_rate():
    line = Line(bucket_for(rpm=1_000))
    for _ in range(23):
        line.arrive(0)
    assert len(line.granted) == 20  # 2 %
    line.run_dry()
    step = WINDOW / 980
    assert [at for at, _, _ in line.granted[20:]] == [
        pytest.approx(step),
        pytest.approx(2 * step),
        pytest.approx(3 * step),
    ]


def test_burst_and_a_minutes_refill_make_the_limit():
    line = Line(bucket_for(rpm=1_000))
    for _ in range(2_000):
        line.arrive(0)
    line.run_dry()
    assert 999 <= max(requests for requests, _ in line.peaks) <= 1_000
    assert line.now == pytest.approx(WINDOW * 1_980 / 980)


@pytest.mark.parametrize("rpm", [1, 2, 7, 19])
def test_of_a_low_limit_every_request_may_go_at_once(rpm):
    line = Line(bucket_for(rpm=rpm))
    for _ in range(rpm + 1):
        line.arrive(0)
    assert [at for at, _, _ in line.granted] == [0.0] * rpm
    assert line.run_dry() == pytest.approx(WINDOW)


def test_what_is_above_the_burst_goes_when_the_last_minute_and_itself_fit():
    line = Line(bucket_for(tpm=1_000))
    line.arrive(600)
    line.advance(10.0)
    line.arrive(300)
    line.arrive(500)
    assert len(line.granted) == 2
    line.run_dry()
    assert [at for at, _, _ in line.granted] == [0.0, 10.0, pytest.approx(WINDOW)]


def test_small_ones_wait_out_the_debt_of_a_large_one():
    line = Line(bucket_for(tpm=1_000))
    line.arrive(500)
    line.arrive(10)
    line.run_dry()
    assert line.now == pytest.approx((500 - 20 + 10) / (980 / WINDOW))


def test_one_as_large_as_the_limit_goes_when_nothing_else_counts():
    line = Line(bucket_for(tpm=1_000))
    line.arrive(1)
    line.advance(5.0)
    line.arrive(1_000)
    line.run_dry()
    assert line.now == pytest.approx(WINDOW)


def test_requests_and_tokens_are_granted_together_or_not_at_all():
    bucket = bucket_for(rpm=1, tpm=1_000)
    bucket.grant(10, 0.0)
    assert bucket.wait(10, 0.0) == pytest.approx(WINDOW)
    assert bucket.wait(10, 0.0) == pytest.approx(WINDOW)  # asking costs nothing
    assert repr(bucket) == "Bucket(requests=1.0, tokens=10.0)"


def test_a_share_is_a_part_of_both():
    line = Line(bucket_for(rpm=100, tpm=10_000, share=0.5))
    for _ in range(200):
        line.arrive(10)
    line.run_dry()
    assert 49 <= max(requests for requests, _ in line.peaks) <= 50
    line = Line(bucket_for(rpm=1_000, tpm=10_000, share=0.5))
    for _ in range(20):
        line.arrive(1_000)
    line.run_dry()
    assert max(tokens for _, tokens in line.peaks) == 5_000


def test_a_small_one_after_hours_of_large_ones_waits_no_longer_than_a_window():
    # Each window lets in a little more of large ones than the bucket refills; that must not add up.
    line = Line(bucket_for(tpm=1_000))
    for _ in range(60):
        for _ in range(10):
            line.arrive(100)
        line.advance(line.now + WINDOW)
    line.arrive(1)
    assert line.run_dry() <= WINDOW + 2


# --- taking back and giving back


def test_what_was_not_sent_is_taken_back_as_if_it_had_never_been():
    bucket = bucket_for(rpm=100, tpm=1_000)
    before = bucket.wait(1_000, 0.0), repr(bucket)
    grant = bucket.grant(700, 0.0)
    bucket.cancel(grant)
    assert (bucket.wait(1_000, 0.0), repr(bucket)) == before
    bucket.cancel(grant)
    assert repr(bucket) == before[1]


def test_taking_back_what_no_longer_counts_changes_nothing():
    bucket = bucket_for(tpm=1_000)
    grant = bucket.grant(700, 0.0)
    assert bucket.wait(1_000, WINDOW) == 0.0
    bucket.cancel(grant)
    assert repr(bucket) == "Bucket(requests=None, tokens=0.0)"


def shown(remaining):
    return Limits(limit_tokens=1_000, remaining_tokens=remaining)


# How much of a charge of 900 tokens counts after the reply; 200 were used.
COUNTED = {
    "used: what was not used is given back": ("used", Usage(100, 100), None, 1.0, True, 200),
    "used, but the reply reports no usage": ("used", None, None, 1.0, True, 900),
    "used, but the reply takes longer than a window: not given back twice": (
        "used",
        Usage(100, 100),
        None,
        WINDOW,
        True,
        0,
    ),
    "reserved: the charge is kept": ("reserved", Usage(100, 100), None, 1.0, True, 900),
    "reserved, and the endpoint shows that it gives back": ("reserved", Usage(100, 100), shown(800), 1.0, True, 200),
    "reserved, and the endpoint shows that it does not": ("reserved", Usage(100, 100), shown(100), 1.0, True, 900),
    "a guess at an answer without max_tokens is put right": ("reserved", Usage(100, 100), None, 1.0, False, 200),
}


@pytest.mark.parametrize("case", COUNTED)
def test_what_counts_of_a_charge_after_the_reply(case):
    charge, usage, limits, at, reserved, counted = COUNTED[case]
    bucket = bucket_for(tpm=1_000, charge=charge)
    bucket.ended(bucket.grant(900, 0.0), usage, limits, at, reserved=reserved)
    assert repr(bucket) == f"Bucket(requests=None, tokens={counted:.1f})"
    assert bucket.wait(1_000 - counted, at) == 0.0


def test_what_the_endpoint_shows_is_given_back_once():
    bucket = bucket_for(tpm=1_000)
    grants = [bucket.grant(200, 0.0) for _ in range(3)]
    # The first one's surplus is back by the time of the third; all three learn of it.
    shown = Limits(limit_tokens=1_000, remaining_tokens=550)
    for grant in grants[1:]:
        bucket.ended(grant, Usage(25, 25), None, 1.0)
    bucket.ended(grants[2], Usage(25, 25), shown, 2.0)
    assert repr(bucket) == "Bucket(requests=None, tokens=450.0)"
    bucket.ended(grants[2], Usage(25, 25), shown, 2.0)
    assert repr(bucket) == "Bucket(requests=None, tokens=450.0)"


def test_what_has_left_the_endpoints_minute_but_not_ours_is_not_taken_for_given_back():
    bucket = bucket_for(tpm=1_000)
    bucket.grant(400, 0.0)
    grant = bucket.grant(400, 60.0)
    bucket.ended(grant, Usage(100, 100), Limits(limit_tokens=1_000, remaining_tokens=600), 60.5)
    assert repr(bucket) == "Bucket(requests=None, tokens=800.0)"


@pytest.mark.parametrize("charge", ["reserved", "used"])
def test_more_than_was_reserved_is_charged_in_any_case(charge):
    bucket = bucket_for(tpm=1_000, charge=charge)
    bucket.ended(bucket.grant(100, 0.0), Usage(100, 300), None, 1.0)
    assert repr(bucket) == "Bucket(requests=None, tokens=400.0)"


# --- what the endpoint says


def told(bucket, limits, now=0.0, tokens=10):
    grant = bucket.grant(tokens, now)
    bucket.ended(grant, None, limits, now)


def test_what_others_use_is_left_to_them_until_the_endpoint_says_otherwise():
    bucket = bucket_for(rpm=1_000)
    told(bucket, Limits(limit_requests=1_000, remaining_requests=0, reset_requests=40.0))
    assert bucket.wait(0, 1.0) == pytest.approx(39.0)
    told(bucket, Limits(limit_requests=1_000, remaining_requests=998, reset_requests=40.0), now=2.0)
    assert bucket.wait(0, 2.0) == 0.0


def test_what_others_use_is_believed_for_a_minute_at_most():
    bucket = bucket_for(tpm=1_000)
    told(bucket, Limits(limit_tokens=1_000, remaining_tokens=0))
    assert bucket.wait(10, 0.0) == pytest.approx(MINUTE)
    assert bucket.wait(10, MINUTE) == 0.0


def test_what_is_left_of_a_longer_period_says_nothing_of_the_minute():
    bucket = bucket_for(rpm=1_000)
    told(bucket, Limits(limit_requests=14_400, remaining_requests=370, reset_requests=4_000.0))
    assert bucket.wait(0, 0.0) == 0.0


def test_a_limit_lower_than_the_settings_is_followed_down_and_up_again():
    bucket = bucket_for(rpm=1_000)
    told(bucket, Limits(limit_requests=50, remaining_requests=49, reset_requests=1.0))
    line = Line(bucket)
    for _ in range(100):
        line.arrive(0)
    line.advance(WINDOW - 1)
    assert 48 <= len(line.granted) <= 50
    told(bucket, Limits(limit_requests=5_000, remaining_requests=4_000, reset_requests=1.0), now=WINDOW * 3)
    line = Line(bucket)
    line.now = WINDOW * 5
    for _ in range(1_100):
        line.arrive(0)
    line.advance(WINDOW * 6)
    assert 990 <= len(line.granted) <= 1_001  # the window's ends included


def test_one_larger_than_a_limit_that_was_lowered_is_not_stuck():
    # It was accepted when the limit was not known to be lower; the endpoint will say itself what it makes of it.
    bucket = bucket_for(tpm=100_000)
    told(bucket, Limits(limit_tokens=5_000, remaining_tokens=4_990, reset_tokens=0.1))
    assert bucket.max_tokens == 5_000
    line = Line(bucket)
    line.arrive(8_000)
    assert line.run_dry() == pytest.approx(WINDOW)


def test_a_late_reply_does_not_make_strangers_of_our_own_requests():
    # The headers are of the time at which the endpoint let the request in, when all of the others still counted.
    bucket = bucket_for(tpm=1_000)
    bucket.grant(900, 0.0)
    grant = bucket.grant(100, 1.0)
    shown = Limits(limit_tokens=1_000, remaining_tokens=0, reset_tokens=59.0)
    bucket.ended(grant, Usage(50, 50), shown, 61.5)
    assert bucket.wait(900, 61.5) == 0.0


def test_older_news_does_not_undo_newer():
    bucket = bucket_for(tpm=1_000)
    old = bucket.grant(10, 0.0)
    new = bucket.grant(10, 10.0)
    bucket.ended(new, None, Limits(limit_tokens=1_000, remaining_tokens=0, reset_tokens=60.0), 11.0)
    assert bucket.wait(10, 12.0) == pytest.approx(49.0)
    bucket.ended(old, None, Limits(limit_tokens=1_000, remaining_tokens=990, reset_tokens=1.0), 12.0)
    assert bucket.wait(10, 12.0) == pytest.approx(49.0)


# --- several who share it


def test_small_ones_of_another_leave_room_for_a_large_one_that_waits():
    bucket = bucket_for(tpm=1_000)
    now, large = 0.0, None
    for _ in range(2_000):
        if bucket.wait(10, now, "small") <= 0:
            bucket.grant(10, now, "small")
        if now > 70 and bucket.wait(300, now, "large") <= 0:
            large = bucket.grant(300, now, "large")
            break
        now += 0.1
    assert large is not None
    assert now < 70 + WINDOW


def test_small_ones_of_two_are_granted_in_turn():
    bucket = bucket_for(rpm=100)
    now, granted = 0.0, []
    while now < 300:
        for who in "ab":  # a is always a moment earlier
            if bucket.wait(0, now, who) <= 0:
                bucket.grant(0, now, who)
                granted.append(who)
        now += 0.05
    assert abs(granted.count("a") - granted.count("b")) <= 2
    assert len(granted) >= 480


def test_a_claim_that_nobody_renews_lapses():
    bucket = bucket_for(tpm=1_000)
    bucket.grant(1_000, 0.0, "a")
    assert bucket.wait(1_000, 0.0, "gone") == pytest.approx(WINDOW)
    assert bucket.wait(10, WINDOW, "b") > 0
    assert bucket.wait(10, WINDOW + 1, "b") == 0.0
    bucket.wait(2_000, WINDOW + 1, "gone")
    bucket.disclaim("gone")
    assert bucket.wait(10, WINDOW + 1, "b") == 0.0


# --- whatever happens

COSTS = st.one_of(st.integers(0, 30), st.integers(0, 300), st.integers(0, 1_000))
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), COSTS),
        st.tuples(st.just("pass"), st.floats(0, 90)),
        st.tuples(st.just("cancel"), st.integers(0, 5)),
        st.tuples(st.just("ended"), st.integers(0, 5), st.floats(0, 1), st.integers(-50, 1_500), st.floats(0, 200)),
    ),
    max_size=60,
)


@settings(max_examples=400)
@given(
    events=EVENTS,
    charge=st.sampled_from(["reserved", "used"]),
    rpm=st.sampled_from([None, 3, 25, 400]),
    headers=st.booleans(),
)
@pytest.mark.promise(of="limits")
def test_no_window_ever_holds_more_than_the_limit_and_nobody_is_overtaken_or_stuck(events, charge, rpm, headers):
    line = Line(bucket_for(rpm=rpm, tpm=1_000, charge=charge))
    under_way = deque()
    seen = arrived = 0
    for kind, *values in events:
        if kind == "arrive":
            line.arrive(values[0])
            arrived += 1
        elif kind == "pass":
            line.advance(line.now + values[0])
        else:
            under_way.extend(grant for _, grant, _ in line.granted[seen:])
            seen = len(line.granted)
            if not under_way:
                continue
            under_way.rotate(-values[0])
            grant = under_way.popleft()
            if kind == "cancel":
                line.bucket.cancel(grant)
                line.granted = [entry for entry in line.granted if entry[1] is not grant]
                seen -= 1
                arrived -= 1
            else:
                _, used, remaining, reset = values
                limits = Limits(
                    limit_requests=rpm, remaining_requests=remaining, reset_requests=reset,
                    limit_tokens=1_000, remaining_tokens=remaining, reset_tokens=reset,
                )  # fmt: skip
                usage = Usage(int(grant.tokens * used), 0)
                line.bucket.ended(grant, usage, limits if headers else None, line.now, reserved=bool(values[0] % 2))
            line.serve()
    line.run_dry()
    assert len(line.granted) == arrived
    assert all(tokens <= 1_000 and requests <= (rpm or requests) for requests, tokens in line.peaks)
    arrivals = [arrival for _, _, arrival in line.granted]
    assert arrivals == sorted(arrivals)


@settings(max_examples=100)
@given(costs=st.lists(COSTS.filter(bool), min_size=1, max_size=80), rpm=st.sampled_from([None, 30]))
def test_a_queue_is_served_at_nearly_the_limit_whatever_it_holds(costs, rpm):
    line = Line(bucket_for(rpm=rpm, tpm=1_000))
    for tokens in costs:
        line.arrive(tokens)
    line.run_dry()
    # What does not fit beside its elders wastes at most as much as it is large; the debt of large ones is paid once more.
    windows = 2 * sum(costs) / 1_000 + (len(costs) / rpm if rpm else 0) + 2
    assert line.now <= windows * WINDOW
