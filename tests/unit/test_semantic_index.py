"""The index of a semantic cache: what is nearest, which partition, what has to go."""

import asyncio
import logging
import subprocess
import sys
import threading

import numpy as np
import pytest
from helpers import each

import microbatch as mb
from microbatch.semantic import index as index_module
from microbatch.semantic.guards import signature
from microbatch.semantic.index import NOTHING, Index, Partition
from microbatch.semantic.vectors import Vectors, load_numpy, read_vectors

PLAIN = signature("how do I reset my password")
TWO = signature("how do I reset 2 passwords")


def units(count, dimension=8, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1)[:, None]


def key(number):
    return number.to_bytes(20, "big")


def filled(vectors, facts=PLAIN, **options):
    partition = Partition(None, **options)
    for number, vector in enumerate(vectors):
        partition.add(key(number), facts, vector)
    return partition


async def nearest(partition, vector, facts=PLAIN, own=b""):
    (found,) = await partition.nearest([(vector, facts, own)])
    return found


# --- what is nearest


@each("count", [1, 2, 64, 65, 200, 9_000])
async def test_the_nearest_is_found_as_by_comparing_with_each(count):
    vectors, asked = units(count), units(40, seed=1)
    partition = filled(vectors)
    found = await partition.nearest([(vector, PLAIN, b"") for vector in asked])
    right = (asked @ vectors.T).argmax(axis=1)
    assert [each_.key for each_ in found] == [key(int(number)) for number in right]
    for each_, similarity in zip(found, (asked @ vectors.T).max(axis=1), strict=True):
        assert each_.similarity == pytest.approx(float(similarity), abs=1e-4)


async def test_a_vector_of_another_length_has_no_neighbour_and_harms_no_other_question():
    vectors = units(3)
    partition = filled(vectors[:2])
    found = await partition.nearest(
        [(units(1, 5)[0], PLAIN, b""), (vectors[1], PLAIN, b""), (units(1, 9)[0], TWO, b"")]
    )
    assert [each_.key for each_ in found] == [None, key(1), None]


async def test_removed_entries_are_not_found_and_their_rows_are_used_again():
    vectors = units(300)
    partition = filled(vectors)
    before = partition.nbytes
    for number in range(0, 300, 2):
        partition.remove(key(number))
    assert len(partition) == 150
    for number in range(0, 300, 2):
        found = await nearest(partition, vectors[number])
        assert found.key not in {None, key(number)}
    for number in range(0, 300, 2):
        partition.add(key(1_000 + number), PLAIN, vectors[number])
    assert (await nearest(partition, vectors[4])).key == key(1_004)
    assert partition.nbytes == before
    partition.remove(b"unknown")


async def test_an_entry_with_the_same_key_is_replaced():
    vectors = units(2)
    partition = filled(vectors)
    partition.add(key(0), PLAIN, vectors[1])
    assert len(partition) == 2
    found = await nearest(partition, vectors[0])
    assert found.similarity < 0.99


async def test_the_guards_come_before_the_score():
    vectors = units(50)
    partition = filled(vectors, TWO)
    found = await nearest(partition, vectors[3])
    assert (found.key, found.refused, found.refused_similarity) == (None, "numbers", 1.0)
    partition.add(key(99), PLAIN, vectors[4])
    found = await nearest(partition, vectors[3])
    assert (found.key, found.refused) == (key(99), "numbers")
    found = await nearest(partition, vectors[3], TWO)
    assert (found.key, found.refused) == (key(3), None)


async def test_guards_that_compare_words_come_before_the_score_too():
    vectors = units(2)
    kept, asked = signature("how do I open my account"), signature("how do I close my account")
    assert kept.facts == asked.facts
    found = await nearest(filled(vectors[:1], kept), vectors[0], asked)
    assert (found.key, found.refused) == (None, "opposites")


async def test_hundreds_of_nearer_entries_with_other_facts_do_not_hide_one_that_is_allowed():
    vectors = units(400)
    partition = Partition(None)
    for number, vector in enumerate(vectors):
        partition.add(key(number), signature(f"what is order {number}"), vector)
    partition.add(key(999), PLAIN, -vectors[0])
    assert (await nearest(partition, vectors[0])).key == key(999)


