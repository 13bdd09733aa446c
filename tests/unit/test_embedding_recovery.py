"""Texts that a call has left without a vector: which calls ask again, and how each text ends."""

import asyncio
import math
import random
from array import array

import pytest
from helpers import batcher_for, each
from vectors import LENGTH, VectorTransport, is_right, vector_of

import microbatch as mb

MANY = 64


def texts(count=MANY):
    return [f"text {number}" for number in range(count)]


async def embed_all(batcher, wanted, **options):
    return await asyncio.gather(*(batcher.embed(text, **options) for text in wanted), return_exceptions=True)


def swapped(pairs):
    return [pairs[0], (pairs[0][0], pairs[1][1]), *pairs[2:]]


def at(place, change):
    return lambda pairs: [*pairs[:place], change(pairs[place]), *pairs[place + 1 :]]


UNTRUSTED = {
    "missing": lambda pairs: pairs[1:],
    "renumbered": lambda pairs: [(index - 1, vector) for index, vector in pairs[1:]],
    "duplicate": swapped,
    "extra": lambda pairs: [*pairs, (len(pairs), pairs[0][1])],
    "beyond": at(0, lambda pair: (10_000, pair[1])),
    "negative": at(0, lambda pair: (-1, pair[1])),
    "no index": at(0, lambda pair: (None, pair[1])),
    "no indices": lambda pairs: [(None, vector) for _, vector in pairs],
    "counted from one": lambda pairs: [(index + 1, vector) for index, vector in pairs],
    "strings": lambda pairs: [(str(index), vector) for index, vector in pairs],
    "empty": lambda pairs: [],
    "lengths differ": at(0, lambda pair: (pair[0], pair[1][:-1])),
    "not pairs": lambda pairs: [vector for _, vector in pairs],
    "nothing": lambda pairs: None,
}
"""Replies to a first list after which nothing is known of any text."""

SPOILED = {
    "unreadable": lambda pair: (pair[0], None),
    "not finite": lambda pair: (pair[0], array("f", [math.nan] * LENGTH)),
    "infinite": lambda pair: (pair[0], array("f", [math.inf] * LENGTH)),
    "no numbers": lambda pair: (pair[0], array("f")),
}
"""Vectors that cannot be used, in replies that hold others that can."""


def conserved(batcher, transport, found):
    """Check that all that was reported is on a vector or unclaimed."""
    stats = batcher.stats()
    shares = sum(one.usage.prompt_tokens for one in found if isinstance(one, mb.Embedding))
    assert shares + stats.unclaimed.prompt_tokens == stats.prompt_tokens == transport.tokens
    assert stats.queued == stats.in_flight == 0
    assert stats.items == stats.answered + stats.failed + stats.cancelled


# --- replies that are worth nothing


@each("kind", UNTRUSTED)
async def test_a_list_with_any_fault_of_count_or_index_is_asked_again_and_nothing_of_it_is_handed_out(kind):
    transport = VectorTransport(lambda number, _, pairs: pairs if number else UNTRUSTED[kind](pairs))
    async with batcher_for(transport) as batcher:
        found = await embed_all(batcher, texts())
        conserved(batcher, transport, found)
        stats = batcher.stats()
    assert all(is_right(*pair) for pair in zip(found, texts(), strict=True))
    assert transport.sizes == [64, 32, 32]
    assert stats.fallback_calls == 2
    assert stats.damage_usage.prompt_tokens == transport.tokens  # of the calls that brought nothing, or asked again
    assert {one.batch_size for one in found} == {32}


@each(
    "kind", [kind for kind in UNTRUSTED if kind != "lengths differ"]
)  # of which one text is wrong, once a length is known
async def test_a_model_whose_lists_are_always_wrong_is_asked_for_one_text_at_a_time(kind):
    transport = VectorTransport(lambda _, inputs, pairs: UNTRUSTED[kind](pairs) if len(inputs) > 1 else pairs)
    async with batcher_for(transport) as batcher:
        found = await embed_all(batcher, texts())
        assert all(is_right(*pair) for pair in zip(found, texts(), strict=True))
        assert len(transport.calls) <= 2 * MANY
        before = len(transport.calls)
        await embed_all(batcher, [f"more {text}" for text in texts()])
        assert batcher.stats().lanes_parted == 1
        assert len(transport.calls) - before <= 2 * MANY
        before = len(transport.calls)
        found = await embed_all(batcher, [f"again {text}" for text in texts(200)])
        assert transport.sizes[before:] == [1] * 200
    assert all(is_right(one, f"again {text}") for one, text in zip(found, texts(200), strict=True))


