"""The rules of a shared limit one by one: real buckets and the real script, told the time."""

from __future__ import annotations

import pytest
from limit_world import World

from microbatch.messages import Limits, Usage
from microbatch.transports.permits import WINDOW
from microbatch.transports.shared_bucket import GAP, GRACE, HEARTBEAT, LEASE, LEAVE, LICENCE, LOST

pytestmark = [pytest.mark.slow, pytest.mark.promise(of="shared_limits")]


class Table:
    """Processes a, b, c... that act when the test says so.

    Each is in contact only when told; `beat` is a heartbeat of some.
    """

    def __init__(self, server, names="a", **limits):
        with server.client() as client:
            client.flushall()
        self.world = World(server.client(), (limits.get("rpm"), limits.get("tpm")), 0)
        self.buckets = {}
        self.now = 0.0
        self.join(names)

    def join(self, names):
        """Start processes, and let them become members."""
        for name in names:
            self.world.start()
            self.buckets[name] = self.world.processes[-1].bucket
        self.beat()
        self.pass_time(GRACE + LICENCE + 0.1)

    def told(self, name, order):
        self.world.now = self.now
        return self.world.run(name, order)

    def contact(self, name, *, lost=False, leaving=False):
        """Contact the server as *name*, and return its answer, which *name* does not get if it is *lost*."""
        bucket = self.buckets[name]
        order = bucket.order(self.now, leaving=leaving)
        answer = self.told(name, order)
        if lost:
            bucket.failed(order, "lost", self.now)
        else:
            bucket.answered(order, answer, self.now)
        return answer[0].decode()

    def fail(self, names):
        """Have the contacts of *names* fail."""
        for name in names:
            bucket = self.buckets[name]
            bucket.failed(bucket.order(self.now), "gone", self.now)

    def beat(self, names=None):
        return [self.contact(name) for name in names or self.buckets]

    def pass_time(self, seconds, names=None):
        """Advance the time, with the heartbeats of *names*: None for all, "" for none."""
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now = min(end, self.now + HEARTBEAT / 2)
            self.beat(self.buckets if names is None else names)

    def send(self, name, number=1, tokens=0, *, alone=False):
        """Send up to so many requests as *name*, *alone* without contacts in between, and return the number that went."""
        bucket = self.buckets[name]
        for done in range(number):
            if bucket.wait(tokens, self.now) > 0:
                if not alone:
                    self.contact(name)
                if bucket.wait(tokens, self.now) > 0:
                    bucket.disclaim(None)
                    return done
            bucket.grant(tokens, self.now)
        return number

    def use(self, name, number, tokens=0):
        """Let *name* send so many as soon as possible, with heartbeats of all, and see that they go."""
        for _ in range(10_000):
            number -= self.send(name, number, tokens)
            self.contact(name)
            if not number:
                return
            self.pass_time(HEARTBEAT / 2)
        raise AssertionError(number)

    def server(self, part="state"):
        key = f"test:{{limit}}:{part}"
        return {key.decode(): value for key, value in self.world.client.hgetall(key).items()}

    @property
    def counted(self):
        """Requests that count: in the log, and held by members."""
        held = sum(float(text.split()[2]) for text in self.server("members").values())
        return int(self.server()["total1"]) + held


@pytest.fixture
def table(redis_server):
    return lambda *args, **limits: Table(redis_server, *args, **limits)


# --- blocks


def test_a_block_is_a_quarter_of_the_fair_share_at_most(table):
    world = table("abcdefghijklmnopqrst", rpm=1_600)
    bucket = world.buckets["a"]
    bucket.wait(0, world.now)
    bucket._ahead = 1_000  # it has a use for any number
    world.contact("a")
    assert bucket._held[0] == 1_600 // (4 * 20)


def test_a_block_is_one_request_at_least(table):
    assert table("abcd", rpm=8).send("a") == 1


def test_a_request_that_is_estimated_a_little_higher_than_when_it_was_refused_does_not_wait_again(table):
    world = table("ab", tpm=100_000)
    bucket = world.buckets["a"]
    assert bucket.wait(3_200, world.now) > 0
    world.contact("a")
    assert bucket.wait(3_210, world.now) == 0
    bucket.grant(3_210, world.now)
    assert bucket._held[1] <= 100_000 // (256 * 2)