async def test_the_entry_of_the_question_itself_is_passed_over():
    vectors = units(3)
    partition = filled(vectors)
    assert (await nearest(partition, vectors[0], own=key(0))).key != key(0)
    alone = filled(vectors[:1])
    assert await nearest(alone, vectors[0], own=key(0)) == NOTHING


async def test_an_empty_partition_has_nothing():
    assert await nearest(Partition(None), units(1)[0]) == NOTHING
    emptied = filled(units(1))
    emptied.remove(key(0))
    assert await nearest(emptied, units(1)[0]) == NOTHING


async def test_large_partitions_are_searched_in_a_thread_and_small_ones_are_not(monkeypatch):
    seen = []
    real = Vectors.search

    def search(self, *args):
        run = real(self, *args)
        return lambda: (seen.append(threading.current_thread() is threading.main_thread()), run())[1]

    monkeypatch.setattr(Vectors, "search", search)
    partition = filled(units(100))
    await nearest(partition, units(1)[0])
    monkeypatch.setattr(index_module, "_INLINE", 10)
    await nearest(partition, units(1)[0])
    assert seen == [True, False]


async def test_entries_may_change_while_a_thread_searches(monkeypatch):
    monkeypatch.setattr(index_module, "_INLINE", 10)
    vectors = units(200)
    partition = filled(vectors)
    real = Vectors.search

    def search(self, *args):
        run = real(self, *args)

        def changed():
            ranked = run()
            partition.remove(key(5))  # the row of the nearest
            partition.add(key(777), TWO, vectors[6])  # takes it
            return ranked

        return changed

    monkeypatch.setattr(Vectors, "search", search)
    found = await nearest(partition, vectors[5])
    assert found.key not in {None, key(5), key(777)}


# --- what has to go


async def test_without_usearch_the_oldest_has_to_go(monkeypatch):
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    vectors = units(10)
    partition = filled(vectors, most=4)
    assert [*partition.keys] == [key(number) for number in range(6, 10)]
    assert (await nearest(partition, vectors[0])).key != key(0)
    assert partition.add(key(10), PLAIN, vectors[0]) == key(6)


async def test_with_usearch_the_older_ones_are_kept_and_found():
    vectors = units(200, 16)
    partition = filled(vectors, most=20)
    assert len(partition) == 200
    for number in (0, 7, 150, 179, 180, 199):
        assert (await nearest(partition, vectors[number])).key == key(number)
    partition.remove(key(7))
    assert (await nearest(partition, vectors[7])).key not in {None, key(7)}
    partition.add(key(7), TWO, vectors[7])
    found = await nearest(partition, vectors[7])
    assert (found.key not in {None, key(7)}, found.refused) == (True, "numbers")
    assert (await nearest(partition, vectors[7], TWO)).key == key(7)


async def test_the_older_ones_have_a_limit_too():
    vectors = units(100, 16)
    partition = filled(vectors, most=20, most_older=30)
    assert [*partition.keys] == [key(number) for number in range(50, 100)]
    assert (await nearest(partition, vectors[50])).key == key(50)
    assert (await nearest(partition, vectors[49])).key != key(49)