@each("kind", [kind for kind in UNTRUSTED if kind not in ("duplicate", "no indices", "counted from one", "strings")])
async def test_what_is_wrong_alone_twice_ends_with_an_error(kind):
    if kind in ("renumbered", "beyond", "negative", "no index", "lengths differ"):
        return  # no fault of a list of one
    transport = VectorTransport(lambda _, __, pairs: UNTRUSTED[kind](pairs))
    async with batcher_for(transport) as batcher:
        found = await embed_all(batcher, texts())
        conserved(batcher, transport, found)
    assert {type(one) for one in found} == {mb.MalformedAnswer}
    assert len({id(one) for one in found}) == MANY
    assert len(transport.calls) <= 2 * MANY + 7
    assert all("twice" in str(one) for one in found)
    assert all(one.attempts >= 4 for one in found)


async def test_a_server_that_leaves_a_text_out_costs_a_search_for_it():
    def spoil(number, inputs, pairs):
        kept = [vector for (_, vector), text in zip(pairs, inputs, strict=True) if text not in ("text 5", "text 50")]
        return list(enumerate(kept))

    transport = VectorTransport(spoil)
    async with batcher_for(transport) as batcher:
        found = await embed_all(batcher, texts())
        conserved(batcher, transport, found)
    wrong = {text for one, text in zip(found, texts(), strict=True) if isinstance(one, mb.MalformedAnswer)}
    assert wrong == {"text 5", "text 50"}
    assert all(is_right(one, text) for one, text in zip(found, texts(), strict=True) if text not in wrong)
    assert len(transport.calls) <= 1 + 2 * 2 * math.ceil(math.log2(MANY)) + 2


# --- vectors that cannot be used


@each("kind", SPOILED)
async def test_of_a_reply_with_a_vector_that_cannot_be_used_the_others_are_handed_out(kind):
    def spoil(number, _, pairs):
        return pairs if number else [SPOILED[kind](pair) if pair[0] in (3, 7, 9) else pair for pair in pairs]

    transport = VectorTransport(spoil)
    async with batcher_for(transport) as batcher:
        found = await embed_all(batcher, texts())
        conserved(batcher, transport, found)
    assert all(is_right(*pair) for pair in zip(found, texts(), strict=True))
    assert transport.sizes == [64, 2, 1]
    assert found[3].usage.prompt_tokens == 2 * len("text 3")  # both calls that carried it


@each("kind", SPOILED)
async def test_a_text_whose_vector_is_never_of_use_ends_with_an_error_and_no_other_does(kind):
    def spoil(_, inputs, pairs):
        return [SPOILED[kind](pair) if text == "text 3" else pair for pair, text in zip(pairs, inputs, strict=True)]

    transport = VectorTransport(spoil)
    async with batcher_for(transport) as batcher:
        found = await embed_all(batcher, texts())
        conserved(batcher, transport, found)
    assert [type(one) for one in found].count(mb.MalformedAnswer) == 1
    assert isinstance(found[3], mb.MalformedAnswer)
    assert transport.sizes == [64, 1, 1]


async def test_a_vector_of_another_length_than_asked_for_is_asked_again():
    transport = VectorTransport(
        lambda number, _, pairs: pairs if number else at(0, lambda _: (0, array("f", [1, 2])))(pairs)
    )
    async with batcher_for(transport) as batcher:
        found = await embed_all(batcher, texts(), dimensions=3)
    assert all(is_right(*pair, 3) for pair in zip(found, texts(), strict=True))
    assert transport.sizes == [64, 1]


async def test_a_vector_of_another_length_than_the_lane_has_seen_is_asked_again():
    transport = VectorTransport(lambda number, _, pairs: pairs if number != 1 else [(0, array("f", [1, 2]))])
    async with batcher_for(transport) as batcher:
        for text in texts(3):
            assert is_right(await batcher.embed(text), text)
    assert transport.sizes == [1, 1, 1, 1]


async def test_dimensions_that_a_model_ignores_are_an_error():
    transport = VectorTransport(lambda _, inputs, pairs: [(0, vector_of(inputs[0], 5))])
    async with batcher_for(transport) as batcher:
        with pytest.raises(mb.MalformedAnswer, match="5 numbers in place of 3"):
            await batcher.embed("x", dimensions=3)