def test_one_request_may_take_the_whole_limit(table):
    world = table("a", tpm=100_000)
    assert world.send("a", 1, 100_000) == 1
    assert world.buckets["a"]._held[1] == 0


def test_what_is_held_counts_until_it_is_reported_or_given_back(table):
    world = table("ab", rpm=1_000)
    for _ in range(8):
        world.send("a", 4)
        world.contact("a")
        world.pass_time(0.3)
    world.send("a")
    held = world.buckets["a"]._held[0]
    sent = 33
    assert held > 0
    assert world.counted == sent + held
    world.pass_time(2)
    assert world.buckets["a"]._held[0] == 0
    assert world.counted == sent


def test_what_the_dead_held_counts_as_used_when_their_lease_ends_and_comes_back_a_window_later(table):
    world = table("ab", rpm=1_000)
    for _ in range(8):
        world.send("a", 4)
        world.contact("a")
        world.pass_time(0.3)
    before, died = world.counted, world.now
    assert before > 32
    world.pass_time(LEASE + 0.6, "b")
    assert len(world.server("members")) == 1
    assert world.counted == before
    world.pass_time(died + WINDOW + LEASE - 0.5 - world.now, "b")
    assert 0 < world.counted < before  # what it held; what it had sent has gone
    world.pass_time(1.6, "b")
    assert world.counted == 0


def test_what_is_cancelled_or_was_charged_too_much_comes_back(table):
    world = table(rpm=1_000, tpm=100_000)
    bucket = world.buckets["a"]
    world.send("a", 1, 500)
    bucket.wait(400, world.now)
    world.contact("a")
    grant = bucket.grant(400, world.now)
    world.contact("a")
    assert int(world.server()["total2"]) == 900
    bucket.ended(grant, Usage(100, 100), None, world.now)
    world.contact("a")
    assert int(world.server()["total2"]) == 900  # reserved
    bucket.ended(grant, Usage(100, 100), None, world.now, reserved=False)
    world.contact("a")
    assert int(world.server()["total2"]) == 700
    bucket.ended(grant, Usage(100, 300), None, world.now)
    world.contact("a")
    assert int(world.server()["total2"]) == 900
    bucket.cancel(grant)
    world.pass_time(2)
    assert (int(world.server()["total1"]), int(world.server()["total2"])) == (1, 500)


def test_reports_that_are_repeated_late_or_unanswered_count_once(table):
    world = table("ab", rpm=1_000)
    bucket = world.buckets["a"]
    world.send("a", 3)
    early = bucket.order(world.now)
    world.told("a", early)
    bucket.failed(early, "no answer", world.now)
    world.send("a", 2)
    world.contact("a", lost=True)
    world.contact("a")
    counted = 5 + bucket._held[0]
    assert world.counted == counted
    assert world.told("a", early)[0] == b"late"
    assert world.counted == counted


def test_a_grant_whose_answer_is_lost_is_back_with_the_next_contact(table):
    world = table("ab", rpm=1_000)
    world.buckets["a"].wait(0, world.now)
    world.contact("a", lost=True)
    assert world.counted >= 1
    world.buckets["a"].disclaim(None)
    world.contact("a")
    assert world.counted == 0


def test_a_large_request_is_not_overtaken_for_ever(table):
    world = table("ab", tpm=10_000)
    large = world.buckets["b"]
    for _ in range(400):
        world.send("a", 1, 150)
        if large.wait(4_000, world.now) <= 0:
            break
        world.contact("b")
        world.pass_time(0.5)
    else:
        raise AssertionError("overtaken")


def test_a_claim_of_the_dead_lapses(table):
    world = table("ab", tpm=10_000)
    world.use("a", 2, 3_000)
    world.buckets["b"].wait(9_000, world.now)
    world.contact("b")
    assert world.send("a", 1, 400) == 0
    world.pass_time(4, "a")
    assert world.send("a", 1, 400) == 1


def test_what_the_endpoint_reports_of_others_counts_until_its_time_is_over(table):
    world = table("ab", rpm=100)
    bucket = world.buckets["a"]
    bucket.wait(0, world.now)
    world.contact("a")
    grant = bucket.grant(0, world.now)
    shown = Limits(limit_requests=100, remaining_requests=0, reset_requests=20.0)
    bucket.ended(grant, None, shown, world.now)
    world.contact("a")
    assert 90 < float(world.server()["others1"]) <= 99
    world.pass_time(4)
    assert world.send("b", 5) <= 1
    world.pass_time(20)
    assert world.send("b", 2) == 2