async def test_the_index_says_once_that_it_drops_entries(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    monkeypatch.setattr(index_module, "Partition", lambda tenant: Partition(tenant, most=3))
    index = Index()
    for number, vector in enumerate(units(6)):
        assert index.add(b"p", None, key(number), PLAIN, vector)
    assert (len(index), index.evictions) == (3, 3)
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert "usearch" in caplog.text


def test_the_partition_used_the_longest_time_ago_has_to_go(monkeypatch):
    monkeypatch.setattr(index_module, "_MOST_PARTITIONS", 3)
    index = Index()
    (vector,) = units(1)
    for number in range(3):
        index.add(key(number), None, key(number), PLAIN, vector)
    assert index.get(key(0)) is not None
    index.add(key(3), None, key(3), PLAIN, vector)
    assert [index.get(key(number)) is None for number in range(4)] == [False, True, False, False]
    assert len(index) == 3


def test_all_vectors_together_have_a_limit(monkeypatch):
    monkeypatch.setattr(index_module, "_MOST_BYTES", 10_000)
    index = Index()
    for number, vector in enumerate(units(500)):
        index.add(key(number % 5), None, key(number), PLAIN, vector)
    assert len(index) < 500
    assert index.evictions == 500 - len(index)


def test_vectors_of_another_length_are_not_added():
    index = Index()
    assert index.add(b"p", None, key(0), PLAIN, units(1)[0])
    assert not index.add(b"p", None, key(1), PLAIN, units(1, 9)[0])
    assert len(index) == 1


def test_a_partition_whose_last_entry_is_removed_keeps_neither_memory_nor_the_length_of_its_vectors():
    index = Index()
    for number, vector in enumerate(units(3)):
        index.add(b"p", None, key(number), PLAIN, vector)
    index.remove([key(0), key(2)])
    assert index.get(b"p") is not None
    index.remove([key(1)])
    assert index.get(b"p") is None
    assert index.add(b"p", None, key(1), PLAIN, units(1, 9)[0])
    assert len(index) == 1


async def test_a_search_of_a_partition_that_is_emptied_meanwhile_finds_nothing(monkeypatch):
    monkeypatch.setattr(index_module, "_INLINE", 0)
    index, (vector, other) = Index(), units(2)
    index.add(b"p", None, key(0), PLAIN, vector)
    searching = asyncio.ensure_future(index.get(b"p").nearest([(vector, PLAIN, b"")]))
    await asyncio.sleep(0)
    index.remove([key(0)])
    index.add(b"p", None, key(1), PLAIN, other)
    assert await searching == [NOTHING]


def test_entries_are_removed_by_key_and_by_tenant():
    index = Index()
    for number, vector in enumerate(units(6)):
        index.add(key(number % 2), b"ab"[number % 2 : number % 2 + 1], key(number), PLAIN, vector)
    index.remove([key(0), key(1), b"unknown"])
    assert len(index) == 4
    index.clear(lambda tenant: tenant == b"a")
    assert len(index) == 2
    assert index.get(key(0)) is None
    index.clear()
    assert len(index) == 0


# --- reading vectors


@each(
    "found",
    [
        [[3, 4], (0.6, 0.8), np.array([3e30, 4e30]), np.array([3, 4], dtype=np.int8)],
        np.array([[3.0, 4.0]] * 4),
        ([3, 4] for _ in range(4)),
    ],
)
def test_vectors_of_any_kind_are_read_and_have_length_one(found):
    for vector in read_vectors(found, 4):
        assert vector.dtype == np.float32
        assert vector == pytest.approx([0.6, 0.8])


@each(
    "wrong", [[], [0, 0], [float("nan"), 1], [float("inf"), 1], "ab", None, 3, [[1, 2]], ["a", "b"], [1e200, 1e200], {}]
)
def test_what_is_no_vector_is_none_and_leaves_the_others(wrong):
    none, sound = read_vectors([wrong, [3, 4]], 2)
    assert none is None
    assert sound is not None


@each("found", [[], [[1]], [[1]] * 3, None, 3])
def test_another_number_of_vectors_is_an_error(found):
    with pytest.raises(mb.MalformedAnswer):
        read_vectors(found, 2)


def test_without_numpy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(mb.ConfigError, match=r"microbatch\[semantic\]"):
        load_numpy()
    with pytest.raises(mb.ConfigError, match=r"microbatch\[semantic\]"):
        mb.SemanticCache(mb.MemoryCache(), embed=print)


def test_all_else_needs_neither_numpy_nor_usearch():
    program = """
import sys
sys.modules["numpy"] = sys.modules["usearch"] = None
import asyncio, microbatch as mb, microbatch.cli.main, microbatch.gateway, microbatch.openai
from microbatch.testing import ScriptedTransport

async def main():
    async with mb.Microbatcher(ScriptedTransport(), cache=mb.MemoryCache(), tokens="bytes") as batcher:
        assert (await batcher.submit([{"role": "user", "content": "a"}])).text == "A"
        assert (await batcher.embed("a")).vector

asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", program], check=True)