async def test_dimensions_that_a_model_ignores_cost_a_list_and_one_more_call():
    transport = VectorTransport(
        lambda _, inputs, __: [(index, vector_of(text, 5)) for index, text in enumerate(inputs)]
    )
    async with batcher_for(transport) as batcher:
        found = await embed_all(batcher, texts(), dimensions=3)
        conserved(batcher, transport, found)
    assert {type(one) for one in found} == {mb.MalformedAnswer}
    assert all("5 numbers in place of 3" in str(one) and "ignores dimensions" in str(one) for one in found)
    assert transport.sizes == [64, 1]


async def test_lists_of_another_length_are_believed_if_a_text_alone_has_it_too():
    length = LENGTH
    transport = VectorTransport(
        lambda _, inputs, __: [(index, vector_of(text, length)) for index, text in enumerate(inputs)]
    )
    async with batcher_for(transport) as batcher:
        await batcher.embed("before")
        length = 6
        found = await embed_all(batcher, texts())
        assert all(is_right(*pair, 6) for pair in zip(found, texts(), strict=True))
        conserved(batcher, transport, [*found, mb.Embedding(vector_of("before"), usage=mb.Usage(len("before")))])
        assert transport.sizes == [1, 64, 1, 32, 32]
        assert is_right(await batcher.embed("after"), "after", 6)
    assert transport.sizes == [1, 64, 1, 32, 32, 1]


async def test_a_list_of_another_length_is_not_believed_if_a_text_alone_has_the_known_one():
    transport = VectorTransport(
        lambda _, inputs, pairs: pairs if len(inputs) == 1 else [(index, vector[:2]) for index, vector in pairs]
    )
    async with batcher_for(transport) as batcher:
        await batcher.embed("before")
        found = await embed_all(batcher, texts())
    assert all(is_right(*pair) for pair in zip(found, texts(), strict=True))


async def test_a_model_whose_vectors_have_another_length_from_now_on_is_believed_in_the_end():
    changed = False
    transport = VectorTransport(
        lambda _, inputs, pairs: (
            [(index, vector_of(text, 6)) for index, text in enumerate(inputs)] if changed else pairs
        )
    )
    async with batcher_for(transport) as batcher:
        await batcher.embed("before")
        changed = True
        found = [await asyncio.gather(batcher.embed(text), return_exceptions=True) for text in texts(10)]
    failed = [one for (one,) in found if isinstance(one, mb.MalformedAnswer)]
    assert len(failed) == 3
    assert is_right(found[9][0], "text 9", 6)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("count", [2, 7, 128, 1_000])
async def test_however_often_replies_are_wrong_n_texts_take_about_2n_further_calls(count, rate):
    draw = random.Random(count)

    def spoil(_, inputs, pairs):
        if draw.random() >= rate:
            return pairs
        kind = draw.choice(["missing", "empty", *SPOILED])
        if kind in SPOILED:
            place = draw.randrange(len(pairs))
            return [*pairs[:place], SPOILED[kind](pairs[place]), *pairs[place + 1 :]]
        return UNTRUSTED[kind](pairs)

    transport = VectorTransport(spoil)
    async with batcher_for(transport) as batcher:
        found = await embed_all(batcher, texts(count))
        conserved(batcher, transport, found)
    for one, text in zip(found, texts(count), strict=True):
        assert isinstance(one, mb.MalformedAnswer) or is_right(one, text)
    assert len(transport.calls) <= 1 + 2.25 * count + 6


async def test_a_model_that_has_one_sound_vector_in_a_list_and_no_other_is_not_bisected_to_the_end():
    def spoil(_, inputs, pairs):
        return [pair if text == "text 0" else (pair[0], None) for pair, text in zip(pairs, inputs, strict=True)]

    transport = VectorTransport(spoil)
    async with batcher_for(transport) as batcher:
        found = await embed_all(batcher, texts(400))
        conserved(batcher, transport, found)
    assert [type(one) for one in found].count(mb.MalformedAnswer) == 399
    assert len(transport.calls) <= 1 + 2.25 * 400 + 6


# --- refusals


