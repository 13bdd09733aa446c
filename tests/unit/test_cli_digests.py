"""The set of digests in little memory, against Python's own."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from microbatch.cli.digests import Digests
from microbatch.cli.reading.input import id_digest


@pytest.mark.parametrize("spread", [2**128, 2**64, 40])
@pytest.mark.parametrize("seed", range(5))
def test_it_holds_what_a_set_holds_and_numbers_it_in_order(seed, spread):
    chance = random.Random(f"{seed} {spread}")
    pool = [chance.randrange(spread) << (128 - spread.bit_length() + 1) // 2 for _ in range(60)]
    digests, model, numbers, added = Digests(), set(), {}, 0
    for _ in range(4_000):
        digest = chance.choice(pool)
        if chance.random() < 0.5:
            new = digest not in model
            numbers[digest] = added if new else numbers[digest]
            added += new
            model.add(digest)
            assert digests.add(digest) == numbers[digest]
        else:
            model.discard(digest)
            digests.discard(digest)
        assert len(digests) == len(model)
    for digest in pool:
        assert (digest in digests) == (digest in model)
        assert digests.number(digest) == (numbers[digest] if digest in model else None)


def test_what_is_discarded_takes_no_slots_for_ever():
    digests = Digests()
    for digest in range(2_000):
        digests.add(digest)
        digests.discard(digest)
    assert len(digests._slots) == 8
    assert "x" not in digests


def test_a_digest_takes_less_than_half_of_what_it_takes_in_a_set():
    def memory(kind):
        tracemalloc.start()
        try:
            held = kind(id_digest(str(number)) for number in range(50_000))
            return tracemalloc.get_traced_memory()[0] / len(held)
        finally:
            tracemalloc.stop()

    assert memory(Digests) * 2.5 < memory(set)
