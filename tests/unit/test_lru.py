"""Mappings of bounded size drop what was not used for longest."""

from __future__ import annotations

from microbatch.lru import IDLE_EXPIRY, LRU, SharedLRU


def test_the_least_recently_used_key_is_dropped():
    lru = LRU[str, int](2)
    lru.put("a", 1)
    lru.put("b", 2)
    assert lru.get("a") == 1
    lru.put("c", 3)
    assert (lru.get("b"), lru.get("a"), lru.get("c"), len(lru)) == (None, 1, 3, 2)


def test_a_membership_test_is_no_use():
    lru = LRU[str, int](2)
    lru.put("a", 1)
    lru.put("b", 2)
    assert "a" in lru
    lru.put("c", 3)
    assert "a" not in lru


def test_a_value_is_made_once():
    lru = LRU[str, list[int]](1)
    assert lru.get_or_make("a", list) is lru.get_or_make("a", list)


def test_without_a_capacity_entries_leave_only_when_they_are_removed():
    lru = LRU[int, int](None)
    for number in range(10_000):
        lru.put(number, number)
    assert (len(lru), lru.oldest(), lru.pop(0), lru.pop(0), lru.oldest()) == (10_000, (0, 0), 0, None, (1, 1))
    lru.clear()
    assert (len(lru), lru.oldest()) == (0, None)


class Value:
    used = 0.0


def test_a_value_in_use_outlives_its_eviction_and_an_idle_one_does_not():
    shared = SharedLRU[str, Value](2)
    held = shared.get_or_make("held", Value, 0.0)
    for number in range(5):
        shared.get_or_make(f"idle-{number}", Value, 0.0)
    assert shared.get_or_make("held", Value, 1.0) is held
    assert len(shared) == 2
    shared.get_or_make("other", Value, 2.0 + IDLE_EXPIRY)
    assert len(shared) == 2
    assert held in shared.values()