@pytest.mark.parametrize("count", [2, 3, 5, 64, 100])
@pytest.mark.parametrize("causes", [1, 2, 5])
async def test_a_refused_list_is_bisected_and_only_the_causes_fail(count, causes):
    bad = {f"text {number * count // causes}" for number in range(min(causes, count))}
    transport = VectorTransport(refused=bad)
    async with batcher_for(transport) as batcher:
        found = await embed_all(batcher, texts(count))
        conserved(batcher, transport, found)
    for one, text in zip(found, texts(count), strict=True):
        assert isinstance(one, mb.BadRequest) if text in bad else is_right(one, text)
    assert len(transport.calls) <= 1 + 2 * len(bad) * math.ceil(math.log2(count))


@each(
    "error",
    [
        mb.BadRequest("too long", status=400),
        mb.BadRequest("too large", status=413),
        mb.BadRequest("no", status=422),
        mb.ContextTooLong("8192 tokens", status=400),
        mb.Filtered("bad words", status=403),
        mb.ConfigError("this transport cannot"),
    ],
)
async def test_whatever_one_text_may_have_caused_is_bisected(error):
    def spoil(_, inputs, pairs):
        if "text 3" in inputs:
            raise error.replica()
        return pairs

    transport = VectorTransport(spoil)
    async with batcher_for(transport) as batcher:
        found = await embed_all(batcher, texts(8))
    assert isinstance(found[3], type(error))
    assert [type(one) for one in found].count(mb.Embedding) == 7


@each("most", [1, 7, 32, 48])
async def test_a_lane_learns_how_long_the_lists_may_be(most):
    transport = VectorTransport(most=most)
    async with batcher_for(transport) as batcher:
        found = await embed_all(batcher, texts(200))
        assert all(is_right(*pair) for pair in zip(found, texts(200), strict=True))
        before = len(transport.calls)
        found = await embed_all(batcher, [f"more {text}" for text in texts(200)])
        assert all(isinstance(one, mb.Embedding) for one in found)
        assert max(transport.sizes[before:]) <= most
        assert len(transport.calls) - before <= 2 * math.ceil(200 / most)


async def test_a_learned_length_is_tried_again_after_many_full_lists():
    transport = VectorTransport(most=1_000)
    async with batcher_for(transport) as batcher:
        await batcher.embed_many(texts(1_024))
        before = len(transport.calls)
        await batcher.embed_many(texts(512 * 15))
        assert set(transport.sizes[before:]) == {512}
        await batcher.embed_many(texts(1_024))
        await batcher.embed_many(texts(1_024))
        assert transport.sizes[before + 15 :] == [512, 512, 1_024, 512, 512]


async def test_bulk_work_does_not_meet_a_short_limit_with_all_its_slots():
    transport = VectorTransport(most=32, delay=1.0)
    async with batcher_for(transport) as batcher:
        found = await batcher.embed_many(texts(8_192))
        assert all(is_right(*pair) for pair in zip(found, texts(8_192), strict=True))
    refused = [size for size in transport.sizes if size > 32]
    assert len(refused) <= 2 * 63


async def test_a_refusal_after_the_lane_has_learned_goes_to_the_learned_length_at_once():
    transport = VectorTransport(most=32, delay=1.0)
    async with batcher_for(transport, fallback=mb.FallbackPolicy(max_concurrent=64)) as batcher:
        first = asyncio.ensure_future(embed_all(batcher, texts(256)))
        await asyncio.sleep(0.5)
        second = asyncio.ensure_future(embed_all(batcher, [f"more {text}" for text in texts(1_024)]))
        await asyncio.gather(first, second)
    assert sum(size > 32 for size in transport.sizes) <= 7 + 15 + 8


# --- callers that leave meanwhile


async def test_who_leaves_while_the_list_is_asked_again_is_not_asked_for():
    tasks = []

    def spoil(number, _, pairs):
        if not number:
            for task in tasks[:32]:
                task.cancel()
            return []
        return pairs

    transport = VectorTransport(spoil)
    async with batcher_for(transport) as batcher:
        tasks += [asyncio.ensure_future(batcher.embed(text)) for text in texts()]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        conserved(batcher, transport, found)
    assert transport.sizes[0] == 64
    assert sum(transport.sizes[1:]) == 32


async def test_a_vector_that_was_asked_for_again_is_cached():
    transport = VectorTransport(lambda number, _, pairs: pairs if number else [])
    async with batcher_for(transport, mb.MemoryCache()) as batcher:
        await embed_all(batcher, texts(4))
        before = len(transport.calls)
        found = await embed_all(batcher, texts(4))
        assert all(is_right(*pair) for pair in zip(found, texts(4), strict=True))
    assert len(transport.calls) == before
