"""A lane fills its batches in order, within a budget that is exact although hardly anything is counted."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microbatch.batching.estimates import Budget
from microbatch.batching.lane import Lane
from microbatch.batching.lane_history import LaneHistories, LaneHistory, TokenScale
from microbatch.batching.ticket import NEVER, NORMAL, FlushReason, InFlightIndex, Spec, Ticket
from microbatch.errors import ConfigError
from microbatch.policy import RetryPolicy
from microbatch.prompt.compose import ID_TOKENS, item_line, output_reserve
from microbatch.schema.answer_type import answer_type
from microbatch.transports.accounts import Account

TEXT = answer_type(str)
SPEC = Spec(None, TEXT, None, {}, {}, (), (), [], None, None, NORMAL, shared_chars=0)
ACCOUNT = Account(RetryPolicy(), None, None)


class Caller:
    """Stands in for a future: a lane only asks whether it is done."""

    def __init__(self):
        self.gone = False

    def done(self):
        return self.gone


class Owner:
    """Stands in for the table of lanes."""

    def changed(self, lane):
        pass

    left = rested = changed


class Counted:
    """Counts tokens as told, a fraction of the bytes by default, and keeps what it was asked."""

    def __init__(self, tokens=lambda text: max(1, len(text.encode()) // 4)):
        self.tokens = tokens
        self.asked: Counter[str] = Counter()

    def __call__(self, text):
        self.asked[text] += 1
        return self.tokens(text)


def ticket(text, due_at=NEVER):
    line = item_line(text)
    return Ticket(Caller(), TEXT, 0.0, None, None, None, SPEC, line, patience=due_at)


def sized(number, size):
    """Return a ticket whose line has *size* bytes with all that is charged but its id."""
    return ticket(f"{number:04d}".ljust(max(4, size - 4), "x"))


def lane_of(*, size=16, tokens=1_000, count=None, reason=FlushReason.SIZE):
    return Lane(
        *(SPEC, ACCOUNT, LaneHistory(), Budget(size, tokens, reason)),
        count=count or Counted(), index=InFlightIndex(), calls=None, owner=Owner(),
    )  # fmt: skip


def take(lane):
    taken = lane.take(None)
    return taken.tickets, taken.reason


def filled(tickets, **options):
    lane = lane_of(**options)
    for each in tickets:
        lane.add(each)
    return lane


def drained(lane):
    lane.schedule_flush(FlushReason.DRAIN, everything=True)
    batches = []
    while lane.due is not None:
        batches.append(take(lane))
    return batches


def leave(lane, *tickets):
    for each in tickets:
        each.future.gone = True
        lane.discard(each)


# --- the token budget


def test_short_requests_are_never_tokenized():
    count = Counted()
    lane = filled([sized(number, 40) for number in range(100)], tokens=16 * 48, count=count)
    assert [len(tickets) for tickets, _ in drained(lane)] == [16] * 6 + [4]
    assert not count.asked


def test_only_the_largest_bounds_are_counted_and_only_until_the_batch_fits():
    count = Counted(lambda text: 10)
    small, large, larger = sized(1, 50), sized(2, 300), sized(3, 500)
    lane = filled([small, large], tokens=500, count=count)
    assert not count.asked
    lane.add(larger)  # 50 + 300 + 500 + 3 ids are too many; with 10 for the largest they are not
    assert [each.counted for each in (small, large, larger)] == [None, None, 10]
    assert lane.due is None
    lane.add(sized(4, 300))
    assert [each.counted for each in (small, large, larger)] == [None, 10, 10]
    assert lane.due is None


def test_a_bound_exactly_on_the_budget_is_within_it():
    lane = filled([sized(1, 100), sized(2, 100)], tokens=200 + 2 * ID_TOKENS, count=Counted(len))
    assert lane.due is None
    lane = filled([sized(1, 100), sized(2, 101)], tokens=200 + 2 * ID_TOKENS, count=Counted(len))
    assert lane.due is FlushReason.TOKENS


def test_what_does_not_fit_leaves_with_the_next_batch():
    first, second, third = (sized(number, 100) for number in range(3))
    lane = filled([first, second, third], tokens=2 * 108, count=Counted(len))
    assert take(lane) == ([first, second], FlushReason.TOKENS)
    assert lane.due is None
    assert lane.waiting() == [third]


def test_a_line_is_counted_as_it_stands_behind_its_id():
    count = Counted()
    filled([ticket('say "é"'), ticket("x" * 200)], tokens=70, count=count)
    assert set(count.asked) == {' "say \\"é\\""\n', f' "{"x" * 200}"\n'}


def test_a_counter_that_fails_leaves_the_bound_in_force():
    def broken(text):
        raise ConfigError("the `tokens` function raised ValueError")

    lane = filled([sized(number, 100) for number in range(3)], tokens=2 * 108, count=broken)
    assert lane.due is FlushReason.TOKENS
    assert len(take(lane)[0]) == 2


@settings(max_examples=300)
@given(data=st.data())
def test_no_batch_exceeds_its_budget_in_exact_counts_and_none_could_hold_the_next_request(data):
    size = data.draw(st.integers(1, 12), "size")
    budget = data.draw(st.integers(60, 2_000), "budget")
    share = data.draw(st.sampled_from([0.0, 0.2, 0.3, 0.9, 1.0]), "tokens a byte")
    exact: dict[str, int] = {}

    def tokens(text):
        most = len(text.encode())
        return exact.setdefault(text, max(1, min(most, round(most * share) + data.draw(st.integers(-3, 3)))))

    count = Counted(tokens)
    lane = lane_of(size=size, tokens=budget, count=count)
    # The collector sends alone what exceeds the budget by itself.
    lengths = data.draw(st.lists(st.integers(8, min(budget - ID_TOKENS, 400)), max_size=40), "lengths")
    queued = [sized(number, length) for number, length in enumerate(lengths)]
    batches = []
    for each in queued:
        lane.add(each)
        if data.draw(st.booleans(), "a slot is free"):
            while lane.due is not None:
                batches.append(take(lane))
    batches += drained(lane)

    assert [each for tickets, _ in batches for each in tickets] == queued, "order of arrival"
    assert all(asked == 1 for asked in count.asked.values()), "each is counted at most once"

    def charged(tickets):
        return sum(tokens(f" {each.line.decode()}\n") + ID_TOKENS for each in tickets)

    following = iter([tickets[0] for tickets, _ in batches[1:]])
    for tickets, reason in batches:
        following_one = next(following, None)
        assert 1 <= len(tickets) <= size
        assert charged(tickets) <= budget
        if reason is FlushReason.SIZE:
            assert len(tickets) == size
        if reason is FlushReason.TOKENS:
            assert charged([*tickets, following_one]) > budget


@given(
    lengths=st.lists(st.integers(8, 200), max_size=40), gone=st.sets(st.integers(0, 39)), tokens=st.integers(210, 900)
)
def test_cancelled_requests_leave_as_if_they_had_never_come(lengths, gone, tokens):
    everybody = [sized(number, length) for number, length in enumerate(lengths)]
    stayed = [each for number, each in enumerate(everybody) if number not in gone]
    lane = filled(everybody, size=5, tokens=tokens)
    leave(lane, *(each for number, each in enumerate(everybody) if number in gone))
    assert lane.live == len(stayed)
    assert lane.waiting() == stayed
    alone = filled(
        [sized(number, length) for number, length in enumerate(lengths) if number not in gone], size=5, tokens=tokens
    )
    assert lane.due == alone.due
    assert [[each.text for each in tickets] for tickets, _ in drained(lane)] == [
        [each.text for each in tickets] for tickets, _ in drained(alone)
    ]


# --- when it is due


def test_a_lane_is_due_at_its_size():
    lane = filled([ticket(str(number)) for number in range(15)])
    assert lane.due is None
    lane.add(ticket("15"))
    assert lane.due is FlushReason.SIZE
    tickets, reason = take(lane)
    assert (len(tickets), reason, lane.due, lane.live) == (16, FlushReason.SIZE, None, 0)


def test_the_reason_is_output_when_the_expected_reply_binds_the_size():
    lane = filled([ticket("a"), ticket("b")], size=2, reason=FlushReason.OUTPUT)
    assert take(lane)[1] is FlushReason.OUTPUT


def test_a_due_lane_stays_open_and_leaves_as_full_batches():
    lane = filled([ticket(str(number)) for number in range(40)])
    assert [(len(tickets), reason) for tickets, reason in (take(lane), take(lane))] == [(16, FlushReason.SIZE)] * 2
    assert lane.due is None
    assert lane.live == 8


def test_an_owed_batch_leaves_once_and_what_comes_after_waits():
    lane = filled([ticket("a")])
    lane.schedule_flush(FlushReason.TIMEOUT)
    lane.add(ticket("b"))
    tickets, reason = take(lane)
    assert (len(tickets), reason) == (2, FlushReason.TIMEOUT)
    lane.add(ticket("c"))
    assert lane.due is None


def test_everything_owed_leaves_in_as_many_batches_as_it_takes():
    lane = filled([ticket(str(number)) for number in range(40)])
    lane.schedule_flush(FlushReason.EXPLICIT, everything=True)
    taken = [take(lane) for _ in range(3)]
    assert [len(tickets) for tickets, _ in taken] == [16, 16, 8]
    assert [reason for _, reason in taken] == [FlushReason.SIZE, FlushReason.SIZE, FlushReason.EXPLICIT]
    lane.add(ticket("later"))
    assert lane.due is None


def test_an_empty_lane_is_never_due():
    lane = lane_of()
    lane.schedule_flush(FlushReason.EXPLICIT, everything=True)
    assert lane.due is None
    with pytest.raises(AssertionError):
        take(lane)


def test_it_falls_due_at_the_earliest_time_of_its_next_batch():
    lane = filled([ticket("a", due_at=5.0), ticket("b", due_at=3.0), ticket("c")])
    assert lane.due_at == 3.0
    leave(lane, lane.waiting()[1])
    assert lane.due_at == 5.0
    leave(lane, lane.waiting()[0])
    assert lane.due_at == NEVER
    leave(lane, lane.waiting()[0])
    assert lane.abandoned


def test_a_batch_taken_leaves_the_time_to_the_next():
    lane = filled([ticket("a", due_at=1.0), ticket("b", due_at=2.0), ticket("c", due_at=3.0)], size=2)
    take(lane)
    assert lane.due_at == 3.0


def test_a_lane_is_abandoned_only_when_nothing_waits_and_nothing_is_under_way():
    lane = filled([ticket("a")])
    assert not lane.abandoned
    lane.schedule_flush(FlushReason.IDLE)
    lane.in_flight += 1
    take(lane)
    assert not lane.abandoned
    lane.in_flight -= 1
    assert lane.abandoned


def test_another_budget_makes_a_waiting_lane_due_or_not():
    lane = filled([ticket(str(number)) for number in range(10)])
    lane.rebudget(Budget(8, 1_000))
    assert lane.due is FlushReason.SIZE
    lane.rebudget(Budget(12, 1_000))
    assert lane.due is None
    lane.rebudget(Budget(16, 40, FlushReason.OUTPUT))
    assert lane.due is FlushReason.TOKENS


def test_taking_a_ticket_tells_bulk_work_and_its_caller_that_it_is_no_longer_queued():
    told = []
    each = ticket("a")
    each.bulk, each.on_taken = True, told.append
    lane = filled([each])
    lane.schedule_flush(FlushReason.IDLE)
    take(lane)
    assert each.queue is None
    assert told == [each]


# --- callers who leave


def test_a_caller_who_left_a_full_lane_makes_it_wait_again():
    lane = filled([ticket(str(number)) for number in range(16)])
    leave(lane, lane.waiting()[7])
    assert lane.due is None
    lane.add(ticket("16"))
    assert lane.due is FlushReason.SIZE
    assert [each.text for each in take(lane)[0]] == [str(number) for number in range(17) if number != 7]


def test_whoever_waited_behind_a_full_batch_moves_up():
    lane = filled([sized(number, 100) for number in range(4)], tokens=2 * 108, count=Counted(len))
    leave(lane, lane.waiting()[0])
    assert [each.text[:4] for each in take(lane)[0]] == ["0001", "0002"]


def test_callers_who_left_are_forgotten_however_many_they_are():
    lane = filled([ticket(str(number)) for number in range(5_000)])
    leave(lane, *lane.waiting()[1:])
    assert lane.live == 1
    assert len(lane._pending) < 100


@pytest.mark.parametrize("gone", [[0], [1], [2], [0, 1], [0, 1, 2]])
def test_a_caller_who_left_in_this_very_turn_is_passed_over(gone):
    """A cancelled task tells the lane only when it runs; the scheduler may take a batch before that."""
    tickets = [ticket(str(number)) for number in range(3)]
    lane = filled(tickets)
    lane.schedule_flush(FlushReason.IDLE, everything=True)
    for number in gone:
        tickets[number].future.gone = True
    taken = take(lane)[0] if lane.due is not None else []
    assert taken == [each for number, each in enumerate(tickets) if number not in gone]
    assert lane.due is None


def test_a_caller_who_left_in_this_very_turn_makes_no_room_beyond_the_budget():
    tickets = [sized(0, 20), sized(1, 100), sized(2, 200)]
    lane = filled(tickets, tokens=250, count=Counted(len))
    assert lane.due is FlushReason.TOKENS
    tickets[0].future.gone = True
    assert take(lane)[0] == [tickets[1]]


def test_a_flush_that_lost_its_last_caller_is_not_owed_to_the_next():
    lane = filled([ticket("a")])
    lane.in_flight = 1  # so that the lane stays
    lane.schedule_flush(FlushReason.EXPLICIT, everything=True)
    leave(lane, lane.waiting()[0])
    lane.add(ticket("b"))
    assert lane.due is None


# --- what a lane remembers


def test_replies_cut_by_the_token_limit_halve_the_batch_and_complete_ones_grow_it_back():
    history = LaneHistory()
    history.grow(16, 16)
    assert history.batch_size is None
    history.halve(16)
    assert history.batch_size == 8
    history.halve(16)  # another call of the same size, sent before
    assert history.batch_size == 8
    history.halve(8)
    assert history.batch_size == 4
    history.grow(3, 16)
    assert history.batch_size == 4
    for expected in (5, 6, 7):
        history.grow(history.batch_size, 16)
        assert history.batch_size == expected
    history.batch_size = 15
    history.grow(15, 16)
    assert history.batch_size is None
    history.batch_size = 3
    history.halve(3)
    history.halve(2)
    assert history.batch_size == 2  # requests that go alone would teach nothing, and the lane would never grow again


def test_the_answer_length_is_the_95th_percentile_of_the_latest():
    history = LaneHistory()
    assert history.answer_tokens == 32
    history.record_answers(list(range(1, 21)))
    assert history.answer_tokens == 20
    history.record_answers([4] * 64)
    assert history.answer_tokens == 4
    history.record_answers([0] * 64)
    assert history.answer_tokens == 1


def test_what_was_learned_is_kept_for_the_lanes_used_last():
    memory = LaneHistories(LaneHistory, size=3)
    first = memory.of(("a", 1))
    for key in ("b", "c"):
        memory.of(key)
    assert memory.of(("a", 1)) is first
    memory.of("d")  # "b" was used longest ago
    assert memory.of(("a", 1)) is first
    first.batch_size = 4
    for key in ("x", "y", "z"):
        memory.of(key)
    assert memory.of(("a", 1)).batch_size is None


@pytest.mark.parametrize(("max_tokens", "reserve"), [(1, 18), (10, 28), (100, 136), (101, 138)])
def test_an_answers_reserve_is_its_limit_with_room_for_escapes_and_framing(max_tokens, reserve):
    assert output_reserve(max_tokens) == reserve


def test_a_long_prompt_shows_the_ratio_of_the_counts_and_a_short_one_what_is_added():
    scale = TokenScale()
    assert scale.of(1_000) == 1_000
    scale.learn(1_000, 1_500)  # the first report counts fully
    assert scale.of(1_000) == 1_500
    scale.learn(1_000, 500)
    assert scale.of(1_000) == 1_000
    short = TokenScale()
    short.learn(10, 30)
    assert short.of(10) == 30
    assert short.of(1_000) == 1_020
    short.learn(1_000, 10_000)
    assert short.of(1_000) < 3_000  # no report is believed to more than four times our count


def test_a_refused_prompt_raises_the_scale_and_never_lowers_it():
    scale = TokenScale()
    scale.raise_to(1_000, 2_000)
    assert scale.of(1_000) == 2_000
    scale.raise_to(1_000, 1_500)
    assert scale.of(1_000) == 2_000
    scale.raise_to(10, 1_000)
    assert scale.of(10) == 40


def test_a_suspended_lane_tries_combining_again_and_one_fruitless_reply_suspends_it_once_more():
    history = LaneHistory()
    for _ in range(2):
        assert not history.is_useless(complete=True)
        history.record_outcome(good=False, judged=True)
    assert history.is_useless(complete=False)
    history.suspend()
    assert not history.is_useless(complete=True)
    while history.suspended_for:
        assert history.consume_suspension()
    assert not history.consume_suspension()
    assert not history.is_useless(complete=True)
    history.record_outcome(good=False, judged=True)
    assert history.is_useless(complete=True)
