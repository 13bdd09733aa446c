"""Back-off doubles up to its bound, starts again after a success, and is spread by full jitter."""

from __future__ import annotations

import pytest

from microbatch.transience import Backoff


def test_delays_double_up_to_the_longest_and_start_again_after_a_reset():
    backoff = Backoff(1.0, 5.0)
    assert [backoff.next() for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    backoff.reset()
    assert (backoff.limit, backoff.next(), backoff.limit) == (0.0, 1.0, 1.0)


def test_full_jitter_is_a_random_part_of_the_bound_that_grows_all_the_same():
    draws = iter([0.5, 0.25, 1.0])
    backoff = Backoff(1.0, 60.0, draw=lambda: next(draws))
    assert [(backoff.next(), backoff.limit) for _ in range(3)] == [(0.5, 1.0), (0.5, 2.0), (4.0, 4.0)]


@pytest.mark.parametrize(("first", "longest", "delay"), [(3.0, 2.0, 2.0), (0.0, 2.0, 0.0), (1.0, 0.0, 0.0)])
def test_no_delay_exceeds_the_longest(first, longest, delay):
    assert [Backoff(first, longest).next() for _ in range(2)] == [delay, delay]


def test_the_delay_stays_a_number_after_very_many_failures():
    backoff = Backoff(0.5, float("inf"))
    assert all(backoff.next() > 0 for _ in range(2_000))