def test_a_burst_of_another_process_is_not_taken_for_that_of_others(table):
    world = table("ab", tpm=100_000)
    bucket = world.buckets["a"]
    bucket.wait(1_000, world.now)
    world.contact("a")
    grant = bucket.grant(1_000, world.now)
    assert world.send("b", 5, 8_000) == 5
    shown = Limits(limit_tokens=100_000, remaining_tokens=100_000 - 41_000, reset_tokens=25.0)
    bucket.ended(grant, None, shown, world.now)
    world.contact("a")
    assert float(world.server()["others2"]) == 0
    begun = world.now
    world.use("b", 6, 8_000)
    assert world.now - begun < 10


def test_a_lower_limit_of_the_endpoint_is_kept(table):
    world = table(rpm=1_000)
    bucket = world.buckets["a"]
    bucket.wait(0, world.now)
    world.contact("a")
    bucket.ended(bucket.grant(0, world.now), None, Limits(limit_requests=50, remaining_requests=49), world.now)
    begun = world.now
    world.use("a", 49)
    assert world.now - begun > 50


# --- without the server


def share(bucket):
    return bucket._part, bucket._shares[0]


def test_parts_never_add_up_to_more_than_the_whole_while_processes_come_and_answers_are_lost(table):
    world = table("ab", rpm=1_000)
    for number, name in enumerate("cdefg"):
        world.world.start()
        world.buckets[name] = world.world.processes[-1].bucket
        world.contact(name)
        world.contact("abc"[number % 3], lost=number % 2 == 0)
        buckets = world.buckets.values()
        assert sum(bucket._part for bucket in buckets) <= 1 + 1e-9
        assert sum(bucket._shares[0] for bucket in buckets) + world.counted <= 1_000
        world.now += 0.3
    world.pass_time(3)
    assert [bucket._part for bucket in world.buckets.values()] == [pytest.approx(1 / 7)] * 7


def test_one_does_not_draw_what_another_was_shown_as_its_share(table):
    world = table("ab", tpm=100_000)
    assert world.buckets["b"]._shares[1] > 49_000
    assert world.send("a", 1, 60_000) == 0
    world.buckets["a"].wait(60_000, world.now)
    world.contact("a")
    world.contact("b")  # learns that less is left to it, and goes by the old figure until it has said so
    assert world.send("a", 1, 60_000) == 0
    world.buckets["a"].wait(60_000, world.now)
    world.contact("a")
    world.contact("b")
    assert world.send("a", 1, 60_000) == 1


def lose(world, names):
    """Let the server be gone for *names* until they go on without it."""
    end = world.now + LOST + 1
    while world.now < end:
        world.now += 0.5
        world.fail(names)


def test_alone_one_reuses_its_own_and_its_share_and_never_more_than_its_part(table):
    world = table("ab", rpm=1_000)
    world.use("a", 400)
    world.pass_time(1)
    part, shown = share(world.buckets["a"])
    assert (part, 0 < shown <= 300) == (0.5, True)
    lose(world, "ab")
    own = sum(slot.spent[0] for slot in world.buckets["a"]._slots)
    assert world.send("a", 1_000, alone=True) == shown
    sent, begun = shown, world.now
    while world.now < begun + WINDOW + 5:
        world.now += 0.5
        world.fail("ab")
        sent += world.send("a", 1_000, alone=True)
        left = sum(slot.spent[0] for slot in world.buckets["a"]._slots if not slot.alone)
        if world.now < begun + WINDOW - 10:
            assert sent == min(500, own - left + shown)
    assert sent >= 500
    assert sum(slot.spent[0] for slot in world.buckets["a"]._slots) <= 500


def test_two_that_used_unequal_amounts_stay_within_the_limit_after_the_first_minute_alone(table):
    world = table("ab", rpm=1_000)
    world.use("a", 500)
    world.pass_time(1)
    sent = []
    lose(world, "ab")
    for _ in range(400):
        world.now += 0.5
        world.fail("ab")
        sent += [world.now] * (world.send("a", 1_000, alone=True) + world.send("b", 1_000, alone=True))
        assert sum(at > world.now - 60 for at in sent) <= 1_000
    assert sum(at > world.now - 60 for at in sent) > 900


def test_one_that_is_new_has_nothing_without_the_server(table):
    world = table("a", rpm=1_000)
    world.world.start()
    world.buckets["b"] = world.world.processes[-1].bucket
    for _ in range(200):
        world.now += 0.5
        world.fail("ab")
        assert world.buckets["b"].wait(0, world.now) > 0


def test_a_short_silence_changes_nothing(table):
    world = table("ab", rpm=1_000)
    world.now += GAP - 0.1
    assert world.beat() == ["settled", "settled"]


def test_after_an_outage_all_have_to_report_before_anything_is_granted(table):
    world = table("abc", rpm=1_000)
    world.use("a", 100)
    lose(world, "abc")
    sent = world.send("a", 1_000, alone=True) + world.send("b", 1_000, alone=True)
    assert sent > 0
    assert world.beat("ab") == ["unsettled", "unsettled"]
    assert world.beat("ab") == ["unsettled", "unsettled"]
    assert world.counted == 100 + sent
    assert world.contact("c") == "unsettled"
    assert world.buckets["c"].wait(0, world.now + LICENCE - 0.1) == 0
    assert world.buckets["c"].wait(0, world.now + LICENCE + 0.1) > 0  # its licence ends before anything is granted
    assert world.contact("c") == "settling"
    world.pass_time(LICENCE + 0.1)
    assert world.beat() == ["settled"] * 3


def test_one_that_does_not_come_back_is_charged_its_part(table):
    world = table("abcd", rpm=1_000)
    world.use("a", 10)
    lose(world, "abcd")
    world.pass_time(LEASE + 0.6, "abc")
    world.pass_time(LICENCE + 0.6, "abc")
    assert world.beat("abc") == ["settled"] * 3
    assert world.counted == 10 + 250
    assert len(world.server("members")) == 3


def test_if_none_comes_back_a_new_one_waits_a_moment_only(table):
    world = table("ab", rpm=1_000)
    world.use("a", 10)
    world.buckets.clear()
    world.now += 5
    world.join("c")
    assert world.contact("c") == "settled"
    assert world.counted >= 10


@pytest.mark.parametrize("late", [1.0, GRACE + LICENCE + 1.0])
def test_a_server_that_lost_its_data_grants_nothing_before_all_it_forgot_is_over(table, late):
    """A new process comes first and knows nothing; the others come in the time that it has to wait, or after it."""
    world = table("ab", rpm=1_000)
    world.use("a", 300)
    world.pass_time(1)
    world.world.empty()
    begun = world.now
    world.world.start()
    world.buckets["c"] = world.world.processes[-1].bucket
    while world.now < begun + late:
        waits = world.now < begun + GRACE - 0.1
        assert world.contact("c") in (("unsettled",) if waits else ("unsettled", "settling", "settled"))
        world.now += 0.5
    world.pass_time(3)
    assert world.counted == 300  # reported again
    while world.now < begun + WINDOW - 2:
        assert set(world.beat()) == {"unsettled"}
        world.pass_time(1)
    world.pass_time(5)
    assert set(world.beat()) == {"settled"}


@pytest.mark.parametrize("part", ["state", "members", "log", "amounts"])
def test_a_part_of_the_data_that_is_evicted_counts_as_a_loss(table, part):
    world = table("ab", rpm=1_000)
    world.use("a", 30)
    world.world.client.delete(f"test:{{limit}}:{part}")
    assert world.contact("a") == "unsettled"
    world.pass_time(2)
    assert world.counted == 30
    world.pass_time(WINDOW + 3)
    assert set(world.beat()) == {"settled"}


@pytest.mark.parametrize("jump", [-3_600.0, -30.0, -1.0, 10.0, 90.0])
def test_a_clock_that_is_set_makes_nothing_forgotten_and_nothing_stuck(table, jump):
    world = table("ab", rpm=1_000)
    world.use("a", 30)
    world.world.clock_offset += jump
    world.beat()
    world.pass_time(3)
    assert world.counted == 30
    world.pass_time(2 * WINDOW + max(0.0, -jump) % 60)
    assert set(world.beat()) == {"settled"}
    assert world.counted == 0


def test_one_that_leaves_takes_nothing_along_and_one_not_used_for_long_leaves(table):
    world = table("ab", rpm=1_000)
    world.use("a", 10)
    world.contact("a", leaving=True)
    assert world.counted == 10
    assert len(world.server("members")) == 1
    assert not world.buckets["b"].is_over(world.now)
    assert world.buckets["b"].is_over(world.now + LEAVE)
